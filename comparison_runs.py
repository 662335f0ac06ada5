"""Find runs and read them. Standard library only.

    runs, problems = find_runs('runs', ['llama*', 'gpt2'])    # or latest=4, or everything
    runs[0].evaluations                                       # the rows of its curve, read when first asked for

A run is a folder with config.json and with summary.json or metrics.jsonl. The table needs only the two small files;
metrics.jsonl is read for curves, and for runs that have no summary yet.
A file that cannot be read costs one line naming its run, and the other runs are still compared.
"""

import ast
import functools
import glob
import hashlib
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
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
    "pseudo_perplexity_always", "tuning_runs", "tuning_tokens", "use_fsdp", "use_zero1", "fsdp_reshard_after_forward",
    "fsdp_replicas", "fsdp_cpu_offload", "tensor_parallel", "expert_parallel", "collective_timeout",
    "gradient_checkpointing", "dry_run", "target_gpu", "target_n_gpu", "target_mfu", "auto_resume", "checkpoint_format",
}  # fmt: skip
# Settings that the audit compares as what they resolve to: 'auto' and 'cpu' may be the same device.
RESOLVED = {
    "dataset", "tokenizer", "tokenizer_vocab_size", "variant", "objective", "batch_size", "eval_iters",
    "gradient_accumulation_steps", "max_iters", "max_tokens", "epochs", "device", "dtype", "tf32", "compile",
}  # fmt: skip
# Scores of summary.json and of an evaluation's row that some objectives have.
OF_ONE_OBJECTIVE = (
    "pseudo_perplexity", "masked_accuracy", "answer_accuracy",
    "lm_loss", "wp_loss", "wp_acc", "wp_gap", "wp_ece", "wp_brier",
)  # fmt: skip
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
    summary: dict = field(default_factory=dict)  # summary.json as it is
    problems: list = field(default_factory=list)  # what was wrong with its files, a line each
    held_at: int | None = None  # the token count that `values` are of, when that is not the end
    prompts: tuple | None = None  # what its prompt score depends on: file, its sha256, decoding; and the step it is of

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
        """{field: value} of what makes the architecture, part options included, labels left out.

        A part that a config file defined counts as what its source says: one name with two sources is two parts.
        """
        fields = flat_settings(self.get("model_config"))
        kept = {name: fields[name] for name in fields if name not in MODEL_LABELS | NOT_COMPONENTS}
        return kept | self._sources_used_by(fields)

    @functools.cached_property
    def training(self):
        """{setting: value} of what decides the trained weights, beside the architecture and the seed."""
        settings = flat_settings(self.get("training_config"))
        kept = {name: value for name, value in settings.items() if name not in BOOKKEEPING | RESOLVED}
        audited = {name: read(self) for name, read in AUDITED_TRAINING.items()}
        return kept | self._sources_used_by(settings) | audited

    @functools.cached_property
    def part_sources(self):
        """{part: short hash of the code that defines it} for parts that came from a config file."""
        return defined_parts(self.folder / "config")

    def _sources_used_by(self, settings):
        chosen = " ".join(str(value) for value in settings.values())
        return {f"source of {part}": digest for part, digest in self.part_sources.items() if part in chosen}

    @functools.cached_property
    def evaluations(self):
        """The evaluation rows of metrics.jsonl in the order of steps; trouble with the file goes to `problems`."""
        rows, troubles = read_metrics(self.folder, kind="eval")
        n_missing = sum(number(row.get("val_loss")) is None for row in rows)
        if n_missing:
            troubles.append(
                f"metrics.jsonl: {n_missing} of {len(rows)} evaluations have no finite loss; left out of curves"
            )
        self.problems += troubles
        return rows

    @functools.cached_property
    def evals(self):
        """{kind: line} of evals.jsonl: of the latest checkpoint that has one, or of where the run is held."""
        return last_evals(self.folder, None if self.held_at is None else self.values["steps"])

    @functools.cached_property
    def log_disagreement(self):
        """How summary.json contradicts the last evaluation in metrics.jsonl, or None: one of them was edited or cut."""
        said = number(self.summary.get("final_val_loss"))
        logged = number(self.evaluations[-1].get("val_loss")) if self.evaluations else None
        if said is None or logged is None or math.isclose(said, logged, rel_tol=1e-6):
            return None
        return f"summary.json says {said:.6g} where metrics.jsonl ends on {logged:.6g}"

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


