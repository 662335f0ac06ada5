"""Weights that ranks share: given their first values a parameter at a time, gathered whole, and laid out again.

    give_memory(model, device)                      # to a model that was built on the meta device and then sharded
    assign(model, initial_values(model, seed))      # whole tensors one after another, of which a rank keeps its part
    whole_weights(model)                            # {name: whole tensor} on rank 0

No rank ever has all weights: of a large model they would not fit. Ranks see whole tensors in the order of a checkpoint,
and keep their part in the order of `training_mesh`.
"""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn as nn

import training_mesh
from model_builder import parameter_plan
from model_parameters import DeclarationError, initial_value, seeded

# ---- memory and first values -----------------------------------------------------------------------------------------


def has_memory(module):
    """Whether a module's tensors have data; what is built on the meta device has none."""
    return not any(parameter.is_meta for parameter in module.parameters())


def give_memory(module, device, buffer_device=None):
    """Put tensors with room and without values in the place of those on the meta device; tied ones stay tied.

    Args:
        device: of parameters, sharded as they are. buffer_device: of buffers, if it is another.

    Returns:
        [(module, name, tensor of before)], for `take_memory`.

    Raises:
        DeclarationError: a tensor that `assign` would not fill, since no part declares it.
    """
    made, before = {}, []
    check_declared(module)
    for owner in module.modules():
        for held, where in ((owner._parameters, device), (owner._buffers, buffer_device or device)):
            for name, tensor in [*held.items()]:
                if tensor is not None and tensor.is_meta:
                    before.append((owner, name, tensor))
                    if id(tensor) not in made:
                        made[id(tensor)] = _as_before(torch.empty_like(tensor, device=where), tensor)
                    setattr(owner, name, made[id(tensor)])
    return before


def _as_before(tensor, before):
    """A parameter where the tensor of before was one."""
    return nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor


def take_memory(before):
    """Undo a `give_memory`."""
    for owner, name, tensor in before:
        setattr(owner, name, tensor)


def check_declared(module):
    """Refuse tensors without data that are neither parameters nor buffers in `own_init`: nothing would fill them.

    Raises:
        DeclarationError: naming the class and the tensor.
    """
    filled = {f"{path}.{name}" for path, part in module.named_modules() for name in getattr(part, "own_init", ())}
    for path, part in module.named_modules():
        loose = {name: value for name, value in vars(part).items() if torch.is_tensor(value)} | dict(part._buffers)
        for name, tensor in loose.items():
            if tensor is not None and tensor.is_meta and f"{path}.{name}" not in filled:
                raise DeclarationError(
                    f"{type(part).__name__}.{name} gets its value in the constructor, where weights that ranks share "
                    "have no memory yet: name it in own_init and fill it in init_own_parameters"
                )


@contextlib.contextmanager
def blocks_in_memory(model, seed, device):
    """[the first block of each kind], with their first weights on a device while the context lasts, and then as before.

    A model that has memory is left as it is.
    """
    kinds = model.config.blocks()
    firsts = {f"blocks.{kinds.index(kind)}.": model.blocks[kinds.index(kind)] for kind in dict.fromkeys(kinds)}
    before = [entry for block in firsts.values() for entry in give_memory(block, device)]
    try:
        if before:
            assign(model, initial_values(model, seed, tuple(firsts)))
        yield [*firsts.values()]
    finally:
        take_memory(before)


def initial_values(model, seed, under=("",)):
    """(name, whole tensor on the CPU) of all that `ConfigurableGPT(config, seed)` fills, bit for bit, a part at a time.

    Args:
        model: may be without memory, split and sharded. under: what names begin with, to leave others out.
    """
    for spec in parameter_plan(model):
        if spec.init != "own" and spec.name.startswith(under):
            yield spec.name, initial_value(spec, model.config, seed)
    for path, part in model.named_modules():
        if getattr(part, "own_init", ()) and f"{path}.".startswith(under):
            yield from own_values(part, path, seed)


def own_values(part, path, seed):
    """[(name, whole tensor on the CPU)] of what a part fills by itself, which stand in it while it does."""
    before = []
    for name in part.own_init:
        owner, leaf = part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        held = owner._parameters if leaf in owner._parameters else owner._buffers
        if held.get(leaf) is not None:
            before.append((f"{path}.{name}" if path else name, held, leaf, held[leaf]))
    if not before:
        return []
    try:
        for _, held, leaf, old in before:
            held[leaf] = _as_before(torch.empty(old.shape, dtype=old.dtype, device="cpu"), old)
        with torch.no_grad():
            part.init_own_parameters(seeded(seed, path))
        return [(name, held[leaf].detach()) for name, held, leaf, _ in before]
    finally:
        for _, held, leaf, old in before:
            held[leaf] = old


@torch.no_grad()
def assign(model, values):
    """Copy (name, whole tensor) pairs into a model's parameters and buffers, on each rank the part that it holds."""
    own, orders = dict(model.state_dict(keep_vars=True)), training_mesh.row_orders(model)
    for name, value in values:
        training_mesh.local(own[name]).copy_(own_part(value, own[name], orders.get(name)))


