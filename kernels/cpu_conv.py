"""The short causal convolution on a CPU, with the silu after it, compiled from cpu_conv.c: one pass each way.

The plain path is mixer_short_conv.causal_conv, a pass over memory for each tap.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import checks, compiled
from mixer_short_conv import ShortConv
from mixer_short_conv import causal_conv as plain

SPAN = 64  # tokens of a unit of work, in cpu_conv.c too


class ConvFunction(torch.autograd.Function):
    """causal_conv for x (B, T, C), whose tokens may lie apart in memory, weight (C, 1, K) and bias (C,) or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, runs, silu):
        taps = weight.detach()[:, 0].t().flip(0).contiguous()  # (K, C); tap j reads j tokens back
        x = x if lies_in_rows(x) else x.contiguous()
        (batch, T, C), K, y = x.shape, taps.size(0), torch.empty(x.shape)
        reach = tokens_back(batch, T, K - 1, runs)
        ctx.sizes = batch, T, C, x.stride(1), K, int(silu)
        run = compiled.library("cpu_conv")
        run("conv_forward", x, taps, bias, reach, y, *ctx.sizes, torch.get_num_threads())
        ctx.save_for_backward(x, taps, bias, reach)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, taps, bias, reach = ctx.saved_tensors
        (batch, T, C), K, threads = x.shape, taps.size(0), torch.get_num_threads()
        units = batch * -(-T // SPAN)
        grad_x, grad_taps, grad_bias = torch.empty(x.shape), torch.empty(units, K, C), torch.empty(units, C)
        run, outputs = compiled.library("cpu_conv"), (grad_x, grad_taps, grad_bias, torch.empty(threads, K, C))
        run("conv_backward", grad.contiguous(), x, taps, bias, reach, *outputs, *ctx.sizes, threads)
        of_weight = grad_taps.sum(0).flip(0).t()[:, None]
        return grad_x, of_weight, None if bias is None else grad_bias.sum(0), None, None


def lies_in_rows(x):
    """Whether every token of x (B, T, C) lies as far from the one before, channels side by side."""
    return x.stride(2) == 1 and x.stride(0) == x.size(1) * x.stride(1)


def tokens_back(batch, T, most, runs):
    """int32 (B, T): how many tokens back, of the `most` before, are there and in the same run."""
    if runs is None:
        return torch.arange(T, dtype=torch.int32).clamp_(max=most).repeat(batch, 1)
    reach = torch.zeros(batch, T, dtype=torch.int32)
    for j in range(1, min(most + 1, T)):
        reach[:, j:] += runs[:, j:] == runs[:, :-j]
    return reach


def causal_conv(x, weight, bias, runs, silu):
    """The plain function, by ConvFunction where the tensors are what it takes."""
    takes = compiled.takes(x, weight)
    return (ConvFunction.apply if takes else plain)(x, weight, bias, runs, silu)


def install(model, check=True):
    """Let the ShortConvs of `model` that agree with their plain path, or all without a check, compute here; how many.

    Raises:
        AbsentError: nothing here compiles C.
    """
    convs, agrees = [module for module in model.modules() if isinstance(module, ShortConv)], {}
    if convs:
        compiled.library("cpu_conv")
    for conv in convs:
        kind = conv.width, conv.bias is not None, conv.silu
        if kind not in agrees:
            agrees[kind] = not check or checks.refusal(plain, causal_conv, _examples(*kind), torch.float32) is None
        if agrees[kind]:
            conv.kernel = causal_conv
    return sum(conv.kernel is causal_conv for conv in convs)


def _examples(K, has_bias, silu, B=2, T=19, C=70):
    """Arguments of causal_conv: a text, one shorter than the taps, several documents."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((B, T, C), (C, 1, K), (C,)))
    runs = (torch.rand(B, T, generator=generator) < 0.3).long().cumsum(1)
    bias = bias if has_bias else None
    return [((text, weight, bias, ids, silu), {}) for text, ids in ((x, None), (x[:, : K // 2 + 1], None), (x, runs))]
