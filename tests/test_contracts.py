"""What every part and preset owes, by iterating the registries: a part is tested by existing."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT, initialise, on_meta, parameter_plan
from model_components import (
    ACTIVATION_REGISTRY,
    FFN_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    Norm,
    ResidualScale,
)
from model_config import PRESETS, ModelArchitectureConfig
from model_flops import active_parameters, flops_per_token, parameters_by_group, state_bytes
from model_helpers import backends_that_train_on_cpu, scrambled
from registry import options_of
from user_errors import UserError

B, T, V = 2, 16, 29
EXACT = {"rtol": 1e-10, "atol": 1e-10}

# ---- the table: every registered part and preset, and the ways to put blocks together -------------------------------


def takes(mixer, encoding):
    """Whether a mixer can honour a position encoding."""
    return encoding in MIXER_REGISTRY[mixer].positions or not POSITION_ENCODING_REGISTRY[encoding].acts_in_attention


VARIANTS = {f"preset-{name}": {"arch_preset": name} for name in PRESETS}
VARIANTS |= {
    f"{mixer}-{encoding}": {"block_pattern": mixer, "position_encoding": encoding}
    for mixer in MIXER_REGISTRY for encoding in POSITION_ENCODING_REGISTRY if takes(mixer, encoding)
}  # fmt: skip
VARIANTS |= {f"backend-{name}": {"attention_backend": name} for name in backends_that_train_on_cpu()}
VARIANTS |= {f"ffn-{name}": {"ffn_type": name, "bias": True} for name in FFN_REGISTRY}
VARIANTS |= {f"norm-{name}": {"normalization": name} for name in NORM_REGISTRY}
VARIANTS |= {f"activation-{name}": {"activation": name} for name in ACTIVATION_REGISTRY}
VARIANTS |= {f"norm_position-{place}": {"norm_position": place} for place in ("pre", "post", "output", "sandwich")}
VARIANTS |= {f"residual-{kind}": {"residual_scaling": kind} for kind in ("none", "depth", "learned")}
VARIANTS |= {
    "parallel": {"parallel_blocks": True},
    "parallel-sandwich": {"parallel_blocks": True, "norm_position": "sandwich", "residual_scaling": "learned"},
    "no-ffn": {"block_pattern": "attention/none"},
    "mixed": {"block_pattern": "attention/swiglu,attention/none,attention"},
    "untied": {"weight_tying": False, "logit_soft_cap": 3.0},
    "gqa": {"n_kv_head": 2, "qk_norm": True, "position_encoding": "rope"},
    "mqa": {"n_kv_head": 1, "bias": True},
    "qk-projection": {
        "qk_norm": True,
        "qk_norm_scope": "projection",
        "queries_per_kv_head": 3,
        "position_encoding": "rope",
    },
    "local": {"block_pattern": "local_attention", "hybrid_local_window": 4},
    "side-by-side": {"block_pattern": "mamba+attention/none,gla + local_attention", "hybrid_local_window": 5},
    "window": {"sliding_window": 4, "position_encoding": "rope"},
    "capped": {"attention_soft_cap": 2.0, "attention_backend": "manual"},
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
BOTH_WAYS = {name for name, changes in VARIANTS.items() if not ModelArchitectureConfig(**changes).causal}
every_causal_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in BOTH_WAYS])


@pytest.fixture
def build(tiny):
    """A model of a variant, 3 layers so that a pattern shows; its weights random and large unless told otherwise."""

    def model(variant, fresh=False, dtype=torch.float32, **changes):
        size = {"n_layer": 3, "vocab_size": V, "dropout": 0.0}
        model = ConfigurableGPT(tiny(**{**size, **VARIANTS[variant], **changes})).to(dtype)
        return model if fresh else scrambled(model)

    return model


def tokens(b=B, t=T):
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(4))


def test_the_table_holds_every_registered_part():
    text = str(VARIANTS)
    for registry in (MIXER_REGISTRY, FFN_REGISTRY, NORM_REGISTRY, POSITION_ENCODING_REGISTRY, ACTIVATION_REGISTRY):
        assert all(f"'{name}'" in text for name in registry)


# ---- forward and backward -------------------------------------------------------------------------------------------


@every_variant
def test_shapes_and_finite_gradients_to_every_parameter(build, variant):
    model, idx = build(variant), tokens()
    logits, loss = model(idx, idx.roll(-1, 1))
    assert logits.shape == (B, T, V) and loss.shape == ()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"nothing reaches {name}"
    assert model(idx[:1, :5])[0].shape == (1, 5, V)
    assert model(idx[:, :1])[0].isfinite().all()


def untouched(model, after, before):
    """Equal bit for bit; where shapes depend on data a product may round otherwise, and then in float64 to 1e-12."""
    if any(block.ffn is not None and block.ffn.shapes_depend_on_data for block in model.blocks):
        return after.dtype == torch.float64 and torch.allclose(after, before, rtol=1e-12, atol=1e-12)
    return torch.equal(after, before)


def exact(variant):
    """The precision in which `untouched` compares a variant."""
    ffns = {ffn for _, ffn in ModelArchitectureConfig(**VARIANTS[variant]).pattern()} - {"none"}
    return torch.float64 if any(FFN_REGISTRY[ffn].shapes_depend_on_data for ffn in ffns) else torch.float32


@every_causal_variant
def test_causality_bit_for_bit(build, variant):
    model, idx = build(variant, dtype=exact(variant)), tokens()
    with torch.no_grad():
        before = model(idx)[0]
        for t in (1, 7, 15):
            changed = idx.clone()
            changed[:, t] = (changed[:, t] + 1) % V
            after = model(changed)[0]
            assert untouched(model, after[:, :t], before[:, :t]), f"token {t} reaches back"
            assert not torch.equal(after[:, t], before[:, t])


@every_causal_variant
def test_the_gradient_reaches_no_later_token(build, variant):
    model, idx = build(variant), tokens(1)
    x = model._embed(idx, None).detach().requires_grad_()
    y = model.through_blocks(x)
    (grad,) = torch.autograd.grad(y[0, 6].sum(), x)
    assert not grad[0, 7:].any() and grad[0, 6].any()


@pytest.mark.parametrize("mixer", [name for name, part in MIXER_REGISTRY.items() if part.bidirectional])
def test_a_mixer_that_says_it_runs_both_ways_does(tiny, mixer):
    model, idx = scrambled(ConfigurableGPT(tiny(block_pattern=mixer, causal=False, position_encoding="none"))), tokens()
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V
    assert not torch.equal(model(changed)[0][:, 0], model(idx)[0][:, 0])


def test_a_mixer_that_cannot_run_both_ways_is_refused(tiny):
    for mixer, part in MIXER_REGISTRY.items():
        if not part.bidirectional:
            with pytest.raises(UserError, match="causal=False"):
                ConfigurableGPT(tiny(block_pattern=mixer, causal=False, position_encoding="none"))


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(BOTH_WAYS))
def test_a_model_that_is_not_causal_refuses_to_write(build, variant):
    model, idx = build(variant), tokens()
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V
    assert not torch.equal(model(changed)[0][:, 0], model(idx)[0][:, 0])
    state = {"length": 0, "blocks": [{}] * 3}
    for write in (lambda: model.init_state(B), lambda: model.step(idx, state), lambda: model.generate(idx, 1)):
        with pytest.raises(UserError, match="causal=False"):
            write()


@every_causal_variant
def test_step_equals_forward_column_by_column(build, variant):
    model, idx = build(variant, dtype=torch.float64), tokens()
    with torch.no_grad():
        wanted, state = model(idx)[0], model.init_state(B)
        for t in range(T):
            logits, state = model.step(idx[:, t : t + 1], state)
            torch.testing.assert_close(logits[:, 0], wanted[:, t], **EXACT)


@every_causal_variant
def test_steps_of_several_tokens_equal_forward(build, variant):
    model, idx = build(variant, dtype=torch.float64), tokens()
    with torch.no_grad():
        state, columns = model.init_state(B), []
        for piece in idx.split([6, 1, 5, 4], dim=1):
            logits, state = model.step(piece, state)
            columns.append(logits)
        torch.testing.assert_close(torch.cat(columns, dim=1), model(idx)[0], **EXACT)


@every_causal_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_declared_state_is_the_tensors_kept(build, variant, dtype):
    model = build(variant, dtype=dtype, block_size=32)
    with torch.no_grad():
        _, state = model.step(tokens(B, 32), model.init_state(B))
    assert state_bytes(model, 32, dtype) * B == bytes_of(state)


def bytes_of(state):
    """Bytes of all tensors in a nest of dictionaries, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        state = list(state.values())
    return sum(map(bytes_of, state)) if isinstance(state, (list, tuple)) else 0


