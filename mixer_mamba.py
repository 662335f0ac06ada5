"""State space mixers: Mamba-1, a selective scan (`mamba`), and Mamba-2, state space duality (`mamba2`).

Both carry a state h through the sequence. How much of it stays, and what is written and read, depend on the token:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        (Gu & Dao 2023, eq. 2 and 4)

Mamba-1 gives each channel its own dt and each (channel, state) its own A; Mamba-2 (Dao & Gu 2024) shares both within a
head, which turns the scan into matrix products. The scans, in a plain and a fast form, are in mixer_mamba_scan.py.

Parameters have the names and shapes of transformers' MambaMixer and Mamba2Mixer. States and decays are float32 at
least, whatever the weights are. A new document starts from nothing, in the state and in the short convolution.
"""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY, Mixer
from mixer_mamba_scan import goes_on, selective_scan, selective_scan_recurrent, ssd_chunked, ssd_recurrent
from mixer_short_conv import ShortConv, document_runs
from model_components import RMSNorm, rms_norm
from user_errors import UserError

# ---- the mixers -----------------------------------------------------------------------------------------------------


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

    def __init__(self, config):
        super().__init__()
        self.options = o = config.options_for(type(self))
        _check(o, self.forms)
        self.d_inner, self.d_state = max(1, round(o.expand * config.n_embd)), o.d_state
        self.form = o.recurrence

    def scan(self, x, dt, A, B, C, state, cuts, *more):
        """(y, the last state) by the form that is chosen; a single token from a state is the equation itself."""
        form = self.forms["recurrent" if x.size(1) == 1 and state is not None else self.form]
        return form(x, dt, A, B, C, state, cuts, self.options.chunk_size, *more)

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
    operation = "selective_scan"
    forms: ClassVar = {"chunk": selective_scan, "recurrent": selective_scan_recurrent}

    class Options(StateSpaceMixer.Options):
        d_state: int = 16  # states per channel
        dt_rank: int | None = None  # width that dt is computed through; None is n_embd / 16, rounded up
        dt_init: str = "random"  # initial weights of dt: random, even within dt_rank^-0.5, or constant
        dt_scale: float = 1.0  # times those weights
        chunk_size: int = 8  # recurrence=chunk: tokens per state kept for backward; 8 fit a processor's cache

    def __init__(self, config, layer_index):
        super().__init__(config)
        o, D, N = self.options, self.d_inner, self.d_state
        self.dt_rank = o.dt_rank or math.ceil(config.n_embd / 16)
        self.in_proj = nn.Linear(config.n_embd, 2 * D, bias=config.bias)  # x and the gate z
        self.conv1d = ShortConv(D, o.d_conv, bias=o.conv_bias, silu=True)
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
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt = F.softplus(_at_least_float32(self.dt_proj(dt)))
        x, B, C, A = (_at_least_float32(tensor) for tensor in (x, B, C, -self.A_log.exp().t()))
        keep = None if runs is None else goes_on(runs, x.dtype)
        y, after = self.scan(x, dt, A, B, C, None if state is None else state["ssm"], keep)
        y = torch.addcmul(y, x, self.D).to(z.dtype) * F.silu(z)
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
    operation = "ssd"
    forms: ClassVar = {"chunk": ssd_chunked, "recurrent": ssd_recurrent}

    class Options(StateSpaceMixer.Options):
        d_state: int = 128  # states per channel
        headdim: int | None = None  # width of a head; None is 64, or the next below that divides the inner width
        ngroups: int = 1  # groups of heads that share B and C, as key-value heads do in GQA
        a_init_min: float = 1.0  # the initial -A of a head is at least this
        a_init_max: float = 16.0  # and at most this, evenly
        chunk_size: int = 64  # recurrence=chunk: tokens per chunk, within which the cost grows with the square

    def __init__(self, config, layer_index):
        super().__init__(config)
        o, D = self.options, self.d_inner
        self.headdim = o.headdim or max(width for width in range(1, 65) if D % width == 0)
        _check_heads(config, o, D, self.headdim)
        self.n_heads, self.ngroups = D // self.headdim, o.ngroups
        self.conv_channels = D + 2 * self.ngroups * self.d_state
        self.in_proj = nn.Linear(config.n_embd, D + self.conv_channels + self.n_heads, bias=config.bias)
        self.conv1d = ShortConv(self.conv_channels, o.d_conv, bias=o.conv_bias, silu=True)
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
        xBC, dt = _at_least_float32(xBC), F.softplus(_at_least_float32(dt) + self.dt_bias)
        x, B, C = xBC.split((self.d_inner, G * N, G * N), dim=-1)
        x = x.reshape(batch, T, self.n_heads, self.headdim)
        B, C, A = B.reshape(batch, T, G, N), C.reshape(batch, T, G, N), -_at_least_float32(self.A_log).exp()
        y, after = self.scan(x, dt, A, B, C, None if state is None else state["ssm"], runs, _at_least_float32(self.D))
        y = y.reshape(batch, T, -1).to(z.dtype)
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
        recurrent = 5 * self.d_inner * self.d_state if self.form == "recurrent" else 0
        return self.frame_flops() + 2 * self.n_heads + recurrent

    def product_flops(self, T):
        """What chunks do in matrix products, padding included; the last one's state counts, though it is not made."""
        if self.form == "recurrent":
            return 0
        D, N, Q = self.d_inner, self.d_state, min(self.options.chunk_size, T)
        between = 4 * D * N if T > Q else 0
        return (2 * Q * (self.ngroups * N + D) + between) * math.ceil(T / Q) * Q / T


def gated_rms_norm(x, z, weight, eps, ngroups, norm=rms_norm):
    """RMSNorm of x silu(z) (..., C) over each group of channels (Mamba-2, figure 6), in the dtype of z."""
    x = _at_least_float32(x) * F.silu(_at_least_float32(z))
    if ngroups == 1:
        return norm(x, weight, eps).to(z.dtype)
    normed = F.rms_norm(x.unflatten(-1, (ngroups, -1)), (x.size(-1) // ngroups,), None, eps)
    return weight * normed.flatten(-2).to(z.dtype)


class GatedRMSNorm(RMSNorm):
    """gated_rms_norm with a weight: no norm reaches across groups."""

    gated_kernel = staticmethod(gated_rms_norm)  # kernels/ may have a faster one

    def __init__(self, width, config, ngroups):
        super().__init__(width, config)
        self.ngroups = ngroups

    def forward(self, x, z):
        return self.gated_kernel(x, z, self.weight, self.eps, self.ngroups, self.kernel)


# ---- small things ---------------------------------------------------------------------------------------------------


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _uniform(shape, low, high, generator):
    return torch.empty(shape, device="cpu").uniform_(low, high, generator=generator)


def _check(o, forms):
    """Refuse what no state space mixer can be."""
    for name in ("d_state", "d_conv", "expand", "dt_min", "chunk_size", "dt_rank", "a_init_min"):
        if (value := getattr(o, name, None)) is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0")
    if getattr(o, "a_init_max", math.inf) < getattr(o, "a_init_min", 0):
        raise UserError(f"a_init_max={o.a_init_max} must not be below a_init_min={o.a_init_min}")
    if o.dt_max < o.dt_min:
        raise UserError(f"dt_max={o.dt_max} must not be below dt_min={o.dt_min}")
    if o.recurrence not in forms:
        raise UserError(f"recurrence={o.recurrence!r} does not exist (known: {', '.join(forms)})")
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
