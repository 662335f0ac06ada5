"""The kernels in C against their plain twins, on outputs, states and gradients; and where there is no compiler."""

import copy
import functools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import checks, compiled, cpu_attention, cpu_conv, cpu_experts, cpu_gate, cpu_scan, cpu_ssd
from kernels.libraries import AbsentError
from mamba_helpers import mamba2_inputs, mamba_inputs, outputs_and_gradients, runs_of
from mixer_mamba import gated_rms_norm
from mixer_mamba_scan import goes_on, selective_scan_recurrent, ssd_recurrent
from mixer_short_conv import ShiftedSum, causal_conv
from model_builder import ConfigurableGPT
from model_components import silu
from model_moe import Experts

CPU = torch.device("cpu")
has_compiler = compiled.is_here("cpu_gate")
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C compiler is here")


def scan(*inputs):
    return cpu_scan.find(None, CPU, torch.float32)(*inputs)


def assert_near(got, wanted, allowed=2e-6):
    for one, two in zip(got, wanted, strict=True):
        assert one is two is None or checks.relative_error(two, one) <= allowed


# ---- the selective scan ----------------------------------------------------------------------------------------------

SHAPES = [(1, 3, 1), (15, 64, 4), (16, 65, 16), (17, 128, 3), (50, 70, 5)]  # T, D, N: chunks are 16, blocks 64


@needs_compiler
@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
@pytest.mark.parametrize("T, D, N", SHAPES)
def test_scan_state_and_gradients(T, D, N, documents):
    inputs = mamba_inputs(T, D=D, N=N)
    keep = goes_on(runs_of(2, T), torch.float64) if documents else None
    wanted = outputs_and_gradients(lambda *i: selective_scan_recurrent(*i, keep), inputs)
    keep = None if keep is None else keep.float()
    assert_near(outputs_and_gradients(lambda *i: scan(*i, keep), [x.float() for x in inputs]), wanted)


@needs_compiler
@pytest.mark.parametrize("size", [0.0, 1e-6, 50.0, 1e4])
def test_any_decay_stays_finite_and_right(size):
    x, dt, A, B, C, state = mamba_inputs(33)
    inputs = [x, size * dt, A, B, C, state]
    wanted = outputs_and_gradients(selective_scan_recurrent, inputs)
    got = outputs_and_gradients(scan, [tensor.float() for tensor in inputs])
    kept = [i for i, tensor in enumerate(wanted) if tensor.abs().max() > 1e-25]  # below, dt A has no digit left
    assert_near([got[i] for i in kept], [wanted[i] for i in kept], allowed=2e-5)
    assert all(tensor.isfinite().all() for tensor in got)


@needs_compiler
def test_no_gradient_reaches_back_across_a_document():
    x, dt, A, B, C, state = (tensor.requires_grad_() for tensor in mamba_inputs(20, torch.float32))
    keep = torch.ones(2, 20)
    keep[:, 9] = 0
    y, _ = scan(x, dt, A, B, C, state, keep)
    grad_x, grad_state = torch.autograd.grad(y[:, 9:].sum(), (x, state))
    assert not grad_x[:, :9].any() and not grad_state.any() and grad_x[:, 9:].all()


