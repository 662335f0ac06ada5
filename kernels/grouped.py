"""The experts of a mixture as grouped matrix products: sort the tokens by expert, multiply each group by its weights.

Plain is `model_moe.Experts.combine`, which picks each expert's tokens with a mask. On a GPU the groups go through
`torch.nn.functional.grouped_mm`, which reads their borders from the device and never waits for it. On a CPU each group
is a product of its own: as fast, in any precision. Not through oneDNN (`cpu_linear`), which compiles a kernel for every
new number of rows, and here that number is new each time.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from model_moe import Experts, loads_of


class Dispatch(torch.autograd.Function):
    """x (N, C) -> (N k, C), the token of each choice in the order of experts. Its transpose is Collect.

    Both ways it gathers rows: the scatter-add that autograd would make sums in another order each time on a GPU.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x[order // inverse.size(1)]

    @staticmethod
    def backward(ctx, grad):
        return sum_of_choices(grad, ctx.saved_tensors[1]), None, None


class Collect(torch.autograd.Function):
    """y (N k, C) in the order of experts -> (N, C), the sum over each token's choices."""

    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.save_for_backward(order, inverse)
        return sum_of_choices(y, inverse)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return grad[order // inverse.size(1)], None, None


def sorted_by_expert(chosen):
    """chosen (N, k) -> order (N k,), the choices expert by expert, and inverse (N, k), where each choice went."""
    order = chosen.flatten().argsort(stable=True)
    places = torch.arange(order.numel(), device=chosen.device)
    return order, torch.empty_like(order).scatter(0, order, places).view_as(chosen)


def true_counts(loads, n_choices):
    return loads.tolist()


def even_counts(loads, n_choices):
    """What `true_counts` would be if no expert were preferred: for tensors without data."""
    n = loads.size(0)
    return [n_choices // n + (expert < n_choices % n) for expert in range(n)]


def sum_of_choices(y, inverse):
    """y (N k, C) in the order of experts, inverse (N, k) -> (N, C)."""
    total = y[inverse[:, 0]]
    for choice in range(1, inverse.size(1)):
        total = total + y[inverse[:, choice]]
    return total


def experts(module, x, chosen, weights, up, down, use_grouped_mm, counts_of=true_counts):
    """What `Experts.combine` computes. x (N, C), chosen (N, k) int64, weights (N, k), up, down (n, out, in) -> (N, C).

    Args:
        use_grouped_mm: (device, dtype) -> whether one product serves all experts.
        counts_of: (loads (E,), N k) -> tokens of each expert, as Python integers.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    order, inverse = sorted_by_expert(chosen)
    loads = loads_of(chosen, up.size(0))
    rows, row_weights = Dispatch.apply(x.to(dtype), order, inverse), weights.flatten()[order]
    up, down = up.to(dtype), down.to(dtype)

    def hidden(h, weight):
        return (module.activate(h) * weight[:, None]).to(dtype)  # weighing H numbers a row, not C

    if use_grouped_mm(device, dtype):
        offsets = loads.cumsum(0).to(torch.int32)
        h = hidden(F.grouped_mm(rows, up.transpose(1, 2), offs=offsets), row_weights)
        y = F.grouped_mm(h, down.transpose(1, 2), offs=offsets)
    else:
        counts = counts_of(loads, order.numel())
        groups = zip(rows.split(counts), row_weights.split(counts), up.unbind(0), down.unbind(0), strict=True)
        y = torch.cat([
            F.linear(hidden(F.linear(x_e, up_e), w_e), down_e)
            for x_e, w_e, up_e, down_e in groups if len(x_e) or not len(rows)  # one token leaves most experts alone
        ])  # fmt: skip
    return Collect.apply(y, order, inverse).to(x.dtype)


def install(model, device, backend="auto"):
    """Let every Experts of `model` compute here, if that equals the plain path; parameters and names stay.

    Args:
        backend: 'auto', or 'plain' to leave them as they are.

    Returns:
        'grouped_mm', 'sorted' (a product per expert), 'plain', or None where the model has no experts.
    """
    modules = [module for module in model.modules() if isinstance(module, Experts)]
    if not modules:
        return None
    if backend == "plain":
        return "plain"
    grouped = [dtype for dtype in _DTYPES if device.type == "cuda" and equals_plain(modules[0], dtype, GROUPED)]
    if not grouped and not equals_plain(modules[0], modules[0].up.dtype, SORTED):
        return "plain"
    for module in modules:
        use_grouped_mm = functools.partial(_has_grouped_mm, grouped)
        module.combine = functools.partial(experts, module, use_grouped_mm=use_grouped_mm)
    return "grouped_mm" if grouped else "sorted"


def install_without_data(model):
    """Let every Experts of `model` compute, on tensors without data, a product per expert with an even share."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.combine = functools.partial(experts, module, use_grouped_mm=_never, counts_of=even_counts)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _always(device, dtype):
    return True


def _never(device, dtype):
    return False


def _has_grouped_mm(checked, device, dtype):
    """Inside torch.compile bfloat16 alone is compiled; the others break the graph, as their groups' sizes are data."""
    return dtype in checked and (dtype == torch.bfloat16 or not torch.compiler.is_compiling())


GROUPED, SORTED = (functools.partial(experts, use_grouped_mm=rule) for rule in (_always, _never))


def equals_plain(module, dtype, path):
    """True when outputs and gradients of path(module, x, chosen, weights, up, down) agree with the plain path here.

    It is tried on a copy of `module` in `dtype`.

    The last expert gets no token, as happens in training.
    """
    module, n = copy.deepcopy(module).to(dtype), module.up.size(0)
    module.__dict__.pop("combine", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, module.up.size(2), generator=generator)
    chosen = torch.rand(64, max(2, n - 1), generator=generator).topk(2, dim=-1).indices.to(module.up.device) % n
    inputs = [x, torch.rand(64, 2, generator=generator), torch.randn(x.shape, generator=generator)]
    x, weights, grad = (tensor.to(module.up) for tensor in inputs)
    with torch.no_grad():  # a fresh model's weights are so small that anything would agree
        for weight in (module.up, module.down):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.size(-1) ** 0.5)
    leaves, results = [x.requires_grad_(), weights.requires_grad_(), module.up, module.down], []
    try:
        for combine in (module.combine, functools.partial(path, module)):
            y = combine(x, chosen, weights, module.up, module.down)
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch or a device without it
        return False
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    return all(_relative_error(fast, plain) < tolerance for plain, fast in zip(*results, strict=True))


def _relative_error(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()
