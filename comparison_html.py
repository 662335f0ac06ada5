"""Write report.html: the whole comparison as one page that needs no network.

    write_html(rankings, analyses, problems, folder / 'report.html', command)

Style, charts and numbers are in the file. It runs no script and may load nothing: its Content-Security-Policy says so.
It follows the reader's light or dark setting and fits a phone: charts are small multiples, wide tables scroll.
"""

import html
from pathlib import Path

from comparison_audit import LOSS, SPEED
from comparison_charts import (
    MAX_LINES,
    curve_charts,
    difference_charts,
    drawn_column,
    eval_charts,
    order_charts,
    pareto_charts,
    scaling_charts,
)
from comparison_evals import findings_of
from comparison_html_style import STYLE
from comparison_ranking import WHAT, cell, component_effects, name_of, numbers_of, p_text
from comparison_settings import BOOKKEEPING, differing_fields, setting_text, value_text
from comparison_words import (
    amount_text,
    best_pair_section,
    component_section,
    cost_section,
    finding_sections,
    pareto_section,
    ratio_words,
    rules_section,
    scaling_section,
    stability_section,
    values_and_names,
    verdict_section,
    void_section,
)

MAX_PAIRS = 120  # rows of the pairs' table
MAX_RUNS = 150  # configurations with a section of their own
CLAIMS = {(LOSS,): "loss", (SPEED,): "speed", (LOSS, SPEED): "loss and speed", (): ""}
EVAL_TOLD = {
    "prompts": "What each wrote after short prompts (score: of the points; passed: of the prompts), and how often the "
    "best answer was likelier per byte than every wrong one (chosen). Higher is better.",
    "lm_eval": "One metric of each task. Perplexities and bits are better low, all others high.",
    "probes": "The share of answers that are right in small tasks with a known answer, beside what guessing gives. "
    "zero-shot: of a run that was not trained on the task. Higher is better.",
    "loss": "The validation loss of the last checkpoint by the length of the context, by whether the token before and "
    "the target stood side by side earlier (seen, new), by how frequent the target is in training, and by how much "
    "text stands before it. Nats per token; lower is better.",
}
WORDS = {"voids": "ranked apart", "warns": "careful", "note": "note"}


def write_html(rankings, analyses, problems, path, command, log_x=False):
    """Write the page. `command` is what made it, as the reader would type it."""
    body = header(rankings, problems)
    for number, (ranking, analysis) in enumerate(zip(rankings, analyses, strict=True), 1):
        body += ranking_article(ranking, analysis, number, len(rankings), log_x)
    body += tag("footer", tag("p", "Made by nanoArch with " + tag("code", escape(command)) + "."))
    title = f"Comparison of {sum(len(ranking.configurations) for ranking in rankings)} configurations"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'
    Path(path).write_text(page, encoding="utf-8", newline="\n")


# -- pieces


def escape(text):
    return html.escape(str(text))


def tag(name, content="", **attributes):
    pairs = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{pairs}>{content}</{name}>"


def table(headers, rows, class_=""):
    """Cells are HTML already. A header that starts with '>' heads a column of numbers, set to the right."""
    sides = ["num" if header.startswith(">") else "" for header in headers]
    head = "".join(tag("th", header.lstrip(">"), class_=side) for header, side in zip(headers, sides, strict=True))
    body = "".join(tag("tr", "".join(tag("td", content, class_=side)
                                     for content, side in zip(row, sides, strict=True))) for row in rows)  # fmt: skip
    whole = tag("table", tag("thead", tag("tr", head)) + tag("tbody", body), class_=class_)
    return tag("div", whole, class_="scroll", tabindex="0")


def words(sections, level="h3"):
    """Sections of comparison_words as lists."""
    parts = []
    for heading, _, rows in sections:
        parts.append(tag(level, escape(heading)) if heading else "")
        items = "".join(tag("div", tag("dt", escape(left)) + tag("dd", escape(right))) if right
                        else tag("div", tag("dt", escape(left))) for left, right in rows)  # fmt: skip
        parts.append(tag("dl", items) if rows else "")
    return "".join(parts)


def figures(charts):
    """Charts beside each other where there is room."""
    return tag("div", "".join(tag("figure", svg) for svg in charts), class_="charts") if charts else ""


def badge(verdict):
    return tag("span", escape(verdict), class_=f"badge {verdict.replace(' ', '-')}")


# -- the page


def header(rankings, problems):
    parts = [tag("h1", "Which architecture is better, and at what cost?")]
    parts.append(tag("p", escape(summary_line(rankings)), class_="lead"))
    if problems:
        items = "".join(tag("li", escape(problem)) for problem in problems[:50])
        more = tag("p", f"and {len(problems) - 50} more lines like these") if len(problems) > 50 else ""
        parts.append(tag("section", tag("h2", "Skipped or incomplete") + tag("ul", items) + more, id="problems"))
    parts.append(words(void_section(rankings, 20), "h2"))
    return tag("header", "".join(parts))