@needs_compiler
def test_the_bits_do_not_depend_on_the_number_of_threads():
    inputs, results = mamba_inputs(40, torch.float32, batch=3, D=200), []
    ssd = mamba2_inputs(70, torch.float32, batch=3, H=10)[:5]
    conv = cpu_conv._examples(4, True, True, T=150)[2]
    rows = [torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(outputs_and_gradients(scan, inputs))
        results[-1] += outputs_and_gradients(lambda *i: cpu_ssd.find(None, CPU, torch.float32)(*i)[0], ssd)
        results[-1] += checks.outputs_and_gradients(cpu_conv.causal_conv, *conv)
        results[-1] += checks.outputs_and_gradients(cpu_gate.gated_rms_norm, (*rows, torch.ones(70), 1e-5, 1), {})
    for other in results[1:]:
        assert all(one is two is None or torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_compiler
def test_the_scan_is_one_node_that_keeps_a_state_per_chunk():
    x, dt, A, B, C, state = mamba_inputs(3 * cpu_scan.CHUNK, torch.float32)
    args = (*(tensor.requires_grad_() for tensor in (x, dt, B, C, A)), state, None, cpu_scan.CHUNK)
    torch.library.opcheck(torch.ops.nanoarch.compiled_selective_scan.default, args)
    assert torch.ops.nanoarch.compiled_selective_scan(*args)[2].shape == (3, *state.shape)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
@pytest.mark.parametrize("T, H, P, G, N, Q", [
    (1, 2, 3, 1, 4, 8), (8, 2, 16, 2, 16, 8), (17, 6, 5, 1, 20, 8), (40, 10, 3, 2, 4, 16), (70, 1, 33, 1, 7, 64),
])  # fmt: skip
def test_ssd_and_gradients(T, H, P, G, N, Q, documents):
    inputs = [*mamba2_inputs(T, H=H, P=P, G=G, N=N)[:5], torch.linspace(-1, 2, H, dtype=torch.float64)]
    runs = runs_of(2, T) if documents else None
    form = cpu_ssd.find(None, CPU, torch.float32)
    wanted = outputs_and_gradients(lambda *i: ssd_recurrent(*i[:5], runs=runs, D=i[5])[0], inputs)
    floats = [tensor.float() for tensor in inputs]
    got = outputs_and_gradients(lambda *i: form(*i[:5], runs=runs, chunk_size=Q, D=i[5])[0], floats)
    if T == 1:  # no decay ever reads
        assert not wanted[4].any() and not got[4].abs().gt(1e-6).any()
        wanted[4] = got[4]
    assert_near(got, wanted, allowed=1e-5)


@needs_compiler
@pytest.mark.parametrize("size", [1e-6, 1.0, 50.0, 1e4])
def test_any_decay_of_ssd_stays_finite_and_right(size):
    x, dt, A, B, C, _ = mamba2_inputs(33)
    form = cpu_ssd.find(None, CPU, torch.float32)
    inputs = [x, size * dt, A, B, C]
    got = outputs_and_gradients(lambda *i: form(*i, chunk_size=8)[0], [tensor.float() for tensor in inputs])
    wanted = outputs_and_gradients(lambda *i: ssd_recurrent(*i)[0], inputs)
    assert all(tensor.isfinite().all() for tensor in got)
    kept = [i for i in range(len(wanted)) if size < 1e4 or i != 4]  # past that A's gradient is the rounding of sums
    assert_near([got[i] for i in kept], [wanted[i] for i in kept], allowed=1e-3)


@needs_compiler
def test_ssd_of_a_document_is_the_same_bits_behind_any_other():
    form, runs = cpu_ssd.find(None, CPU, torch.float32), torch.tensor([[0] * 13 + [1] * 20])
    x, dt, A, B, C = mamba2_inputs(33, torch.float32, batch=1)[:5]
    y, _ = form(x, dt, A, B, C, runs=runs, chunk_size=8)
    other = [torch.cat((2 * tensor[:, :13], tensor[:, 13:]), 1) for tensor in (x, dt, B, C)]
    again, _ = form(*other[:2], A, *other[2:], runs=runs, chunk_size=8)
    assert torch.equal(y[:, 13:], again[:, 13:]) and not torch.equal(y[:, :13], again[:, :13])


# ---- the short convolution and the gated norm ------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("K", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [3, 64, 66, 150])  # a thread takes 64 tokens
def test_conv_equals_plain(K, T, bias, silu):
    for args, _ in cpu_conv._examples(K, bias, silu, T=T):
        double = [value.double() if torch.is_tensor(value) and value.is_floating_point() else value for value in args]
        wanted = checks.outputs_and_gradients(causal_conv, tuple(double), {})
        assert_near(checks.outputs_and_gradients(cpu_conv.causal_conv, args, {}), wanted)


@needs_compiler
@pytest.mark.parametrize("C", [3, 64, 70])
def test_gated_norm_equals_plain(C):
    generator = torch.Generator().manual_seed(0)
    x, z, weight = (torch.randn(shape, generator=generator) for shape in ((3, 50, C), (3, 50, C), (C,)))
    wanted = checks.outputs_and_gradients(gated_rms_norm, (x.double(), 4 * z.double(), weight.double(), 1e-5, 1), {})
    assert_near(checks.outputs_and_gradients(cpu_gate.gated_rms_norm, (x, 4 * z, weight, 1e-5, 1), {}), wanted)


@needs_compiler
def test_parts_of_a_wider_tensor_are_read_where_they_lie():
    wide, weight, gain = torch.randn(2, 20, 30), torch.randn(10, 1, 4), torch.randn(10)
    part = wide[..., 5:15]
    for rows in (part, part.transpose(0, 1).contiguous().transpose(0, 1), part.transpose(1, 2).reshape(2, 20, 10)):
        assert_near(
            [cpu_conv.causal_conv(rows, weight, None, None, True)], [causal_conv(rows, weight, None, None, True)]
        )
        got = cpu_gate.gated_rms_norm(wide[..., :10], rows, gain, 1e-5, 1)
        assert_near([got], [gated_rms_norm(wide[..., :10], rows, gain, 1e-5, 1)])


def test_what_they_do_not_take_goes_the_plain_way(monkeypatch):
    for function in (cpu_conv.ConvFunction, cpu_gate.GateFunction):
        monkeypatch.setattr(function, "apply", lambda *_: pytest.fail("went to C"))
    x, weight = torch.randn(2, 5, 6), torch.randn(6, 1, 4)
    doubles = cpu_conv.causal_conv(x.double(), weight.double(), None, None, True)
    assert torch.equal(doubles, F.silu(ShiftedSum.apply(x.double(), weight.double(), None, None)))
    assert cpu_gate.gated_rms_norm(x.double(), x.double(), x[0, 0].double(), 1e-5, 1).dtype == torch.float64
    assert cpu_gate.gated_rms_norm(x, x, x[0, 0], 1e-5, 2).shape == x.shape  # groups
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_conv.causal_conv(x, weight, None, None, True)


@needs_compiler
def test_sizes_alone_are_computed_without_data():
    x, weight = torch.randn(2, 5, 6), torch.randn(6, 1, 4)
    with FakeTensorMode() as mode:
        x, weight = (mode.from_tensor(tensor).requires_grad_() for tensor in (x, weight))
        y = cpu_conv.causal_conv(x, weight, None, None, True)
        y.sum().backward()
    assert type(y) is type(x) and y.shape == x.grad.shape == x.shape and weight.grad.shape == weight.shape


@needs_compiler
def test_tensors_of_any_layout_dtype_and_default():
    """What a C function would read or write past its end is copied, goes the plain way, or is refused."""
    weight, bias, gain = torch.randn(10, 1, 4), torch.randn(20)[::2], torch.randn(1).expand(10)
    one = torch.randn(1, 3, 10).transpose(0, 1)  # (3, 1, 10): contiguous, with a stride that means nothing
    assert_near([cpu_conv.causal_conv(one, weight, bias, None, True)], [causal_conv(one, weight, bias, None, True)])
    assert_near([cpu_gate.gated_rms_norm(one, one, gain, 1e-5, 1)], [gated_rms_norm(one, one, gain, 1e-5, 1)])
    x, wide = torch.randn(2, 20, 30), torch.randn(2, 20, 30, requires_grad=True)
    bias16 = torch.randn(10).bfloat16()
    rows = x[..., :10]
    assert_near(
        [cpu_conv.causal_conv(rows, weight, bias16, None, True)], [causal_conv(rows, weight, bias16, None, True)]
    )
    wanted = torch.autograd.grad(causal_conv(wide[..., 5:15], weight, None, None, True).sum(), wide)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)
    ):
        y = cpu_conv.causal_conv(wide[..., 5:15], weight, None, None, True)
        assert_near(torch.autograd.grad(y.sum(), wide), wanted)
    torch.set_default_dtype(torch.float64)
    assert cpu_conv.causal_conv(rows, weight, None, None, True).dtype == torch.float32
    inputs = mamba_inputs(20, torch.float32)
    assert_near(scan(*inputs), selective_scan_recurrent(*inputs))
    with pytest.raises(TypeError, match=r"^conv_forward takes float32 and int32 tensors of a CPU, not .*float64"):
        compiled.library("cpu_conv")("conv_forward", torch.ones(1))


