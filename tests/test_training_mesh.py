"""Heads, hidden units and experts over several ranks: every way to share them trains what one process does."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import itertools
import shutil
import time

import pytest
import torch

import training_mesh
import training_parallel as parallel
import training_place
from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT
from model_components import FFN_REGISTRY
from model_config import ModelArchitectureConfig
from training_config import TrainConfig
from training_helpers import (
    ROOT,
    Workshop,
    assert_same,
    assert_same_training,
    book,
    launch,
    read_json,
    rows,
    torchrun,
    workshop,
)
from training_place import Place
from user_errors import UserError

CPU = torch.device("cpu")

# An objective whose rows hold two documents and end early, each elsewhere: ranks supervise different numbers of tokens.
PADDED = """
import torch
from model_config import IGNORE_INDEX
from training_objectives import OBJECTIVE_REGISTRY, CausalLM

@OBJECTIVE_REGISTRY("padded")
class Padded(CausalLM):
    def prepare(self, batch, key):
        places = torch.arange(batch["inputs"].size(1))
        window = batch["window"][:, None]
        ends = places >= batch["inputs"].size(1) - window * 7 % 11
        return {
            **batch, "document_ids": (places > window * 5 % 13).long(),
            "targets": batch["targets"].masked_fill(ends, IGNORE_INDEX),
        }

objective = "padded"
"""

# ... and one whose second rank fails in its third step.
FAILING = (
    PADDED.replace("padded", "failing")
    + """
import os
prepare = Padded.prepare

def fail(self, batch, key):
    fail.calls += 1
    if os.environ["RANK"] == "1" and fail.calls == 3:
        raise ArithmeticError("rank 1 cannot go on")
    return prepare(self, batch, key)

