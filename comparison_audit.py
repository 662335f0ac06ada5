"""Audit whether runs may be compared, before anything is ranked.

    for group in comparable_groups(runs): ...       # losses are ranked inside a group only
    findings = audit(group)                         # what differs, how bad it is, which runs
    voids = Voids(group); voids.between(a, b)       # why no claim can be made about these two lists of runs

A difference is weighed once, in CHECKS: it may keep runs out of one ranking, void a claim about their losses or about
their speed, or only be good to know.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from comparison_checkpoints import problems_between, problems_of_run, read_run
from comparison_runs import AUDITED_TRAINING
from comparison_settings import (
    BOOKKEEPING,
    RESOLVED,
    differing_fields,
    dig,
    key_of,
    number,
    setting_text,
    short,
    value_text,
)

SEVERITIES = ("voids", "warns", "note")
LOSS, SPEED = "loss", "speed"  # the two kinds of claim
PLURAL = ("tokens", "tokens per step", "threads", "initial weights")
SLOWER = "speed, MFU, memory and hours are not comparable"


@dataclass(frozen=True)
class Check:
    """One thing that is held equal. `read` takes it from a run; None means that the run does not say."""

    what: str
    severity: str  # voids: not ranked together; warns: a claim needs care; note: good to know
    consequence: str
    read: Callable
    claims: tuple = ()  # kinds of claim that this difference voids between two runs of one ranking


@dataclass(frozen=True)
class Finding:
    """Something that differs between runs: which value each has, and what follows from it."""

    what: str
    severity: str
    consequence: str
    runs_by_value: dict  # {value as text: [run name, ...]}
    claims: tuple = ()


def dataset_identity(run):
    """Name and fingerprint, so that a reader sees which data, and an edited dataset of the same name is caught."""
    name, fingerprint = run.get("dataset", "name", default="?"), run.get("dataset", "fingerprint")
    return name if fingerprint is None else f"{name} ({str(fingerprint)[:10]})"


def tokenizer_identity(run):
    tokenizer, size = run.get("dataset", "tokenizer"), run.get("dataset", "vocab_size")
    return tokenizer if tokenizer is None or size is None else f"{tokenizer} ({size} tokens)"


def scored_by(run):
    """'final_val_loss'; with what it is the sum of where it is one, and 'pseudo_perplexity of 1024 tokens' where it is
    not of the whole evaluation set."""
    n, loss = run.get("resolved", "scoring", "tokens"), run.get("resolved", "scoring", "loss")
    made_of = "" if loss is None else f" = {loss}"
    return run.ranked_by + made_of + ("" if n is None else f" of {n} tokens")


CHECKS = (
    Check("dataset", "voids", "different text", dataset_identity),
    Check("tokenizer", "voids", "a token is not the same thing", tokenizer_identity),
    Check("evaluation set", "voids", "scored on different windows",
          lambda run: short(run.get("dataset", "evaluation_hash"))),
    Check("objective", "voids", "the losses measure different tasks",
          lambda run: run.get("training_config", "objective")),
    Check("score", "voids", "judged by different numbers", scored_by),
    Check("tokens", "warns", "more training, lower loss: not the same budget",
          lambda run: run.values.get("tokens_processed"), (LOSS,)),
    Check("tokens per step", "warns", "a different batch: fewer or more updates for the same tokens",
          AUDITED_TRAINING["tokens per step"], (LOSS,)),
    Check("block_size", "warns", "a longer context makes each token easier to predict",
          lambda run: run.get("model_config", "block_size"), (LOSS, SPEED)),
    Check("initial weights", "warns", "trained before, at a cost that is not counted here",
          AUDITED_TRAINING["initial weights"], (LOSS, SPEED)),
    Check("precision", "warns", f"rounding differs; {SLOWER}", AUDITED_TRAINING["precision"], (LOSS, SPEED)),
    Check("device", "warns", SLOWER,
          lambda run: run.get("resolved", "device_name", default=run.get("resolved", "device")), (SPEED,)),
    Check("world size", "warns", SLOWER, lambda run: run.get("resolved", "world_size"), (SPEED,)),
    Check("threads", "warns", SLOWER, lambda run: run.get("resolved", "threads"), (SPEED,)),
    Check("compile", "warns", SLOWER, lambda run: run.get("resolved", "compile"), (SPEED,)),
    Check("parallel mode", "warns", SLOWER, lambda run: run.get("resolved", "parallel"), (SPEED,)),
    Check("gradient checkpointing", "warns", SLOWER,
          lambda run: run.get("training_config", "gradient_checkpointing", default="none"), (SPEED,)),
    Check("torch", "note", "speed and rounding may differ", lambda run: run.get("versions", "torch")),
    Check("python", "note", "speed and rounding may differ", lambda run: run.get("versions", "python")),
    Check("numpy", "note", "speed and rounding may differ", lambda run: run.get("versions", "numpy")),
    Check("git commit", "note", "the code may differ", lambda run: short(run.get("git", "commit"))),
)  # fmt: skip


# -- which runs go together


def comparability_key(run):
    """Runs whose keys differ did not answer the same question: their losses are not ranked together."""
    return tuple(key_of(check.read(run)) for check in CHECKS if check.severity == "voids")


def configuration_key(run):
    """Runs with one key differ in their seed alone. A run that did not finish stands by itself."""
    alone = None if run.is_finished else run.folder
    length = run.get("resolved", "max_iters")
    return key_of([run.model, run.training, length]), comparability_key(run), alone


def comparable_groups(runs):
    """[[Run, ...], ...]: runs that answer the same question, in the order in which they first appear."""
    groups = defaultdict(list)
    for run in runs:
        groups[comparability_key(run)].append(run)
    return list(groups.values())


# -- what differs


def audit(runs):
    """Hold every pair of runs against every check. Returns what differs, the worst first.

    Pairs are found by grouping on the value: two runs differ exactly where they fall into different groups, and a
    thousand runs take no longer than they must.
    """
    findings = [found for check in CHECKS for found in differing(check, runs)]
    findings += stream_findings(runs) + kernel_findings(runs) + peak_findings(runs) + source_findings(runs)
    findings += tuning_findings(runs) + session_findings(runs) + length_findings(runs) + honesty_findings(runs)
    if len({key_of(run.seed) for run in runs}) > 1 and not has_complete_seeds(runs):
        seed = Check("seed", "note", "other seed, other weights and order of data: not paired", lambda run: run.seed)
        findings += differing(seed, runs)
    findings += training_findings(runs) + checkpoint_findings(runs)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def differing(check, runs):
    """[Finding] when the runs do not all have the same value, else []."""
    by_value = defaultdict(list)
    for run in runs:
        value = check.read(run)
        by_value["not recorded" if value is None else value_text(value)].append(run.name)
    if len(by_value) < 2:
        return []
    return [Finding(check.what, check.severity, check.consequence, dict(by_value), check.claims)]


def stream_findings(runs):
    """Runs of one seed, one batch shape and as many tokens must have drawn the same tokens in the same order.

    The hash runs along with training, so runs of different lengths end on different hashes: those say nothing here.
    """
    alike = defaultdict(list)
    for run in runs:
        if run.values.get("stream_hash") is not None:
            shape = run.get("resolved", "tokens_per_step"), run.get("model_config", "block_size")
            place = comparability_key(run), run.seed, hashed_tokens(run), *shape
            alike[key_of(list(place))].append(run)
    return [found for same in alike.values() for found in differing(stream_check(same[0].seed), same)]


def hashed_tokens(run):
    """How many tokens the stream hash is of: those up to the evaluation that the run is held at, where its row says."""
    is_part = run.held_at is not None and run.evaluations and run.evaluations[-1].get("stream_hash")
    return number(run.held_at if is_part else run.summary.get("tokens_processed"))


def stream_check(seed):
    consequence = "not the same tokens in the same order: these runs are not paired"
    return Check(f"stream of seed {seed}", "warns", consequence, lambda run: short(run.values["stream_hash"]))


def kernel_findings(runs):
    """Kernels are compared part by part: a Mamba run has no attention kernel to differ in."""
    return part_findings(runs, lambda run: run.kernels, "{} kernel", SLOWER, (SPEED,))


def source_findings(runs):
    """A part defined in a config file under one name, with another source."""
    consequence = "one name for two pieces of code: not the same part"
    return part_findings(runs, lambda run: run.part_sources, "source of {}", consequence, (LOSS, SPEED))


def part_findings(runs, table_of, what, consequence, claims):
    """Findings of a {part: value} table, each part among the runs that have it."""
    found = []
    for part in {part: None for run in runs for part in table_of(run)}:
        using = [run for run in runs if part in table_of(run)]
        read = lambda run, part=part: table_of(run)[part]  # noqa: E731 - a Check wants a function
        found += differing(Check(what.format(part), "warns", consequence, read, claims), using)
    return found


def peak_findings(runs):
    """MFU is a share of a peak. Where that is measured at start, one machine's peak moves with its other work."""
    peaks = {run: number(run.get("resolved", "peak_flops_per_second")) for run in runs}
    known = [peak for peak in peaks.values() if peak]
    if not known or max(known) <= 1.1 * min(known):
        return []
    text = {run: None if peak is None else f"{peak / 1e9:,.0f} GFLOP/s" for run, peak in peaks.items()}
    return differing(Check("peak", "note", "MFU is a share of different peaks", text.get), runs)


