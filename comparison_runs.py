"""Find runs and read them. Standard library only.

    runs, problems = find_runs('runs', ['llama*', 'gpt2'])    # or latest=4, or everything
    runs[0].evaluations                                       # the rows of its curve, read when first asked for

A run is a folder with config.json and with summary.json or metrics.jsonl. The table needs only the two small files;
metrics.jsonl is read for curves, and for runs that have no summary yet.
A file that cannot be read costs one line naming its run, and the other runs are still compared.
"""

import functools
import glob
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from comparison_logs import OF_ONE_OBJECTIVE, last_evals, prompt_score, read_metrics, summary_from_metrics
from comparison_settings import (
    BOOKKEEPING,
    MODEL_LABELS,
    NOT_COMPONENTS,
    RESOLVED,
    defined_parts,
    dig,
    flat_settings,
    number,
    short,
)
from user_errors import UserError, did_you_mean

RUN_FORMAT = 1  # of config.json and summary.json; older ones are read as far as they go


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
    problems += give_distinct_names(runs)
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
    """Runs of one name from two folders are told apart by as much of their path as it takes; a line for each name."""
    by_name, told = defaultdict(list), []
    for run in runs:
        by_name[run.name].append(run)
    for name, same in by_name.items():
        depth = 1
        while len(same) > 1 and depth < 8 and len({run.name for run in same}) < len(same):
            depth += 1
            for run in same:
                run.name = run.values["name"] = "/".join(run.folder.resolve().parts[-depth:])
        if len(same) > 1:
            told.append(f"{name}: {len(same)} runs have this name, told apart as {some([run.name for run in same], 4)}")
    return told
