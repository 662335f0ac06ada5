"""Rank what may be ranked: the columns, the order, and what can be claimed about every pair.

    rankings = rank(runs)                          # one per set of comparable runs, each with its audit
    rankings[0].pairs                              # every two rows: difference, Holm's p, or why there is no claim

A row is a configuration: the mean over its seeds, with the 95% interval where there is more than one.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from comparison_audit import LOSS, Voids, audit, comparable_groups
from comparison_configurations import group_configurations, paired
from comparison_curves import hold_at
from comparison_logs import OF_ONE_OBJECTIVE
from comparison_settings import differing_fields, key_of
from comparison_stats import CONFIDENCE, Estimate, holm

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


def kibibytes(value):
    """Bytes as KiB up to one MiB."""
    return f"{value / 2**10:.0f}KiB" if value is not None and value < 2**20 else mebibytes(value)


def hours(value):
    return "-" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def whole(value):
    return "-" if value is None else f"{value:,.0f}"


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
    Column("answer_accuracy", "answers\nright", percent, "higher"),
    Column("lm_loss", "LM\nloss", loss, "lower"),
    Column("wp_loss", "win\nloss", loss, "lower"),
    Column("wp_acc", "win\naccuracy", percent, "higher"),
    Column("wp_gap", "win gap\nto best", loss, "lower"),
    Column("wp_ece", "win\nECE", loss, "lower"),
    Column("wp_brier", "win\nBrier", loss, "lower"),
    Column("prompt_score", "prompt\nscore", percent, "higher"),
    Column("tokens_per_second", "tokens/s", whole, "higher"),
    Column("mfu", "MFU", percent, "higher"),
    Column("peak_memory_bytes", "memory", mebibytes, "lower", max),
    Column("non_finite_steps", "NaN\nsteps", whole, "lower", sum),
    Column("state_bytes", "state", kibibytes, "lower"),
    Column("hours", "hours", hours, "lower"),
)
COLUMN = {column.name: column for column in COLUMNS}
LOSSES = ("final_val_loss", "best_val_loss", "bits_per_byte", "lm_loss", "wp_loss", "pseudo_perplexity")
# Whose runs are judged by a number may be ranked by these alone of the losses: the loss of hidden tokens depends on how
# many are hidden, and is no loss of a text.
LOSSES_BESIDE = {"final_val_loss": LOSSES[:-1], "pseudo_perplexity": ("pseudo_perplexity",)}
SAME_SIZE = 1.25  # configurations whose parameters are within this ratio are of one size
MAX_PAIRED = 60  # rows that are all held against each other: 1,770 pairs
NOT_ALWAYS = (*OF_ONE_OBJECTIVE, "prompt_score", "state_bytes")  # where some run has them; the score by evaluate.py
# In a narrow terminal a row takes two lines, and each of these pairs is one column.
STACKED = (
    ("parameters", "active_parameters"),
    ("tokens_processed", "flops_per_token"),
    ("final_val_loss", "best_val_loss"),
    ("bits_per_byte", "non_finite_steps"),
    ("pseudo_perplexity", "masked_accuracy"),
    ("answer_accuracy",),
    ("lm_loss", "wp_loss"),
    ("wp_acc", "wp_gap"),
    ("wp_ece", "wp_brier"),
    ("prompt_score",),
    ("tokens_per_second", "mfu"),
    ("peak_memory_bytes", "hours"),
)
WHAT = {
    "final_val_loss": "final validation loss",
    "best_val_loss": "best validation loss",
    "bits_per_byte": "bits per byte",
    "pseudo_perplexity": "pseudo-perplexity",
    "lm_loss": "language-model loss",
    "wp_loss": "loss of the win prediction",
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


def alike_in_size(one, other):
    """Whether two configurations are near enough in parameters to be rivals; True where that is not recorded."""
    sizes = [value_of(each, "parameters") for each in (one, other)]
    return not all(sizes) or max(sizes) <= SAME_SIZE * min(sizes)


# -- pairs


@dataclass(frozen=True)
class Pair:
    """What can be said about two configurations: `second - first` in the ranking's loss, paired by seed."""

    first: object  # Configuration
    second: object
    difference: Estimate
    p_holm: float | None  # after Holm's correction over all pairs that could be tested
    n_tested: int
    voids: tuple  # what voids a claim about their losses

    @property
    def verdict(self):
        """'separable', 'not separable', 'void', 'one seed' or 'not paired'."""
        if self.voids:
            return "void"
        if self.p_holm is None:
            return self.difference.verdict
        return "separable" if self.p_holm < 1 - CONFIDENCE else "not separable"

    def reversed(self):
        """The same pair with the difference the other way round."""
        mean = None if self.difference.mean is None else -self.difference.mean
        return replace(self, first=self.second, second=self.first, difference=replace(self.difference, mean=mean))

    @property
    def text(self):
        """'+0.0110 ± 0.0025 over 3 seeds: separable (p 0.008)', or why nothing can be claimed."""
        if self.difference.n == 1 and not self.voids:
            return numbers_of(self.difference)  # which says that it is one seed
        return f"{numbers_of(self.difference)}: {self.claim}" if self.difference.n else self.claim

    @property
    def claim(self):
        """The verdict in words."""
        if self.voids:
            return f"no claim: {', '.join(self.voids)}"
        if self.difference.n == 0:
            return "not paired: no seed in common with the same batch stream"
        if self.difference.n == 1:
            return "no claim from one seed"
        return f"{self.verdict} (p {p_text(self.p_holm)})"


