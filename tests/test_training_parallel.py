"""Ranks, devices, precision and compiling: several processes train what one does."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import json
import math
import subprocess
import sys

import pytest
import torch

import training_parallel as parallel
from training_config import TrainConfig
from training_helpers import (
    ROOT,
    Workshop,
    assert_same,
    assert_same_run,
    book,
    environment,
    read_json,
    rows,
    summary,
    weights,
    workshop,
)
from training_parallel import Place, find_place
from user_errors import UserError

CPU = torch.device("cpu")

# ---- several ranks --------------------------------------------------------------------------------------------------

# One launch of torchrun, because starting two ranks takes seconds: commands run one after another in its processes.
# They join at the first command and part after the last, since torchrun's processes can join only once.
DRIVER = """
import json, sys
import torch.distributed as dist
import train

join, part = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda backend: None if dist.is_initialized() else join(backend)
dist.destroy_process_group = lambda: None
commands = json.load(open(sys.argv[1]))
for command in commands:
    if command is commands[-1]:
        dist.destroy_process_group = part
    try:
        train.main(command)
    except SystemExit as stop:
        print("left with", stop.code, flush=True)
assert not dist.is_initialized()
"""


# An objective that sends SIGTERM to the second rank alone, in its third step, while the file `armed` is there.
SIGNALLING = """
import os, signal
from training_objectives import OBJECTIVE_REGISTRY, CausalLM

@OBJECTIVE_REGISTRY("signalling")
class Signalling(CausalLM):
    calls = 0

    def forward(self, batch):
        self.calls += self.training
        if os.environ["RANK"] == "1" and self.training and self.calls == 3 and os.path.exists("armed"):
            os.remove("armed")
            signal.raise_signal(signal.SIGTERM)
        return super().forward(batch)