def tuning_findings(runs):
    """Whoever was tried at more learning rates had more chances (DESIGN 4.6)."""
    budgets = tuning_budgets(runs)
    consequence = "not the same tuning budget: whoever was tried more often had more chances"
    check = Check("tuning budget", "warns", consequence, budgets.get, (LOSS,))
    return differing(check, [run for run in runs if run.is_finished])


def tuning_budgets(runs):
    """{run: how much its architecture was tuned, in words}.

    As a sweep wrote it down (`tuning_runs` trials of `tuning_tokens` tokens in all); else the settings of learning rate
    and weight decay at which the architecture stands among these runs.
    """
    tried = defaultdict(set)
    for run in runs:
        rate = run.get("training_config", "learning_rate"), run.get("training_config", "weight_decay")
        tried[key_of(run.model)].add(key_of(list(rate)))
    return {run: recorded_budget(run) or f"{len(tried[key_of(run.model)])} tried here" for run in runs}


def recorded_budget(run):
    """'9 trials, 4,500,000 tokens', or None where no sweep tuned this run."""
    n_trials, tokens = (number(run.get("training_config", name)) for name in ("tuning_runs", "tuning_tokens"))
    return f"{n_trials} trials, {tokens or 0:,} tokens" if n_trials else None


def length_findings(runs):
    """At a point in training, a schedule that is longer has decayed less: found when runs are held at a token count."""
    held = [run for run in runs if run.held_at is not None and has_decay(run)]
    consequence = "at this point the longer schedule's learning rate had decayed less"
    return differing(Check("schedule length", "warns", consequence, schedule_length, (LOSS,)), held)


