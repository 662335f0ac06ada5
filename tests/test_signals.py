"""Ctrl-C and SIGTERM, sent to train.py in its own process: it saves, leaves with 0, and can go on as if undisturbed."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import signal
import subprocess

import pytest

from training_helpers import (
    assert_same_run,
    book,
    environment,
    rows,
    script,
    steps_of_checkpoints,
    summary,
    workshop,
)

SLOW = '''
import os
import time

from training_objectives import OBJECTIVE_REGISTRY, CausalLM


@OBJECTIVE_REGISTRY("slow")
class Slow(CausalLM):
    """Causal LM that leaves time for a signal."""

    def forward(self, batch):
        time.sleep(float(os.environ.get("SECONDS_A_STEP", 0)))
        return super().forward(batch)


objective = "slow"
max_iters = 80
'''


@pytest.fixture
def slow(workshop, tmp_path):
    """Arguments of a run that takes seconds in another process and none here."""
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    arguments = [argument for argument in workshop.command() if "max_iters" not in argument]
    return [*arguments, str(tmp_path / "slow.py"), "--dropout=0.1", "--eval_interval=40"]


def test_a_signal_saves_leaves_with_0_and_the_run_goes_on(workshop, slow):
    import train

    train.main([*slow, "--run_name=straight"])
    children = {}
    for signum in (signal.SIGTERM, signal.SIGINT):  # both at once: most of the time is Python starting
        children[signum] = subprocess.Popen(
            script("train.py", *slow, f"--run_name={signum.name}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", cwd=workshop.folder, env=environment(SECONDS_A_STEP="0.05"),
        )  # fmt: skip
    try:
        for signum, child in children.items():
            while not child.stdout.readline().startswith("step  5/80"):
                assert child.poll() is None, child.stderr.read()
            child.send_signal(signum)
        for signum, child in children.items():
            out, err = child.communicate(timeout=60)
            assert child.returncode == 0, err
            assert err == ""
            assert f"stopped by {'Ctrl-C' if signum == signal.SIGINT else 'SIGTERM'} at step " in out
    finally:
        for child in children.values():
            child.kill()
    for signum in children:
        folder = workshop.runs / signum.name
        stopped_at = summary(folder)["steps"]
        assert summary(folder)["status"] == "interrupted"
        assert 5 <= stopped_at < 80 and steps_of_checkpoints(folder)[-1] == stopped_at
        assert rows(folder, "train")[-1]["step"] == stopped_at
        workshop.resume(folder)
        assert summary(folder)["status"] == "finished"
        assert_same_run(workshop.runs / "straight", folder, 80)
