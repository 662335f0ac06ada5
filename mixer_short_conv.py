"""What recurrent mixers share beside the recurrence: short causal convolution, token shift, where documents begin.

conv = ShortConv(channels, d_conv)
y, state = conv(x)                      # a text from its start
y, state = conv(x, state)               # and on from there
y, _ = conv(x, runs=document_runs(document_ids))
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def document_runs(document_ids):
    """(B, T) ids -> (B, T) numbers that grow by one where a document begins; None stays None.

    A recurrence starts again at every change of the id: a document that was interrupted does not go on.
    """
    if document_ids is None:
        return None
    changed = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changed.long().cumsum(1), (1, 0))


class ShortConv(nn.Module):
    """Each channel's own causal convolution over `width` tokens: y_t = bias + sum_d weight[width - 1 - d] x_(t - d).

    Weights are named and shaped as nn.Conv1d(channels, channels, width, groups=channels) has them, and start as its do.
    The state is the last width - 1 inputs, (B, width - 1, C).
    """

    own_init = ("weight", "bias")

    def __init__(self, channels, width, bias=False):
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_own_parameters(self, generator):
        for parameter in self.parameters():
            values = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * values - 1) * self.width**-0.5)  # within 1 / sqrt(fan in), nn.Conv1d's default

    def extra_repr(self):
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}"

    def forward(self, x, state=None, runs=None):
        """x (B, T, C) -> (y (B, T, C), state). `runs` as document_runs gives them; nothing crosses into another run."""
        T = x.size(1)
        before = x.new_zeros(x.size(0), self.width - 1, x.size(2)) if state is None else state.to(x.dtype)
        padded = torch.cat((before, x), dim=1)  # (B, T + width - 1, C)
        if runs is None:
            x_c = padded.transpose(1, 2).contiguous()  # (B, C, T + width - 1)
            y = F.conv1d(x_c, self.weight, self.bias, groups=self.channels).transpose(1, 2)
        else:
            y = self._within_runs(padded, runs)
        return y, padded[:, T:]

    def _within_runs(self, padded, runs):
        """The same, tap by tap, each masked where it would read from another run."""
        T = runs.size(1)
        seen = F.pad(runs, (self.width - 1, 0), value=-1)
        y = 0 if self.bias is None else self.bias
        for tap in range(self.width):
            same = (seen[:, tap : tap + T] == runs)[..., None]
            y = y + padded[:, tap : tap + T] * same * self.weight[:, 0, tap]
        return y

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