def has_decay(run):
    return run.get("training_config", "schedule") != "constant" and run.get("training_config", "decay_lr") is not False


def schedule_length(run):
    return run.get("resolved", "max_iters")


def session_findings(runs):
    """Runs that were resumed with other settings, on another machine or from other code."""
    by_kind = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for claims, text in session_changes(run):
            by_kind[claims][text].append(run.name)
    consequences = {
        (LOSS, SPEED): "settings changed midway: the run is not of one configuration",
        (SPEED,): f"resumed on another setup: {SLOWER}",
        (): "resumed from other code or versions",
    }
    return [Finding("resumed", "warns" if claims else "note", consequences[claims], dict(values), claims)
            for claims, values in by_kind.items()]  # fmt: skip


def session_changes(run):
    """[(claims voided, 'learning_rate 0.001 -> 0.0003'), ...] between the sessions of one run."""
    earlier = run.get("earlier_sessions")
    sessions = [each for each in earlier if isinstance(each, dict)] if isinstance(earlier, list) else []
    sessions += [run.config] if sessions else []
    changes = []
    for before, after in itertools.pairwise(sessions):
        for claims, read in SESSION_TABLES:
            tables = [read(before), read(after)]
            changes += [(claims, f"{name} {setting_text(tables[0], name)} -> {setting_text(tables[1], name)}")
                        for name in differing_fields(tables) if all(tables)]  # fmt: skip
    return changes


