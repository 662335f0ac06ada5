"""Mamba-1's selective scan as one Triton kernel each way, the twin of mixer_mamba_scan.selective_scan.

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t        y_t = C_t h_t        (Gu & Dao 2023, algorithm 2)

A program takes one sequence, a block of channels and a group of states, and walks through time with its states in
registers: a thread holds one channel, so that no step waits for another thread. Forward keeps the states before every
CHUNK tokens (section 3.3.2); backward goes from the last chunk to the first, computes the states inside once more and
carries dL/dh the other way. Sums over channels go through a partial sum for each program and no atomics: a run and its
resumption compute the same bits.

Sums, states and decays are float32, whatever the inputs are. Triton is imported with this module, which is why nothing
imports it before a model with a scan is on a GPU (or, in tests, in Triton's interpreter).
"""

# ruff: noqa: RUF005  (Triton's compiler adds tuples and cannot unpack them)

import torch
import triton
import triton.language as tl

from mixer_mamba_scan import scan_operator

CHUNK = 8  # tokens between two states that are kept; backward holds all states of a chunk in registers
STATES, STATES_BACKWARD = 16, 8  # of one program, what registers hold; with more, programs share them and add up
CHANNELS = 32  # of one program: one for each thread of a warp, and a sum over them needs no barrier
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


# ---- kernels --------------------------------------------------------------------------------------------------------
#
# Tuples hold what differs by state or token; every loop over them is unrolled. x, dt, y (B, T, D), B, C (B, T, N),
# A (N, D), keep (B, T), states (chunks, B, N, D). Beyond the last token dt and x are 0: nothing forgets or writes.


