"""Say what a comparison found, in sections that the terminal, Markdown and HTML all print.

A section is (heading, style, [(left, right), ...]); `limit` cuts lists where room is short.
"""

import math
from collections import defaultdict

from comparison_analysis import ratio_to
from comparison_audit import CHECKS, audit, tuning_budgets
from comparison_evals import findings_of
from comparison_ranking import (
    SAME_SIZE,
    WHAT,
    alike_in_size,
    component_effects,
    count,
    hours,
    score_of,
    si,
    value_of,
)
from comparison_runs import some
from comparison_settings import differing_fields, key_of, setting_text

ONE_SEED = "One seed each: no claim about a difference can be made beyond these runs (repeat them with other --seed)."
AMOUNT = {"tokens": count, "FLOPs": si, "hours": hours, "joules": si}

# -- the rules, before the table


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
    budgets = {budget for run, budget in tuning_budgets(ranking.runs).items() if run.is_finished}
    equal += [f"tuning budget ({budgets.pop()})"] if len(budgets) == 1 else []
    has_idle = any(run.values["active_parameters"] != run.values["parameters"] for run in ranking.runs)
    columns = ("parameters", "active_parameters", "flops_per_token") if has_idle else ("parameters", "flops_per_token")
    sizes = [size_text(ranking.runs, column) for column in columns]
    rows = [("Equal", ", ".join(equal) or "nothing"), ("Size", " · ".join(filter(None, sizes)) or "not recorded")]
    if ranking.held:
        rows.append(("Held", ranking.held))
    return [("", "", rows)]


def size_text(runs, column):
    """'Matched' is a measured word: within 1% and known of every run, or it is not said."""
    values = [run.values[column] for run in runs if run.values[column]]
    if len(values) < 2:
        return ""
    levels = sizes_of(runs)
    spreads = [[run.values[column] for run in level if run.values[column]] for level in levels]
    excess = max(max(each) / min(each) - 1 for each in spreads if each)
    n_unknown = len(runs) - len(values)
    word = "matched" if excess <= 0.01 and not n_unknown else "not matched"
    unknown = f", {n_unknown} of {len(runs)} runs not recorded" if n_unknown else ""
    apart = f"{100 * excess:.1f}% apart" + (f" within each of {len(levels)} sizes" if len(levels) > 1 else "")
    return f"{column.replace('_', ' ').replace('flops', 'FLOPs')} {word} ({apart}{unknown})"


def sizes_of(runs):
    """[[run, ...], ...] by parameters: a size ends where the next run is a quarter larger.

    [runs] where a run's parameters are unknown, and where a size has one architecture alone: it is matched to nothing.
    """
    if not all(run.values["parameters"] for run in runs):
        return [runs]
    levels = []
    for run in sorted(runs, key=lambda run: run.values["parameters"]):
        is_next = levels and run.values["parameters"] <= SAME_SIZE * levels[-1][-1].values["parameters"]
        levels[-1].append(run) if is_next else levels.append([run])
    return levels if all(len({key_of(run.model) for run in level}) > 1 for level in levels) else [runs]


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
    for each, number in ranking.numbers.items():
        by_value[setting_text(each.runs[0].model, name)].append(number)
    parts = [f"{value}: {some(numbers, 2 * limit)}" for value, numbers in by_value.items()]
    more = f" · and {len(parts) - 2 * limit} more values" if len(parts) > 2 * limit else ""
    return " · ".join(parts[: 2 * limit]) + more


def effect_section(ranking, limit):
    """What one component did, where two configurations differ in nothing else."""
    effects, numbers = component_effects(ranking), ranking.numbers
    rows = []
    for name, worse, better, pair in effects[:limit]:
        before, after = (setting_text(each.runs[0].model, name) for each in (worse, better))
        said = signed(pair, better)
        rows.append((f"{name}: {before} -> {after}", f"{said}  ({numbers[worse]} -> {numbers[better]})"))
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
    best, numbers = ranking.best, ranking.numbers
    column = ranking.loss_column
    others = [each for each in ranking.by_loss if each is not best]
    if all(len(each.seeds) < 2 for each in ranking.ranked):
        void = [(f"{numbers[each]} {each.label}", ranking.claim(each)) for each in others[:limit]
                if ranking.pair(best, each).voids]  # fmt: skip
        return [(ONE_SEED, "bold yellow", void)]
    rows = [(f"{numbers[each]} {each.label}", signed(ranking.pair(best, each), each)) for each in others[:limit]]
    if len(others) > limit:
        rows.append((f"and {len(others) - limit} more", "in summary_table.md"))
    over = f", p by Holm's correction over {ranking.n_tested} pairs" if ranking.n_tested > 1 else ""
    return [(f"Difference from {numbers[best]} {best.label}, paired by seed, {WHAT[column]}{over}", "bold", rows)]


