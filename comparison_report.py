"""Say what a comparison found: the table in the terminal, summary_table.csv and summary_table.md.

    rankings = rank(runs)                          # one per set of comparable runs, each with its audit
    show(rankings, problems, console)              # rich, imported when needed
    write_csv(rankings, folder / 'summary_table.csv')

A row is a configuration: the mean over its seeds, with the 95% interval where there is more than one.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparison_runs import (
    CHECKS,
    audit,
    comparable_groups,
    differing_fields,
    key_of,
    setting_text,
    some,
)
from comparison_stats import group_configurations, paired

ONE_SEED = "One seed each: no claim about a difference can be made beyond these runs (repeat them with other --seed)."


# -- numbers as a person reads them


def si(value, digits=3):
    """1_536_000 -> '1.54M'."""
    if value is None:
        return "-"
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 0.5 * 10**-digits):  # 999,950 is 1.00M, not 1000k
            scaled = value / size
            return f"{scaled:.{max(0, digits - len(str(int(abs(scaled) + 1e-9))))}f}{suffix}"
    return f"{value:.{digits}g}"


def count(value):
    """Parameters and tokens: billions are B, as people say them."""
    return si(value).replace("G", "B")


def loss(value):
    return "-" if value is None else f"{value:.4f}"


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}%"


def mebibytes(value):
    """Bytes as MiB, or GiB from one GiB on."""
    if value is None:
        return "-"
    return f"{value / 2**30:.2f}GiB" if value >= 2**30 else f"{value / 2**20:.0f}MiB"


def hours(value):
    return "-" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def whole(value):
    return "-" if value is None else f"{value:,.0f}"


def signed(difference):
    """An Estimate of a difference: '-0.0120 ± 0.0050 over 3 seeds: separable'."""
    if difference.n == 0:
        return "not paired: no seed in common with the same batch stream"
    if difference.n == 1:
        return f"{difference.mean:+.4f} (one seed)"
    interval = f"{difference.mean:+.4f} ± {difference.half_width:.4f}"
    return f"{interval} over {difference.n} seeds: {difference.verdict}"


# -- columns


@dataclass(frozen=True)
class Column:
    """One quantity of the table. `name` is its key in Run.values, its column in the CSV, and what --sort takes."""

    name: str
    header: str  # a line break in it is where the wide table breaks it
    text: Callable
    better: str  # 'lower' or 'higher': what comes first when the table is sorted by it
    over_seeds: Callable | None = None  # how runs of a configuration combine; None is the mean

    @property
    def title(self):
        return self.header.replace("/\n", "/").replace("\n", " ")


COLUMNS = (
    Column("parameters", "params", count, "lower"),
    Column("active_parameters", "active", count, "lower"),
    Column("flops_per_token", "FLOPs/\ntoken", si, "lower"),
    Column("tokens_processed", "tokens", count, "lower"),
    Column("final_val_loss", "final\nloss", loss, "lower"),
    Column("best_val_loss", "best\nloss", loss, "lower"),
    Column("bits_per_byte", "bits/\nbyte", loss, "lower"),
    Column("pseudo_perplexity", "pseudo\nperplexity", loss, "lower"),
    Column("masked_accuracy", "masked\naccuracy", percent, "higher"),
    Column("tokens_per_second", "tokens/s", whole, "higher"),
    Column("mfu", "MFU", percent, "higher"),
    Column("peak_memory_bytes", "memory", mebibytes, "lower", max),
    Column("non_finite_steps", "NaN\nsteps", whole, "lower", sum),
    Column("hours", "hours", hours, "lower"),
)
COLUMN = {column.name: column for column in COLUMNS}
LOSSES = ("final_val_loss", "best_val_loss", "bits_per_byte", "pseudo_perplexity")
# Whose runs are judged by a number may be ranked by these alone of the losses: the loss of hidden tokens depends on how
# many are hidden, and is no loss of a text.
LOSSES_BESIDE = {"final_val_loss": LOSSES[:3], "pseudo_perplexity": ("pseudo_perplexity",)}
OF_ONE_OBJECTIVE = ("pseudo_perplexity", "masked_accuracy")  # shown where some run has them
# In a narrow terminal a row takes two lines, and each of these pairs is one column.
STACKED = (
    ("parameters", "active_parameters"),
    ("tokens_processed", "flops_per_token"),
    ("final_val_loss", "best_val_loss"),
    ("bits_per_byte", "non_finite_steps"),
    ("pseudo_perplexity", "masked_accuracy"),
    ("tokens_per_second", "mfu"),
    ("peak_memory_bytes", "hours"),
)
WHAT = {
    "final_val_loss": "final validation loss",
    "best_val_loss": "best validation loss",
    "bits_per_byte": "bits per byte",
    "pseudo_perplexity": "pseudo-perplexity",
}


def value_of(configuration, name):
    """A column's number for a configuration, over its seeds."""
    combine = COLUMN[name].over_seeds
    if combine is None:
        return configuration.estimate(name).mean
    values = [run.values[name] for run in configuration.runs if run.values[name] is not None]
    return combine(values) if values else None


