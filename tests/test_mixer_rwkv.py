"""RWKV-7: every form against the paper's equation and every other, initial values, cost."""

import pytest
import torch
import torch.nn.functional as F

from mixer_rwkv import FASTEST_LOG_DECAY, FIRST_VALUE, LONGEST_CHUNK, RWKV7, rwkv7_chunked, rwkv7_recurrent, usual_rank
from model_builder import ConfigurableGPT, parameter_plan
from model_config import ModelArchitectureConfig
from model_helpers import scrambled
from recurrence_helpers import (
    LENGTHS,
    check_kernels_agree,
    mixer,
    random,
)
from training_config import TrainConfig
from training_recompute import checkpoint_activations
from user_errors import UserError

B, H, K, V = 2, 3, 4, 5
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def inputs(T, dtype=torch.float64):
    r, k, v = (random(B, H, T, width, dtype=dtype, seed=seed) for seed, width in enumerate((K, K, V)))
    kappa = F.normalize(random(B, H, T, K, seed=4), dim=-1).to(dtype)
    log_decay = FASTEST_LOG_DECAY * random(B, H, T, K, dtype=dtype, seed=3).sigmoid()
    rate = random(B, H, T, K, dtype=dtype, seed=5).sigmoid()
    return {"r": r, "log_decay": log_decay, "k": k, "v": v, "kappa": kappa, "rate": rate}


# ---- the equation, written out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [rwkv7_recurrent, rwkv7_chunked])
def test_the_forms_are_the_equation(form):
    # Peng et al. 2025, eq. 17 and 18, S (V, K) as there: S = S (diag(w) - kappa^T (a * kappa)) + v^T k, y = S r^T.
    x, state = inputs(13), random(B, H, K, V, seed=6)
    y, last = form(**x, state=state, chunk_size=5)
    for batch in range(B):
        for head in range(H):
            S = state[batch, head].T
            for t in range(13):
                r, log_decay, k, v, kappa, rate = (tensor[batch, head, t] for tensor in x.values())
                S = S @ (torch.diag(log_decay.exp()) - torch.outer(kappa, rate * kappa)) + torch.outer(v, k)
                torch.testing.assert_close(y[batch, head, t], S @ r, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(last[batch, head].T, S, rtol=1e-10, atol=1e-10)


def papers_time_mixing(layer, x, first_value=None):
    """Section 4.1 to 4.3 token by token, 4 heads: x and the first layer's value (T, 16) -> (y, its own value)."""
    previous = torch.cat((torch.zeros(1, 16), x[:-1]))
    xr, xw, xk, xv, xa, xg = (x + (previous - x) * lean for lean in layer.shift)
    r, k, v = xr @ layer.receptance.weight.T, xk @ layer.key.weight.T, xv @ layer.value.weight.T
    if first_value is not None:  # v = v' + (v'_0 - v') sigmoid(v0 + xv V1 V2), as in the authors' code
        gate = layer.value_gate
        v = v + (first_value - v) * (gate.up.bias + xv @ gate.down.weight.T @ gate.up.weight.T).sigmoid()
    d = torch.tanh(xw @ layer.decay.down.weight.T) @ layer.decay.up.weight.T + layer.decay.up.bias
    w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * d.sigmoid())
    a = (xa @ layer.rate.down.weight.T @ layer.rate.up.weight.T + layer.rate.up.bias).sigmoid()
    g = (xg @ layer.gate.down.weight.T).sigmoid() @ layer.gate.up.weight.T
    kappa = F.normalize((k * layer.kappa_scale).unflatten(-1, (4, 4)), dim=-1)
    k, value = k * (1 + (a - 1) * layer.rate_in_key), v
    r, k, v, w, a = (z.unflatten(-1, (4, 4)) for z in (r, k, v, w, a))  # (T, H, D)
    S, rows = torch.zeros(4, 4, 4, dtype=torch.float64), []
    for t in range(len(x)):
        held = torch.einsum("hvk,hk->hv", S, kappa[t])
        S = S * w[t][:, None, :] - held[..., None] * (a[t] * kappa[t])[:, None, :] + v[t][..., None] * k[t][:, None, :]
        rows.append(torch.einsum("hvk,hk->hv", S, r[t]))
    p = torch.stack(rows).flatten(1)
    p = F.group_norm(p, 4, layer.norm.weight, layer.norm.bias, eps=4e-5)  # head width x 1e-5
    p = p + ((r * layer.bonus * k).sum(-1, keepdim=True) * v).flatten(1)
    return (g * p) @ layer.out.weight.T, value


