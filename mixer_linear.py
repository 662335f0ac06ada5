"""Linear attention and its kin with a decay: a state of one size for ever instead of a cache of keys and values.

    S_t = decay_t * S_(t-1) + k_t v_t^T        y_t = S_t^T q_t        S (K, V) for each head

`linear_attention` has no decay and divides by a normaliser, `retention` decays by a constant for each head, `gla` by a
gate for each channel of the keys. One recurrence serves the three, in two forms: `recurrent` is the equation, token by
token, and `chunk` does the same with matrix products: attention inside pieces of the text, the state between them. A
single token takes the recurrent form, which is decoding.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY, Mixer
from mixer_chunks import (
    LEAF,
    carry,
    causal_mask,
    chunk_length,
    cut_at_runs,
    decayed_scores,
    decays_across,
    document_cuts,
    into_chunks,
    padded_chunks,
    pair_decays,
    scaled,
)
from mixer_short_conv import ShortConv, document_runs
from model_components import NORM_REGISTRY, POSITION_ENCODING_REGISTRY
from user_errors import UserError

# ---- the recurrence, token by token ---------------------------------------------------------------------------------


def linear_recurrent(q, k, v, log_decay=None, state=None, runs=None, chunk_size=None, keep_state=True):
    """S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T, y_t = S_t^T q_t: (y (B, H, T, V), the last S (B, H, K, V)).

    Args:
        q, k, v: (B, H, T, K), (B, H, T, K), (B, H, T, V).
        log_decay: (B, H, T, K), a decay for each channel of the keys, or (B, H, T, 1), one for all; None decays
            nothing. A batch or head dimension of 1 stands for all.
        state: (B, H, K, V) to go on from; None is zeros.
        runs: (B, T) from document_runs: S starts at zero where it changes.
    """
    S, y = _first_state(k, v, state), []
    decay = None if log_decay is None else log_decay.exp()
    decay = cut_at_runs(decay, runs, q)
    # unbind once: indexing x[:, :, t] in the loop makes the backward quadratic in T
    decays = [None] * q.size(2) if decay is None else decay.unsqueeze(-1).unbind(2)  # (B, H, K or 1, 1)
    for q_t, k_t, v_t, decay_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), decays, strict=True):
        S = S if decay_t is None else decay_t * S
        S = S + k_t[..., :, None] * v_t[..., None, :]
        y.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(y, dim=2), S


def _first_state(k, v, state):
    return k.new_zeros(*k.shape[:2], k.size(-1), v.size(-1)) if state is None else state


# ---- the same in chunks ---------------------------------------------------------------------------------------------


def linear_chunked(q, k, v, log_decay=None, state=None, runs=None, chunk_size=64, keep_state=True):
    """What linear_recurrent computes, in matrix products over chunks of `chunk_size` tokens.

    With b the sum of the log decays since the start of a chunk and S the state before it, as GLA (Yang et al. 2023,
    section 4) has it:

        y_i = exp(b_i) S^T q_i + sum_(j <= i) (q_i . exp(b_i - b_j) k_j) v_j
        S' = exp(b_C) S + sum_j exp(b_C - b_j) k_j v_j^T

    Every exponent above is at most 0, so nothing overflows, whatever the decays.

    Args:
        keep_state: False where nobody asks for the last state, which is then None when that saves work.
    """
    T, per_channel = q.size(2), log_decay is not None and log_decay.size(-1) > 1
    C = chunk_length(T, chunk_size, halves=per_channel)
    q, k, v = (into_chunks(x, C) for x in (q, k, v))  # (B, H, N, C, K or V)
    log_decay = None if log_decay is None else into_chunks(log_decay, C)  # (B, H, N, C, K or 1)
    cut = document_cuts(runs, C, q.dtype)
    scores = _scores(q, k, log_decay, cut)  # (B, H, N, C, C)
    y = scores @ v
    if y.size(2) > 1 or state is not None or keep_state:
        from_before, to_end, through = decays_across(log_decay, cut)
        added = scaled(k, to_end).transpose(-2, -1) @ v  # (B, H, N, K, V)
        states, last = carry(added, through, _first_state(k, v, state))
        y = y + scaled(q, from_before) @ states
    else:
        last = None
    return y.flatten(2, 3)[:, :, :T], last


def _scores(q, k, log_decay, cut):
    """(B, H, N, C, C): q_i . exp(b_i - b_j) k_j for j <= i of the same document, else 0."""
    mask = causal_mask(q.size(-2), cut, q.device)
    if log_decay is not None and log_decay.size(-1) > 1:
        scores = decayed_scores(q, k, log_decay)
        return scores if cut is None else scores.masked_fill(~cut.within, 0.0)
    scores = q @ k.transpose(-2, -1)
    return scores.masked_fill(~mask, 0.0) if log_decay is None else scores * pair_decays(log_decay, mask)


# ---- what these mixers share ----------------------------------------------------------------------------------------


class LinearMixer(Mixer):
    """Projections, short convolution, a recurrence over heads, output norm and gate, output projection.

    A subclass says in `prepare` what the recurrence gets, and which functions are its forms.
    """

    residual_out = ("out.weight",)
    operation = "linear"
    forms: ClassVar = {"chunk": linear_chunked, "recurrent": linear_recurrent}

    class Options:
        recurrence: str = "chunk"  # chunk: matrix products, fast; recurrent: the paper's equation, token by token
        chunk_size: int = 64  # tokens of a chunk
        d_conv: int = 0  # width of a short causal convolution over queries, keys and values; 0 is none
        expand_k: float = 1.0  # width of all queries (and keys) over n_embd
        expand_v: float = 1.0  # width of all values over n_embd
        output_norm: str = "none"  # norm of each head's output: none, or a normalization
        output_gate: bool = False  # multiply the output by silu(gate(x))

    def __init__(self, config, layer_index):
        super().__init__()
        o = config.options_for(type(self))
        check_options(config, o, self.forms)
        self.form, self.chunk_size, self.n_head = o.recurrence, o.chunk_size, config.n_head
        self.key_dim = max(1, round(o.expand_k * config.n_embd / config.n_head))  # of one head
        self.value_dim = max(1, round(o.expand_v * config.n_embd / config.n_head))
        self.split_sizes = [self.n_head * width for width in (self.key_dim, self.key_dim, self.value_dim)]
        self.qkv = nn.Linear(config.n_embd, sum(self.split_sizes), bias=config.bias)
        self.conv = ShortConv(sum(self.split_sizes), o.d_conv) if o.d_conv else None
        self.norm = NORM_REGISTRY[o.output_norm](self.value_dim, config) if o.output_norm != "none" else None
        if self.norm is not None:
            self.norm.times = self.n_head
        self.gate = nn.Linear(config.n_embd, self.split_sizes[2], bias=config.bias) if o.output_gate else None
        self.out = nn.Linear(self.split_sizes[2], config.n_embd, bias=config.bias)

    def prepare(self, x, q, k, v, positions):
        """{argument: tensor} for the recurrence, from the mixer's input x (B, T, C) and q, k, v (B, H, T, K or V)."""
        raise NotImplementedError

    def read(self, y):
        """What the recurrence returned (B, H, T, ...) -> the heads' outputs (B, H, T, V)."""
        return y

    def forward(self, x, positions=None, document_ids=None):
        return self._run(x, {}, positions, document_runs(document_ids), keep_state=False)[0]

    def _run(self, x, state, positions=None, runs=None, keep_state=True):
        qkv, conv_state = self.qkv(x), None
        if self.conv is not None:
            qkv, conv_state = self.conv(qkv, state.get("conv"), runs)
        q, k, v = (split_heads(part, self.n_head) for part in qkv.split(self.split_sizes, dim=-1))
        inputs = self.prepare(x, q, k, v, positions)
        with torch.autocast(x.device.type, enabled=False):  # sums over a whole text need their digits
            y, memory = self.recur(inputs, state.get("memory"), runs, keep_state)
            y = self.read(y).to(x.dtype)
        return self.finish(x, y), {"memory": memory, "conv": conv_state}

    def recur(self, inputs, memory, runs, keep_state):
        form = self.forms["recurrent" if next(iter(inputs.values())).size(2) == 1 else self.form]
        return form(**inputs, state=memory, runs=runs, chunk_size=self.chunk_size, keep_state=keep_state)

    def finish(self, x, y):
        """Heads' outputs y (B, H, T, V) -> (B, T, C)."""
        y = y.transpose(1, 2)
        y = y if self.norm is None else self.norm(y)
        y = y.flatten(2)
        return self.out(y if self.gate is None else y * F.silu(self.gate(x)))

    # -- one token at a time

    memory_columns = 0  # of the memory, beside those of the values

    def init_state(self, batch, device=None, dtype=None):
        """The memory, in float32 or better, and the last inputs of the short convolution."""
        dtype = dtype or torch.float32
        shape = (batch, self.n_head, self.key_dim, self.value_dim + self.memory_columns)
        memory = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        conv = self.conv.init_state(batch, device, dtype) if self.conv else None
        return {"memory": memory, "conv": conv, "length": 0}

    def step(self, x, state):
        length = state["length"] + x.size(1)
        y, after = self._run(x, state, torch.arange(state["length"], length, device=x.device))
        return y, {**after, "length": length}

    def state_bytes(self, T, dtype=torch.float32):
        size = torch.promote_types(dtype, torch.float32).itemsize
        memory = self.n_head * self.key_dim * (self.value_dim + self.memory_columns) * size
        return memory + (self.conv.state_bytes(dtype) if self.conv else 0)

    # -- cost

    def mixing_flops(self, T):
        """The recurrence in the form that is chosen, and the short convolution. Nothing grows with T beyond a chunk.

        Elementwise work (decays, feature maps, gates) is not counted, as a softmax is not.
        """
        K, V = self.key_dim, self.value_dim + self.memory_columns
        return self.n_head * self.recurrence_flops(T, K, V)[0] + self.elementwise_flops(T)

    def elementwise_flops(self, T):
        elementwise = self.recurrence_flops(T, self.key_dim, self.value_dim + self.memory_columns)[1]
        return self.n_head * elementwise + (self.conv.flops() if self.conv else 0)

    def recurrence_flops(self, T, K, V):
        """(in matrix products, elementwise) of one head, per token.

        chunk, C tokens each: 2 C K for the scores, 2 C V for what they weigh, the causal half not taken off; with more
        than one chunk, 2 K V to write the state and 2 K V to read it.
        recurrent: 2 K V to read, and 2 K V elementwise to write.
        """
        if self.form == "recurrent" or T == 1:
            return 2 * K * V, 2 * K * V
        C, padding = padded_chunks(T, chunk_length(T, self.chunk_size))
        return padding * (2 * C * (K + V) + (4 * K * V if T > C else 0)), 0


