"""Run a whole comparison: variants x sizes x seeds, each at its best learning rate, on the same tokens.

    python sweep.py config/sweep_tiny_tier.py --plan_only=True             # what it would do, and how long it takes
    python sweep.py config/sweep_tiny_tier.py --seeds=3 --max_tokens=2_000_000
    python sweep.py config/sweep_dense_mamba_moe_hybrid.py --executor=slurm --processes_per_node=8

Stopped, it goes on where it was when the same command is given again; finished runs stay as they are. A run that fails
is tried once more, reported, and stops nothing else. It leaves runs/<sweep_name>/ behind: a run folder for each run,
tuning/ with the trials of learning rates, logs/, and sweep.json with the plan and what was found. Then

    python compare_architectures.py --runs_dir runs/<sweep_name>
"""

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import configurator
import model_matching as matching
import sweep_plan as planning
from sweep_executors import make_executor
from training_checkpoint import list_checkpoints, write_json
from training_data import load_dataset
from training_logger import read_metrics
from training_report import human_count, human_seconds
from user_errors import UserError, exit_on_user_error

# A run of a few steps that leaves nothing behind worth having.
QUICK = (
    "--max_tokens=None", "--epochs=None", "--lr_decay_iters=None", "--log_interval=1", "--eval_iters=1",
    "--checkpoint_interval=0", "--eval_interval=1_000_000_000", "--sample_tokens=0", "--plot=False",
    "--tensorboard=False", "--wandb_log=False",
)  # fmt: skip
POLL_SECONDS, STATUS_SECONDS = 0.3, 3.0