# ---- documents ------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[0] * 6 + [1] * 5 + [2] * 5, [3] * 6 + [4] * 5 + [3] * 5])
RESTARTED = torch.tensor([[*range(6), *range(5), *range(5)]] * 2)


@every_variant
def test_documents_do_not_leak_bit_for_bit(build, variant):
    model, idx = build(variant, dtype=exact(variant)), tokens()
    changed = idx.clone()
    changed[:, :6] = (changed[:, :6] + 1) % V
    with torch.no_grad():
        before, after = (model(i, positions=RESTARTED, document_ids=DOCUMENTS)[0] for i in (idx, changed))
        free = model(changed)[0] - model(idx)[0]
    assert untouched(model, after[0, 6:], before[0, 6:])
    assert untouched(model, after[1, 6:11], before[1, 6:11])
    assert not torch.equal(after[:, :6], before[:, :6])
    assert free[0, 6:].any(), "without document_ids the first tokens reach the later ones"


@every_variant
def test_a_document_reads_as_it_would_alone(build, variant):
    model, idx = build(variant, dtype=torch.float64), tokens()
    with torch.no_grad():
        packed = model(idx, positions=RESTARTED, document_ids=DOCUMENTS)[0]
        for start, end in ((0, 6), (6, 11), (11, 16)):
            torch.testing.assert_close(packed[:1, start:end], model(idx[:1, start:end])[0], **EXACT)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def triangular_solve(a_shape, b_shape, **_):
    """A solve costs its products without taking off the empty half, as attention's scores do; torch counts nothing."""
    return 2 * a_shape[-1] * math.prod(b_shape)