def summary_line(rankings):
    n_runs = sum(len(ranking.runs) for ranking in rankings)
    n_configurations = sum(len(ranking.configurations) for ranking in rankings)
    apart = f", in {len(rankings)} rankings that say nothing about each other" if len(rankings) > 1 else ""
    return (
        f"{n_runs} run{'s' * (n_runs != 1)} of {n_configurations} configuration{'s' * (n_configurations != 1)}{apart}."
    )


def ranking_article(ranking, analysis, number, n_rankings, log_x):
    """One ranking: the rules, the verdict, the table, and what follows from it."""
    mark = f"-{number}" if n_rankings > 1 else ""
    parts = [
        ("rules", "Rules", rules_part(ranking)),
        ("verdict", "Verdict", verdict_part(ranking, analysis)),
        ("table", "Ranking", table_part(ranking)),
        ("pairs", "Differences", pairs_part(ranking)),
        ("curves", "Learning curves", curves_part(ranking, analysis, log_x)),
        ("evals", "Evaluations", evals_part(ranking)),
        ("costs", "Cost of a loss", costs_part(ranking, analysis)),
        ("order", "Rank stability", order_part(ranking, analysis)),
        ("pareto", "Pareto fronts", pareto_part(ranking, analysis)),
        ("effects", "Components", effects_part(ranking)),
        ("scaling", "Scaling", scaling_part(analysis)),
        ("runs", "Runs", runs_part(ranking)),
    ]
    which = f"Ranking {number} of {n_rankings}: " if n_rankings > 1 else ""
    links = " ".join(tag("a", title, href=f"#{key}{mark}") for key, title, content in parts if content)
    body = tag("h2", escape(which + ranking.title), class_="title") + tag("nav", links)
    body += "".join(
        tag("section", tag("h2", title) + content, id=f"{key}{mark}") for key, title, content in parts if content
    )
    return tag("article", body)


def rules_part(ranking):
    """What was held equal and what was not, before any result."""
    text = words(rules_section(ranking))
    rows = [[badge(WORDS[finding.severity]), escape(finding.what), escape(values_and_names(finding, 6)),
             escape(finding.consequence), CLAIMS.get(finding.claims, "")]
            for finding in ranking.findings if finding.severity != "note"]  # fmt: skip
    if rows:
        text += tag("h3", "What differs and matters")
        text += table(["", "what", "who has which value", "what follows", "voids claims about"], rows, "wordy")
    elif len(ranking.runs) > 1:
        text += tag("p", "The audit held every pair of runs against every check and found nothing that voids a claim.")
    notes = finding_sections(ranking, "note", 6)
    if notes:
        n = sum(len(rows) for _, _, rows in notes)
        text += tag("details", tag("summary", f"{n} difference{'s' * (n != 1)} worth knowing") + words(notes, "h4"))
    return text


def verdict_part(ranking, analysis):
    sentences = [sentence for _, _, rows in verdict_section(ranking, analysis) for sentence, _ in rows]
    return tag("div", "".join(tag("p", escape(sentence)) for sentence in sentences), class_="verdict")


def table_part(ranking):
    """Every row: its loss first, what it may claim, then what it cost."""
    first = next(column for column in ranking.columns if column.name == ranking.loss_column)
    others = [column for column in ranking.columns if column is not first]
    headers = ["#", "run", f">{escape(first.title)}", "claim", *(f">{escape(column.title)}" for column in others)]
    rows = []
    for place, each in ranking.places():
        name = escape(name_of(each))
        run = tag("a", name, href=f"#{anchor(each)}") if has_section(ranking, each) else name
        cells = [escape(cell(each, column.name)) for column in others]
        rows.append([place, run, escape(cell(each, first.name)), escape(ranking.claim(each)), *cells,
                     escape(each.runs[0].values["architecture"])])  # fmt: skip
    below = "± is the 95% interval of the mean over seeds (Student's t). Sorted by "
    told = tag("p", escape(below + sorted_by(ranking) + "."), class_="small")
    return table([*headers, "architecture"], rows, "ranking") + told


def sorted_by(ranking):
    return WHAT.get(ranking.sort, ranking.sort.replace("_", " "))


def pairs_part(ranking):
    """Every pair with its corrected verdict, and intervals against the best."""
    if len(ranking.ranked) < 2:
        return ""
    with_best = [pair for pair in ranking.pairs.values() if ranking.best in (pair.first, pair.second)]
    others = [pair for pair in ranking.pairs.values() if ranking.best not in (pair.first, pair.second)]
    top = tag("p", pairs_told(ranking)) + figures(difference_charts(ranking))
    return top + pairs_table(ranking, with_best) + other_pairs(ranking, others)


