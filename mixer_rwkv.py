"""RWKV-7 (Peng et al. 2025, "Goose"): a delta rule with a decay and a learning rate for each channel of the keys.

    S_t = diag(w_t) S_(t-1) - (a_t * kappa_t) (kappa_t^T S_(t-1)) + k_t v_t^T        y_t = S_t^T r_t

with kappa of length 1. S is (K, V) here, the transpose of the paper's. `recurrent` is the equation, `chunk` the same in
matrix products and one triangular solve for each chunk.

From the second layer on a token's value is mixed with the one that the first layer gave it (section 4.1, as in Zhou et
al. 2024). In a hybrid the first layer is the first of this kind. The FFN `rwkv7` has a token shift too.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY, Mixer
from mixer_chunks import (
    causal_mask,
    chunk_length,
    cut_at_runs,
    decays_across,
    document_cuts,
    into_chunks,
    padded_chunks,
    scaled,
)
from mixer_delta import delta_carry, solve_unit_lower
from mixer_linear import check_options, split_heads
from mixer_short_conv import document_runs, token_shift
from model_components import ACTIVATION_REGISTRY, FFN_REGISTRY, Norm, StandardFFN
from user_errors import UserError

FASTEST_LOG_DECAY = -0.6065306597126334  # -exp(-1/2): no channel forgets faster per token (eq. 12)
FIRST_VALUE = "rwkv7 value"  # what it hands on from layer to layer is known by this name
LONGEST_CHUNK = 128  # tokens; exp(0.6065 x 128) is the largest that float32 holds with room to spare

# ---- the recurrence, token by token ---------------------------------------------------------------------------------


def rwkv7_recurrent(r, log_decay, k, v, kappa, rate, state=None, runs=None, chunk_size=None, keep_state=True):
    """The equation above: (y (B, H, T, V), the last S (B, H, K, V)).

    Args:
        r, k, v: (B, H, T, K), (B, H, T, K), (B, H, T, V).
        log_decay: (B, H, T, K), log w.
        kappa: (B, H, T, K) of length 1, the key that is taken out.
        rate: (B, H, T, K) in [0, 1], how much of it.
        state: (B, H, K, V) to go on from; None is zeros.
        runs: (B, T) from document_runs: S starts at zero where it changes.
    """
    S, y = state, []
    if S is None:
        S = k.new_zeros(*k.shape[:2], k.size(-1), v.size(-1))
    begins = cut_at_runs(None, runs, r)
    begins = [None] * r.size(2) if begins is None else begins.unsqueeze(-1).unbind(2)  # 0 at a document's first token
    # unbind once: indexing x[:, :, t] in the loop makes the backward quadratic in T
    tokens = zip(*(x.unbind(2) for x in (r, log_decay.exp(), k, v, kappa, rate * kappa)), begins, strict=True)
    for r_t, w_t, k_t, v_t, kappa_t, remove_t, begin_t in tokens:
        S = scaled(S, begin_t)
        held = kappa_t[..., None, :] @ S  # (B, H, 1, V)
        S = w_t[..., None] * S - remove_t[..., :, None] * held + k_t[..., :, None] * v_t[..., None, :]
        y.append((r_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(y, dim=2), S


# ---- the same in chunks ---------------------------------------------------------------------------------------------


def rwkv7_chunked(r, log_decay, k, v, kappa, rate, state=None, runs=None, chunk_size=32, keep_state=True):
    """What rwkv7_recurrent computes, in matrix products over chunks of `chunk_size` tokens.

    Each token writes k_i v_i^T + b_i u_i^T with b = rate kappa and u_i = -S_(i-1)^T kappa_i. With c the sum of the log
    decays since the start of a chunk and S the state before it, u solves

        u_i = -(exp(c_(i-1)) kappa_i . S) - sum_(j < i) (exp(c_(i-1) - c_j) kappa_i . b_j) u_j + (the same with k_j) v_j

    so that U = U0 - W S, as for the delta rule. exp(-c) stays below exp(0.61 C), so that products of both factors are
    safe in float32 for chunks up to LONGEST_CHUNK; what they give above the diagonal is masked.
    """
    T, C = r.size(2), chunk_length(r.size(2), chunk_size)
    r, log_decay, k, v, kappa, rate = (into_chunks(x, C) for x in (r, log_decay, k, v, kappa, rate))
    cut = document_cuts(runs, C, r.dtype)
    c, b = _sums_within(log_decay, cut), rate * kappa  # (B, H, N, C, K)
    asks, reads = kappa * (c - log_decay).exp(), r * c.exp()
    grown = (-c).exp()
    products = torch.cat((asks, reads), dim=-2) @ torch.cat((b * grown, k * grown), dim=-2).transpose(-2, -1)
    before, upto = causal_mask(C, cut, r.device, -1), causal_mask(C, cut, r.device)
    ask_b, ask_k = products[..., :C, :].split(C, dim=-1)
    ask_b, ask_k = ask_b.masked_fill(~before, 0.0), ask_k.masked_fill(~before, 0.0)  # (B, H, N, C, C)
    read = products[..., C:, :].masked_fill(~torch.cat((upto, upto), dim=-1), 0.0)  # (B, H, N, C, 2 C)
    known = -(ask_k @ v)
    if r.size(2) == 1 and state is None and not keep_state:
        U, last = solve_unit_lower(ask_b, known), None
        y = read @ torch.cat((U, v), dim=-2)
    else:
        _, to_end, through = decays_across(log_decay, cut)
        if cut is not None:
            asks, reads = asks * cut.from_before, reads * cut.from_before
        U0, W = solve_unit_lower(ask_b, torch.cat((known, asks), dim=-1)).split((v.size(-1), k.size(-1)), dim=-1)
        state = k.new_zeros(*k.shape[:2], k.size(-1), v.size(-1)) if state is None else state
        added = (k * to_end).transpose(-2, -1) @ v
        U, states, last = delta_carry(U0, W, (b * to_end).transpose(-2, -1), through, state, added)
        y = read @ torch.cat((U, v), dim=-2) + reads @ states
    return y.flatten(2, 3)[:, :, :T], last


def _sums_within(log_decay, cut):
    """Log decays (B, H, N, C, K) summed to each token from its chunk's start, or its document's where that is later."""
    if cut is None:
        return log_decay.cumsum(-2)
    # As a product: what a sum over the whole chunk gains from another document does not subtract without a trace.
    return causal_mask(log_decay.size(-2), cut, log_decay.device).to(log_decay.dtype) @ log_decay


# ---- the mixer ------------------------------------------------------------------------------------------------------


class HeadNorm(Norm):
    """Each head on its own: (x - mean) / sqrt(var + eps) * weight + bias (GroupNorm, Wu & He 2018)."""

    has_bias = True

    def __init__(self, width, n_head, config):
        super().__init__(width, config)
        self.n_head = n_head
        self.eps = config.norm_eps * (width // n_head)  # the authors': 64e-5 for heads of 64

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        return F.group_norm(x.flatten(0, 1), self.n_head, self.weight, self.bias, self.eps).view_as(x)


class LowRank(nn.Module):
    """up(activation(down(x))), what RWKV makes its gates with. It starts as its bias alone, as in the authors' code."""

    own_init = ("down.weight", "up.weight")

    def __init__(self, width, rank, activation, bias=True):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=bias)
        self.activation = activation

    def init_own_parameters(self, generator):
        self.down.weight.zero_()
        up = torch.empty(self.up.weight.shape, device="cpu")  # where the generator is
        gain = max(1.0, up.size(1) / up.size(0)) ** 0.5
        self.up.weight.copy_(nn.init.orthogonal_(up, gain=0.1 * gain, generator=generator))

    def forward(self, x):
        return self.up(self.activation(self.down(x)))


