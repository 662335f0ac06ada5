"""Compare finished runs: one ranked table, what was equal, what differs, and the loss curves.

    python compare_architectures.py --latest 4                      # the last four runs
    python compare_architectures.py gpt2 'llama*'                   # by name or glob
    python compare_architectures.py --runs_dir sweeps/tiny --sort bits_per_byte --out_dir comparisons/tiny

It reads run folders as train.py leaves them and loads no model. Runs of one configuration that differ in their seed
make one row: the mean, and the 95% interval. Runs with different data, tokenizers, evaluation sets or objectives are
never ranked together. It leaves behind, in a folder of its own that is never written over:

    summary_table.csv     one row for each run, numbers in full
    summary_table.md      the audit, the table, the differences
    validation_loss.png   against tokens, FLOPs and seconds
    training_loss.png     the same, smoothed
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

from comparison_plots import draw_curves
from comparison_report import COLUMN, rank, show, write_csv, write_markdown
from comparison_runs import find_runs
from user_errors import Parser, UserError, did_you_mean, exit_on_user_error

PIPE_WIDTH = 160  # columns when the output goes to a file or a pipe, so that every run keeps to one line


def parse_arguments(argv=None):
    description, _, _ = __doc__.partition("\n\nIt reads")
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names, globs or paths of run folders; none takes all")
    parser.add_argument("--latest", type=int, metavar="N", help="only the N runs that were started last")
    parser.add_argument("--runs_dir", default="runs", metavar="DIR", help="the folder that holds run folders (runs)")
    parser.add_argument("--out_dir", metavar="DIR", help="where the files go (comparisons/DATE_TIME)")
    columns = f"what the objective is judged by, mostly final_val_loss; or one of {', '.join(COLUMN)}"
    parser.add_argument("--sort", metavar="COLUMN", help=columns)
    parser.add_argument("--max_rows", type=int, default=30, metavar="N", help="rows in the terminal (30); 0 for all")
    parser.add_argument("--no_plots", action="store_true", help="leave the curves out, which is faster")
    parser.add_argument("--log_x", action="store_true", help="logarithmic x axes")
    arguments = parser.parse_args(argv)
    if arguments.sort is not None and arguments.sort not in COLUMN:
        known = f"; take one of {', '.join(COLUMN)}"
        raise UserError(f"--sort={arguments.sort} is not a column{did_you_mean(arguments.sort, COLUMN) or known}")
    if arguments.latest is not None and arguments.latest < 1:
        raise UserError(f"--latest={arguments.latest} must be at least 1")
    if arguments.max_rows < 0:
        raise UserError(f"--max_rows={arguments.max_rows} must be 0 or more")
    return arguments


@exit_on_user_error
def main(argv=None):
    arguments = parse_arguments(argv)
    runs, problems = find_runs(arguments.runs_dir, arguments.runs, arguments.latest)
    rankings = rank(runs, arguments.sort)
    folder = fresh_folder(arguments.out_dir or f"comparisons/{datetime.now():%Y-%m-%d_%H%M%S}")
    write_csv(rankings, folder / "summary_table.csv")

    console = make_console()
    show(rankings, problems, console, arguments.max_rows)  # before the plots, which take seconds
    plots = [[] for _ in rankings]
    if not arguments.no_plots:
        plots = [plot_ranking(number, rankings, folder, arguments.log_x, problems) for number in range(len(rankings))]
    write_markdown(rankings, problems, plots, folder / "summary_table.md")
    written = ["summary_table.csv", "summary_table.md", *(path.name for paths in plots for path in paths)]
    console.print(f"\nWrote {', '.join(written)} to {folder.as_posix()}/", style="dim", soft_wrap=True)


def plot_ranking(number, rankings, folder, log_x, problems):
    prefix = f"ranking_{number + 1}_" if len(rankings) > 1 else ""
    paths, troubles = draw_curves(rankings[number], folder, prefix, log_x)
    new = [trouble for trouble in troubles if trouble not in problems]  # some were told when the runs were found
    for trouble in new:
        print(f"incomplete: {trouble}", file=sys.stderr)
    problems += new
    return paths


def make_console():
    """A rich console that neither colours nor reflows what goes to a file, and never dies of an encoding."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    is_sized = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(width=None if is_sized else PIPE_WIDTH, highlight=False, markup=False, emoji=False)


def fresh_folder(path):
    """Create `path`, or path-2, path-3, ... where it holds something already. Nothing is ever written over."""
    path = Path(path)
    for number in range(1, 10_000):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if folder.is_dir() and not any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(f"--out_dir={path} cannot be written: {error.strerror or error}") from None
    raise UserError(f"--out_dir={path} and its next 9,999 names are taken; choose another")


if __name__ == "__main__":
    main()
