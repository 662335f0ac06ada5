"""Linear attention, retention, GLA: every form against the paper's equation and every other, and what they cost."""

import pytest
import torch
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY
from mixer_chunks import decayed_scores
from mixer_linear import FEATURE_MAPS, linear_chunked, linear_recurrent
from model_builder import ConfigurableGPT, parameter_plan
from model_components import RoPE
from model_config import ModelArchitectureConfig
from model_flops import flops_per_token
from recurrence_helpers import (
    LENGTHS,
    check_kernels_agree,
    mixer,
    random,
)
from user_errors import UserError

B, H, K, V = 2, 3, 4, 5


def inputs(T, decay, dtype=torch.float64):
    """q, k, v and log decays: None, 'head' for one for all channels, 'channel' for one each."""
    q, k, v = (random(B, H, T, width, dtype=dtype, seed=seed) for seed, width in enumerate((K, K, V)))
    width = {None: 0, "head": 1, "channel": K}[decay]
    log_decay = -3 * random(B, H, T, width, dtype=dtype, seed=3).abs() if decay else None
    return {"q": q, "k": k, "v": v, "log_decay": log_decay}


# ---- the equations, written out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("form", [linear_recurrent, linear_chunked])
def test_the_forms_are_the_equation(form, decay):
    x = inputs(13, decay)
    state = random(B, H, K, V, seed=4)
    y, last = form(**x, state=state, chunk_size=5)
    for batch in range(B):
        for head in range(H):
            S = state[batch, head].clone()
            for t in range(13):
                if decay:
                    S = torch.diag(x["log_decay"][batch, head, t].exp().expand(K)) @ S
                S = S + torch.outer(x["k"][batch, head, t], x["v"][batch, head, t])
                torch.testing.assert_close(y[batch, head, t], x["q"][batch, head, t] @ S, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(last[batch, head], S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [1, 2, 65])
def test_linear_attention_is_the_masked_quadratic_form(T):
    # Katharopoulos et al. 2020, eq. 9 with the causal mask: weights phi(q_i) . phi(k_j), divided by their sum.
    layer, x = mixer("linear_attention", chunk_size=16, bias=True), random(2, T, 16, seed=6)
    q, k, v = (part.unflatten(-1, (4, 4)) for part in layer.qkv(x).split(16, dim=-1))  # (B, T, H, D)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * torch.ones(T, T).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    wanted = layer.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_retention_is_the_papers_parallel_form():
    # Sun et al. 2023, eq. 5 and 8: (Q K^T * D) V with Q and K turned, D_ij = gamma^(i - j); group norm, swish gate.
    layer, x = mixer("retention", chunk_size=16, position_encoding="rope"), random(2, 37, 16, seed=6)
    q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in layer.qkv(x).split([16, 16, 32], dim=-1))
    rope = RoPE(layer_config(position_encoding="rope"), 4)
    q, k = rope.rotate(q, torch.arange(37)), rope.rotate(k, torch.arange(37))
    i, gamma = torch.arange(37.0, dtype=torch.float64), 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64)
    D = (gamma[:, None, None] ** (i[:, None] - i[None, :])).tril()
    heads = (q @ k.transpose(-2, -1) / 2 * D) @ v  # / sqrt(4)
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    wanted = layer.out(F.silu(layer.gate(x)) * heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_gla_is_the_papers_layer():
    # Yang et al. 2023, section 4.4: alpha = sigmoid(x W1 W2 + b)^(1/16), norm for each head, swish gate.
    layer, x = mixer("gla", chunk_size=16), random(1, 21, 16, seed=6)
    q, k, v = (part.unflatten(-1, (4, -1))[0] for part in layer.qkv(x).split([8, 8, 16], dim=-1))  # (T, H, D)
    alpha = torch.sigmoid(x @ layer.decay_down.weight.T @ layer.decay_up.weight.T + layer.decay_up.bias) ** (1 / 16)
    alpha, S, rows = alpha.unflatten(-1, (4, 2))[0], torch.zeros(4, 2, 4, dtype=torch.float64), []
    for t in range(21):
        S = alpha[t][..., None] * S + k[t][..., None] * v[t][:, None, :]
        rows.append((q[t][..., None] * S).sum(1) / 2**0.5)
    heads = torch.stack(rows)
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    wanted = layer.out(F.silu(layer.gate(x)) * heads.flatten(1))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def layer_config(**changes):
    return ModelArchitectureConfig(n_layer=1, n_head=4, n_embd=16, vocab_size=5, **changes)


# ---- every form equals every other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_recurrent_and_chunk_agree_with_their_gradients(decay, T):
    check_kernels_agree(linear_recurrent, linear_chunked, lambda dtype: inputs(T, decay, dtype), (B, H, K, V))


@pytest.mark.parametrize("runs", [None, [[0] * 20 + [1] * 44, [0] * 64]])
def test_no_decay_overflows_or_loses_its_gradient(runs):
    # Gates all but shut and all but open, in float32: exp(-b) of the textbook form would be exp(6,000).
    x = {name: tensor.requires_grad_() for name, tensor in inputs(64, "channel", torch.float32).items()}
    with torch.no_grad():
        x["log_decay"].mul_(torch.tensor([100.0, 1e-6])[torch.arange(64) % 2][:, None])
    runs = None if runs is None else torch.tensor(runs)
    results = []
    for form in (linear_recurrent, linear_chunked):
        y, last = form(**x, runs=runs, chunk_size=64)
        results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), [*x.values()])))
    assert all(tensor.isfinite().all() for tensor in results[1])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_decayed_scores_are_their_definition():
    q, k, log_decay = random(2, 16, 3), random(2, 16, 3, seed=1), -random(2, 16, 3, seed=2).abs()
    b = log_decay.cumsum(1)
    wanted = torch.einsum("bik,bjk,bijk->bij", q, k, (b[:, :, None] - b[:, None]).clamp(max=0).exp()).tril()
    torch.testing.assert_close(decayed_scores(q, k, log_decay), wanted, rtol=1e-12, atol=1e-12)