@triton.jit
def _load_states(pointer, d, first, D, N, states: tl.constexpr):
    """A tuple of `states` rows from `first` on of an (N, D) block, zeros beyond it."""
    rows = ()
    for n in tl.static_range(states):
        row = tl.load(pointer + (first + n) * D + d, mask=(d < D) & (first + n < N), other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def _store_states(pointer, rows, d, first, D, N, states: tl.constexpr):
    for n in tl.static_range(states):
        tl.store(pointer + (first + n) * D + d, rows[n], mask=(d < D) & (first + n < N))


@triton.jit
def _load_tokens(pointer, row, d, t0, T, D, chunk: tl.constexpr):
    """A tuple of the tokens t0 ... t0 + chunk - 1 of a (B, T, D) tensor, zeros beyond the last."""
    tokens = ()
    for j in tl.static_range(chunk):
        token = tl.load(pointer + (row + t0 + j) * D + d, mask=(d < D) & (t0 + j < T), other=0.0)
        tokens = tokens + (token.to(tl.float32),)
    return tokens


@triton.jit
def _load_rates(pointer, d, first, D, N, states: tl.constexpr):
    """A log2(e), so that exp(dt A) is 2^(dt rate): one multiplication less for each state and token."""
    rows, rates = _load_states(pointer, d, first, D, N, states), ()
    for n in tl.static_range(states):
        rates = rates + (rows[n] * LOG2_E,)
    return rates


@triton.jit
def _cut(keep_ptr, at, is_token):
    """What is added to the exponent of a token: nothing, or -inf where a document starts, so that no state passes."""
    return tl.where(tl.load(keep_ptr + at, mask=is_token, other=1.0) == 0, float("-inf"), 0.0)


@triton.jit(do_not_specialize=["batch", "T"])
def _forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, state_ptr, keep_ptr, y_ptr, last_ptr, before_ptr, batch, T, D, N,
    states: tl.constexpr, chunk: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    block, b, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, first, row = block * channels + tl.arange(0, channels), group * states, b * T
    rates = _load_rates(A_ptr, d, first, D, N, states)
    h = _load_states(state_ptr + b * N * D, d, first, D, N, states)
    y_ptr += group * batch * T * D
    for c in range(tl.cdiv(T, chunk)):
        _store_states(before_ptr + (c * batch + b) * N * D, h, d, first, D, N, states)
        t0 = c * chunk
        x = _load_tokens(x_ptr, row, d, t0, T, D, chunk)
        dt = _load_tokens(dt_ptr, row, d, t0, T, D, chunk)
        y = ()
        for j in tl.static_range(chunk):
            written, total, new = dt[j] * x[j], tl.zeros((channels,), tl.float32), ()
            cut = _cut(keep_ptr, row + t0 + j, t0 + j < T)
            for n in tl.static_range(states):
                at, is_state = (row + t0 + j) * N + first + n, (t0 + j < T) & (first + n < N)
                B_n = tl.load(B_ptr + at, mask=is_state, other=0.0).to(tl.float32)
                C_n = tl.load(C_ptr + at, mask=is_state, other=0.0).to(tl.float32)
                h_n = tl.exp2(dt[j] * rates[n] + cut) * h[n] + written * B_n
                total += C_n * h_n
                new = new + (h_n,)
            h, y = new, y + (total,)
        for j in tl.static_range(chunk):  # after all loads of the chunk, which could not pass a store
            tl.store(y_ptr + (row + t0 + j) * D + d, y[j], mask=(d < D) & (t0 + j < T))
    _store_states(last_ptr + b * N * D, h, d, first, D, N, states)


@triton.jit(do_not_specialize=["batch", "T"])
def _backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, keep_ptr, before_ptr, grad_y_ptr, grad_last_ptr,
    grad_x_ptr, grad_dt_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_state_ptr, batch, T, D, N,
    states: tl.constexpr, chunk: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    block, b, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, first, row = block * channels + tl.arange(0, channels), group * states, b * T
    rates = _load_rates(A_ptr, d, first, D, N, states)
    carried = _load_states(grad_last_ptr + b * N * D, d, first, D, N, states)  # exp(dt A) g of the token after
    grad_A = ()
    for _n in tl.static_range(states):
        grad_A = grad_A + (tl.zeros((channels,), tl.float32),)
    grad_x_ptr += group * batch * T * D
    grad_dt_ptr += group * batch * T * D
    grad_B_ptr += block * batch * T * N
    grad_C_ptr += block * batch * T * N
    chunks = tl.cdiv(T, chunk)
    for from_end in range(chunks):
        c = chunks - 1 - from_end
        t0 = c * chunk
        x = _load_tokens(x_ptr, row, d, t0, T, D, chunk)
        dt = _load_tokens(dt_ptr, row, d, t0, T, D, chunk)
        grad_y = _load_tokens(grad_y_ptr, row, d, t0, T, D, chunk)
        h = _load_states(before_ptr + (c * batch + b) * N * D, d, first, D, N, states)  # h[j * states + n] before j
        for j in tl.static_range(chunk):
            written = dt[j] * x[j]
            cut = _cut(keep_ptr, row + t0 + j, t0 + j < T)
            for n in tl.static_range(states):
                at, is_state = (row + t0 + j) * N + first + n, (t0 + j < T) & (first + n < N)
                B_n = tl.load(B_ptr + at, mask=is_state, other=0.0).to(tl.float32)
                h = h + (tl.exp2(dt[j] * rates[n] + cut) * h[j * states + n] + written * B_n,)
        for j in tl.static_range(chunk - 1, -1, -1):
            grad_written, grad_dt = tl.zeros((channels,), tl.float32), tl.zeros((channels,), tl.float32)
            new_carried, new_grad_A = (), ()
            cut = _cut(keep_ptr, row + t0 + j, t0 + j < T)
            for n in tl.static_range(states):
                at, is_state = (row + t0 + j) * N + first + n, (t0 + j < T) & (first + n < N)
                B_n = tl.load(B_ptr + at, mask=is_state, other=0.0).to(tl.float32)
                C_n = tl.load(C_ptr + at, mask=is_state, other=0.0).to(tl.float32)
                g = carried[n] + C_n * grad_y[j]  # dL/dh_t
                tl.store(grad_C_ptr + at, tl.sum(h[(j + 1) * states + n] * grad_y[j], 0), mask=is_state)
                tl.store(grad_B_ptr + at, tl.sum(g * dt[j] * x[j], 0), mask=is_state)
                g_decay = g * tl.exp2(dt[j] * rates[n] + cut)
                grad_exponent = g_decay * h[j * states + n]  # dL/d(dt A)
                grad_written += g * B_n
                grad_dt += grad_exponent * rates[n]
                new_carried = new_carried + (g_decay,)
                new_grad_A = new_grad_A + (grad_A[n] + grad_exponent * dt[j],)
            carried, grad_A = new_carried, new_grad_A
            where, is_inside = (row + t0 + j) * D + d, (d < D) & (t0 + j < T)
            tl.store(grad_x_ptr + where, grad_written * dt[j], mask=is_inside)
            tl.store(grad_dt_ptr + where, grad_dt * LN_2 + grad_written * x[j], mask=is_inside)
    _store_states(grad_A_ptr + b * N * D, grad_A, d, first, D, N, states)
    _store_states(grad_state_ptr + b * N * D, carried, d, first, D, N, states)


# ---- the operator ---------------------------------------------------------------------------------------------------


def _scan_forward(x, dt, B, C, A, state, keep, chunk_size):
    """y (B, T, D), the last state (B, N, D), and the states before each chunk (T / CHUNK, B, N, D)."""
    x, dt, B, C, A, state = (tensor.contiguous() for tensor in (x, dt, B, C, A, state))
    (batch, T, D), N = x.shape, A.size(0)
    groups = triton.cdiv(N, STATES)
    y = x.new_empty(groups, batch, T, D, dtype=torch.float32)
    last, before = torch.empty_like(state), state.new_empty(triton.cdiv(T, chunk_size), *state.shape)
    _forward[_grid(D, batch, groups)](
        x, dt, A, B, C, state, _or_ones(keep, x), y, last, before, batch, T, D, N,
        states=min(N, STATES), chunk=chunk_size, channels=CHANNELS, num_warps=1,
    )  # fmt: skip
    return _added_up(y, x.dtype), last, before


def _grid(D, batch, groups):
    return (triton.cdiv(D, CHANNELS), batch, groups)


def _or_ones(keep, x):
    return x.new_ones(x.shape[:2]) if keep is None else keep.contiguous()


def _added_up(parts, dtype):
    """(programs, ...) -> (...), in the same order every time."""
    return (parts[0] if parts.size(0) == 1 else parts.sum(0)).to(dtype)


def _scan_backward(grad_y, grad_last, x, dt, B, C, A, before, keep, chunk_size):
    grad_y, grad_last, x, dt, B, C, A = (tensor.contiguous() for tensor in (grad_y, grad_last, x, dt, B, C, A))
    (batch, T, D), N = x.shape, A.size(0)
    grid = _grid(D, batch, triton.cdiv(N, STATES_BACKWARD))
    grad_x, grad_dt = (x.new_empty(grid[2], batch, T, D, dtype=torch.float32) for _ in range(2))
    grad_B, grad_C = (x.new_empty(grid[0], batch, T, N, dtype=torch.float32) for _ in range(2))
    grad_A, grad_state = x.new_empty(batch, N, D, dtype=torch.float32), torch.empty_like(grad_last)
    _backward[grid](
        x, dt, A, B, C, _or_ones(keep, x), before, grad_y, grad_last,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_state, batch, T, D, N,
        states=min(N, STATES_BACKWARD), chunk=chunk_size, channels=CHANNELS, num_warps=1,
    )  # fmt: skip
    like = ((grad_x, x), (grad_dt, dt), (grad_B, B), (grad_C, C), (grad_A, A))
    return *(_added_up(parts, tensor.dtype) for parts, tensor in like), grad_state


_scan = scan_operator("triton_selective_scan", _scan_forward, _scan_backward, CHUNK)


def selective_scan(x, dt, A, B, C, state=None, keep=None, chunk_size=None):
    """The recurrence above, forward and backward; torch.compile sees one node.

    Args:
        x, dt: (B, T, D).
        A: (N, D), negative.
        B, C: (B, T, N).
        state: (B, N, D) to go on from; None is zeros.
        keep: (B, T), 0 where a document starts and 1 elsewhere, or None. It gets no gradient.
        chunk_size: not read; CHUNK is how many tokens registers hold.

    Returns:
        y (B, T, D) and the state after the last token (B, N, D).
    """
    return _scan(x, dt, A, B, C, state, keep, CHUNK)