def split_heads(x, n_head):
    """(B, T, H D) -> (B, H, T, D), in float32 or better."""
    x = x.unflatten(-1, (n_head, -1)).transpose(1, 2)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_options(config, o, forms):
    """Refuse what no linear mixer can be."""
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads; change one of them")
    if o.recurrence not in forms:
        raise UserError(f"recurrence={o.recurrence!r} does not exist (known: {', '.join(forms)})")
    for name in ("chunk_size", "expand_k", "expand_v"):
        if not getattr(o, name, 1) > 0:
            raise UserError(f"{name}={getattr(o, name)} must be above 0")
    if getattr(o, "d_conv", 0) < 0:
        raise UserError(f"d_conv={o.d_conv} must be 1 or more, or 0 for none")


# ---- the mixers -----------------------------------------------------------------------------------------------------

FEATURE_MAPS = {
    "elu_plus_one": lambda x: x.clamp(max=0).exp() + x.relu(),  # elu(x) + 1, without its rounding below 0
    "relu": F.relu,
    "identity": lambda x: x,
}


@MIXER_REGISTRY("linear_attention")
class LinearAttention(LinearMixer):
    """phi(q_i) . sum phi(k_j) v_j^T over phi(q_i) . sum phi(k_j), j <= i (Katharopoulos et al. 2020, eq. 9 to 12).

    Its weights are those of `attention`, to the last one. The memory has one column more, for the normaliser.
    """

    normaliser_eps = 1e-6  # as in the authors' code: keeps an all but empty sum from dividing

    class Options:
        feature_map: str = "elu_plus_one"  # of queries and keys: elu_plus_one (the paper's), relu, identity
        normaliser: bool = True  # divide by the sum of the weights; without it, output_norm="rmsnorm" is wise

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        o = config.options_for(type(self))
        if o.feature_map not in FEATURE_MAPS:
            raise UserError(f"feature_map={o.feature_map!r} does not exist (known: {', '.join(FEATURE_MAPS)})")
        if o.normaliser and o.feature_map == "identity":
            raise UserError("feature_map='identity' has weights of both signs and normaliser=True divides by their sum;"
                            " set normaliser=False")  # fmt: skip
        self.feature_map, self.memory_columns = FEATURE_MAPS[o.feature_map], int(o.normaliser)

    def prepare(self, x, q, k, v, positions):
        v = F.pad(v, (0, 1), value=1.0) if self.memory_columns else v  # a value of 1 sums to the normaliser
        return {"q": self.feature_map(q), "k": self.feature_map(k), "v": v}

    def read(self, y):
        return y[..., :-1] / (y[..., -1:] + self.normaliser_eps) if self.memory_columns else y


