"""Ranks, devices, precision and compiling: several processes train what one does."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import training_parallel as parallel
import training_place
import training_ranks
import training_recompute
from configurator import Settings
from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training_config import TrainConfig
from training_data import load_dataset
from training_helpers import (
    Workshop,
    assert_same,
    assert_same_run,
    assert_same_training,
    book,
    launch,
    read_json,
    rows,
    summary,
    training_state,
    weights,
    workshop,
    write_games,
)
from training_memory import step_memory
from training_objectives import OBJECTIVE_REGISTRY
from training_place import Place, find_place
from user_errors import UserError

CPU = torch.device("cpu")

# ---- several ranks --------------------------------------------------------------------------------------------------

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
GAMES = ("--dataset=games", "--input=played.jsonl", "--objective=lm_plus_win", "--lambda_wp=0.5")
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
    return shop, launch(shop, commands)


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
    assert text.count("left with 2") == 2 and "error on rank 1: " not in text
    assert not (shop.runs / "uneven").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_outlives_the_group(ranks):
    """One that did took the interpreter's lock while it shut down, and the process ended with SIGABRT."""
    assert ranks[1].count("threads of gloo left: 0\n") == 2


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


# ---- modes: what is sharded ------------------------------------------------------------------------------------------

KINDS = {
    "transformer": ("--weight_tying=True", "--dropout=0.0", "--sample_tokens=20"),
    "moe": (*MOE, "--n_shared_experts=1", "--sample_tokens=20"),
    "mamba": ("--block_pattern=mamba", "--sample_tokens=20"),
    "lstm": ("--block_pattern=lstm", "--sample_tokens=20"),
    "muon": ("--optimizer=muon",),
    "games": (*GAMES, "--dropout=0.0"),
    "clipped": (*MOE, "--grad_clip=0.05", "--gradient_checkpointing=full", "--layer_stats_interval=2"),
}
MODES = {"DDP": (), "ZeRO-1": ("--use_zero1=True",), "FSDP2": ("--use_fsdp=True",)}
STEPS = ("--n_layer=2", "--max_iters=10", "--batch_size=2", "--gradient_accumulation_steps=4", "--warmup_iters=2",
         "--lr_decay_iters=10", "--eval_interval=10")  # fmt: skip
HALF = ("--dtype=float16", "--max_iters=8", "--z_loss=100.0")  # at which the scaler begins too high
SHUFFLED = {
    "ddp to zero1": ((), MODES["ZeRO-1"]),
    "zero1 to fsdp": (MODES["ZeRO-1"], ("--use_zero1=False", "--use_fsdp=True")),
    "fsdp to ddp": (MODES["FSDP2"], ("--use_fsdp=False",)),
}


def prepare_games(book):
    """Make data/games-played beside the book, so that its input need not be where a run is started."""
    write_games(book / "played.jsonl", 200)
    config = TrainConfig(dataset="games", data_dir=str(book / "data"), input=str(book / "played.jsonl"))
    load_dataset(config, quiet=True)


@pytest.fixture(scope="module")
def modes(book, tmp_path_factory):
    """(Workshop, what was printed) after two ranks trained every kind in every mode."""
    shop = Workshop(tmp_path_factory.mktemp("modes"), book)
    prepare_games(book)
    commands = [
        shop.command(*STEPS, *settings, *mode, name=f"{kind} {name}")
        for kind, settings in KINDS.items() for name, mode in MODES.items()
    ]  # fmt: skip
    commands += [shop.command(*STEPS, *mode, *HALF, name=f"half {name}") for name, mode in MODES.items()]
    commands += [
        shop.command(
            *STEPS,
            "--use_fsdp=True",
            "--fsdp_reshard_after_forward=False",
            "--dropout=0.0",
            "--weight_tying=True",
            "--sample_tokens=20",
            name="kept",
        ),
        shop.command(*STEPS, "--use_fsdp=True", "--fsdp_dtype=bfloat16", name="rounded"),
        shop.command("--use_fsdp=True", "--use_zero1=True", name="both"),
    ]
    resume = (f"--runs_dir={shop.runs}", "--init_from=resume")
    for name, (before, after) in SHUFFLED.items():
        commands.append(shop.command(*STEPS, *before, "--max_iters=5", name=name))
        commands.append([*resume, f"--run_name={name}", "--max_iters=10", *after])
    shop.run("--max_iters=1")
    for name in ("FSDP2", "ZeRO-1"):
        shop.run(*STEPS, "--max_iters=3", name=f"1 to 2 {name}")  # one process, then two
        commands.append([*resume, f"--run_name=1 to 2 {name}", "--max_iters=7", *MODES[name]])
    return shop, launch(shop, commands, timeout=900)