def test_the_first_layer_is_the_papers():
    layer, x = mixer("rwkv7", chunk_size=16), random(1, 21, 16, seed=6)
    expected, value = papers_time_mixing(layer, x[0])
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)
    y, handed_on = layer(x, carried={"else": x})
    torch.testing.assert_close((y[0], handed_on[FIRST_VALUE][0], handed_on["else"]), (expected, value, x), **EXACT)


def test_a_later_layer_mixes_in_the_first_value():
    layer, x, first = mixer("rwkv7", layer=2, chunk_size=16), random(1, 21, 16, seed=6), random(1, 21, 16, seed=9)
    y, handed_on = layer(x, carried={FIRST_VALUE: first})
    torch.testing.assert_close(y[0], papers_time_mixing(layer, x[0], first[0])[0], **EXACT)
    assert handed_on[FIRST_VALUE] is first
    with pytest.raises(ValueError, match="the first one's value"):  # never silently without it
        layer(x)


def small(**changes):
    """A model of the paper's architecture in float64 with random weights, 3 layers of 16."""
    size = {"n_layer": 3, "n_head": 4, "n_embd": 16, "block_size": 16, "vocab_size": 7, "chunk_size": 4}
    return scrambled(ConfigurableGPT(ModelArchitectureConfig.from_preset("rwkv7", **{**size, **changes})).double())


def papers_model(model, ids):
    """The whole network of section 4 and figure 1 written out, of one text: ids (T,) -> logits (T, V)."""

    def norm(x, of):
        return F.layer_norm(x, (16,), of.weight, of.bias, 1e-5)

    x, first = norm(model.token_embedding.weight[ids], model.embedding_norm), None
    for block in model.blocks:
        y, value = papers_time_mixing(block.mixer, norm(x, block.mixer_norm), first)
        x, first = x + y, value if first is None else first
        h = norm(x, block.ffn_norm)
        shifted = h + (torch.cat((torch.zeros(1, 16), h[:-1])) - h) * block.ffn.shift
        x = x + (shifted @ block.ffn.up.weight.T).relu().square() @ block.ffn.down.weight.T
    return norm(x, model.final_norm) @ model.head.weight.T


def test_the_preset_is_the_papers_network_with_its_gradients():
    model, ids = small(), torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0])
    logits, expected = model(ids[None])[0][0], papers_model(model, ids)
    torch.testing.assert_close(logits, expected, **EXACT)
    weights = random(11, 7, seed=3)
    found, wanted = (torch.autograd.grad((out * weights).sum(), [*model.parameters()]) for out in (logits, expected))
    for (name, _), one, two in zip(model.named_parameters(), found, wanted, strict=True):
        assert two.any(), name
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pattern", ["attention,rwkv7/rwkv7", "rwkv7+attention,mamba2,rwkv7", "rwkv7,attention/none"])
def test_in_a_hybrid_the_first_of_its_kind_gives_the_value(pattern):
    model, ids = small(block_pattern=pattern, n_layer=5), torch.randint(7, (2, 13))
    layers = [[m for m in block.modules() if isinstance(m, RWKV7)] for block in model.blocks]
    (first, *later) = [layer for found in layers for layer in found]
    assert first.value_gate is None and later and all(layer.value_gate is not None for layer in later)
    with torch.no_grad():
        before = model(ids)[0]
        state, columns = model.init_state(2), []
        for piece in ids.split([5, 1, 7], dim=1):
            logits, state = model.step(piece, state)
            columns.append(logits)
        torch.testing.assert_close(torch.cat(columns, dim=1), before, **EXACT)
        seen = []
        later[-1].register_forward_pre_hook(lambda _, given: seen.append(given[3][FIRST_VALUE]))
        first.register_forward_hook(lambda _, given, out: seen.append(out[1][FIRST_VALUE]))
        model(ids)
    assert seen[0] is seen[1]