@MIXER_REGISTRY("retention")
class Retention(LinearMixer):
    """S_t = gamma S_(t-1) + k_t v_t^T with gamma = 1 - 2^(-5 - head) (Sun et al. 2023, eq. 5 to 8).

    With position_encoding='rope' queries and keys turn by their positions: rotation and decay together are the paper's
    xPos. Its normalisations of the scores are left out: the output norm undoes them.
    """

    positions = ("none", "learned_absolute", "rope")

    class Options:
        expand_v: float = 2.0  # width of all values over n_embd; the paper halves the FFN in return
        output_norm: str = "rmsnorm"  # norm of each head's output (GroupNorm in the paper): none, or a normalization
        output_gate: bool = True  # multiply the output by silu(gate(x))

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        encoding = POSITION_ENCODING_REGISTRY[config.position_encoding]
        turns = config.position_encoding == "rope"
        self.position_encoding = encoding(config, self.key_dim) if turns else None

    def log_decay(self, device, dtype):
        """(1, H, 1, 1), the slowest head last."""
        head = torch.arange(self.n_head, device=device, dtype=dtype)
        return torch.log1p(-(2.0 ** (-5 - head)))[None, :, None, None]

    def prepare(self, x, q, k, v, positions):
        if self.position_encoding is not None:
            q, k = self.position_encoding.rotate(q, positions), self.position_encoding.rotate(k, positions)
        log_decay = self.log_decay(q.device, q.dtype).expand(-1, -1, q.size(2), -1)  # (1, H, T, 1)
        return {"q": q, "k": k * self.key_dim**-0.5, "v": v, "log_decay": log_decay}


