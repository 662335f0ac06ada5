"""Find runs, read them, and audit whether they may be compared. Standard library only.

    runs, problems = find_runs('runs', ['llama*', 'gpt2'])    # or latest=4, or everything
    for ranking in comparable_groups(runs): ...               # losses are ranked inside a group only
    findings = audit(runs)                                    # what differs, how bad it is, which runs

A run is a folder with config.json and with summary.json or metrics.jsonl. The table needs only the two small files;
metrics.jsonl is read for plots, and for runs that have no summary yet.
A file that cannot be read costs one line naming its run, and the other runs are still compared.
"""

import functools
import glob
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from user_errors import UserError, did_you_mean

RUN_FORMAT = 1  # of config.json and summary.json; older ones are read as far as they go

# Settings that leave the weights alone: two runs that differ only here, or in the seed, are the same configuration.
BOOKKEEPING = {
    "match", "match_to", "eval_schedule", "checkpoint_tokens", "first_epoch_checkpoints", "subsequent_epochs_spacing",
    "min_checkpoints_per_epoch",  # what `match` solved is in the model's own fields
    "run_name", "runs_dir", "seed", "init_from", "resume_step", "data_dir", "input", "shard_tokens",
    "prefetch_batches", "loss_chunk_elements", "kernel_backend", "max_non_finite_steps", "threads", "eval_interval",
    "eval_only", "sample_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval", "layer_stats_interval",
    "tensorboard", "wandb_log", "wandb_project", "wandb_run_name", "plot", "pseudo_perplexity_tokens",
    "pseudo_perplexity_always", "tuning_runs", "tuning_tokens",
}  # fmt: skip
# Settings that the audit compares as what they resolve to: 'auto' and 'cpu' may be the same device.
RESOLVED = {
    "dataset", "tokenizer", "tokenizer_vocab_size", "variant", "objective", "batch_size", "eval_iters",
    "gradient_accumulation_steps", "max_iters", "max_tokens", "epochs", "device", "dtype", "tf32", "compile",
}  # fmt: skip
# The checks among the audit's that decide the weights.
RESOLVED_TRAINING = ("tokens per step", "precision", "initial weights")
# Names for sets of other fields: `team` and `llama` are the same architecture.
MODEL_LABELS = {"arch_preset", "model_size"}
# Model fields that the data decides, and how the network is computed rather than what it is.
NOT_COMPONENTS = {"vocab_size", "attention_backend"}


# -- reading one run


@dataclass(eq=False)
class Run:
    """One run folder. `values` holds what the table shows, by column; numbers missing or not finite are None."""

    name: str
    folder: Path
    config: dict
    status: str  # finished, interrupted, failed, or unfinished: still going, or killed
    values: dict = field(default_factory=dict)

    def get(self, *path, default=None):
        """A value of config.json by its path, e.g. run.get('dataset', 'fingerprint')."""
        return dig(self.config, *path, default=default)

    @property
    def seed(self):
        return number(self.get("training_config", "seed"))

    @property
    def ranked_by(self):
        """The column that its objective is judged by; runs from before there was a choice have the final loss."""
        return str(self.get("resolved", "scoring", "ranked_by", default="final_val_loss"))

    @property
    def is_finished(self):
        return self.status == "finished"

    @functools.cached_property
    def model(self):
        """{field: value} of what makes the architecture, part options included, labels left out."""
        fields = flat_settings(self.get("model_config"))
        return {name: fields[name] for name in fields if name not in MODEL_LABELS | NOT_COMPONENTS}

    @functools.cached_property
    def training(self):
        """{setting: value} of what decides the trained weights, beside the architecture and the seed."""
        settings = flat_settings(self.get("training_config"))
        kept = {name: value for name, value in settings.items() if name not in BOOKKEEPING | RESOLVED}
        return kept | {check.what: check.read(self) for check in CHECKS if check.what in RESOLVED_TRAINING}

    @functools.cached_property
    def comparability_key(self):
        """Runs whose keys differ did not answer the same question: their losses are not ranked together."""
        return tuple(key_of(check.read(self)) for check in CHECKS if check.severity == "voids")

    @functools.cached_property
    def configuration_key(self):
        """Runs with one key differ in their seed alone. A run that did not finish stands by itself."""
        alone = None if self.is_finished else self.folder
        length = self.get("resolved", "max_iters")
        return key_of([self.model, self.training, length]), self.comparability_key, alone

    @property
    def kernels(self):
        """{part: kernel} that ran, e.g. {'attention': 'sdpa'}."""
        kernels = self.get("resolved", "kernels")
        return kernels if isinstance(kernels, dict) else {}


