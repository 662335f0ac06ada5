"""Check that the token counts of runs' checkpoints add up and line up; exit code 1 where they do not.

python scripts/verify_checkpoints.py runs/llama-1M-s1 runs/mamba-1M-s1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison_checkpoints import problems_between, problems_of_run, read_run
from user_errors import UserError, exit_on_user_error


@exit_on_user_error
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return print(__doc__.strip())
    if not arguments:
        raise UserError("no run folder is given: python scripts/verify_checkpoints.py runs/NAME ...")
    for flag in arguments:
        if flag.startswith("-"):
            raise UserError(f"{flag} is no run folder; see --help")
    runs = [read_run(path) for path in dict.fromkeys(Path(argument) for argument in arguments)]
    problems = [problem for run in runs for problem in problems_of_run(run)] + problems_between(runs)
    for problem in problems:
        print(problem)
    n_checkpoints = sum(len(run.checkpoints) for run in runs)
    if problems:
        sys.exit(1)
    print(f"{n_checkpoints} checkpoints of {len(runs)} runs agree")


if __name__ == "__main__":
    main(sys.argv[1:])
