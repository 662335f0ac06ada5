"""State space mixers: Mamba-1, a selective scan (`mamba`), and Mamba-2, state space duality (`mamba2`).

Both carry a state h through the sequence. How much of it stays, and what is written and read, depend on the token:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        (Gu & Dao 2023, eq. 2 and 4)

Mamba-1 gives each channel its own dt and each (channel, state) its own A; Mamba-2 (Dao & Gu 2024) shares both within a
head, which turns the scan into matrix products. Each has three forms that the tests hold to one another:

    recurrence='recurrent'  the equation, one turn of a loop per token
    recurrence='chunk'      mamba: the same loop in buffers that stay in cache, its states computed again in backward;
                            mamba2: matrix products within chunks, a loop over chunks
    step(x, state)          the next tokens, from a state of constant size

Parameters have the names and shapes of transformers' MambaMixer and Mamba2Mixer. States and decays are float32 at
least, whatever the weights are. A new document starts from nothing, in the state and in the short convolution.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mixer_attention import MIXER_REGISTRY, Mixer
from mixer_short_conv import ShortConv, document_runs
from model_components import Norm
from user_errors import UserError

# ---- the short convolution ------------------------------------------------------------------------------------------


class ShiftedSum(torch.autograd.Function):
    """y_t = bias + sum_j weight_(K-1-j) x_(t-j) for each channel, zeros before the first token and before each run.

    x (B, T, C), weight (C, 1, K), bias (C,) or None, runs (B, T) from document_runs or None. On a CPU it trains seven
    times as fast as F.conv1d(groups=C), which wants channels first (8 x 256 x 512, K = 4: 4.5 ms against 33 ms).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, runs):
        taps = weight[:, 0].t().flip(0).contiguous()  # (K, C); tap j reads j tokens back
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
        for j in range(1, min(taps.size(0), x.size(1))):
            y[:, j:].addcmul_(_within_run(x[:, :-j], runs, j), taps[j])
        ctx.save_for_backward(x, taps, runs)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, taps, runs = ctx.saved_tensors
        grad_x, grad_taps = grad * taps[0], torch.zeros_like(taps)
        grad_taps[0] = (grad * x).sum((0, 1))
        for j in range(1, min(taps.size(0), x.size(1))):
            later = _within_run(grad[:, j:], runs, j)
            grad_x[:, :-j].addcmul_(later, taps[j])
            grad_taps[j] = (later * x[:, :-j]).sum((0, 1))
        return grad_x, grad_taps.flip(0).t()[:, None], grad.sum((0, 1)) if ctx.has_bias else None, None


def _within_run(pairs, runs, j):
    """pairs (B, T - j, C), zero where token t and token t - j lie in different runs."""
    if runs is None:
        return pairs
    return pairs * (runs[:, j:] == runs[:, :-j])[..., None].to(pairs.dtype)


class CausalConv(ShortConv):
    """ShortConv by ShiftedSum."""

    def forward(self, x, state=None, runs=None):
        if state is None:
            return ShiftedSum.apply(x, self.weight, self.bias, runs), None
        held = state.size(1)
        x = torch.cat((state.to(x.dtype), x), dim=1)
        y = ShiftedSum.apply(x, self.weight, self.bias, None)[:, held:]
        return y, x[:, x.size(1) - held :].clone()  # a view would hold every token in memory


# ---- Mamba-1: the selective scan ------------------------------------------------------------------------------------
#
# x, dt (B, T, D); A (N, D), negative; B, C (B, T, N); state (B, N, D), the long dimension last so that every product
# runs along it; keep (B, T) is 0 where a document starts, or None -> y (B, T, D), state after the last token.


def selective_scan_recurrent(x, dt, A, B, C, state, keep=None, chunk_size=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, as they stand."""
    columns = []
    keep = [None] * x.size(1) if keep is None else keep.unbind(1)
    for x_t, dt_t, B_t, C_t, keep_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), keep, strict=True):
        decay = torch.exp(dt_t[:, None] * A)  # (B, N, D)
        if keep_t is not None:
            decay = decay * keep_t[:, None, None]
        state = decay * state + (dt_t * x_t)[:, None] * B_t[..., None]
        columns.append((C_t[..., None] * state).sum(1))
    return torch.stack(columns, dim=1), state


def selective_scan(x, dt, A, B, C, state, keep=None, chunk_size=8):
    """The same, without holding a state per token: one per `chunk_size` tokens is kept for backward (section 3.3.2)."""
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


def ssd_recurrent(x, dt, A, B, C, state, runs=None, chunk_size=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, with one decay for all of a head."""
    columns, (batch, T, H, P), G = [], x.shape, B.size(2)
    keep = [None] * T if runs is None else _keep(runs, x.dtype).unbind(1)
    for x_t, dt_t, B_t, C_t, keep_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), keep, strict=True):
        decay = torch.exp(dt_t * A)  # (B, H)
        if keep_t is not None:
            decay = decay * keep_t[:, None]
        written = (dt_t[..., None] * x_t).view(batch, G, 1, -1, P) * B_t[..., None, None]
        state = decay.view(batch, G, 1, -1, 1) * state + written
        columns.append((C_t[..., None, None] * state).sum(2).view(batch, H, P))
    return torch.stack(columns, dim=1), state


