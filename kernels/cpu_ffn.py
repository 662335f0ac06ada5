"""An FFN on a CPU as one node of autograd: its two or three products by oneDNN, and the activation between them.

The plain path is the FFN's own `forward`. At small shapes what is saved is the bookkeeping of a node for each part, and
in a gated FFN also passes over the hidden layer (`docs/performance.md`).
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import checks
from kernels.cpu_linear import bias_gradient, input_gradient, product, takes, weight_gradient
from model_components import FFN_REGISTRY, gelu, relu, silu

BACKWARD = {  # of an activation: (gradient of its output, its input) -> gradient of its input
    gelu: torch.ops.aten.gelu_backward,
    F.gelu: torch.ops.aten.gelu_backward,
    silu: torch.ops.aten.silu_backward,
    F.silu: torch.ops.aten.silu_backward,
    relu: functools.partial(torch.ops.aten.threshold_backward, threshold=0),
}


class StandardFunction(torch.autograd.Function):
    """act(x up^T + b) down^T + c: x (..., C), up (H, C), down (C, H), b (H,) and c (C,) or None; float32."""

    @staticmethod
    def forward(ctx, x, activation, up, up_bias, down, down_bias):
        hidden = product(x, up, up_bias)
        active = activation(hidden)
        ctx.save_for_backward(x, up, down, hidden, active)
        ctx.activation, ctx.has_bias = activation, up_bias is not None
        return product(active, down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, up, down, hidden, active = ctx.saved_tensors
        of_hidden = BACKWARD[ctx.activation](input_gradient(grad, down), hidden)
        of_weights = _of_weights(ctx, (of_hidden, x), (grad, active))
        return input_gradient(of_hidden, up), None, *of_weights


class GatedFunction(torch.autograd.Function):
    """(act(x gate^T + a) * (x up^T + b)) down^T + c: gate and up (H, C), else as StandardFunction."""

    @staticmethod
    def forward(ctx, x, activation, gate, gate_bias, up, up_bias, down, down_bias):
        to_gate, hidden = product(x, gate, gate_bias), product(x, up, up_bias)
        active = activation(to_gate)
        gated = active * hidden
        ctx.save_for_backward(x, gate, up, down, to_gate, hidden, active, gated)
        ctx.activation, ctx.has_bias = activation, up_bias is not None
        return product(gated, down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate, up, down, to_gate, hidden, active, gated = ctx.saved_tensors
        of_gated = input_gradient(grad, down)
        of_hidden = of_gated * active
        of_gate = BACKWARD[ctx.activation](of_gated.mul_(hidden), to_gate)
        of_x = input_gradient(of_hidden, up, added_to=input_gradient(of_gate, gate))
        return of_x, None, *_of_weights(ctx, (of_gate, x), (of_hidden, x), (grad, gated))


def _of_weights(ctx, *pairs):
    """Gradients of (weight, bias) for each (gradient of a product, its input), in turn."""
    for grad, x in pairs:
        yield weight_gradient(grad, x)
        yield bias_gradient(grad) if ctx.has_bias else None


def found_in(ffn):
    """(Function, activation, its linear layers' names), or None for an FFN that this file does not have."""
    if type(ffn) is FFN_REGISTRY["standard"]:
        kind = StandardFunction, ffn.activation, ("up", "down")
    elif type(ffn) in (FFN_REGISTRY["swiglu"], FFN_REGISTRY["geglu"]):
        kind = GatedFunction, ffn.gate_activation, ("gate", "up", "down")
    else:
        return None
    return kind if kind[1] in BACKWARD else None


def install(model):
    """Let the FFNs of `model` that agree with their plain path compute as one node; how many do."""
    kinds = [(ffn, kind) for ffn in model.modules() if (kind := found_in(ffn))]
    agrees = {}
    for ffn, kind in kinds:
        if kind not in agrees:
            agrees[kind] = checks.same_module(ffn, functools.partial(_forward, ffn, *kind), (2, 9, ffn.up.in_features))
        if agrees[kind]:
            ffn.forward = functools.partial(_forward, ffn, *kind)
    return sum(agrees[kind] for _, kind in kinds)


def _forward(ffn, function, activation, names, x):
    linears = [getattr(ffn, name) for name in names]
    if not (takes(x) and torch.is_grad_enabled() and type(ffn.up.weight) is torch.nn.Parameter):
        return type(ffn).forward(ffn, x)
    return function.apply(x, activation, *(tensor for linear in linears for tensor in (linear.weight, linear.bias)))