@needs_compiler
def test_the_choice_says_what_runs(tiny):
    pattern = "mamba,mamba2/moe"
    model = ConfigurableGPT(tiny(block_pattern=pattern, position_encoding="none", n_layer=2, d_state=4))
    for more, reason in (({"dtype": torch.bfloat16}, "is not for torch.bfloat16"),
                         ({"will_compile": True}, "is not for torch.compile")):  # fmt: skip
        choice = kernels.choose(copy.deepcopy(model), CPU, "auto", **more)
        for part in ("short conv", "gated norm", "experts"):
            assert choice[part] in ("plain", "sorted") and choice.not_taken[part]["compiled"] == reason
        assert choice["mamba2"] == "plain" and choice["mamba"] == "compiled"  # one operator, in float32 under autocast
    fast = copy.deepcopy(model)
    kernels.choose(fast, CPU, "auto")
    idx = torch.randint(29, (2, 9))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(idx)[0], fast(idx)[0])


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_by_hand(projected, n_head, cos, sin):
    """softmax(q k^T / sqrt(D)) v over what came before, of (B, T, 3 H D); the tables turn q and k."""
    q, k, v = projected.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    if cos is not None:
        q, k = (x * cos + torch.cat(x.chunk(2, -1)[::-1], -1) * sin for x in (q, k))
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)


