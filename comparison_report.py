"""Print a comparison in the terminal and write summary_table.csv, summary_table.md and pairs.csv.

    show(rankings, analyses, problems, console)              # rich, imported when needed
    write_csv(rankings, analyses, folder / 'summary_table.csv')

The words come from comparison_words.py; comparison_html.py writes the same as a page.
"""

import csv
import re
from pathlib import Path

from comparison_curves import AXES
from comparison_ranking import COLUMN, COLUMNS, STACKED, cell, name_of
from comparison_words import sections_after, sections_before, verdict_section, void_section

# -- the terminal


def show(rankings, analyses, problems, console, max_rows=30):
    """Print everything to a rich Console; long lists are cut, the files hold them in full."""
    for problem in problems[:10]:
        console.print(f"skipped or incomplete: {problem}", style="yellow")
    if len(problems) > 10:
        console.print(f"and {len(problems) - 10} more lines like these", style="yellow")
    show_sections(void_section(rankings, 3), console)
    for number, (ranking, analysis) in enumerate(zip(rankings, analyses, strict=True), 1):
        which = f"Ranking {number} of {len(rankings)}: " if len(rankings) > 1 else ""
        console.print()
        console.print(f"{which}{ranking.title}, by {COLUMN[ranking.sort].title}", style="bold cyan")
        show_sections(sections_before(ranking, 3), console)
        console.print()
        console.print(fitting_table(ranking, console, max_rows))
        hidden = len(ranking.configurations) - max_rows
        if hidden > 0:
            console.print(f"and {hidden} more rows in summary_table.csv (--max_rows=0 shows all)", style="dim")
        console.print()
        show_sections(verdict_section(ranking, analysis, 4), console)
        show_sections(sections_after(ranking, analysis, 3), console)


def show_sections(sections, console):
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for heading, style, rows in sections:
        if heading:
            console.print(Text(heading, style=style))
        grid = Table.grid(padding=(0, 2))
        for left, right in rows:
            grid.add_row(Text(left, overflow="fold"), Text(right, overflow="fold"))
        if rows:
            console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def fitting_table(ranking, console, max_rows):
    """One line for each row where the terminal is wide enough, else two, with the architecture under the name."""
    places = ranking.places()[: max_rows or None]
    shown = [column.name for column in ranking.columns if column.name != "state_bytes"]  # there is no room
    wide = terminal_table(places, [(name,) for name in shown])
    if natural_width(wide, console) <= console.width:
        return wide
    stacked = [pair for pair in STACKED if set(pair) & set(shown)]
    longest = max(len(line) for _, each in places for line in stacked_name(each).split("\n"))
    others = natural_width(terminal_table(places, stacked), console) - longest
    return terminal_table(places, stacked, name_width=max(12, console.width - others))


def natural_width(table, console):
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def terminal_table(places, columns, name_width=10_000):
    """A rich Table; `columns` are pairs as in STACKED, or single names for one line in each row."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    is_stacked = any(len(pair) > 1 for pair in columns)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("run\n architecture" if is_stacked else "run", overflow="fold")
    if not is_stacked:
        table.add_column("architecture", overflow="fold")
    for pair in columns:
        header = "\n".join(COLUMN[name].title for name in pair) if is_stacked else COLUMN[pair[0]].header
        table.add_column(header, justify="right", no_wrap=True)
    for place, each in places:
        names = [wrapped(stacked_name(each), name_width)] if is_stacked else stacked_name(each).split("\n ")
        cells = ["\n".join(cell(each, name) for name in pair) for pair in columns]
        table.add_row(*map(Text, [place, *names, *cells]), style={"-": "dim", "1": "bold green"}.get(place, ""))
    return table


def stacked_name(configuration):
    """The name, and under it the architecture, one space in."""
    return f"{name_of(configuration)}\n {configuration.runs[0].values['architecture']}"


def wrapped(text, width):
    """Text broken after a separator, where rich would break inside a word: 4L-4H-128D-RoPE- / RMS-SwiGLU-PreNorm."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for piece in re.findall(r"[^-_,/ ]*[-_,/ ]|[^-_,/ ]+", line):
            if len(lines[-1]) + len(piece) > width and lines[-1].strip():
                lines.append(" ")
            lines[-1] += piece
    return "\n".join(lines)


# -- files


def write_csv(rankings, analyses, path):
    """One row for each run, numbers in full; the configuration's statistics are repeated on each of its runs."""
    both = enumerate(zip(rankings, analyses, strict=True), 1)
    rows = [row for number, (ranking, analysis) in both for row in csv_rows(number, ranking, analysis)]
    write_table(rows, list(rows[0]), path)


def write_table(rows, names, path):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


PAIR_COLUMNS = ("ranking", "first", "second", "loss", "second_minus_first", "ci95", "std", "seeds", "p", "p_holm",
                "pairs_tested", "verdict", "void_because")  # fmt: skip


