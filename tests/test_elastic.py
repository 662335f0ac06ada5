"""A job that loses a rank, or is told to leave, goes on and ends with the weights of one that was left alone."""

# ruff: noqa: F401, F811 - book is a fixture

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

import train
import training_checkpoint as checkpoint
import training_place
import training_ranks
from test_scripts import main_of
from training_helpers import (
    ROOT,
    Workshop,
    assert_same,
    assert_same_run,
    book,
    environment,
    read_json,
    rows,
    steps_of_checkpoints,
    summary,
    training_state,
    weights,
    workshop,
)
from user_errors import UserError

# An objective whose process gets a signal, SIGKILL for one, where a file says so: `<signal>-<rank>-<step>`, once.
STRUCK = '''
import os, signal
from training_objectives import OBJECTIVE_REGISTRY, CausalLM

@OBJECTIVE_REGISTRY("struck")
class Struck(CausalLM):
    """Causal LM with a lightning rod; `step` counts the micro-batches of this process, one a step."""
    step = 0

    def forward(self, batch):
        self.step += self.training
        for number in (9, 10, 15) if self.training else ():
            mark = f"{number}-{os.environ.get('RANK', 0)}-{self.step}"
            if os.path.exists(mark):
                os.remove(mark)
                os.kill(os.getpid(), number)
        return super().forward(batch)

objective = "struck"
'''
STEPS = ("--max_iters=20", "--batch_size=2", "--gradient_accumulation_steps=4", "--dropout=0.2", "--eval_interval=10",
         "--checkpoint_interval=4", "--lr_decay_iters=20")  # fmt: skip


