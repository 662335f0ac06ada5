"""The scans of Mamba-1 and Mamba-2, token by token and in chunks. mixer_mamba.py has the mixers around them.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t        (Gu & Dao 2023, eq. 2 and 4)

Mamba-1 gives each channel its own dt and each (channel, state) its own A; Mamba-2 (Dao & Gu 2024) shares both within a
head, which turns the scan into matrix products. `*_recurrent` is the equation, one turn of a loop per token. The other
form is, for Mamba-1, the same loop in buffers that stay in cache, its states computed again in backward; for Mamba-2
matrix products within chunks, and a loop over chunks. kernels/ may have a faster one for the device.
"""

import functools

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


def _swap(*tensors):
    """Batch and time swapped, in memory too: inside the operators time stands first, so that a token is one block."""
    return (tensor.transpose(0, 1).contiguous() for tensor in tensors)


def _scan_forward(x, dt, B, C, A, state, keep, chunk_size):
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


def _scan_backward(grad_y, grad_state, x, dt, B, C, A, before_chunk, keep, chunk_size):
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


def scan_operator(name, forward, backward, chunk_size):
    """A form of the scan that torch.compile sees as one node, and not as a loop of T turns to unroll.

    Args:
        name: of the operator, in torch.ops.nanoarch.
        forward: (x, dt, B, C, A, state, keep, chunk_size) -> y, the last state, the state before each chunk (T / chunk,
            B, N, D).
        backward: (grad_y, grad_state, x, dt, B, C, A, the states before chunks, keep, chunk_size) -> gradients of x,
            dt, B, C, A and the first state.
        chunk_size: where a call names none.
    """
    inputs = "Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, {}, Tensor? keep, int chunk_size"
    operator = torch.library.custom_op(
        f"nanoarch::{name}", forward, mutates_args=(),
        schema=f"({inputs.format('Tensor state')}) -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    gradients = torch.library.custom_op(
        f"nanoarch::{name}_backward", backward, mutates_args=(),
        schema=f"(Tensor grad_y, Tensor grad_state, {inputs.format('Tensor before')})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )  # fmt: skip

    @operator.register_fake
    def _(x, dt, B, C, A, state, keep, chunk_size):
        chunks = (x.size(1) + chunk_size - 1) // chunk_size
        return x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(chunks, *state.shape)

    @gradients.register_fake
    def _(grad_y, grad_state, x, dt, B, C, A, before, keep, chunk_size):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (x, dt, B, C, A, grad_state))

    def save_for_backward(ctx, inputs, output):
        x, dt, B, C, A, _, keep, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)  # the third output has as many zeros as states are kept
        ctx.save_for_backward(x, dt, B, C, A, output[2], keep)

    backward_of_it = getattr(torch.ops.nanoarch, f"{name}_backward")

    def differentiate(ctx, grad_y, grad_state, _):
        *saved, keep = ctx.saved_tensors
        grad_y = torch.zeros_like(saved[0]) if grad_y is None else grad_y
        grad_state = torch.zeros_like(saved[-1][0]) if grad_state is None else grad_state
        return *backward_of_it(grad_y, grad_state, *saved, keep, ctx.chunk_size), None, None

    operator.register_autograd(differentiate, setup_context=save_for_backward)
    return functools.partial(_call, name, chunk_size)


def _call(name, usual_chunk_size, x, dt, A, B, C, state=None, keep=None, chunk_size=None):
    """(y, the last state) by the operator of that name."""
    state = x.new_zeros(x.size(0), *A.shape) if state is None else state
    y, state, _ = getattr(torch.ops.nanoarch, name)(x, dt, B, C, A, state, keep, chunk_size or usual_chunk_size)
    return y, state


# The same, without holding a state per token: one per `chunk_size` tokens is kept for backward (section 3.3.2).
selective_scan = scan_operator("selective_scan", _scan_forward, _scan_backward, chunk_size=8)


# ---- Mamba-2: state space duality -----------------------------------------------------------------------------------
#
# x (B, T, H, P), heads H of width P; dt (B, T, H); A (H,), negative; B, C (B, T, G, N), for the R = H / G heads
# of a group; D (H,) or None; state (B, G, N, R, P); runs (B, T) or None -> y (B, T, H, P), state after the last token.