@pytest.fixture(scope="module")
def alone(book, tmp_path_factory):
    """{kind: run folder} of one process each, made when asked for."""
    shop, made = Workshop(tmp_path_factory.mktemp("alone"), book), {}
    prepare_games(book)

    def run(kind):
        if kind not in made:
            made[kind] = shop.run(*STEPS, *KINDS[kind], name=kind)
        return made[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_what_one_process_does(modes, alone, kind, mode):
    together = modes[0].runs / f"{kind} {mode}"
    assert_same_training(together, alone(kind), atol=1e-3 if kind == "muon" else 1e-5)  # Muon multiplies in bfloat16
    assert read_json(together / "config.json")["resolved"]["parallel"] == mode


@pytest.mark.parametrize("mode", MODES)
def test_winners_are_scored_the_same_in_every_mode(modes, alone, mode):
    one, other = summary(modes[0].runs / f"games {mode}"), summary(alone("games"))
    assert one["tokens_supervised"] == other["tokens_supervised"] < one["tokens_processed"]
    for name in ("lm_loss", "wp_loss", "wp_acc", "wp_brier", "wp_ece", "wp_gap", "wp_acc_by_stage", "wp_best"):
        assert one[name] == pytest.approx(other[name], abs=1e-5), name
    assert one["wp_reliability"]["count"] == other["wp_reliability"]["count"]
    norms = [torch.load(each / "checkpoint-10" / "training_state.pt", weights_only=True)["optimizers"]
             for each in (modes[0].runs / f"games {mode}", alone("games"))]  # fmt: skip
    assert all("heads.win.weight" in optimizers[0] for optimizers in norms)


def test_one_process_goes_on_with_what_a_mode_saved_and_two_with_what_it_saved(modes, alone, workshop):
    for mode in ("FSDP2", "ZeRO-1"):
        folder = workshop.resume(modes[0].runs / f"1 to 2 {mode}", "--max_iters=10")
        assert_same_training(folder, alone("transformer"))


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_run_goes_on_in_another_mode(modes, alone, name):
    assert_same_training(modes[0].runs / name, alone("transformer"))


def test_layer_norms_are_those_of_whole_tensors(modes, alone):
    for mode in MODES:
        for one, other in zip(
            rows(modes[0].runs / f"clipped {mode}", "train"), rows(alone("clipped"), "train"), strict=True
        ):
            assert one.keys() == other.keys()
            for column in {"gradient_norms", "weight_norms"} & one.keys():
                assert one[column] == pytest.approx(other[column], rel=1e-3, abs=1e-5)


def test_an_overflow_is_skipped_alike_in_every_mode(modes):
    found = [summary(modes[0].runs / f"half {mode}") for mode in MODES]
    assert 0 < found[0]["non_finite_steps"] < 8
    assert len({one["non_finite_steps"] for one in found}) == 1
    scales = [training_state(modes[0].runs / f"half {mode}", 8)["scaler"] for mode in MODES]
    assert scales[0] == scales[1] == scales[2] and scales[0]["scale"] < 65536
    for one in found:
        assert one["final_val_loss"] == pytest.approx(found[0]["final_val_loss"], abs=2e-2)


def test_weights_kept_after_forward_train_the_same(modes, alone):
    assert_same_training(modes[0].runs / "kept", alone("transformer"))


@pytest.mark.parametrize("kind", ["transformer", "moe", "mamba", "lstm", "kept"])
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_write_the_text_that_one_process_does(modes, alone, kind, mode):
    together = modes[0].runs / ("kept" if kind == "kept" else f"{kind} {mode}")
    one = alone("transformer" if kind == "kept" else kind)
    texts = [(folder / "sample.txt").read_text(encoding="utf-8") for folder in (together, one)]
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_rounded_weights_train_nearly_the_same(modes, alone):
    one, other = (summary(folder)["final_val_loss"] for folder in (modes[0].runs / "rounded", alone("transformer")))
    assert one != other and one == pytest.approx(other, abs=2e-2)


def test_two_ways_to_shard_are_refused_on_every_rank(modes):
    sentence = "use_fsdp=True shards the optimizer's state already, as use_zero1=True would; keep one of them\n"
    assert modes[1].count(f"error: {sentence}") == modes[1].count(f"error on rank 1: {sentence}") == 1
    assert not (modes[0].runs / "both").exists()


@pytest.mark.parametrize("setting", ["use_fsdp", "use_zero1"])
def test_one_process_says_that_it_has_nothing_to_shard_over(workshop, setting):
    workshop.run("--max_iters=1", f"--{setting}=True")
    assert f"{setting}=True has one process and nothing to shard over; start it with torchrun" in workshop.printed()


@pytest.mark.parametrize("settings, held", [
    ({}, (4, 4, 8)), ({"use_zero1": True}, (4, 4, 2)), ({"use_fsdp": True}, (1, 1, 2)),
])  # fmt: skip
def test_what_a_rank_holds(settings, held):
    memory, place = (
        {"weights": 4, "gradients": 4, "optimizer": 8, "activations": 5},
        Place(CPU, "float32", False, 0, 0, 4),
    )
    found = parallel.bytes_held(memory, place, TrainConfig(**settings))
    assert found == dict(zip(memory, (*held, 5), strict=True))
    assert parallel.bytes_held(memory, Place(CPU, "float32", tf32=False), TrainConfig(**settings)) == memory


# ---- activation checkpointing ----------------------------------------------------------------------------------------


MIXTURES = {
    "moe": {}, "moe with places": {"capacity_factor": 1.0, "n_shared_experts": 1},
    "moe of all terms": {"router_z_loss": 0.01},
}  # fmt: skip


def gradients_and_counts(config, way, is_fast):
    """({name: gradient}, sums) of one micro-batch under dropout."""
    model = ConfigurableGPT(config)
    if is_fast:
        kernels.choose(model, CPU, "auto", torch.float32)
    train_config = TrainConfig(gradient_checkpointing=way)
    training_recompute.checkpoint_activations(model, train_config)
    objective = OBJECTIVE_REGISTRY["causal_lm"](model, train_config)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    sums = objective({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
    sums["loss"].backward()
    assert model.take_findings() == (0.0, {})  # computing again was heard by nobody
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sums


@pytest.mark.parametrize("part", [*sorted(MIXER_REGISTRY), *MIXTURES])
@pytest.mark.parametrize("way", ["full", "selective", "products"])
@pytest.mark.parametrize("is_fast", [False, True], ids=["plain", "fast"])
def test_recomputing_activations_changes_no_number(part, way, is_fast):
    shape = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=16, dropout=0.2)
    if part in MIXTURES:
        shape |= {"ffn_type": "moe", "part_options": {"n_experts": 4, "router_bias_rate": 0.01, **MIXTURES[part]}}
    else:
        shape["block_pattern"] = part
    config = ModelArchitectureConfig(**shape)
    expected, kept = gradients_and_counts(config, "none", is_fast)
    found, again = gradients_and_counts(config, way, is_fast)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again, kept, rtol=1e-6, atol=1e-6)


def n_products(way):
    """Matrix products of forward and backward of two blocks."""
    model = ConfigurableGPT(ModelArchitectureConfig.from_preset("llama", n_layer=2, n_embd=16, n_head=2, vocab_size=64))
    training_recompute.checkpoint_activations(model, TrainConfig(gradient_checkpointing=way))

    class Counter(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.found += operator in training_recompute.PRODUCTS
            return operator(*args, **(kwargs or {}))

    with Counter() as counter:
        model(torch.zeros(1, 8, dtype=torch.int64))[0].sum().backward()
    return counter.found


def test_products_that_are_kept_are_not_computed_again():
    assert n_products("products") == n_products("none") < n_products("full")


def test_products_are_kept_with_less_memory_than_every_second_block():
    config = ModelArchitectureConfig.from_preset("llama", n_layer=4, n_embd=64, n_head=2, vocab_size=64, block_size=64)

    def held(way):
        train = TrainConfig(gradient_checkpointing=way, kernel_backend="plain")
        return step_memory(Settings(config, train, [], {}), Place(CPU, "float32", tf32=False)).kinds["activations"]

    assert held("full") < held("products") < held("selective") < held("none")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["attention", "gru"])
def test_products_are_kept_where_blocks_are_compiled(monkeypatch, pattern):
    config = ModelArchitectureConfig(
        n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=16, block_pattern=pattern
    )  # fmt: skip
    expected, _ = gradients_and_counts(config, "none", False)
    checkpointed = training_recompute.checkpoint_activations

    def then_compiled(model, train):
        checkpointed(model, train)
        for block in model.blocks:
            block.compile(backend="aot_eager")

    monkeypatch.setattr(training_recompute, "checkpoint_activations", then_compiled)
    found, _ = gradients_and_counts(config, "products", False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_recomputes_logs_the_same(workshop):
    settings = (*MOE, "--n_layer=2", "--dropout=0.2", "--gradient_accumulation_steps=2")
    plain, again = workshop.run(*settings), workshop.run(*settings, "--gradient_checkpointing=full")
    assert_same_run(plain, again, 8)


@pytest.mark.parametrize("way, which", [("none", ""), ("full", "abcd"), ("selective", "bd"), ("products", "")])
def test_which_blocks_are_computed_again(way, which):
    assert training_recompute.recomputed("abcd", TrainConfig(gradient_checkpointing=way)) == which


@pytest.mark.parametrize("way, most", [("full", 0.35), ("selective", 0.7), ("products", 0.8)])
def test_less_is_kept_between_forward_and_backward(way, most):
    def kept(gradient_checkpointing):
        model = ConfigurableGPT(ModelArchitectureConfig(n_layer=4, n_embd=32, n_head=2, vocab_size=64, block_size=64))
        training_recompute.checkpoint_activations(model, TrainConfig(gradient_checkpointing=gradient_checkpointing))
        found, weights = [], {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden_states(torch.zeros(2, 64, dtype=torch.int64))
        return sum(tensor.nbytes for tensor in found)

    assert kept(way) < most * kept("none")


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
    assert training_place._device("auto", None) == torch.device(device)


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
    assert training_place._device("cuda:1", None) == torch.device("cuda", 1)
    assert training_place._device("cuda", 1) == torch.device("cuda", 1)  # a rank takes the GPU of its number
    with pytest.raises(UserError, match=r"device='cuda:5' does not exist: torch sees 2 GPU"):
        training_place._device("cuda:5", None)


@pytest.mark.parametrize(
    "dtype, supported, chosen", [("auto", True, "bfloat16"), ("auto", False, "float16"), ("float32", True, "float32")]
)
def test_on_cuda_auto_is_the_half_precision_that_the_gpu_has(monkeypatch, dtype, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert training_place._dtype(dtype, torch.device("cuda", 0)) == chosen
    assert training_place._dtype(dtype, CPU) == "float32"


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
    def call(*inputs):
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


def test_blocks_are_compiled_in_their_places_and_put_back_where_that_fails(monkeypatch):
    train_config = TrainConfig()
    objective = OBJECTIVE_REGISTRY["causal_lm"](ConfigurableGPT(ModelArchitectureConfig(
        n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=8)), train_config)  # fmt: skip
    batch = dict.fromkeys(("inputs", "targets"), torch.zeros(1, 8, dtype=torch.int64))
    called = []

    def compiler(function):
        return lambda *inputs: called.append(function.__self__) or function(*inputs)

    place = Place(CPU, "float32", tf32=False)
    monkeypatch.setattr(torch, "compile", compiler)
    assert parallel.compile_module(objective, batch, place, by_block=True) == (objective, "on")
    assert called == [objective.model.blocks[0]]  # of one kind
    monkeypatch.setattr(torch, "compile", breaks_when_called)
    module, happened = parallel.compile_module(objective, batch, place, by_block=True)
    assert module is objective and happened.startswith("off: torch.compile failed (Dynamo is not supported here)")
    objective(batch)


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
    assert training_ranks.sum_over_ranks(tensor, place) is tensor
    assert training_ranks.gather("mine", place) == ["mine"]
    assert training_ranks.any_rank(None, place) is False and training_ranks.any_rank(15, place) is True
    floats = training_ranks.to_host([torch.tensor(1), torch.tensor(2.5), torch.tensor(math.inf)], place)
    assert floats == [1.0, 2.5, math.inf]
    module = torch.nn.Linear(2, 2)
    assert parallel.wrap(module, module, place, TrainConfig()) is module
    with parallel.gradient_sync(module, False, TrainConfig()):
        pass
    with training_place.joined(place):
        pass
    assert_same(training_place.peak_memory_bytes(place) > 2**20, True)
