"""The parts of a block beside its mixer: norms, activations, position encodings, FFNs, and their registries.

    NORM_REGISTRY['rmsnorm'](n_embd, config)                FFN_REGISTRY['swiglu'](config, layer_index)
    POSITION_ENCODING_REGISTRY['rope'](config, head_dim)    ACTIVATION_REGISTRY['relu2'](x)

A part tells the builder about its parameters on its class, by name (flags on tensors are lost under FSDP2, deepcopy and
the meta device):

    no_weight_decay = ('A_log',)    never decayed, whatever their shape
    own_init = ('A_log',)           set by the part's own `init_own_parameters(generator)`
    linear_weights = ('up',)        what a linear layer's weight is, perhaps several stacked: initialised and counted so
    residual_out = ('down.weight',) write to the residual stream: initialised smaller, std / sqrt(branches of the model)

Weights of nn.Linear and nn.Embedding and the gains of norms need no declaration.
"""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import Registry
from user_errors import UserError

NORM_REGISTRY = Registry("normalization")
ACTIVATION_REGISTRY = Registry("activation")
POSITION_ENCODING_REGISTRY = Registry("position_encoding")
FFN_REGISTRY = Registry("ffn_type")

# ---- norms: (..., C) -> (..., C) ------------------------------------------------------------------------------------


class Norm(nn.Module):
    """A normalisation over the last dimension with a gain, and a bias where `has_bias`."""

    has_bias = False
    times = 1  # how often a token passes through it, for the FLOPs

    def __init__(self, width, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.has_bias else None

    def extra_repr(self):
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


@NORM_REGISTRY("layernorm_nobias")
class LayerNormNoBias(Norm):
    """(x - mean) / sqrt(var + eps) * weight (Ba et al. 2016, eq. 4, without the bias)."""

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@NORM_REGISTRY("layernorm")
class LayerNorm(LayerNormNoBias):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, eq. 4)."""

    has_bias = True


def rms_norm(x, weight, eps):
    """x (..., C), weight (C,) -> (..., C), the plain path."""
    return F.rms_norm(x, weight.shape, weight, eps)


@NORM_REGISTRY("rmsnorm")
class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4)."""

    kernel = staticmethod(rms_norm)  # kernels/ may put a faster one here

    def forward(self, x):
        return self.kernel(x, self.weight, self.eps)


# ---- activations: elementwise ---------------------------------------------------------------------------------------


@ACTIVATION_REGISTRY("gelu")
def gelu(x):
    """x * Phi(x) (Hendrycks & Gimpel 2016), exactly."""
    return F.gelu(x)


@ACTIVATION_REGISTRY("gelu_tanh")
def gelu_tanh(x):
    """The tanh approximation of GELU, which GPT-2's released weights were trained with."""
    return F.gelu(x, approximate="tanh")


@ACTIVATION_REGISTRY("silu")
def silu(x):
    """x * sigmoid(x)."""
    return F.silu(x)


@ACTIVATION_REGISTRY("relu")
def relu(x):
    """max(x, 0)."""
    return F.relu(x)


@ACTIVATION_REGISTRY("leaky_relu")
def leaky_relu(x):
    """max(x, 0.01 x)."""
    return F.leaky_relu(x, negative_slope=0.01)


@ACTIVATION_REGISTRY("relu2")
def relu2(x):
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


# ---- position encodings ---------------------------------------------------------------------------------------------


class PositionEncoding(nn.Module):
    """What tells a model where a token stands; each kind acts in one of three places and leaves the others alone.

    Args:
        config: ModelArchitectureConfig.
        head_dim: width of an attention head; None for the model's own copy, which acts on the embedding.
    """

    adds_to_embedding = False  # the model makes one and adds it to the token embeddings
    acts_in_attention = False  # every attention layer makes one of its own
    has_attention_bias = False  # and it adds to the scores

    def __init__(self, config, head_dim=None):
        super().__init__()

    def embed(self, positions):
        """(T,) or (B, T) int64 -> (T, C) or (B, T, C), added to the token embedding."""
        raise NotImplementedError

    def rotate(self, x, positions):
        """Queries or keys (B, H, T, D) at positions (T,) or (B, T), turned to where they stand."""
        return x

    def attention_bias(self, query_positions, key_positions, dtype):
        """(H, Tq, Tk) or (B, H, Tq, Tk) added to the scores before the softmax, or None."""
        return None


