"""Inputs of the two scans, and how two forms of a scan are compared."""

import torch
import torch.nn.functional as F

from mixer_short_conv import document_runs

TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


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


def assert_all_close(one, other, dtype=torch.float64):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES[dtype])


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