def signed(pair, of):
    """The pair's text with the difference taken as `of` minus the other."""
    return pair.text if pair.second is of else pair.reversed().text


# -- the verdict, in plain words


def verdict_section(ranking, analysis, limit=6):
    """What a reader may take away, in sentences."""
    rivals = rivals_of_best(ranking)
    sentences = lead(ranking, rivals) + other_sizes(ranking, rivals) + ties(ranking, limit)
    sentences += cost_sentences(ranking, analysis, rivals, limit)
    return [("Verdict", "bold", [(sentence, "") for sentence in sentences])] if sentences else []


def rivals_of_best(ranking):
    """The ranked configurations of the best one's size; all, where nobody else has that size."""
    others = [each for each in ranking.ranked if each is not ranking.best]
    return [each for each in others if alike_in_size(ranking.best, each)] or others


def lead(ranking, rivals):
    """Who is best, whom it can be told from, and what is void."""
    if not ranking.ranked:
        status = some(sorted({f"{run.name} ({run.status})" for run in ranking.runs}), 5)
        return [f"Nothing can be ranked: no run has finished with a finite {WHAT[score_of(ranking.runs)]}: {status}."]
    best, column = ranking.best, ranking.loss_column
    if best.estimate(column).n == 0:
        return [f"No run has a finite {WHAT[column]}: nothing can be claimed."]
    if len(ranking.ranked) == 1:
        return [f"{best.label} stands alone, with nothing to compare it with: {interval_text(best, column)}."]
    sentences = [f"{best.label} has the lowest {WHAT[column]}: {interval_text(best, column)}."]
    others = [each for each in ranking.ranked if each is not best]
    if len(rivals) < len(others):
        size = count(value_of(best, "parameters"))
        sentences.append(f"Its rivals at about {size} parameters: {some([each.label for each in rivals], 6)}.")
    apart = [each.label for each in rivals if ranking.pair(best, each).verdict == "separable"]
    if apart:
        sentences.append(f"It is separable from {some(apart, 6)}.")
    if others and all(len(each.seeds) < 2 for each in ranking.ranked):
        sentences.append("With one seed each no claim can be made: the rest is what these runs did.")
    by_reason = defaultdict(list)
    for each in others:
        if ranking.pair(best, each).voids:
            by_reason[", ".join(ranking.pair(best, each).voids)].append(each.label)
    sentences += [f"No claim about {some(names, 6)} against it: {why}." for why, names in by_reason.items()]
    unpaired = [each.label for each in others if ranking.pair(best, each).verdict == "not paired"]
    if unpaired:
        sentences.append(f"{some(unpaired, 6)} shares no seed and batch stream with it, so nothing is paired.")
    return sentences


def other_sizes(ranking, rivals):
    """Who is best at each of the sizes that the best one is not of, and whom it can be told from there."""
    rest = [each for each in ranking.by_loss if each is not ranking.best and each not in rivals]
    sentences = []
    while rest:
        best = rest[0]
        level = [each for each in rest if alike_in_size(best, each)]
        rest = [each for each in rest if each not in level]
        if len(level) < 2:
            continue
        by_verdict = defaultdict(list)
        for each in level[1:]:
            verdict = ranking.verdict_of(best, each)
            by_verdict[verdict if verdict.endswith("separable") else "with no claim about"].append(each.label)
        told = [
            f"{verdict.replace('separable', 'separable from')} {some(names, 6)}"
            for verdict, names in by_verdict.items()
        ]
        sentences.append(
            f"At about {count(value_of(best, 'parameters'))} parameters {best.label} is lowest, {', '.join(told)}."
        )
    return sentences


def interval_text(configuration, column):
    over_seeds = configuration.estimate(column)
    if over_seeds.half_width is None:
        return f"{over_seeds.mean:.4f} from one seed"
    return f"{over_seeds.mean:.4f} ± {over_seeds.half_width:.4f} over {over_seeds.n} seeds"


