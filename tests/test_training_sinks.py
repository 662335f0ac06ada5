"""TensorBoard and Weights & Biases get every row of a run."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import sys
import time

import pytest

from training_helpers import (
    book,
    read_json,
    rows,
    workshop,
)

# ---- sinks ----------------------------------------------------------------------------------------------------------


class FakeWandb:
    """Weights & Biases as far as the sink uses it."""

    def __init__(self, login):
        self.login_succeeds = login
        self.logged, self.metrics, self.is_finished = [], {}, False

    def login(self, prompt):
        assert prompt is False  # a run that waits for an answer is a run that stands still
        if self.login_succeeds is None:
            raise OSError("no network")
        return self.login_succeeds

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.is_finished = True


@pytest.mark.parametrize(
    "login, mode", [(False, "offline"), (True, None), (None, "offline")], ids=["no-login", "login", "no-network"]
)
def test_wandb_gets_every_row_against_steps_and_tokens(workshop, monkeypatch, login, mode):
    fake = FakeWandb(login)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = workshop.run("--wandb_log=True", "--wandb_project=mine", "--layer_stats_interval=8", name="watched")
    assert (
        fake.arguments["mode"] == mode and fake.arguments["project"] == "mine" and fake.arguments["name"] == "watched"
    )
    assert fake.arguments["config"] == read_json(folder / "config.json")
    assert fake.metrics["train/*"] == "step" and fake.metrics["by_tokens/*"] == "tokens_processed"
    assert len(fake.logged) == 12 and fake.is_finished
    assert fake.logged[0]["train/loss"] == fake.logged[0]["by_tokens/train/loss"] == rows(folder, "train")[0]["loss"]
    assert fake.logged[-2]["step"] == 8 and fake.logged[-2]["tokens_processed"] == 512
    assert "gradient_norms/blocks.0.ffn" in fake.logged[-2]


def test_the_real_wandb_writes_offline(workshop, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = workshop.run("--wandb_log=True", "--max_iters=2")
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of wandb's own writes it, on a busy machine after the run has ended
    while written.stat().st_size <= 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written.stat().st_size > 1000


def test_a_missing_wandb_is_named_and_leaves_nothing(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sentence = workshop.refused(*workshop.command("--wandb_log=True", name="unwatched"))
    assert "pip install wandb" in sentence and "wandb_log=False" in sentence
    assert not (workshop.runs / "unwatched").exists()
