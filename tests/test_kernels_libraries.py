"""The adapters to mamba_ssm and fla, on a CPU: through the functions that the libraries call their reference, and
written out here where a library has none. Without the library its tests skip."""

import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import checks, libraries
from kernels.libraries import delta_form, linear_form, mamba_form, rwkv7_form, ssd_form
from mixer_delta import delta_chunked
from mixer_linear import linear_chunked
from mixer_mamba_scan import selective_scan, ssd_chunked
from mixer_rwkv import rwkv7_chunked
from model_builder import ConfigurableGPT

CPU, FLOAT = torch.device("cpu"), torch.float32
PARTS = ["linear_attention", "retention", "gla", "delta_net", "gated_delta_net", "rwkv7"]


@pytest.fixture
def calls_of(tiny):
    """What a mixer in training calls its form with: [one text, several documents]."""

    def record(name, **options):
        config = tiny(block_pattern=f"{name}/none", position_encoding="none", **options)
        return checks.recorded_calls(ConfigurableGPT(config).blocks[0].mixer, 16, CPU, FLOAT, tokens=21)

    return record


def test_the_recorded_calls_are_those_of_training(calls_of):
    (args, kwargs), (_, cut) = calls_of("gated_delta_net")
    assert args == () and kwargs["keep_state"] is False and kwargs["state"] is kwargs["runs"] is None
    assert kwargs["q"].shape == (2, 4, 21, 3) and cut["runs"].shape == (2, 21)


# ---- fla ------------------------------------------------------------------------------------------------------------


