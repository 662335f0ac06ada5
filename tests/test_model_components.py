"""Norms, activations, position encodings and FFNs against their equations, in float64, with gradients."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import Attention
from model_components import (
    ACTIVATION_REGISTRY,
    FFN_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ALiBi,
    LearnedAbsolute,
    RoPE,
)
from user_errors import UserError

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def filled(module):
    """The module with every parameter drawn at random, so that gains and biases count."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def assert_same_gradients(ours, reference, x, parameters):
    """Outputs and the gradients of x and all parameters agree between two functions of x."""
    results = []
    for function in (ours, reference):
        y = function(x)
        weights = torch.sin(torch.arange(y.numel())).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


# ---- norms ----------------------------------------------------------------------------------------------------------


def standardised(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


NORM_EQUATIONS = {
    "layernorm": lambda x, norm: standardised(x, norm.eps) * norm.weight + norm.bias,
    "layernorm_nobias": lambda x, norm: standardised(x, norm.eps) * norm.weight,
    "rmsnorm": lambda x, norm: x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight,
}
TORCH_NORMS = {
    "layernorm": lambda eps: nn.LayerNorm(6, eps=eps),
    "layernorm_nobias": lambda eps: nn.LayerNorm(6, eps=eps, bias=False),
    "rmsnorm": lambda eps: nn.RMSNorm(6, eps=eps),
}


@pytest.mark.parametrize("eps", [1e-5, 0.3])  # at 0.3 the place of eps shows
@pytest.mark.parametrize("name", NORM_EQUATIONS)
def test_norms_equal_their_equation_and_torch(tiny, name, eps):
    norm = filled(NORM_REGISTRY[name](6, tiny(norm_eps=eps)))
    x = (3 * torch.randn(2, 5, 6) + 1).requires_grad_()
    parameters = list(norm.parameters())
    assert_same_gradients(norm, lambda x: NORM_EQUATIONS[name](x, norm), x, parameters)
    theirs = TORCH_NORMS[name](eps)
    assert {*dict(theirs.named_parameters())} == {*dict(norm.named_parameters())}
    theirs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), theirs(x), **EXACT)


@pytest.mark.parametrize("name", NORM_REGISTRY)
def test_every_norm_starts_with_gain_one(tiny, name):
    x = 5 * torch.randn(4, 6)
    size = NORM_REGISTRY[name](6, tiny())(x).square().mean(-1)
    torch.testing.assert_close(size, torch.ones(4), rtol=1e-3, atol=1e-3)


# ---- activations ----------------------------------------------------------------------------------------------------

ACTIVATION_EQUATIONS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "relu2": lambda x: max(x, 0.0) ** 2,
}


POINTS = [-4.0, -1.3, -0.2, 0.1, 0.7, 2.5]


@pytest.mark.parametrize("name", ACTIVATION_EQUATIONS)
def test_activations_equal_their_equation(name):
    wanted = torch.tensor([ACTIVATION_EQUATIONS[name](value) for value in POINTS])
    torch.testing.assert_close(ACTIVATION_REGISTRY[name](torch.tensor(POINTS)), wanted, **EXACT)


@pytest.mark.parametrize("name", ACTIVATION_REGISTRY)
def test_every_activation_has_the_slope_of_its_values(name):
    assert torch.autograd.gradcheck(ACTIVATION_REGISTRY[name], torch.tensor(POINTS, requires_grad=True))


# ---- RoPE -----------------------------------------------------------------------------------------------------------


def rope(tiny, head_dim=8, **options):
    return RoPE(tiny(position_encoding="rope", **options), head_dim)