def numbers_of(difference):
    """'-0.0120 ± 0.0050 over 3 seeds', or '-0.0120 (one seed)'."""
    if difference.n == 1:
        return f"{difference.mean:+.4f} (one seed)"
    return f"{difference.mean:+.4f} ± {difference.half_width:.4f} over {difference.n} seeds"


def p_text(p):
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def judged(pairs, column, voids):
    """{(first, second): Pair}; Holm's correction runs over all of them that have seeds enough and are not void."""
    differences = [paired(first, second, column) for first, second in pairs]
    reasons = [tuple(voids.between(first.runs, second.runs, LOSS)) for first, second in pairs]
    tested = [index for index, (each, why) in enumerate(zip(differences, reasons, strict=True))
              if each.p_value is not None and not why]  # fmt: skip
    adjusted = dict(zip(tested, holm([differences[index].p_value for index in tested]), strict=True))
    return {
        pair: Pair(*pair, differences[index], adjusted.get(index), len(tested), reasons[index])
        for index, pair in enumerate(pairs)
    }


# -- ranking


@dataclass(eq=False)
class Ranking:
    """Comparable runs: their configurations, best first, and what the audit found among them."""

    runs: list
    ranked: list  # the configurations that may be ranked, best first
    unranked: list  # those that did not finish, or whose number is missing or not finite
    sort: str
    findings: list
    held: str = ""  # a sentence, when the numbers are of a token count that was asked for

    @functools.cached_property
    def voids(self):
        return Voids(self.runs)

    @functools.cached_property
    def pairs(self):
        """{(first, second): Pair}, the better placed first.

        The first MAX_PAIRED rows are held against each other; every row against the best, and against the one that
        it differs from in one component.
        """
        place = {each: index for index, each in enumerate(self.ranked)}
        wanted = dict.fromkeys(itertools.combinations(self.ranked[:MAX_PAIRED], 2))
        others = [(self.best, each) for each in self.ranked if each is not self.best]
        others += [(better, worse) for _, worse, better in one_component_apart(self.ranked)]
        wanted |= dict.fromkeys(tuple(sorted(pair, key=place.get)) for pair in others)
        return judged(list(wanted), self.loss_column, self.voids)

    def pair(self, one, other):
        """The Pair of two ranked configurations, whichever is placed better."""
        return self.pairs[(one, other)] if (one, other) in self.pairs else self.pairs[(other, one)]

    def verdict_of(self, one, other):
        """The verdict on two ranked configurations; '' for two that were not held against each other."""
        pair = self.pairs.get((one, other)) or self.pairs.get((other, one))
        return pair.verdict if pair else ""

    @property
    def n_tested(self):
        """How many pairs Holm's correction ran over."""
        return next((pair.n_tested for pair in self.pairs.values()), 0)

    @functools.cached_property
    def by_loss(self):
        """The ranked configurations, lowest loss first, whatever the table is sorted by."""
        return in_order(self.ranked, self.loss_column)[0] or self.ranked

    @functools.cached_property
    def best(self):
        """The ranked configuration with the lowest loss: what the others are held against."""
        return next(iter(self.by_loss), None)

    def claim(self, configuration):
        """What the row may claim against the best, in a few words."""
        if configuration not in self.ranked:
            return "not ranked"
        if configuration is self.best or len(self.ranked) < 2:
            return "best" if len(self.ranked) > 1 else ""
        pair = self.pair(self.best, configuration)
        words = {"void": f"no claim: {', '.join(pair.voids)}", "one seed": "no claim: one seed"}
        number = self.numbers[self.best]
        words |= {"separable": f"separable from {number}", "not separable": f"not separable from {number}"}
        return words.get(pair.verdict, "no claim: not paired")

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
        return [each for each in COLUMNS if each.name not in NOT_ALWAYS or has_any(self.runs, each.name)]

    def places(self):
        """[('1', best), ('2', next), ..., ('-', unranked), ...]"""
        ranked = [(str(place), each) for place, each in enumerate(self.ranked, 1)]
        return ranked + [("-", each) for each in self.unranked]

    @functools.cached_property
    def numbers(self):
        """{configuration: '#1'}: how the text below the table names its rows; unranked ones go by their label."""
        return {each: each.label if place == "-" else f"#{place}" for place, each in self.places()}


