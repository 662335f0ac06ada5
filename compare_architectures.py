"""Compare finished runs: one ranked table, what was equal, what differs, and the loss curves.

    python compare_architectures.py --latest 4                      # the last four runs
    python compare_architectures.py gpt2 'llama*'                   # by name or glob
    python compare_architectures.py --runs_dir sweeps/tiny --sort bits_per_byte --out_dir comparisons/tiny
    python compare_architectures.py --at_tokens=100M --to_loss=3.5  # held at 100M tokens; what reaching 3.5 cost

It reads run folders as train.py leaves them and loads no model. Runs of one configuration that differ in their seed
make one row: the mean, and the 95% interval. Runs with different data, tokenizers, evaluation sets or objectives are
never ranked together. It leaves behind, in a folder of its own that is never written over:

    report.html           everything, as one page that opens from disk: rules, verdict, table, curves, fronts, fits
    summary_table.csv     one row for each run, numbers in full
    summary_table.md      the audit, the verdict, the table, the differences
    pairs.csv             every pair of rows: difference, interval, corrected p, verdict
    evaluations.csv       what evaluate.py found of each run, where it was asked: prompts, tasks, parts of the loss
    loss_parts.png        the parts of the loss, side by side, where it was asked for them
    validation_loss.png   against tokens, FLOPs and seconds
    training_loss.png     the same, smoothed
"""

import argparse
import os
import shlex
import sys
from datetime import datetime

from comparison_analysis import analyse
from comparison_evals import eval_problems, rows_for_csv
from comparison_folders import fresh_folder, token_count
from comparison_groups import draw_loss_parts
from comparison_html import write_html
from comparison_logs import prompt_problems
from comparison_plots import draw_curves
from comparison_ranking import COLUMN, rank
from comparison_report import show, write_csv, write_evaluations, write_markdown, write_pairs
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
    parser.add_argument("--at_tokens", type=token_count, metavar="N", help="compare at this many tokens, such as 100M")
    parser.add_argument("--to_loss", type=float, metavar="LOSS", help="the loss whose cost is told (what all reached)")
    parser.add_argument("--max_rows", type=int, default=30, metavar="N", help="rows in the terminal (30); 0 for all")
    parser.add_argument("--no_plots", action="store_true", help="leave the curves out, which is faster")
    parser.add_argument("--log_x", action="store_true", help="logarithmic x axes")
    arguments = parser.parse_args(argv)
    if arguments.sort is not None and arguments.sort not in COLUMN:
        hint = did_you_mean(arguments.sort, COLUMN)
        raise UserError(f"--sort={arguments.sort} is not a column{hint} (known: {', '.join(COLUMN)})")
    if arguments.latest is not None and arguments.latest < 1:
        raise UserError(f"--latest={arguments.latest} must be at least 1")
    if arguments.to_loss is not None and not 0 < arguments.to_loss < float("inf"):
        raise UserError(f"--to_loss={arguments.to_loss} must be a number above 0")
    if arguments.max_rows < 0:
        raise UserError(f"--max_rows={arguments.max_rows} must be 0 or more")
    return arguments


@exit_on_user_error
def main(argv=None):
    arguments = parse_arguments(argv)
    runs, problems = find_runs(arguments.runs_dir, arguments.runs, arguments.latest)
    rankings = rank(runs, arguments.sort, arguments.at_tokens)
    analyses = [analyse(ranking, arguments.to_loss) for ranking in rankings]
    add_new(problems, [f"{run.name}: {trouble}" for run in runs for trouble in run.problems])
    add_new(problems, [trouble for ranking in rankings for trouble in prompt_problems(ranking.runs)])
    add_new(problems, [trouble for ranking in rankings for trouble in eval_problems(ranking.runs)])
    folder = fresh_folder(arguments.out_dir or f"comparisons/{datetime.now():%Y-%m-%d_%H%M%S}")
    write_csv(rankings, analyses, folder / "summary_table.csv")
    write_pairs(rankings, folder / "pairs.csv")
    evaluated = write_evaluations(list(rows_for_csv(rankings)), folder / "evaluations.csv")
    write_html(rankings, analyses, problems, folder / "report.html", command_line(argv), arguments.log_x)

    console = make_console()
    show(rankings, analyses, problems, console, arguments.max_rows)  # before the plots, which take seconds
    plots = [[] for _ in rankings]
    if not arguments.no_plots:
        plots = [plot_ranking(number, rankings, folder, arguments.log_x, problems) for number in range(len(rankings))]
    write_markdown(rankings, analyses, problems, plots, folder / "summary_table.md")
    written = [
        "report.html",
        "summary_table.csv",
        "summary_table.md",
        "pairs.csv",
        *evaluated,
        *(path.name for paths in plots for path in paths),
    ]
    console.print(f"\nWrote {', '.join(written)} to {folder.as_posix()}/", style="dim", soft_wrap=True)


def plot_ranking(number, rankings, folder, log_x, problems):
    prefix = f"ranking_{number + 1}_" if len(rankings) > 1 else ""
    paths, troubles = draw_curves(rankings[number], folder, prefix, log_x)
    for trouble in add_new(problems, troubles):
        print(f"incomplete: {trouble}", file=sys.stderr)
    return paths + draw_loss_parts(rankings[number], folder / f"{prefix}loss_parts.png")


def add_new(problems, troubles):
    """Append what was not told yet; returns it."""
    new = [trouble for trouble in dict.fromkeys(troubles) if trouble not in problems]
    problems += new
    return new


def command_line(argv):
    """The command as a person would type it."""
    return shlex.join(["python", "compare_architectures.py", *(sys.argv[1:] if argv is None else argv)])


def make_console():
    """A rich console that neither colours nor reflows what goes to a file, and never dies of an encoding."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    is_sized = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(width=None if is_sized else PIPE_WIDTH, highlight=False, markup=False, emoji=False)


if __name__ == "__main__":
    main()
