"""What recurrent mixers share beside the recurrence: short causal convolution, token shift, where documents begin.

conv = ShortConv(channels, d_conv)
y, state = conv(x)                      # a text from its start
y, state = conv(x, state)               # and on from there
y, _ = conv(x, runs=document_runs(document_ids))
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def document_runs(document_ids):
    """(B, T) ids -> (B, T) numbers that grow by one where a document begins; None stays None.

    A recurrence starts again at every change of the id: a document that was interrupted does not go on.
    """
    if document_ids is None:
        return None
    changed = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changed.long().cumsum(1), (1, 0))


class ShiftedSum(torch.autograd.Function):
    """y_t = bias + sum_j weight_(K-1-j) x_(t-j) for each channel, zeros before the first token and before each run.

    x (B, T, C), weight (C, 1, K), bias (C,) or None, runs (B, T) from document_runs or None. On a CPU it trains twice
    as fast as F.conv1d(groups=C), which wants channels first (8 x 256 x 512, K = 4, one thread: 7 ms against 18 ms).
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


def causal_conv(x, weight, bias, runs, silu):
    """ShiftedSum, and silu of it where `silu`."""
    y = ShiftedSum.apply(x, weight, bias, runs)
    return F.silu(y) if silu else y


def _within_run(pairs, runs, j):
    """pairs (B, T - j, C), zero where token t and token t - j lie in different runs."""
    if runs is None:
        return pairs
    return pairs * (runs[:, j:] == runs[:, :-j])[..., None].to(pairs.dtype)


class ShortConv(nn.Module):
    """Each channel's own causal convolution over `width` tokens: y_t = bias + sum_d weight[width - 1 - d] x_(t - d).

    Weights are named and shaped as nn.Conv1d(channels, channels, width, groups=channels) has them, and start as its do.
    With `silu` what comes out is silu(y). The state is the last width - 1 inputs, (B, width - 1, C).
    """

    own_init = ("weight", "bias")
    kernel = staticmethod(causal_conv)  # kernels/ may have a faster one

    def __init__(self, channels, width, bias=False, silu=False):
        super().__init__()
        self.channels, self.width, self.silu = channels, width, silu
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_own_parameters(self, generator):
        for parameter in self.parameters():
            values = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * values - 1) * self.width**-0.5)  # within 1 / sqrt(fan in), nn.Conv1d's default

    def extra_repr(self):
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}, silu={self.silu}"

    def forward(self, x, state=None, runs=None):
        """x (B, T, C) -> (y (B, T, C), state). `runs` as document_runs gives them; nothing crosses into another run.

        With both, the state reaches the first run.
        """
        T, held = x.size(1), self.width - 1
        if state is not None:
            x = torch.cat((state.to(x.dtype), x), dim=1)  # (B, width - 1 + T, C)
            runs = None if runs is None else torch.cat((runs[:, :1].expand(-1, held), runs), dim=1)
        y = self.kernel(x, self.weight, self.bias, runs, self.silu)[:, -T:]
        last = F.pad(x, (0, 0, max(0, held - x.size(1)), 0))[:, max(0, x.size(1) - held) :]
        return y, last.clone()  # a view would hold every token in memory

    def init_state(self, batch, device=None, dtype=None):
        return torch.zeros(batch, self.width - 1, self.channels, device=device, dtype=dtype)

    def state_bytes(self, dtype):
        return (self.width - 1) * self.channels * dtype.itemsize

    def flops(self):
        """Per token: a multiply and an add for each tap of each channel."""
        return 2 * self.width * self.channels


def token_shift(x, state=None, runs=None):
    """x (B, T, C) -> (each token's predecessor (B, T, C), state (B, 1, C)); zeros before the first of a document."""
    before = x.new_zeros(x.size(0), 1, x.size(2)) if state is None else state.to(x.dtype)
    previous = torch.cat((before, x[:, :-1]), dim=1)
    if runs is not None:
        previous = previous * F.pad(runs[:, 1:] == runs[:, :-1], (1, 0), value=True)[..., None]
    return previous, x[:, -1:]