def rank(runs, sort=None, at_tokens=None):
    """[Ranking, ...], one for each set of runs whose losses may be ranked together, the largest first.

    Sorted by what the objective is judged by unless told otherwise, mostly the final loss: the best of many evaluations
    flatters whoever was evaluated most. With `at_tokens` the runs are held at the evaluation nearest to that count that
    all of them have.
    """
    rankings = []
    for group in sorted(comparable_groups(runs), key=len, reverse=True):
        held, sentence = (group, "") if at_tokens is None else hold_at(group, at_tokens)
        column = sort_column(held, sort)
        order = in_order(group_configurations(held), column)
        rankings.append(Ranking(held, *order, column, audit(held), sentence))
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
    """[(field, worse, better, Pair), ...] of the pairs in `one_component_apart`, the best placed first."""
    place = {each: index for index, each in enumerate(ranking.ranked)}
    effects = [(name, worse, better, ranking.pair(worse, better))
               for name, worse, better in one_component_apart(ranking.ranked)]  # fmt: skip
    return sorted(effects, key=lambda effect: (place[effect[2]], place[effect[1]]))


def one_component_apart(ranked):
    """[(field, worse, better), ...]: ranked pairs whose models differ in one field and training in none.

    Found by leaving out one field at a time and grouping on the rest, so that a large sweep is not paired up in full.
    Within a group every configuration is held against the best one.
    """
    found = []
    for name in differing_fields([each.runs[0].model for each in ranked]):
        groups = defaultdict(list)
        for each in ranked:
            run = each.runs[0]
            rest = {field: value for field, value in run.model.items() if field != name}
            groups[key_of([rest, run.training, run.values["tokens_processed"]])].append(each)
        for best, *others in groups.values():
            found += [(name, other, best) for other in others if is_apart(name, best, other)]
    return found


def is_apart(name, first, second):
    return key_of(first.runs[0].model.get(name)) != key_of(second.runs[0].model.get(name))
