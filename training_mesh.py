"""One layer's weights over several ranks: heads and hidden units (tensor parallelism), or experts.

    check_model(model, place)       # refuses what does not divide, before anything is sent
    split_weights(model, place)     # every rank of a mesh keeps its part; names of parameters stay

Model files know nothing of this one. A part says on its class how it can be split, and the rest is replicated:

    split_columns = {"qkv": "split_sizes"}  # linear layers whose outputs are shared out; fused ones name their sizes
    split_rows = ("out",)                   # linear layers that read those: their outputs are summed over the ranks
    split_shared = ("query_norm",)          # modules that each rank uses on its heads: their gradients are summed
    split_experts = ("up", "down")          # parameters whose first dimension is the expert
    check_split(n)                          # raises UserError where n ranks cannot share this one
"""

import functools

import torch
import torch.distributed as dist

from kernels.grouped import Collect, Dispatch
from model_moe import loads_of
from user_errors import UserError


def parts_with(model, fact):
    """Modules whose class declares `fact` and means it."""
    return [module for module in model.modules() if getattr(module, fact, ())]


def check_model(model, place):
    """Refuse a model that the ranks cannot share as they were told to.

    Raises:
        UserError: nothing to split, or a number that does not divide.
    """
    for n, name, fact, what in (
        (place.tensor_parallel, "tensor_parallel", "split_columns", "attention and no FFN"),
        (place.expert_parallel, "expert_parallel", "split_experts", "mixture of experts"),
    ):
        parts = parts_with(model, fact) if n > 1 else ()
        if n > 1 and not parts:
            pattern = f"block_pattern='{model.config.block_pattern}' with ffn_type='{model.config.ffn_type}'"
            raise UserError(f"{name}={n} finds nothing to split: {pattern} has no {what}; use {name}=1")
        for part in parts:
            part.check_split(n)


def split_weights(model, place):
    """Let each rank keep its part of the weights that parts declare, as DTensors, and compute with it alone."""
    if place.tensor_parallel > 1:
        for part in parts_with(model, "split_columns"):
            _split_tensors(part, place.mesh["tensor"])
    if place.expert_parallel > 1:
        for part in parts_with(model, "split_experts"):
            _split_experts(part, place.expert_mesh["expert"])


def split_share(model):
    """The share of a model's weights that `tensor_parallel` divides."""
    linears = [
        getattr(part, name) for part in parts_with(model, "split_columns")
        for name in (*part.split_columns, *part.split_rows)
    ]  # fmt: skip
    split = sum(linear.weight.numel() for linear in linears)
    return split / sum(parameter.numel() for parameter in model.parameters())


# ---- heads and hidden units ------------------------------------------------------------------------------------------


def _split_tensors(part, mesh):
    """Shoeybi et al. 2019 (Megatron-LM), section 3: columns, then rows, and one sum over ranks behind them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for name, sizes in part.split_columns.items():
        linear = getattr(part, name)
        if sizes is not None:
            linear.row_order = rows_by_rank(getattr(part, sizes), mesh.size())
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.copy_(parameter[linear.row_order.to(parameter.device)])
        _split_linear(linear, mesh, ColwiseParallel(), parallelize_module)
    for name in part.split_rows:
        _split_linear(getattr(part, name), mesh, RowwiseParallel(), parallelize_module)
    part.tensor_group = mesh.get_group()


def _split_linear(linear, mesh, style, parallelize_module):
    linear.__dict__.pop("forward", None)  # a kernel's, which takes no DTensor
    parallelize_module(linear, mesh, style, src_data_rank=None)  # every rank made the same weights


def sum_shared_gradients(model):
    """Add up, over the ranks that share heads, the gradients of what each used on its own alone."""
    for part in parts_with(model, "split_shared"):
        shared = [getattr(part, name) for name in part.split_shared] if hasattr(part, "tensor_group") else ()
        for parameter in (parameter for module in shared if module is not None for parameter in module.parameters()):
            if parameter.grad is not None:
                dist.all_reduce(local(parameter.grad), group=part.tensor_group)


def local(tensor):
    """What this rank holds of a tensor, as a view."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_by_rank(sizes, n):
    """The rows of fused parts in the order in which n ranks hold them: (sum(sizes),) int64.

    Of q, k and v one below the other, the first rank has the first heads of each: q0 k0 v0, q1 k1 v1, ...
    """
    parts = torch.arange(sum(sizes)).split(list(sizes))
    shares = [part.chunk(n) for part in parts]
    return torch.cat([share[rank] for rank in range(n) for share in shares])


