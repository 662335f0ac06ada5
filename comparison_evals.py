"""What evaluate.py found of the runs of a ranking: prompts, the harness's tasks, probes, where the loss comes from.

    for found in findings_of(ranking):            # one for each kind of evaluation that some run has a line of
        found.columns, found.rows                 # a table, one row for each configuration, means over seeds
        found.panels                              # {panel: {configuration: {group: [a number of each run]}}}

It reads evals.jsonl alone. Numbers are shown beside the loss, and no claim is made from them.
"""

import math
import re
from dataclasses import dataclass

from comparison_runs import some
from comparison_settings import dig, key_of, number, short
from comparison_stats import estimate

RANGE = re.compile(r"(?:over )?(\d+)(?:-\d+|x)?|never")  # the name of a group that has a place among numbers


FEW_TARGETS = 0.01  # of all, that a group of frequency needs to be drawn


@dataclass(eq=False)
class EvalFindings:
    """One kind of evaluation over the configurations of a ranking."""

    kind: str
    title: str
    unit: str  # of the panels
    columns: list  # names
    rows: list  # [(configuration, [text or '-', one for each column])]
    panels: dict  # {panel: {configuration: {group: [number or None, one for each run]}}}
    note: str  # what was asked


@dataclass(frozen=True)
class Kind:
    """How to read one kind of line of evals.jsonl."""

    title: str
    unit: str
    numbers: object  # line -> {column: (number or None, how to write it)}
    panels: object  # line -> {panel: {group: number or None}}
    asked: (
        object  # line -> (what two runs must share to be held against each other, in words; a key for the rest of it)
    )


# ---- each kind -------------------------------------------------------------------------------------------------------


def percent(value):
    return f"{100 * value:.1f}%"


def decimals(value):
    return f"{value:.4f}"


def two_decimals(value):
    return f"{value:.2f}"


def prompt_numbers(line):
    shares = {"score": "score", "passed": "passed", "chosen": "chosen", "by chance": "chosen_by_chance"}
    nats = {"nats/byte": (number(line.get("answer_nats_per_byte")), decimals)}
    return {title: (number(line.get(name)), percent) for title, name in shares.items()} | nats


def prompt_panels(line):
    return {
        f"by {name}, {how}": {group: number(dig(row, column)) for group, row in (dig(line, field) or {}).items()}
        for how, column in (("written", "score"), ("chosen", "chosen"))
        for name, field in (("category", "categories"), ("difficulty", "difficulties"))
    }


def prompts_asked(line):
    name, digest = dig(line, "prompt_file", "name"), short(dig(line, "prompt_file", "sha256"))
    return f"{name} (sha256 {digest})", key_of(line.get("decoding"))


def loss_numbers(line):
    parts = loss_panels(line)
    rare = list(parts.get("frequency", {"-": None}).items())[-1]
    wanted = [("1x context", "whole", "all"), *((f"{k}x context", "context", f"{k}x") for k in (2, 4, 8)),
              ("seen", "recall", "seen"), ("new", "recall", "new")]  # fmt: skip
    found = {title: (parts.get(part, {}).get(group), decimals) for title, part, group in wanted}
    return found | {f"rank {rare[0]}": (rare[1], decimals)}


def loss_panels(line):
    return {part: {group: number(dig(row, "loss")) for group, row in groups.items()}
            for part, groups in (dig(line, "parts") or {}).items() if isinstance(groups, dict)}  # fmt: skip


def loss_panels_drawn(line):
    """loss_panels without the frequencies of few targets, which would set the scale of all."""
    parts, panels = dig(line, "parts") or {}, loss_panels(line)
    enough = FEW_TARGETS * (number(dig(parts, "whole", "all", "targets")) or 0)
    if "frequency" in panels:
        panels["frequency"] = {group: loss for group, loss in panels["frequency"].items()
                               if (number(dig(parts, "frequency", group, "targets")) or 0) >= enough}  # fmt: skip
    return panels


def loss_asked(line):
    return f"{line.get('loss_tokens')} validation tokens", None


def harness_numbers(line):
    """One metric of each task; the tasks of a group are left to the files where the group has a number of its own."""
    found, tasks = {}, dig(line, "tasks") or {}
    for name, task in tasks.items():
        metrics = dig(task, "metrics") or {}
        if dig(task, "group") in tasks or not metrics:
            continue
        metric = dig(task, "main")
        value = number(dig(metrics, metric, "value"))
        is_share = dig(metrics, metric, "better") == "higher" and value is not None and 0 <= value <= 1
        found[f"{name} {metric}"] = value, percent if is_share else two_decimals
    return found


def harness_panels(line):
    return {"tasks": {name: value for name, (value, text) in harness_numbers(line).items() if text is percent}}


def harness_asked(line):
    tasks = dig(line, "tasks") or {}
    versions = {name: (dig(task, "version"), dig(task, "n_shot")) for name, task in tasks.items()}
    limit = "" if line.get("limit") is None else f", the first {line['limit']} questions of each"
    return f"{some(list(tasks), 4)} (lm_eval {line.get('harness')}{limit})", repr(sorted(versions.items(), key=str))


def probe_rows(line):
    rows = line.get("probes")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def probe_numbers(line):
    """The accuracy of each probe, under a name that says what chance would give; zero-shot is a column of its own."""
    found = {}
    for row in probe_rows(line):
        chance, how = number(row.get("chance")), " zero-shot" if row.get("zero_shot") else ""
        beside = "" if chance is None else f" (by chance {percent(chance)})"
        found[f"{row.get('probe')}{how}{beside}"] = number(row.get("accuracy")), percent
    return found


