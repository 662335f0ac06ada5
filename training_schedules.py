"""The checkpoint schedule that a command would follow, and the same one written into several config files.

Two runs can be compared at 5M tokens when both stopped to save there. A schedule in tokens makes that so whatever the
batch: each count is reached by the first step at or beyond it.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import eval_probes  # noqa: F401  (fills its registry, so that probes' options are settings)
from configurator import Settings, read_settings
from training_checkpoint import scheduled_steps, token_schedule, write_atomically
from training_data import BatchStream, load_dataset
from user_errors import UserError

# What a schedule is made from; once it is written out these have nothing left to say.
GENERATOR = ("first_epoch_checkpoints", "subsequent_epochs_spacing", "min_checkpoints_per_epoch")
SETTINGS = ("checkpoint_tokens", *GENERATOR)


@dataclass(frozen=True)
class Plan:
    """When a run would save."""

    settings: Settings
    tokens_per_step: int
    tokens_per_epoch: int
    total_tokens: int
    total_steps: int
    counts: list  # of tokens, ascending, the end included; empty where the settings have no schedule

    @property
    def steps(self):
        """{step: the token count that it is the first to reach}."""
        return scheduled_steps(self.counts, self.tokens_per_step, self.total_steps)


def plan(arguments):
    """Plan of `python train.py ARGUMENTS`; the dataset is prepared where it is not.

    Raises:
        UserError: as train.py would.
    """
    settings = read_settings(arguments)
    config, block_size = settings.train, settings.model.block_size
    stream = BatchStream(load_dataset(config, quiet=True), block_size, config.sequences_per_step, config.seed)
    total_tokens = config.total_tokens(stream.tokens_per_step, stream.tokens_per_epoch)
    total_steps = config.total_steps(stream.tokens_per_step, stream.steps_per_epoch)
    counts = token_schedule(config, stream.tokens_per_epoch, total_tokens)
    return Plan(settings, stream.tokens_per_step, stream.tokens_per_epoch, total_tokens, total_steps, counts)


def common_counts(plans):
    """The one schedule that {config file: Plan} agree on; those without one of their own take that of the others.

    Raises:
        UserError: no schedule, two different ones, or runs of different length.
    """
    (first, plan_a), *others = plans.items()
    for path, plan_b in others:
        if plan_a.total_tokens != plan_b.total_tokens:
            raise UserError(
                f"{first} runs for {plan_a.total_tokens:,} tokens, {path} for {plan_b.total_tokens:,}, so their ends "
                "cannot line up; set the same max_tokens in both"
            )
    scheduled = {path: plan for path, plan in plans.items() if plan.counts}
    if not scheduled:
        raise UserError(
            "none of the configs has a schedule: set checkpoint_tokens or first_epoch_checkpoints in one, or give "
            "--first_epoch_checkpoints=20"
        )
    (first, plan_a), *others = scheduled.items()
    for path, plan_b in others:
        if plan_a.counts != plan_b.counts:
            odd = sorted({*plan_a.counts} ^ {*plan_b.counts})[0]
            raise UserError(
                f"{first} and {path} have different schedules: {odd:,} tokens is in one alone; drop the schedule of "
                "one, or give both --checkpoint_tokens=1M,5M,..."
            )
    return plan_a.counts


def synchronise(paths, arguments=()):
    """Write one schedule into several config files; returns (counts, [files that changed]).

    Everything else in the files stays, comments and line endings included; settings that made a schedule become
    comments. Either all files are written or none is changed.

    Args:
        arguments: settings laid over every file, as on the command line.

    Raises:
        UserError: a contradiction (`common_counts`), or a file in which the schedule cannot be replaced safely.
    """
    before = {path: plan([str(path), *arguments]) for path in paths}
    counts = common_counts(before)
    old = {path: Path(path).read_bytes() for path in paths}
    new = {path: with_counts(data, counts, path) for path, data in old.items()}
    changed = [path for path in paths if new[path] != old[path]]
    try:
        for path in changed:
            write_atomically(Path(path).resolve(), new[path])
        for path in changed:
            _require_only_schedule_changed(path, before[path], arguments, counts)
    except BaseException:
        for path in changed:
            write_atomically(Path(path).resolve(), old[path])
        raise
    return counts, changed


def _require_only_schedule_changed(path, before, arguments, counts):
    """Read a written file again, without the schedule of the command line, and hold it to what it said before."""
    arguments = [text for text in arguments if text[2:].partition("=")[0].replace("-", "_") not in SETTINGS]
    after = plan([str(path), *arguments])
    same = {name: getattr(before.settings.train, name) for name in SETTINGS}
    if after.counts != counts or after.settings.train.replace(**same) != before.settings.train:
        raise UserError(f"{path} would not mean the same with the schedule in it; write checkpoint_tokens by hand")
    if after.settings.model != before.settings.model:
        raise UserError(f"{path} would be another model with the schedule in it; write checkpoint_tokens by hand")


def with_counts(data, counts, path="the file"):
    """A config file's bytes with `checkpoint_tokens = (...)` in them, and settings that make a schedule commented out.

    Raises:
        UserError: a schedule that is set inside a block, or beside another statement on its line.
    """
    tree, newline = ast.parse(data), b"\r\n" if b"\r\n" in data else b"\n"
    statements = {name: [] for name in SETTINGS}
    for statement in tree.body:
        for name in _names_set(statement) & {*SETTINGS}:
            statements[name].append(_require_plain(statement, tree, name, path))
    lines = data.splitlines(keepends=True)
    for name in GENERATOR:
        for statement in statements[name]:
            for number in range(statement.lineno - 1, statement.end_lineno):
                lines[number] = b"# " + lines[number]
    text = _tuple_of(counts).replace("\n", newline.decode()).encode()
    for statement in reversed(statements["checkpoint_tokens"]):
        value = statement.value
        first, last = lines[value.lineno - 1][: value.col_offset], lines[value.end_lineno - 1][value.end_col_offset :]
        lines[value.lineno - 1 : value.end_lineno] = [first + text + last]
    if not statements["checkpoint_tokens"]:
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            lines[-1] += newline
        lines += [newline, b"checkpoint_tokens = " + text + newline]
    return b"".join(lines)


def _names_set(statement):
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _require_plain(statement, tree, name, path):
    """`statement`, if it is `name = value` on lines of its own."""
    lines = range(statement.lineno, statement.end_lineno + 1)
    alone = not any(other is not statement and {other.lineno, other.end_lineno} & {*lines} for other in tree.body)
    plain = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    if not (plain and isinstance(statement.targets[0], ast.Name) and alone):
        raise UserError(
            f"{path}, line {statement.lineno}: {name} is not set by a plain `{name} = ...` on a line of its own; "
            "make it one, and try again"
        )
    return statement


def _tuple_of(counts):
    """A tuple of counts as Python source, eight to a line."""
    words = [f"{count:_}" for count in counts]
    rows = [", ".join(words[start : start + 8]) for start in range(0, len(words), 8)]
    return "(\n" + "".join(f"    {row},\n" for row in rows) + ")"