def cell(configuration, name):
    """A column's text; the interval stands beside the mean of a loss."""
    text = COLUMN[name].text(value_of(configuration, name))
    half_width = configuration.estimate(name).half_width if name in LOSSES else None
    return text if half_width is None else f"{text} ±{half_width:.4f}"


def name_of(configuration):
    """The label, with the number of seeds or whatever keeps the row from being ranked."""
    run = configuration.runs[0]
    if not run.is_finished:
        return f"{configuration.label} ({run.status})"
    score = score_of(configuration.runs)
    if value_of(configuration, score) is None:
        return f"{configuration.label} (no finite {'loss' if score == 'final_val_loss' else WHAT[score]})"
    n, n_runs = len(configuration.seeds), len(configuration.runs)
    finite = configuration.estimate(score).n
    if n_runs == 1:
        return configuration.label
    if finite < n:  # the mean is over those that survived, and the reader must know
        return f"{configuration.label} ({finite} of {n} seeds finite)"
    return f"{configuration.label} ({n} seeds)" if n > 1 else f"{configuration.label} (one seed, {n_runs} runs)"


# -- ranking


@dataclass(eq=False)
class Ranking:
    """Comparable runs: their configurations, best first, and what the audit found among them."""

    runs: list
    ranked: list  # the configurations that may be ranked, best first
    unranked: list  # those that did not finish, or whose number is missing or not finite
    sort: str
    findings: list

    @property
    def configurations(self):
        return self.ranked + self.unranked

    @property
    def title(self):
        run = self.runs[0]
        data = run.get("dataset", "name", default="unknown dataset")
        tokenizer = run.get("dataset", "tokenizer", default="unknown tokenizer")
        return f"{data} ({tokenizer}), {run.get('training_config', 'objective', default='unknown objective')}"

    @property
    def loss_column(self):
        """The loss that differences are stated in."""
        return self.sort if self.sort in LOSSES else score_of(self.runs)

    @property
    def columns(self):
        """[Column, ...] of its table."""
        return [each for each in COLUMNS if each.name not in OF_ONE_OBJECTIVE or has_any(self.runs, each.name)]

    def places(self):
        """[('1', best), ('2', next), ..., ('-', unranked), ...]"""
        ranked = [(str(place), each) for place, each in enumerate(self.ranked, 1)]
        return ranked + [("-", each) for each in self.unranked]

    def numbers(self):
        """{configuration: '#1'}: how the text below the table names its rows; unranked ones go by their label."""
        return {each: each.label if place == "-" else f"#{place}" for place, each in self.places()}


def rank(runs, sort=None):
    """[Ranking, ...], one for each set of runs whose losses may be ranked together, the largest first.

    Sorted by what the objective is judged by unless told otherwise, mostly the final loss: the best of many evaluations
    flatters whoever was evaluated most.
    """
    rankings = []
    for group in sorted(comparable_groups(runs), key=len, reverse=True):
        column = sort_column(group, sort)
        rankings.append(Ranking(group, *in_order(group_configurations(group), column), column, audit(group)))
    return rankings


def sort_column(runs, wanted=None):
    """The column to rank comparable runs by: the one wanted, unless it is a loss that they are not judged by."""
    score = score_of(runs)
    is_for_others = wanted in LOSSES and wanted not in LOSSES_BESIDE[score]
    is_absent = wanted in OF_ONE_OBJECTIVE and not has_any(runs, wanted)
    return score if wanted is None or is_for_others or is_absent else wanted


def score_of(runs):
    """The column that comparable runs are judged by."""
    return runs[0].ranked_by if runs[0].ranked_by in LOSSES_BESIDE else "final_val_loss"


def has_any(runs, column):
    return any(run.values[column] is not None for run in runs)


def in_order(configurations, sort):
    """(ranked, unranked), both sorted by a column; what has no number comes last."""
    sign = 1 if COLUMN[sort].better == "lower" else -1
    values = [(value_of(each, sort), each) for each in configurations]
    values.sort(key=lambda pair: math.inf if pair[0] is None else sign * pair[0])
    ranked = [each for value, each in values if each.is_finished and value is not None]
    return ranked, [each for _, each in values if each not in ranked]