def torchrun(shop, n_ranks, *arguments, restarts=0, **variables):
    """What a job of torchrun printed, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}",
         f"--max-restarts={restarts}", str(ROOT / "train.py"), *arguments],
        cwd=shop.folder, env=environment(**variables), capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def shop(workshop):
    """The workshop with the file struck.py, and prepared data."""
    (workshop.folder / "struck.py").write_text(STRUCK, encoding="utf-8")
    workshop.run("--max_iters=1", name="prepared")
    return workshop


def strike(shop, signum, rank, step):
    (shop.folder / f"{int(signum)}-{rank}-{step}").touch()


def struck(shop):
    """The strikes that are still to come."""
    return [path.name for path in shop.folder.glob("[0-9]*-[0-9]*-[0-9]*")]


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is of POSIX")
@pytest.mark.parametrize("form, mode", [("unsharded", "ddp"), ("sharded", "fsdp")])
def test_a_job_whose_ranks_are_killed_ends_with_the_weights_of_one_that_was_left_alone(shop, form, mode):
    arguments = (
        *STEPS,
        "--gradient_accumulation_steps=2",
        "struck.py",
        f"--checkpoint_format={form}",
        f"--use_fsdp={mode == 'fsdp'}",
    )
    code, text = torchrun(shop, 2, *shop.command(*arguments, name="straight"))
    assert code == 0, text
    rng = random.Random(form)
    strike(shop, 9, 1, rng.randint(2, 4))  # before there is a checkpoint
    strike(shop, 9, rng.randint(0, 1), rng.randint(5, 12))  # and after one
    code, text = torchrun(shop, 2, *shop.command(*arguments, "--auto_resume=True", name="killed"), restarts=2)
    assert code == 0 and not struck(shop), text
    assert summary(shop.runs / "killed")["status"] == "finished"
    assert len(read_json(shop.runs / "killed" / "config.json")["earlier_sessions"]) == 2
    if form == "sharded":
        for name in ("straight", "killed"):
            main_of("convert_checkpoint")([str(shop.runs / name / "checkpoint-20")])
    assert_same_run(shop.runs / "straight", shop.runs / "killed", 20)
    assert not [*(shop.runs / "killed").glob(".checkpoint*")]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 is of POSIX")
def test_a_signal_to_one_rank_saves_on_all_and_the_job_goes_on(shop):
    arguments = (
        *STEPS,
        "--gradient_accumulation_steps=2",
        "struck.py",
        "--checkpoint_format=sharded",
        "--use_fsdp=True",
    )
    code, text = torchrun(shop, 2, *shop.command(*arguments, name="straight"))
    assert code == 0, text
    command = shop.command(*arguments, "--auto_resume=True", name="told")
    for step, signum in ((3, signal.SIGUSR1), (6, signal.SIGTERM)):
        strike(shop, signum, 1, step)
        code, text = torchrun(shop, 2, *command)
        assert code == 0 and not struck(shop), text
        assert f"stopped by another rank at step {3 if step == 3 else 9}; continue with" in text
        assert summary(shop.runs / "told")["status"] == "interrupted"
    assert torchrun(shop, 2, *command)[0] == 0
    for name in ("straight", "told"):
        main_of("convert_checkpoint")([str(shop.runs / name / "checkpoint-20")])
    assert_same_run(shop.runs / "straight", shop.runs / "told", 20)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unsharded", "sharded"])
def test_two_four_and_one_processes_train_what_one_does(shop, form):
    steps = [argument for argument in STEPS if "dropout" not in argument]  # each rank draws masks of its own
    plain = shop.run(*steps, name="alone")
    modes = [("--use_fsdp=True", "--use_zero1=False"), ("--use_fsdp=False", "--use_zero1=True"), ()]
    begin = shop.command(*steps, f"--checkpoint_format={form}", "--max_iters=7", *modes[0], name="wandering")
    again = [f"--runs_dir={shop.runs}", "--run_name=wandering", "--init_from=resume"]
    for n_ranks, command in ((2, begin), (4, [*again, "--max_iters=14", *modes[1]])):
        code, text = torchrun(shop, n_ranks, *command)
        assert code == 0, text
    folder = shop.resume(shop.runs / "wandering", "--max_iters=20", "--use_zero1=False")
    if form == "sharded":
        main_of("convert_checkpoint")([str(folder / "checkpoint-20")])
    assert [session["resolved"]["parallel"] for session in read_json(folder / "config.json")["earlier_sessions"]] == [
        "FSDP2",
        "ZeRO-1",
    ]
    for name in ("stream_hash", "tokens_processed", "tokens_supervised", "steps", "status"):
        assert summary(folder)[name] == summary(plain)[name], name
    torch.testing.assert_close(weights(folder, 20), weights(plain, 20), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        training_state(folder, 20)["optimizers"], training_state(plain, 20)["optimizers"], rtol=1e-4, atol=1e-6
    )


def test_a_second_signal_does_not_disturb_what_is_still_being_written(workshop, monkeypatch):
    through, finish = [], train.logging.RunLogger.finish

    def told_again(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        finish(self, *arguments)

    monkeypatch.setattr(train.logging.RunLogger, "finish", told_again)
    before = signal.signal(signal.SIGTERM, lambda *_: through.append("it would have ended here"))
    try:
        folder = workshop.run("--max_iters=2")
        assert not through and summary(folder)["status"] == "finished"
        signal.raise_signal(signal.SIGTERM)
        assert through  # the handler of before is back
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- a command that is run again ------------------------------------------------------------------------------------


def test_a_command_with_auto_resume_begins_goes_on_and_leaves_a_finished_run_alone(workshop, monkeypatch):
    straight = workshop.run("--dropout=0.2")
    command, folder = workshop.command("--dropout=0.2", "--auto_resume=True", name="again"), workshop.runs / "again"
    for step in (2, 6):  # before and after the first checkpoint, which is that of step 4
        with monkeypatch.context() as patch:
            patch.setattr(train.logging.RunLogger, "train", fails_at(step))
            with pytest.raises(OSError, match="no disk"):
                train.main(command)
    train.main(command)
    assert_same_run(straight, folder, 8)
    abandoned = [json.loads(line) for line in (folder / "metrics_abandoned.jsonl").read_text().splitlines()]
    assert [row["step"] for row in abandoned if row["kind"] == "train"] == [1, 2, 5, 6]
    before = weights(folder, 8), rows(folder)
    train.main(command)
    assert_same((weights(folder, 8), rows(folder)), before)
    assert summary(folder)["status"] == "finished"


def fails_at(step):
    """A RunLogger.train that does what it does, and fails after a step."""
    before = train.logging.RunLogger.train

    def log(self, row, eta_seconds):
        before(self, row, eta_seconds)
        if row["step"] == step:
            raise OSError("no disk")

    return log


def test_auto_resume_takes_over_no_other_run(workshop):
    command = workshop.command("--auto_resume=True", name="mine")
    (workshop.runs / "mine").mkdir(parents=True)
    (workshop.runs / "mine" / "thesis.txt").write_text("mine")
    assert "run_name='mine' exists" in workshop.refused(*command)
    other = workshop.run("--max_iters=4", name="other")
    for path in other.glob("checkpoint-*"):
        path.rename(other / f"kept-{path.name}")
    again = workshop.command("--auto_resume=True", "--n_embd=32", name="other")
    assert "run_name='other' exists" in workshop.refused(*again)
    (other / "kept-checkpoint-4").rename(other / "checkpoint-4")
    assert "made with n_embd=16 and this command says 32" in workshop.refused(*again)


@pytest.mark.parametrize("arguments, words", [
    (("--auto_resume=True",), "auto_resume=True needs run_name=NAME"),
    (("--auto_resume=True", "--run_name=a", "--resume_step=4"), "drop resume_step=4"),
])  # fmt: skip
def test_what_auto_resume_cannot_mean_is_refused(workshop, arguments, words):
    assert words in workshop.refused(*workshop.command(*arguments))


def test_restarts_that_would_each_begin_a_run_are_refused(workshop, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    sentence = workshop.refused(*workshop.command())
    assert "begin a new run at each of its 3 restarts; add --auto_resume=True and --run_name=NAME" in sentence


def test_each_attempt_of_torchrun_meets_at_keys_of_its_own(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 2)]))
    assert training_place._own_store(0, 2) == {}
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        given = training_place._own_store(1, 2)
        assert (given["rank"], given["world_size"]) == (1, 2)
        assert not given["store"].check(["address"])  # that of the attempt before is not seen
        given["store"].set("address", attempt)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--max-restarts=3 on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        training_place._own_store(0, 4)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # what that variable does
    assert training_place._own_store(0, 4) == {}


TWO = training_place.Place(torch.device("cpu"), "float32", False, 0, 0, 2)


def test_damage_that_another_rank_finds_is_refused_alike(workshop, monkeypatch):
    folder = workshop.run() / "checkpoint-8"
    shares = []
    for rank in (0, 1):
        (folder / "training_state.pt").write_bytes(b"x")
        place = dataclasses.replace(TWO, rank=rank)
        monkeypatch.setattr(checkpoint, "gather", lambda found, _: shares.append(found) or [found, "x is missing"])
        with pytest.raises(UserError, match="checkpoint-8 is damaged"):
            checkpoint.read_metadata(folder, place)
    assert shares == [None, "training_state.pt does not match its checksum"]  # each checks its share


def test_rank_0_decides_for_all(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda values, src: sent.append((*values, src)))
    assert training_ranks.from_main(lambda: "runs/a", TWO) == "runs/a"

    def refuse():
        raise UserError("runs/a exists")

    with pytest.raises(UserError, match="runs/a exists"):
        training_ranks.from_main(refuse, TWO)
    assert sent == [(("runs/a", None), 0), ((None, "runs/a exists"), 0)]
    for decision, _ in sent[:]:
        monkeypatch.setattr(
            torch.distributed, "broadcast_object_list", lambda values, src, told=decision: values.__setitem__(0, told)
        )
        other = dataclasses.replace(TWO, rank=1)
        if decision[1] is None:
            assert training_ranks.from_main(refuse, other) == "runs/a"
        else:
            with pytest.raises(UserError, match="runs/a exists"):
                training_ranks.from_main(refuse, other)
