"""Every kernel against its plain twin, on outputs and gradients; the choice between them is deterministic."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import attention, checks, cpu_linear, libraries
from mixer_attention import MIXER_REGISTRY, ManualBackend, SDPABackend
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from user_errors import UserError

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_an_unknown_backend_is_refused(tiny):
    with pytest.raises(UserError, match="kernel_backend='plian' does not exist; did you mean 'plain'"):
        kernels.choose(ConfigurableGPT(tiny()), CPU, "plian")


# ---- kernels for recurrences: the choice, on kernels made up for it -------------------------------------------------


def fake(name, find, operation="linear"):
    return kernels.Kernel(name, operation, find)


def right(plain, device, dtype):
    return lambda **inputs: plain(**inputs)


def wrong_forward(plain, device, dtype):
    """Wrong in the last token of one head alone."""

    def form(**inputs):
        y, state = plain(**inputs)
        wrong = torch.zeros_like(y)
        wrong[0, 0, -1] = 0.2 * y.abs().max().detach()
        return y + wrong, state

    return form


def wrong_gradient(plain, device, dtype):
    """Right in its output, and a tenth too large in the gradient of the values."""
    return lambda v, **inputs: plain(v=v + 0.1 * (v - v.detach()), **inputs)


def no_gradient(plain, device, dtype):
    return lambda v, **inputs: plain(v=v.detach(), **inputs)


def not_finite(plain, device, dtype):
    return lambda **inputs: (plain(**inputs)[0] / 0, None)


def raises(plain, device, dtype):
    def form(**_):
        raise AssertionError("heads of 2 are not supported\nand more")

    return form


def absent(plain, device, dtype):
    raise libraries.AbsentError("is not installed (pip install fake)")


@pytest.fixture
def gla(tiny, monkeypatch):
    """A model of two GLA layers, and a list of kernels for it to choose from."""

    def make(*finders, **options):
        table = [fake(find.__name__, find) for find in finders]
        monkeypatch.setattr(kernels, "KERNELS", [*table, fake("other", right, "selective_scan")])
        monkeypatch.setattr(checks.recorded_calls, "__defaults__", (33,))
        return ConfigurableGPT(tiny(block_pattern="gla/none", position_encoding="none", **options))

    return make


@pytest.mark.parametrize("find, reason", [
    (wrong_forward, r"is off the plain path by 0\.2 in its output \(0\.0001 is allowed\)"),
    (wrong_gradient, r"is off the plain path by 0\.1 in a gradient \(0\.0001 is allowed\)"),
    (no_gradient, "is off the plain path by inf in a gradient"),
    (not_finite, "is off the plain path by inf in its output"),
    (raises, "failed its check: AssertionError: heads of 2 are not supported$"),
    (absent, r"is not installed \(pip install fake\)$"),
])  # fmt: skip
def test_a_kernel_that_is_wrong_or_absent_is_refused_with_the_reason(gla, find, reason):
    name = find.__name__
    model = gla(find, right)
    choice = kernels.choose(model, CPU, "auto")
    assert choice["gla"] == "right" and list(choice.not_taken["gla"]) == [name]
    assert re.match(reason, choice.not_taken["gla"][name])
    model = gla(find)
    plain = [block.mixer.forms for block in model.blocks]
    assert kernels.choose(model, CPU, "auto")["gla"] == "plain"
    assert [block.mixer.forms for block in model.blocks] == plain  # as they were
    with pytest.raises(UserError, match=f"^kernel_backend='{name}' cannot compute 'gla': {name} {reason}"):
        kernels.choose(gla(find), CPU, name)


def test_the_one_that_is_chosen_runs_in_every_layer_and_the_rest_is_not_asked(gla):
    ran = []

    def counted(plain, device, dtype):
        return lambda **inputs: ran.append(inputs["q"].size(2)) or plain(**inputs)

    model = gla(counted, raises)
    reference = copy.deepcopy(model)
    choice = kernels.choose(model, CPU, "auto")
    assert choice["gla"] == "counted" and "gla" not in choice.not_taken
    assert ran == [33, 33]  # one text, several documents
    idx = torch.randint(29, (2, 9))
    losses = [m(idx[:, :-1], idx[:, 1:])[1] for m in (model, reference)]
    assert ran == [33, 33, 8, 8] and torch.equal(*losses)
    assert not any(p.grad is not None for p in model.parameters())
    assert list(model.state_dict()) == list(reference.state_dict())
    assert kernels.choose(gla(counted), CPU, "plain")["gla"] == "plain" and len(ran) == 4


def test_the_equation_is_left_alone_where_it_is_asked_for(gla):
    choice = kernels.choose(gla(right, recurrence="recurrent"), CPU, "auto")
    assert choice["gla"] == "plain"
    assert choice.not_taken["gla"] == {"right": "is not what recurrence='recurrent' asks for"}


def test_a_kernel_with_nothing_to_do_is_an_error(gla, tiny):
    model = gla(right)
    with pytest.raises(UserError, match=r"^kernel_backend='other' has nothing to compute in a model of linear, gla; "):
        kernels.choose(model, CPU, "other")
    with pytest.raises(UserError, match=r"^kernel_backend='right' has nothing to compute in a model of linear, attent"):
        kernels.choose(ConfigurableGPT(tiny()), CPU, "right")


def test_every_name_is_known_and_what_needs_cuda_is_not_tried_on_a_cpu(tiny, nothing_compiled, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.backends() == ("auto", "plain", "onednn", "mamba_ssm", "triton", "compiled", "fla")
    pattern = "mamba,mamba2,gla,retention,linear_attention,delta_net,gated_delta_net,rwkv7,attention"
    model = ConfigurableGPT(tiny(block_pattern=pattern, position_encoding="none", n_layer=9))
    choice = kernels.choose(model, CPU, "auto")
    assert choice["attention"].startswith("sdpa") and {choice[part] for part in pattern.split(",")[:8]} == {"plain"}
    absent = "needs a C compiler, and no-such-compiler is not here"
    assert choice.not_taken["mamba"] == {"mamba_ssm": "needs CUDA", "triton": "needs CUDA", "compiled": absent}
    assert choice["short conv"] == "plain" and choice.not_taken["short conv"] == {"compiled": absent}
    assert choice.not_taken["rwkv7"] == {"fla": "needs CUDA"}
    with pytest.raises(UserError, match=r"^kernel_backend='triton' cannot compute 'mamba': triton needs CUDA$"):
        kernels.choose(model, CPU, "triton")


def test_every_operation_of_a_mixer_has_a_kernel_and_the_reverse():
    offered = {part.operation for part in MIXER_REGISTRY.values()} - {None, "attention"}
    assert offered == {kernel.operation for kernel in kernels.KERNELS}


def test_onednn_by_name(tiny, monkeypatch):
    monkeypatch.setattr(cpu_linear, "processor_vendor", lambda: "GenuineIntel")
    if torch.backends.mkldnn.is_available():
        assert kernels.choose(ConfigurableGPT(tiny()), CPU, "onednn")["linear"] == "onednn"
    monkeypatch.setattr(cpu_linear, "equals_plain", lambda: False)
    with pytest.raises(UserError, match=r"^kernel_backend='onednn' cannot compute 'linear': onednn is absent"):
        kernels.choose(ConfigurableGPT(tiny()), CPU, "onednn")


def test_the_error_is_measured_over_all_and_at_the_worst_element():
    plain = torch.ones(100)
    assert checks.relative_error(plain, 1.02 * plain) == pytest.approx(0.02, rel=1e-3)
    one_off = plain.clone()
    one_off[7] = 1.5  # 0.05 over all
    assert checks.relative_error(plain, one_off) == 0.5
    assert checks.relative_error(0 * plain, 0 * plain) == 0.0
    for bad in (plain / 0, plain[:50], None):
        assert checks.relative_error(plain, bad) == float("inf")
    assert checks.relative_error(0 * plain, 1e-9 * plain) == float("inf")


# ---- attention ------------------------------------------------------------------------------------------------------


def test_torch_says_which_sdpa_kernel_it_takes(tiny):
    causal, windowed = (ConfigurableGPT(tiny(sliding_window=w)) for w in (0, 4))
    for model in (causal, windowed):
        kernel = attention.kernel_of(model.blocks[0].mixer, model.config, CPU, torch.float32)
        assert kernel in ("flash", "math")
        assert not any(p.grad is not None for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        assert attention.kernel_of(causal.blocks[0].mixer, causal.config, CPU, torch.float32) == "math"
    manual = ConfigurableGPT(tiny(attention_backend="manual"))
    assert attention.kernel_of(manual.blocks[0].mixer, manual.config, CPU, torch.float32) is None


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "sliding_window": 4}, {"position_encoding": "alibi"},
                                     {"dropout": 0.5}], ids=str)  # fmt: skip
def test_sdpa_is_checked_against_the_equation(tiny, monkeypatch, changes):
    model = ConfigurableGPT(tiny(**changes))
    mixer = model.blocks[0].mixer
    assert attention.check(mixer, model.config, CPU, torch.float32) is None
    assert mixer.backend is SDPABackend and mixer.training
    attend = SDPABackend.attend
    monkeypatch.setattr(SDPABackend, "attend", staticmethod(lambda *args: 1.1 * attend(*args)))
    assert "by 0.1 in its output" in attention.check(mixer, model.config, CPU, torch.float32)


def test_on_cuda_sdpa_says_its_kernel_and_falls_back_to_the_equation(tiny, monkeypatch):
    monkeypatch.setattr(attention, "kernel_of", lambda *_: "flash")
    cuda, model = SimpleNamespace(type="cuda"), ConfigurableGPT(tiny())
    monkeypatch.setattr(attention, "check", lambda *_: None)
    assert kernels.choose(model, cuda, "auto", torch.bfloat16)["attention"] == "sdpa flash"
    monkeypatch.setattr(attention, "check", lambda *_: "is off")
    choice = kernels.choose(model, cuda, "auto", torch.bfloat16)
    assert choice["attention"] == "manual" and choice.not_taken["attention"] == {"sdpa": "is off"}
    assert {block.mixer.backend for block in model.blocks} == {ManualBackend}


# ---- on a GPU -------------------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


def refusal_of(kernel, part, device, dtype, **options):
    """Why the kernel may not serve this part here; a part of a useful size, in its own words of KERNELS."""
    size = {"n_layer": 1, "n_head": 4, "n_embd": 256, "block_size": 1024, "vocab_size": 29}
    config = ModelArchitectureConfig(block_pattern=f"{part}/none", position_encoding="none", **{**size, **options})
    mixer = ConfigurableGPT(config).blocks[0].mixer.to(device)
    found = [k for k in kernels.KERNELS if (k.name, k.operation) == (kernel, mixer.operation)]
    plain = mixer.forms["chunk"]
    try:
        fast = found[0].find(plain, device, dtype)
    except libraries.AbsentError as absent:
        pytest.skip(f"{kernel} {absent}")
    return checks.refusal(plain, fast, checks.recorded_calls(mixer, 256, device, dtype), dtype)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("d_state", [5, 16, 40])
def test_the_triton_scan_on_a_gpu(cuda, dtype, d_state):
    assert refusal_of("triton", "mamba", cuda, dtype, d_state=d_state) is None


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("part", ["mamba", "mamba2"])
def test_mamba_ssm_on_a_gpu(cuda, dtype, part):
    assert refusal_of("mamba_ssm", part, cuda, dtype) is None


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("part", ["linear_attention", "retention", "gla", "delta_net", "gated_delta_net", "rwkv7"])
def test_fla_on_a_gpu_is_right_or_refused(cuda, dtype, part):
    # Some versions of Triton miscompile some backwards; then the check must say so, and nothing may train on it.
    reason = refusal_of("fla", part, cuda, dtype)
    if reason:
        pytest.xfail(f"refused at start, as it should be: fla {reason}")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("window", [0, 100])
def test_sdpa_on_a_gpu(cuda, dtype, window):
    config = ModelArchitectureConfig(n_layer=1, n_head=4, n_embd=256, block_size=600, sliding_window=window)
    mixer = ConfigurableGPT(config).blocks[0].mixer.to(cuda)
    assert attention.check(mixer, config, cuda, dtype) is None
    kernel = attention.kernel_of(mixer, config, cuda, dtype)
    assert kernel in ("flash", "efficient", "cudnn") or (kernel == "math" and window)


@pytest.mark.gpu
def test_a_model_trains_on_a_gpu_with_what_auto_takes(cuda, tiny):
    model = ConfigurableGPT(tiny(block_pattern="mamba,attention")).to(cuda)
    plain = copy.deepcopy(model)
    choice = kernels.choose(model, cuda, "auto")
    assert choice["mamba"] in ("triton", "mamba_ssm") and choice["attention"].startswith("sdpa ")
    idx = torch.randint(29, (2, 17), device=cuda)
    for m in (model, torch.compile(model), plain):
        m(idx[:, :-1], idx[:, 1:])[1].backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad, rtol=1e-3, atol=1e-4)
