"""The short causal convolution on a CPU, with the silu after it, compiled from cpu_conv.c: one pass each way.

The plain path is mixer_short_conv.causal_conv, a pass over memory for each tap.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import checks, compiled
from kernels.libraries import AbsentError
from mixer_short_conv import ShortConv
from mixer_short_conv import causal_conv as plain

SPAN = 64  # tokens of a unit of work, in cpu_conv.c too


class ConvFunction(torch.autograd.Function):
    """causal_conv for x (B, T, C), whose tokens may lie apart in memory, weight (C, 1, K) and bias (C,) or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, runs, silu):
        taps = weight.detach()[:, 0].t().flip(0).contiguous()  # (K, C); tap j reads j tokens back
        (batch, T, C), K = x.shape, taps.size(0)
        (x, step), bias = compiled.in_rows(x), None if bias is None else bias.detach().contiguous()
        y, reach, ctx.silu = x.new_empty(x.shape), tokens_back(x, K - 1, runs), int(silu)
        run = compiled.library("cpu_conv")
        run("conv_forward", x, taps, bias, reach, y, batch, T, C, step, K, ctx.silu, torch.get_num_threads())
        ctx.save_for_backward(x, taps, bias, reach)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, taps, bias, reach = ctx.saved_tensors
        (batch, T, C), K, threads = x.shape, taps.size(0), torch.get_num_threads()
        (x, step), units = compiled.in_rows(x), batch * -(-T // SPAN)
        grad_x, grad_taps, grad_bias = x.new_empty(x.shape), x.new_empty(units, K, C), x.new_empty(units, C)
        run, outputs = compiled.library("cpu_conv"), (grad_x, grad_taps, grad_bias, x.new_empty(threads, K, C))
        sizes = batch, T, C, step, K, ctx.silu, threads
        run("conv_backward", grad.contiguous(), x, taps, bias, reach, *outputs, *sizes)
        of_weight = grad_taps.sum(0).flip(0).t()[:, None]
        return grad_x, of_weight, None if bias is None else grad_bias.sum(0), None, None


def tokens_back(x, most, runs):
    """int32 (B, T) for x (B, T, C): how many tokens back, of the `most` before, are there and in the same run."""
    batch, T, _ = x.shape
    if runs is None:
        return torch.arange(T, dtype=torch.int32, device=x.device).clamp_(max=most).repeat(batch, 1)
    reach = torch.zeros(batch, T, dtype=torch.int32, device=x.device)
    for j in range(1, min(most + 1, T)):
        reach[:, j:] += runs[:, j:] == runs[:, :-j]
    return reach


def causal_conv(x, weight, bias, runs, silu):
    """The plain function, by ConvFunction where the tensors are what it takes."""
    takes = compiled.takes(x, weight, *(() if bias is None else (bias,)))
    return (ConvFunction.apply if takes else plain)(x, weight, bias, runs, silu)


def found_in(model):
    return [module for module in model.modules() if isinstance(module, ShortConv)]


def install(model, check=True):
    """Let the ShortConvs of `model` compute here.

    Raises:
        AbsentError: nothing here compiles C, or what it makes is off the plain path.
    """
    compiled.library("cpu_conv")
    convs = found_in(model)
    for kind in {(conv.width, conv.bias is not None, conv.silu) for conv in convs if check}:
        if reason := checks.refusal(plain, causal_conv, _examples(*kind), torch.float32):
            raise AbsentError(reason)
    for conv in convs:
        conv.kernel = causal_conv


def _examples(K, has_bias, silu, B=2, T=19, C=70):
    """Arguments of causal_conv: a text, one shorter than the taps, several documents."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((B, T, C), (C, 1, K), (C,)))
    runs = (torch.rand(B, T, generator=generator) < 0.3).long().cumsum(1)
    bias = bias if has_bias else None
    return [((text, weight, bias, ids, silu), {}) for text, ids in ((x, None), (x[:, : K // 2 + 1], None), (x, runs))]