def ties(ranking, limit):
    """'dense and hybrid are not separable', for pairs of one size, the best placed first."""
    pairs = [pair for pair in ranking.pairs.values() if pair.verdict == "not separable"]
    pairs = [pair for pair in pairs if alike_in_size(pair.first, pair.second)] or pairs
    names = [f"{pair.first.label} and {pair.second.label}" for pair in pairs]
    more = f", and {len(names) - limit} more pairs" if len(names) > limit else ""
    others = f"; nor are {', '.join(names[1:limit])}{more}" if len(names) > 1 else ""
    return [f"{names[0]} are not separable{others}."] if names else []


def cost_sentences(ranking, analysis, rivals, limit):
    """'mamba2 needs 0.83x the tokens and 1.31x the hours of llama to reach 3.5000'."""
    costs = {each.configuration: each for each in analysis.costs}
    if ranking.best not in costs:
        return []
    never = [each.label for each in (ranking.best, *rivals) if each in costs and not costs[each].n_reached]
    sentences = [f"{some(never, 6)} did not reach {analysis.target:.4g}."] if never else []
    for other in [each for each in rivals if each in costs][: limit - 2]:
        ratios = {axis: ratio_to(ranking, costs[ranking.best], costs[other], axis)[0] for axis in AMOUNT}
        parts = [ratio_text(ratio, axis) for axis, ratio in ratios.items() if ratio is not None]
        if parts:
            goal = f"to reach {analysis.target:.4g}"
            needs = "needs" if any(ratio is not None and ratio.n > 1 for ratio in ratios.values()) else "took"
            sentences.append(f"{ranking.best.label} {needs} {listed(parts)} of {other.label} {goal}.")
    return sentences


def listed(parts):
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def ratio_text(log_ratio, axis):
    """'0.83x the tokens', with the interval where it does not rule out 1x."""
    text = f"{math.exp(log_ratio.mean):.2f}x the {axis}"
    return f"{text} ({ratio_range(log_ratio)}, not separable)" if log_ratio.verdict == "not separable" else text


def ratio_range(log_ratio):
    low, high = (math.exp(log_ratio.mean + side * log_ratio.half_width) for side in (-1, 1))
    return f"{low:.2f} to {high:.2f}" if high < 100 else f"{low:.2f} or more"


# -- what it cost, and whether it holds


def cost_section(ranking, analysis, limit):
    """What each needed to reach the loss, and how that compares with the best."""
    if not analysis.costs:
        return []
    numbers = ranking.numbers
    rows = [(f"{numbers[each.configuration]} {each.configuration.label}", cost_text(ranking, analysis, each))
            for each in analysis.costs[:limit]]  # fmt: skip
    if len(analysis.costs) > limit:
        rows.append((f"and {len(analysis.costs) - limit} more", "in summary_table.md"))
    return [(f"To reach {analysis.target:.4f}: {analysis.target_reason}", "bold", rows)]


def cost_text(ranking, analysis, costs):
    """'1.20M tokens · 7.2T FLOPs (1.31x, 1.20 to 1.43) · ...' against the best."""
    n, reached = len(costs.configuration.seeds), costs.n_reached
    if not reached:
        return "never"
    parts = [f"{amount_text(costs, axis)} {axis}{ratio_words(ranking, analysis, costs, axis)}"
             for axis in analysis.axes]  # fmt: skip
    return " · ".join(parts) + (f" · reached by {reached} of {n} seeds" if reached < n else "")


def amount_text(costs, axis):
    """The mean over seeds, ± the standard deviation where there are several."""
    amounts = costs.estimate(axis)
    if amounts.mean is None:
        return "-"
    spread = f" ± {AMOUNT[axis](amounts.spread)}" if amounts.spread else ""
    return AMOUNT[axis](amounts.mean) + spread


def ratio_words(ranking, analysis, costs, axis):
    """' (1.31x of #1, 1.20 to 1.43)' or why there is no ratio."""
    reference = analysis.reference
    if reference is None or costs is reference or ranking.best is None:
        return ""
    ratio, why = ratio_to(ranking, costs, reference, axis)
    if ratio is None:
        return f" ({why})" if why else ""
    interval = f", {ratio_range(ratio)}" if ratio.half_width is not None else ""
    return f" ({math.exp(ratio.mean):.2f}x of {ranking.numbers[ranking.best]}{interval})"


