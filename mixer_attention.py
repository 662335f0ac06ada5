"""Softmax attention: MHA, GQA and MQA, sliding window, QK-norm, soft cap, causal or not, with a KV cache.

    softmax(q k^T / sqrt(D) + bias) v        (Vaswani et al. 2017, eq. 1)

Three backends compute the same thing. `manual` is the equation written out and the one the others are held to; `sdpa`
is torch's fused kernel; `flex` compiles mask and soft cap into one kernel (CUDA).
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_components import NORM_REGISTRY, POSITION_ENCODING_REGISTRY
from registry import Registry
from user_errors import UserError

MIXER_REGISTRY = Registry("mixer")
ATTENTION_BACKEND_REGISTRY = Registry("attention_backend")


class Mixer(nn.Module):
    """What moves information across positions. Subclass, register, and the contract tests will find it.

    `forward(x, positions=None, document_ids=None) -> y` with x and y (B, T, C). `positions` (T,) or (B, T) default to
    0..T-1; tokens of different `document_ids` (B, T) must not see each other.

    A mixer that `carries` hands tensors on to mixers in later blocks: given `carried`, a dict from the block before,
    `forward` and `step` also return the dict for the next, which is a new one where it holds more.
    """

    carries = False
    no_weight_decay = ()
    own_init = ()
    residual_out = ()
    bidirectional = False  # can run with causal=False
    needed_options = ()  # options that are a mistake when no layer reads them, not merely idle
    positions = ("none", "learned_absolute")  # position encodings that it can honour
    split_columns: ClassVar = {}  # what several ranks may share, and with `check_split` how: see `training_mesh`
    split_rows = ()
    split_shared = ()
    forms: ClassVar = {}  # {'chunk': function, 'recurrent': function}: its recurrence, fast and as the equation
    operation = None  # what 'chunk' computes, by the name that kernels/ knows it by

    def describe(self):
        """A few words about its shape for the report at start."""
        return ""

    def check_device(self, device):
        """Raise UserError where this mixer, as it was configured, cannot train on a torch.device."""

    def mixing_flops(self, T):
        """Forward FLOPs per token at context T, beyond those of its nn.Linear weights."""
        raise NotImplementedError

    def elementwise_flops(self, T):
        """The part of mixing_flops(T) that is no matrix product (a scan, a shift): torch's counter cannot see it."""
        return 0

    def init_state(self, batch, device=None, dtype=None):
        """The state before the first token, for `batch` sequences."""
        raise NotImplementedError

    def step(self, x, state):
        """x (B, S, C), the next S tokens (usually one) -> (y (B, S, C), state). Equals `forward`, column by column.

        The state given may be used up: go on from the one returned.
        """
        raise NotImplementedError

    def state_bytes(self, T, dtype=torch.float32):
        """Bytes that one sequence must keep to continue at context T."""
        raise NotImplementedError


# ---- what a query may see -------------------------------------------------------------------------------------------


def visible(query_positions, key_positions, causal, window, query_documents=None, key_documents=None):
    """Bool (Tq, Tk) or (B, Tq, Tk): which keys each query sees; None when every query sees every key.

    Args:
        window: a query sees itself and the window - 1 keys before it (and after it, when not causal); 0 is no limit.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    mask = None
    if causal:
        mask = distance >= 0
    if window:
        near = distance.abs() < window
        mask = near if mask is None else mask & near
    if query_documents is not None:
        same = query_documents[:, :, None] == key_documents[:, None, :]
        mask = same if mask is None else mask & same
    return mask


# ---- backends: q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D) --------------------------------------------


def _repeat_heads(q, k, v):
    """k and v with each head repeated for the queries that share it."""
    groups = q.size(1) // k.size(1)
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


@ATTENTION_BACKEND_REGISTRY("manual")
class ManualBackend:
    """The equation, every intermediate in memory."""

    soft_cap = True

    @staticmethod
    def attend(q, k, v, mask, is_causal, bias, soft_cap, dropout):
        k, v = _repeat_heads(q, k, v)
        scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, H, Tq, Tk)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        return F.dropout(weights, dropout) @ v


@ATTENTION_BACKEND_REGISTRY("sdpa")
class SDPABackend:
    """torch's scaled_dot_product_attention, which picks its fastest kernel for the device."""

    soft_cap = False

    @staticmethod
    def attend(q, k, v, mask, is_causal, bias, soft_cap, dropout):
        k, v = _repeat_heads(q, k, v)
        if is_causal and bias is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        if bias is not None and mask is not None:
            mask = bias.masked_fill(~mask, float("-inf"))
        elif bias is not None:
            mask = bias
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