def test_feature_maps():
    x = torch.linspace(-20, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(FEATURE_MAPS["elu_plus_one"](x), F.elu(x) + 1, rtol=0, atol=1e-15)
    assert FEATURE_MAPS["elu_plus_one"](torch.tensor(-30.0)) == torch.tensor(-30.0).exp()  # elu + 1 rounds this to 0


# ---- what it costs, and where it starts -----------------------------------------------------------------------------


def test_linear_attention_has_the_weights_of_attention():
    def plan(pattern):
        tier = {"model_size": "1M", "block_size": 2560, "vocab_size": 69}
        model = ConfigurableGPT(ModelArchitectureConfig.from_preset("linear_attention", block_pattern=pattern, **tier))
        return model, [(spec.name, spec.shape, spec.init, spec.weight_decay) for spec in parameter_plan(model)]

    (ours, plan_ours), (theirs, plan_theirs) = plan("linear_attention"), plan("attention")
    assert plan_ours == plan_theirs
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == 1.1
    assert flops_per_token(ours).mixing["linear_attention"] < flops_per_token(theirs).mixing["attention"] / 10


def test_gla_has_attentions_four_matrices_and_starts_half_open():
    layer = MIXER_REGISTRY["gla"](layer_config(block_pattern="gla"), 0)
    extra = sum(p.numel() for part in (layer.decay_down, layer.decay_up, layer.norm) for p in part.parameters())
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16 * 16 + extra
    model = ConfigurableGPT(layer_config(block_pattern="gla"))
    assert not model.blocks[0].mixer.decay_up.bias.any()
    residual = {spec.name for spec in parameter_plan(model) if spec.init == "residual"}
    assert "blocks.0.mixer.out.weight" in residual


def test_retention_decays_head_by_head():
    log_decay = mixer("retention").log_decay("cpu", torch.float64)
    torch.testing.assert_close(log_decay.exp().flatten().tolist(), [1 - 2.0**-n for n in (5, 6, 7, 8)])


def test_retention_turns_with_the_positions_it_is_given():
    # Rotation is relative: moving all positions by the same distance changes nothing, stretching them does.
    layer, x = mixer("retention", position_encoding="rope"), random(1, 9, 16)
    wanted = layer(x)
    torch.testing.assert_close(layer(x, positions=torch.arange(9) + 40), wanted, rtol=1e-9, atol=1e-9)
    assert (layer(x, positions=2 * torch.arange(9)) - wanted).abs().max() > 1e-3


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, message", [
    ("gla", {"n_head": 3}, "n_embd=16 does not divide into n_head=3 heads"),
    ("gla", {"recurrence": "scan"}, r"recurrence='scan' does not exist \(known: chunk, recurrent\)"),
    ("gla", {"chunk_size": 0}, "chunk_size=0 must be above 0"),
    ("gla", {"gate_rank": 0}, "gate_rank=0 must be above 0"),
    ("gla", {"d_conv": -1}, "d_conv=-1 must be 1 or more"),
    ("gla", {"output_norm": "rms"}, "normalization='rms' does not exist"),
    ("retention", {"expand_v": 0.0}, "expand_v=0.0 must be above 0"),
    ("linear_attention", {"feature_map": "elu"}, "feature_map='elu' does not exist"),
    ("linear_attention", {"feature_map": "identity"}, "feature_map='identity' .* normaliser=True"),
    ("gla", {"position_encoding": "rope"}, "position_encoding='rope' acts inside attention"),
])  # fmt: skip
def test_refused(tiny, name, options, message):
    with pytest.raises(UserError, match=message):
        ConfigurableGPT(tiny(block_pattern=name, **{"position_encoding": "none", **options}))
