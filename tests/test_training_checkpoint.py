"""Checkpoints: due when they should be, whole or absent, and read back with every byte checked."""

import itertools
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import training_checkpoint as checkpoint
from model_builder import ConfigurableGPT, parameter_plan
from training_checkpoint import checkpoint_steps, evaluation_steps, generated_counts, scheduled_steps, token_schedule
from training_config import TrainConfig
from training_helpers import assert_same, files_in
from training_optim import OPTIMIZER_REGISTRY
from training_weights import whole_weights
from user_errors import UserError

# ---- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, interval, steps", [
    (100, 20, {2, 5, 10, 20, 40, 60, 80, 100}),  # log-spaced early: learning is fast there
    (50, 20, {2, 5, 10, 20, 40, 50}),
    (4, 20, {2, 4}),
    (1, 250, {1}),
    (10, 1, set(range(1, 11))),
    (30, 8, {1, 2, 4, 8, 16, 24, 30}),
])  # fmt: skip
def test_evaluations_come_early_regularly_and_at_the_end(total, interval, steps):
    assert evaluation_steps(total, interval) == steps


def test_evaluations_of_a_longer_run_are_those_of_a_shorter_one_and_more():
    assert evaluation_steps(40, 20) <= evaluation_steps(100, 20)


@pytest.mark.parametrize("total, interval, steps", [
    (100, 25, {25, 50, 75, 100}), (90, 25, {25, 50, 75, 90}), (90, 0, {90}), (5, 25, {5}),
])  # fmt: skip
def test_checkpoints_come_regularly_and_at_the_end(total, interval, steps):
    assert checkpoint_steps(total, interval) == steps


# -- schedules in tokens


def schedule(total=1000, epoch=10_000, **changes):
    return token_schedule(TrainConfig(**changes), epoch, total)


@pytest.mark.parametrize("given, counts", [
    ("100,200,600", [100, 200, 600, 1000]),
    ("0.2k, 1_00", [100, 200, 1000]),
    ((600, 100, 600), [100, 600, 1000]),
    ("100,1000", [100, 1000]),
    ("100,1M", [100, 1000]),  # what lies beyond the end falls away
], ids=str)  # fmt: skip
def test_an_explicit_schedule_has_its_counts_and_the_end(given, counts):
    assert schedule(checkpoint_tokens=given) == counts


def test_without_a_schedule_there_is_none():
    assert schedule() == []


def test_the_first_epoch_is_log_spaced_with_both_ends():
    counts = generated_counts(10**6, 10**6, 20, "log", 5)
    assert len(counts) == 20 and (counts[0], counts[-1]) == (1000, 10**6)
    ratios = [late / early for early, late in itertools.pairwise(counts)]
    assert ratios == pytest.approx([1000 ** (1 / 19)] * 19, rel=1e-3)
    assert generated_counts(10**6, 10**6, 1, "log", 5) == [10**6]


def test_a_run_shorter_than_an_epoch_has_as_many():
    counts = schedule(total=10**5, epoch=10**9, first_epoch_checkpoints=20)
    assert len(counts) == 20 and (counts[0], counts[-1]) == (100, 10**5)


@pytest.mark.parametrize("spacing", ["log", "linear"])
def test_later_epochs_have_enough_and_end_with_a_count(spacing):
    E = 10**6
    counts = generated_counts(E, 4 * E, 20, spacing, 3)
    by_epoch = [[count for count in counts if epoch * E < count <= (epoch + 1) * E] for epoch in range(4)]
    # ln(2) / ln(1000^(1/19)) = 1.9, so 3 as the least that was asked for
    assert [len(part) for part in by_epoch] == [20, 3, 3, 3]
    assert [part[-1] for part in by_epoch] == [E, 2 * E, 3 * E, 4 * E]
    first = 2 ** (1 / 3) if spacing == "log" else 4 / 3
    assert by_epoch[1][0] == round(E * first)