def row_orders(model):
    """{name of a parameter: rows_by_rank} of those whose rows stand in another order than in a checkpoint."""
    return {
        f"{path}.{name}": module.row_order
        for path, module in model.named_modules() if hasattr(module, "row_order")
        for name, _ in module.named_parameters(recurse=False)
    }  # fmt: skip


def in_rank_order(tensor, order):
    """A whole tensor as `split_weights` lays its rows out; what has no such rows stays."""
    return tensor[order.to(tensor.device)] if _has_rows(tensor, order) else tensor


def in_own_order(tensor, order):
    """The reverse: a whole tensor of the ranks as a checkpoint has it."""
    return tensor[order.to(tensor.device).argsort()] if _has_rows(tensor, order) else tensor


def _has_rows(tensor, order):
    return order is not None and torch.is_tensor(tensor) and tensor.dim() > 0 and tensor.size(0) == len(order)


# ---- experts ---------------------------------------------------------------------------------------------------------


def _split_experts(part, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    for name in part.split_experts:
        whole = getattr(part, name).detach()
        share = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        setattr(part, name, torch.nn.Parameter(share))
    part.forward = functools.partial(_exchanged, part, mesh.get_group())


def _exchanged(experts, group, x, chosen, weights):
    """What `experts.forward` computes: each choice goes to the rank that has its expert, and back (GShard, 2020, 3.2).

    x (N, C), chosen (N, k) int64, weights (N, k) -> (N, C). Ranks may have different numbers of tokens.
    """
    held = [getattr(experts, name) for name in experts.split_experts]
    n_ranks, n_experts = dist.get_world_size(group), held[0].size(0)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    order = chosen.flatten().argsort(stable=True)  # (N k,) choices, by expert and so by rank
    places = torch.arange(order.numel(), device=x.device)
    inverse = torch.empty_like(order).scatter(0, order, places).view_as(chosen)

    sent = loads_of(chosen, n_experts)  # rows for each expert of each rank
    received = torch.empty_like(sent)  # rows from each rank for each expert of this one
    dist.all_to_all_single(received, sent, group=group)
    sizes_in = received.view(n_ranks, -1).sum(1).tolist()
    sizes_out = sent.view(n_ranks, -1).sum(1).tolist()

    rows = Exchange.apply(Dispatch.apply(x.to(dtype), order, inverse), sizes_out, sizes_in, group)
    own = torch.arange(n_experts // n_ranks, device=x.device).repeat(n_ranks).repeat_interleave(received)
    ones = weights.new_ones(len(rows), 1)
    y = experts.combine(rows, own[:, None], ones, *(_own_experts(tensor, n_ranks) for tensor in held))
    y = Exchange.apply(y, sizes_in, sizes_out, group) * weights.flatten()[order, None]
    return Collect.apply(y, order, inverse).to(x.dtype)


def _own_experts(tensor, n_ranks):
    """The experts of this rank. They hear the tokens of all `n_ranks`, whose mean is what other gradients are of."""
    own = tensor.to_local()
    if own.requires_grad:
        own.register_hook(lambda grad: grad / n_ranks)
    return own


class Exchange(torch.autograd.Function):
    """rows (sum(sizes_out), C) -> (sum(sizes_in), C): the first sizes_out[r] to rank r, sizes_in[r] from it."""

    @staticmethod
    def forward(ctx, rows, sizes_out, sizes_in, group):
        ctx.sizes = sizes_in, sizes_out, group
        return _exchange(rows, sizes_out, sizes_in, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, *ctx.sizes), None, None, None


def _exchange(rows, sizes_out, sizes_in, group):
    result = rows.new_empty(sum(sizes_in), rows.size(1))
    dist.all_to_all_single(result, rows.contiguous(), sizes_in, sizes_out, group=group)
    return result
