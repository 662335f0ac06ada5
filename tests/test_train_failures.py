"""Steps that are not finite, crashes, full disks and signals: what is lost, what is said, and how the run goes on."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import math
import signal
import threading

import pytest
import torch

import train
from training_data import BatchStream
from training_helpers import (
    assert_same,
    assert_same_run,
    book,
    read_json,
    rows,
    steps_of_checkpoints,
    summary,
    training_state,
    weights,
    workshop,
)
from training_objectives import OBJECTIVE_REGISTRY, CausalLM

# ---- steps that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def sabotage(monkeypatch):
    """An objective that turns chosen training steps (counted from 0) into nan; `kind` says where."""

    class Sabotaged(CausalLM):
        bad_steps, kind, micro_batches = (), "loss", 1

        def __init__(self, model, config):
            super().__init__(model, config)
            self.calls = 0

        def forward(self, batch):
            sums = super().forward(batch)
            if self.training:
                step, self.calls = self.calls // self.micro_batches, self.calls + 1
                if step in self.bad_steps:
                    sums = self.spoil(sums)
            return sums

        def spoil(self, sums):
            if self.kind == "loss":
                return {**sums, "loss": sums["loss"] * math.nan, "nats": sums["nats"] * math.nan}
            return {**sums, "loss": sums["loss"] + (self.model.head.weight * 0).sum().sqrt()}  # 0, of gradient nan

    monkeypatch.setitem(OBJECTIVE_REGISTRY, "sabotaged", Sabotaged)
    return Sabotaged


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(workshop, sabotage, kind):
    sabotage.bad_steps, sabotage.kind, sabotage.micro_batches = (3, 5), kind, 2
    folder = workshop.run(
        "--objective=sabotaged", "--checkpoint_interval=1", "--keep_checkpoints=0", "--gradient_accumulation_steps=2",
        "--max_non_finite_steps=2", "--tensorboard=True",
    )  # fmt: skip
    for before, after, skipped in ((2, 3, False), (3, 4, True), (4, 5, False), (5, 6, True), (6, 7, False)):
        same = torch.equal(
            weights(folder, before)["token_embedding.weight"], weights(folder, after)["token_embedding.weight"]
        )
        assert same == skipped
    assert_same(training_state(folder, 3)["optimizers"], training_state(folder, 4)["optimizers"])
    assert [row["non_finite_steps"] for row in rows(folder, "train")] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert rows(folder, "train")[3]["grad_norm"] is None
    assert (rows(folder, "train")[3]["loss"] is None) == (kind == "loss")
    assert summary(folder)["status"] == "finished" and summary(folder)["non_finite_steps"] == 2
    assert "NaN" not in (folder / "metrics.jsonl").read_text() + (folder / "training_log.json").read_text()


def test_too_many_in_a_row_stop_the_run_with_a_sentence(workshop, sabotage):
    sabotage.bad_steps = range(3, 99)
    arguments = ("--objective=sabotaged", "--max_non_finite_steps=3", "--max_iters=12", "--eval_interval=3")
    sentence = workshop.refused(*workshop.command(*arguments, "--plot=True", name="diverged"))
    folder = workshop.runs / "diverged"
    for words in (
        "not finite 3 steps in a row, to step 6",
        "learning_rate=0.01",
        "--run_name=diverged",
        "max_non_finite_steps=3",
    ):
        assert words in sentence
    assert summary(folder)["status"] == "failed" and summary(folder)["non_finite_steps"] == 3
    assert read_json(folder / "training_log.json")["training_iterations"][-1]["step"] == 6
    # What it left can be continued, as the sentence says.
    assert_same(weights(folder, 3), weights(folder, 6))
    sabotage.bad_steps = ()
    workshop.resume(folder, "--learning_rate=0.001")
    assert summary(folder)["status"] == "finished" and summary(folder)["steps"] == 12
    assert summary(folder)["non_finite_steps"] == 3
    assert all(tensor.isfinite().all() for tensor in weights(folder, 12).values())


def test_a_run_that_is_never_finite_still_leaves_whole_files(workshop, sabotage):
    sabotage.bad_steps = range(99)
    workshop.refused(*workshop.command("--objective=sabotaged", "--max_non_finite_steps=2", "--plot=True",
                                       "--eval_interval=50", name="never"))  # fmt: skip
    assert summary(workshop.runs / "never")["final_val_loss"] is None
    assert steps_of_checkpoints(workshop.runs / "never") == [2]


# ---- crashes --------------------------------------------------------------------------------------------------------


def reading_threads():
    return [thread for thread in threading.enumerate() if "read_ahead" in thread.name]


def test_a_crash_in_an_evaluation_loses_nothing(workshop, monkeypatch):
    straight = workshop.run("--dropout=0.1", name="straight")
    with monkeypatch.context() as patch:
        real = train.validation_scores
        counted = iter(range(99))

        def crash(*arguments):
            if next(counted) == 2:  # after those of steps 1 and 2, the one of step 4
                raise RuntimeError("evaluation crashed")
            return real(*arguments)

        patch.setattr(train, "validation_scores", crash)
        with pytest.raises(RuntimeError, match="evaluation crashed"):
            train.main(workshop.command("--dropout=0.1", name="crashed"))
    crashed = workshop.runs / "crashed"
    assert steps_of_checkpoints(crashed) == [4]
    assert summary(crashed)["status"] == "failed" and summary(crashed)["steps"] == 4
    assert [row["step"] for row in rows(crashed, "eval")] == [1, 2]
    assert reading_threads() == []
    workshop.resume(crashed)
    assert_same_run(straight, crashed, 8)  # the missed evaluation among the rows


def test_a_crash_of_the_loader_keeps_its_traceback_and_readable_files(workshop, monkeypatch):
    batches = BatchStream.batches

    def crash(stream, step, *arguments):
        if step == 5:
            raise OSError("the disk went away")
        return batches(stream, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batches", crash)
        with pytest.raises(OSError, match="the disk went away"):
            train.main(workshop.command("--plot=True", "--tensorboard=True", name="crashed"))
    folder = workshop.runs / "crashed"
    assert reading_threads() == []
    assert summary(folder)["status"] == "failed" and summary(folder)["steps"] == 5
    assert len(read_json(folder / "training_log.json")["training_iterations"]) == 5 + 3
    workshop.resume(folder)
    assert summary(folder)["status"] == "finished"
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_full_disk_costs_a_sentence_and_no_checkpoint(workshop, monkeypatch):
    resource = pytest.importorskip("resource")
    save_file = train.checkpoint.save_file
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_the_disk(tensors, path):
        if "checkpoint-8" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            save_file(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train.checkpoint, "save_file", fill_the_disk)
    try:
        sentence = workshop.refused(*workshop.command(name="full"))
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint-8 could not be written" in sentence and "make room" in sentence
    assert [path.name for path in (workshop.runs / "full").glob("*checkpoint*")] == ["checkpoint-4"]
    assert summary(workshop.runs / "full")["status"] == "failed"


# ---- signals, within this process (test_signals.py sends them to another) -------------------------------------------


@pytest.fixture
def signalling(monkeypatch):
    """An objective that sends this process `signals` during training step `at` (counted from 1)."""

    class Signalling(CausalLM):
        at, signals = 0, ()

        def __init__(self, model, config):
            super().__init__(model, config)
            self.calls = 0

        def forward(self, batch):
            self.calls += self.training
            if self.training and self.calls == self.at:
                for signum in self.signals:
                    signal.raise_signal(signum)
            return super().forward(batch)

    monkeypatch.setitem(OBJECTIVE_REGISTRY, "signalling", Signalling)
    return Signalling


@pytest.mark.parametrize("signum, name, at", [
    (signal.SIGTERM, "SIGTERM", 3),
    (signal.SIGINT, "Ctrl-C", 4),  # where a checkpoint and an evaluation are due
    (signal.SIGTERM, "SIGTERM", 7),
], ids=lambda value: str(value))  # fmt: skip
def test_a_signal_saves_and_leaves(workshop, signalling, signum, name, at):
    straight = workshop.run("--objective=signalling", "--dropout=0.1")
    signalling.at, signalling.signals = at, (signum,)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    workshop.printed()
    stopped = workshop.run("--objective=signalling", "--dropout=0.1", name="stopped")
    assert f"stopped by {name} at step {at}; continue with --init_from=resume --run_name=stopped" in workshop.printed()
    assert summary(stopped)["status"] == "interrupted" and summary(stopped)["steps"] == at
    assert steps_of_checkpoints(stopped)[-1] == at
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert reading_threads() == []
    signalling.at = 0
    workshop.resume(stopped)
    assert_same_run(straight, stopped, 8)


def test_a_signal_in_the_last_step_changes_nothing(workshop, signalling):
    signalling.at, signalling.signals = 8, (signal.SIGTERM,)
    assert summary(workshop.run("--objective=signalling"))["status"] == "finished"


def test_a_second_ctrl_c_leaves_at_once(workshop, signalling):
    signalling.at, signalling.signals = 6, (signal.SIGINT, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)  # Python's own, or none at all where the tests run in the background
    with pytest.raises(SystemExit) as stop:
        workshop.run("--objective=signalling", name="impatient")
    assert stop.value.code == 130
    folder = workshop.runs / "impatient"
    assert summary(folder)["status"] == "interrupted" and summary(folder)["steps"] == 5
    assert steps_of_checkpoints(folder) == [4]
    assert reading_threads() == []
    assert signal.getsignal(signal.SIGINT) is before