def paper_rotation(x, positions, theta=10000.0):
    """Su et al. 2021, section 3.2: neighbours (2i, 2i+1) are one complex number, turned by m theta^(-2i/D)."""
    D = x.size(-1)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], D // 2, 2).contiguous())
    angles = positions[:, None] * theta ** (-2 * torch.arange(D // 2) / D)
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


@pytest.mark.parametrize("theta", [10000.0, 50.0])
def test_rope_is_the_papers_rotation_up_to_the_order_of_columns(tiny, theta):
    x, positions = torch.randn(2, 3, 7, 8), torch.tensor([0, 1, 2, 3, 10, 100, 5000])
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)  # neighbours side by side -> halves
    got = rope(tiny, rope_theta=theta).rotate(halves, positions)
    wanted = paper_rotation(x, positions, theta)
    torch.testing.assert_close(got, torch.cat((wanted[..., 0::2], wanted[..., 1::2]), dim=-1), **EXACT)


def test_rope_scores_depend_on_the_distance_alone(tiny):
    encoding, q, k = rope(tiny), torch.randn(8), torch.randn(8)

    def score(m, n):
        turned = [encoding.rotate(x.view(1, 1, 1, 8), torch.tensor([p])).flatten() for x, p in ((q, m), (k, n))]
        return turned[0] @ turned[1]

    for m, n in ((3, 1), (9, 4), (0, 6)):
        torch.testing.assert_close(score(m, n), score(m + 1234, n + 1234), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(score(3, 1), score(3, 2))
    torch.testing.assert_close(score(5, 5), q @ k, **EXACT)


def test_rope_keeps_lengths_and_leaves_position_zero_alone(tiny):
    x = torch.randn(2, 3, 7, 8)
    turned = rope(tiny).rotate(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **EXACT)
    assert torch.equal(turned[..., 0, :], x[..., 0, :])


def test_rope_positions_default_to_the_order_and_may_differ_by_sequence(tiny):
    encoding, x = rope(tiny), torch.randn(2, 3, 7, 8)
    rows = torch.stack((torch.arange(7), torch.arange(7) + 20))
    torch.testing.assert_close(encoding.rotate(x), encoding.rotate(x, torch.arange(7)), **EXACT)
    by_row = encoding.rotate(x, rows)
    for b in range(2):
        torch.testing.assert_close(by_row[b], encoding.rotate(x[b : b + 1], rows[b])[0], **EXACT)


def test_ropes_memory_of_angles_follows_length_and_dtype(tiny):
    encoding, x = rope(tiny), torch.randn(1, 1, 9, 8)
    long = encoding.rotate(x)
    assert encoding.rotate(x.float()).dtype == torch.float32
    torch.testing.assert_close(encoding.rotate(x[:, :, :4]), long[:, :, :4], **EXACT)
    torch.testing.assert_close(encoding.rotate(x), long, **EXACT)
    assert list(encoding.state_dict()) == []  # nothing of it belongs into a checkpoint


def test_ropes_memory_of_inference_mode_does_not_spoil_training(tiny):
    encoding, x = rope(tiny), torch.randn(1, 1, 9, 8, requires_grad=True)
    with torch.inference_mode():
        encoding.rotate(x.detach())
    (encoding.rotate(x) ** 3).sum().backward()
    assert x.grad.isfinite().all()


def test_rope_far_out_is_as_exact_as_near_in_half_precision(tiny):
    encoding, x = rope(tiny), torch.randn(1, 1, 50, 8).bfloat16()
    far = torch.arange(50) + 30011
    got, wanted = encoding.rotate(x, far), encoding.rotate(x.double(), far)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)  # one rounding, at the end


def test_rope_refusals(tiny):
    with pytest.raises(UserError, match="head width 7 is odd"):
        rope(tiny, head_dim=7)
    with pytest.raises(UserError, match="rope_scaling='ntkk' must be"):
        rope(tiny, rope_scaling="ntkk")
    with pytest.raises(UserError, match=r"rope_theta=0\.0 must be above 0"):
        rope(tiny, rope_theta=0.0)


# -- the same against transformers


HF_ROPE = [  # (id, our options, transformers' type and parameters, positions)
    ("plain", {}, "default", {}, range(64)),
    ("linear", {"rope_scaling": "linear", "rope_scaling_factor": 4.0}, "linear", {"factor": 4.0}, range(256)),
    # Dynamic NTK at factor 1 stretches by length / 64, which is what ours is told.
    ("ntk", {"rope_scaling": "ntk", "rope_scaling_factor": 3.0}, "dynamic", {"factor": 1.0}, range(192)),
    ("llama3", {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_context": 64}, "llama3",
     {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
     range(512)),
]  # fmt: skip


@pytest.mark.parametrize("options, kind, parameters, positions", [r[1:] for r in HF_ROPE], ids=[r[0] for r in HF_ROPE])
def test_rope_equals_transformers(tiny, transformers, options, kind, parameters, positions):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(  # heads of 8, and 64 positions to start from
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **parameters},
    )  # fmt: skip
    ours, positions = rope(tiny, rope_theta=500.0, **options), torch.tensor([*positions])
    x = torch.randn(1, 2, len(positions), 8)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    wanted, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(ours.rotate(x, positions), wanted, rtol=0, atol=5e-5)  # theirs are float32 angles
    if options:
        assert not torch.allclose(rope(tiny, rope_theta=500.0).rotate(x, positions), wanted, atol=1e-2)


def test_llama3_scaling_keeps_fast_waves_and_stretches_slow_ones(tiny):
    options = {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_context": 64}
    plain = rope(tiny, head_dim=32).frequencies("cpu")
    ratio = rope(tiny, head_dim=32, **options).frequencies("cpu") / plain
    turns = 64 * plain / (2 * math.pi)  # in the old context
    assert torch.equal(ratio[turns >= 4], torch.ones(int((turns >= 4).sum())))
    torch.testing.assert_close(ratio[turns <= 1], torch.full((int((turns <= 1).sum()),), 1 / 8), **EXACT)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()


# ---- ALiBi ----------------------------------------------------------------------------------------------------------


def paper_slopes(n):
    """`get_slopes` of the ALiBi authors' code (ofirpress/attention_with_linear_biases), rewritten."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    nearest = 2 ** math.floor(math.log2(n))
    return paper_slopes(nearest) + paper_slopes(2 * nearest)[0::2][: n - nearest]


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 8, 12, 16, 20, 32])
def test_alibi_slopes_are_the_papers(tiny, n_head):
    slopes = ALiBi(tiny(n_head=n_head, n_embd=8 * n_head), 8).slopes()
    assert slopes == pytest.approx(paper_slopes(n_head), rel=1e-12)


def test_alibi_slopes_of_eight_heads_as_printed_in_the_paper(tiny):
    assert ALiBi(tiny(n_head=8), 2).slopes() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_alibi_bias_falls_linearly_with_distance(tiny):
    bias = ALiBi(tiny(n_head=2), 8).attention_bias(torch.arange(3), torch.arange(3), torch.float64)
    distance = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    assert torch.equal(bias, torch.stack((-(2**-4) * distance, -(2**-8) * distance)))
    rows = torch.tensor([[0, 1, 2], [0, 1, 0]])  # a document starts again in the second sequence
    by_row = ALiBi(tiny(n_head=2), 8).attention_bias(rows, rows, torch.float64)
    assert by_row.shape == (2, 2, 3, 3)
    assert torch.equal(by_row[0], bias) and by_row[1, 0, 2].tolist() == [0, -(2**-4), 0]


# ---- the other encodings, and the places where they act -------------------------------------------------------------


def test_learned_absolute_is_a_table(tiny):
    encoding = filled(LearnedAbsolute(tiny(block_size=5)))
    assert encoding.table.weight.shape == (5, 16)
    assert torch.equal(encoding.embed(torch.tensor([3, 0])), encoding.table.weight[[3, 0]])


@pytest.mark.parametrize("name", POSITION_ENCODING_REGISTRY)
def test_an_encoding_acts_where_it_says_and_nowhere_else(tiny, name):
    part = POSITION_ENCODING_REGISTRY[name]
    q, order = torch.randn(1, 4, 6, 4), torch.arange(6)
    if part.acts_in_attention:
        encoding = part(tiny(position_encoding=name), 4)
        bias = encoding.attention_bias(order, order, q.dtype)
        assert part.has_attention_bias == (bias is not None)
        assert part.has_attention_bias or not torch.equal(encoding.rotate(q, order), q)
    else:
        assert Attention(tiny(position_encoding=name), 0).position_encoding is None
    if part.adds_to_embedding:
        assert part(tiny(position_encoding=name)).embed(order).shape == (6, 16)
    if not (part.acts_in_attention or part.adds_to_embedding):
        assert list(part(tiny()).parameters()) == [] and torch.equal(part(tiny()).rotate(q, order), q)


# ---- FFNs -----------------------------------------------------------------------------------------------------------

FFN_EQUATIONS = {
    "standard": lambda x, ffn: times(F.gelu(times(x, ffn.up)), ffn.down),
    "swiglu": lambda x, ffn: times(F.silu(times(x, ffn.gate)) * times(x, ffn.up), ffn.down),
    "geglu": lambda x, ffn: times(F.gelu(times(x, ffn.gate)) * times(x, ffn.up), ffn.down),
}


def times(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FFN_EQUATIONS)
def test_ffns_equal_their_equation(tiny, name, bias):
    ffn = filled(FFN_REGISTRY[name](tiny(bias=bias), 0))
    parameters = list(ffn.parameters())
    assert len(parameters) == (2 if name == "standard" else 3) * (1 + bias)
    x = torch.randn(2, 3, 16, requires_grad=True)
    assert_same_gradients(ffn, lambda x: FFN_EQUATIONS[name](x, ffn), x, parameters)


@pytest.mark.parametrize("activation", ACTIVATION_REGISTRY)
def test_the_plain_ffn_uses_the_activation_asked_for(tiny, activation):
    ffn = filled(FFN_REGISTRY["standard"](tiny(activation=activation), 0))
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(ffn(x), ffn.down(ACTIVATION_REGISTRY[activation](ffn.up(x))), **EXACT)


@pytest.mark.parametrize("name, n_embd, options, hidden", [
    ("standard", 768, {}, 3072),
    ("standard", 384, {"ffn_multiplier": 2.0}, 768),
    ("swiglu", 768, {}, 2048),  # 8/3
    ("geglu", 384, {}, 1024),
    ("swiglu", 128, {}, 344),  # 341.3, rounded to a multiple of 8
    ("swiglu", 128, {"ffn_multiple_of": 64}, 320),
    ("swiglu", 4096, {"ffn_multiple_of": 256}, 11008),  # LLaMA 7B: 10922.7 to the nearest multiple of 256
    ("swiglu", 128, {"ffn_multiplier": 4.0}, 512),
    ("standard", 128, {"ffn_hidden": 100}, 100),  # as it stands, not rounded
    ("standard", 2, {"ffn_multiplier": 0.1}, 8),  # never nothing
])  # fmt: skip
def test_hidden_width(tiny, name, n_embd, options, hidden):
    with torch.device("meta"):
        ffn = FFN_REGISTRY[name](tiny(n_embd=n_embd, **options), 0)
    assert ffn.hidden == hidden
    assert ffn.up.weight.shape == (hidden, n_embd) and ffn.down.weight.shape == (n_embd, hidden)


@pytest.mark.parametrize("option, value", [("ffn_multiplier", 0.0), ("ffn_hidden", 0), ("ffn_multiple_of", 0)])
def test_a_width_of_nothing_is_refused(tiny, option, value):
    with pytest.raises(UserError, match=f"{option}={value} must be above 0"):
        FFN_REGISTRY["standard"](tiny(**{option: value}), 0)


def test_swiglu_has_the_weights_of_a_plain_ffn_of_four(tiny):
    config = tiny(n_embd=768)
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in FFN_REGISTRY[name](config, 0).parameters()) for name in FFN_EQUATIONS}
    assert counts["swiglu"] == counts["geglu"] == counts["standard"] == 8 * 768**2