def _keep(runs, dtype):
    """(B, T) -> (B, T), 0 where a segment starts and 1 elsewhere."""
    return F.pad((runs[:, 1:] == runs[:, :-1]).to(dtype), (1, 0), value=1.0)


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


# ---- the mixers -----------------------------------------------------------------------------------------------------

MAMBA_SCANS = {"recurrent": selective_scan_recurrent, "chunk": selective_scan}
MAMBA2_SCANS = {"recurrent": ssd_recurrent, "chunk": ssd_chunked}


class StateSpaceMixer(Mixer):
    """What Mamba-1 and Mamba-2 share: the frame, the short convolution, the initial values.

    A subclass gives `mix(x, state, runs) -> (y, state)`, with state and runs None where there are none.
    """

    no_weight_decay = ("A_log", "D")
    residual_out = ("out_proj.weight",)

    class Options:
        d_conv: int = 4  # tokens that the short convolution sees; 1 is a gain per channel
        expand: float = 2.0  # inner width over n_embd
        conv_bias: bool = True  # a bias in the short convolution
        dt_min: float = 0.001  # the initial dt of a channel or head is at least this
        dt_max: float = 0.1  # and at most this, evenly in its logarithm
        dt_init_floor: float = 1e-4  # and never below this
        recurrence: str = "chunk"  # chunk: fast; recurrent: the equation, a turn of a loop per token

    def __init__(self, config, scans):
        super().__init__()
        self.options = o = config.options_for(type(self))
        _check(o, scans)
        self.d_inner, self.d_state = round(o.expand * config.n_embd), o.d_state
        self.scan = scans[o.recurrence]
        self.recurrent = scans["recurrent"]

    def forward(self, x, positions=None, document_ids=None):
        return self.mix(x, None, document_runs(document_ids))[0]

    def step(self, x, state):
        return self.mix(x, state, None)

    # -- initial values

    def fill_dt_bias(self, bias, generator):
        """The inverse of softplus at the initial dt, so that softplus(0 + bias) is dt (section 3.6)."""
        o = self.options
        dt = _uniform(bias.shape, math.log(o.dt_min), math.log(o.dt_max), generator).exp().clamp(min=o.dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    # -- cost

    def frame_flops(self):
        """Convolution with its bias, dt x, and D x added: a multiply or an add is one FLOP, a bias two (CONVENTION)."""
        bias = 2 * self.conv1d.channels if self.options.conv_bias else 0
        return self.conv1d.flops() + bias + 3 * self.d_inner

    def state_bytes(self, T, dtype=torch.float32):
        scan = self.d_inner * self.d_state * torch.promote_types(dtype, torch.float32).itemsize
        return self.conv1d.state_bytes(dtype) + scan


@MIXER_REGISTRY("mamba")
class Mamba(StateSpaceMixer):
    """Mamba-1 (Gu & Dao 2023, arXiv:2312.00752, section 3.4): convolution, selective scan and gate in one block."""

    no_weight_decay = ("A_log", "D", "dt_proj.bias")
    own_init = ("A_log", "D", "dt_proj.weight", "dt_proj.bias")

    class Options(StateSpaceMixer.Options):
        d_state: int = 16  # states per channel
        dt_rank: int | None = None  # width that dt is computed through; None is n_embd / 16, rounded up
        dt_init: str = "random"  # initial weights of dt: random, even within dt_rank^-0.5, or constant
        dt_scale: float = 1.0  # times those weights
        chunk_size: int = 8  # recurrence=chunk: tokens per state kept for backward; 8 fit a processor's cache

    def __init__(self, config, layer_index):
        super().__init__(config, MAMBA_SCANS)
        o, D, N = self.options, self.d_inner, self.d_state
        self.dt_rank = o.dt_rank or math.ceil(config.n_embd / 16)
        self.in_proj = nn.Linear(config.n_embd, 2 * D, bias=config.bias)  # x and the gate z
        self.conv1d = CausalConv(D, o.d_conv, bias=o.conv_bias)
        self.x_proj = nn.Linear(D, self.dt_rank + 2 * N, bias=False)  # dt, B and C: what makes the scan selective
        self.dt_proj = nn.Linear(self.dt_rank, D, bias=True)
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, config.n_embd, bias=config.bias)

    def init_own_parameters(self, generator):
        """A = -1, -2, ..., -N in each channel (S4D-real, section 3.6); D = 1."""
        o, bound = self.options, self.options.dt_scale * self.dt_rank**-0.5
        self.A_log.copy_(torch.arange(1.0, self.d_state + 1).log().expand(self.d_inner, -1))
        self.D.fill_(1.0)
        weight = _uniform(self.dt_proj.weight.shape, -1, 1, generator) if o.dt_init == "random" else torch.ones(1)
        self.dt_proj.weight.copy_(bound * weight)
        self.fill_dt_bias(self.dt_proj.bias, generator)

    def mix(self, x, state, runs):
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, D) each
        x, conv_state = self.conv1d(x, None if state is None else state["conv"], runs)
        x = F.silu(x)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt = F.softplus(_at_least_float32(self.dt_proj(dt)))
        x, B, C, A = (_at_least_float32(tensor) for tensor in (x, B, C, -self.A_log.exp().t()))
        keep = None if runs is None else _keep(runs, x.dtype)
        before = x.new_zeros(x.size(0), self.d_state, self.d_inner) if state is None else state["ssm"]
        scan = self.recurrent if x.size(1) == 1 else self.scan
        y, after = scan(x, dt, A, B, C, before, keep, self.options.chunk_size)
        y = (y + self.D * x).to(z.dtype) * F.silu(z)
        return self.out_proj(y), {"conv": conv_state, "ssm": after}

    def init_state(self, batch, device=None, dtype=None):
        dtype = dtype or torch.get_default_dtype()
        conv = self.conv1d.init_state(batch, device, dtype)
        scan_dtype = torch.promote_types(dtype, torch.float32)
        return {"conv": conv, "ssm": torch.zeros(batch, self.d_state, self.d_inner, device=device, dtype=scan_dtype)}

    def mixing_flops(self, T):
        """2 (K + 1) D for the convolution, 6 D N for the scan, 3 D for dt x and the skip; no T, and no matrix product.

        The scan is counted as its recurrence in either form: dt A, times the state, (dt x) B, their sum, C h and its
        sum. exp, softplus and gates count nothing, as activations do.
        """
        return self.frame_flops() + 6 * self.d_inner * self.d_state

    def elementwise_flops(self, T):
        return self.mixing_flops(T)