def dig(tree, *path, default=None):
    """tree[path[0]][path[1]]..., or `default` where a step is missing or is not a dict."""
    for step in path:
        if not isinstance(tree, dict):
            return default
        tree = tree.get(step)
    return default if tree is None else tree


def number(value):
    """A finite float or int as it is; None for everything else (null, NaN, text, a truth value)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def flat_settings(settings):
    """Settings with the options of parts among them: {'part_options': {'d_state': 16}} becomes {'d_state': 16}."""
    settings = settings if isinstance(settings, dict) else {}
    options = settings.get("part_options")
    flat = {name: value for name, value in settings.items() if name != "part_options"}
    return flat | options if isinstance(options, dict) else flat


def key_of(value):
    """A hashable stand-in for a value of config.json; equal values have equal keys, 1 and 1.0 included."""
    if isinstance(value, dict):
        return tuple(sorted((name, key_of(item)) for name, item in value.items()))
    if isinstance(value, list):
        return tuple(key_of(item) for item in value)
    if number(value) is not None:
        return repr(float(value))
    return repr(value)


class UnreadableRunError(Exception):
    """This run cannot be compared at all; the message says which file is at fault."""


def read_json(path):
    """The object in a JSON file, or None when the file is not there."""
    try:
        content = json.loads(path.read_bytes())  # bytes: json finds out the Unicode encoding by itself
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise UnreadableRunError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UnreadableRunError(f"{path.name} holds no JSON object")
    return content


def load_run(folder):
    """Read one folder. Returns (Run, [problem, ...]); raises UnreadableRunError when there is nothing to compare."""
    folder = Path(folder)
    config, problems = read_json(folder / "config.json"), []
    if config is None:
        raise UnreadableRunError("it has no config.json")
    if config.get("format") != RUN_FORMAT:
        problems.append(f"config.json has format {config.get('format')}, not {RUN_FORMAT}; what it lacks stays empty")
    try:
        summary = read_json(folder / "summary.json")
    except UnreadableRunError as error:
        summary = None
        problems.append(f"{error}; read from metrics.jsonl instead")
    if summary is None:
        rows, troubles = read_metrics(folder)
        problems += troubles
        if not rows:
            raise UnreadableRunError("; ".join([*problems, "it has logged nothing yet"]))
        summary = summary_from_metrics(rows)
    status = str(summary.get("status") or "finished")
    run = Run(folder.name, folder, config, "unfinished" if status == "running" else status)
    run.values = table_values(run, summary)
    if run.is_finished and run.values.get(run.ranked_by) is None:
        count = run.values["non_finite_steps"]
        steps = f" ({count} non-finite steps)" if count else ""
        what = {"final_val_loss": "final validation loss"}.get(run.ranked_by, run.ranked_by)
        problems.append(f"its {what} is not a finite number{steps}; it is not ranked")
    return run, problems


def table_values(run, summary):
    """{column: value} from config.json and summary.json; the names are the columns of summary_table.csv."""

    def first(*candidates):
        return next((number(value) for value in candidates if number(value) is not None), None)

    seconds = number(summary.get("train_seconds"))
    values = {
        "name": run.name,
        "architecture": run.get("architecture", default=""),
        "parameters": first(run.get("parameters", "total"), summary.get("n_params")),
        "active_parameters": first(run.get("parameters", "active"), summary.get("n_active_params")),
        "flops_per_token": first(run.get("flops", "per_token_training"), summary.get("flops_per_token")),
        "hours": None if seconds is None else seconds / 3600,
        "stream_hash": short(summary.get("stream_hash"), None),
    }
    for name in (
        "tokens_processed", "final_val_loss", "best_val_loss", "bits_per_byte", "tokens_per_second", "mfu",
        "peak_memory_bytes", "non_finite_steps", "train_seconds", "eval_seconds", "total_flops", "steps",
        "pseudo_perplexity", "masked_accuracy",
    ):  # fmt: skip
        values[name] = number(summary.get(name))
    return values


# -- metrics.jsonl


def read_metrics(folder):
    """(rows, problems) of metrics.jsonl, in the order of steps; lines that are cut off or garbled are left out.

    After a crash and a resume the steps in between were logged twice: the last line about a step counts.
    """
    try:
        lines = (Path(folder) / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"metrics.jsonl cannot be read ({error})"]
    rows, bad_lines = {}, []
    for line_number, line in enumerate(lines, 1):
        row = parse_row(line)
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
        "pseudo_perplexity": last("eval", "pseudo_perplexity"),
        "masked_accuracy": last("eval", "masked_accuracy"),
        "tokens_processed": last_row.get("tokens_processed"),
        "train_seconds": last_row.get("train_seconds"),
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "peak_memory_bytes": last("train", "peak_memory_bytes"),
        "non_finite_steps": last("train", "non_finite_steps"),
        "steps": last_row.get("step"),
    }


# -- finding runs


def find_runs(runs_dir, patterns=(), latest=None):
    """The runs asked for, and one line for each thing that could not be read.

    Args:
        runs_dir: the folder that holds run folders.
        patterns: names of runs, globs over names ('llama*'), or paths of run folders; empty takes every run.
        latest: keep only this many, the last to be started.

    Returns:
        (runs, problems): [Run, ...] in the order asked for, or oldest first; ['NAME: what is wrong', ...].
    """
    runs_dir = Path(runs_dir)
    folders = named_folders(runs_dir, patterns) if patterns else all_run_folders(runs_dir)
    if not folders:
        is_run = "it is a run itself: give it as a name" if looks_like_a_run(runs_dir) else "train one: python train.py"
        raise UserError(f"no runs found in {runs_dir}; {is_run}")
    if not patterns or latest:
        folders.sort(key=started_at, reverse=True)
    runs, problems = [], []
    for folder in folders:
        if latest and len(runs) == latest:
            break
        try:
            run, troubles = load_run(folder)
            runs.append(run)
        except UnreadableRunError as error:
            troubles = [f"left out: {error}"]
        problems += [f"{folder.name}: {trouble}" for trouble in troubles]
    if not runs:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(f"no run can be compared; {problems[0]}{more}")
    if not patterns or latest:
        runs.reverse()
    give_distinct_names(runs)
    return runs, problems


def all_run_folders(runs_dir):
    """Every folder directly under runs_dir that looks like a run, half-written ones included."""
    if not runs_dir.is_dir():
        raise UserError(f"there is no folder {str(runs_dir)!r}; train a run, or say where they are: --runs_dir")
    return sorted(folder for folder in runs_dir.iterdir() if looks_like_a_run(folder))


def looks_like_a_run(folder):
    return any((folder / file).is_file() for file in ("config.json", "summary.json", "metrics.jsonl"))


def named_folders(runs_dir, patterns):
    """The folders that names, globs or paths stand for, each once."""
    folders = []
    for pattern in patterns:
        folders += folders_of(runs_dir, pattern)
    by_place = {folder.resolve(): folder for folder in folders}
    return list(by_place.values())


def folders_of(runs_dir, pattern):
    """A name under runs_dir, else a path (what the shell makes of runs/llama*), else a glob over either."""
    for folder in (runs_dir / pattern, Path(pattern)):
        if folder.is_dir():
            return [must_be_a_run(folder)]
    for place in (os.path.join(glob.escape(str(runs_dir)), pattern), pattern):
        folders = [Path(match) for match in sorted(glob.glob(place)) if looks_like_a_run(Path(match))]
        if folders:
            return folders
    names = [folder.name for folder in all_run_folders(runs_dir)]
    if glob.has_magic(pattern):
        raise UserError(f"no run in {runs_dir} matches {pattern!r}{examples(names)}")
    raise UserError(f"there is no run {pattern!r} in {runs_dir}{did_you_mean(pattern, names) or examples(names)}")


def must_be_a_run(folder):
    if looks_like_a_run(folder):
        return folder
    if any(looks_like_a_run(child) for child in folder.iterdir()):
        raise UserError(f"{str(folder)!r} is a folder of runs, not a run; give it as --runs_dir {folder}")
    raise UserError(f"{str(folder)!r} is not a run: it has no config.json")


def examples(names):
    """' (there are: a, b and 3 more)' to append to an error sentence."""
    return f" (there are: {some(names, 5)})" if names else " (it holds no runs)"


def some(names, limit):
    """'a, b, c and 4 more': at most `limit` of the names."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def started_at(folder):
    """Seconds since 1970 at which a run was started; by the clock of its file where config.json does not say."""
    try:
        created = datetime.fromisoformat((read_json(folder / "config.json") or {})["created"].replace("Z", "+00:00"))
        return created.timestamp(), folder.name
    except (UnreadableRunError, KeyError, AttributeError, ValueError, OverflowError, OSError):
        return folder.stat().st_mtime, folder.name