@POSITION_ENCODING_REGISTRY("none")
class NoPosition(PositionEncoding):
    """Nothing: a causal model can tell order by counting (NoPE, Kazemnejad et al. 2023)."""


@POSITION_ENCODING_REGISTRY("learned_absolute")
class LearnedAbsolute(PositionEncoding):
    """A learned vector for each position below block_size, added to the embedding (GPT-2)."""

    adds_to_embedding = True

    def __init__(self, config, head_dim=None):
        super().__init__(config)
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, positions):
        return self.table(positions)


@POSITION_ENCODING_REGISTRY("rope")
class RoPE(PositionEncoding):
    """Rotary embedding (Su et al. 2021, eq. 34): pair (i, i + D/2) of a head turns by position * theta^(-2i/D).

    The halves are paired as in GPT-NeoX and LLaMA's public weights, not the neighbours as in the paper; the two differ
    by a fixed permutation of the columns of the projections.
    """

    acts_in_attention = True

    class Options:
        rope_theta: float = 10000.0  # base of the wavelengths; larger turns slower
        rope_scaling: str = "none"  # reach past the trained context: none, linear, ntk or llama3
        rope_scaling_factor: float = 1.0  # by how much
        rope_original_context: int = 8192  # llama3: context before the stretch

    def __init__(self, config, head_dim=None):
        super().__init__(config)
        if head_dim % 2:
            raise UserError(f"position_encoding='rope' turns pairs, and the head width {head_dim} is odd")
        self.head_dim = head_dim
        self.options = config.options_for(type(self))
        if self.options.rope_scaling not in ("none", "linear", "ntk", "llama3"):
            raise UserError(f"rope_scaling={self.options.rope_scaling!r} must be none, linear, ntk or llama3")
        if self.options.rope_scaling == "ntk" and head_dim < 4:
            raise UserError(f"rope_scaling='ntk' needs heads at least 4 wide and these are {head_dim}")
        for name in ("rope_theta", "rope_scaling_factor"):
            if not getattr(self.options, name) > 0:
                raise UserError(f"{name}={getattr(self.options, name)} must be above 0")
        self._cached = None  # ((length, device, dtype), (cos, sin)) for positions 0..T-1

    def frequencies(self, device):
        """(D/2,) radians per position, float64."""
        o = self.options
        theta, factor = o.rope_theta, o.rope_scaling_factor
        if o.rope_scaling == "ntk":  # stretch the slow waves, keep the fast ones (bloc97 2023)
            theta = theta * factor ** (self.head_dim / (self.head_dim - 2))
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        frequencies = theta ** (-pair / self.head_dim)
        if o.rope_scaling == "linear":  # position interpolation (Chen et al. 2023)
            frequencies = frequencies / factor
        if o.rope_scaling == "llama3":  # Llama 3: stretch waves longer than the old context, blend in between
            turns = o.rope_original_context * frequencies / (2 * math.pi)
            keep = ((turns - 1) / (4 - 1)).clamp(0, 1)  # 0 below 1 turn in the old context, 1 above 4
            frequencies = (1 - keep) * frequencies / factor + keep * frequencies
        return frequencies

    def cos_sin(self, positions, dtype):
        """cos and sin (..., T, D) of each position's angles, both halves alike, the sine's first half negated."""
        device = positions.device if positions.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        angles = positions.to(device, torch.float64)[..., None] * self.frequencies(device)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype).to(positions.device), sin.to(dtype).to(positions.device)

    def cos_sin_of_range(self, T, device, dtype):
        """`cos_sin` of positions 0..T-1, kept for the next call."""
        # Kept outside the buffers on purpose: a buffer made on the meta device comes back as noise.
        key = (T, device, dtype)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self.cos_sin(torch.arange(T, device=device), dtype))
        return self._cached[1]

    def rotate(self, x, positions=None):
        # Half precision keeps three digits, too few for a position in the thousands, so the turn itself is float32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        may_keep = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
        if positions is None and may_keep:
            cos, sin = self.cos_sin_of_range(x.size(-2), x.device, dtype)
        elif may_keep and positions is not None and positions.dim() == 1 and x.device.type == "cpu":
            # Decoding: rows of a table that doubles as the text grows. A GPU would have to wait for the largest.
            T = 2 ** int(positions.max()).bit_length()
            cos, sin = (table[positions] for table in self.cos_sin_of_range(T, x.device, dtype))
        else:
            positions = torch.arange(x.size(-2), device=x.device) if positions is None else positions
            cos, sin = self.cos_sin(positions, dtype)
        if cos.dim() == 3:  # per sequence: (B, T, D) -> (B, 1, T, D)
            cos, sin = cos[:, None], sin[:, None]
        return (x * cos + x.roll(self.head_dim // 2, dims=-1) * sin).to(x.dtype)


@POSITION_ENCODING_REGISTRY("alibi")
class ALiBi(PositionEncoding):
    """Scores fall linearly with distance, each head at its own slope (Press et al. 2021, section 3)."""

    acts_in_attention = True
    has_attention_bias = True

    def __init__(self, config, head_dim=None):
        super().__init__(config)
        self.n_head = config.n_head

    def slopes(self):
        """[H] geometric from 2^(-8/n); between powers of two, every other slope of the next power fills up."""
        n = 2 ** math.floor(math.log2(self.n_head))
        slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)]
        return slopes + [2 ** (-4 * (2 * h + 1) / n) for h in range(self.n_head - n)]

    def attention_bias(self, query_positions, key_positions, dtype):
        distance = (query_positions[..., :, None] - key_positions[..., None, :]).abs()  # (..., Tq, Tk)
        slopes = torch.tensor(self.slopes(), device=distance.device, dtype=dtype)
        return -slopes[:, None, None] * distance.unsqueeze(-3)


