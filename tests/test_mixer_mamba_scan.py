"""The scans of Mamba-1 and Mamba-2: every form against the others and against the equation written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba_helpers import mamba2_inputs, mamba_inputs, outputs_and_gradients, runs_of
from mixer_mamba_scan import selective_scan, selective_scan_recurrent, ssd_chunked, ssd_recurrent
from recurrence_helpers import TOLERANCES, assert_all_close

by_length = pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 63, 64, 65, 130])
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
by_documents = pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])


@by_dtype
@by_length
@by_documents
def test_the_fast_scan_equals_the_recurrent_one(T, dtype, documents):
    keep = None
    if documents:
        runs = runs_of(2, T)
        keep = F.pad(runs[:, 1:] == runs[:, :-1], (1, 0), value=True).to(dtype)
    inputs = mamba_inputs(T, dtype)
    forms = [lambda *i, f=f: f(*i, keep, 8) for f in (selective_scan, selective_scan_recurrent)]
    assert_all_close(*(outputs_and_gradients(form, inputs) for form in forms), dtype)


@by_dtype
@by_length
@by_documents
@pytest.mark.parametrize("with_state", [True, False], ids=["from-a-state", "from-zero"])
def test_ssd_in_chunks_equals_the_recurrent_one(T, dtype, documents, with_state):
    runs = runs_of(2, T) if documents else None
    *inputs, state = mamba2_inputs(T, dtype)
    if with_state:
        forms = [lambda *i, f=f: f(*i, runs, 16) for f in (ssd_chunked, ssd_recurrent)]
        assert_all_close(*(outputs_and_gradients(form, [*inputs, state]) for form in forms), dtype)
    else:
        chunked = outputs_and_gradients(lambda *i: ssd_chunked(*i, None, runs, 16), inputs)
        plain = outputs_and_gradients(lambda *i: ssd_recurrent(*i, torch.zeros_like(state), runs)[:1], inputs)
        assert_all_close(chunked, plain, dtype)


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_recurrent])
def test_mamba_is_the_textbook_selective_scan(scan):
    # Gu & Dao 2023, algorithm 2 with eq. 4 and its note on B: one channel, one state, one token at a time.
    x, dt, A, B, C, _ = mamba_inputs(9)
    wanted = torch.zeros_like(x)
    for b in range(x.size(0)):
        for d in range(x.size(2)):
            h = [0.0] * A.size(0)
            for t in range(x.size(1)):
                for n in range(A.size(0)):
                    h[n] = math.exp(dt[b, t, d] * A[n, d]) * h[n] + (dt[b, t, d] * B[b, t, n] * x[b, t, d]).item()
                wanted[b, t, d] = sum(C[b, t, n] * h[n] for n in range(A.size(0)))
    y, last = scan(x, dt, A, B, C, torch.zeros(2, A.size(0), x.size(2), dtype=x.dtype), None, 4)
    torch.testing.assert_close(y, wanted, **TOLERANCES[torch.float64])
    torch.testing.assert_close(last[-1, :, -1], torch.tensor(h, dtype=x.dtype), **TOLERANCES[torch.float64])


@pytest.mark.parametrize("scan", [ssd_chunked, ssd_recurrent])
def test_mamba2_is_a_masked_attention_with_decay(scan):
    # Dao & Gu 2024, eq. 16: y = (L * C B^T) (dt x), L_ts = product of the decays after s up to t; heads share B and C.
    x, dt, A, B, C, state = mamba2_inputs(9)
    wanted = torch.zeros_like(x)
    for b in range(2):
        for h in range(6):
            for t in range(9):
                for s in range(t + 1):
                    decay = math.exp(sum(dt[b, r, h] * A[h] for r in range(s + 1, t + 1)))
                    wanted[b, t, h] += C[b, t, h // 3] @ B[b, s, h // 3] * decay * dt[b, s, h] * x[b, s, h]
    y, _ = scan(x, dt, A, B, C, torch.zeros_like(state), None, 4)
    torch.testing.assert_close(y, wanted, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("size", [1e-6, 1.0, 50.0, 1e4])
def test_any_decay_stays_finite_and_right_in_float32(size):
    # exp(-dt A) would overflow at 50; a form that divides by products of decays gives nan here.
    x, dt, A, B, C, state = mamba_inputs(65, torch.float32)
    one = outputs_and_gradients(lambda *i: selective_scan(*i, None, 8), [x, size * dt, A, B, C, state])
    wanted = outputs_and_gradients(selective_scan_recurrent, [x, size * dt, A, B, C, state])
    assert_all_close(one, wanted, torch.float32)
    x, dt, A, B, C, state = mamba2_inputs(65, torch.float32)
    one = outputs_and_gradients(lambda *i: ssd_chunked(*i, None, 16), [x, size * dt, A, B, C, state])
    wanted = outputs_and_gradients(ssd_recurrent, [t.double() for t in (x, size * dt, A, B, C, state)])
    for a, b in zip(one, wanted, strict=True):
        assert a.isfinite().all()
        if size < 1e4:  # past that the gradient of A is the rounding of sums times dt
            assert (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1)


def test_documents_in_chunks_stay_finite_at_any_decay():
    """A border inside a chunk whose sums of dt A are below -88: exp of what lies beyond it would overflow."""
    x, dt, A, B, C, _ = mamba2_inputs(40, torch.float32)
    runs = (torch.arange(40) >= 13).long().expand(2, -1)
    inputs = [x, 20 * dt, A, B, C]
    got = outputs_and_gradients(lambda *i: ssd_chunked(*i, runs=runs, chunk_size=16)[0], inputs)
    wanted = outputs_and_gradients(lambda *i: ssd_recurrent(*i, runs=runs)[0], [t.double() for t in inputs])
    for a, b in zip(got, wanted, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1)


def test_the_scan_keeps_no_state_per_token():
    inputs, sizes = [x.requires_grad_() for x in mamba_inputs(64)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_scan(*inputs, None, 8)
    assert max(sizes) <= 2 * 64 * 6  # a state per token would be 2 x 64 x 6 x 4


def test_the_operator_is_what_it_says():
    x, dt, A, B, C, state = mamba_inputs(9)
    args = (*(t.requires_grad_() for t in (x, dt, B, C, A)), state, None, 4)
    torch.library.opcheck(torch.ops.nanoarch.selective_scan.default, args)


def test_ssd_in_chunks_is_one_graph():
    inputs = [x.float() for x in mamba2_inputs(19)[:5]]
    compiled = torch.compile(lambda *i: ssd_chunked(*i, chunk_size=8), backend="aot_eager", fullgraph=True)
    plain = outputs_and_gradients(lambda *i: ssd_chunked(*i, chunk_size=8), inputs)
    assert_all_close(outputs_and_gradients(compiled, inputs), plain, torch.float32)