def give_distinct_names(runs):
    """Runs of one name from two folders are told apart by as much of their path as it takes."""
    by_name = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run)
    for same in by_name.values():
        depth = 1
        while len(same) > 1 and depth < 8 and len({run.name for run in same}) < len(same):
            depth += 1
            for run in same:
                run.name = run.values["name"] = "/".join(run.folder.resolve().parts[-depth:])


# -- the audit


@dataclass(frozen=True)
class Check:
    """One thing that is held equal. `read` takes it from a run; None means that the run does not say."""

    what: str
    severity: str  # voids: not ranked together; warns: a claim needs care; note: good to know
    consequence: str
    read: Callable


@dataclass(frozen=True)
class Finding:
    """Something that differs between runs: which value each has, and what follows from it."""

    what: str
    severity: str
    consequence: str
    runs_by_value: dict  # {value as text: [run name, ...]}


SPEED = "speed, MFU, memory and hours are not comparable"


def dataset_identity(run):
    """Name and fingerprint, so that a reader sees which data, and an edited dataset of the same name is caught."""
    name, fingerprint = run.get("dataset", "name", default="?"), run.get("dataset", "fingerprint")
    return name if fingerprint is None else f"{name} ({str(fingerprint)[:10]})"


def tokenizer_identity(run):
    tokenizer, size = run.get("dataset", "tokenizer"), run.get("dataset", "vocab_size")
    return tokenizer if tokenizer is None or size is None else f"{tokenizer} ({size} tokens)"


