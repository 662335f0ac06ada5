"""Do the token counts of checkpoints add up, within a metadata.json and across runs? Standard library only.

    problems = problems_of_run(read_run('runs/a')) + problems_between([read_run('runs/a'), read_run('runs/b')])

Each problem is a sentence that names the file and both numbers; an empty list is a clean bill.
"""

import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from user_errors import UserError

TOP = ("format", "experiment_name", "global_step", "epoch", "token_metrics", "training_config", "model_config",
       "checksums")  # fmt: skip
TOKENS = ("total_tokens_processed", "total_tokens_supervised", "tokens_per_step", "effective_batch_size",
          "sequence_length", "estimated_tokens_at_step")  # fmt: skip


@dataclass(frozen=True)
class RunCheckpoints:
    """What a run's folder says of its checkpoints."""

    folder: Path
    schedule: list  # the token counts that config.json has; empty where the run had no schedule
    checkpoints: dict  # {step: metadata.json, or None where it cannot be read}
    tokens_at: dict  # {step: tokens processed, as metrics.jsonl logged them}


def read_run(folder):
    """RunCheckpoints of a run folder.

    Raises:
        UserError: no run there.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    if config is None:
        raise UserError(f"there is no run at {folder}: its config.json is missing or cannot be read")
    resolved = config.get("resolved")
    schedule = resolved.get("checkpoint_schedule") if isinstance(resolved, dict) else None
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*")
             if re.fullmatch(r"checkpoint-\d+", path.name)}  # fmt: skip
    checkpoints = {step: _json(found[step] / "metadata.json") for step in sorted(found)}
    return RunCheckpoints(folder, schedule or [], checkpoints, _tokens_logged(folder / "metrics.jsonl"))


def _json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tokens_logged(path):
    """{step: tokens}; a line that was cut short by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [row for row in map(_row, lines) if isinstance(row, dict)]
    return {row["step"]: row["tokens_processed"] for row in rows if {"step", "tokens_processed"} <= {*row}}


