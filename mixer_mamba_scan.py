"""The scans of Mamba-1 and Mamba-2, token by token and in chunks. mixer_mamba.py has the mixers around them.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t        (Gu & Dao 2023, eq. 2 and 4)

Mamba-1 gives each channel its own dt and each (channel, state) its own A; Mamba-2 (Dao & Gu 2024) shares both within a
head, which turns the scan into matrix products. `*_recurrent` is the equation, one turn of a loop per token. The other
form is, for Mamba-1, the same loop in buffers that stay in cache, its states computed again in backward; for Mamba-2
matrix products within chunks, and a loop over chunks. kernels/ may have a faster one for the device.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def goes_on(runs, dtype):
    """(B, T) -> (B, T), 0 where a run starts and 1 elsewhere, the first token too: what came before may reach it."""
    return F.pad((runs[:, 1:] == runs[:, :-1]).to(dtype), (1, 0), value=1.0)


# ---- Mamba-1: the selective scan ------------------------------------------------------------------------------------
#
# x, dt (B, T, D); A (N, D), negative; B, C (B, T, N); state (B, N, D), the long dimension last so that every product
# runs along it; keep (B, T) is 0 where a document starts, or None -> y (B, T, D), state after the last token.


def selective_scan_recurrent(x, dt, A, B, C, state=None, keep=None, chunk_size=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, as they stand."""
    columns = []
    state = x.new_zeros(x.size(0), *A.shape) if state is None else state
    keep = [None] * x.size(1) if keep is None else keep.unbind(1)
    for x_t, dt_t, B_t, C_t, keep_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), keep, strict=True):
        decay = torch.exp(dt_t[:, None] * A)  # (B, N, D)
        if keep_t is not None:
            decay = decay * keep_t[:, None, None]
        state = decay * state + (dt_t * x_t)[:, None] * B_t[..., None]
        columns.append((C_t[..., None] * state).sum(1))
    return torch.stack(columns, dim=1), state


def selective_scan(x, dt, A, B, C, state=None, keep=None, chunk_size=8):
    """The same, without holding a state per token: one per `chunk_size` tokens is kept for backward (section 3.3.2)."""
    state = x.new_zeros(x.size(0), *A.shape) if state is None else state
    y, state, _ = torch.ops.nanoarch.selective_scan(x, dt, B, C, A, state, keep, chunk_size)
    return y, state


def _swap(*tensors):
    """Batch and time swapped, in memory too: inside the operators time stands first, so that a token is one block."""
    return (tensor.transpose(0, 1).contiguous() for tensor in tensors)


