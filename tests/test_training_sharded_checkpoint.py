"""Checkpoints in shards: written beside training, whole or absent, and read by other ranks, modes and programs."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import evaluate
import sample
import training_checkpoint as checkpoint
import training_sharded_checkpoint as sharded
from model_builder import ConfigurableGPT, parameter_plan
from test_scripts import main_of
from test_training_checkpoint import flip, halve
from test_training_parallel import MODES, MOE, STEPS, assert_same_training, launch
from training_config import TrainConfig
from training_helpers import (
    ROOT,
    Workshop,
    assert_same,
    assert_same_run,
    book,
    environment,
    files_in,
    read_json,
    steps_of_checkpoints,
    summary,
    training_state,
    weights,
    workshop,
)
from training_optim import OPTIMIZER_REGISTRY
from training_place import Place
from user_errors import UserError

ALONE = Place(torch.device("cpu"), "float32", tf32=False)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHARDED = "--checkpoint_format=sharded"
convert = main_of("convert_checkpoint")


@pytest.fixture
def model(tiny):
    return ConfigurableGPT(tiny(weight_tying=True))


def save(folder, model, step=3, afterwards=lambda: None, optimizers=()):
    with checkpoint.WRITERS["sharded"](folder, ALONE) as writer:
        writer.save(model, optimizers, {"ledger": {"step": step}}, {"global_step": step}, afterwards)
    return folder / f"checkpoint-{step}"


# ---- one process ----------------------------------------------------------------------------------------------------


SETTINGS = (*MOE, "--optimizer=muon", "--dropout=0.2", "--weight_tying=True", "--lr_decay_iters=8")


@pytest.fixture(scope="module")
def made(book, tmp_path_factory):
    """Runs of one process: plain and sharded to step 8, half of it sharded to step 4."""
    shop = Workshop(tmp_path_factory.mktemp("made"), book)
    shop.run(*SETTINGS, name="plain")
    shop.run(*SETTINGS, SHARDED, name="sharded")
    shop.run(*SETTINGS, SHARDED, "--max_iters=4", name="half")
    return shop.runs


@pytest.fixture
def copies(made, workshop):
    """The runs of `made`, to change."""
    shutil.copytree(made, workshop.runs)
    return workshop.runs


def test_a_sharded_checkpoint_holds_what_an_unsharded_one_does(made):
    plain, folder = made / "plain", made / "sharded"
    assert {path.name for path in (folder / "checkpoint-8").iterdir()} == {
        "shards", "training_state.pt", "metadata.json",
    }  # fmt: skip
    tensors, state, _ = checkpoint.read_whole(folder / "checkpoint-8")
    assert_same(tensors, weights(plain, 8))
    assert_same(state["optimizers"], training_state(plain, 8)["optimizers"])
    assert_same(state["random_states"], training_state(plain, 8)["random_states"])


@pytest.mark.parametrize("then", ["sharded", "unsharded"])
def test_a_run_goes_on_from_shards_exactly_and_in_either_format(workshop, copies, then):
    folder = workshop.resume(copies / "half", "--max_iters=8", f"--checkpoint_format={then}")
    if then == "sharded":
        convert([str(folder / "checkpoint-8")])
    assert_same_run(copies / "plain", folder, 8)


def test_a_converted_checkpoint_is_an_unsharded_one_and_the_shards_stay(workshop, copies):
    plain, folder = copies / "plain", copies / "sharded"
    target = folder / "checkpoint-8"
    shards = files_in(target)
    workshop.printed()
    convert([str(target)])
    assert workshop.printed() == f"{target} is unsharded\n"
    assert {path.name for path in target.iterdir()} == {path.name for path in (plain / "checkpoint-8").iterdir()}
    assert_same_run(plain, folder, 8)
    assert checkpoint.read_metadata(target)["global_step"] == 8
    assert files_in(folder / "sharded-checkpoint-8") == shards
    assert "no sharded checkpoint" in workshop.refused(target, main=convert)
    assert "checkpoint-8 exists" in workshop.refused(folder / "sharded-checkpoint-8", main=convert)
    shutil.rmtree(target)  # as if it had been killed in between
    convert([str(folder / "sharded-checkpoint-8")])
    assert_same(weights(folder, 8), weights(plain, 8))


def test_sample_and_evaluate_read_shards_as_they_are(workshop, copies):
    texts = []
    for name in ("plain", "sharded"):
        workshop.printed()
        sample.main([f"--run_name={name}", f"--runs_dir={copies}", "--start=the", "--max_new_tokens=20"])
        texts.append(workshop.printed())
    assert texts[0] == texts[1] and texts[0].strip()
    evaluate.main(["--run_names", "plain", "sharded", "--runs_dir", str(copies), "--loss", "--loss_tokens", "200",
                   "--out_dir", str(workshop.folder / "out")])  # fmt: skip
    found, expected = (read_json(copies / name / "evals.jsonl")["parts"] for name in ("sharded", "plain"))
    assert found == expected and found["whole"]["all"]["targets"] == 192


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path, model, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    writing = sharded._Writer.write_data

    def later(self, plan, planner):
        begun.set()
        assert go_on.wait(30)
        return writing(self, plan, planner)

    monkeypatch.setattr(sharded._Writer, "write_data", later)
    before, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    with checkpoint.WRITERS["sharded"](tmp_path, ALONE) as writer:
        writer.save(model, [], {}, {"global_step": 3}, lambda: seen.append(checkpoint.list_checkpoints(tmp_path)))
        assert begun.wait(30) and checkpoint.list_checkpoints(tmp_path) == [] and seen == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)  # training goes on
        go_on.set()
    assert seen == [[(3, tmp_path / "checkpoint-3")]]
    checkpoint.load_model(model, tmp_path / "checkpoint-3")
    assert_same(dict(model.state_dict()), before)


def test_one_step_is_saved_once(tmp_path, model):
    seen = []
    with checkpoint.WRITERS["sharded"](tmp_path, ALONE) as writer:
        for step in (3, 3, 4):
            writer.save(model, [], {}, {"global_step": step}, lambda: seen.append(1))
    assert len(seen) == 2 and steps_of_checkpoints(tmp_path) == [3, 4]


def test_pruning_waits_for_the_checkpoint_that_takes_the_place(workshop):
    folder = workshop.run(SHARDED, "--checkpoint_interval=1", "--keep_checkpoints=2")
    assert steps_of_checkpoints(folder)[-2:] == [7, 8] and len(steps_of_checkpoints(folder)) <= 3
    assert not [*folder.glob(".*.tmp")]


@pytest.mark.parametrize("point", ["sha256", "_sync", "write_json", "os.replace"])
def test_whenever_the_process_dies_a_folder_that_exists_is_whole(tmp_path, model, monkeypatch, point):
    def kill(*_):
        raise SystemExit("killed")

    save(tmp_path, model, 1)
    before = files_in(tmp_path / "checkpoint-1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if point == "os.replace" else checkpoint, point.split(".")[-1], kill)
        with pytest.raises(SystemExit):
            save(tmp_path, model, 2)
    assert (tmp_path / ".checkpoint-2.tmp").is_dir()
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert files_in(tmp_path / "checkpoint-1") == before
    checkpoint.set_aside(tmp_path, 1)  # as a run that goes on does
    save(tmp_path, model, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-5"]


def test_a_full_disk_costs_one_sentence_and_the_step_before_stays(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path, model, 1)
    monkeypatch.setattr(sharded._Writer, "write_data", full)
    with pytest.raises(UserError, match=r"checkpoint-2 could not be written \(.*No space left on device\); make room"):
        save(tmp_path, model, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_optimizer_that_keeps_more_than_tensors_is_refused_while_there_is_something_to_lose(tmp_path, model):
    optimizers = OPTIMIZER_REGISTRY["adamw"](
        parameter_plan(model), dict(model.named_parameters()), TrainConfig(), ALONE.device
    )
    optimizers[0].state[model.token_embedding.weight] = {"step": 3}
    with pytest.raises(UserError, match=r"checkpoint_format=sharded writes tensors alone, and .* is 3; use unsharded"):
        save(tmp_path, model, optimizers=optimizers)


# ---- damage and strangers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, spoil, words", [
    ("shards/__0_0.distcp", flip, "shards/__0_0.distcp does not match its checksum"),
    ("shards/__0_0.distcp", lambda path: path.unlink(), "shards/__0_0.distcp is missing"),
    ("shards/.metadata", halve, "shards/.metadata does not match its checksum"),
    ("training_state.pt", flip, "training_state.pt does not match its checksum"),
])  # fmt: skip
def test_damage_costs_one_sentence_that_names_another_checkpoint(tmp_path, model, name, spoil, words):
    save(tmp_path, model, 2)
    folder = save(tmp_path, model, 7)
    spoil(folder / name)
    with pytest.raises(UserError) as error:
        checkpoint.read_metadata(folder)
    assert words in str(error.value) and "--resume_step=2" in str(error.value)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_whole(folder)


@pytest.mark.parametrize("spoil", [halve, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_shards_that_cannot_be_read_cost_one_sentence_though_checksums_fit(tmp_path, model, name, spoil):
    folder = save(tmp_path, model)
    spoil(folder / "shards" / name)
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged: shards cannot be read"):
        checkpoint.load_model(model, folder)


def test_no_code_is_run_that_a_strangers_metadata_might_hold(tmp_path, model):
    class Code:
        def __reduce__(self):
            return exec, ("raise SystemExit('the code ran')",)

    folder = save(tmp_path, model)
    (folder / "shards" / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match="shards cannot be read"):
        checkpoint.load_model(model, folder)


def test_every_dtype_of_weights_passes(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        module = torch.nn.Module()
        module.register_buffer("a", torch.tensor([[1, 0, 3]]).to(dtype))
        folder, before = save(tmp_path / str(dtype), module), module.a.clone()
        module.a.zero_()
        checkpoint.load_model(module, folder)
        assert torch.equal(module.a, before)


@pytest.mark.parametrize("changes, words", [
    ({"n_embd": 32}, "(29, 16) there and (29, 32) here"), ({"n_layer": 3}, "blocks.2"),
    ({"weight_tying": False}, "head.weight"),
], ids=str)  # fmt: skip
def test_weights_of_another_architecture_are_refused(tmp_path, tiny, model, changes, words):
    folder = save(tmp_path, model)
    with pytest.raises(UserError) as error:
        checkpoint.load_model(ConfigurableGPT(tiny(**changes)), folder)
    assert "another architecture" in str(error.value) and words in str(error.value)


def test_shards_with_the_heads_of_an_objective_fill_a_model_without(tmp_path, tiny):
    with_heads = ConfigurableGPT(tiny(), seed=1, heads={"win": 1})
    folder, bare = save(tmp_path, with_heads), ConfigurableGPT(tiny(), seed=2)
    checkpoint.load_model(bare, folder)
    assert all(torch.equal(tensor, with_heads.state_dict()[name]) for name, tensor in bare.state_dict().items())


def test_what_is_no_sharded_checkpoint_is_not_converted(workshop, made):
    folder = made / "plain"
    for argument in (folder, folder / "checkpoint-8", folder / "checkpoint-9"):
        assert f"{argument} is no sharded checkpoint" in workshop.refused(argument, main=convert)
    assert "no checkpoint is given" in workshop.refused(main=convert)


# ---- several ranks --------------------------------------------------------------------------------------------------

TP, EP = ("--tensor_parallel=2",), ("--use_fsdp=True", "--expert_parallel=2")
LLAMA = ("--arch_preset=llama", "--n_head=4", "--n_kv_head=2", "--bias=True")
PARTS = {  # what trains to step 5: (its settings, the mode in which it goes on, that mode's settings, of the model)
    "FSDP2": (MODES["FSDP2"], "DDP", (), ()),
    "ZeRO-1": (MODES["ZeRO-1"], "FSDP2", MODES["FSDP2"], MOE),
    "DDP": ((), "ZeRO-1", MODES["ZeRO-1"], ("--optimizer=muon",)),
    "TP 2": (
        TP,
        "FSDP2",
        MODES["FSDP2"],
        LLAMA,
    ),  # ranks hold rows in an order of theirs
    "FSDP2 before": (MODES["FSDP2"], "TP 2", TP, LLAMA),
    "TP 2 before": (TP, "FSDP2, TP 2", (*TP, *MODES["FSDP2"]), LLAMA),
    "EP 2": (EP, "TP 2", TP, MOE),
}
OFF = ("--use_fsdp=False", "--use_zero1=False", "--tensor_parallel=1", "--expert_parallel=1")


@pytest.fixture(scope="module")
def ranks(book, tmp_path_factory):
    """The Workshop in which two ranks trained in each mode to step 5 and in another to step 8."""
    shop = Workshop(tmp_path_factory.mktemp("shards"), book)
    commands, resume = [], (f"--runs_dir={shop.runs}", "--init_from=resume")
    for name, (before, _, after, model) in PARTS.items():
        commands += [
            shop.command(*STEPS, *model, *before, SHARDED, "--max_iters=5", name=name),
            [*resume, f"--run_name={name}", "--max_iters=8", *OFF, *after],
        ]
    shop.run("--max_iters=1")
    launch(shop, commands)
    return shop


@pytest.mark.parametrize("name", PARTS)
def test_two_ranks_go_on_in_another_mode_and_one_after_them(ranks, workshop, name):
    (_, after, _, model), folder = PARTS[name], ranks.runs / name
    assert {path.name for path in (folder / "checkpoint-5" / "shards").iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip
    assert read_json(folder / "config.json")["resolved"]["parallel"] == after
    workshop.resume(folder, "--max_iters=10", *OFF, "--checkpoint_format=unsharded")
    alone = workshop.run(*STEPS, *model)
    assert_same_training(folder, alone, atol=1e-3 if name == "DDP" else 1e-5)  # Muon multiplies in bfloat16
    for tensor_name, tensor in weights(folder, 10).items():
        if name != "DDP":
            torch.testing.assert_close(tensor, weights(alone, 10)[tensor_name], rtol=0, atol=1e-5)