@ATTENTION_BACKEND_REGISTRY("flex")
class FlexBackend:
    """torch's flex_attention: soft cap, bias and mask inside one compiled kernel. Trains on CUDA only."""

    soft_cap = True
    _compiled = None

    @classmethod
    def attend(cls, q, k, v, mask, is_causal, bias, soft_cap, dropout):
        from torch.nn.attention.flex_attention import flex_attention

        if q.is_cuda and not torch.compiler.is_compiling():
            cls._compiled = cls._compiled or torch.compile(flex_attention)
            flex_attention = cls._compiled
        per_sequence = mask is not None and mask.dim() == 4
        per_sequence_bias = bias is not None and bias.dim() == 4

        def score(value, b, h, i, j):
            if soft_cap:
                value = soft_cap * torch.tanh(value / soft_cap)
            if bias is not None:
                value = value + (bias[b, h, i, j] if per_sequence_bias else bias[h, i, j])
            if mask is not None:
                seen = mask[b, 0, i, j] if per_sequence else mask[i, j]
                value = torch.where(seen, value, float("-inf"))
            return value

        return flex_attention(q, k, v, score_mod=score, enable_gqa=q.size(1) != k.size(1))


# ---- the mixer ------------------------------------------------------------------------------------------------------


@MIXER_REGISTRY("attention")
class Attention(Mixer):
    """Multi-head softmax attention, with fewer key-value heads where asked (GQA, Ainslie et al. 2023)."""

    residual_out = ("out.weight",)
    split_columns: ClassVar = {"qkv": "split_sizes"}
    split_rows = ("out",)
    split_shared = ("query_norm", "key_norm")
    bidirectional = True
    operation = "attention"
    needed_options = ("sliding_window",)
    positions = POSITION_ENCODING_REGISTRY  # every one, those that a user registers later too

    class Options:
        n_kv_head: int | None = None  # key-value heads: n_head is MHA, 1 is MQA, between is GQA
        queries_per_kv_head: int = 1  # where n_kv_head is None: at least so many query heads share a key-value head
        head_dim: int | None = None  # width of a head; None is n_embd / n_head
        sliding_window: int = 0  # a token sees itself and the window - 1 before it; 0 sees all
        qk_norm: bool = False  # normalise queries and keys (Dehghani et al. 2023)
        qk_norm_scope: str = "head"  # over each head (Qwen 3), or over the whole projection (OLMo 2)
        attention_soft_cap: float = 0.0  # cap * tanh(scores / cap), as in Gemma 2; 0 is off

    def __init__(self, config, layer_index):
        super().__init__()
        o = config.options_for(type(self))
        self.n_head, self.n_kv_head = config.n_head, _kv_heads(config.n_head, o)
        _check(config, o, self.n_kv_head)
        self.head_dim = o.head_dim or config.n_embd // config.n_head
        self.window, self.soft_cap = o.sliding_window, o.attention_soft_cap
        self.causal, self.dropout = config.causal, config.dropout
        self.backend = ATTENTION_BACKEND_REGISTRY[config.attention_backend]
        self.split_sizes = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.qkv = nn.Linear(config.n_embd, sum(self.split_sizes), bias=config.bias)  # one product for all three
        self.out = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.query_norm = self.key_norm = None
        self.norms_heads = o.qk_norm_scope == "head"
        if o.qk_norm:
            query_width, key_width = (self.head_dim,) * 2 if self.norms_heads else self.split_sizes[:2]
            norm = NORM_REGISTRY[config.normalization]
            self.query_norm, self.key_norm = norm(query_width, config), norm(key_width, config)
            if self.norms_heads:
                self.query_norm.times, self.key_norm.times = self.n_head, self.n_kv_head
        encoding = POSITION_ENCODING_REGISTRY[config.position_encoding]
        self.position_encoding = encoding(config, self.head_dim) if encoding.acts_in_attention else None
        self.position_name = config.position_encoding

    def describe(self):
        heads = f"{self.n_head} heads x {self.head_dim}"
        heads += f", {self.n_kv_head} kv" if self.n_kv_head != self.n_head else ""
        window = f", window {self.window}" if self.window else ""
        return heads + window + (f", {self.position_name}" if self.position_encoding is not None else "")

    def project(self, x, positions):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, Hkv, T, D), normalised and turned to their positions."""
        B, T, _ = x.shape
        qkv = self.qkv(x)  # all heads, or on one of several ranks some: what counts is what is here
        q, k, v = qkv.split([size * qkv.size(-1) // sum(self.split_sizes) for size in self.split_sizes], dim=-1)
        if self.query_norm is not None and not self.norms_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (heads.view(B, T, -1, self.head_dim).transpose(1, 2) for heads in (q, k, v))
        if self.query_norm is not None and self.norms_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.position_encoding is not None:
            q, k = self.position_encoding.rotate(q, positions), self.position_encoding.rotate(k, positions)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast norms in float32, and a kernel wants one dtype

    def bias(self, query_positions, key_positions, dtype):
        if self.position_encoding is None:
            return None
        return self.position_encoding.attention_bias(query_positions, key_positions, dtype)

    def forward(self, x, positions=None, document_ids=None):
        B, T, _ = x.shape
        q, k, v = self.project(x, positions)
        order = torch.arange(T, device=x.device)  # what is visible follows the order of the tokens, not their positions
        plain = self.causal and document_ids is None and not (self.window and self.window < T)
        mask = None
        if not (plain and self.backend is SDPABackend and not self._has_bias):
            mask = visible(order, order, self.causal, self.window, document_ids, document_ids)
        mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
        where = order if positions is None else positions
        y = self.backend.attend(q, k, v, mask, plain, self.bias(where, where, q.dtype), self.soft_cap, self._dropout())
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    @property
    def _has_bias(self):
        return self.position_encoding is not None and self.position_encoding.has_attention_bias

    def _dropout(self):
        return self.dropout if self.training else 0.0

    def check_split(self, n):
        """Refuse `tensor_parallel=n` where the ranks would not have whole heads, or heads would need one another."""
        for name, heads in (("n_head", self.n_head), ("n_kv_head", self.n_kv_head)):
            if heads % n:
                raise UserError(f"tensor_parallel={n} does not divide {name}={heads}; change one of them")
        across = None if self.query_norm is None or self.norms_heads else "qk_norm_scope='projection'"
        if across := f"position_encoding='{self.position_name}'" if self._has_bias else across:
            raise UserError(f"tensor_parallel={n} cannot split attention with {across}; use tensor_parallel=1")

    def check_device(self, device):
        if self.backend is FlexBackend and device.type != "cuda":
            raise UserError(
                f"attention_backend='flex' trains on CUDA alone and this is {device.type}; use 'sdpa' or 'manual'"
            )

    # -- one token at a time

    def init_state(self, batch, device=None, dtype=None):
        """Keys and values so far; with a window, only those that a later token can still see."""
        empty = torch.empty(batch, self.n_kv_head, 0, self.head_dim, device=device, dtype=dtype)
        return {"keys": empty, "values": empty, "held": 0, "length": 0}

    def step(self, x, state):
        B, S, _ = x.shape
        new = torch.arange(state["length"], state["length"] + S, device=x.device)
        q, k, v = self.project(x, new)
        state = self._append(state, k, v)
        keys, values = state["keys"][:, :, : state["held"]], state["values"][:, :, : state["held"]]
        seen = torch.arange(state["length"] - state["held"], state["length"], device=x.device)
        mask = visible(new, seen, True, self.window)
        bias = self.bias(new, seen, q.dtype)
        y = self.backend.attend(q, keys, values, mask, False, bias, self.soft_cap, 0.0)
        return self.out(y.transpose(1, 2).reshape(B, S, -1)), self._drop_unseen(state)

    def _append(self, state, k, v):
        """The state with S more keys and values; the buffers double when full, so that n tokens cost O(n) copies."""
        held, needed = state["held"], state["held"] + k.size(2)
        # The first keys tell how many heads are here: one of several ranks has some of them
        keys, values = (state["keys"], state["values"]) if held else (k[:, :, :0], v[:, :, :0])
        if needed > keys.size(2):
            room = max(needed, 2 * keys.size(2), 16)
            keys, values = (_grown(old.to(k.dtype), room, held) for old in (keys, values))  # autocast decides the dtype
        keys[:, :, held:needed], values[:, :, held:needed] = k, v
        return {"keys": keys, "values": values, "held": needed, "length": state["length"] + k.size(2)}

    def _drop_unseen(self, state):
        """With a window, forget what the next token cannot see; when half of the buffer is past, not each token."""
        keep = self.window - 1
        if not self.window or state["held"] < 2 * self.window:
            return state
        keys, values = (state[name][:, :, state["held"] - keep : state["held"]].clone() for name in ("keys", "values"))
        return {**state, "keys": keys, "values": values, "held": keep}

    # -- cost

    def mixing_flops(self, T):
        """q k^T and weights v: 2 x 2 H D per visible key. The causal half is not taken off (PaLM, appendix B)."""
        seen = self.window if self.causal else 2 * self.window - 1  # on both sides, itself once
        keys = min(T, seen) if self.window else T
        return 4 * self.n_head * self.head_dim * keys

    def state_bytes(self, T, dtype=torch.float32):
        tokens = min(T, self.window - 1) if self.window else T  # the next token sees itself and window - 1 before it
        return 2 * self.n_kv_head * self.head_dim * tokens * dtype.itemsize


@MIXER_REGISTRY("local_attention")
class LocalAttention(Attention):
    """Attention to the last `hybrid_local_window` tokens: the partner of a recurrent mixer in a hybrid.

    The recurrence carries what is far away, and a window keeps the state constant (Samba, Ren et al. 2024).
    """

    needed_options = ("hybrid_local_window",)

    class Options(Attention.Options):
        hybrid_local_window: int = 256  # tokens that local_attention sees, its own among them

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        o = config.options_for(type(self))
        self.window = o.hybrid_local_window
        if o.sliding_window and "attention" not in config.mixers():
            raise UserError(
                f"sliding_window={o.sliding_window} is of 'attention', and block_pattern='{config.block_pattern}' has "
                f"'local_attention': set hybrid_local_window, which is {self.window}"
            )
        if self.window < 1:
            raise UserError(f"hybrid_local_window={self.window} must be at least 1")


def _grown(old, room, held):
    """A copy of `old` (B, H, T, D) with space for `room` positions, the first `held` filled."""
    new = old.new_empty(old.size(0), old.size(1), room, old.size(3))
    new[:, :, :held] = old[:, :, :held]
    return new


def _kv_heads(n_head, o):
    """Key-value heads: as asked, or the most that divide the heads with `queries_per_kv_head` or more for each."""
    if o.n_kv_head is not None:
        return o.n_kv_head
    if o.queries_per_kv_head < 1:
        raise UserError(f"queries_per_kv_head={o.queries_per_kv_head} must be at least 1")
    return next(heads for heads in range(max(1, n_head // o.queries_per_kv_head), 0, -1) if n_head % heads == 0)


def _check(config, o, n_kv_head):
    """Refuse shapes and pairs of settings that attention cannot honour."""
    if o.head_dim is None and config.n_embd % config.n_head:
        raise UserError(f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads; change one of them")
    for name in ("n_kv_head", "head_dim"):
        value = getattr(o, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1, or None")
    if n_kv_head < 1 or config.n_head % n_kv_head:
        raise UserError(f"n_head={config.n_head} must be a multiple of n_kv_head={n_kv_head}")
    if o.qk_norm_scope not in ("head", "projection"):
        raise UserError(f"qk_norm_scope={o.qk_norm_scope!r} must be head or projection")
    if o.sliding_window < 0:
        raise UserError(f"sliding_window={o.sliding_window} must be 1 or more, or 0 for none")
    backend = ATTENTION_BACKEND_REGISTRY[config.attention_backend]
    if o.attention_soft_cap and not backend.soft_cap:
        raise UserError(
            f"attention_soft_cap={o.attention_soft_cap} cannot be done by "
            f"attention_backend='{config.attention_backend}'; use attention_backend='flex' or 'manual'"
        )
    if config.attention_backend == "flex" and config.dropout:
        raise UserError(
            f"attention_backend='flex' has no dropout and dropout={config.dropout}; use 'sdpa' or dropout=0.0"
        )
