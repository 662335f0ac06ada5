"""DeltaNet and Gated DeltaNet: every form against the paper's equation, transformers' Qwen3-Next and every other."""

import pytest
import torch
import torch.nn.functional as F

from mixer_delta import delta_chunked, delta_recurrent, solve_unit_lower
from model_builder import ConfigurableGPT, parameter_plan
from model_config import ModelArchitectureConfig
from recurrence_helpers import (
    LENGTHS,
    check_kernels_agree,
    mixer,
    random,
)

B, H, K, V = 2, 3, 4, 5


def inputs(T, gated, dtype=torch.float64):
    """q, keys of length 1, v, beta up to 2, log decays or None."""
    q, v = random(B, H, T, K, dtype=dtype), random(B, H, T, V, dtype=dtype, seed=2)
    k = F.normalize(random(B, H, T, K, seed=1), dim=-1).to(dtype)
    beta = (2 * random(B, H, T, 1, seed=3).sigmoid()).to(dtype)
    log_decay = -random(B, H, T, 1, dtype=dtype, seed=4).abs() if gated else None
    return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}


# ---- the equation, written out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", [delta_recurrent, delta_chunked])
def test_the_forms_are_the_equation(form, gated):
    # Yang et al. 2025, eq. 10, transposed: S = alpha (I - beta k k^T) S + beta k v^T.
    x, state = inputs(13, gated), random(B, H, K, V, seed=5)
    y, last = form(**x, state=state, chunk_size=5)
    for batch in range(B):
        for head in range(H):
            S = state[batch, head]
            for t in range(13):
                q, k, v, beta = (x[name][batch, head, t] for name in ("q", "k", "v", "beta"))
                alpha = x["log_decay"][batch, head, t].exp() if gated else 1.0
                S = alpha * (torch.eye(K) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
                torch.testing.assert_close(y[batch, head, t], q @ S, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(last[batch, head], S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [delta_recurrent, delta_chunked])
def test_the_gated_rule_is_qwen3_nexts(transformers, form):
    oracle = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").torch_recurrent_gated_delta_rule
    x, state = inputs(70, True, torch.float32), random(B, H, K, V, dtype=torch.float32, seed=5)
    swapped = {name: tensor.transpose(1, 2) for name, tensor in x.items()}
    g, beta = swapped["log_decay"][..., 0], swapped["beta"][..., 0]
    wanted, last = oracle(swapped["q"], swapped["k"], swapped["v"], g=g, beta=beta, initial_state=state,
                          output_final_state=True)  # fmt: skip
    y, ours = form(**{**x, "q": x["q"] * K**-0.5}, state=state, chunk_size=16)
    torch.testing.assert_close(y.transpose(1, 2), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
def test_the_layer_is_the_papers(name):
    layer, x = mixer(name, chunk_size=16), random(1, 21, 16, seed=6)
    qkv = layer.qkv(x)
    qkv = F.silu(F.conv1d(F.pad(qkv, (0, 0, 3, 0)).mT, layer.conv.weight, groups=qkv.size(-1)).mT)
    q, k, v = (part.unflatten(-1, (4, -1))[0] for part in qkv.split(layer.split_sizes, dim=-1))  # (T, H, D)
    q, k = F.normalize(q, dim=-1) * q.size(-1) ** -0.5, F.normalize(k, dim=-1)
    beta, alpha = layer.beta(x)[0].sigmoid(), torch.ones(21, 4)
    if name == "gated_delta_net":
        alpha = torch.exp(-layer.A_log.exp() * F.softplus(layer.decay(x)[0] + layer.dt_bias))
    S, rows = torch.zeros(4, k.size(-1), v.size(-1), dtype=torch.float64), []
    for t in range(21):
        S = alpha[t][:, None, None] * S
        error = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + torch.einsum("hk,hv->hkv", k[t], error)
        rows.append(torch.einsum("hkv,hk->hv", S, q[t]))
    heads = torch.stack(rows)
    heads = (heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight).flatten(1)
    heads = heads if layer.gate is None else heads * F.silu(layer.gate(x)[0])
    torch.testing.assert_close(layer(x)[0], layer.out(heads), rtol=1e-4, atol=1e-4)  # eps of the lengths


def test_negative_eigenvalues_reverse_a_key():
    # With beta = 2 a token reflects the state: twice is once again what it was (Grazzi et al. 2024).
    k = F.normalize(random(1, 1, 1, K), dim=-1).expand(1, 1, 2, K)
    state, nothing = random(1, 1, K, V, seed=1), torch.zeros(1, 1, 2, V, dtype=torch.float64)
    for form in (delta_recurrent, delta_chunked):
        _, last = form(k, k, nothing, torch.full((1, 1, 2, 1), 2.0, dtype=torch.float64), state=state, chunk_size=2)
        torch.testing.assert_close(last, state)
    doubled, single = (mixer("delta_net", negative_eigenvalues=value) for value in (True, False))
    parts = [layer.prepare(random(1, 3, 16), *(random(1, 4, 3, 4),) * 3, None)["beta"] for layer in (doubled, single)]
    torch.testing.assert_close(parts[0], 2 * parts[1])


# ---- every form equals every other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gated", [False, True])
def test_recurrent_and_chunk_agree_with_their_gradients(gated, T):
    check_kernels_agree(delta_recurrent, delta_chunked, lambda dtype: inputs(T, gated, dtype), (B, H, K, V))


def test_a_key_repeated_through_a_chunk_is_solved_in_float32():
    # The worst case of the triangular system: every key the same, so that each token undoes the one before.
    x = inputs(64, True, torch.float32)
    x["k"], x["log_decay"] = x["k"][:, :, :1].expand(-1, -1, 64, -1), x["log_decay"] * 100
    wanted, _ = delta_recurrent(**{name: tensor.double() for name, tensor in x.items()})
    y, last = delta_chunked(**x)
    assert last.isfinite().all()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_solve_reads_below_the_diagonal_only():
    L, known = random(2, 5, 5), random(2, 5, 3, seed=1)
    wanted = torch.linalg.solve(torch.eye(5) + L.tril(-1), known)
    torch.testing.assert_close(solve_unit_lower(L, known), wanted, rtol=1e-10, atol=1e-10)


# ---- what it costs, and where it starts -----------------------------------------------------------------------------


def test_the_decay_starts_as_mamba_2s_and_is_not_decayed_away():
    size = {"n_layer": 2, "n_head": 64, "n_embd": 256, "vocab_size": 5}
    model = ConfigurableGPT(ModelArchitectureConfig.from_preset("gated_delta_net", **size))
    layer, plan = model.blocks[0].mixer, {spec.name: spec for spec in parameter_plan(model)}
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0 < A.min() < 2 and 14 < A.max() <= 16
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    for name in ("A_log", "dt_bias", "conv.weight"):
        assert plan[f"blocks.0.mixer.{name}"].init == "own"
    assert not any(plan[f"blocks.0.mixer.{name}"].weight_decay for name in ("A_log", "dt_bias"))
    assert plan["blocks.0.mixer.out.weight"].init == "residual"
    assert layer.conv.weight.abs().max() <= 0.5 < 2 * layer.conv.weight.std() * 3**0.5  # uniform within 1 / sqrt(4)
    matrices = sum(m.weight.numel() for m in (layer.qkv, layer.gate, layer.out))
    assert matrices == 6 * 256**2  # the paper's
