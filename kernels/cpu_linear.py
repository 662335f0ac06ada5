"""nn.Linear through oneDNN on CPUs where the default library is slow.

torch's float32 matrix products on x86 go to MKL, which serves AMD's processors less well than oneDNN does; torch ships
both. Forward and the gradient of the input go to oneDNN here, the gradient of the weight stays where it was, because
there MKL is the faster (`docs/performance.md`). The plain path is `torch.nn.functional.linear`.
"""

import contextlib
import functools
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F


class OneDNNLinear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N), float32 on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = input_gradient(grad, weight) if need_x else None
        grad_weight = weight_gradient(grad, x) if need_weight else None
        return grad_x, grad_weight, bias_gradient(grad) if need_bias and ctx.has_bias else None


def product(x, weight, bias=None):
    """x (..., K), weight (N, K), bias (N,) or None -> x weight^T + bias (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def input_gradient(grad, weight, added_to=None):
    """grad (..., N), weight (N, K) -> grad weight (..., K), and what it is added to, in the same pass."""
    if added_to is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(grad, added_to, weight.t(), None, "add")
    return torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")


def weight_gradient(grad, x):
    """grad (..., N), x (..., K) -> grad^T x (N, K)."""
    return torch.mm(grad.flatten(0, -2).t(), x.flatten(0, -2))


def bias_gradient(grad):
    """grad (..., N) -> (N,)."""
    return grad.flatten(0, -2).sum(0)


FEWEST_ROWS = 8  # below this, as when a token is generated, oneDNN's set-up costs more than the product


def linear(x, weight, bias=None):
    """F.linear, through oneDNN where the tensors are what it takes and its overhead is worth it."""
    return OneDNNLinear.apply(x, weight, bias) if takes(x) else F.linear(x, weight, bias)


def takes(x):
    """Whether x (..., K) is of a kind and size that oneDNN is for."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() < FEWEST_ROWS * x.size(-1):
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def is_faster_here(device):
    """Whether this is a CPU on which oneDNN was seen to be the faster of the two: AMD's."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and "AMD" in processor_vendor()


def processor_vendor():
    """Such as 'AuthenticAMD' or 'GenuineIntel'."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    return platform.processor()  # Windows: 'AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD'


def equals_plain():
    """True when forward and backward agree with F.linear here, at a shape with odd sizes and a bias."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 17, 40), (24, 40), (24,))]
    weights = torch.randn(3, 17, 24, generator=generator)
    results = []
    try:
        for function in (F.linear, linear):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    except (RuntimeError, AttributeError):  # a build without oneDNN
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results, strict=True))


def install(model):
    """Make every nn.Linear of `model` compute through `linear`; parameters and names stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)


def _forward(module, x):
    return linear(x, module.weight, module.bias)
