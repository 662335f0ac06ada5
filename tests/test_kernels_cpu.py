"""The kernels for CPUs against their plain twins, on outputs and gradients, and where they step aside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import cpu_attention, cpu_ffn, cpu_linear, cpu_norm
from model_builder import ConfigurableGPT

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


# ---- linear layers ---------------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 24), (1, 1, 3), (2, 3, 4, 16)], ids=str)
def test_onednn_linear_equals_plain(shape, bias):
    x, weight, b = torch.randn(shape), torch.randn(10, shape[-1]), torch.randn(10) if bias else None
    leaves = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    weights = torch.randn(*shape[:-1], 10)
    results = []
    for function in (F.linear, cpu_linear.linear):
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_onednn_linear_takes_a_gradient_that_is_not_contiguous():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    grads = [
        torch.autograd.grad((f(x, weight).t() @ torch.ones(4, 1)).sum(), (x, weight))
        for f in (F.linear, cpu_linear.linear)
    ]
    for plain, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain)


@needs_onednn
def test_an_installed_model_gives_the_same_loss_and_gradients(tiny):
    plain = ConfigurableGPT(tiny(bias=True))
    fast = copy.deepcopy(plain)
    cpu_linear.install(fast)
    idx = torch.randint(29, (2, 9))
    for model in (plain, fast):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert list(plain.state_dict()) == list(fast.state_dict())


def test_other_dtypes_and_autocast_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu_linear.OneDNNLinear, "apply", lambda *_: pytest.fail("went to oneDNN"))
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    assert cpu_linear.linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_linear.linear(x, weight).dtype == torch.bfloat16


@needs_onednn
def test_auto_takes_onednn_on_amd_and_only_when_the_check_passes(tiny, monkeypatch):
    model = ConfigurableGPT(tiny())
    monkeypatch.setattr(cpu_linear, "processor_vendor", lambda: "AuthenticAMD")
    assert kernels.choose(copy.deepcopy(model), CPU, "auto")["linear"] == "onednn"
    assert kernels.choose(copy.deepcopy(model), CPU, "plain")["linear"] == "plain"
    monkeypatch.setattr(cpu_linear, "linear", lambda x, weight, bias=None: 1.01 * F.linear(x, weight, bias))
    assert kernels.choose(copy.deepcopy(model), CPU, "auto")["linear"] == "plain"
    monkeypatch.undo()
    monkeypatch.setattr(cpu_linear, "processor_vendor", lambda: "GenuineIntel")
    assert kernels.choose(copy.deepcopy(model), CPU, "auto")["linear"] == "plain"


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (2, 7, 24), (1, 1, 3), (2, 3, 4, 16)], ids=str)
def test_fast_rmsnorm_equals_plain(shape, dtype):
    leaves = [torch.randn(size, dtype=dtype, requires_grad=True) for size in (shape, shape[-1:])]
    grad = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]  # not contiguous
    results = []
    for function in (cpu_norm.plain, cpu_norm.rms_norm):
        y = function(*leaves, 1e-5)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, **tolerance)


def test_fast_rmsnorm_leaves_other_tensors_to_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu_norm.RMSNormFunction, "apply", lambda *_: pytest.fail("went the fast path"))
    x, weight = torch.randn(3, 4), torch.ones(4)
    assert cpu_norm.rms_norm(x.bfloat16(), weight, 1e-5).shape == x.shape
    assert cpu_norm.rms_norm(x.to("meta"), weight.to("meta"), 1e-5).device.type == "meta"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(
        cpu_norm.rms_norm(x.t(), torch.ones(3), 1e-5), cpu_norm.plain(x.t(), torch.ones(3), 1e-5)
    )


@pytest.mark.parametrize("pattern", ["attention", "mamba2/none"])
def test_auto_takes_the_fast_rmsnorm_where_there_is_one(tiny, pattern, monkeypatch):
    def model():
        return ConfigurableGPT(tiny(normalization="rmsnorm", block_pattern=pattern, position_encoding="none"))

    fast, plain = model(), model()
    assert kernels.choose(fast, CPU, "auto")["norm"] == "fewer passes"
    assert "norm" not in kernels.choose(plain, CPU, "plain")
    idx = torch.randint(29, (2, 9))
    for m in (plain, fast):
        m(idx[:, :-1], idx[:, 1:])[1].backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert "norm" not in kernels.choose(ConfigurableGPT(tiny(normalization="layernorm")), CPU, "auto")
    monkeypatch.setattr(cpu_norm, "equals_plain", lambda: False)
    assert "norm" not in kernels.choose(model(), CPU, "auto")


# ---- an FFN, or attention, as one node -------------------------------------------------------------------------------

ONE_NODE = {
    "gelu": {"ffn_type": "standard", "activation": "gelu"},
    "silu-bias": {"ffn_type": "standard", "activation": "silu", "bias": True},
    "relu": {"ffn_type": "standard", "activation": "relu"},
    "swiglu": {"ffn_type": "swiglu"},
    "swiglu-bias": {"ffn_type": "swiglu", "bias": True},
    "geglu": {"ffn_type": "geglu"},
    "rope": {"position_encoding": "rope"},
    "rope-bias-heads": {"position_encoding": "rope", "bias": True, "head_dim": 6},
    "no-position": {"position_encoding": "none"},
    "window": {"position_encoding": "rope", "sliding_window": 70},  # wider than the text, so that it hides nothing
}


def both(config, monkeypatch):
    """The same model with and without kernels, as on a machine where oneDNN is the faster."""
    monkeypatch.setattr(cpu_linear, "processor_vendor", lambda: "AuthenticAMD")
    plain, fast = ConfigurableGPT(config), ConfigurableGPT(config)
    return plain, fast, kernels.choose(fast, CPU, "auto")


def gradients(model, idx, **more):
    model(idx[:, :-1], idx[:, 1:], **more)[1].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@needs_onednn
@pytest.mark.parametrize("name, tokens, in_c", [
    ("ShortAttentionFunction", 11, False), ("AttentionFunction", 70, False), ("CompiledAttentionFunction", 70, True),
    ("CompiledAttentionFunction", 11, True),
])  # fmt: skip
@pytest.mark.parametrize("changes", ONE_NODE.values(), ids=ONE_NODE)
def test_one_node_equals_the_parts(tiny, monkeypatch, changes, name, tokens, in_c):
    if in_c and not cpu_attention.is_compiled(tokens):
        pytest.skip("no C compiler is here")
    monkeypatch.setattr(cpu_attention, "is_compiled", lambda T: in_c)
    plain, fast, choice = both(tiny(**{"block_size": 80, **changes}), monkeypatch)
    assert choice["ffn"] == "one node" and choice["attention"] == "sdpa, one node" + in_c * ", compiled"
    calls = []
    for function in (getattr(cpu_attention, name), cpu_ffn.StandardFunction, cpu_ffn.GatedFunction):
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *a, apply=apply: calls.append(apply) or apply(*a))
    idx = torch.randint(29, (3, tokens + 1))
    wanted, got = gradients(plain, idx), gradients(fast, idx)
    assert len(calls) == 4  # two in each of two blocks
    for name in wanted:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_texts_that_are_too_long_for_c_are_not_said_to_be_in_it():
    assert not cpu_attention.is_compiled(cpu_attention.LONG + 1)
    assert cpu_attention.function_for(cpu_attention.LONG + 1) is cpu_attention.AttentionFunction


@needs_onednn
def test_one_node_keeps_names_copies_and_recomputes(tiny, monkeypatch):
    plain, fast, _ = both(tiny(position_encoding="rope", ffn_type="swiglu"), monkeypatch)
    assert list(plain.state_dict()) == list(fast.state_dict())
    copied, idx = copy.deepcopy(fast), torch.randint(29, (3, 12))
    wanted = gradients(plain, idx)
    got = gradients(copied, idx)
    assert all((got[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)
    assert all(parameter.grad is None for parameter in fast.parameters())  # the copy computes with its own weights
    for block in fast.blocks:
        block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=False)
    got = gradients(fast, idx)
    assert all((got[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)


@needs_onednn
@pytest.mark.parametrize("changes, part", [
    ({"activation": "relu2"}, "ffn"), ({"activation": "gelu_tanh"}, "ffn"), ({"n_kv_head": 2}, "attention"),
    ({"qk_norm": True}, "attention"), ({"dropout": 0.1}, "attention"), ({"position_encoding": "alibi"}, "attention"),
    ({"attention_backend": "manual"}, "attention"), ({"causal": False}, "attention"),
])  # fmt: skip
def test_what_one_node_does_not_have_stays_in_parts(tiny, monkeypatch, changes, part):
    _, _, choice = both(tiny(**{"ffn_type": "standard", **changes}), monkeypatch)
    assert "one node" not in choice.get(part, "")


@needs_onednn
def test_documents_windows_positions_and_other_dtypes_take_the_parts(tiny, monkeypatch):
    plain, fast, choice = both(tiny(position_encoding="rope", sliding_window=3), monkeypatch)
    assert choice["attention"].startswith("sdpa, one node")
    for name in ("AttentionFunction", "ShortAttentionFunction", "CompiledAttentionFunction"):
        function = getattr(cpu_attention, name)
        monkeypatch.setattr(function, "apply", lambda *_: pytest.fail("went as one node"))
    idx = torch.randint(29, (3, 12))
    inputs = [{}, {"document_ids": torch.arange(11).expand(3, 11) // 4}, {"positions": torch.arange(11) + 2}]
    for more in inputs:
        torch.testing.assert_close(fast(idx[:, :-1], **more)[0], plain(idx[:, :-1], **more)[0], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(idx[:, :2])
    assert fast.double()(idx[:, :2])[0].dtype == torch.float64


@needs_onednn
@pytest.mark.parametrize("file, name", [(cpu_ffn, "weight_gradient"), (cpu_attention, "input_gradient")])
def test_one_node_that_is_wrong_is_not_taken(tiny, monkeypatch, file, name):
    right = getattr(file, name)
    monkeypatch.setattr(file, name, lambda *a, **k: 1.001 * right(*a, **k))
    _, _, choice = both(tiny(), monkeypatch)
    wrong, other = ("ffn", "attention") if file is cpu_ffn else ("attention", "ffn")
    assert "one node" not in choice.get(wrong, "") and "one node" in choice[other]