objective = "signalling"
"""


ENCODER = (
    "--arch_preset=bert", "--objective=masked_lm", "--dropout=0.0", "--batch_size=2", "--gradient_accumulation_steps=4",
    "--pseudo_perplexity_tokens=21",
)  # fmt: skip
MOE = ("--ffn_type=moe", "--n_experts=4", "--load_balance_loss=0.1", "--router_bias_rate=0.01")


@pytest.fixture(scope="module")
def ranks(book, tmp_path_factory):
    """(Workshop, what was printed) after two ranks went through the commands."""
    shop = Workshop(tmp_path_factory.mktemp("ranks"), book)
    dropout = ("--gradient_accumulation_steps=2", "--dropout=0.3", "--lr_decay_iters=8")
    resume = (f"--runs_dir={shop.runs}", "--init_from=resume", "--max_iters=8")
    commands = [
        shop.command("--max_iters=10", "--batch_size=2", "--gradient_accumulation_steps=4", name="ddp"),
        shop.command(*ENCODER, name="encoder"),
        shop.command("--gradient_accumulation_steps=3", name="uneven"),
        shop.command(*MOE, "--max_iters=9", "--batch_size=2", "--gradient_accumulation_steps=4", name="moe"),
        shop.command(*dropout, name="straight"),
        shop.command(*dropout, "--max_iters=4", name="halved"),
        [*resume, "--run_name=halved"],
        shop.command(*dropout, "signalling.py", name="stopped"),
        [*resume, "--run_name=stopped"],
    ]
    (shop.folder / "signalling.py").write_text(SIGNALLING)
    (shop.folder / "armed").touch()
    shop.run("--max_iters=1")  # prepares the data
    (shop.folder / "commands.json").write_text(json.dumps(commands))
    (shop.folder / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py",
         "commands.json"],
        cwd=shop.folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, encoding="utf-8",
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return shop, done.stdout + done.stderr


def test_two_ranks_train_what_one_does(ranks, workshop):
    together = ranks[0].runs / "ddp"
    alone = workshop.run("--max_iters=10", "--batch_size=2", "--gradient_accumulation_steps=4")
    for kind, column in (("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss"), ("eval", "bits_per_byte")):
        assert [row[column] for row in rows(together, kind)] == pytest.approx(
            [row[column] for row in rows(alone, kind)], abs=1e-5
        )
    assert len(rows(together, "train")) == 10
    for name in ("stream_hash", "tokens_processed", "tokens_supervised", "steps", "status"):
        assert summary(together)[name] == summary(alone)[name]
    for name, tensor in weights(together, 10).items():
        torch.testing.assert_close(tensor, weights(alone, 10)[name], rtol=0, atol=1e-4)
    assert read_json(together / "config.json")["resolved"]["world_size"] == 2


def test_two_ranks_hide_and_score_what_one_does(ranks, workshop):
    together, alone = ranks[0].runs / "encoder", workshop.run(*ENCODER)
    assert [row["loss"] for row in rows(together, "train")] == pytest.approx(
        [row["loss"] for row in rows(alone, "train")], abs=1e-5
    )
    for name in ("final_val_loss", "masked_accuracy", "pseudo_nats", "tokens_supervised"):
        assert summary(together)[name] == pytest.approx(summary(alone)[name], abs=1e-5), name


def test_what_experts_count_is_summed_over_ranks(ranks, workshop):
    together = ranks[0].runs / "moe"
    alone = workshop.run(*MOE, "--max_iters=9", "--batch_size=2", "--gradient_accumulation_steps=4")
    for one, other in zip(rows(alone, "train"), rows(together, "train"), strict=True):
        assert one["expert_load"] == other["expert_load"] and one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    bias = "blocks.0.ffn.choice_bias"
    assert weights(alone, 9)[bias].any() and torch.equal(weights(alone, 9)[bias], weights(together, 9)[bias])


def test_only_one_rank_speaks_and_writes(ranks):
    shop, text = ranks
    assert text.count("step  1/10  loss") == 1
    assert len((shop.runs / "ddp" / "metrics.jsonl").read_text().splitlines()) == len(rows(shop.runs / "ddp")) == 10 + 5


def test_accumulation_that_does_not_divide_among_ranks_is_refused(ranks):
    shop, text = ranks
    assert (
        "error: gradient_accumulation_steps=3 does not divide among 2 ranks (batch_size=4); make it a multiple of 2\n"
        in text
    )
    assert text.count("left with 2") == 2
    assert not (shop.runs / "uneven").exists()


def test_a_resumed_job_of_two_ranks_is_exact_with_dropout(ranks):
    runs = ranks[0].runs
    assert_same_run(runs / "straight", runs / "halved", 8)
    states = torch.load(runs / "halved" / "checkpoint-8" / "training_state.pt", weights_only=True)["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])  # each rank draws its own masks


def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(ranks):
    shop, text = ranks
    assert not (shop.folder / "armed").exists()
    assert "stopped by another rank at step 3; continue with --init_from=resume --run_name=stopped" in text
    assert_same_run(shop.runs / "straight", shop.runs / "stopped", 8)


def test_one_process_goes_on_with_what_two_ranks_saved(ranks, workshop):
    folder = workshop.resume(ranks[0].runs / "ddp", "--max_iters=12")
    assert summary(folder)["status"] == "finished" and summary(folder)["steps"] == 12
    assert [session["resolved"]["world_size"] for session in read_json(folder / "config.json")["earlier_sessions"]] == [
        2
    ]


# ---- where -----------------------------------------------------------------------------------------------------------


def test_alone_on_a_cpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    place = find_place(TrainConfig(device="cpu", threads=1))
    assert place == Place(CPU, "float32", tf32=False)
    assert place.is_main and place.world_size == 1 and place.precision == "float32"
    assert torch.get_num_threads() == 1
    assert place.device_name()


@pytest.mark.parametrize("cuda, mps, device", [(False, False, "cpu"), (False, True, "mps")])
def test_auto_takes_the_best_that_is_there(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert parallel._device("auto", None) == torch.device(device)


@pytest.mark.parametrize("device, words", [
    ("cuda", ["device='cuda' needs a CUDA GPU", "device=cpu"]),
    ("cuda:1", ["device='cuda:1' needs a CUDA GPU"]),
    ("mps", ["device='mps' needs an Apple GPU"]),
    ("gpu", ["device='gpu' is not a device", "auto, cpu, cuda, cuda:1 or mps"]),
    ("xpu", ["device='xpu' is not supported"]),
    ("", ["device='' is not a device"]),
])  # fmt: skip
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        find_place(TrainConfig(device=device))
    assert all(word in str(error.value) for word in words)


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel._device("cuda:1", None) == torch.device("cuda", 1)
    assert parallel._device("cuda", 1) == torch.device("cuda", 1)  # a rank takes the GPU of its number
    with pytest.raises(UserError, match=r"device='cuda:5' does not exist: torch sees 2 GPU"):
        parallel._device("cuda:5", None)


@pytest.mark.parametrize(
    "dtype, supported, chosen", [("auto", True, "bfloat16"), ("auto", False, "float16"), ("float32", True, "float32")]
)
def test_on_cuda_auto_is_the_half_precision_that_the_gpu_has(monkeypatch, dtype, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert parallel._dtype(dtype, torch.device("cuda", 0)) == chosen
    assert parallel._dtype(dtype, CPU) == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_autocast_makes_products_in_the_precision_asked_for(dtype):
    a = torch.ones(2, 2)
    with Place(CPU, dtype, tf32=False).autocast():
        assert (a @ a).dtype == getattr(torch, dtype)
    assert Place(CPU, dtype, tf32=True).precision == ("tf32" if dtype == "float32" else dtype)


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, device, wanted", [
    ("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True), (False, "cuda", False),
])  # fmt: skip
def test_compile_auto_is_for_cuda(asked, device, wanted):
    place = Place(torch.device(device), "float32", tf32=False)
    assert parallel.wants_compile(TrainConfig(compile=asked), place) is wanted


def breaks_at_once(module):
    raise RuntimeError("Dynamo is not supported here\nand more lines")


def breaks_when_called(module):
    def call(batch):
        torch.rand(3)
        raise RuntimeError("Dynamo is not supported here\nand more lines")

    return call


def breaks_without_words(module):
    raise NotImplementedError


@pytest.mark.parametrize("compiler, reason", [
    (breaks_at_once, "Dynamo is not supported here"),
    (breaks_when_called, "Dynamo is not supported here"),
    (breaks_without_words, "NotImplementedError"),
])  # fmt: skip
def test_where_compiling_fails_the_run_goes_on_and_says_so(workshop, monkeypatch, compiler, reason):
    plain = workshop.run("--dropout=0.2")
    monkeypatch.setattr(torch, "compile", compiler)
    fallen_back = workshop.run("--dropout=0.2", "--compile=True")
    assert f"compile off: torch.compile failed ({reason})" in workshop.printed()
    assert read_json(fallen_back / "config.json")["resolved"]["compile"] == f"off: torch.compile failed ({reason})"
    assert_same_run(plain, fallen_back, 8)


def test_a_compiled_run_is_tried_once_and_leaves_gradients_and_random_state_alone(workshop, monkeypatch):
    plain = workshop.run("--dropout=0.2")
    called = []

    def compiler(module):
        called.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = workshop.run("--dropout=0.2", "--compile=True")
    assert len(called) == 1 and read_json(compiled / "config.json")["resolved"]["compile"] == "on"
    assert_same_run(plain, compiled, 8)


def test_the_trial_leaves_no_gradient_and_no_mark_on_the_random_state(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, batch):
            return {"loss": self.layer(batch["inputs"]).sum()}

    before = torch.get_rng_state()
    _, happened = parallel.compile_module(Module(), {"inputs": torch.ones(2, 4)}, Place(CPU, "float32", tf32=False))
    assert happened == "on"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.slow
def test_a_truly_compiled_run_learns_the_same(workshop):
    plain, compiled = workshop.run(), workshop.run("--compile=True")
    assert read_json(compiled / "config.json")["resolved"]["compile"] == "on"
    assert [row["loss"] for row in rows(compiled, "train")] == pytest.approx(
        [row["loss"] for row in rows(plain, "train")], abs=1e-4
    )


# ---- alone, what ranks share is one's own ----------------------------------------------------------------------------


def test_alone_the_sums_over_ranks_are_ones_own():
    place = Place(CPU, "float32", tf32=False)
    tensor = torch.tensor([1.0, 2.0])
    assert parallel.sum_over_ranks(tensor, place) is tensor
    assert parallel.gather("mine", place) == ["mine"]
    assert parallel.any_rank(None, place) is False and parallel.any_rank(15, place) is True
    floats = parallel.to_host([torch.tensor(1), torch.tensor(2.5), torch.tensor(math.inf)], place)
    assert floats == [1.0, 2.5, math.inf]
    module = torch.nn.Linear(2, 2)
    assert parallel.wrap(module, place) is module
    with parallel.gradient_sync(module, is_last=False):
        pass
    parallel.leave_place(place)
    assert_same(parallel.peak_memory_bytes(place) > 2**20, True)