def training_settings(session):
    settings = dig(session, "training_config", default={})
    kept = {name: value for name, value in settings.items() if name not in BOOKKEEPING | RESOLVED}
    return kept | chosen(session, "resolved", ("tokens_per_step", "dtype", "tf32", "max_iters"))


def chosen(session, section, names):
    table = dig(session, section, default={})
    return {name: table[name] for name in names if name in table}


SPEED_SETTINGS = ("device_name", "world_size", "parallel", "threads", "compile", "kernels")
SESSION_TABLES = (
    ((LOSS, SPEED), training_settings),
    ((SPEED,), lambda each: chosen(each, "resolved", SPEED_SETTINGS)),
    ((), lambda each: {name: short(value) for name, value in
                       (chosen(each, "git", ("commit",)) | chosen(each, "versions", ("torch", "numpy"))).items()}),
)  # fmt: skip


def honesty_findings(runs):
    """What a reader must know even when all runs share it: runs cut short, logs edited, code that no commit holds."""
    found = []
    cut_short = [run for run in runs if not run.is_finished]
    if cut_short:
        by_status = defaultdict(list)
        for run in cut_short:
            by_status[run.status].append(run.name)
        found.append(Finding("status", "warns", "not ranked: the loss is not that of a whole run", dict(by_status)))
    edited = {run.log_disagreement: [run.name] for run in runs if run.log_disagreement}
    if edited:
        found.append(Finding("logs", "warns", "its files contradict each other: no claim", edited, (LOSS, SPEED)))
    dirty = [run.name for run in runs if run.get("git", "dirty") is True]
    if dirty:
        consequence = "the commit does not tell the code that ran"
        found.append(Finding("git", "note", consequence, {"uncommitted changes": dirty}))
    for check in CHECKS:
        silent = [run.name for run in runs if check.severity == "voids" and check.read(run) in (None, "?")]
        if silent and len(silent) == len(runs):
            found.append(Finding(check.what, "warns", "cannot be checked", {"not recorded": silent}))
    return found


def checkpoint_findings(runs):
    """Checkpoints whose token counts do not add up within a run, or do not line up with those of the first run.

    Runs line up where their schedules say so; the agreement of two with a third is agreement with each other.
    """
    by_problem, scheduled = defaultdict(list), []
    for run in runs:
        read = read_run(run.folder)
        problems = problems_of_run(read)
        if problems:
            more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
            by_problem[problems[0].replace(f"{run.folder}", run.name) + more].append(run.name)
        elif read.schedule and read.checkpoints and run.is_finished:
            scheduled.append((run, read))
    for run, read in scheduled[1:]:
        first, first_read = scheduled[0]
        for problem in problems_between([first_read, read])[:1]:
            sentence = problem.replace(f"{first.folder}", first.name).replace(f"{run.folder}", run.name)
            by_problem[sentence] += [first.name, run.name]
    consequence = "token counts disagree: equal counts may not be equal tokens (scripts/verify_checkpoints.py)"
    return [Finding("checkpoints", "warns", consequence, dict(by_problem))] if by_problem else []