def own_part(value, like, order=None):
    """What this rank holds of a whole tensor that is laid out as `like` is; all of it where that is whole.

    Args:
        order: `training_mesh.rows_by_rank` of a parameter whose rows stand in that order.
    """
    value = training_mesh.in_rank_order(value, order)
    if not hasattr(like, "placements") or value.shape != like.shape:
        return value
    along = zip(like.device_mesh.get_coordinate(), like.device_mesh.shape, like.placements, strict=True)
    # The last dimension of a mesh divides first: shards are of what is split over neighbours already
    for index, size, placement in reversed([*along]):
        if not placement.is_replicate():
            parts = value.chunk(size, placement.dim)
            value = parts[index] if index < len(parts) else value.narrow(placement.dim, 0, 0)
    return value


# ---- whole tensors of sharded ones -----------------------------------------------------------------------------------


def whole(tensor, order=None):
    """A sharded tensor in full, which all ranks ask for together; any other value as it is.

    Args:
        order: `training_mesh.rows_by_rank` of a parameter whose rows stand in that order.
    """
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return training_mesh.in_own_order(full, order)


def unique_tensors(model):
    """{name: tensor} of what a checkpoint holds, a tied tensor once, under its first name."""
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}


def whole_weights(model):
    """{name: contiguous CPU tensor}, tied ones once; rank 0 gets them, {} the others. All ranks call it together.

    One tensor at a time is whole on a device.
    """
    tensors, orders = {}, training_mesh.row_orders(model)
    for name, tensor in unique_tensors(model).items():
        full = whole(tensor.detach(), orders.get(name))
        if _is_main():
            tensors[name] = full.cpu().contiguous()
    return tensors


def whole_state(optimizer):
    """{parameter name: {'exp_avg': tensor, ...}}, whole and on the CPU, for rank 0; {} for others. All call it."""
    own, found, orders = _own_part(optimizer), {}, _row_orders(optimizer)
    is_shared_out = own is not optimizer
    for name, parameter in _named(optimizer):
        if parameter in own.state:
            full = {key: whole(value, orders.get(name)) for key, value in own.state[parameter].items()}
            if _is_main() or is_shared_out:  # one parameter at a time is whole on a device
                found[name] = {key: value.cpu() if torch.is_tensor(value) else value for key, value in full.items()}
    return _merged(optimizer, found) if is_shared_out else found


def _merged(optimizer, found):
    """Every rank's {name: state} as one, for rank 0; they pass by one rank's at a time."""
    merged = {}
    for source in range(dist.get_world_size()):
        part = [found if dist.get_rank() == source else None]
        dist.broadcast_object_list(part, src=source)
        if _is_main():
            merged |= part[0]
    return {name: merged[name] for name, _ in _named(optimizer) if name in merged}


def held(optimizer):
    """{name: parameter} of those that this rank steps."""
    own = {id(parameter) for group in _own_part(optimizer).param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in _named(optimizer) if id(parameter) in own}


def held_state(optimizer):
    """{parameter name: {'exp_avg': tensor, ...}} as this rank holds it: sharded tensors, and of ZeRO-1 its part."""
    state = _own_part(optimizer).state
    return {name: dict(state[parameter]) for name, parameter in held(optimizer).items() if parameter in state}


def empty_like(parameter, shape, dtype):
    """An empty tensor where the parameter's is, and sharded as it is where it has the parameter's shape."""
    if tuple(shape) == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def restore_state(optimizer, states):
    """Put what `whole_state` or `held_state` returned back, on each rank the part that it holds."""
    own, orders = _own_part(optimizer), _row_orders(optimizer)
    for name, parameter in held(optimizer).items():
        if name in states:
            order = orders.get(name)
            own.state[parameter] = {key: laid_out_as(parameter, value, order) for key, value in states[name].items()}


def laid_out_as(parameter, value, order=None):
    """A new tensor of a whole one, where the parameter's is, and sharded as it is if it has the parameter's shape."""
    if not torch.is_tensor(value) or hasattr(value, "placements"):  # read from shards it is laid out already
        return value
    empty = empty_like(parameter, value.shape, value.dtype)
    training_mesh.local(empty).copy_(own_part(value, parameter, order))
    return empty


def _named(optimizer):
    """(name, parameter) of every group, in order."""
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _row_orders(optimizer):
    return {name: order for group in optimizer.param_groups for name, order in group.get("row_orders", {}).items()}


def _own_part(optimizer):
    """The optimizer that this rank steps: of ZeRO-1 the one inside."""
    return getattr(optimizer, "optim", optimizer)


def _is_main():
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


# ---- norms -----------------------------------------------------------------------------------------------------------


def squared_norms(tensors):
    """The sums of squares of whole tensors, (n,), from what each rank holds of them, in one exchange."""
    squares = torch.stack([training_mesh.local(tensor).float().square().sum() for tensor in tensors])
    if not any(hasattr(tensor, "placements") for tensor in tensors):
        return squares
    shares = [_shards(tensor) / dist.get_world_size() for tensor in tensors]  # ranks that hold the same speak as one
    squares *= torch.tensor(shares, device=squares.device)
    dist.all_reduce(squares)
    return squares


def _shards(tensor):
    """Into how many different parts a tensor is divided over the ranks."""
    if not hasattr(tensor, "placements"):
        return 1
    along = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in along if not placement.is_replicate())