# ---- what a part finds beside its output ----------------------------------------------------------------------------


class WithFindings(nn.Module):
    """A part whose forward finds more than its output: a loss of its own, and counts to log or to balance by.

    It calls `find` in forward. The model listens while an objective runs it, so that what was found is taken once:
    recomputation during backward, generation and evaluation leave no trace.
    """

    is_heard, found = False, None

    def find(self, loss, counts):
        """loss: scalar added to the training loss per token. counts: int64 (n,), summed over a step or longer."""
        if self.is_heard:
            self.found = (loss, counts)

    def after_step(self, counts):
        """After each optimizer step, with its counts summed over micro-batches and ranks: for a buffer to move."""

    def report(self, counts):
        """{name: number, or list of numbers}: counts summed since the last logged row, for that row to show."""
        return {}


# ---- FFNs: (B, T, C) -> (B, T, C) -----------------------------------------------------------------------------------


class FFN(nn.Module):
    """A network applied at each position.

    Linear weights inside are counted as they stand; a module of which a token uses a part has `active_fraction`, and
    one that keeps linear weights by itself names them in `linear_weights`.

    One that `looks_back`, at earlier tokens of its document, takes `document_ids` as a mixer does, and has a mixer's
    `init_state`, `step` and `state_bytes`.
    """

    looks_back = False
    residual_out = ("down.weight",)
    split_columns: ClassVar = {}  # what several ranks may share: see `training_mesh`
    split_rows = ()
    # True where a token's neighbours decide how many rows are multiplied together, which may round its own differently
    shapes_depend_on_data = False
    mixes_tokens = False  # True where the other tokens of a sequence change what one gets

    class Options:
        ffn_multiplier: float = 4.0  # hidden width over n_embd
        ffn_hidden: int | None = None  # hidden width itself; takes the place of the multiplier
        ffn_multiple_of: int = 8  # the hidden width is rounded to the nearest multiple

    def __init__(self, config, layer_index):
        super().__init__()
        o = config.options_for(type(self))
        for name in ("ffn_multiplier", "ffn_multiple_of") + (("ffn_hidden",) if o.ffn_hidden is not None else ()):
            if not getattr(o, name) > 0:
                raise UserError(f"{name}={getattr(o, name)} must be above 0")
        rounded = round(o.ffn_multiplier * config.n_embd / o.ffn_multiple_of) * o.ffn_multiple_of
        self.hidden = o.ffn_hidden or max(rounded, o.ffn_multiple_of)

    def describe(self):
        """What the startup report says after the name."""
        return f"hidden {self.hidden}"

    def check_split(self, n):
        """Refuse `tensor_parallel=n` where the hidden units do not divide."""
        if self.hidden % n:
            raise UserError(
                f"tensor_parallel={n} does not divide the FFN's {self.hidden} hidden units; set ffn_hidden to a "
                f"multiple of {n}"
            )