def precision(run):
    dtype = run.get("resolved", "dtype")
    return f"{dtype} (TF32)" if dtype == "float32" and run.get("resolved", "tf32") is True else dtype


def scored_by(run):
    """'final_val_loss', or 'pseudo_perplexity of 1024 tokens' where a score is not of the whole evaluation set."""
    n = run.get("resolved", "scoring", "tokens")
    return run.ranked_by if n is None else f"{run.ranked_by} of {n} tokens"


def short(value, length=10):
    return None if value is None else str(value)[:length]


CHECKS = (
    Check("dataset", "voids", "different text", dataset_identity),
    Check("tokenizer", "voids", "a token is not the same thing", tokenizer_identity),
    Check("evaluation set", "voids", "scored on different windows",
          lambda run: short(run.get("dataset", "evaluation_hash"))),
    Check("objective", "voids", "the losses measure different tasks",
          lambda run: run.get("training_config", "objective")),
    Check("score", "voids", "judged by different numbers", scored_by),
    Check("tokens", "warns", "more training, lower loss: not the same budget",
          lambda run: run.values.get("tokens_processed")),
    Check("tokens per step", "warns", "a different batch: fewer or more updates for the same tokens",
          lambda run: run.get("resolved", "tokens_per_step")),
    Check("block_size", "warns", "a longer context makes each token easier to predict",
          lambda run: run.get("model_config", "block_size")),
    Check("initial weights", "warns", "trained before, at a cost that is not counted here",
          lambda run: run.get("initial_weights", "source", default="random")),
    Check("precision", "warns", f"rounding differs; {SPEED}", precision),
    Check("device", "warns", SPEED,
          lambda run: run.get("resolved", "device_name", default=run.get("resolved", "device"))),
    Check("world size", "warns", SPEED, lambda run: run.get("resolved", "world_size")),
    Check("threads", "warns", SPEED, lambda run: run.get("resolved", "threads")),
    Check("compile", "warns", SPEED, lambda run: run.get("resolved", "compile")),
    Check("torch", "note", "speed and rounding may differ", lambda run: run.get("versions", "torch")),
    Check("git commit", "note", "the code may differ", lambda run: short(run.get("git", "commit"))),
)  # fmt: skip


