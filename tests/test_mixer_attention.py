"""Attention: the written-out backend against the equation, the fast ones against it, decoding against forward."""

import math

import pytest
import torch

from mixer_attention import ATTENTION_BACKEND_REGISTRY, Attention, LocalAttention, visible
from model_helpers import backends_that_train_on_cpu, scrambled
from user_errors import UserError

EXACT = {"rtol": 1e-10, "atol": 1e-10}
T = 9

VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "window1": {"sliding_window": 1},
    "window3": {"sliding_window": 3},
    "window99": {"sliding_window": 99},
    "bias": {"bias": True},
    "head_dim6": {"head_dim": 6},
    "qk_norm": {"qk_norm": True},
    "qk_layernorm": {"qk_norm": True, "normalization": "layernorm"},
    "qk_norm-projection": {"qk_norm": True, "qk_norm_scope": "projection", "n_kv_head": 2, "position_encoding": "rope"},
    "rope": {"position_encoding": "rope"},
    "alibi": {"position_encoding": "alibi"},
    "alibi-window3": {"position_encoding": "alibi", "sliding_window": 3},
    "all": {"position_encoding": "rope", "n_kv_head": 2, "sliding_window": 3, "qk_norm": True, "bias": True},
    "alibi-gqa": {"position_encoding": "alibi", "n_kv_head": 2, "normalization": "rmsnorm", "qk_norm": True},
    "both-ways": {"causal": False},
    "both-ways-window3": {"causal": False, "sliding_window": 3, "position_encoding": "rope"},
    "both-ways-alibi": {"causal": False, "position_encoding": "alibi"},
}
CAPPED = {
    "cap": {"attention_soft_cap": 0.7},
    "cap-alibi-window3": {"attention_soft_cap": 0.7, "position_encoding": "alibi", "sliding_window": 3},
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 5, 5, 5]])
RESTARTED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
INPUTS = {
    "plain": {},
    "spread": {"positions": 3 * torch.arange(T) + 5},
    "documents": {"document_ids": DOCUMENTS},
    "restarted": {"document_ids": DOCUMENTS, "positions": RESTARTED},
}

by_id = pytest.mark.parametrize("variant", VARIANTS)
by_id_capped = pytest.mark.parametrize("variant", {**VARIANTS, **CAPPED})
by_input = pytest.mark.parametrize("given", INPUTS)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def make(tiny):
    """An attention layer of a variant, every parameter random, so that scores spread and gains and biases count."""

    def attention(variant, backend, **changes):
        config = tiny(**{**VARIANTS, **CAPPED}.get(variant, {}), attention_backend=backend, **changes)
        return scrambled(Attention(config, 0), std=0.5)

    return attention


def inputs():
    return torch.randn(2, T, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()


def outputs_and_gradients(function, x, parameters):
    y = function(x)
    weights = torch.sin(torch.arange(y.numel())).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


def equation(layer, x, positions=None, document_ids=None):
    """softmax(q k^T / sqrt(D) + bias) v, a query at a time: no matrix, no mask, no broadcasting."""
    B, H, D = len(x), layer.n_head, layer.head_dim
    kv_width = layer.n_kv_head * D
    q, k, v = layer.qkv(x).split([H * D, kv_width, kv_width], dim=-1)
    norms = layer.query_norm, layer.key_norm
    if layer.query_norm is not None and layer.query_norm.weight.numel() == H * D:  # over the whole projection
        q, k, norms = layer.query_norm(q), layer.key_norm(k), (None, None)
    order = torch.arange(T)
    rows = []
    for b in range(B):
        where = order if positions is None else positions if positions.dim() == 1 else positions[b]
        for i in range(T):
            heads = []
            for h in range(H):
                shared = h * layer.n_kv_head // H
                keys = [j for j in range(T) if sees(layer, i, j, None if document_ids is None else document_ids[b])]
                q_i = placed(layer, norms[0], q[b, i, h * D : (h + 1) * D], where[i])
                scores = []
                for j in keys:
                    k_j = placed(layer, norms[1], k[b, j, shared * D : (shared + 1) * D], where[j])
                    score = (q_i * k_j).sum() / math.sqrt(D)
                    if layer.soft_cap:
                        score = layer.soft_cap * torch.tanh(score / layer.soft_cap)
                    if type(layer.position_encoding).__name__ == "ALiBi":
                        score = score - 2 ** (-8 * (h + 1) / H) * abs(where[i] - where[j])
                    scores.append(score.exp())
                values = [v[b, j, shared * D : (shared + 1) * D] for j in keys]
                heads.append(sum(s * value for s, value in zip(scores, values, strict=True)) / sum(scores))
            rows.append(layer.out(torch.cat(heads)))
    return torch.stack(rows).view(B, T, -1)


def sees(layer, i, j, documents):
    return (
        (j <= i or not layer.causal)
        and (abs(i - j) < layer.window or not layer.window)
        and (documents is None or documents[i] == documents[j])
    )


def placed(layer, norm, x, position):
    """A query or key (D,), normalised, then turned as complex numbers where the layer has RoPE."""
    x = x if norm is None else norm(x)
    if type(layer.position_encoding).__name__ != "RoPE":
        return x
    half = len(x) // 2
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * position * 10000.0 ** (-torch.arange(half) / half))
    return torch.cat((turned.real, turned.imag))


