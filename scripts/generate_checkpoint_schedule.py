"""Print when a run would save, in tokens and in steps.

    python scripts/generate_checkpoint_schedule.py config/arch_llama.py --first_epoch_checkpoints=20 --epochs=3

The arguments are those of train.py. The last line can be pasted into a config file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model_builder  # noqa: F401  (the parts' options become settings by being imported)
import training_objectives  # noqa: F401
import training_optim  # noqa: F401
import training_schedules as schedules
from user_errors import UserError, exit_on_user_error


@exit_on_user_error
def main(arguments):
    if not arguments or "--help" in arguments or "-h" in arguments:
        return print(__doc__.strip())
    plan = schedules.plan(arguments)
    if not plan.counts:
        raise UserError("no schedule is set: give --first_epoch_checkpoints=20, or --checkpoint_tokens=1M,5M,20M")
    print(
        f"{plan.tokens_per_step:,} tokens per step, {plan.tokens_per_epoch:,} per epoch, {plan.total_tokens:,} in all"
    )
    print(f"{'step':>10}{'scheduled':>18}{'true tokens':>18}{'epoch':>10}")
    for step, count in plan.steps.items():
        true = step * plan.tokens_per_step
        print(f"{step:>10,}{count:>18,}{true:>18,}{true / plan.tokens_per_epoch:>10.3f}")
    if merged := len(plan.counts) - len(plan.steps):
        print(f"{merged} more fall on steps that others do: a step has more tokens than lie between them")
    print(f"\ncheckpoint_tokens = {tuple(plan.counts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