def _row(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


# ---- one file --------------------------------------------------------------------------------------------------------


def problems_of_metadata(metadata, step=None):
    """Sentences, without the file's name, on one metadata.json. `step`: the one in the folder's name."""
    tokens = metadata.get("token_metrics")
    tokens = tokens if isinstance(tokens, dict) else {}
    missing = [name for name in TOP if name not in metadata]
    missing += [f"token_metrics.{name}" for name in TOKENS if name not in tokens and "token_metrics" not in missing]
    if missing:
        return [f"has no {', '.join(missing)}"]
    numbers = {"global_step": metadata["global_step"], **{name: tokens[name] for name in TOKENS}}
    wrong = [f"{name}={value!r} is no count" for name, value in numbers.items() if type(value) is not int or value < 0]
    return wrong or _arithmetic(metadata, tokens, step)


def _arithmetic(metadata, tokens, step):
    at, per_step, processed = metadata["global_step"], tokens["tokens_per_step"], tokens["total_tokens_processed"]
    batch, length = tokens["effective_batch_size"], tokens["sequence_length"]
    supervised, due = tokens["total_tokens_supervised"], tokens["estimated_tokens_at_step"]
    checks = [
        (step in (None, at), f"global_step={at} is not the {step} of its folder"),
        (processed == at * per_step,
         f"total_tokens_processed={processed} is not global_step={at} x tokens_per_step={per_step}"),
        (per_step == batch * length,
         f"tokens_per_step={per_step} is not effective_batch_size={batch} x sequence_length={length}"),
        (supervised <= processed, f"total_tokens_supervised={supervised} exceeds total_tokens_processed={processed}"),
        (processed - per_step < due <= processed or due == processed == 0,
         f"estimated_tokens_at_step={due} is not first reached at global_step={at}, which has {processed} tokens"),
        _agrees("effective_batch_size", batch, "training_config", _batch(metadata["training_config"])),
        _agrees("sequence_length", length, "model_config", _get(metadata["model_config"], "block_size")),
    ]  # fmt: skip
    return [sentence for holds, sentence in checks if not holds]


def _agrees(name, value, where, other):
    return value == other, f"{name}={value} is {other} by {where}"


def _get(values, name):
    return values.get(name) if isinstance(values, dict) else None


def _batch(config):
    factors = _get(config, "batch_size"), _get(config, "gradient_accumulation_steps")
    return factors[0] * factors[1] if all(type(factor) is int for factor in factors) else None


# ---- one run, several runs -------------------------------------------------------------------------------------------


def problems_of_run(run):
    """Sentences on one run: each metadata.json, its agreement with metrics.jsonl, and a schedule that was not kept."""
    problems = []
    for step, metadata in run.checkpoints.items():
        where = run.folder / f"checkpoint-{step}" / "metadata.json"
        found = ["cannot be read"] if metadata is None else problems_of_metadata(metadata, step)
        problems += [f"{where}: {sentence}" for sentence in found]
        if not found:
            processed, logged = metadata["token_metrics"]["total_tokens_processed"], run.tokens_at.get(step)
            if logged not in (None, processed):
                problems.append(f"{where}: total_tokens_processed={processed} and metrics.jsonl logged {logged}")
    if problems:
        return problems
    supervised = [metadata["token_metrics"]["total_tokens_supervised"] for metadata in run.checkpoints.values()]
    if supervised != sorted(supervised):
        problems.append(f"{run.folder}: total_tokens_supervised goes down from one checkpoint to a later one")
    return problems + [f"{run.folder}: no checkpoint was saved at {count} tokens, which its schedule has"
                       for count in _missed(run)]  # fmt: skip


def _missed(run):
    """Scheduled counts up to the last checkpoint that no step was saved for."""
    ends = {step: metadata["token_metrics"] for step, metadata in run.checkpoints.items()}
    last = max((tokens["total_tokens_processed"] for tokens in ends.values()), default=0)
    first_steps = {count: -(-count // tokens["tokens_per_step"]) for tokens in [*ends.values()][-1:]
                   for count in run.schedule if count <= last}  # fmt: skip
    return [count for count, step in first_steps.items() if step not in ends]


def problems_between(runs):
    """Sentences on runs that do not line up: other schedules, other ends, or other counts at the same tokens.

    Runs of unequal batch agree when their scheduled counts do; their true counts differ by less than a step.
    """
    return [problem for a, b in combinations(runs, 2) for problem in _problems_of_pair(a, b)]


def _problems_of_pair(a, b):
    pair = f"{a.folder} and {b.folder}"
    if any(metadata is None or problems_of_metadata(metadata, step)
           for run in (a, b) for step, metadata in run.checkpoints.items()):  # fmt: skip
        return []  # said already, of the file
    problems, last = [], {}
    for run in (a, b):
        if not run.checkpoints:
            return [f"{pair}: {run.folder} has no checkpoint"]
        last[run.folder] = [*run.checkpoints.values()][-1]["token_metrics"]
    ends = [tokens["estimated_tokens_at_step"] for tokens in last.values()]
    if ends[0] != ends[1]:
        problems.append(f"{pair} end at {ends[0]} and {ends[1]} tokens")
    odd = sorted(count for count in {*a.schedule} ^ {*b.schedule} if count <= min(ends))
    if odd:
        problems.append(f"{pair} have different schedules: {odd[0]} tokens is in one alone")
    return problems + _other_supervised(a, b, pair)


def _other_supervised(a, b, pair):
    """The same objective on the same tokens supervises the same number of them; padding depends on the block."""
    problems, seen = [], {}
    for run in (a, b):
        for metadata in run.checkpoints.values():
            tokens, training = metadata["token_metrics"], metadata["training_config"]
            same = [training.get(name) for name in ("objective", "dataset", "variant", "input", "seed")]
            key = tokens["total_tokens_processed"], tokens["sequence_length"], *same
            before = seen.setdefault(key, tokens["total_tokens_supervised"])
            if before != tokens["total_tokens_supervised"]:
                problems.append(
                    f"{pair} supervised {before} and {tokens['total_tokens_supervised']} of the same {key[0]} tokens"
                )
    return problems[:1]
