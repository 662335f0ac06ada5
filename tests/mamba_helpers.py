"""Inputs of the two scans, and how two forms of a scan are compared."""

import torch
import torch.nn.functional as F

from mixer_short_conv import document_runs
from recurrence_helpers import random


def runs_of(batch, T):
    """Document numbers, another cut in each row; some documents have one token."""
    starts = torch.rand(batch, T, generator=torch.Generator().manual_seed(5)) < 0.15
    return document_runs(starts.cumsum(1))


def outputs_and_gradients(function, inputs):
    """[outputs ..., gradients of a fixed sum of them over all inputs]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = [y for y in function(*inputs) if y is not None]
    total = sum((y * torch.sin(torch.arange(y.numel(), dtype=y.dtype) + 1).view_as(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


def mamba_inputs(T, dtype=torch.float64, batch=2, D=6, N=4):
    dt = F.softplus(random(batch, T, D, dtype=dtype, seed=1))
    A = -random(N, D, dtype=dtype, seed=2).exp()
    x, B, C = random(batch, T, D, dtype=dtype), *(random(batch, T, N, dtype=dtype, seed=s) for s in (3, 4))
    return [x, dt, A, B, C, random(batch, N, D, dtype=dtype, seed=5)]


def mamba2_inputs(T, dtype=torch.float64, batch=2, H=6, P=3, G=2, N=4):
    dt = F.softplus(random(batch, T, H, dtype=dtype, seed=1))
    A = -random(H, dtype=dtype, seed=2).exp()
    x, B, C = random(batch, T, H, P, dtype=dtype), *(random(batch, T, G, N, dtype=dtype, seed=s) for s in (3, 4))
    return [x, dt, A, B, C, random(batch, G, N, H // G, P, dtype=dtype, seed=5)]