# An operator of its own, so that torch.compile sees one node and not a loop of T turns to unroll.
@torch.library.custom_op(
    "nanoarch::selective_scan", mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor state, Tensor? keep, int chunk_size)"
    " -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _scan_op(x, dt, B, C, A, state, keep, chunk_size):
    """y (B, T, D), the last state, and the state before each chunk (T / chunk, B, N, D)."""
    x, dt, B, C = _swap(x, dt, B, C)
    T, _, N = B.shape
    keep = None if keep is None else keep.t()
    with torch.autocast(x.device.type, enabled=False):
        y, scratch = torch.empty_like(x), _Scratch(x, A, chunk_size)
        before_chunk = x.new_empty(-(-T // chunk_size), *state.shape)
        for c, start in enumerate(range(0, T, chunk_size)):
            span = slice(start, min(start + chunk_size, T))
            before_chunk[c] = state
            _, states = scratch.run(x[span], dt[span], B[span], A, state, None if keep is None else keep[span])
            y[span] = torch.bmm(C[span].reshape(-1, 1, N), states[1:].flatten(0, 1)).view_as(y[span])
            state = states[-1].clone()
    return *_swap(y), state, before_chunk


class _Scratch:
    """Buffers for the decays and states of one chunk, small enough for a processor's cache."""

    def __init__(self, x, A, chunk_size):
        size = (min(chunk_size, x.size(0)), x.size(1), *A.shape)
        self.decay, self.states = x.new_empty(size), x.new_empty(size[0] + 1, *size[1:])

    def run(self, x, dt, B, A, state, keep):
        """Decays (Q, B, N, D) and states (Q + 1, B, N, D) of a chunk, the first being the one before it."""
        decay, states = self.decay[: x.size(0)], self.states[: x.size(0) + 1]
        torch.mul(dt[:, :, None], A, out=decay).exp_()
        if keep is not None:
            decay *= keep[:, :, None, None]
        states[0] = state
        written, B = (dt * x)[:, :, None].unbind(0), B[..., None].unbind(0)
        state = states[0]
        for decay_t, state_t, written_t, B_t in zip(decay.unbind(0), states[1:].unbind(0), written, B, strict=True):
            state = torch.mul(decay_t, state, out=state_t).addcmul_(written_t, B_t)
        return decay, states


@_scan_op.register_fake
def _(x, dt, B, C, A, state, keep, chunk_size):
    chunks = (x.size(1) + chunk_size - 1) // chunk_size
    return x.new_empty(x.shape), x.new_empty(state.shape), x.new_empty(chunks, *state.shape)


@torch.library.custom_op(
    "nanoarch::selective_scan_backward", mutates_args=(),
    schema="(Tensor grad_y, Tensor grad_state, Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor before_chunk,"
    " Tensor? keep, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _scan_backward_op(grad_y, grad_state, x, dt, B, C, A, before_chunk, keep, chunk_size):
    """Chunk by chunk from the end: states again, then g_{t-1} = exp(dt_t A) g_t + C_{t-1} dy_{t-1} for dL/dh."""
    grad_y, x, dt, B, C = _swap(grad_y, x, dt, B, C)
    T, _, N = B.shape
    keep = None if keep is None else keep.t()
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
    grad_A, carried = torch.zeros(A.shape, dtype=A.dtype, device=A.device), grad_state
    with torch.autocast(x.device.type, enabled=False):
        scratch = _Scratch(x, A, chunk_size)
        grad_states = torch.empty_like(scratch.decay)
        for c in reversed(range(before_chunk.size(0))):
            span = slice(c * chunk_size, min((c + 1) * chunk_size, T))
            kept = None if keep is None else keep[span]
            decay, states = scratch.run(x[span], dt[span], B[span], A, before_chunk[c], kept)
            g = grad_states[: decay.size(0)]
            columns = zip(g.unbind(0), decay.unbind(0), C[span, ..., None].unbind(0), grad_y[span, :, None].unbind(0),
                          strict=True)  # fmt: skip
            for g_t, decay_t, C_t, grad_y_t in reversed(list(columns)):
                torch.addcmul(carried, C_t, grad_y_t, out=g_t)
                carried = decay_t.mul_(g_t)
            carried = carried.clone()  # the next chunk writes over the buffer
            written, flat = dt[span] * x[span], g.flatten(0, 1)  # (Q B, N, D)
            grad_C[span] = torch.bmm(states[1:].flatten(0, 1), grad_y[span].reshape(-1, x.size(2), 1)).view_as(C[span])
            grad_B[span] = torch.bmm(flat, written.view(-1, x.size(2), 1)).view_as(B[span])
            grad_written = torch.bmm(B[span].reshape(-1, 1, N), flat).view_as(written)
            grad_x[span] = grad_written * dt[span]
            grad_exponent = decay.mul_(states[:-1])  # dL/d(dt A) = g_t exp(dt_t A) h_{t-1}
            grad_dt[span] = torch.mul(grad_exponent, A, out=g).sum(2).addcmul_(grad_written, x[span])
            grad_A += grad_exponent.mul_(dt[span, :, None]).sum((0, 1))
    return *_swap(grad_x, grad_dt, grad_B, grad_C), grad_A, carried


@_scan_backward_op.register_fake
def _(grad_y, grad_state, x, dt, B, C, A, before_chunk, keep, chunk_size):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, dt, B, C, A, grad_state))


def _save_for_backward(ctx, inputs, output):
    x, dt, B, C, A, _, keep, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)  # the third output has as many zeros as states are kept
    ctx.save_for_backward(x, dt, B, C, A, output[2], keep)


