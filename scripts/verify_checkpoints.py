"""Check that the token counts of runs' checkpoints add up and line up; exit code 1 where they do not.

python scripts/verify_checkpoints.py runs/llama-1M-s1 runs/mamba-1M-s1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison_checkpoints import problems_between, problems_of_run, read_run
from user_errors import exit_on_user_error, paths_given


@exit_on_user_error
def main(arguments):
    usage = "python scripts/verify_checkpoints.py runs/NAME ..."
    if not (folders := paths_given(arguments, __doc__, "run folder", usage)):
        return
    runs = [read_run(folder) for folder in folders]
    problems = [problem for run in runs for problem in problems_of_run(run)] + problems_between(runs)
    for problem in problems:
        print(problem)
    n_checkpoints = sum(len(run.checkpoints) for run in runs)
    if problems:
        sys.exit(1)
    print(f"{n_checkpoints} checkpoints of {len(runs)} runs agree")


if __name__ == "__main__":
    main(sys.argv[1:])