fail.calls = 0
Padded.prepare = fail
"""
)

STEPS = ("padded.py", "--n_layer=2", "--n_head=4", "--max_iters=10", "--batch_size=2", "--warmup_iters=2",
         "--lr_decay_iters=10", "--eval_interval=1000", "--sample_tokens=8")  # fmt: skip
MOE = ("--ffn_type=moe", "--n_experts=4", "--n_shared_experts=1", "--load_balance_loss=0.1", "--router_bias_rate=0.01")
KINDS = {
    "transformer": ("--arch_preset=llama", "--n_kv_head=4", "--bias=True", "--weight_tying=True",
                    "--gradient_checkpointing=products"),
    "moe": MOE,
    "mamba": ("--block_pattern=mamba",),
    "lstm": ("--block_pattern=lstm",),
    "muon": ("--optimizer=muon", "--max_iters=4", "--lr_decay_iters=4"),
    "norms": (*MOE, "--qk_norm=True", "--n_kv_head=2", "--grad_clip=0.05", "--gradient_checkpointing=full",
              "--layer_stats_interval=2"),
}  # fmt: skip
ARCHITECTURES = ("transformer", "moe", "mamba", "lstm")
FSDP = "--use_fsdp=True"


def steps_of(kind):
    return 4 if kind == "muon" else 10


class Ranks:
    """Runs of n ranks by name, beside the same of one process."""

    def __init__(self, shop, n):
        self.shop, self.n, self.text, self.alone = shop, n, "", {}
        self.accumulation = f"--gradient_accumulation_steps={2 * n}"
        (shop.folder / "padded.py").write_text(PADDED, encoding="utf-8")

    def command(self, kind, *settings, name):
        return self.shop.command(*STEPS, self.accumulation, *KINDS[kind], *settings, name=name)

    def launch(self, commands):
        self.shop.run("--max_iters=1", "--eval_interval=1")  # prepares the data
        self.text = launch(self.shop, commands, self.n, timeout=1500)

    def of_one_process(self, kind, monkeypatch):
        if kind not in self.alone:
            monkeypatch.chdir(self.shop.folder)
            self.alone[kind] = self.shop.run(*STEPS, self.accumulation, *KINDS[kind], name=kind)
        return self.alone[kind]


def assert_equal(ranks, kind, mode, monkeypatch, named):
    together, alone = ranks.shop.runs / f"{kind} {mode}", ranks.of_one_process(kind, monkeypatch)
    # Muon multiplies in bfloat16, and shared heads stand in another order
    assert_same_training(together, alone, steps_of(kind), atol=1e-3 if kind == "muon" else 1e-5)
    assert read_json(together / "config.json")["resolved"]["parallel"] == named
    texts = [(folder / "sample.txt").read_text(encoding="utf-8") for folder in (together, alone)]
    assert kind == "muon" or texts[0] == texts[1] != "\n"
    for one, other in zip(rows(together, "train"), rows(alone, "train"), strict=True):
        assert one.keys() == other.keys()
        for column in {"gradient_norms", "weight_norms"} & one.keys():
            assert one[column] == pytest.approx(other[column], rel=1e-3, abs=1e-5)


# ---- two ranks -------------------------------------------------------------------------------------------------------

TWO = {
    "TP 2": (("--tensor_parallel=2",), (*ARCHITECTURES, "norms")),
    "FSDP2, TP 2": (("--tensor_parallel=2", FSDP), ("transformer",)),
    "FSDP2, EP 2": (("--expert_parallel=2", FSDP), ("norms",)),
    "HSDP 2": (("--fsdp_replicas=2", FSDP), ("transformer", "norms")),
}
CASES_OF_TWO = [(kind, mode) for mode, (_, kinds) in TWO.items() for kind in kinds]
REFUSED = {
    "--tensor_parallel=3": "tensor_parallel=3 does not divide 2 processes; start a multiple of it, or lower it",
    "--tensor_parallel=2 --n_head=3 --n_embd=24":
        "tensor_parallel=2 does not divide n_head=3; change one of them",
    "--tensor_parallel=2 --block_pattern=mamba/none":
        "tensor_parallel=2 finds nothing to split: block_pattern='mamba/none' with ffn_type='standard' has no "
        "attention and no FFN; use tensor_parallel=1",
    "--expert_parallel=2 --use_fsdp=True --ffn_type=moe --n_experts=3":
        "expert_parallel=2 does not divide n_experts=3; change one of them",
    "--fsdp_replicas=3 --use_fsdp=True": "fsdp_replicas=3 does not divide 2 processes; change one of them",
    "--tensor_parallel=2 --dtype=float16":
        "dtype=float16 needs its gradients scaled, which tensor_parallel=2 does not do; use dtype=bfloat16 or float32",
    "--seed={rank}":
        "rank 1 runs with seed=1 and rank 0 with seed=0; start every rank from the same files with the same settings",
    "--init_from=resume --run_name=other":
        "is of another architecture: token_embedding.weight is (256, 16) there and (256, 32) here",
}  # fmt: skip


@pytest.fixture(scope="module")
def two(book, tmp_path_factory):
    ranks = Ranks(Workshop(tmp_path_factory.mktemp("two"), book), 2)
    shop = ranks.shop
    other = shop.run("--max_iters=1", "--gradient_accumulation_steps=2", name="other")
    changed = (other / "config.json").read_text(encoding="utf-8").replace('"n_embd": 16', '"n_embd": 32')
    (other / "config.json").write_text(changed, encoding="utf-8")
    commands = [ranks.command(kind, *TWO[mode][0], name=f"{kind} {mode}") for kind, mode in CASES_OF_TWO]
    commands += [
        ranks.command("transformer", "--tensor_parallel=2", "--max_iters=5", name="halved"),
        [f"--runs_dir={shop.runs}", "--init_from=resume", "--run_name=halved", "--max_iters=10"],
        ranks.command("moe", "--expert_parallel=2", FSDP, "--max_iters=5", name="halved moe"),
        [f"--runs_dir={shop.runs}", "--init_from=resume", "--run_name=halved moe", "--max_iters=10", "--use_fsdp=False",
         "--expert_parallel=1", "--tensor_parallel=2"],
        ranks.command("transformer", "--fsdp_cpu_offload=True", FSDP, name="offloaded"),
        ranks.command("norms", "--fsdp_accumulate=whole", FSDP, name="whole gradients"),
        *([*shop.data, f"--runs_dir={shop.runs}", *settings.split()] for settings in REFUSED),
    ]  # fmt: skip
    ranks.launch(commands)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind, mode", CASES_OF_TWO)
def test_two_ranks_train_what_one_does(two, workshop, monkeypatch, kind, mode):
    assert_equal(two, kind, mode, monkeypatch, named=mode)


@pytest.mark.slow
def test_a_split_run_goes_on_and_in_another_mode(two, workshop, monkeypatch):
    assert_same_training(two.shop.runs / "halved", two.of_one_process("transformer", monkeypatch))
    assert_same_training(two.shop.runs / "halved moe", two.of_one_process("moe", monkeypatch))


@pytest.mark.slow
def test_whole_gradients_sent_once_are_those_of_each_micro_batch(two, workshop, monkeypatch):
    assert_same_training(two.shop.runs / "whole gradients", two.of_one_process("norms", monkeypatch))


@pytest.mark.slow
def test_weights_are_kept_where_the_policy_says(two, workshop, monkeypatch):
    """On a CPU there is nowhere else to keep them: this shows that the policy reaches FSDP2 and changes nothing."""
    assert_same_training(two.shop.runs / "offloaded", two.of_one_process("transformer", monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("settings", REFUSED)
def test_what_ranks_cannot_share_is_refused_on_each(two, settings):
    lines = [line for line in two.text.splitlines() if line.startswith("error: ")]
    assert sum(line.endswith(REFUSED[settings]) for line in lines) == 1, lines


@pytest.mark.slow
def test_all_ranks_leave_and_rank_0_speaks_for_them(two):
    assert two.text.count("left with 2\n") == 2 * len(REFUSED)
    others = [line for line in two.text.splitlines() if line.startswith("error on rank 1: ")]
    assert len(others) == sum("process" in REFUSED[settings] or "float16" in settings for settings in REFUSED)


def test_a_failing_rank_ends_the_job_with_its_own_traceback(book, tmp_path):
    shop = Workshop(tmp_path, book)
    shop.run("--max_iters=1", "--eval_interval=1")
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    t0 = time.perf_counter()
    done = torchrun(tmp_path, 2, ROOT / "train.py", *shop.command("failing.py", "--gradient_accumulation_steps=2"))
    assert done.returncode != 0 and time.perf_counter() - t0 < 60
    assert "ArithmeticError: rank 1 cannot go on" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 2  # its own, and torchrun's


# ---- four ranks ------------------------------------------------------------------------------------------------------

FOUR = {
    "DDP": (),
    "ZeRO-1": ("--use_zero1=True",),
    "FSDP2": (FSDP,),
    "HSDP 2": (FSDP, "--fsdp_replicas=2"),
    "FSDP2, TP 2": (FSDP, "--tensor_parallel=2"),
    "HSDP 2, TP 2": (FSDP, "--tensor_parallel=2", "--fsdp_replicas=2"),
    "TP 4": ("--tensor_parallel=4",),
}
EXPERTS = {
    "FSDP2, EP 2": (FSDP, "--expert_parallel=2"),
    "FSDP2, EP 4": (FSDP, "--expert_parallel=4"),
    "HSDP 2, EP 2": (FSDP, "--expert_parallel=2", "--fsdp_replicas=2"),
    "FSDP2, TP 2, EP 2": (FSDP, "--tensor_parallel=2", "--expert_parallel=2"),
}
CASES_OF_FOUR = [
    *itertools.product((*ARCHITECTURES, "muon"), FOUR),
    *itertools.product(("norms",), [mode for mode in FOUR if mode != "TP 4"]),  # of two key-value heads
    *itertools.product(("moe", "norms"), EXPERTS),
]
PASSED_ON = [  # a run of 10 steps on four ranks, then two, then one
    ("FSDP2, TP 2", "--tensor_parallel=2", "--use_fsdp=False"),
    ("FSDP2, EP 4", "--expert_parallel=2", "--use_fsdp=True"),
]


@pytest.fixture(scope="module")
def four(book, tmp_path_factory):
    ranks = Ranks(Workshop(tmp_path_factory.mktemp("four"), book), 4)
    settings = {**FOUR, **EXPERTS}
    commands = [ranks.command(kind, *settings[mode], name=f"{kind} {mode}") for kind, mode in CASES_OF_FOUR]
    for mode, *_ in PASSED_ON:
        commands.append(ranks.command("moe", *settings[mode], "--max_iters=4", name=f"passed on {mode}"))
        commands.append([f"--runs_dir={ranks.shop.runs}", "--init_from=resume", f"--run_name=passed on {mode}",
                         "--max_iters=6"])  # fmt: skip
    ranks.launch(commands)
    resumed = [
        [
            f"--runs_dir={ranks.shop.runs}",
            "--init_from=resume",
            f"--run_name=passed on {mode}",
            "--max_iters=8",
            *changes,
        ]
        for mode, *changes in PASSED_ON
    ]
    launch(ranks.shop, resumed, 2)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind, mode", CASES_OF_FOUR)
def test_four_ranks_train_what_one_does(four, workshop, monkeypatch, kind, mode):
    assert_equal(four, kind, mode, monkeypatch, named=mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode, *_ in PASSED_ON])
def test_four_ranks_then_two_then_one_train_what_one_does(four, workshop, monkeypatch, mode):
    alone = four.of_one_process("moe", monkeypatch)
    folder = workshop.resume(
        four.shop.runs / f"passed on {mode}", "--max_iters=10", "--use_fsdp=False", "--tensor_parallel=1",
        "--expert_parallel=1",
    )  # fmt: skip
    assert_same_training(folder, alone)


# ---- what parts declare ----------------------------------------------------------------------------------------------


def place_of(world_size, **sizes):
    return Place(CPU, "float32", False, 0, 0, world_size, **sizes)


def parts_that_split():
    for registry, slot in ((MIXER_REGISTRY, "block_pattern"), (FFN_REGISTRY, "ffn_type")):
        for name, part in registry.items():
            if getattr(part, "split_columns", None):
                yield pytest.param({slot: name}, id=name)


def share_of(linear, names, n, rank, dim):
    """What one of n ranks keeps of a linear layer, as a linear layer."""
    own = torch.nn.Linear(1, 1, bias=linear.bias is not None)
    own.weight = torch.nn.Parameter(linear.weight.chunk(n, dim)[rank].detach())
    if linear.bias is not None:
        bias = linear.bias.chunk(n)[rank] if dim == 0 else linear.bias / n
        own.bias = torch.nn.Parameter(bias.detach())
    return own


@pytest.mark.parametrize("settings", [*parts_that_split()])
@pytest.mark.parametrize("n", [2, 4])
def test_the_shares_of_a_part_add_up_to_it(settings, n):
    """What `training_mesh` does with DTensors, by hand in one process: columns, rows, and the sum over the ranks."""
    config = ModelArchitectureConfig(
        n_layer=1, n_head=8, n_embd=32, vocab_size=32, block_size=8, bias=True, position_encoding="rope", **settings,
        part_options={"n_kv_head": 4, "qk_norm": True} if "block_pattern" in settings else {},
    )  # fmt: skip
    block = ConfigurableGPT(config).double().blocks[0]
    slot = "mixer" if "block_pattern" in settings else "ffn"
    x, total = torch.randn(2, 8, 32, dtype=torch.float64), 0
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = getattr(block, slot)(x)
    for rank in range(n):
        part = getattr(ConfigurableGPT(config).double().blocks[0], slot)
        part.load_state_dict(getattr(block, slot).state_dict())
        part.check_split(n)
        for name, sizes in part.split_columns.items():
            linear = getattr(part, name)
            if sizes is not None:
                order = training_mesh.rows_by_rank(getattr(part, sizes), n)
                linear.load_state_dict({key: value[order] for key, value in linear.state_dict().items()})
            setattr(part, name, share_of(linear, name, n, rank, dim=0))
        for name in part.split_rows:
            setattr(part, name, share_of(getattr(part, name), name, n, rank, dim=1))
        total = total + part(x)
    torch.testing.assert_close(total, whole)


def test_rows_of_fused_parts_go_to_ranks_and_back():
    order = training_mesh.rows_by_rank((4, 2, 2), 2)
    assert order.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    rows = torch.arange(8.0)[:, None] * 10
    assert training_mesh.in_rank_order(rows, order)[:, 0].tolist() == [0, 10, 40, 60, 20, 30, 50, 70]
    assert_same(training_mesh.in_own_order(training_mesh.in_rank_order(rows, order), order), rows)
    assert training_mesh.in_rank_order(torch.tensor(3.0), order) == 3 and training_mesh.in_own_order(5, order) == 5


@pytest.mark.parametrize("settings, sizes, words", [
    ({"position_encoding": "alibi"}, {"tensor_parallel": 2}, "cannot split attention with position_encoding='alibi'"),
    ({"part_options": {"qk_norm": True, "qk_norm_scope": "projection"}}, {"tensor_parallel": 2},
     "cannot split attention with qk_norm_scope='projection'"),
    ({"part_options": {"n_kv_head": 1}}, {"tensor_parallel": 2}, "does not divide n_kv_head=1"),
    ({"part_options": {"ffn_hidden": 33}}, {"tensor_parallel": 2},
     "tensor_parallel=2 does not divide the FFN's 33 hidden units; set ffn_hidden to a multiple of 2"),
    ({}, {"expert_parallel": 2}, "expert_parallel=2 finds nothing to split"),
])  # fmt: skip
def test_a_part_that_cannot_be_shared_is_refused(tiny, settings, sizes, words):
    with pytest.raises(UserError) as error:
        training_mesh.check_model(ConfigurableGPT(tiny(**settings)), place_of(2, **sizes))
    assert words in str(error.value)


def test_mixers_that_declare_nothing_are_replicated(tiny):
    model = ConfigurableGPT(tiny(block_pattern="mamba,lstm"))
    training_mesh.check_model(model, place_of(2, tensor_parallel=2))
    assert [type(part).__name__ for part in training_mesh.parts_with(model, "split_columns")] == ["StandardFFN"] * 2


# ---- how ranks are laid out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, sizes, name", [
    ({}, {}, "DDP"),
    ({"use_zero1": True}, {}, "ZeRO-1"),
    ({"use_fsdp": True}, {"replicas": 4}, "HSDP 4"),
    ({"use_fsdp": True}, {"tensor_parallel": 2, "expert_parallel": 4}, "FSDP2, TP 2, EP 4"),
    ({}, {"tensor_parallel": 8}, "TP 8"),
])  # fmt: skip
def test_a_mode_has_a_name(settings, sizes, name):
    assert parallel.mode(TrainConfig(**settings), place_of(8, **sizes)) == name


def test_neighbours_share_heads_and_read_the_same_data():
    ranks = [Place(CPU, "float32", False, rank, rank, 4, tensor_parallel=2) for rank in range(4)]
    assert [place.data_rank for place in ranks] == [0, 0, 1, 1] and {place.data_size for place in ranks} == {2}


@pytest.mark.parametrize("settings, n, sentence", [
    ({"tensor_parallel": 2}, 1, "tensor_parallel=2 does not divide 1 process; start a multiple of it, or lower it"),
    ({"tensor_parallel": 2}, 4, "tensor_parallel=2 of 4 processes leaves 2 groups with data of their own; "
                                "set use_fsdp=True, which shards over them"),
    ({"use_fsdp": True, "tensor_parallel": 2, "fsdp_replicas": 4}, 4,
     "fsdp_replicas=4 does not divide 4 processes with tensor_parallel=2; change one of them"),
    ({"use_fsdp": True, "expert_parallel": 4, "fsdp_replicas": 2}, 4,
     "expert_parallel=4 does not divide 4 processes with fsdp_replicas=2; change one of them"),
])  # fmt: skip
def test_processes_that_cannot_be_shared_out_are_refused(settings, n, sentence):
    config = TrainConfig(**settings)
    sizes = {"replicas": config.fsdp_replicas, "tensor_parallel": config.tensor_parallel}
    with pytest.raises(UserError) as error:
        training_place.check_world(config, place_of(n, **sizes, expert_parallel=config.expert_parallel))
    assert str(error.value) == sentence


def test_ranks_with_other_code_are_told_apart():
    mine = {"code": "abc", "torch": "2.13", "seed": 1}
    assert training_place.difference([mine, mine, {**mine, "code": "abd"}]).startswith(
        "rank 2 runs with code='abd' and rank 0 with code='abc'; start every rank from the same files"
    )
    assert "with seed=None and rank 0 with seed=1" in training_place.difference(
        [mine, {"code": "abc", "torch": "2.13"}]
    )


def test_the_code_is_every_file_beside_the_scripts(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "train.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(training_place, "__file__", str(tmp_path / "training_place.py"))
    before = training_place.code_hash()
    (tmp_path / "notes.md").write_text("no code", encoding="utf-8")
    assert training_place.code_hash() == before
    (tmp_path / "kernels" / "grouped.py").write_text("2", encoding="utf-8")
    assert training_place.code_hash() != before