def has_complete_seeds(runs):
    """True when every configuration was run with the same seeds, so that seeds do not tell two of them apart."""
    seeds = defaultdict(set)
    for run in runs:
        seeds[configuration_key(run)].add(key_of(run.seed))
    return len({frozenset(each) for each in seeds.values()}) == 1


TUNED = ("learning_rate", "weight_decay")  # what the trials of a sweep choose


def training_findings(runs):
    """Settings of training, beside the audited ones, in which the runs differ."""
    found, are_tuned = [], all(recorded_budget(run) for run in runs)
    for name in differing_fields([run.training for run in runs]):
        if name in AUDITED_TRAINING or name.startswith("source of "):
            continue
        consequence = "the difference is not the architecture's alone"
        if are_tuned and name in TUNED:
            consequence = "each at what it did best with in its trials"
        check = Check(name, "note", consequence, lambda run, name=name: setting_text(run.training, name))
        found += differing(check, runs)
    return found


# -- which claims are void


class Voids:
    """Why no claim can be made about two lists of runs of one ranking.

    Args:
        runs: all runs of the ranking: how often each architecture was tuned is counted among them.
    """

    def __init__(self, runs):
        self.budgets = tuning_budgets(runs)
        self.known = {}

    def between(self, first, second, claim=LOSS):
        """['tokens differ', 'the logs of a contradict each other', ...]: what voids this kind of claim."""
        facts, other_facts = self.facts(first), self.facts(second)
        differing = [what for what, claims, values in facts["checks"]
                     if claim in claims and values != other_facts["values"][what]]  # fmt: skip
        for what, claims, table in (("{} kernel", (SPEED,), "kernels"), ("source of {}", (LOSS, SPEED), "sources")):
            shared = facts[table].keys() & other_facts[table].keys() if claim in claims else ()
            differing += sorted(what.format(part) for part in shared if facts[table][part] != other_facts[table][part])
        flaws = facts["flaws"] + [flaw for flaw in other_facts["flaws"] if flaw not in facts["flaws"]]
        reasons = [f"{what} differ{'' if what in PLURAL else 's'}" for what in differing]
        return reasons + [text for claims, text in flaws if claim in claims]

    def facts(self, runs):
        """What `between` compares about a list of runs, worked out once for each."""
        key = tuple(runs)
        if key not in self.known:
            self.known[key] = self.read(runs)
        return self.known[key]

    def read(self, runs):
        """What the checks read from the runs, their kernels, sources of parts, and what is wrong with them."""
        budget = Check("tuning budget", "warns", "", lambda run: self.budgets[run], (LOSS,))
        length = Check("schedule length", "warns", "", held_length, (LOSS,))
        checks = [(check.what, check.claims, frozenset(key_of(check.read(run)) for run in runs))
                  for check in (*CHECKS, budget, length) if check.claims]  # fmt: skip
        flaws = [
            (claims, f"{run.name} was resumed with {text}") for run in runs for claims, text in session_changes(run)
        ]
        flaws += [
            ((LOSS, SPEED), f"the logs of {run.name} contradict each other") for run in runs if run.log_disagreement
        ]
        lost = [run.name for run in runs if run.is_finished and run.values.get(run.ranked_by) is None]
        if 0 < len(lost) < len(runs):  # a mean over those that survived flatters
            flaws.append(((LOSS,), f"{', '.join(lost)} ended without a finite loss"))
        return {
            "checks": checks,
            "values": {what: values for what, _, values in checks},
            "kernels": {part: value_text(kernel) for run in runs for part, kernel in run.kernels.items()},
            "sources": {part: digest for run in runs for part, digest in run.part_sources.items()},
            "flaws": [(claims, text) for claims, text in flaws if claims],
        }


def held_length(run):
    return schedule_length(run) if run.held_at is not None and has_decay(run) else None