def probe_panels(line):
    return {"probes": {name: value for name, (value, _) in probe_numbers(line).items()}}


def probes_asked(line):
    each = [f"{row.get('probe')} in {row.get('block_size')} tokens{' zero-shot' if row.get('zero_shot') else ''}"
            for row in probe_rows(line)]  # fmt: skip
    return f"{some(each, 4)}, {line.get('examples')} examples of each", repr(sorted(each))


KINDS = {
    "prompts": Kind("Prompts", "share", prompt_numbers, prompt_panels, prompts_asked),
    "lm_eval": Kind("Tasks of the harness", "share", harness_numbers, harness_panels, harness_asked),
    "probes": Kind("Probes", "share of answers that are right", probe_numbers, probe_panels, probes_asked),
    "loss": Kind("Anatomy of the loss", "nats per token", loss_numbers, loss_panels_drawn, loss_asked),
}
SHOWN_PANELS = {"loss": ("context", "recall", "frequency", "position")}  # of the others all


# ---- all runs of a ranking -------------------------------------------------------------------------------------------


def findings_of(ranking):
    """[EvalFindings], one for each kind that some run has a line of."""
    lines = {run: run.evals for each in ranking.configurations for run in each.runs}
    return [findings_of_kind(ranking, kind, lines) for kind in KINDS if any(kind in found for found in lines.values())]


def findings_of_kind(ranking, kind, lines):
    reader, numbers, panels = KINDS[kind], {}, {}
    for each in ranking.configurations:
        found = [lines[run][kind] for run in each.runs if kind in lines[run]]
        if found:
            numbers[each] = [reader.numbers(line) for line in found]
            for line in found:
                gather(panels, each, reader.panels(line))
    columns = list(dict.fromkeys(name for rows in numbers.values() for row in rows for name in row))
    columns = [name for name in columns if any(row.get(name, (None,))[0] is not None for rows in numbers.values()
                                               for row in rows)]  # fmt: skip
    wanted = SHOWN_PANELS.get(kind, tuple(panels))
    shown = {name: panels[name] for name in wanted if name in panels and worth_drawing(panels[name])}
    asked = dict.fromkeys(reader.asked(found[kind])[0] for found in lines.values() if kind in found)
    rows = [(each, [mean_text(rows, name) for name in columns]) for each, rows in numbers.items()]
    return EvalFindings(kind, reader.title, reader.unit, columns, rows, shown, "; ".join(asked))


def gather(panels, configuration, found):
    for panel, groups in found.items():
        place = panels.setdefault(panel, {}).setdefault(configuration, {})
        for group, value in groups.items():
            place.setdefault(group, []).append(value)


def groups_of(panel):
    """Its groups, those of ranges ('8-15', '4x') by their first number, others as they first appear, 'never' last."""
    groups = list(dict.fromkeys(group for each in panel.values() for group in each))
    found = {group: RANGE.fullmatch(group) for group in groups}
    if not all(found.values()):
        return groups
    return sorted(groups, key=lambda group: (int(found[group][1] or 10**12), len(group)))


def worth_drawing(panel):
    """Whether a panel has two groups to tell apart, and a number in some."""
    groups = {group for each in panel.values() for group, values in each.items() if any_number(values)}
    return len(groups) > 1


def any_number(values):
    return any(value is not None for value in values)


def mean_text(rows, name):
    """'1.2345 ± 0.0100' over the runs of a configuration that have the number, or '-'."""
    found = [row[name] for row in rows if name in row and row[name][0] is not None]
    if not found:
        return "-"
    over, text = estimate([value for value, _ in found]), found[0][1]
    return text(over.mean) + (f" ± {text(over.half_width)}" if over.half_width else "")


def means_and_range(values):
    """(mean, lowest, highest) of the numbers there are."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there), min(there), max(there)


def eval_problems(runs):
    """Lines on evaluations that cannot be held against each other; `prompt_problems` has those on prompts."""
    problems, lines = [], {run: run.evals for run in runs}
    for kind in [kind for kind in KINDS if kind != "prompts"]:
        title = KINDS[kind].title.lower()
        having = [run for run in runs if kind in lines[run]]
        problems += [
            f"{run.name}: its {title} is of step {lines[run][kind]['step']}, not of its last, {run.values['steps']}"
            for run in having if run.values["steps"] not in (None, lines[run][kind]["step"])
        ]  # fmt: skip
        asked = dict.fromkeys(KINDS[kind].asked(lines[run][kind]) for run in having)
        if len(asked) > 1:
            words = " and ".join(list(dict.fromkeys(said for said, _ in asked))[:2])
            problems.append(f"{title}: runs were asked differently: {words}; they cannot be held against each other")
    return problems


# ---- to files --------------------------------------------------------------------------------------------------------


def rows_for_csv(rankings):
    """A dict for each run, kind, panel and group, numbers in full."""
    for place, ranking in enumerate(rankings, 1):
        for each in ranking.configurations:
            for run in each.runs:
                for kind, line in run.evals.items():
                    if kind in KINDS:
                        yield from rows_of_line(place, each, run, kind, line)


def rows_of_line(place, configuration, run, kind, line):
    about = {"ranking": place, "configuration": configuration.label, "run": run.name, "seed": run.seed,
             "step": line["step"], "kind": kind}  # fmt: skip
    for name, (value, _) in KINDS[kind].numbers(line).items():
        yield {**about, "part": "summary", "group": name, "value": value}
    for panel, groups in KINDS[kind].panels(line).items():
        for group, value in groups.items():
            yield {**about, "part": panel, "group": group, "value": value}
