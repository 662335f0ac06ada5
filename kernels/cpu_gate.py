"""Mamba-2's gated RMSNorm on a CPU, compiled from cpu_gate.c: one pass each way, a row in the processor's cache.

The plain path is mixer_mamba.gated_rms_norm.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import checks, compiled
from mixer_mamba import GatedRMSNorm
from mixer_mamba import gated_rms_norm as plain
from model_components import rms_norm

ROWS = 64  # of a unit of work, in cpu_gate.c too


class GateFunction(torch.autograd.Function):
    """gated_rms_norm for x (..., C), z (..., C), whose rows may lie apart in memory, and weight (C,)."""

    @staticmethod
    def forward(ctx, x, z, weight, eps):
        x, z = x.contiguous(), z if lies_in_rows(z) else z.contiguous()
        y, scale = torch.empty(x.shape), torch.empty(x.shape[:-1])
        ctx.sizes = scale.numel(), x.size(-1), z.stride(-2)
        run = compiled.library("cpu_gate")
        run("gate_forward", x, z, weight.detach(), torch.tensor(eps), y, scale, *ctx.sizes, torch.get_num_threads())
        ctx.save_for_backward(x, z, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, z, weight, scale = ctx.saved_tensors
        grad_x, grad_z = torch.empty(x.shape), torch.empty(x.shape)
        grad_weight, run = torch.empty(-(-scale.numel() // ROWS), x.size(-1)), compiled.library("cpu_gate")
        outputs = grad_x, grad_z, grad_weight
        run("gate_backward", grad.contiguous(), x, z, weight, scale, *outputs, *ctx.sizes, torch.get_num_threads())
        return grad_x, grad_z, grad_weight.sum(0), None


def lies_in_rows(z):
    """Whether every row of z (..., T, C) lies as far from the one before, channels side by side."""
    return z.dim() == 3 and z.stride(2) == 1 and z.stride(0) == z.size(1) * z.stride(1)


def gated_rms_norm(x, z, weight, eps, ngroups, norm=rms_norm):
    """The plain function, by GateFunction where the tensors are what it takes."""
    takes = ngroups == 1 and compiled.takes(x, z, weight)
    return GateFunction.apply(x, z, weight, eps) if takes else plain(x, z, weight, eps, ngroups, norm)


def install(model, check=True):
    """Let every GatedRMSNorm of `model` compute here, if that agrees with the plain path or is not checked; how many.

    Raises:
        AbsentError: nothing here compiles C.
    """
    norms = [module for module in model.modules() if isinstance(module, GatedRMSNorm)]
    if not norms:
        return 0
    compiled.library("cpu_gate")
    if check and checks.refusal(plain, gated_rms_norm, [_example()], torch.float32):
        return 0
    for norm in norms:
        norm.gated_kernel = gated_rms_norm
    return len(norms)


def _example():
    """Arguments of gated_rms_norm."""
    generator = torch.Generator().manual_seed(0)
    x, z, weight = (torch.randn(shape, generator=generator) for shape in ((3, 37, 70), (3, 37, 70), (70,)))
    return (x, z, weight, 1e-5, 1), {}