def convolution_backward(grad_shape, x_shape, w_shape, *_, **__):
    """Twice the forward; torch's own formula takes every channel to be convolved with every other (groups=1)."""
    return 4 * math.prod(grad_shape) * math.prod(w_shape[1:])


MORE_FORMULAS = {
    torch.ops.aten.linalg_solve_triangular: triangular_solve,
    torch.ops.aten.convolution_backward: convolution_backward,
}


def counted(model, t):
    """FLOPs per token, of forward and of both, by torch's own counter; attention is two products, counted in full."""
    idx = tokens(B, t)
    plain = torch.backends.mkldnn.flags(enabled=False)  # oneDNN's LSTM, like fused attention, is a box to the counter
    counter = FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS)
    with sdpa_kernel(SDPBackend.MATH), plain, counter:
        loss = model(idx, idx)[1]
        forward = counter.get_total_flops()
        loss.backward()
    return forward / (B * t), counter.get_total_flops() / (B * t)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said when oneDNN is switched off
@every_variant
@pytest.mark.parametrize("t", [6, T])
def test_declared_flops_equal_torchs_counter(build, variant, t):
    # A window is counted as what it is, which the counter cannot see: it is compared where the window holds everything.
    changes = {name: T for name in ("sliding_window", "hybrid_local_window") if name in VARIANTS[variant]}
    model = build(variant, **changes)
    declared = flops_per_token(model, t)
    products = declared.forward - declared.vectors - sum(block.mixer.elementwise_flops(t) for block in model.blocks)
    forward, both = counted(model, t)
    assert products == pytest.approx(forward, rel=1e-12)
    # A recurrence in steps has no gradient to the zeros that it starts from: up to one of its 3 t products less.
    missing = 1 - both / (3 * products)
    assert -1e-12 < missing < (1 / (3 * t) if any(hasattr(b.mixer, "cell") for b in model.blocks) else 1e-12)
    assert declared.training == declared.forward + declared.backward == 3 * declared.forward