def test_without_the_residual_no_layer_reads_another():
    model = small(value_residual=False)
    assert not any("value_gate" in name for name, _ in model.named_parameters())
    assert model.blocks[2](random(1, 5, 16, seed=1)).shape == (1, 5, 16)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(kind):
    ids, grads = torch.randint(7, (2, 13)), []
    for setting in ("none", kind):
        model = small()
        checkpoint_activations(model, TrainConfig(gradient_checkpointing=setting))
        grads.append(torch.autograd.grad(model(ids, ids)[1], [*model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_channel_mixing_starts_as_the_authors_code_does():
    model = ConfigurableGPT(ModelArchitectureConfig.from_preset("rwkv7", n_layer=4, n_head=2, n_embd=32, vocab_size=5))
    for index, block in enumerate(model.blocks):
        lean = (1 - index / 4) ** 4
        torch.testing.assert_close(block.ffn.shift, 1 - (torch.arange(32) / 32) ** lean)
        assert not block.ffn.down.weight.any() and 0 < block.ffn.up.weight.abs().max() <= 0.5 / 32**0.5
    gate = model.blocks[1].mixer.value_gate
    torch.testing.assert_close(gate.up.bias, 0.73 - 0.4 * (torch.arange(32) / 31 - 0.5))
    assert not gate.down.weight.any() and gate.up.weight.any()


# ---- every form equals every other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", LENGTHS)
def test_recurrent_and_chunk_agree_with_their_gradients(T):
    check_kernels_agree(rwkv7_recurrent, rwkv7_chunked, lambda dtype: inputs(T, dtype), (B, H, K, V))


def test_the_longest_chunk_at_the_fastest_decay_is_safe_in_float32():
    x = {name: tensor.requires_grad_() for name, tensor in inputs(LONGEST_CHUNK, torch.float32).items()}
    with torch.no_grad():
        x["log_decay"].fill_(FASTEST_LOG_DECAY)
    results = []
    for form in (rwkv7_recurrent, rwkv7_chunked):
        y, last = form(**x, chunk_size=LONGEST_CHUNK)
        results.append((y, last, *torch.autograd.grad(y.square().sum(), [*x.values()])))
    for one, two in zip(*results, strict=True):
        size = one.abs().max().clamp(min=1.0)
        torch.testing.assert_close(two / size, one / size, rtol=1e-4, atol=1e-4)


# ---- what it costs, and where it starts -----------------------------------------------------------------------------


def test_it_starts_as_the_authors_code_does():
    model = ConfigurableGPT(ModelArchitectureConfig.from_preset("rwkv7", n_layer=4, n_head=2, n_embd=32, vocab_size=5))
    plan = {spec.name: spec for spec in parameter_plan(model)}
    first, second = model.blocks[0].mixer, model.blocks[1].mixer
    for layer, index in ((first, 0), (second, 1)):
        assert not layer.out.weight.any() and not layer.decay.down.weight.any() and not layer.gate.down.weight.any()
        torch.testing.assert_close(layer.shift[1], 1 - (torch.arange(32) / 32) ** (0.9 * (1 - index / 4)))
        assert layer.norm.weight.unique().item() == pytest.approx(((index + 1) / 4) ** 0.7)
        assert layer.receptance.weight.abs().max() <= 0.5 / 32**0.5 and layer.key.weight.abs().max() <= 0.05 / 32**0.5
        ratio, n = index / 3, torch.arange(32)
        inside = (n % 16 - 7.5) / 7.5
        decay = -6 + 6 * (n / 31) ** (1 + ratio**0.3) + 0.5 + 2.5 * inside * inside.abs()
        torch.testing.assert_close(layer.decay.up.bias, decay)
        up = layer.rate.up.weight  # orthogonal, 0.1 long
        torch.testing.assert_close(up.T @ up, 0.01 * torch.eye(up.size(1)), rtol=1e-4, atol=1e-6)
    assert not torch.equal(first.rate.up.weight, second.rate.up.weight)
    for name in ("shift", "kappa_scale", "rate_in_key", "bonus", "decay.up.bias"):
        assert plan[f"blocks.0.mixer.{name}"].init == "own" and not plan[f"blocks.0.mixer.{name}"].weight_decay
    assert (first.rate_in_key == 1.02).all() and (first.bonus == -0.04).all()
    assert [usual_rank(2.5, width) for width in (16, 768, 2048)] == [32, 64, 128]


def test_a_chunk_that_would_overflow_is_refused(tiny):
    with pytest.raises(UserError, match="chunk_size=256 would overflow float32 in 'rwkv7'; use 128 or less"):
        ConfigurableGPT(tiny(block_pattern="rwkv7", position_encoding="none", chunk_size=256))