def comparable_groups(runs):
    """[[Run, ...], ...]: runs that answer the same question, in the order in which they first appear."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.comparability_key].append(run)
    return list(groups.values())


def audit(runs):
    """Hold every pair of runs against every check. Returns what differs, the worst first.

    Pairs are found by grouping on the value: two runs differ exactly where they fall into different groups, and a
    thousand runs take no longer than they must.
    """
    findings = [found for check in CHECKS for found in differing(check, runs)]
    findings += stream_findings(runs) + kernel_findings(runs) + peak_findings(runs) + honesty_findings(runs)
    if len({key_of(run.seed) for run in runs}) > 1 and not has_complete_seeds(runs):
        seed = Check("seed", "note", "other seed, other weights and order of data: not paired", lambda run: run.seed)
        findings += differing(seed, runs)
    findings += training_findings(runs)
    return sorted(findings, key=lambda finding: ("voids", "warns", "note").index(finding.severity))


def differing(check, runs):
    """[Finding] when the runs do not all have the same value, else []."""
    by_value = defaultdict(list)
    for run in runs:
        value = check.read(run)
        by_value["not recorded" if value is None else value_text(value)].append(run.name)
    return [Finding(check.what, check.severity, check.consequence, dict(by_value))] if len(by_value) > 1 else []


def value_text(value):
    """A setting's value as a person would type it; whole numbers with thousands separated."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)


def setting_text(settings, name):
    """A setting's text; options of parts are only written down where they were set."""
    return value_text(settings[name]) if name in settings else "default"


def stream_findings(runs):
    """Runs of one seed, one batch shape and as many tokens must have drawn the same tokens in the same order.

    The hash runs along with training, so runs of different lengths end on different hashes: those say nothing here.
    """
    alike = defaultdict(list)
    for run in runs:
        if run.values.get("stream_hash") is not None:
            shape = run.get("resolved", "tokens_per_step"), run.get("model_config", "block_size")
            place = run.comparability_key, run.seed, run.values.get("tokens_processed"), *shape
            alike[key_of(list(place))].append(run)
    return [found for same in alike.values() for found in differing(stream_check(same[0].seed), same)]


def stream_check(seed):
    consequence = "not the same tokens in the same order: these runs are not paired"
    return Check(f"stream of seed {seed}", "warns", consequence, lambda run: short(run.values["stream_hash"]))


def kernel_findings(runs):
    """Kernels are compared part by part: a Mamba run has no attention kernel to differ in."""
    found = []
    for part in {part: None for run in runs for part in run.kernels}:
        using = [run for run in runs if part in run.kernels]
        check = Check(f"{part} kernel", "warns", SPEED, lambda run, part=part: run.kernels[part])
        found += differing(check, using)
    return found


def peak_findings(runs):
    """MFU is a share of a peak. Where that is measured at start, one machine's peak moves with its other work."""
    peaks = {run: number(run.get("resolved", "peak_flops_per_second")) for run in runs}
    known = [peak for peak in peaks.values() if peak]
    if not known or max(known) <= 1.1 * min(known):
        return []
    text = {run: None if peak is None else f"{peak / 1e9:,.0f} GFLOP/s" for run, peak in peaks.items()}
    return differing(Check("peak", "note", "MFU is a share of different peaks", text.get), runs)


def honesty_findings(runs):
    """What a reader must know even when all runs share it: runs cut short, code that no commit holds."""
    found = []
    cut_short = [run for run in runs if not run.is_finished]
    if cut_short:
        by_status = defaultdict(list)
        for run in cut_short:
            by_status[run.status].append(run.name)
        found.append(Finding("status", "warns", "not ranked: the loss is not that of a whole run", dict(by_status)))
    dirty = [run.name for run in runs if run.get("git", "dirty") is True]
    if dirty:
        consequence = "the commit does not tell the code that ran"
        found.append(Finding("git", "note", consequence, {"uncommitted changes": dirty}))
    for check in CHECKS:
        silent = [run.name for run in runs if check.severity == "voids" and check.read(run) in (None, "?")]
        if silent and len(silent) == len(runs):
            found.append(Finding(check.what, "warns", "cannot be checked", {"not recorded": silent}))
    return found


def has_complete_seeds(runs):
    """True when every configuration was run with the same seeds, so that seeds do not tell two of them apart."""
    seeds = defaultdict(set)
    for run in runs:
        seeds[run.configuration_key].add(key_of(run.seed))
    return len({frozenset(each) for each in seeds.values()}) == 1


def training_findings(runs):
    """Settings of training, beside the audited ones, in which the runs differ."""
    found = []
    for name in differing_fields([run.training for run in runs]):
        if name in RESOLVED_TRAINING:
            continue
        consequence = "the difference is not the architecture's alone"
        check = Check(name, "note", consequence, lambda run, name=name: setting_text(run.training, name))
        found += differing(check, runs)
    return found


def differing_fields(tables):
    """Names whose values are not the same in all of the dicts, in the order in which they appear."""
    names = {name: None for table in tables for name in table}
    return [name for name in names if len({key_of(table.get(name)) for table in tables}) > 1]