@needs_compiler
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-position"])
@pytest.mark.parametrize("T, D", [(1, 4), (16, 16), (47, 6), (49, 18), (130, 64)])  # 48 queries at once, 16 lanes
def test_attention_equals_the_equation(T, D, rope):
    torch.set_num_threads(2)
    H, generator = 3, torch.Generator().manual_seed(0)
    projected, grad = (torch.randn(2, T, n * H * D, generator=generator) for n in (3, 1))
    angles = torch.rand(T, D // 2, generator=generator).repeat(1, 2)
    sign = torch.ones(D // 2).repeat(2)
    sign[: D // 2] = -1
    cos, sin = (angles.cos(), angles.sin() * sign) if rope else (None, None)
    y, log_sums, of_projected = torch.empty(2, T, H * D), torch.empty(2, H, T), torch.empty_like(projected)
    cpu_attention._run("attention_forward", (2, T, H, D), projected, cos, sin, y, log_sums)
    cpu_attention._run(
        "attention_backward", (2, T, H, D), grad, projected, cos, sin, y, log_sums, of_projected
    )  # fmt: skip
    leaf = projected.double().requires_grad_()
    wanted = attention_by_hand(leaf, H, *(None if table is None else table.double() for table in (cos, sin)))
    assert_near([y, of_projected], [wanted, *torch.autograd.grad(wanted, leaf, grad.double())])


@needs_compiler
def test_what_is_not_finite_stays_so():
    projected = torch.zeros(1, 20, 3 * 8)
    projected[0, 7, 8] = float("nan")  # a key
    y, log_sums = torch.empty(1, 20, 8), torch.empty(1, 1, 20)
    cpu_attention._run("attention_forward", (1, 20, 1, 8), projected, None, None, y, log_sums)
    assert y[:, :7].isfinite().all() and y[:, 7:].isnan().all()
    x, dt, A, B, C, state = mamba_inputs(9, torch.float32)
    dt[0, 4, 2] = float("nan")
    assert scan(x, dt, A, B, C, state)[0][0, 4:, 2].isnan().all()


# ---- experts ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("k, hidden", [(1, 5), (2, 16), (3, 21)])
def test_experts_equal_plain(k, hidden):
    part = Experts(5, 12, hidden, True, silu, k / 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    x, scores = torch.randn(40, 12, generator=generator), torch.rand(40, 4, generator=generator)  # none for the last
    weights, chosen = scores.topk(k, dim=-1)
    inputs, results = (x, weights, part.up.detach(), part.down.detach()), []
    for dtype, combine in (
        (torch.float64, part.combine),
        (torch.float32, functools.partial(cpu_experts.experts, None)),
    ):
        args = tuple(tensor.to(dtype) for tensor in inputs)
        form = lambda x, weights, up, down, combine=combine: combine(x, chosen, weights, up, down)  # noqa: E731
        results.append(checks.outputs_and_gradients(form, args, {}))
    assert_near(results[1], results[0])


@needs_compiler
def test_experts_of_another_kind_are_left_to_sorting(tiny):
    settings = tiny(ffn_type="moe", n_experts=3)
    assert kernels.choose(ConfigurableGPT(settings), CPU, "auto")["experts"] == "compiled"
    choice = kernels.choose(ConfigurableGPT(settings.replace(expert_type="geglu")), CPU, "auto")
    assert choice["experts"] == "sorted" and choice.not_taken["experts"] == {"compiled": "is for experts of swiglu"}


# ---- in a model ------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "gated_delta_net"])
def test_a_model_gives_the_same_loss_gradients_and_text(mixer, tiny):
    settings = tiny(block_pattern=mixer, position_encoding="none", d_state=4, d_conv=4)
    plain, fast = ConfigurableGPT(settings), ConfigurableGPT(settings)
    choice = kernels.choose(fast, CPU, "compiled")
    assert choice["short conv"] == "compiled"
    idx = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in (plain, fast):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(*(model.generate(idx[:, :5], 20, temperature=0) for model in (plain, fast)))
    assert list(plain.state_dict()) == list(fast.state_dict())


@needs_compiler
def test_a_kernel_that_is_off_is_left_out(tiny, monkeypatch):
    monkeypatch.setattr(cpu_conv, "causal_conv", lambda *args: 1.01 * causal_conv(*args))
    monkeypatch.setattr(cpu_gate, "gated_rms_norm", lambda *args: 1.01 * gated_rms_norm(*args))
    monkeypatch.setattr(cpu_scan, "_scan", lambda x, *_: (1.01 * x, None))
    model = ConfigurableGPT(tiny(block_pattern="mamba,mamba2", position_encoding="none", n_layer=2))
    choice = kernels.choose(model, CPU, "auto")
    for part in ("short conv", "gated norm", "mamba"):
        assert choice[part] == "plain" and choice.not_taken[part]["compiled"].startswith("is off the plain path by")


# ---- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler, reason", [
    ("no-such-compiler -m64", "needs a C compiler, and no-such-compiler -m64 is not here"),
    ("", "needs a C compiler, and CC is not here"),
    ("cc 'x", r"cannot read the variable CC (No closing quotation)"),
    (sys.executable, "does not compile here (.*)"),
])  # fmt: skip
def test_without_a_compiler(compiler, reason, nothing_compiled, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    reason = "is not for Windows" if sys.platform == "win32" else reason
    with pytest.raises(AbsentError, match="^" + reason.replace("(", r"\(").replace(")", r"\)") + "$"):
        cpu_scan.find(None, CPU, torch.float32)


@needs_compiler
@pytest.mark.parametrize("refused", ["-march=native", "-fopenmp"])
def test_a_compiler_that_knows_less(refused, nothing_compiled, monkeypatch, tmp_path):
    run = compiled._run

    def picky(command):
        if refused in command:
            raise OSError("error: unknown option")
        run(command)

    monkeypatch.setattr(compiled, "_run", picky)
    inputs = mamba_inputs(9, torch.float32)
    assert_near(outputs_and_gradients(scan, inputs), outputs_and_gradients(selective_scan_recurrent, inputs))
    compiled._found.cache_clear()
    torch.set_num_threads(2)
    assert compiled.is_here("cpu_gate") == (refused == "-march=native")  # one thread where there are two is no gain
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path / "gone"))
    compiled._found.cache_clear()
    with pytest.raises(AbsentError, match=r"^does not compile here .*No such file"):
        compiled.library("cpu_gate")


@needs_compiler
def test_nothing_is_left_behind(nothing_compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    compiled.library("cpu_gate")
    assert not list(tmp_path.iterdir())


def test_it_is_for_cpus():
    with pytest.raises(AbsentError, match=r"^is for CPUs$"):
        cpu_scan.find(None, torch.device("meta"), torch.float32)