def _scan_backward(ctx, grad_y, grad_state, _):
    *saved, keep = ctx.saved_tensors
    x, before_chunk = saved[0], saved[-1]
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_state = torch.zeros_like(before_chunk[0]) if grad_state is None else grad_state
    grads = torch.ops.nanoarch.selective_scan_backward(grad_y, grad_state, *saved, keep, ctx.chunk_size)
    return *grads, None, None


_scan_op.register_autograd(_scan_backward, setup_context=_save_for_backward)


# ---- Mamba-2: state space duality -----------------------------------------------------------------------------------
#
# x (B, T, H, P), heads H of width P; dt (B, T, H); A (H,), negative; B, C (B, T, G, N), for the R = H / G heads
# of a group; state (B, G, N, R, P); runs (B, T) or None -> y (B, T, H, P), state after the last token.


def ssd_recurrent(x, dt, A, B, C, state=None, runs=None, chunk_size=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, with one decay for all of a head."""
    columns, (batch, T, H, P), (G, N) = [], x.shape, B.shape[2:]
    state = x.new_zeros(batch, G, N, H // G, P) if state is None else state
    keep = [None] * T if runs is None else goes_on(runs, x.dtype).unbind(1)
    for x_t, dt_t, B_t, C_t, keep_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), keep, strict=True):
        decay = torch.exp(dt_t * A)  # (B, H)
        if keep_t is not None:
            decay = decay * keep_t[:, None]
        written = (dt_t[..., None] * x_t).view(batch, G, 1, -1, P) * B_t[..., None, None]
        state = decay.view(batch, G, 1, -1, 1) * state + written
        columns.append((C_t[..., None, None] * state).sum(2).view(batch, H, P))
    return torch.stack(columns, dim=1), state


def ssd_chunked(x, dt, A, B, C, state=None, runs=None, chunk_size=64):
    """The same in chunks of Q tokens (Dao & Gu 2024, section 6): attention within, states passed from one to the next.

    No decay is ever divided by: each is exp of a sum of terms below zero. `state=None` is zeros, and then no state
    comes back either, so that nothing is computed for it.
    """
    (batch, T, H, P), (G, N), Q = x.shape, B.shape[2:], min(chunk_size, x.size(1))
    n = -(-T // Q)
    if n * Q != T:  # dt = 0 neither forgets nor writes
        x, dt, B, C = (F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, n * Q - T)) for tensor in (x, dt, B, C))
        if runs is not None:
            runs = torch.cat((runs, runs[:, -1:].expand(-1, n * Q - T)), dim=1)
    runs = None if runs is None else runs.view(batch, n, Q)
    written = (x * dt[..., None]).view(batch, n, Q, H, P)
    B, C = (tensor.view(batch, n, Q, G, N).transpose(2, 3) for tensor in (B, C))  # (B, n, G, Q, N)
    total = _running_sum((dt * A).view(batch, n, Q, H), runs).transpose(2, 3).contiguous()  # (B, n, H, Q)
    y = _within_chunks(written, B, C, total, runs)
    if n > 1 or state is not None:
        read, state = _across_chunks(written, B, C, total, runs, state)
        y = torch.cat((y[:, : n - read.size(1)], y[:, n - read.size(1) :] + read), dim=1)
    return y.reshape(batch, n * Q, H, P)[:, :T], state


def _within_chunks(written, B, C, total, runs):
    """y_l = sum over s <= l of exp(total_l - total_s) (C_l . B_s) written_s: (B, n, Q, H, P)."""
    Q = total.size(-1)
    blind = torch.ones(Q, Q, dtype=torch.bool, device=total.device).triu(1)
    if runs is not None:
        blind = (blind | (runs[..., :, None] != runs[..., None, :]))[:, :, None]
    scores = DecayedScores.apply(C @ B.transpose(-1, -2), total, blind)
    return (scores @ written.transpose(2, 3)).transpose(2, 3)


class DecayedScores(torch.autograd.Function):
    """scores_ls exp(total_l - total_s), 0 where `blind`: (B, n, G, Q, Q) and (B, n, H, Q) -> (B, n, H, Q, Q).

    Backward knows that the derivative by the exponent is the result itself, which spares it half of its passes.
    """

    @staticmethod
    def forward(ctx, scores, total, blind):
        decay = (total[..., :, None] - total[..., None, :]).masked_fill_(blind, float("-inf")).exp_()  # (B, n, H, Q, Q)
        decayed = scores[:, :, :, None] * decay.unflatten(2, (scores.size(2), -1))  # (B, n, G, R, Q, Q)
        ctx.save_for_backward(decay, decayed)
        return decayed.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        decay, decayed = ctx.saved_tensors
        grad_scores = (grad * decay).reshape(decayed.shape).sum(3)
        grad_exponent = grad * decayed.flatten(2, 3)
        return grad_scores, grad_exponent.sum(-1) - grad_exponent.sum(-2), None


def _across_chunks(written, B, C, total, runs, state):
    """What tokens read of chunks before theirs: exp(total_l) C_l h, with h <- exp(total_Q) h + what the chunk leaves.

    Without a first state the last m = n - 1 chunks read one, with it all m = n: (B, m, Q, H, P), and the last state.
    """
    (batch, n, Q, H, P), (G, N) = written.shape, (B.size(2), B.size(4))
    to_end, from_start, after_all = (total[..., -1:] - total).exp(), total.exp(), total[..., -1].exp()
    if runs is not None:  # what crosses a boundary is lost
        last = runs[..., -1]  # (B, n)
        before = torch.cat((runs[:, :1, 0], last[:, :-1]), dim=1)
        to_end = to_end * (runs == last[..., None])[:, :, None]
        from_start = from_start * (runs == before[..., None])[:, :, None]
        after_all = after_all * (last == before)[..., None]
    m = n - 1 if state is None else n
    left = (written[:, :m] * to_end[:, :m].transpose(2, 3)[..., None]).view(batch, m, Q, G, -1).transpose(2, 3)
    left = (B[:, :m].transpose(-1, -2) @ left).view(batch, m, G, N, -1, P)
    states = []  # those that the last m chunks read, (B, G, N, R, P)
    for left_c, after_c in zip(left.unbind(1), after_all[:, :m].view(batch, m, G, 1, -1, 1).unbind(1), strict=True):
        states.append(state)
        state = left_c if state is None else after_c * state + left_c
    states, state = (states, state) if states[0] is not None else ([*states[1:], state], None)
    read = C[:, n - m :] @ torch.stack(states, dim=1).flatten(-2)  # (B, m, G, Q, R P)
    read = read.transpose(2, 3).reshape(batch, m, Q, H, P)
    return read * from_start[:, n - m :].transpose(2, 3)[..., None], state


def _running_sum(x, runs):
    """Sums of x (B, n, Q, H) along Q, from the chunk's start, or from the segment's where that lies inside it.

    By doubling where there are runs: a plain sum would round by what stands before, and leak it in the last bit.
    """
    if runs is None:
        return x.cumsum(dim=2)
    j = 1
    while j < x.size(2):
        same = (runs[:, :, j:] == runs[:, :, :-j])[..., None]
        x = torch.cat((x[:, :, :j], torch.where(same, x[:, :, j:] + x[:, :, :-j], x[:, :, j:])), dim=2)
        j *= 2
    return x
