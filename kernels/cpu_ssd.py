"""Mamba-2's scan in chunks on a CPU, compiled from cpu_ssd.c; the twin of mixer_mamba_scan.ssd_chunked.

A thread takes a chunk of a head through all its products while they are in its cache; tensors of weights and decays for
all pairs of tokens are never made. Float32, from no state to no state; anything else takes the plain form.
"""

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from kernels import compiled
from kernels.libraries import AbsentError

HEADS = 4  # of a unit of work, in cpu_ssd.c too


def find(plain, device, dtype):
    """A form with the plain one's signature.

    Raises:
        AbsentError: this is no CPU, products are not to run in float32, or nothing here compiles C.
    """
    if device.type != "cpu":
        raise AbsentError("is for CPUs")
    if dtype != torch.float32:
        raise AbsentError("is for float32")
    compiled.library("cpu_ssd")
    return functools.partial(_form, plain)


def _form(plain, x, dt, A, B, C, state=None, runs=None, chunk_size=64, D=None):
    D = x.new_zeros(x.size(2)) if D is None else D
    if state is not None or not compiled.takes(x, dt, A, B, C, D):
        return plain(x, dt, A, B, C, state, runs, chunk_size, D)
    return SSDFunction.apply(x, dt, A, B, C, D, runs, min(chunk_size, x.size(1))), None


class SSDFunction(torch.autograd.Function):
    """x (B, T, H, P), dt (B, T, H), A and D (H,), B and C (B, T, G, N), runs (B, T) or None, Q -> y (B, T, H, P)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, runs, Q):
        (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
        dt, A, D, begin = dt.contiguous(), A.contiguous(), D.contiguous(), None if runs is None else beginnings(runs)
        ctx.sizes, ((x, B, C), steps) = (batch, T, H, P, G, N, Q), _in_rows(x, B, C)
        y, before = x.new_empty(x.shape), x.new_empty(-(-T // Q), batch, H, N, P)
        _run("ssd_forward", (*ctx.sizes, *steps), x, dt, A, B, C, D, begin, y, before)
        ctx.save_for_backward(x, dt, A, B, C, D, begin, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, dt, A, B, C, D, begin, before = ctx.saved_tensors
        (batch, _, H, _), G = x.shape, B.size(2)
        ((x, B, C), steps), blocks = _in_rows(x, B, C), -(-(H // G) // HEADS)
        grad_x, grad_dt, (grad_A, grad_D) = x.new_empty(x.shape), x.new_empty(dt.shape), x.new_empty(2, batch, H)
        grad_B, grad_C = x.new_empty(blocks, *B.shape), x.new_empty(blocks, *C.shape)
        outputs = grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D
        _run("ssd_backward", (*ctx.sizes, *steps), grad.contiguous(), x, dt, A, B, C, D, begin, before, *outputs)
        return grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_D.sum(0), None, None


def _run(name, sizes, *tensors):
    """A function of cpu_ssd.c, with the scratch that its threads need."""
    library, threads, floats = compiled.library("cpu_ssd"), torch.get_num_threads(), ctypes.c_int64()
    _, _, _, P, _, N, Q, *_ = sizes
    library.functions.ssd_scratch(*map(ctypes.c_int64, (P, N, Q)), ctypes.byref(floats))
    library(name, *tensors, tensors[0].new_empty(threads, floats.value), floats.value, *sizes, threads)


def _in_rows(*tensors):
    """(tensors, the numbers from token to token in each)."""
    return zip(*map(compiled.in_rows, tensors), strict=True)


def beginnings(runs):
    """int32 (B, T): the first token of each token's run."""
    places = torch.arange(1, runs.size(1), dtype=torch.int32, device=runs.device)
    starts = torch.where(runs[:, 1:] != runs[:, :-1], places, 0)
    return torch.nn.functional.pad(starts.cummax(1).values, (1, 0)).int()