def precision(run):
    dtype = run.get("resolved", "dtype")
    return f"{dtype} (TF32)" if dtype == "float32" and run.get("resolved", "tf32") is True else dtype


def initial_weights(run):
    return run.get("initial_weights", "source", default="random")


# What decides the weights beside the settings; the audit has a check of each.
AUDITED_TRAINING = {
    "tokens per step": lambda run: run.get("resolved", "tokens_per_step"),
    "precision": precision,
    "initial weights": initial_weights,
}


def short(value, length=10):
    return None if value is None else str(value)[:length]


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


def differing_fields(tables):
    """Names whose values are not the same in all of the dicts, in the order in which they appear."""
    names = {name: None for table in tables for name in table}
    return [name for name in names if len({key_of(table.get(name)) for table in tables}) > 1]


def key_of(value):
    """A hashable stand-in for a value of config.json; equal values have equal keys, 1 and 1.0 included."""
    if isinstance(value, dict):
        return tuple(sorted((name, key_of(item)) for name, item in value.items()))
    if isinstance(value, list):
        return tuple(key_of(item) for item in value)
    if number(value) is not None:
        return repr(float(value))
    return repr(value)


# -- parts defined in config files


def defined_parts(folder):
    """{name: short hash} of the parts that config files in this folder register with a decorator or by assignment.

    The hash is over everything in the file but its plain settings, comments left out: a helper that a part calls is
    part of it. A file that cannot be parsed counts as its bytes.
    """
    parts = {}
    for path in sorted(folder.glob("*.py")):
        try:
            source = path.read_bytes()
        except OSError:
            continue
        if b"_REGISTRY" in source:
            parts |= parts_of(source)
    return parts


def parts_of(source):
    """{name: short hash} for one file's bytes."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        names, code = re.findall(r"_REGISTRY[(\[]\s*['\"](\w+)", source.decode("utf-8", "replace")), source
    else:
        names = [node.value for node in map(registered_name, ast.walk(tree)) if isinstance(node, ast.Constant)]
        code = "\n".join(ast.unparse(node) for node in tree.body if not is_plain_setting(node)).encode()
    return {str(name): hashlib.sha256(code).hexdigest()[:8] for name in names}


def registered_name(node):
    """The node of 'x' in X_REGISTRY('x') and X_REGISTRY['x'], else None."""
    if isinstance(node, ast.Call) and node.args and is_registry(node.func):
        return node.args[0]
    return node.slice if isinstance(node, ast.Subscript) and is_registry(node.value) else None


def is_registry(node):
    return isinstance(node, ast.Name) and node.id.endswith("_REGISTRY")


def is_plain_setting(node):
    """A docstring, or an assignment of a value written out, such as n_layer = 4."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    is_named = isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
    return is_named and not any(isinstance(part, (ast.Call, ast.Lambda)) for part in ast.walk(node.value))


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
        rows, problems_of_metrics = read_metrics(folder)
        problems += problems_of_metrics
        if not rows:
            raise UnreadableRunError("; ".join([*problems, "it has logged nothing yet"]))
        summary = summary_from_metrics(rows)
    status = str(summary.get("status") or "finished")
    run = Run(folder.name, folder, config, "unfinished" if status == "running" else status, summary=summary)
    run.values = table_values(run, summary)
    if run.is_finished and run.values.get(run.ranked_by) is None:
        count = run.values["non_finite_steps"]
        steps = f" ({count} non-finite steps)" if count else ""
        what = {"final_val_loss": "final validation loss"}.get(run.ranked_by, run.ranked_by)
        problems.append(f"its {what} is not a finite number{steps}; it is not ranked")
    run.prompts, score = prompt_score(folder)
    run.values["prompt_score"] = score
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
        "state_bytes": number(run.get("state", "bytes_per_sequence")),
        "stream_hash": short(summary.get("stream_hash"), None),
    }
    for name in (
        "tokens_processed", "final_val_loss", "best_val_loss", "bits_per_byte", "tokens_per_second", "mfu",
        "peak_memory_bytes", "non_finite_steps", "train_seconds", "eval_seconds", "total_flops", "steps",
        *OF_ONE_OBJECTIVE,
    ):  # fmt: skip
        values[name] = number(summary.get(name))
    return values


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