def pairs_told(ranking):
    n = ranking.n_tested
    if not n:
        return "No two rows can be tested against each other, so no claim about a difference can be made."
    return ("Paired by seed: second minus first, with the 95% interval of each difference by itself. The p-values are "
            f"corrected together, by Holm's method over {n} tested pair{'s' * (n != 1)}; what does not stay under 0.05 "
            "is not separable.")  # fmt: skip


def pairs_table(ranking, pairs):
    numbers, headers = ranking.numbers, ["first", "second", ">second - first", ">p (Holm)", "verdict", "because"]
    rows = [[escape(f"{numbers[pair.first]} {pair.first.label}"), escape(f"{numbers[pair.second]} {pair.second.label}"),
             numbers_of(pair.difference) if pair.difference.n else "-",
             "-" if pair.p_holm is None else p_text(pair.p_holm), badge(pair.verdict), escape(", ".join(pair.voids))]
            for pair in pairs[:MAX_PAIRS]]  # fmt: skip
    if not any(pair.voids for pair in pairs[:MAX_PAIRS]):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    hidden = len(pairs) - MAX_PAIRS
    return table(headers, rows, "pairs") + (
        tag("p", f"{hidden} more are in pairs.csv.", class_="small") if hidden > 0 else ""
    )


def other_pairs(ranking, pairs):
    if not pairs:
        return ""
    title = "The other pair" if len(pairs) == 1 else f"The other {len(pairs)} pairs"
    return tag("details", tag("summary", title) + pairs_table(ranking, pairs))


# -- curves


def curves_part(ranking, analysis, log_x):
    """Validation loss against each axis that the runs record."""
    charts, absent = curve_charts(ranking, analysis, log_x)
    if not charts:
        return tag("p", "No run has evaluations in metrics.jsonl.")
    told = ["Lines are means over seeds, bands reach from the lowest seed to the highest."]
    if drawn_column(ranking) != ranking.loss_column:
        told.append(f"The {WHAT[ranking.loss_column]} was scored once, at the end: the validation loss is drawn.")
    elif analysis.target is not None:
        told.append(f"The dotted line is the loss of {analysis.target:.4f} that costs are about.")
    if len(ranking.configurations) > MAX_LINES:
        told.append(f"The first {MAX_LINES} of {len(ranking.configurations)} rows are drawn.")
    if absent:
        told.append(f"Left out, as no run recorded it: {', '.join(absent)}.")
    return tag("p", escape(" ".join(told))) + figures(charts)


def evals_part(ranking):
    """What evaluate.py found, beside the loss: a table and charts for each kind of evaluation."""
    first, text = next(column for column in ranking.columns if column.name == ranking.loss_column), ""
    for found in findings_of(ranking):
        headers = ["#", "run", f">{escape(first.title)}", *(f">{escape(name)}" for name in found.columns)]
        places = {each: place for place, each in ranking.places()}
        rows = [[places[each], escape(name_of(each)), escape(cell(each, first.name)), *map(escape, cells)]
                for each, cells in found.rows[:MAX_RUNS]]  # fmt: skip
        text += tag("h3", escape(found.title)) + tag("p", escape(f"{EVAL_TOLD[found.kind]} Asked: {found.note}."))
        text += table(headers, rows, "evals") + figures(eval_charts(ranking, found))
    return text


def costs_part(ranking, analysis):
    """What each needed to reach the target, as a table."""
    sections = cost_section(ranking, analysis, 1)
    if not sections:
        return ""
    heading = sections[0][0]
    numbers = ranking.numbers
    body = []
    for costs in analysis.costs[:MAX_RUNS]:
        cells = [cost_cell(ranking, analysis, costs, axis) for axis in analysis.axes]
        n, reached = len(costs.configuration.seeds), costs.n_reached
        name = f"{numbers[costs.configuration]} {costs.configuration.label}"
        name += f" ({reached} of {n} seeds reached it)" if reached < n else ""
        body.append([escape(name), *cells])
    told = "Interpolated between evaluations; ± is the standard deviation over seeds, ratios are paired by seed."
    return tag("p", escape(f"{heading}. {told}")) + table(["run", *analysis.axes], body)


def cost_cell(ranking, analysis, costs, axis):
    """The amount, and under it the ratio."""
    ratio = ratio_words(ranking, analysis, costs, axis).strip(" ()")
    return escape(amount_text(costs, axis)) + (f"<br><small>{escape(ratio)}</small>" if ratio else "")


def order_part(ranking, analysis):
    """Whether an early order holds, and a small one; drawn where three rows can change places."""
    charts = order_charts(analysis.order) if analysis.order is not None and len(ranking.ranked) > 2 else []
    return words(stability_section(ranking, analysis), "p") + figures(charts)


