"""First weights of shards: those of one process to the last bit, and no rank ever has them all."""

import json

import pytest
import torch

import training_weights
from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT, on_meta
from model_parameters import DeclarationError
from training_helpers import torchrun

# Every model is built on two ranks as train.py builds it, made whole again, and held to the model of one process.
STARTS = """
import json, sys
import torch
import training_parallel as parallel
import training_place
from configurator import Settings
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training_config import TrainConfig
from training_objectives import OBJECTIVE_REGISTRY
from training_weights import blocks_in_memory, has_memory, whole_weights

CASES = [
    (name, Settings(ModelArchitectureConfig(**model), TrainConfig(device="cpu", threads=1, **train), [], {}))
    for name, model, train in json.load(open(sys.argv[1]))
]

class Known:
    # A source of weights that rank 0 alone can read

    def __init__(self, tensors):
        self.tensors = tensors

    def tensors_for(self, model):
        return dict(self.tensors)

def start(name, settings, place):
    config = settings.train
    alone = ConfigurableGPT(settings.model, config.seed, {"win": 3})
    built = parallel.build(settings, {"win": 3}, place)
    assert not has_memory(built)
    with blocks_in_memory(built, config.seed, place.device) as blocks:
        assert all(torch.equal(a, b) for a, b in zip(blocks[0].parameters(), alone.blocks[0].parameters()))
    assert not has_memory(built)
    objective = OBJECTIVE_REGISTRY["causal_lm"](built, config)
    parallel.split_weights(built, place)
    parallel.wrap(objective, objective, place, config)
    known = {key: tensor + 1 for key, tensor in alone.state_dict().items() if key == "final_norm.weight"}
    alone.load_state_dict(known, strict=False)
    parallel.fill(built, Known(known if place.is_main else None), place, config)
    found, expected = whole_weights(built), whole_weights(alone)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    objective({"inputs": tokens, "targets": tokens})
    again = whole_weights(built)  # as the forward pass had them
    if place.is_main:
        same = found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) and torch.equal(again[key], expected[key]) for key in expected
        )
        held = sum(parallel.training_mesh.local(tensor).numel() for tensor in built.parameters())
        print("start", name, same, held / sum(tensor.numel() for tensor in built.parameters()), flush=True)

first = training_place.find_place(CASES[0][1].train)
with training_place.joined(first):
    for name, settings in CASES:
        config = settings.train
        sizes = config.fsdp_replicas, config.tensor_parallel, config.expert_parallel
        start(name, settings, training_place.Place(first.device, "float32", False, first.rank, first.rank, 2, *sizes))
"""

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 16, "vocab_size": 29}
MOE = {"ffn_type": "moe", "part_options": {"n_experts": 4, "n_shared_experts": 1, "router_bias_rate": 0.01}}
FSDP = {"use_fsdp": True}
SPLIT = {
    "tied": ({"weight_tying": True, "position_encoding": "rope", "bias": True}, FSDP),
    "moe": (MOE, FSDP),
    "experts": (MOE, {**FSDP, "expert_parallel": 2}),
    "replicas": ({}, {**FSDP, "fsdp_replicas": 2}),
    "heads": ({"weight_tying": True, "bias": True, "part_options": {"n_kv_head": 2}}, {"tensor_parallel": 2}),
    "heads of experts": ({**MOE, "bias": True}, {"tensor_parallel": 2}),
    "sharded heads": ({"weight_tying": True, "bias": True}, {**FSDP, "tensor_parallel": 2}),
    **{mixer: ({"block_pattern": mixer, "residual_scaling": "learned"}, FSDP) for mixer in sorted(MIXER_REGISTRY)},
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """{name: (whether it started with the weights of one process, share of them that rank 0 holds)}."""
    folder = tmp_path_factory.mktemp("starts")
    cases = [(name.replace(" ", "-"), {**SHAPE, **model}, train) for name, (model, train) in SPLIT.items()]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    (folder / "starts.py").write_text(STARTS, encoding="utf-8")
    done = torchrun(folder, 2, "starts.py", "cases.json")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("start ")]
    return {name: (same == "True", float(held)) for _, name, same, held in lines}


@pytest.mark.parametrize("name", SPLIT)
def test_shards_start_with_the_weights_of_one_process(starts, name):
    is_same, held = starts[name.replace(" ", "-")]
    assert is_same
    assert held < (0.55 if SPLIT[name][1] == FSDP else 1.01)


def test_a_buffer_that_nobody_would_fill_is_refused(tiny):
    with on_meta():
        model = ConfigurableGPT(tiny())
        model.blocks[0].mixer.register_buffer("mask", torch.zeros(3))
    with pytest.raises(DeclarationError, match=r"^Attention\.mask gets its value in the constructor.*own_init"):
        training_weights.give_memory(model, torch.device("cpu"))


def test_memory_is_given_to_tied_tensors_once_and_taken_back(tiny):
    with on_meta():
        model = ConfigurableGPT(tiny(weight_tying=True))
    before = dict(model.named_parameters())
    given = training_weights.give_memory(model, torch.device("cpu"))
    assert training_weights.has_memory(model) and model.head.weight is model.token_embedding.weight
    training_weights.take_memory(given)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.token_embedding.weight


def test_what_is_drawn_one_by_one_is_what_a_model_is_built_with(tiny):
    for pattern in ("attention,mamba", "lstm,rwkv7"):
        config = tiny(block_pattern=pattern, residual_scaling="learned")
        model = ConfigurableGPT(config, seed=5)
        drawn = dict(training_weights.initial_values(ConfigurableGPT(config, seed=6), 5))
        assert drawn.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(drawn[name], parameter) for name, parameter in model.named_parameters())