def write_pairs(rankings, path):
    """pairs.csv: every two rows that were held against each other."""
    rows = [pair_row(number, ranking, pair) for number, ranking in enumerate(rankings, 1)
            for pair in ranking.pairs.values()]  # fmt: skip
    write_table(rows, PAIR_COLUMNS, path)


def write_evaluations(rows, path):
    """evaluations.csv, where there is anything to write; the names of the files written."""
    if rows:
        write_table(rows, list(rows[0]), path)
    return [path.name] if rows else []


def pair_row(number, ranking, pair):
    difference = pair.difference
    values = (number, pair.first.label, pair.second.label, ranking.loss_column, difference.mean, difference.half_width,
              difference.spread, difference.n, difference.p_value, pair.p_holm, pair.n_tested, pair.verdict,
              "; ".join(pair.voids))  # fmt: skip
    return dict(zip(PAIR_COLUMNS, values, strict=True))


def csv_rows(number, ranking, analysis):
    costs = {each.configuration: each for each in analysis.costs}
    for place, configuration in ranking.places():
        over_seeds = configuration.estimate("final_val_loss")
        for run in configuration.runs:
            yield {
                "ranking": number,
                "rank": place if place != "-" else None,
                "name": run.name,
                "configuration": configuration.label,
                "status": run.status,
                "seed": run.seed,
                "architecture": run.values["architecture"],
                **{column.name: run.values.get(column.name) for column in COLUMNS},
                "seeds": over_seeds.n,
                "final_val_loss_mean": over_seeds.mean,
                "final_val_loss_ci95": over_seeds.half_width,
                "final_val_loss_std": over_seeds.spread,
                "claim": ranking.claim(configuration),
                "target_loss": analysis.target,
                **{
                    f"{axis.lower()}_to_target": costs[configuration].by_axis[axis].get(run.seed)
                    if configuration in costs
                    else None
                    for axis in AXES
                },
                **{name: run.values[name] for name in ("steps", "train_seconds", "eval_seconds", "total_flops")},
                "dataset": run.get("dataset", "name"),
                "dataset_fingerprint": run.get("dataset", "fingerprint"),
                "tokenizer": run.get("dataset", "tokenizer"),
                "evaluation_hash": run.get("dataset", "evaluation_hash"),
                "objective": run.get("training_config", "objective"),
                "block_size": run.get("model_config", "block_size"),
                **{name: run.get("resolved", name) for name in ("tokens_per_step", "dtype", "compile", "device")},
                "torch": run.get("versions", "torch"),
                "git_commit": run.get("git", "commit"),
                "git_dirty": run.get("git", "dirty"),
                "stream_hash": run.values["stream_hash"],
                "folder": run.folder.as_posix(),
            }


def write_markdown(rankings, analyses, problems, plots, path):
    """The same words and table as in the terminal, nothing cut; `plots` are the files of each ranking."""
    lines = ["# Comparison", ""]
    if problems:
        lines += ["## Skipped or incomplete", "", *(f"- {escape(problem)}" for problem in problems), ""]
    lines += markdown_sections(void_section(rankings, 1000))
    for ranking, analysis, images in zip(rankings, analyses, plots, strict=True):
        lines += [f"## {escape(ranking.title)}", "", *markdown_sections(sections_before(ranking, 1000))]
        lines += markdown_sections(verdict_section(ranking, analysis, 1000))
        lines += [*markdown_table(ranking), "", f"Sorted by {COLUMN[ranking.sort].title}.", ""]
        lines += markdown_sections(sections_after(ranking, analysis, 1000))
        for image in images:
            lines += [f"![{image.stem.replace('_', ' ')}]({image.name})", ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8", newline="\n")


def markdown_sections(sections):
    lines = []
    for heading, _, rows in sections:
        lines += [f"**{escape(heading)}**", ""] if heading else []
        lines += [f"- {escape(left)}" + (f": {escape(right)}" if right else "") for left, right in rows]
        lines += [""] if rows else []
    return lines


def markdown_table(ranking):
    columns = ranking.columns
    headers = ["#", "run", "architecture", *(column.title for column in columns), "claim"]
    lines = [row_of(headers), row_of(["--:", ":--", ":--"] + ["--:"] * len(columns) + [":--"])]
    for place, each in ranking.places():
        first = [place, name_of(each), str(each.runs[0].values["architecture"])]
        cells = [cell(each, column.name) for column in columns]
        lines.append(row_of(escape(text) for text in [*first, *cells, ranking.claim(each)]))
    return lines


def row_of(texts):
    return f"| {' | '.join(texts)} |"


def escape(text):
    """Run names are the user's own; none of them may turn into Markdown."""
    return "".join("\\" + letter if letter in "\\|*_`<[]" else letter for letter in str(text).replace("\n", " "))