def test_a_dense_first_epoch_goes_on_at_its_ratio():
    E = 10**6
    second = [count for count in generated_counts(E, 2 * E, 100, "log", 5) if count > E]
    assert len(second) == 10  # ln(2) / ln(1000^(1/99)) = 9.93
    assert [late / early for early, late in itertools.pairwise(second)] == pytest.approx([2**0.1] * 9, 1e-4)


def test_the_end_of_a_run_within_an_epoch_is_there():
    counts = schedule(total=25_000, epoch=10_000, first_epoch_checkpoints=4, min_checkpoints_per_epoch=2)
    assert counts[-1] == 25_000 and {10_000, 20_000} <= {*counts} and max(counts[:-1]) < 25_000


def test_a_count_belongs_to_the_first_step_at_or_beyond_it():
    assert scheduled_steps([100, 128, 129, 700], 64, 11) == {2: 128, 3: 129, 11: 700}
    assert scheduled_steps([1, 2, 3], 64, 1) == {1: 3}  # the latest stays
    for per_step in (1, 7, 64, 1000):
        for step, count in scheduled_steps([5, 100, 333, 5000], per_step, 5000).items():
            assert (step - 1) * per_step < count <= step * per_step


def test_runs_of_unequal_batch_have_one_schedule():
    changes = {"first_epoch_checkpoints": 8, "max_tokens": 30_000}
    small, large = (TrainConfig(batch_size=size, **changes) for size in (2, 32))
    counts = []
    for config in (small, large):
        total_tokens = config.total_tokens(config.batch_size * 16, 10_000)
        counts.append(token_schedule(config, 10_000, total_tokens))
    assert counts[0] == counts[1] and counts[0][-1] == 30_000


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny):
    return ConfigurableGPT(tiny(weight_tying=True))


STATE = {
    "ledger": {"step": 3},
    "optimizers": [{"w": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}],
    "stream": "ab",
}


def save(folder, model, step=3, state=STATE):
    return checkpoint.save_checkpoint(folder, whole_weights(model), state, {"global_step": step})


def test_a_checkpoint_comes_back_as_it_was(tmp_path, tiny, model):
    folder = save(tmp_path, model)
    assert folder == tmp_path / "checkpoint-3"
    other = ConfigurableGPT(tiny(weight_tying=True), seed=5)
    assert not torch.equal(other.head.weight, model.head.weight)
    checkpoint.load_model(other, folder)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.head.weight is other.token_embedding.weight
    assert_same(checkpoint.load_training_state(folder), STATE)
    assert checkpoint.read_metadata(folder)["global_step"] == 3


def test_names_are_those_of_the_bare_model_and_a_tied_weight_is_there_once(tmp_path, tiny, model):
    names = set(load_file(save(tmp_path, model) / "model.safetensors"))
    assert names == set(dict(model.named_parameters()))
    assert "token_embedding.weight" in names and "head.weight" not in names
    untied = ConfigurableGPT(tiny(weight_tying=False))
    assert {"token_embedding.weight", "head.weight"} <= set(load_file(save(tmp_path, untied, 4) / "model.safetensors"))


def test_the_training_state_holds_no_code(tmp_path, model):
    folder = save(tmp_path, model)
    torch.load(folder / "training_state.pt", weights_only=True)
    with pytest.raises(UserError, match=r"training_state\.pt cannot be read"):
        torch.save({"code": os.system}, folder / "training_state.pt")
        checkpoint.load_training_state(folder)


def kill(*_):
    raise SystemExit("killed")  # what no `except Exception` catches, as a real kill is caught by nothing


