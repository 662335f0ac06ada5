"""The experts of a mixture on a CPU as one node of autograd, for gated experts with silu and C where it compiles.

The plain path is `kernels.grouped.experts`, itself held to `model_moe.Experts.combine`. What is saved is a node for
each expert and part, their gradients' zeros and sums, and passes over the hidden layers (`docs/performance.md`).
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import compiled, grouped
from kernels.libraries import AbsentError
from model_components import silu
from model_moe import Experts


class ExpertsFunction(torch.autograd.Function):
    """`Experts.combine`: x (N, C), chosen (N, k) int64, weights (N, k), up (n, 2H, C), down (n, C, H) -> (N, C)."""

    @staticmethod
    def forward(ctx, x, chosen, weights, up, down):
        order, inverse = grouped.sorted_by_expert(chosen)
        loads = grouped.loads_of(chosen, up.size(0))
        counts = grouped.even_counts(loads, len(order)) if compiled.is_fake(loads) else loads.tolist()
        rows, row_weights, H = x[order // chosen.size(1)], weights.flatten()[order], down.size(2)
        hidden, active = x.new_empty(len(order), 2 * H), x.new_empty(len(order), H)
        y, run = torch.empty_like(rows), compiled.library("cpu_experts")
        for rows_e, hidden_e, up_e in _groups(counts, rows, hidden, up):
            torch.mm(rows_e, up_e.t(), out=hidden_e)
        run("gated_forward", hidden, row_weights, active, len(order), H, torch.get_num_threads())
        for active_e, y_e, down_e in _groups(counts, active, y, down):
            torch.mm(active_e, down_e.t(), out=y_e)
        ctx.save_for_backward(rows, hidden, active, row_weights, order, inverse, up, down)
        ctx.counts = counts
        return grouped.sum_of_choices(y, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, hidden, active, row_weights, order, inverse, up, down = ctx.saved_tensors
        H, run, grad = down.size(2), compiled.library("cpu_experts"), grad.contiguous()[order // inverse.size(1)]
        of_active, of_hidden, of_rows = torch.empty_like(active), torch.empty_like(hidden), torch.empty_like(rows)
        of_up, of_down, of_choices = torch.empty_like(up), torch.empty_like(down), torch.empty_like(row_weights)
        for grad_e, active_e, of_active_e, down_e, of_down_e in _groups(
            ctx.counts, grad, active, of_active, down, of_down
        ):
            torch.mm(grad_e, down_e, out=of_active_e)
            torch.mm(grad_e.t(), active_e, out=of_down_e)
        run("gated_backward", of_active, hidden, row_weights, of_hidden, of_choices, len(order), H,
            torch.get_num_threads())  # fmt: skip
        for rows_e, of_hidden_e, of_rows_e, up_e, of_up_e in _groups(ctx.counts, rows, of_hidden, of_rows, up, of_up):
            torch.mm(of_hidden_e, up_e, out=of_rows_e)
            torch.mm(of_hidden_e.t(), rows_e, out=of_up_e)
        of_weights = torch.empty_like(of_choices).scatter_(0, order, of_choices).view_as(inverse)
        return grouped.sum_of_choices(of_rows, inverse), None, of_weights, of_up, of_down


def _groups(counts, *tensors):
    """For each expert its part of every tensor: rows in the order of experts, or the weights of one."""
    parts = [tensor.unbind(0) if tensor.dim() == 3 else tensor.split(counts) for tensor in tensors]
    return zip(*parts, strict=True)


def experts(otherwise, x, chosen, weights, up, down):
    """ExpertsFunction where the tensors are what it takes, else `otherwise`."""
    if not (torch.is_grad_enabled() and compiled.takes(x, weights, up, down)):
        return otherwise(x, chosen, weights, up, down)
    return ExpertsFunction.apply(x, chosen, weights, up, down)


def found_in(model):
    return [module for module in model.modules() if isinstance(module, Experts)]


def install(model, check=True):
    """Let the Experts of `model` compute as one node.

    What it does not take it leaves to what kernels.grouped has installed.

    Raises:
        AbsentError: nothing here compiles C, what it makes is off the plain path, or these are no gated experts with
            silu.
    """
    modules = found_in(model)
    if not modules:
        return
    if not modules[0].is_gated or modules[0].activation not in (silu, F.silu):
        raise AbsentError("is for experts of swiglu")
    compiled.library("cpu_experts")
    if check and not grouped.equals_plain(modules[0], torch.float32, _path):
        raise AbsentError("is off the plain path")
    for module in modules:
        module.combine = functools.partial(experts, module.combine)


def _path(module, *inputs):
    return experts(functools.partial(type(module).combine, module), *inputs)