def fla_naive():
    """fla's reference functions under the names of its chunked ones, which need a GPU; rwkv7's is its documentation."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    def simple_gla(q, k, v, g, scale):
        if g is None:
            return naive_recurrent_linear_attn(q, k, v, scale=scale)
        return naive_recurrent_simple_gla(q, k, v, g, scale=scale)

    def gla(q, k, v, g, scale):
        return naive_recurrent_gla(scale * q.size(-1) ** 0.5 * q, k, v, g)  # which has no scale to give

    def delta_rule(q, k, v, beta, scale):
        heads_first = [x.transpose(1, 2) for x in (scale * q.size(-1) ** 0.5 * q, k, v, beta)]
        y, state = delta_rule_recurrence(*heads_first)
        return y.transpose(1, 2), state

    return {
        "linear": (linear_form, (simple_gla, gla), linear_chunked),
        "delta": (delta_form, (delta_rule, naive_recurrent_gated_delta_rule), delta_chunked),
        "rwkv7": (rwkv7_form, (dplr,), rwkv7_chunked),
    }


def dplr(r, w, k, v, a, b, scale):
    """What fla documents of chunk_rwkv7: S_t = diag(exp(w)) S + b (a^T S) + k v^T, o = S^T r; all (B, T, H, D)."""
    S, y = torch.zeros(*r.shape[::2], r.size(3), v.size(3)), []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, w, k, v, a, b)), strict=True):
        read = torch.einsum("bhk,bhkv->bhv", a_t, S)
        S = w_t.exp()[..., None] * S + b_t[..., None] * read[..., None, :] + k_t[..., None] * v_t[..., None, :]
        y.append(torch.einsum("bhk,bhkv->bhv", r_t * scale, S))
    return torch.stack(y, 1), S


OPERATIONS = {"linear_attention": "linear", "retention": "linear", "gla": "linear", "delta_net": "delta",
              "gated_delta_net": "delta", "rwkv7": "rwkv7"}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_fla_s_conventions(calls_of, part):
    make_form, functions, plain = fla_naive()[OPERATIONS[part]]
    form = make_form(*functions, plain, FLOAT)
    assert checks.refusal(plain, form, calls_of(part), FLOAT) is None
    wrong = make_form(*[lambda f=f, **inputs: f(**{**inputs, "scale": 0.5}) for f in functions], plain, FLOAT)
    assert "is off the plain path" in checks.refusal(plain, wrong, calls_of(part), FLOAT)


def test_rwkv7_removes_before_it_writes(calls_of):
    form = rwkv7_form(dplr, rwkv7_chunked, FLOAT)
    assert checks.refusal(rwkv7_chunked, form, calls_of("rwkv7"), FLOAT) is None


@pytest.mark.parametrize("part", PARTS)
def test_the_libraries_see_no_state_and_no_documents(calls_of, part):
    def never(**_):
        pytest.fail("went to the library")

    plain = {"linear": linear_chunked, "delta": delta_chunked, "rwkv7": rwkv7_chunked}[OPERATIONS[part]]
    make_form = {"linear": linear_form, "delta": delta_form, "rwkv7": rwkv7_form}[OPERATIONS[part]]
    form = make_form(*[never] * (1 if part == "rwkv7" else 2), plain, FLOAT)
    (_, text), (_, documents) = calls_of(part)
    for inputs in (documents, {**text, "keep_state": True}):
        for one, two in zip(form(**inputs), plain(**inputs), strict=True):
            assert one is two is None or torch.equal(one, two)


def test_low_precision_goes_in_and_what_came_comes_out(calls_of):
    seen = []

    def library(q, k, v, g, scale):
        seen.extend((q.dtype, k.dtype, v.dtype, g.dtype, q.shape, g.shape))
        return v, None

    (_, text), _ = calls_of("gla")
    y, _ = linear_form(None, library, linear_chunked, torch.bfloat16)(**text)
    assert seen == [torch.bfloat16] * 3 + [FLOAT] + [(2, 21, 4, 2)] * 2
    assert y.dtype == FLOAT and y.shape == text["v"].shape


# ---- mamba_ssm ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mamba_ssm():
    pytest.importorskip("einops", reason="mamba_ssm needs einops")
    if not libraries.is_installed("mamba_ssm"):
        pytest.skip("mamba_ssm is not installed")
    with libraries.without_compiled_scan():
        return pytest.importorskip("mamba_ssm", reason="mamba_ssm does not import here", exc_type=Exception)


def test_mamba_s_conventions(calls_of, mamba_ssm):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    form = mamba_form(selective_scan_ref, selective_scan)
    assert checks.refusal(selective_scan, form, calls_of("mamba"), FLOAT) is None


@pytest.mark.parametrize("ngroups", [1, 2])
def test_ssd_s_conventions(calls_of, mamba_ssm, ngroups, monkeypatch):
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton.ssd_combined import ssd_selective_scan

    reference = selective_scan_interface.selective_scan_ref  # the compiled one is not here
    monkeypatch.setattr(selective_scan_interface, "selective_scan_fn", reference)

    def combined(x, dt, A, B, C, chunk_size, seq_idx):
        if seq_idx is None:
            return ssd_selective_scan(x, dt, A, B, C)
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
        rows = []
        for b in range(x.size(0)):  # the reference knows one text
            sizes = torch.unique_consecutive(seq_idx[b], return_counts=True)[1].tolist()
            pieces = zip(*(t[b : b + 1].split(sizes, 1) for t in (x, dt, B, C)), strict=True)
            rows.append(torch.cat([ssd_selective_scan(x_i, dt_i, A, B_i, C_i) for x_i, dt_i, B_i, C_i in pieces], 1))
        return torch.cat(rows)

    form = ssd_form(combined, ssd_chunked, FLOAT)
    calls = calls_of("mamba2", d_state=4, headdim=4, ngroups=ngroups)
    assert checks.refusal(ssd_chunked, form, calls, FLOAT) is None


def test_with_a_state_mamba_takes_the_plain_form():
    def never(*_, **__):
        pytest.fail("went to the library")

    x, dt, A = torch.randn(1, 3, 4), torch.rand(1, 3, 4), -torch.rand(2, 4)
    B, C, state = torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.randn(1, 2, 4)
    wanted = selective_scan(x, dt, A, B, C, state)
    for one, two in zip(mamba_form(never, selective_scan)(x, dt, A, B, C, state), wanted, strict=True):
        assert torch.equal(one, two)
    keep = torch.tensor([[1.0, 0.0, 1.0]])
    assert torch.equal(mamba_form(never, selective_scan)(x, dt, A, B, C, None, keep)[0],
                       selective_scan(x, dt, A, B, C, None, keep)[0])  # fmt: skip
    x, dt, A, B, C = (x[..., None], dt, A[0], B[:, :, None], C[:, :, None])
    state = torch.randn(1, 1, 2, 4, 1)
    assert torch.equal(ssd_form(never, ssd_chunked, FLOAT)(x, dt, A, B, C, state)[0],
                       ssd_chunked(x, dt, A, B, C, state)[0])  # fmt: skip


# ---- what is absent -------------------------------------------------------------------------------------------------


def test_what_is_absent_says_what_to_install():
    with pytest.raises(libraries.AbsentError, match=r"^is not installed \(pip install no-such\)$"):
        libraries.imported("no_such_module.inside", "function", "no-such")
    with pytest.raises(libraries.AbsentError, match=r"^does not import here \(AttributeError: .*no_such_name"):
        libraries.imported("json", "no_such_name", "json")
    with pytest.raises(libraries.AbsentError, match=r"^needs CUDA$"):
        libraries.find_triton_scan(selective_scan, CPU, FLOAT)


def test_the_stand_in_for_the_compiled_scan_does_not_stay():
    with libraries.without_compiled_scan():
        import selective_scan_cuda  # noqa: F401
    assert libraries.is_installed("selective_scan_cuda") == ("selective_scan_cuda" in sys.modules)


def test_softplus_is_done_before_the_scan(calls_of):
    (args, _), _ = calls_of("mamba")
    assert (args[1] > 0).all() and torch.equal(args[1], F.relu(args[1]))  # dt, so that no library may do it again