def ssd_recurrent(x, dt, A, B, C, state=None, runs=None, chunk_size=None, D=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, with one decay for all of a head."""
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
    return _skipped(torch.stack(columns, dim=1), x, D), state


def _skipped(y, x, D):
    """y + D x, D (H,) or None."""
    return y if D is None else torch.addcmul(y, x, D[:, None])


def ssd_chunked(x, dt, A, B, C, state=None, runs=None, chunk_size=64, D=None):
    """The same in chunks of Q tokens (Dao & Gu 2024, section 6): attention within, states passed from one to the next.

    No decay is ever divided by: each is exp of a sum of terms below zero. `state=None` is zeros, and then no state
    comes back either, so that nothing is computed for it.
    """
    (batch, T, H, P), (G, N), Q, text = x.shape, B.shape[2:], min(chunk_size, x.size(1)), x
    n = -(-T // Q)
    if n * Q != T:  # dt = 0 neither forgets nor writes
        x, dt, B, C = (F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, n * Q - T)) for tensor in (x, dt, B, C))
        if runs is not None:
            runs = torch.cat((runs, runs[:, -1:].expand(-1, n * Q - T)), dim=1)
    runs = None if runs is None else runs.view(batch, n, Q)
    B, C = (tensor.view(batch, n, Q, G, N).transpose(2, 3) for tensor in (B, C))  # (B, n, G, Q, N)
    total = _running_sum((dt * A).view(batch, n, Q, H), runs).transpose(2, 3).contiguous()  # (B, n, H, Q)
    dt = dt.view(batch, n, Q, H).transpose(2, 3)
    weights = _chunk_weights(total, dt, runs)
    y, state = ChunkedSSD.apply(x.view(batch, n, Q, H, P), *weights, B, C, _blind(Q, runs, total.device), state)
    return _skipped(y.reshape(batch, n * Q, H, P)[:, :T], text, D), state


def _chunk_weights(total, dt, runs):
    """What the parts of a chunk are scaled by, from the running sums `total` and dt (B, n, H, Q).

    (query, key) with exp(query_l - key_s) = exp(total_l - total_s) dt_s from token s to token l; to_end from a token to
    the chunk's end, dt included; from_start from its start to a token; through (B, n, H) from its start to its end.
    """
    key = total - dt.clamp_min(torch.finfo(dt.dtype).tiny).log()
    left, from_start, through = total[..., -1:] - total, total.exp(), total[..., -1].exp()
    if runs is not None:  # what crosses a boundary is lost
        last = runs[..., -1]  # (B, n)
        before = torch.cat((runs[:, :1, 0], last[:, :-1]), dim=1)
        left = left.masked_fill((runs != last[..., None])[:, :, None], float("-inf"))  # else above zero, and exp huge
        from_start = from_start * (runs == before[..., None])[:, :, None]
        through = through * (last == before)[..., None]
    to_end = left.exp() * dt
    return total, key, to_end, from_start, through


def _blind(Q, runs, device):
    """Bool (Q, Q) or (B, n, 1, Q, Q): what row l may not read."""
    blind = torch.ones(Q, Q, dtype=torch.bool, device=device).triu(1)
    return blind if runs is None else (blind | (runs[..., :, None] != runs[..., None, :]))[:, :, None]


class ChunkedSSD(torch.autograd.Function):
    """y_l = sum over s <= l of exp(query_l - key_s) (C_l . B_s) x_s + from_start_l C_l h, with h the state before.

    x (B, n, Q, H, P); query, key, to_end, from_start (B, n, H, Q) and through (B, n, H) of _chunk_weights; B, C
    (B, n, G, Q, N); state (B, G, N, R, P) or None -> y (B, n, Q, H, P), the last state or None. All n chunks read a
    state where there is a first one, else the last n - 1. Backward is written out: on a CPU the time goes into passes
    over memory, and it makes half as many as autograd's.
    """

    @staticmethod
    def forward(ctx, x, query, key, to_end, from_start, through, B, C, blind, state):
        (batch, n, Q, H, P), (G, N) = x.shape, (B.size(2), B.size(4))
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        ctx.first = first = 1 if state is None else 0  # the first chunk that reads a state
        decay = (query[..., :, None] - key[..., None, :]).masked_fill_(blind, float("-inf")).exp_()  # (B, n, H, Q, Q)
        scores = C @ B.transpose(-1, -2)
        decayed = (scores[:, :, :, None] * decay.unflatten(2, (G, -1))).flatten(2, 3)
        x_heads = x.transpose(2, 3).contiguous()  # (B, n, H, Q, P)
        y = (decayed @ x_heads).transpose(2, 3)
        states = read = last = None
        if n > first:
            left = B[:, : n - first].transpose(-1, -2) @ _in_groups(
                x[:, : n - first] * _beside(to_end, 0, n - first), G
            )
            states, last = _pass_on(left.view(batch, -1, G, N, H // G, P), through.view(batch, n, G, 1, -1, 1), state)
            read = (C[:, first:] @ states.flatten(-2)).transpose(2, 3).reshape(batch, -1, Q, H, P)
            y[:, first:].addcmul_(read, _beside(from_start, first, n))
        ctx.save_for_backward(x, x_heads, decay, decayed, to_end, from_start, through, B, C, states, read)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_last):
        with torch.autocast(grad.device.type, ctx.autocast[1], ctx.autocast[0]):
            return ChunkedSSD.gradients(ctx, grad, grad_last)

    @staticmethod
    def gradients(ctx, grad, grad_last):
        x, x_heads, decay, decayed, to_end, from_start, through, B, C, states, read = ctx.saved_tensors
        (batch, n, Q, H, P), G, first = x.shape, B.size(2), ctx.first
        grad_heads = grad.transpose(2, 3).contiguous()  # (B, n, H, Q, P)
        grad_decayed = grad_heads @ x_heads.transpose(-1, -2)
        grad_exponent = grad_decayed * decayed  # the derivative of exp is exp
        grad_query, grad_key = grad_exponent.sum(-1), -grad_exponent.sum(-2)
        grad_scores = (grad_decayed * decay).unflatten(2, (G, -1)).sum(3)
        grad_C, grad_B = grad_scores @ B, grad_scores.transpose(-1, -2) @ C
        grad_x = (decayed.transpose(-1, -2) @ grad_heads).transpose(2, 3)
        if states is None:
            return grad_x, grad_query, grad_key, None, None, None, grad_B, grad_C, None, None
        grad = grad[:, first:]
        grad_from_start = _later((grad * read).sum(-1), first)
        grad_read = _in_groups(grad * _beside(from_start, first, n), G)  # (B, m, G, Q, R P)
        grad_C[:, first:] += grad_read @ states.flatten(-2).transpose(-1, -2)
        grad_states = (C[:, first:].transpose(-1, -2) @ grad_read).view_as(states)
        grad_left, grad_through, grad_state = _pass_back(
            grad_states, states, through.view(batch, n, G, 1, -1, 1), grad_last
        )
        to_end_x, m = _beside(to_end, 0, n - first), n - first
        grad_B[:, :m] += _in_groups(x[:, :m] * to_end_x, G) @ grad_left.flatten(-2).transpose(-1, -2)
        grad_written = (B[:, :m] @ grad_left.flatten(-2)).transpose(2, 3).reshape(batch, m, Q, H, P)
        grad_to_end = _earlier((grad_written * x[:, :m]).sum(-1), n)
        grad_x[:, :m].addcmul_(grad_written, to_end_x)
        grad_through = grad_through.view(batch, n, H)
        return (
            grad_x,
            grad_query,
            grad_key,
            grad_to_end,
            grad_from_start,
            grad_through,
            grad_B,
            grad_C,
            None,
            grad_state,
        )


def _in_groups(x, G):
    """(B, m, Q, H, P) -> (B, m, G, Q, R P)."""
    return x.unflatten(3, (G, -1)).flatten(-2).transpose(2, 3)


def _beside(weights, start, end):
    """Weights (B, n, H, Q) of chunks start to end, to stand beside x: (B, end - start, Q, H, 1)."""
    return weights[:, start:end].transpose(2, 3)[..., None]


def _earlier(x, n):
    """(B, m, Q, H) of the first m chunks -> (B, n, H, Q), zeros after."""
    return F.pad(x.transpose(2, 3), (0, 0, 0, 0, 0, n - x.size(1)))


def _later(x, before):
    """(B, m, Q, H) of the last m chunks -> (B, before + m, H, Q), zeros before."""
    return F.pad(x.transpose(2, 3), (0, 0, 0, 0, before, 0))


def _pass_on(left, through, state):
    """h <- through h + left over the chunks: the states that chunks read (B, m, G, N, R, P), and the last, or None.

    Without a first state chunk 1 is the first to read one, what chunk 0 left, and no last state is made.
    """
    start = 1 if state is None else 0
    states = [left[:, 0] if state is None else state]
    for c in range(start, left.size(1)):
        states.append(torch.addcmul(left[:, c], through[:, c], states[-1]))
    if state is None:
        return torch.stack(states, dim=1), None
    return torch.stack(states[:-1], dim=1), states[-1]


def _pass_back(grad_states, states, through, grad_last):
    """Gradients of `left`, of `through` (B, n, G, 1, R, 1) and of the first state, or None, for _pass_on."""
    n, m = through.size(1), states.size(1)
    grad_through = torch.zeros_like(through)
    if m < n:  # states[c] is what chunks 0 to c left
        grad_left = grad_states.clone()
        for c in reversed(range(1, m)):
            grad_through[:, c] = (grad_left[:, c] * states[:, c - 1]).sum((2, 4), keepdim=True)
            grad_left[:, c - 1].addcmul_(through[:, c], grad_left[:, c])
        return grad_left, grad_through, None
    grad_left, carried = torch.empty_like(grad_states), grad_last
    for c in reversed(range(n)):
        grad_left[:, c] = carried
        grad_through[:, c] = (carried * states[:, c]).sum((2, 4), keepdim=True)
        carried = torch.addcmul(grad_states[:, c], through[:, c], carried)
    return grad_left, grad_through, carried


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