def stability_section(ranking, analysis):
    """Does an early ranking hold, and does a small one?"""
    rows, order = [], analysis.order
    if order is not None:
        tokens, tau = order.tau_after(0.1)
        part = f"{100 * tokens / order.tokens[-1]:.0f}% of the tokens ({count(tokens)})"
        rows.append(("During training", f"after {part} {tau_words(tau)}; {settled_words(order)}"))
    for small, large, shared, tau in analysis.size_orders:
        sizes = [count(max(each.runs[0].values["parameters"] for each in tier.values())) for tier in (small, large)]
        rows.append((f"{sizes[0]} -> {sizes[1]} parameters", f"{tau_between(tau)} ({len(shared)} architectures)"))
    return [("Does the order hold? Kendall's tau: 1 is the same order, -1 the reverse", "bold", rows)] if rows else []


def tau_between(tau):
    return "everything tied" if tau is None else f"tau {tau:.2f} between the two orders"


def tau_words(tau):
    return "everything tied" if tau is None else f"tau {tau:.2f} with the order at the end"


def settled_words(order):
    if order.settled_at == order.tokens[-1]:
        return "the order changed until the last evaluation"
    return f"from {count(order.settled_at)} tokens on the order stays the same"


def pareto_section(ranking, analysis):
    """Who is not beaten in both loss and cost."""
    numbers = ranking.numbers
    rows = []
    for front in analysis.fronts:
        names = [f"{numbers[each]} {each.label}" for each in front.members]
        rows.append((front.title, front.why_not or some(names, 8)))
    return [("Pareto fronts: nobody has both a lower loss and less", "bold", rows)] if rows else []


def scaling_section(analysis):
    """Power laws and iso-FLOP minima of architectures with three sizes or more."""
    rows = []
    for each in analysis.laws:
        rows.append((f"{each.family.label}: loss by parameters", law_text(each.by_size, "N", len(each.family.members))))
        if each.by_flops is not None:
            rows.append((f"{each.family.label}: loss by FLOPs", flops_law_text(each.by_flops)))
        for iso in each.iso_flops:
            best = "outside the sizes tried" if iso.best_size is None else f"{count(iso.best_size)} parameters"
            rows.append((f"{each.family.label}: best size for {si(iso.flops)} FLOPs", best))
    return [("Power laws fitted to the loss, and the best size for the same FLOPs", "bold", rows)] if rows else []


def law_text(law, letter, n_sizes):
    floor = f"{law.floor:.3f} + " if law.has_floor else ""
    interval = f"exponent {law.exponent:.3f} ({law.low:.3f} to {law.high:.3f}, bootstrapped)"
    few = "; without E, which so few sizes cannot tell" if not law.has_floor else ""
    return f"L({letter}) = {floor}{law.coefficient:.3g} {letter}^-{law.exponent:.3f}; {interval}; {n_sizes} sizes{few}"


def flops_law_text(found):
    """The law of the envelope, with a warning where a single size is lowest throughout."""
    law, _, _, n_lowest = found
    text = law_text(law, "C", n_lowest).replace("sizes", "sizes are lowest in turn")
    alone = "one size is lowest throughout, so this is its own curve and no frontier"
    return text if n_lowest > 1 else text.replace("1 sizes are lowest in turn", alone)


def eval_sections(ranking, limit):
    """What evaluate.py found, a section for each kind of evaluation."""
    sections = []
    for found in findings_of(ranking):
        rows = [(f"{ranking.numbers[each]} {each.label}" if ranking.numbers[each] != each.label else each.label,
                 " · ".join(f"{name} {said}" for name, said in zip(found.columns, cells, strict=True)))
                for each, cells in found.rows]  # fmt: skip
        more = [(f"and {len(rows) - limit} more", "")] if len(rows) > limit else []
        sections.append((f"{found.title}: {found.note}", "bold", rows[:limit] + more))
    return sections


def sections_before(ranking, limit):
    return rules_section(ranking) + finding_sections(ranking, "warns", limit)


def sections_after(ranking, analysis, limit):
    claims = claim_section(ranking, limit + 2) + effect_section(ranking, limit + 2)
    costs = cost_section(ranking, analysis, limit + 2) + stability_section(ranking, analysis)
    rest = pareto_section(ranking, analysis) + scaling_section(analysis)
    costs = eval_sections(ranking, limit + 7) + costs
    return claims + costs + rest + component_section(ranking, limit) + finding_sections(ranking, "note", limit)