@pytest.mark.parametrize("point", ["save_file", "sha256", "_sync", "os.replace"])
def test_whenever_the_process_dies_a_folder_that_exists_is_whole(tmp_path, model, monkeypatch, point):
    save(tmp_path, model, 1)
    before = files_in(tmp_path / "checkpoint-1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if point == "os.replace" else checkpoint, point.split(".")[-1], kill)
        if point == "os.replace":
            patch.setattr(checkpoint, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(SystemExit):
            save(tmp_path, model, 2)
    assert (tmp_path / ".checkpoint-2.tmp").is_dir()
    assert checkpoint.list_checkpoints(tmp_path) == [(1, tmp_path / "checkpoint-1")]
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert files_in(tmp_path / "checkpoint-1") == before
    save(tmp_path, model, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-5",
    ]  # and nothing is left over


def test_writing_a_file_leaves_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    checkpoint.write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", kill)
        with pytest.raises(SystemExit):
            checkpoint.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    checkpoint.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    with pytest.raises(ValueError):
        checkpoint.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 3}


def test_pruning_keeps_the_latest_and_what_it_is_told(tmp_path, model):
    for step in (1, 2, 3, 10, 20):
        save(tmp_path, model, step)
    checkpoint.prune(tmp_path, 0)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [1, 2, 3, 10, 20]
    checkpoint.prune(tmp_path, 2, {2, None})
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [2, 10, 20]


def test_later_checkpoints_are_set_aside_and_replace_those_set_aside_before(tmp_path, model):
    for step in (1, 2, 3):
        save(tmp_path, model, step)
    checkpoint.set_aside(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "abandoned-checkpoint-3",
        "checkpoint-1",
        "checkpoint-2",
    ]
    save(tmp_path, model, 3, {"second": 1})
    checkpoint.set_aside(tmp_path, 2)
    assert checkpoint.load_training_state(tmp_path / "abandoned-checkpoint-3") == {"second": 1}
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


# ---- reading what is damaged ----------------------------------------------------------------------------------------


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a flipped bit in the weights": (
        lambda folder: flip(folder / "model.safetensors"),
        "model.safetensors does not match its checksum",
    ),
    "half of the weights": (
        lambda folder: halve(folder / "model.safetensors"),
        "model.safetensors does not match its checksum",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a flipped bit in the state": (
        lambda folder: flip(folder / "training_state.pt"),
        "training_state.pt does not match its checksum",
    ),
    "no state": (lambda folder: (folder / "training_state.pt").unlink(), "training_state.pt is missing"),
    "no metadata": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json cannot be read"),
    "half of the metadata": (lambda folder: halve(folder / "metadata.json"), "metadata.json cannot be read"),
    "metadata of bytes": (
        lambda folder: (folder / "metadata.json").write_bytes(b"\xff\xfe\x00"),
        "metadata.json cannot be read",
    ),
    "metadata that is a list": (
        lambda folder: (folder / "metadata.json").write_text("[]"),
        "metadata.json cannot be read",
    ),
    "checksums that are a list": (
        lambda folder: (folder / "metadata.json").write_text('{"checksums": [1]}'),
        "metadata.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_one_sentence_that_names_another_checkpoint(tmp_path, model, damage):
    save(tmp_path, model, 2)
    folder = save(tmp_path, model, 7)
    spoil, words = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError) as error:
        checkpoint.read_metadata(folder)
    sentence = str(error.value)
    assert words in sentence and "checkpoint-7 is damaged" in sentence
    assert "--resume_step=2" in sentence and "--step=2" in sentence
    assert "\n" not in sentence
    checkpoint.read_metadata(tmp_path / "checkpoint-2")


def test_damage_of_the_only_checkpoint_says_so(tmp_path, model):
    folder = save(tmp_path, model)
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match="no other checkpoint, so start it again under another run_name"):
        checkpoint.read_metadata(folder)


def test_weights_that_are_no_safetensors_cost_one_sentence(tmp_path, model):
    folder = save(tmp_path, model)
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        checkpoint.load_model(model, folder)


def test_a_later_format_is_not_guessed_at(tmp_path, model):
    folder = save(tmp_path, model)
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, "format": 99}))
    with pytest.raises(UserError, match="has format 99 and this version reads 1"):
        checkpoint.read_metadata(folder)