@contextlib.contextmanager
def terminated_as_interrupted():
    """Within it SIGTERM is a Ctrl-C, which stops the runs that are under way: they would go on without the sweep."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@exit_on_user_error
@terminated_as_interrupted()
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return print(configurator.help_text(__doc__, planning.SweepConfig))
    sweep = planning.read_sweep(arguments)
    config = sweep.config
    folder = Path(sweep.overrides.get("runs_dir", "runs")) / config.sweep_name
    datasets = {cell: dataset_of(sweep, *cell) for cell in planning.cells(sweep)}
    executor = make_executor(config, folder)

    # ---- the plan, before anything is trained ------------------------------------------------------------------------
    first = {cell: planning.plan_run(sweep, datasets[cell], *cell, sweep.seeds[0]) for cell in datasets}
    costs = {cell: planning.cost_of(run.settings) for cell, run in first.items()}
    speeds = time_variants(sweep, first, config.timing_steps) if config.timing_steps else {}
    print(plan_text(sweep, first, costs, speeds, executor.capacity), flush=True)
    if config.plan_only:
        return None
    for part in ("logs", "tuning"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    record = {"sweep": asdict(config), "shared": sweep.shared, "overrides": sweep.overrides,
              "sources": dict(sweep.sources), "command": ["python", "sweep.py", *arguments]}  # fmt: skip

    # ---- learning rates: the same trials for every architecture ------------------------------------------------------
    runner, tuned = Runner(executor, folder), {}
    if sweep.tunes:
        trials = {cell: [(trial, planning.plan_run(sweep, datasets[cell], *cell, sweep.seeds[0], trial,
                                                   config.tuning_fraction)) for trial in planning.trials(sweep)]
                  for cell in datasets}  # fmt: skip
        runner.run([run for runs in trials.values() for _, run in runs], folder / "tuning", "trials")
        for cell, runs in trials.items():
            results = [(trial, final_loss(folder / "tuning" / run.name)) for trial, run in runs]
            tuned[cell] = planning.best_of(results, sum(run.tokens for _, run in runs))
            print(tuned_text(cell, tuned[cell]), flush=True)

    # ---- the runs: all variants of a seed before the next, so that an interrupted sweep has whole seeds --------------
    runs = []
    for seed in sweep.seeds:
        for cell, dataset in datasets.items():
            found = tuned.get(cell)
            if found is not None and found.loss is None:
                continue  # no learning rate worked, which was said above
            budget = {"tuning_runs": found.n_trials, "tuning_tokens": found.tokens} if found else {}
            settings = found.settings if found else {}
            runs.append(planning.plan_run(sweep, dataset, *cell, seed, settings, extra=budget))
    record["tuned"] = {"/".join(filter(None, cell)): asdict(found) for cell, found in tuned.items()}
    record["runs"] = [{"name": run.name, "arguments": run.arguments, "tokens": run.tokens} for run in runs]
    write_json(folder / "sweep.json", record)
    failed = runner.run(runs, folder, "runs")
    n_planned = len(datasets) * len(sweep.seeds)
    print(f"\n{len(runs) - len(failed)} of {n_planned} runs finished in {folder}; compare them with\n"
          f"python compare_architectures.py --runs_dir {folder.as_posix()}")  # fmt: skip
    left_out = [label_of(cell) for cell, found in tuned.items() if found.loss is None]
    wrong = [f"no trial of {', '.join(left_out)} worked"] if left_out else []
    wrong += [f"{len(failed)} run(s) failed twice: {', '.join(failed)}"] if failed else []
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; read {folder / 'logs'}, then run again")


# ---- the plan --------------------------------------------------------------------------------------------------------


def dataset_of(sweep, variant, size):
    """The dataset of a variant, prepared if it has to be."""
    settings = configurator.read_settings(planning.run_arguments(sweep, variant, size))
    return load_dataset(settings.train, may_prepare=True, quiet=False)


def time_variants(sweep, runs, steps):
    """{cell: tokens per second} from a few steps of each, in a folder that is thrown away."""
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="nanoarch-timing-") as scratch:
        for number, (cell, run) in enumerate(runs.items()):
            show_status(f"timing {number + 1}/{len(runs)}: {label_of(cell)}")
            executor = make_executor(sweep.config, scratch)
            if sweep.config.executor == "slurm":
                break  # the cluster's machines are not this one
            quick = [*QUICK, f"--max_iters={steps + 1}", f"--runs_dir={scratch}", f"--run_name={run.name}"]
            log = Path(scratch) / f"{run.name}.log"
            job = executor.start(run.name, [*run.arguments, *quick], log)
            while job.ended() is None:
                time.sleep(0.1)
            if not job.ended():
                raise UserError(f"variant '{run.variant}' cannot be trained: {last_line(log)}")
            speeds[cell] = read_summary(Path(scratch) / run.name).get("tokens_per_second")
    show_status("")
    return speeds


def plan_text(sweep, first, costs, speeds, at_once):
    """The plan on one screen: what each variant costs, what differs between them, time, and what can be detected."""
    n_seeds, n_trials = len(sweep.seeds), len(planning.trials(sweep)) if sweep.tunes else 0
    lengths = n_seeds + n_trials * sweep.config.tuning_fraction  # of one cell, in whole runs
    width = max(len(label_of(cell)) for cell in first) + 2
    trials = f", {len(first)} x {n_trials} trials of learning rates before" if n_trials else ""
    columns = zip(
        ("parameters", "active", "FLOPs/token", "tokens", "FLOPs", "a run"), (12, 12, 13, 9, 9, 9), strict=True
    )
    lines = [f"sweep '{sweep.config.sweep_name}': {len(first)} x {n_seeds} seeds{trials}", "",
             " " * width + "".join(f"{name:>{n}}" for name, n in columns) + "  model"]  # fmt: skip
    seconds, flops = 0.0, 0.0
    for cell, run in first.items():
        cost, speed = costs[cell], speeds.get(cell)
        duration = run.tokens / speed if speed else None
        seconds += (duration or 0) * lengths
        flops += cost.flops_per_token * run.tokens * lengths
        lines.append(
            f"{label_of(cell):<{width}}{cost.parameters:>12,}{cost.active_parameters:>12,}"
            f"{human_count(cost.flops_per_token):>13}{human_count(run.tokens):>9}"
            f"{human_count(cost.flops_per_token * run.tokens):>9}{human_seconds(duration) if duration else '-':>9}  "
            f"{run.settings.model.architecture_name()}"
        )
    duration = f", about {human_seconds(seconds / at_once)} of training" if seconds else ""
    lines += ["", f"in all {human_count(flops)}FLOP{duration}, {at_once if at_once < 1000 else 'all'} at once"]
    lines += how_equal(first, costs) + differences(first)
    least = planning.detectable_difference(n_seeds, sweep.config.seed_spread)
    if least is None:
        lines.append("one seed: no difference between variants can be claimed; take --seeds=3 or more")
    else:
        lines.append(f"{n_seeds} seeds show a difference of {least:.3f} nats in 4 of 5 sweeps, if losses spread by "
                     f"{sweep.config.seed_spread:g} over seeds (--seed_spread)")  # fmt: skip
    return "\n".join(lines)


def label_of(cell):
    return "-".join(filter(None, cell))


EQUAL_COSTS = (
    ("parameters", "parameters"), ("active parameters", "active_parameters"), ("FLOPs per token", "flops_per_token"),
)  # fmt: skip


def how_equal(first, costs):
    """Sentences on how far apart the variants of a size are, and on shapes that `match` could not bring within 1%."""
    lines = []
    for size in dict.fromkeys(size for _, size in first):
        cells = [cell for cell in first if cell[1] == size]
        parts = []
        for what, name in EQUAL_COSTS:
            values = [getattr(costs[cell], name) for cell in cells]
            if name == "active_parameters" and values == [costs[cell].parameters for cell in cells]:
                continue
            excess = max(values) / min(values) - 1
            word = "matched" if excess <= matching.TOLERANCE else "not matched"
            parts.append(f"{what} {word} ({100 * excess:.1f}% apart)")
        if len(cells) > 1:
            lines.append(f"{f'{size}: ' if size else ''}{', '.join(parts)}")
        for cell in cells:
            train, model = first[cell].settings.train, first[cell].settings.model
            record = matching.record(model, train.match, train.match_to) if train.match else {"is_matched": True}
            if not record["is_matched"]:
                lines.append(f"{label_of(cell)}: {matching.sentence(record)}")
    return lines


def differences(first):
    """Sentences on what the variants do not share and a comparison at equal tokens wants equal."""
    facts = {
        "tokens": lambda run: run.tokens,
        "sequences per step": lambda run: run.settings.train.sequences_per_step,
        "block_size": lambda run: run.settings.model.block_size,
        "dataset": lambda run: run.settings.train.dataset,
    }
    lines = []
    for size in dict.fromkeys(size for _, size in first):
        for what, fact in facts.items():
            values = {variant: fact(run) for (variant, size_), run in first.items() if size_ == size}
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{variant} {value}" for variant, value in values.items())
                lines.append(f"not equal: {what}{f' at {size}' if size else ''}: {shown}")
    return lines


def tuned_text(cell, found):
    chosen = ", ".join(f"{name} {value:g}" for name, value in found.settings.items())
    best = f"{chosen}, trial loss {found.loss:.4f}" if found.loss is not None else "left out"
    return f"{label_of(cell)}: {best}" + (f"; {found.note}" if found.note else "")


# ---- running ---------------------------------------------------------------------------------------------------------


class Runner:
    """Runs of a list, several at once, each at most twice; what is finished is left alone."""

    def __init__(self, executor, folder):
        self.executor, self.folder = executor, folder

    def run(self, runs, runs_dir, what):
        """Run all; returns the names of those that failed twice. Ctrl-C asks each to save, and waits for it."""
        waiting = [run for run in runs if not is_finished(runs_dir / run.name, run)]
        if len(waiting) < len(runs):
            print(f"{len(runs) - len(waiting)} of {len(runs)} {what} were finished before")
        running, attempts, failed, t0, shown = [], Counter(), [], time.perf_counter(), 0.0
        n_waiting, n_tokens, read = len(waiting), sum(run.tokens for run in waiting), 0
        try:
            while waiting or running:
                while waiting and len(running) < self.executor.capacity:
                    run = waiting.pop(0)
                    attempts[run.name] += 1
                    running.append((run, self.start(run, runs_dir)))
                time.sleep(POLL_SECONDS)
                for run, job in list(running):
                    ended = job.ended()
                    if ended is None:
                        continue
                    running.remove((run, job))
                    if ended and is_finished(runs_dir / run.name, run):
                        read += run.tokens
                        left = (time.perf_counter() - t0) * (n_tokens - read) / read
                        n_left = len(waiting) + len(running)
                        loss = final_loss(runs_dir / run.name)
                        val = f"val {loss:.4f}" if loss is not None else "no loss"
                        print_line(f"[{n_waiting - n_left}/{n_waiting}] {run.name}  {val}  ETA {human_seconds(left)}")
                    elif attempts[run.name] < 2:
                        print_line(f"{run.name} failed, trying once more: {last_line(self.log_path(run))}")
                        waiting.insert(0, run)
                    else:
                        failed.append(run.name)
                        print_line(f"{run.name} failed twice, going on without it: {last_line(self.log_path(run))}")
                if sys.stdout.isatty() and time.perf_counter() - shown > STATUS_SECONDS:
                    show_status(status_of(running, runs_dir))
                    shown = time.perf_counter()
        finally:
            for _, job in running:
                job.stop()
            for _, job in running:
                job.wait()
            show_status("")
        return failed

    def log_path(self, run):
        return self.folder / "logs" / f"{run.name}.log"

    def start(self, run, runs_dir):
        """Start a run, or take it up where it stopped."""
        folder, where = runs_dir / run.name, [f"--runs_dir={runs_dir}", f"--run_name={run.name}"]
        if folder.exists() and not list_checkpoints(folder):
            folder.rename(free_name(folder))  # stopped before it had saved anything
        if folder.exists():
            return self.executor.start(run.name, [*where, "--init_from=resume"], self.log_path(run))
        return self.executor.start(run.name, [*run.arguments, *where], self.log_path(run))


def free_name(folder):
    """folder.stopped-1, or the first such name that is free."""
    return next(path for n in range(1, 10_000) if not (path := folder.with_name(f"{folder.name}.stopped-{n}")).exists())


def is_finished(folder, run):
    """Whether a run folder holds this run, finished.

    Raises:
        UserError: a folder of the name that holds another run.
    """
    if not (folder / "config.json").exists():
        return False
    made = configurator.load_run(folder)
    for ours, theirs in ((run.settings.model, made.model), (run.settings.train, made.train)):
        ours, theirs = ours.to_dict(), theirs.to_dict()
        for name in ours.keys() - {"run_name", "runs_dir", "init_from", "device", "threads"}:
            if ours[name] != theirs[name]:
                raise UserError(
                    f"{folder} was made with {name}={theirs[name]!r} and this sweep says {ours[name]!r}; give the "
                    "sweep another --sweep_name, or take the run away"
                )
    return read_summary(folder).get("status") == "finished"


def final_loss(folder):
    """final_val_loss of a run, or None."""
    return read_summary(folder).get("final_val_loss")


def read_summary(folder):
    """summary.json of a run; empty where there is none yet, or half of one."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_line(path):
    """What a run said last."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"nothing in {path}"


def status_of(running, runs_dir):
    """'llama-s1337 20% | ...' from the logs of what runs now."""
    words = []
    for run, _ in running:
        path = runs_dir / run.name / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        words.append(f"{run.name} {rows[-1]['tokens_processed'] / run.tokens:.0%}" if rows else f"{run.name} starting")
    return " | ".join(words)


def show_status(text):
    """A line that is written over, on a terminal only."""
    if sys.stdout.isatty():
        print(f"\r\x1b[2K{text[:150]}", end="", flush=True)


def print_line(text):
    show_status("")
    print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