@MIXER_REGISTRY("gla")
class GatedLinearAttention(LinearMixer):
    """S_t = diag(alpha_t) S_(t-1) + k_t v_t^T, alpha_t = sigmoid(x W1 W2 + b)^(1/16) (Yang et al. 2023, sec. 4.4)."""

    class Options:
        expand_k: float = 0.5  # width of all queries (and keys) over n_embd; then q, k, v, gate and out have 4 n_embd^2
        output_norm: str = "rmsnorm"  # norm of each head's output: none, or a normalization
        output_gate: bool = True  # multiply the output by silu(gate(x))
        gate_rank: int = 16  # width between the two matrices that make the decays
        gate_temperature: float = 16.0  # root of the gate: closer to 1, so that it forgets slowly

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        o = config.options_for(type(self))
        for name in ("gate_rank", "gate_temperature"):
            if not getattr(o, name) > 0:
                raise UserError(f"{name}={getattr(o, name)} must be above 0")
        self.temperature = o.gate_temperature
        self.decay_down = nn.Linear(config.n_embd, o.gate_rank, bias=False)
        self.decay_up = nn.Linear(o.gate_rank, self.n_head * self.key_dim, bias=True)

    def prepare(self, x, q, k, v, positions):
        log_decay = F.logsigmoid(split_heads(self.decay_up(self.decay_down(x)), self.n_head)) / self.temperature
        return {"q": q * self.key_dim**-0.5, "k": k, "v": v, "log_decay": log_decay}

    def recurrence_flops(self, T, K, V):
        """As above, but a decay for each channel halves the scores: products of K (C - 4), and 8 K elementwise."""
        if self.form == "recurrent" or T == 1 or K == 1:
            return super().recurrence_flops(T, K, V)
        C, padding = padded_chunks(T, chunk_length(T, self.chunk_size, halves=True))
        leaf = min(C, LEAF)
        products = K * (C - leaf) + 2 * C * V + (4 * K * V if T > C else 0)
        return padding * products, padding * 2 * leaf * K