@every_variant
def test_biases_and_norms_cost_two_per_number_that_they_are_applied_to(build, variant):
    """Counted where they are applied: the norms by the size of what goes through them, a token of it."""
    model, seen = build(variant), {}
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.register_forward_hook(lambda norm, inputs, y, name=name: seen.update({name: y.numel() // T}))
    model(tokens(1))
    vectors = 0
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, Norm):
            vectors += seen[path]
        elif isinstance(owner, ResidualScale) or (isinstance(owner, nn.Linear) and leaf == "bias"):
            vectors += parameter.numel()
    assert flops_per_token(model, T).vectors == 2 * vectors


def test_a_window_costs_what_it_is(build):
    windowed, full = build("window"), build("attention-rope")
    assert flops_per_token(windowed, T).mixing == flops_per_token(full, 4).mixing
    assert flops_per_token(windowed, 2).mixing == flops_per_token(full, 2).mixing


# ---- the parameter plan ---------------------------------------------------------------------------------------------

GROUPS = {"token embedding", "position embedding", "mixer", "ffn", "norm", "head transform", "head"}


@every_variant
def test_the_plan_covers_every_parameter_once_and_groups_add_up(build, variant):
    model, plan = build(variant, fresh=True), None
    plan = parameter_plan(model)
    assert [spec.name for spec in plan] == [name for name, _ in model.named_parameters()]
    assert [spec.shape for spec in plan] == [tuple(p.shape) for p in model.parameters()]
    assert {spec.group for spec in plan} <= GROUPS
    assert {spec.init for spec in plan} <= {"normal", "residual", "zeros", "ones", "own"}
    groups, total = parameters_by_group(model), sum(p.numel() for p in model.parameters())
    assert groups == {group: sum(math.prod(s.shape) for s in plan if s.group == group) for group in groups}
    assert sum(groups.values()) == total
    partly = {name: m.active_fraction for name, m in model.named_modules() if hasattr(m, "active_fraction")}
    idle = sum(math.prod(s.shape) * (1 - partly.get(s.name.rpartition(".")[0], 1)) for s in plan)
    assert active_parameters(model) == round(total - idle)


@every_variant
def test_declarations_name_what_exists(build, variant):
    # A misspelt declaration would do nothing, silently.
    for path, module in build(variant).named_modules():
        for kind in ("no_weight_decay", "own_init", "residual_out", "linear_weights"):
            for name in getattr(module, kind, ()):
                owner, _, leaf = name.rpartition(".")
                assert hasattr(module.get_submodule(owner), leaf), f"{path} declares {kind} {name}"


@every_variant
def test_initial_values_are_those_of_the_plan(build, variant):
    model = build(variant, fresh=True, n_embd=64, vocab_size=300, init_std=0.05)
    for spec in parameter_plan(model):
        values = model.get_parameter(spec.name)
        assert values.isfinite().all()
        if spec.init in ("zeros", "ones"):
            assert (values == (spec.init == "ones")).all(), spec
        elif spec.init in ("normal", "residual"):
            branches = sum(1 + (block.ffn is not None) for block in model.blocks)
            std = 0.05 if spec.init == "normal" else 0.05 / math.sqrt(branches)
            rel = max(0.08, 4 / (2 * values.numel()) ** 0.5)  # four standard errors of a small matrix
            assert values.std().item() == pytest.approx(std, rel=rel), spec
            assert abs(values.mean()) < 4 * std / values.numel() ** 0.5, spec
            assert values.abs().max() > 2.5 * std, f"{spec} is not normal"


@every_variant
def test_weight_decay_falls_on_matrices_and_embeddings_alone(build, variant):
    model = build(variant, fresh=True)
    for spec in parameter_plan(model):
        leaf = spec.name.rpartition(".")[2]
        if leaf == "bias" or spec.group == "norm" or len(spec.shape) < 2:
            assert not spec.weight_decay, spec
        owner = model.get_submodule(spec.name.rpartition(".")[0])
        if isinstance(owner, (nn.Linear, nn.Embedding)) and leaf == "weight":
            assert spec.weight_decay, spec
        assert spec.is_matrix == (isinstance(owner, nn.Linear) and leaf == "weight" and "blocks." in spec.name), spec


def test_residual_outputs_are_those_that_write_to_the_stream(build):
    plan = parameter_plan(build("mixed", fresh=True, bias=True))
    residual = {spec.name.split(".", 2)[2] for spec in plan if spec.init == "residual"}
    assert residual == {"mixer.out.weight", "ffn.down.weight"}
    assert all(spec.init == "zeros" for spec in plan if spec.name.endswith(".bias"))


def test_learned_residual_gains_start_where_depth_stands(build):
    learned, depth = build("residual-learned", fresh=True), build("residual-depth", fresh=True)
    gains = [p for name, p in learned.named_parameters() if name.endswith("gain")]
    assert len(gains) == 6 and all((gain == torch.tensor(6**-0.5)).all() for gain in gains)
    torch.testing.assert_close(learned(tokens())[0], depth(tokens())[0])


def test_the_same_parameter_starts_the_same_in_every_architecture(build):
    # So that two architectures differ by their parts and not by their luck.
    first, shared = {}, 0
    for variant in VARIANTS:
        model = build(variant, fresh=True)
        for spec in parameter_plan(model):
            branches = model.config.n_branches() if spec.init == "residual" else None
            key = (spec.name, spec.shape, spec.init, branches)
            values = model.get_parameter(spec.name)
            shared += key in first
            assert torch.equal(first.setdefault(key, values), values), f"{spec.name} of {variant}"
    assert shared > 20 * len(VARIANTS)


def test_initial_values_follow_the_seed_alone(tiny):
    config = tiny()
    one = ConfigurableGPT(config, seed=7).state_dict()
    torch.manual_seed(99)
    two, other = ConfigurableGPT(config, seed=7).state_dict(), ConfigurableGPT(config, seed=8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])
    matrices = [values.flatten()[:256] for name, values in one.items() if name.endswith("qkv.weight")]
    assert not torch.equal(*matrices), "two layers began alike"


# ---- copies, and building without memory ----------------------------------------------------------------------------


@every_variant
def test_a_copy_is_the_same_model(build, variant):
    model, idx = build(variant), tokens()
    wanted = model(idx)[0]
    copied = copy.deepcopy(model)
    assert parameter_plan(copied) == parameter_plan(model)
    assert torch.equal(copied(idx)[0], wanted)
    with torch.no_grad():
        copied.token_embedding.weight.zero_()
    assert torch.equal(model(idx)[0], wanted)


@every_variant
def test_built_without_memory_and_filled_later_it_is_the_same_model(build, variant):
    model, idx = build(variant, fresh=True), tokens()
    with on_meta():
        hollow = ConfigurableGPT(model.config)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert parameter_plan(hollow) == parameter_plan(model)
    assert flops_per_token(hollow) == flops_per_token(model)
    assert parameters_by_group(hollow) == parameters_by_group(model)
    hollow.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in hollow.parameters():
            parameter.fill_(float("nan"))
    initialise(hollow, seed=1337)
    assert torch.equal(hollow(idx)[0], model(idx)[0])


@every_variant
def test_a_model_is_rebuilt_from_its_weights(build, variant):
    model, idx = build(variant), tokens()
    other = ConfigurableGPT(dataclasses.replace(model.config), seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], model(idx)[0])