def component_effects(ranking):
    """[(field, worse, better, Estimate), ...]: ranked pairs whose models differ in one field and training in none.

    Found by leaving out one field at a time and grouping on the rest, so that a large sweep is not paired up in full.
    Within a group every configuration is held against the best one.
    """
    effects = []
    for name in differing_fields([each.runs[0].model for each in ranking.ranked]):
        groups = defaultdict(list)
        for each in ranking.ranked:
            run = each.runs[0]
            rest = {field: value for field, value in run.model.items() if field != name}
            groups[key_of([rest, run.training, run.values["tokens_processed"]])].append(each)
        for best, *others in groups.values():
            apart = [other for other in others if is_apart(name, best, other)]
            effects += [(name, other, best, paired(other, best, ranking.loss_column)) for other in apart]
    place = {each: index for index, each in enumerate(ranking.ranked)}
    return sorted(effects, key=lambda effect: (place[effect[2]], place[effect[1]]))


def is_apart(name, first, second):
    return key_of(first.runs[0].model.get(name)) != key_of(second.runs[0].model.get(name))


# -- what is said in words: (heading, style, [(left, right), ...]), the same in the terminal and in Markdown


def void_section(rankings, limit):
    """The loud one: why there is more than one ranking."""
    if len(rankings) < 2:
        return []
    runs = [run for ranking in rankings for run in ranking.runs]
    voids = [finding for finding in audit(runs) if finding.severity == "voids"]
    heading = f"NOT COMPARABLE: {len(rankings)} separate rankings. A loss in one says nothing about a loss in another."
    rows = [(f"{finding.what}: {finding.consequence}", values_and_names(finding, limit)) for finding in voids]
    return [(heading, "bold red", rows)]


def values_and_names(finding, limit):
    """'layernorm: gpt2 · rmsnorm: llama, team'."""
    parts = [f"{value}: {some(names, limit)}" for value, names in finding.runs_by_value.items()]
    more = f" · and {len(parts) - limit - 1} more values" if len(parts) > limit + 1 else ""
    return " · ".join(parts[: limit + 1]) + more


def rules_section(ranking):
    """What was held equal, and how far apart the sizes are: the rules stand before the table."""
    if len(ranking.runs) < 2:
        return []
    differs = {finding.what for finding in ranking.findings}
    equal = [check.what for check in CHECKS if check.what not in differs and check.read(ranking.runs[0]) is not None]
    are_streams_known = all(run.values["stream_hash"] is not None for run in ranking.runs)
    is_shape_equal = {"tokens", "tokens per step", "block_size"} <= set(equal) and "seed" not in differs
    if are_streams_known and is_shape_equal and not any(what.startswith("stream") for what in differs):
        equal.append("batch stream of each seed")
    sizes = [size_text(ranking.runs, column) for column in ("parameters", "flops_per_token")]
    rows = [("Equal", ", ".join(equal) or "nothing"), ("Size", " · ".join(filter(None, sizes)) or "not recorded")]
    return [("", "", rows)]


def size_text(runs, column):
    """'Matched' is a measured word: within 1%, or it is not said."""
    values = [run.values[column] for run in runs if run.values[column]]
    if len(values) < 2:
        return ""
    excess = max(values) / min(values) - 1
    word = "matched" if excess <= 0.01 else "not matched"
    return f"{column.replace('_', ' ').replace('flops', 'FLOPs')} {word} ({100 * excess:.1f}% apart)"


def finding_sections(ranking, severity, limit):
    """What differs, gathered under what follows from it."""
    by_consequence = defaultdict(list)
    for finding in ranking.findings:
        if finding.severity == severity:
            by_consequence[finding.consequence].append((finding.what, values_and_names(finding, limit)))
    word, style = {"warns": ("Careful", "bold yellow"), "note": ("Note", "bold")}[severity]
    return [(f"{word}: {consequence}", style, rows) for consequence, rows in by_consequence.items()]


def component_section(ranking, limit):
    """The fields of the model that differ, and who has which value."""
    if len(ranking.configurations) < 2:
        return []
    names = differing_fields([each.runs[0].model for each in ranking.configurations])
    if not names:
        return [("Components that differ: none, the architectures are the same", "bold", [])]
    return [("Components that differ", "bold", [(name, component_values(ranking, name, limit)) for name in names])]


def component_values(ranking, name, limit):
    """'rmsnorm: #1, #2 · layernorm: #3'."""
    by_value = defaultdict(list)
    for each, number in ranking.numbers().items():
        by_value[setting_text(each.runs[0].model, name)].append(number)
    parts = [f"{value}: {some(numbers, 2 * limit)}" for value, numbers in by_value.items()]
    more = f" · and {len(parts) - 2 * limit} more values" if len(parts) > 2 * limit else ""
    return " · ".join(parts[: 2 * limit]) + more


