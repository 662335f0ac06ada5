"""Write one checkpoint schedule into several config files, so that their runs save at the same counts of tokens.

    python scripts/sync_checkpoint_schedules.py my_llama.py my_mamba.py
    python scripts/sync_checkpoint_schedules.py my_llama.py my_mamba.py --max_tokens=10000000 --checkpoint_tokens=1M,5M

Each file is one run's settings; --name=value is laid over all of them. The schedule is the one that they have, or that
the command gives. Files that contradict each other are refused, and everything else in them stays as it is.
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
    paths = [argument for argument in arguments if not argument.startswith("--")]
    settings = [argument for argument in arguments if argument.startswith("--")]
    for flag in settings:
        if "=" not in flag:
            raise UserError(f"{flag} must be written as {flag}=VALUE here, since what follows it may be a config file")
    if len({Path(path).resolve() for path in paths}) < 2:
        raise UserError("name at least two config files to give one schedule to")
    counts, changed = schedules.synchronise(paths, settings)
    print(f"schedule: {len(counts)} token counts, {counts[0]:,} to {counts[-1]:,}")
    for path in paths:
        print(f"{path}: {'written' if path in changed else 'had it already'}")


if __name__ == "__main__":
    main(sys.argv[1:])