@pytest.mark.parametrize("changes, words", [
    ({"n_embd": 32}, ["another architecture", "(29, 16) there and (29, 32) here"]),
    ({"n_layer": 3}, ["another architecture", "blocks.2", "in one and not in the other"]),
    ({"n_layer": 1}, ["another architecture", "blocks.1", "in one and not in the other"]),
    ({"weight_tying": False}, ["another architecture", "head.weight"]),
    ({"ffn_type": "swiglu"}, ["another architecture", "ffn"]),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_weights_of_another_architecture_are_refused(tmp_path, tiny, model, changes, words):
    folder = save(tmp_path, model)
    other = ConfigurableGPT(tiny(**changes))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoint.load_model(other, folder)
    assert all(word in str(error.value) for word in words), error.value
    assert_same(dict(other.state_dict()), before)


def test_a_checkpoint_that_is_not_there(tmp_path, model):
    with pytest.raises(UserError, match=r"there is no run at .*nowhere"):
        checkpoint.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no checkpoint yet; start it again under another run_name"):
        checkpoint.find_checkpoint(tmp_path)
    save(tmp_path, model, 2)
    save(tmp_path, model, 10)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    with pytest.raises(UserError, match="no checkpoint at step 5; it has 2, 10"):
        checkpoint.find_checkpoint(tmp_path, 5)
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint.find_checkpoint(tmp_path, 2) == tmp_path / "checkpoint-2"


# ---- optimizers and random state ------------------------------------------------------------------------------------


def optimizers_of(model, name):
    return OPTIMIZER_REGISTRY[name](
        parameter_plan(model), dict(model.named_parameters()), TrainConfig(), torch.device("cpu")
    )


def step(model, optimizers, seed):
    idx = torch.randint(0, 29, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", sorted(OPTIMIZER_REGISTRY))
def test_an_optimizer_goes_on_where_it_was(tmp_path, tiny, model, name):
    optimizers = optimizers_of(model, name)
    for seed in range(3):
        step(model, optimizers, seed)
    state = checkpoint.optimizer_state(optimizers)
    assert {key for states in state for key in states} == set(dict(model.named_parameters()))
    folder = save(tmp_path, model, state={"optimizers": state})
    other = ConfigurableGPT(tiny(weight_tying=True), seed=9)
    checkpoint.load_model(other, folder)
    its_own = optimizers_of(other, name)
    checkpoint.restore(other, its_own, checkpoint.load_training_state(folder), folder)
    step(model, optimizers, 3)
    step(other, its_own, 3)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_state_of_another_optimizer_is_refused(tmp_path, model):
    saved = checkpoint.optimizer_state(optimizers_of(model, "adamw"))
    with pytest.raises(UserError, match="trained with another optimizer"):
        checkpoint.restore(model, optimizers_of(model, "muon"), {"optimizers": saved}, tmp_path)


def test_the_random_state_comes_back():
    cpu = torch.device("cpu")
    state = checkpoint.random_state(cpu)
    first = torch.rand(3)
    checkpoint.restore_random_state(state, cpu)
    assert torch.equal(torch.rand(3), first)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", checkpoint.STOPPING)
def test_a_signal_is_noted_and_the_handlers_come_back(signum):
    name = "Ctrl-C" if signum == signal.SIGINT else signum.name
    handlers = [signal.getsignal(number) for number in checkpoint.STOPPING]
    with checkpoint.StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signum)
        assert stop.received == signum and stop.name == name
    assert [signal.getsignal(number) for number in checkpoint.STOPPING] == handlers
    assert hasattr(signal, "SIGUSR1") == ("SIGUSR1" in {number.name for number in checkpoint.STOPPING})


def test_only_a_second_ctrl_c_leaves_at_once():
    with checkpoint.StopSignals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_tied_tensor_under_an_alias_is_written_once(tmp_path):
    # safetensors itself refuses aliased tensors: this is what `whole_weights` is for.
    tensor = torch.ones(2, 2)
    with pytest.raises(RuntimeError):
        save_file({"a": tensor, "b": tensor}, tmp_path / "x.safetensors")
    twice = torch.nn.Module()
    twice.a = torch.nn.Parameter(tensor)
    twice.b = twice.a
    assert set(whole_weights(twice)) == {"a"}
