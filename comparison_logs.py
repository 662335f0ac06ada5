"""Read what a run appended while it ran: metrics.jsonl, and evals.jsonl of evaluate.py. Standard library only.

    rows, problems = read_metrics(folder, kind='eval')

A line that was cut off or garbled costs one sentence, and the rest is used.
"""

import json
import statistics
from pathlib import Path

from comparison_settings import dig, key_of, number, short

# Scores of summary.json and of an evaluation's row that some objectives have.
OF_ONE_OBJECTIVE = (
    "pseudo_perplexity", "masked_accuracy", "answer_accuracy",
    "lm_loss", "wp_loss", "wp_acc", "wp_gap", "wp_ece", "wp_brier",
)  # fmt: skip


# -- evals.jsonl


def prompt_score(folder, step=None):
    """((what was asked, how, step), score) of the line that evaluate.py appended last to a run's evals.jsonl.

    Of the checkpoint at `step`, else of the latest that has a line. (None, None) where there is no such line; one that
    was cut off is left out.
    """
    row = last_evals(folder, step).get("prompts")
    if row is None or number(row.get("score")) is None:
        return None, None
    asked = f"{dig(row, 'prompt_file', 'name')} (sha256 {short(dig(row, 'prompt_file', 'sha256'))})"
    return (asked, key_of(row.get("decoding")), row["step"]), number(row["score"])


def last_evals(folder, step=None):
    """{kind: line} of a run's evals.jsonl: of each kind the line that was appended last about the checkpoint at `step`,
    else about the latest checkpoint that has one. What was cut off is left out.
    """
    try:
        rows = [parse_row(line) for line in (Path(folder) / "evals.jsonl").read_bytes().splitlines()]
    except OSError:
        return {}
    found = {}
    for row in rows:
        if row is not None and step in (None, row["step"]):
            kind = str(row.get("kind"))
            if kind not in found or found[kind]["step"] <= row["step"]:
                found[kind] = row
    return found


def prompt_problems(runs):
    """Lines on prompt scores that cannot be held against each other, or are not of the end of a run."""
    asked = [run for run in runs if run.prompts]
    problems = [
        f"{run.name}: its prompt score is of step {run.prompts[2]}, not of its last, {run.values['steps']}"
        for run in asked
        if run.values["steps"] is not None and run.prompts[2] != run.values["steps"]
    ]
    for index, what in enumerate(("prompt files", "settings of decoding")):
        different = list(dict.fromkeys(run.prompts[index] for run in asked))
        if len(different) > 1:
            names = f": {' and '.join(different[:2])}" if index == 0 else ""
            problems.append(f"prompt scores are of different {what}{names}; they cannot be held against each other")
    return problems


# -- metrics.jsonl


def read_metrics(folder, kind=None):
    """(rows, problems) of metrics.jsonl, in the order of steps; lines that are cut off or garbled are left out.

    With a `kind` only its rows are parsed, which is most of the time that a long file takes.
    After a crash and a resume the steps in between were logged twice: the last line about a step counts.
    """
    try:
        lines = (Path(folder) / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"metrics.jsonl cannot be read ({error})"]
    rows, bad_lines = {}, []
    mark = None if kind is None else f'"{kind}"'.encode()
    for line_number, line in enumerate(lines, 1):
        if mark is not None and mark not in line and line.endswith(b"}"):
            continue
        row = parse_row(line)
        if row is not None and kind is not None and row.get("kind") != kind:
            continue
        if row is not None:
            rows[(str(row.get("kind")), row["step"])] = row
        elif line.strip():
            bad_lines.append(line_number)
    problems = []
    if bad_lines:
        where = f"line {bad_lines[0]}" if len(bad_lines) == 1 else f"{len(bad_lines)} lines, the first {bad_lines[0]},"
        cut = " (cut off at the end)" if bad_lines == [len(lines)] else ""
        problems.append(f"metrics.jsonl: {where} cannot be read{cut}; the rest is used")
    return sorted(rows.values(), key=lambda row: row["step"]), problems


def parse_row(line):
    """One line of metrics.jsonl as a dict with a step, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and number(row.get("step")) is not None else None


def series(rows, kind, column):
    """[value or None, ...] of one column over the rows of a kind, 'train' or 'eval'."""
    return [number(row.get(column)) for row in rows if row.get("kind") == kind]


def summary_from_metrics(rows):
    """What summary.json would say so far, for a run that is still going or that died."""

    def present(kind, column):
        return [value for value in series(rows, kind, column) if value is not None]

    def last(kind, column):
        return (present(kind, column) or [None])[-1]

    def median(column):
        values = present("train", column)
        return statistics.median(values) if values else None

    last_row = rows[-1]
    return {
        "status": "unfinished",
        "final_val_loss": last("eval", "val_loss"),
        "best_val_loss": min(present("eval", "val_loss"), default=None),
        "bits_per_byte": last("eval", "bits_per_byte"),
        **{name: last("eval", name) for name in OF_ONE_OBJECTIVE},
        "tokens_processed": last_row.get("tokens_processed"),
        "train_seconds": last_row.get("train_seconds"),
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "peak_memory_bytes": last("train", "peak_memory_bytes"),
        "non_finite_steps": last("train", "non_finite_steps"),
        "steps": last_row.get("step"),
    }