def effect_section(ranking, limit):
    """What one component did, where two configurations differ in nothing else."""
    effects, numbers = component_effects(ranking), ranking.numbers()
    rows = []
    for name, worse, better, effect in effects[:limit]:
        before, after = (setting_text(each.runs[0].model, name) for each in (worse, better))
        rows.append((f"{name}: {before} -> {after}", f"{signed(effect)}  ({numbers[worse]} -> {numbers[better]})"))
    if len(effects) > limit:
        rows.append((f"and {len(effects) - limit} more pairs", ""))
    heading = f"One component apart, {WHAT[ranking.loss_column]}"
    sections = [(heading, "bold", rows)] if rows else []
    return sections + best_pair_section(ranking, effects)


def best_pair_section(ranking, effects):
    """Say so when the difference between the two best cannot be credited to one component."""
    best_two = ranking.ranked[:2]
    if len(best_two) < 2 or any({worse, better} == set(best_two) for _, worse, better, _ in effects):
        return []
    first, second = (each.runs[0] for each in best_two)
    components = differing_fields([first.model, second.model])
    training = differing_fields([first.training, second.training])
    if first.values["tokens_processed"] != second.values["tokens_processed"]:
        training.append("tokens")
    if components and len(components + training) > 1:
        why = f"#1 and #2 differ in {some(components + training, 6)}: none of these can be credited alone"
        return [(why, "", [])]
    return [(f"#1 and #2 are one architecture, trained differently: {some(training, 6)}", "", [])] if training else []


def claim_section(ranking, limit):
    """Every configuration against the best, paired by seed; or the reason why nothing can be claimed."""
    if len(ranking.ranked) < 2:
        return []
    if all(len(each.seeds) < 2 for each in ranking.ranked):
        return [(ONE_SEED, "bold yellow", [])]
    column = ranking.loss_column
    best, *others = in_order(ranking.ranked, column)[0] or ranking.ranked
    numbers = ranking.numbers()
    rows = [(f"{numbers[each]} {each.label}", signed(paired(best, each, column))) for each in others[:limit]]
    if len(others) > limit:
        rows.append((f"and {len(others) - limit} more", "in summary_table.md"))
    return [(f"Difference from {numbers[best]} {best.label}, paired by seed, {WHAT[column]}", "bold", rows)]


def sections_before(ranking, limit):
    return rules_section(ranking) + finding_sections(ranking, "warns", limit)


def sections_after(ranking, limit):
    words = claim_section(ranking, limit + 2) + effect_section(ranking, limit + 2) + component_section(ranking, limit)
    return words + finding_sections(ranking, "note", limit)


# -- the terminal


def show(rankings, problems, console, max_rows=30):
    """Print everything to a rich Console; long lists are cut, the files hold them in full."""
    for problem in problems[:10]:
        console.print(f"skipped or incomplete: {problem}", style="yellow")
    if len(problems) > 10:
        console.print(f"and {len(problems) - 10} more lines like these", style="yellow")
    show_sections(void_section(rankings, 3), console)
    for number, ranking in enumerate(rankings, 1):
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
        show_sections(sections_after(ranking, 3), console)


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
    shown = [column.name for column in ranking.columns]
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


def write_csv(rankings, path):
    """One row for each run, numbers in full; the configuration's statistics are repeated on each of its runs."""
    rows = [row for number, ranking in enumerate(rankings, 1) for row in csv_rows(number, ranking)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def csv_rows(number, ranking):
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
                **{column.name: run.values[column.name] for column in COLUMNS},
                "seeds": over_seeds.n,
                "final_val_loss_mean": over_seeds.mean,
                "final_val_loss_ci95": over_seeds.half_width,
                "final_val_loss_std": over_seeds.spread,
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


def write_markdown(rankings, problems, plots, path):
    """The same words and table as in the terminal, nothing cut; `plots` are the files of each ranking."""
    lines = ["# Comparison", ""]
    if problems:
        lines += ["## Skipped or incomplete", "", *(f"- {escape(problem)}" for problem in problems), ""]
    lines += markdown_sections(void_section(rankings, 1000))
    for ranking, images in zip(rankings, plots, strict=True):
        lines += [f"## {escape(ranking.title)}", "", *markdown_sections(sections_before(ranking, 1000))]
        lines += [*markdown_table(ranking), "", f"Sorted by {COLUMN[ranking.sort].title}.", ""]
        lines += markdown_sections(sections_after(ranking, 1000))
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
    headers = ["#", "run", "architecture", *(column.title for column in columns)]
    lines = [row_of(headers), row_of(["--:", ":--", ":--"] + ["--:"] * len(columns))]
    for place, each in ranking.places():
        first = [place, name_of(each), str(each.runs[0].values["architecture"])]
        lines.append(row_of(escape(text) for text in [*first, *(cell(each, column.name) for column in columns)]))
    return lines


def row_of(texts):
    return f"| {' | '.join(texts)} |"


def escape(text):
    """Run names are the user's own; none of them may turn into Markdown."""
    return "".join("\\" + letter if letter in "\\|*_`<[]" else letter for letter in str(text).replace("\n", " "))