@MIXER_REGISTRY("mamba2")
class Mamba2(StateSpaceMixer):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 7): one decay per head, gated norm before the way out."""

    no_weight_decay = ("A_log", "D", "dt_bias")
    own_init = ("A_log", "D", "dt_bias")

    class Options(StateSpaceMixer.Options):
        d_state: int = 128  # states per channel
        headdim: int | None = None  # width of a head; None is 64, or the next below that divides the inner width
        ngroups: int = 1  # groups of heads that share B and C, as key-value heads do in GQA
        a_init_min: float = 1.0  # the initial -A of a head is at least this
        a_init_max: float = 16.0  # and at most this, evenly
        chunk_size: int = 64  # recurrence=chunk: tokens per chunk, within which the cost grows with the square

    def __init__(self, config, layer_index):
        super().__init__(config, MAMBA2_SCANS)
        o, D = self.options, self.d_inner
        self.headdim = o.headdim or max(width for width in range(1, 65) if D % width == 0)
        _check_heads(config, o, D, self.headdim)
        self.n_heads, self.ngroups = D // self.headdim, o.ngroups
        self.conv_channels = D + 2 * self.ngroups * self.d_state
        self.in_proj = nn.Linear(config.n_embd, D + self.conv_channels + self.n_heads, bias=config.bias)
        self.conv1d = CausalConv(self.conv_channels, o.d_conv, bias=o.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(D, config, self.ngroups)
        self.out_proj = nn.Linear(D, config.n_embd, bias=config.bias)

    def init_own_parameters(self, generator):
        """A evenly in [-a_init_max, -a_init_min], one per head; D = 1."""
        o = self.options
        self.A_log.copy_(_uniform(self.A_log.shape, o.a_init_min, o.a_init_max, generator).log())
        self.D.fill_(1.0)
        self.fill_dt_bias(self.dt_bias, generator)

    def mix(self, x, state, runs):
        (batch, T, _), G, N = x.shape, self.ngroups, self.d_state
        z, xBC, dt = self.in_proj(x).split((self.d_inner, self.conv_channels, self.n_heads), dim=-1)
        xBC, conv_state = self.conv1d(xBC, None if state is None else state["conv"], runs)
        xBC, dt = _at_least_float32(F.silu(xBC)), F.softplus(_at_least_float32(dt) + self.dt_bias)
        x, B, C = xBC.split((self.d_inner, G * N, G * N), dim=-1)
        x = x.reshape(batch, T, self.n_heads, self.headdim)
        B, C, A = B.reshape(batch, T, G, N), C.reshape(batch, T, G, N), -_at_least_float32(self.A_log).exp()
        before = None if state is None else state["ssm"]
        scan = self.recurrent if T == 1 and state is not None else self.scan
        if scan is ssd_recurrent and state is None:
            before = self.init_state(batch, x.device, x.dtype)["ssm"]
        y, after = scan(x, dt, A, B, C, before, runs, self.options.chunk_size)
        y = (y + self.D[:, None] * x).reshape(batch, T, -1).to(z.dtype)
        return self.out_proj(self.norm(y, z)), {"conv": conv_state, "ssm": after}

    def init_state(self, batch, device=None, dtype=None):
        dtype = dtype or torch.get_default_dtype()
        conv = self.conv1d.init_state(batch, device, dtype)
        shape = (batch, self.ngroups, self.d_state, self.n_heads // self.ngroups, self.headdim)
        return {"conv": conv, "ssm": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))}

    def mixing_flops(self, T):
        """2 (K + 1) (D + 2 G N) for the convolution, 3 D for dt x and the skip, 2 H for dt's bias, and the scan.

        The scan, as the form that is chosen does it. chunk, Q tokens each: 2 Q (G N + D) within, the causal half not
        taken off; with more than one chunk 4 D N to write and read the states between. recurrent: 5 D N. Nothing grows
        with T beyond a chunk.
        """
        return self.elementwise_flops(T) + self.product_flops(T)

    def elementwise_flops(self, T):
        recurrent = 5 * self.d_inner * self.d_state if self.scan is ssd_recurrent else 0
        return self.frame_flops() + 2 * self.n_heads + recurrent

    def product_flops(self, T):
        """What chunks do in matrix products, padding included; the last one's state counts, though it is not made."""
        if self.scan is ssd_recurrent:
            return 0
        D, N, Q = self.d_inner, self.d_state, min(self.options.chunk_size, T)
        between = 4 * D * N if T > Q else 0
        return (2 * Q * (self.ngroups * N + D) + between) * math.ceil(T / Q) * Q / T


