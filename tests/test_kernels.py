"""Every kernel against its plain twin, on outputs and gradients; the choice between them is deterministic."""

import copy

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import cpu_linear, cpu_norm
from model_builder import ConfigurableGPT
from user_errors import UserError

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


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


def test_an_unknown_backend_is_refused(tiny):
    with pytest.raises(UserError, match="kernel_backend='plian' does not exist; did you mean 'plain'"):
        kernels.choose(ConfigurableGPT(tiny()), CPU, "plian")


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
