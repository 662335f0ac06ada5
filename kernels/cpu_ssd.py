"""Mamba-2's scan in chunks on a CPU, compiled from cpu_ssd.c; the twin of mixer_mamba_scan.ssd_chunked.

A thread takes a chunk of a head through all its products while they are in its cache; tensors of weights and decays for
all pairs of tokens are never made. Float32, from no state to no state; anything else takes the plain form.
"""

import ctypes

import torch
from torch.autograd.function import once_differentiable

from kernels import compiled
from kernels.libraries import AbsentError

HEADS = 4  # of a unit of work, in cpu_ssd.c too


def find(plain, device, dtype):
    """A form with the plain one's signature.

    Raises:
        AbsentError: this is no CPU, or nothing here compiles C.
    """
    if device.type != "cpu":
        raise AbsentError("is for CPUs")
    compiled.library("cpu_ssd")

    def form(x, dt, A, B, C, state=None, runs=None, chunk_size=64, D=None):
        D = x.new_zeros(x.size(2)) if D is None else D
        if state is not None or not compiled.takes(x, dt, A, B, C, D):
            return plain(x, dt, A, B, C, state, runs, chunk_size, D)
        return SSDFunction.apply(x, dt, A, B, C, D, runs, min(chunk_size, x.size(1))), None

    return form


class SSDFunction(torch.autograd.Function):
    """x (B, T, H, P), dt (B, T, H), A and D (H,), B and C (B, T, G, N), runs (B, T) or None, Q -> y (B, T, H, P)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, runs, Q):
        x, B, C = (tensor if lies_in_rows(tensor) else tensor.contiguous() for tensor in (x, B, C))
        (batch, T, H, P), (G, N), begin = x.shape, B.shape[2:], None if runs is None else beginnings(runs)
        dt, A, D = dt.contiguous(), A.contiguous(), D.contiguous()
        ctx.sizes = batch, T, H, P, G, N, Q, x.stride(1), B.stride(1), C.stride(1)
        y, before = torch.empty(x.shape), torch.empty(-(-T // Q), batch, H, N, P)
        _run("ssd_forward", ctx.sizes, x, dt, A, B, C, D, begin, y, before)
        ctx.save_for_backward(x, dt, A, B, C, D, begin, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, dt, A, B, C, D, begin, before = ctx.saved_tensors
        (batch, _, H, _), G = x.shape, B.size(2)
        blocks = -(-(H // G) // HEADS)
        grad_x, grad_dt, (grad_A, grad_D) = torch.empty(x.shape), torch.empty(dt.shape), torch.empty(2, batch, H)
        grad_B, grad_C = torch.empty(blocks, *B.shape), torch.empty(blocks, *C.shape)
        outputs = grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D
        _run("ssd_backward", ctx.sizes, grad.contiguous(), x, dt, A, B, C, D, begin, before, *outputs)
        return grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_D.sum(0), None, None


def _run(name, sizes, *tensors):
    """A function of cpu_ssd.c, with the scratch that its threads need."""
    library, threads, floats = compiled.library("cpu_ssd"), torch.get_num_threads(), ctypes.c_int64()
    _, _, _, P, _, N, Q, *_ = sizes
    library.functions.ssd_scratch(*map(ctypes.c_int64, (P, N, Q)), ctypes.byref(floats))
    library(name, *tensors, torch.empty(threads, floats.value), floats.value, *sizes, threads)


def lies_in_rows(x):
    """Whether every token of x (B, T, H, P) lies as far from the one before, its heads side by side."""
    return x.stride(3) == 1 and x.stride(2) == x.size(3) and x.stride(0) == x.size(1) * x.stride(1)


def beginnings(runs):
    """int32 (B, T): the first token of each token's run."""
    places = torch.arange(1, runs.size(1), dtype=torch.int32)
    starts = torch.where(runs[:, 1:] != runs[:, :-1], places, 0)
    return torch.nn.functional.pad(starts.cummax(1).values, (1, 0)).int()