def pareto_part(ranking, analysis):
    if not analysis.fronts:
        return ""
    return words(pareto_section(ranking, analysis), "p") + figures(pareto_charts(ranking, analysis))


def effects_part(ranking):
    """Pairs that are one component apart, and the fields that differ at all."""
    effects, numbers = component_effects(ranking), ranking.numbers
    rows = []
    for name, worse, better, pair in effects[:MAX_PAIRS]:
        pair = pair if pair.second is better else pair.reversed()
        before, after = (setting_text(each.runs[0].model, name) for each in (worse, better))
        rows.append([escape(name), escape(f"{before} ({numbers[worse]})"), escape(f"{after} ({numbers[better]})"),
                     numbers_of(pair.difference) if pair.difference.n else "-", badge(pair.verdict)])  # fmt: skip
    text = ""
    if rows:
        text = tag("p", "Two rows that differ in this one component and in nothing else, training included.")
        text += table(["component", "from", "to", ">change of the loss", "verdict"], rows)
    return text + words(best_pair_section(ranking, effects), "p") + words(component_section(ranking, 8))


def scaling_part(analysis):
    """Fits and iso-FLOP curves."""
    if not analysis.laws:
        return ""
    return words(scaling_section(analysis), "p") + figures(scaling_charts(analysis.laws))


# -- one section for each configuration


def anchor(configuration):
    return "run-" + "".join(letter if letter.isalnum() else "-" for letter in configuration.runs[0].name)


def has_section(ranking, configuration):
    return configuration in ranking.configurations[:MAX_RUNS]


def runs_part(ranking):
    """What each row is: its runs, its command, and how its settings differ from the best row's."""
    shown = ranking.configurations[:MAX_RUNS]
    reference = ranking.best or shown[0]
    text = "".join(run_details(ranking, each, reference) for each in shown)
    hidden = len(ranking.configurations) - len(shown)
    return text + (tag("p", f"{hidden} more are in summary_table.csv.", class_="small") if hidden else "")


def run_details(ranking, configuration, reference):
    place = ranking.numbers[configuration]
    name = name_of(configuration) if place == configuration.label else f"{place} {name_of(configuration)}"
    rows = [[escape(run.name), escape(run.seed), escape(run.status), *run_numbers(run)] for run in configuration.runs]
    body = table(["run", ">seed", "status", ">final loss", ">tokens", ">hours", "stream", "commit", "device"], rows)
    run = configuration.runs[0]
    if run.get("command"):
        body += tag("p", tag("code", escape(run.get("command"))), class_="command")
    body += settings_diff(configuration, reference, ranking.numbers)
    return tag("details", tag("summary", escape(name)) + body, id=anchor(configuration))


def run_numbers(run):
    loss, tokens, hours = (run.values[name] for name in ("final_val_loss", "tokens_processed", "hours"))
    commit = str(run.get("git", "commit", default="-"))[:8] + (" + changes" if run.get("git", "dirty") else "")
    device = run.get("resolved", "device_name", default="-")
    return [
        "-" if loss is None else f"{loss:.4f}", "-" if tokens is None else f"{tokens:,}",
        "-" if hours is None else f"{hours:.3g}", tag("code", escape(str(run.values["stream_hash"] or "-")[:8])),
        tag("code", escape(commit)), escape(device),
    ]  # fmt: skip


def settings_diff(configuration, reference, numbers):
    """A table of the settings in which this row's first run and the reference's differ."""
    if configuration is reference:
        return tag("p", "The other rows are held against this one.", class_="small")
    tables = [flat_config(each.runs[0]) for each in (configuration, reference)]
    names = differing_fields(tables)
    if not names:
        return tag("p", "No setting differs from the best row's.", class_="small")
    rows = [[escape(name), *(escape(each.get(name, "-")) for each in tables)] for name in names]
    return table(["setting", "here", escape(f"{numbers[reference]} {reference.label}")], rows, "wordy")


SECTIONS = ("model_config", "training_config", "resolved", "dataset", "parameters", "flops", "state", "versions", "git")


def flat_config(run):
    """{'n_layer': 4, 'resolved.dtype': 'float32', ...} of config.json, without names, paths and seeds."""
    flat = {}
    for section in SECTIONS:
        prefix = "" if section in ("model_config", "training_config") else f"{section}."
        flat |= flattened(run.get(section, default={}), prefix)
    return {name: value for name, value in flat.items() if name not in BOOKKEEPING} | {
        f"source of {part}": digest for part, digest in run.part_sources.items()
    }


def flattened(tree, prefix):
    """{'a.b': value} of nested dicts; options of parts go without a prefix."""
    if not isinstance(tree, dict):
        return {}
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flattened(value, prefix if name == "part_options" else f"{prefix}{name}.")
        else:
            flat[prefix + name] = f"{value:.6g}" if isinstance(value, float) else value_text(value)
    return flat