# ---- a part is tested by existing: what the contract catches --------------------------------------------------------


def test_options_of_every_part_have_the_type_that_they_declare():
    for registry in (MIXER_REGISTRY, FFN_REGISTRY, POSITION_ENCODING_REGISTRY):
        for name, part in registry.items():
            for option, declared in options_of(part).items():
                assert isinstance(declared.default, declared.type), f"{name}.{option}"


def test_a_parameter_that_no_rule_covers_is_refused(tiny):
    class Scaled(FFN_REGISTRY["standard"]):
        def __init__(self, config, layer_index):
            super().__init__(config, layer_index)
            self.secret = nn.Parameter(torch.ones(3))

    FFN_REGISTRY["scaled"] = Scaled
    with pytest.raises(TypeError, match=r"Scaled\.secret \(blocks\.0\.ffn\.secret\) has no initialisation"):
        ConfigurableGPT(tiny(ffn_type="scaled"))


def test_what_a_part_declares_is_done(tiny):
    class Special(FFN_REGISTRY["standard"]):
        own_init = ("decay",)
        no_weight_decay = ("decay", "up.weight")
        residual_out = ()

        def __init__(self, config, layer_index):
            super().__init__(config, layer_index)
            self.decay = nn.Parameter(torch.empty(4, 5))

        def init_own_parameters(self, generator):
            self.decay.copy_(torch.rand(4, 5, generator=generator) + 1)

        def forward(self, x):
            return super().forward(x) * self.decay.mean()

    FFN_REGISTRY["special"] = Special
    model = ConfigurableGPT(tiny(ffn_type="special"))
    plan = {spec.name: spec for spec in parameter_plan(model)}
    decays = [model.get_parameter(f"blocks.{layer}.ffn.decay") for layer in range(2)]
    assert all(((decay >= 1) & (decay <= 2)).all() for decay in decays) and not torch.equal(*decays)
    assert plan["blocks.0.ffn.decay"].init == "own" and not plan["blocks.0.ffn.decay"].weight_decay
    assert not plan["blocks.0.ffn.up.weight"].weight_decay and plan["blocks.0.ffn.down.weight"].weight_decay
    assert plan["blocks.0.ffn.down.weight"].init == "normal"
    again = ConfigurableGPT(tiny(ffn_type="special"))
    assert torch.equal(again.blocks[1].ffn.decay, decays[1])
    assert F.mse_loss(copy.deepcopy(model)(tokens())[0], model(tokens())[0]) == 0
