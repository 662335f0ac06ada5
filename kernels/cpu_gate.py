"""Mamba-2's gated RMSNorm on a CPU, compiled from cpu_gate.c: one pass each way, a row in the processor's cache.

The plain path is mixer_mamba.gated_rms_norm.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import checks, compiled
from kernels.libraries import AbsentError
from mixer_mamba import GatedRMSNorm
from mixer_mamba import gated_rms_norm as plain
from model_components import rms_norm

ROWS = 64  # of a unit of work, in cpu_gate.c too


class GateFunction(torch.autograd.Function):
    """gated_rms_norm for x (B, T, C), z (B, T, C), whose rows may lie apart in memory, and weight (C,)."""

    @staticmethod
    def forward(ctx, x, z, weight, eps):
        x, (z, step), weight = x.contiguous(), compiled.in_rows(z), weight.detach().contiguous()
        y, scale, run = x.new_empty(x.shape), x.new_empty(x.shape[:-1]), compiled.library("cpu_gate")
        sizes = scale.numel(), x.size(-1), step, torch.get_num_threads()
        run("gate_forward", x, z, weight, x.new_full((1,), eps), y, scale, *sizes)
        ctx.save_for_backward(x, z, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, z, weight, scale = ctx.saved_tensors
        (z, step), grad_x, grad_z = compiled.in_rows(z), x.new_empty(x.shape), x.new_empty(x.shape)
        grad_weight, run = x.new_empty(-(-scale.numel() // ROWS), x.size(-1)), compiled.library("cpu_gate")
        sizes = scale.numel(), x.size(-1), step, torch.get_num_threads()
        run("gate_backward", grad.contiguous(), x.contiguous(), z, weight, scale, grad_x, grad_z, grad_weight, *sizes)
        return grad_x, grad_z, grad_weight.sum(0), None


def gated_rms_norm(x, z, weight, eps, ngroups, norm=rms_norm):
    """The plain function, by GateFunction where the tensors are what it takes."""
    takes = ngroups == 1 and x.dim() == 3 and x.shape == z.shape and compiled.takes(x, z, weight)
    return GateFunction.apply(x, z, weight, eps) if takes else plain(x, z, weight, eps, ngroups, norm)


def found_in(model):
    return [module for module in model.modules() if isinstance(module, GatedRMSNorm)]


def install(model, check=True):
    """Let every GatedRMSNorm of `model` compute here.

    Raises:
        AbsentError: nothing here compiles C, or what it makes is off the plain path.
    """
    compiled.library("cpu_gate")
    if check and (reason := checks.refusal(plain, gated_rms_norm, [_example()], torch.float32)):
        raise AbsentError(reason)
    for norm in found_in(model):
        norm.gated_kernel = gated_rms_norm


def _example():
    """Arguments of gated_rms_norm."""
    generator = torch.Generator().manual_seed(0)
    x, z, weight = (torch.randn(shape, generator=generator) for shape in ((3, 37, 70), (3, 37, 70), (70,)))
    return (x, z, weight, 1e-5, 1), {}