@FFN_REGISTRY("standard")
class StandardFFN(FFN):
    """down(activation(up(x))) (Vaswani et al. 2017, eq. 2), hidden width 4 n_embd."""

    split_columns: ClassVar = {"up": None}
    split_rows = ("down",)

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.up = nn.Linear(config.n_embd, self.hidden, bias=config.bias)
        self.down = nn.Linear(self.hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION_REGISTRY[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class GatedFFN(FFN):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, eq. 6); at 8/3 n_embd it has the weights of a 4x FFN."""

    split_columns: ClassVar = {"gate": None, "up": None}
    split_rows = ("down",)

    class Options(FFN.Options):
        ffn_multiplier: float = 8 / 3  # hidden width over n_embd; 8/3 of three matrices equals 4 of two

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.gate = nn.Linear(config.n_embd, self.hidden, bias=config.bias)
        self.up = nn.Linear(config.n_embd, self.hidden, bias=config.bias)
        self.down = nn.Linear(self.hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down(self.gate_activation(self.gate(x)) * self.up(x))


@FFN_REGISTRY("swiglu")
class SwiGLU(GatedFFN):
    """GatedFFN with silu, as in LLaMA."""

    gate_activation = staticmethod(F.silu)


@FFN_REGISTRY("geglu")
class GEGLU(GatedFFN):
    """GatedFFN with gelu."""

    gate_activation = staticmethod(F.gelu)


class ResidualScale(nn.Module):
    """What a branch is multiplied by before it joins the stream: 1, 1 / sqrt(branches), or a learned gain per channel.

    'depth' keeps the variance of the stream from growing with depth; 'learned' starts there (LayerScale, Touvron et
    al. 2021).
    """

    own_init = ("gain",)
    no_weight_decay = ("gain",)

    def __init__(self, config):
        super().__init__()
        self.kind, self.value = config.residual_scaling, config.n_branches() ** -0.5
        self.gain = nn.Parameter(torch.empty(config.n_embd)) if self.kind == "learned" else None

    def init_own_parameters(self, generator):
        self.gain.fill_(self.value)

    def forward(self, y):
        if self.kind == "none":
            return y
        return y * (self.value if self.kind == "depth" else self.gain)


class HeadTransform(nn.Module):
    """norm(activation(dense(x))) between the last block and the output head, as in BERT's released code. (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.norm = NORM_REGISTRY[config.normalization](config.n_embd, config)
        self.activation = ACTIVATION_REGISTRY[config.activation]

    def forward(self, x):
        return self.norm(self.activation(self.dense(x)))
