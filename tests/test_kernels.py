"""Every kernel against its plain twin, on outputs and gradients; the choice between them is deterministic."""

import copy

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import cpu_linear
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