# ---- backends -------------------------------------------------------------------------------------------------------


@by_input
@by_id_capped
def test_manual_equals_the_equation(make, variant, given):
    layer, x = make(variant, "manual"), inputs()
    parameters = list(layer.parameters())
    ours = outputs_and_gradients(lambda x: layer(x, **INPUTS[given]), x, parameters)
    wanted = outputs_and_gradients(lambda x: equation(layer, x, **INPUTS[given]), x, parameters)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


FAST = [name for name in backends_that_train_on_cpu() if name != "manual"]


@by_input
@by_id
@pytest.mark.parametrize("backend", FAST)
def test_a_fast_backend_equals_manual_with_all_gradients(make, backend, variant, given):
    fast, manual = make(variant, backend), make(variant, "manual")
    ours = outputs_and_gradients(lambda x: fast(x, **INPUTS[given]), inputs(), list(fast.parameters()))
    wanted = outputs_and_gradients(lambda x: manual(x, **INPUTS[given]), inputs(), list(manual.parameters()))
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# Not compiled, flex takes a tenth of a second each, so: every variant once, and each kind of mask without documents.
FLEX = [(variant, "restarted") for variant in {**VARIANTS, **CAPPED}]
FLEX += [(variant, "plain") for variant in ("mha", "window3", "alibi", "both-ways", "cap")]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("variant, given", FLEX, ids=["-".join(case) for case in FLEX])
def test_flex_equals_manual(make, variant, given):
    x = inputs().detach()
    with torch.no_grad():  # on CPU it has no backward
        got, want = (make(variant, backend)(x, **INPUTS[given]) for backend in ("flex", "manual"))
    torch.testing.assert_close(got, want, **EXACT)


def test_sdpa_takes_the_fused_causal_path_where_it_can(make, monkeypatch):
    # A mask costs the fused kernel; plain causal attention must not pay for one.
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention",
                        lambda *args, **kwargs: seen.append(kwargs) or real(*args, **kwargs))  # fmt: skip
    for variant, causal_flag in (("mha", True), ("gqa", True), ("rope", True), ("window99", True), ("window3", False)):
        make(variant, "sdpa")(inputs())
        assert seen[-1].get("is_causal", False) == causal_flag, variant
        assert (seen[-1].get("attn_mask") is None) == causal_flag, variant


@pytest.mark.parametrize("backend", ["manual", *FAST])
def test_half_precision_stays_close(make, backend):
    layer, x = make("all", backend), inputs().detach()
    wanted = layer(x)
    got = layer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["manual", *FAST])
def test_dropout_falls_on_attention_weights_in_training_alone(make, backend):
    layer, x = make("mha", backend, dropout=0.5), inputs().detach()
    exact = make("mha", backend)(x)
    torch.testing.assert_close(layer.eval()(x), exact, **EXACT)
    layer.train()
    assert not torch.allclose(layer(x), layer(x))
    draws = layer(x.repeat(2000, 1, 1)).view(2000, 2, T, 16)
    off = (draws.mean(0) - exact) / (draws.std(0) / 2000**0.5)  # in standard errors: 288 of them
    assert off.abs().max() < 5 and off.std() > 0.5