class GatedRMSNorm(Norm):
    """RMSNorm of x silu(z) over each group of channels (Mamba-2, figure 6): no norm reaches across groups."""

    def __init__(self, width, config, ngroups):
        super().__init__(width, config)
        self.ngroups = ngroups

    def forward(self, x, z):
        x = _at_least_float32(x) * F.silu(_at_least_float32(z))
        normed = F.rms_norm(x.unflatten(-1, (self.ngroups, -1)), (x.size(-1) // self.ngroups,), None, self.eps)
        return self.weight * normed.flatten(-2).to(z.dtype)


# ---- small things ---------------------------------------------------------------------------------------------------


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _uniform(shape, low, high, generator):
    return torch.empty(shape, device="cpu").uniform_(low, high, generator=generator)


def _check(o, scans):
    """Refuse what no state space mixer can be."""
    for name in ("d_state", "d_conv", "expand", "dt_min", "chunk_size", "dt_rank", "a_init_min"):
        if (value := getattr(o, name, None)) is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0")
    if getattr(o, "a_init_max", math.inf) < getattr(o, "a_init_min", 0):
        raise UserError(f"a_init_max={o.a_init_max} must not be below a_init_min={o.a_init_min}")
    if o.dt_max < o.dt_min:
        raise UserError(f"dt_max={o.dt_max} must not be below dt_min={o.dt_min}")
    if o.recurrence not in scans:
        raise UserError(f"recurrence={o.recurrence!r} does not exist (known: {', '.join(scans)})")
    if getattr(o, "dt_init", "random") not in ("random", "constant"):
        raise UserError(f"dt_init={o.dt_init!r} must be random or constant")


def _check_heads(config, o, d_inner, headdim):
    """Refuse heads that do not fill the inner width, and groups that do not share out the heads."""
    if headdim < 1 or d_inner % headdim:
        raise UserError(
            f"headdim={headdim} does not divide the inner width {d_inner} of"
            f" expand={o.expand} and n_embd={config.n_embd}"
        )
    if o.ngroups < 1 or (d_inner // headdim) % o.ngroups:
        raise UserError(f"ngroups={o.ngroups} does not divide the {d_inner // headdim} heads of headdim={headdim}")