@MIXER_REGISTRY("rwkv7")
class RWKV7(Mixer):
    """RWKV-7's time mixing (Peng et al. 2025, section 4), its initial values those of the authors' code."""

    mixed = ("r", "w", "k", "v", "a", "g")  # what the token shift makes, in this order
    no_weight_decay = ("shift", "kappa_scale", "rate_in_key", "bonus")
    own_init = (
        "shift", "kappa_scale", "rate_in_key", "bonus", "receptance.weight", "key.weight", "value.weight", "out.weight",
        "decay.up.bias", "rate.up.bias", "norm.weight",
    )  # fmt: skip
    operation = "rwkv7"
    forms: ClassVar = {"chunk": rwkv7_chunked, "recurrent": rwkv7_recurrent}

    class Options:
        recurrence: str = "chunk"  # chunk: matrix products, fast; recurrent: the paper's equation, token by token
        chunk_size: int = 32  # tokens of a chunk
        decay_rank: int | None = None  # width inside the decay's low-rank pair; None is the authors' 2.5 sqrt(n_embd)
        rate_rank: int | None = None  # inside the learning rate's; None is 2.5 sqrt(n_embd)
        output_gate_rank: int | None = None  # inside the output gate's; None is 5 sqrt(n_embd)
        value_residual: bool = True  # mix values with the first layer's
        value_rank: int | None = None  # inside the gate of that mixture; None is 1.7 sqrt(n_embd)

    def __init__(self, config, layer_index):
        super().__init__()
        o = config.options_for(type(self))
        check_options(config, o, self.forms)
        if o.chunk_size > LONGEST_CHUNK:
            raise UserError(f"chunk_size={o.chunk_size} would overflow float32 in 'rwkv7'; use {LONGEST_CHUNK} or less")
        for name in ("decay_rank", "rate_rank", "output_gate_rank", "value_rank"):
            if getattr(o, name) is not None and getattr(o, name) < 1:
                raise UserError(f"{name}={getattr(o, name)} must be at least 1, or None")
        C = config.n_embd
        self.form, self.chunk_size = o.recurrence, o.chunk_size
        self.n_head, self.head_dim = config.n_head, C // config.n_head
        self.layer_index, self.n_layer = layer_index, config.n_layer
        self.shift = nn.Parameter(torch.empty(len(self.mixed), C))  # how far each input leans to the token before
        self.kappa_scale = nn.Parameter(torch.empty(C))
        self.rate_in_key = nn.Parameter(torch.empty(C))
        self.bonus = nn.Parameter(torch.empty(self.n_head, self.head_dim))
        self.receptance, self.key, self.value, self.out = (nn.Linear(C, C, bias=config.bias) for _ in range(4))
        self.decay = LowRank(C, o.decay_rank or usual_rank(2.5, C), torch.tanh)
        self.rate = LowRank(C, o.rate_rank or usual_rank(2.5, C), nn.Identity())
        self.gate = LowRank(C, o.output_gate_rank or usual_rank(5, C), torch.sigmoid, bias=False)
        self.norm = HeadNorm(C, self.n_head, config)
        self.carries, self.value_gate = o.value_residual, None
        if o.value_residual and layer_index > first_layer(config):
            self.value_gate = LowRank(C, o.value_rank or usual_rank(1.7, C), nn.Identity())
            self.own_init = (*self.own_init, "value_gate.up.bias")

    def init_own_parameters(self, generator):
        """RWKV-LM's: decays from slow to fast along the channels, and zigzag inside a head; output zero."""
        C, D = self.kappa_scale.numel(), self.head_dim
        depth = self.layer_index / max(1, self.n_layer - 1)  # 0 at the first layer, 1 at the last
        channel = torch.arange(C, dtype=torch.float32)
        along = channel / max(1, C - 1)
        inside = (channel % D) / max(1, D - 1) * 2 - 1
        zigzag = inside * inside.abs()
        lean = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None]  # r, w, k, v, a, g
        lean = lean * (1 - self.layer_index / self.n_layer)
        self.shift.copy_(1 - (channel / C) ** lean)
        self.kappa_scale.copy_(0.71 - 0.1 * (along - 0.5))
        self.rate_in_key.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.decay.up.bias.copy_(-6 + 6 * along ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
        self.rate.up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (along - 0.5))
        if self.value_gate is not None:
            self.value_gate.up.bias.copy_(0.73 - 0.4 * (along - 0.5))
        self.norm.weight.fill_(((self.layer_index + 1) / self.n_layer) ** 0.7)
        for linear, size in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            values = torch.rand(linear.weight.shape, generator=generator)
            linear.weight.copy_((2 * values - 1) * size * C**-0.5)
        self.out.weight.zero_()

    def prepare(self, x, previous, carried=None):
        """x (B, T, C) and each token's predecessor -> ({argument: (B, H, T, D)} of the recurrence, gate (B, T, C)).

        Args:
            carried: holds the first layer's value (B, T, C) where this is a later one.
        """
        r, w, k, v, a, g = (torch.lerp(x, previous, lean) for lean in self.shift)
        r, k, v = self.receptance(r), self.key(k), self.mixed_value(v, carried)
        log_decay = FASTEST_LOG_DECAY * self.heads(self.decay(w)).sigmoid()
        rate = self.heads(self.rate(a)).sigmoid()
        kappa = F.normalize(self.heads(k * self.kappa_scale), dim=-1)
        k = self.heads(k) * (1 + (rate - 1) * self.per_head(self.rate_in_key))
        inputs = {"r": self.heads(r), "log_decay": log_decay, "k": k, "v": self.heads(v)}
        return {**inputs, "kappa": kappa, "rate": rate}, self.gate(g)

    def mixed_value(self, x, carried):
        """(B, T, C), the token shift's -> values (B, T, C): this layer's, and the first one's as far as a gate says."""
        value = self.value(x)
        if self.value_gate is None:
            return value
        if not carried or FIRST_VALUE not in carried:
            raise ValueError("a later rwkv7 layer reads the first one's value: call it with what that one handed on")
        return torch.lerp(value, carried[FIRST_VALUE].to(value.dtype), self.value_gate(x).sigmoid())

    def heads(self, x):
        return split_heads(x, self.n_head)

    def per_head(self, parameter):
        """(C,) or (H, D) -> (H, 1, D), to stand beside (B, H, T, D)."""
        return parameter.view(self.n_head, 1, self.head_dim)

    def forward(self, x, positions=None, document_ids=None, carried=None):
        y, _, handed_on = self._run(x, {}, document_runs(document_ids), carried, keep_state=False)
        return y if carried is None else (y, handed_on)

    def _run(self, x, state, runs=None, carried=None, keep_state=True):
        """(y, state, carried with the first value in it)."""
        previous, last_input = token_shift(x, state.get("last_input"), runs)
        inputs, gate = self.prepare(x, previous, carried)
        with torch.autocast(x.device.type, enabled=False):  # sums over a whole text need their digits
            form = self.forms["recurrent" if x.size(1) == 1 else self.form]
            y, memory = form(**inputs, state=state.get("memory"), runs=runs, chunk_size=self.chunk_size,
                             keep_state=keep_state)  # fmt: skip
        now = (inputs["r"] * inputs["k"] * self.per_head(self.bonus)).sum(-1, keepdim=True) * inputs["v"]
        y = self.norm(merge_heads(y).to(x.dtype)) + merge_heads(now).to(x.dtype)
        if carried is not None and FIRST_VALUE not in carried:
            carried = {**carried, FIRST_VALUE: merge_heads(inputs["v"])}
        return self.out(y * gate), {"memory": memory, "last_input": last_input}, carried

    # -- one token at a time

    def init_state(self, batch, device=None, dtype=None):
        """The memory, in float32 or better, and the last input for the token shift."""
        dtype = dtype or torch.float32
        shape = (batch, self.n_head, self.head_dim, self.head_dim)
        memory = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return {"memory": memory, "last_input": torch.zeros(batch, 1, self.shift.size(1), device=device, dtype=dtype)}

    def step(self, x, state, carried=None):
        y, after, handed_on = self._run(x, state, carried=carried)
        after["last_input"] = after["last_input"].clone()  # a view would hold all inputs in memory
        return (y, after) if carried is None else (y, after, handed_on)

    def state_bytes(self, T, dtype=torch.float32):
        size = torch.promote_types(dtype, torch.float32).itemsize
        return self.n_head * self.head_dim**2 * size + self.shift.size(1) * dtype.itemsize

    # -- cost

    def mixing_flops(self, T):
        """The recurrence in the form that is chosen, of H heads of D by D. Elementwise work is not counted.

        chunk, C tokens each: 8 C D for both products of both kinds of keys, 2 C D for k's part of what is asked, 2 C D
        for the solve and 4 C D for what is read, the causal halves not taken off; with more than one chunk, 2 C D more
        for the solve and 2 D^2 each to correct, to write k, to write b, and to read.
        recurrent: 2 D^2 each to ask and to read, and 4 D^2 elementwise to write twice.
        """
        return self.n_head * sum(self.recurrence_flops(T))

    def elementwise_flops(self, T):
        return self.n_head * self.recurrence_flops(T)[1]

    def recurrence_flops(self, T):
        """(in matrix products, elementwise) of one head, per token."""
        D = self.head_dim
        if self.form == "recurrent" or T == 1:
            return 4 * D * D, 4 * D * D
        C, padding = padded_chunks(T, chunk_length(T, self.chunk_size))
        return padding * (16 * C * D + (2 * C * D + 8 * D * D if T > C else 0)), 0