# ---- what a query may see -------------------------------------------------------------------------------------------


def test_visible_as_pictures():
    def picture(*args):
        return ["".join(".x"[int(seen)] for seen in row) for row in visible(torch.arange(4), torch.arange(4), *args)]

    assert picture(True, 0) == ["x...", "xx..", "xxx.", "xxxx"]
    assert picture(True, 2) == ["x...", "xx..", ".xx.", "..xx"]
    assert picture(True, 1) == ["x...", ".x..", "..x.", "...x"]
    assert picture(False, 2) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert visible(torch.arange(4), torch.arange(4), False, 0) is None
    documents = torch.tensor([[0, 0, 1, 1]])
    mask = visible(torch.arange(4), torch.arange(4), True, 0, documents, documents)
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask[0]] == ["x...", "xx..", "..x.", "..xx"]


# ---- one token at a time --------------------------------------------------------------------------------------------

CHUNKS = {"ones": [1] * 24, "prompt": [10] + [1] * 14, "long-prompt": [20, 1, 1, 1, 1], "mixed": [1, 4, 1, 7, 2, 9]}
CAUSAL = [name for name, changes in {**VARIANTS, **CAPPED}.items() if changes.get("causal", True)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("variant", CAUSAL)
def test_step_equals_forward(make, variant, chunks):
    layer = make(variant, "manual")
    x, outputs = torch.randn(2, 24, 16), []
    with torch.no_grad():
        state = layer.init_state(2, dtype=x.dtype)
        for piece in x.split(CHUNKS[chunks], dim=1):
            y, state = layer.step(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **EXACT)


@pytest.mark.parametrize("variant", [name for name in CAUSAL if name not in CAPPED])
def test_step_of_a_fast_backend_equals_forward(make, variant):
    layer, x = make(variant, "sdpa"), torch.randn(2, 12, 16)
    with torch.no_grad():
        first, state = layer.step(x[:, :7], layer.init_state(2, dtype=x.dtype))
        second, state = layer.step(x[:, 7:], state)
        torch.testing.assert_close(torch.cat((first, second), dim=1), layer(x), **EXACT)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_windows_cache_is_bounded(make, window):
    layer = make("mha", "manual", sliding_window=window)
    with torch.no_grad():
        _, state = layer.step(torch.randn(1, 300, 16), layer.init_state(1))
        for _ in range(200):
            assert state["keys"].untyped_storage().nbytes() <= (4 * window + 16) * 16 * 8
            _, state = layer.step(torch.randn(1, 1, 16), state)
    assert state["length"] == 500


def test_a_full_cache_grows_by_doubling(make):
    layer, sizes = make("mha", "manual"), set()
    with torch.no_grad():
        state = layer.init_state(1)
        for _ in range(130):
            _, state = layer.step(torch.randn(1, 1, 16), state)
            sizes.add(state["keys"].size(2))
    assert sizes == {16, 32, 64, 128, 256}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "head_dim6", "window1", "window3", "window99"])
def test_state_bytes_are_those_of_the_tensors_kept(make, variant, dtype):
    layer = make(variant, "manual").to(dtype)
    with torch.no_grad():
        _, state = layer.step(torch.randn(2, 32, 16, dtype=dtype), layer.init_state(2, dtype=dtype))
    assert 2 * layer.state_bytes(32, dtype) == state["keys"].nbytes + state["values"].nbytes


def test_the_cache_takes_the_dtype_of_autocast(make):
    layer, x = make("rope", "manual").float(), torch.randn(1, 12, 16, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, state = layer.step(x[:, :5], layer.init_state(1, dtype=torch.float32))
        second, state = layer.step(x[:, 5:], state)
        wanted = layer(x)
    assert state["keys"].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat((first, second), dim=1), wanted, rtol=0.05, atol=0.05)


# ---- cost and refusals ----------------------------------------------------------------------------------------------