def first_layer(config):
    """Index of the first block with this mixer, alone or beside others."""
    for layer, (names, _) in enumerate(config.blocks()):
        if any(issubclass(MIXER_REGISTRY[name], RWKV7) for name in names.split("+")):
            return layer
    return 0


@FFN_REGISTRY("rwkv7")
class ChannelMixing(StandardFFN):
    """down(relu(up(x + (x of the token before - x) * shift))^2), RWKV-7's (Peng et al. 2025, section 4.4)."""

    looks_back = True
    residual_out = ()
    own_init = ("shift", "up.weight", "down.weight")
    no_weight_decay = ("shift",)

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.lean = (1 - layer_index / config.n_layer) ** 4
        self.shift = nn.Parameter(torch.empty(config.n_embd))
        self.activation = ACTIVATION_REGISTRY["relu2"]

    def init_own_parameters(self, generator):
        """RWKV-LM's."""
        C = self.shift.numel()
        self.shift.copy_(1 - (torch.arange(C, dtype=torch.float32) / C) ** self.lean)
        self.up.weight.copy_((2 * torch.rand(self.up.weight.shape, generator=generator) - 1) * 0.5 * C**-0.5)
        self.down.weight.zero_()

    def forward(self, x, document_ids=None):
        previous, _ = token_shift(x, None, document_runs(document_ids))
        return super().forward(torch.lerp(x, previous, self.shift))

    def init_state(self, batch, device=None, dtype=None):
        return torch.zeros(batch, 1, self.shift.numel(), device=device, dtype=dtype)

    def step(self, x, state):
        previous, last = token_shift(x, state)
        return super().forward(torch.lerp(x, previous, self.shift)), last.clone()

    def state_bytes(self, T, dtype=torch.float32):
        return self.shift.numel() * dtype.itemsize


def merge_heads(x):
    """(B, H, T, D) -> (B, T, H D)."""
    return x.transpose(1, 2).flatten(2)


def usual_rank(factor, width):
    """The authors' rule: factor sqrt(width) to the nearest 32, at least 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)