def test_mixing_flops_by_hand(make):
    assert make("mha", "sdpa").mixing_flops(100) == 2 * 2 * 16 * 100  # q k^T and weights v, over H D = 16
    assert make("mqa", "sdpa").mixing_flops(100) == 2 * 2 * 16 * 100  # fewer keys to keep, as many products
    assert make("head_dim6", "sdpa").mixing_flops(100) == 2 * 2 * 24 * 100
    assert make("window3", "sdpa").mixing_flops(100) == 2 * 2 * 16 * 3
    assert make("window3", "sdpa").mixing_flops(2) == 2 * 2 * 16 * 2


@pytest.mark.parametrize("changes, words", [
    ({"n_embd": 18}, ["n_embd=18", "n_head=4"]),
    ({"n_kv_head": 3}, ["n_head=4", "n_kv_head=3"]),
    ({"n_kv_head": 8}, ["n_head=4", "n_kv_head=8"]),
    ({"n_kv_head": -1}, ["n_kv_head=-1"]),
    ({"sliding_window": -1}, ["sliding_window=-1"]),
    ({"attention_soft_cap": 5.0}, ["attention_soft_cap=5.0", "attention_backend='sdpa'", "'manual'"]),
    ({"attention_backend": "flex", "dropout": 0.1}, ["attention_backend='flex'", "dropout=0.1"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_attention_cannot_honour_is_refused_with_both_settings(tiny, changes, words):
    with pytest.raises(UserError) as refusal:
        Attention(tiny(**changes), 0)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_backend_that_cannot_train_here_says_so(make):
    assert {"manual", "sdpa"} <= {*backends_that_train_on_cpu()}
    for backend in ATTENTION_BACKEND_REGISTRY:
        make("mha", backend).check_device(torch.device("cuda"))
    with pytest.raises(UserError, match=r"attention_backend='flex' trains on CUDA alone and this is cpu"):
        make("mha", "flex").check_device(torch.device("cpu"))


def test_a_head_width_of_its_own_needs_no_division(tiny):
    assert Attention(tiny(n_embd=18, head_dim=4), 0).out.weight.shape == (18, 16)


# ---- shared heads and the hybrid's window ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_head, sharing, heads", [(8, 1, 8), (8, 2, 4), (8, 3, 2), (6, 4, 1), (12, 4, 3), (4, 99, 1)])
def test_queries_per_kv_head_takes_the_most_heads_that_divide(tiny, n_head, sharing, heads):
    config = tiny(n_embd=48, n_head=n_head, queries_per_kv_head=sharing)
    assert Attention(config, 0).n_kv_head == heads
    assert Attention(config.replace(n_kv_head=n_head), 0).n_kv_head == n_head  # the count itself goes first


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_a_window_counts_the_keys_that_a_token_in_the_middle_sees(tiny, causal):
    layer, order = Attention(tiny(sliding_window=3, causal=causal), 0), torch.arange(T)
    n_keys = visible(order, order, causal, 3)[T // 2].sum().item()
    assert n_keys == (3 if causal else 5)
    assert layer.mixing_flops(T) == 4 * layer.n_head * layer.head_dim * n_keys


def test_local_attention_is_attention_with_a_window(tiny):
    local = LocalAttention(tiny(hybrid_local_window=3), 0)
    windowed = Attention(tiny(sliding_window=3), 0)
    windowed.load_state_dict(local.state_dict())
    assert torch.equal(local(inputs()), windowed(inputs()))
    assert local.state_bytes(99) == windowed.state_bytes(99) < Attention(tiny(), 0).state_bytes(99)


@pytest.mark.parametrize("changes, words", [
    ({"queries_per_kv_head": 0}, "queries_per_kv_head=0 must be at least 1"),
    ({"qk_norm_scope": "heads"}, "qk_norm_scope='heads' must be head or projection"),
    ({"hybrid_local_window": 0}, "hybrid_local_window=0 must be at least 1"),
    ({"sliding_window": 4, "block_pattern": "local_attention"}, "sliding_window=4 is of .*hybrid_local_window"),
])  # fmt: skip
def test_options_out_of_range_are_refused(tiny, changes, words):
    with pytest.raises(UserError, match=words):
        LocalAttention(tiny(**changes), 0)
