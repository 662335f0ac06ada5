"""How ranks share a finished model: split, compiled, wrapped, filled.

Model files know nothing of this one. How one layer is split over ranks is in `training_mesh`, what ranks hold of its
weights in `training_weights`.
"""

import contextlib
import inspect

import torch
import torch.distributed as dist

import training_mesh
import training_weights
from model_builder import ConfigurableGPT, on_meta
from training_place import DTYPES
from training_ranks import from_main

split_weights = training_mesh.split_weights


def mode(config, place):
    """How the ranks share a step: 'alone', 'DDP', 'ZeRO-1', 'FSDP2', 'HSDP 2', 'FSDP2, TP 2', 'FSDP2, EP 4', 'TP 2'."""
    if place.world_size == 1:
        return "alone"
    data = f"HSDP {place.replicas}" if place.replicas > 1 else "FSDP2" if is_sharded(config, place) else "DDP"
    words = ["ZeRO-1" if config.use_zero1 else data] if place.data_size > 1 or config.use_fsdp else []
    splits = {"TP": place.tensor_parallel, "EP": place.expert_parallel}
    return ", ".join([*words, *(f"{name} {n}" for name, n in splits.items() if n > 1)])


def is_sharded(config, place):
    """Whether a model's weights are spread over the ranks that have data of their own."""
    return place.world_size > 1 and config.use_fsdp


def is_split(config, place):
    """Whether no rank has the model's weights whole."""
    return is_sharded(config, place) or place.tensor_parallel > 1


def build(settings, heads, place):
    """The ConfigurableGPT of a run, on this rank's device; where ranks share its weights, without memory until `fill`.

    Args:
        heads: as for ConfigurableGPT.
    """
    if not is_split(settings.train, place):
        return ConfigurableGPT(settings.model, settings.train.seed, heads).to(place.device)
    with on_meta():
        return ConfigurableGPT(settings.model, settings.train.seed, heads)


def fill(model, source, place, config):
    """Give a model from `build`, as `wrap` left it, its first weights: those of the source, drawn ones for the rest.

    Of what ranks share, a rank has one tensor at a time whole: drawn, or sent by rank 0, which alone reads the source.

    Args:
        source: of `model_interop`, or None to leave values to a checkpoint.

    Raises:
        UserError: a source that cannot be read, on every rank.
    """
    is_shared = is_split(config, place)
    if is_shared:
        where = torch.device("cpu") if config.fsdp_cpu_offload else place.device
        training_weights.give_memory(model, where, place.device)
    if is_shared and source is not None:
        training_weights.assign(model, training_weights.initial_values(model, config.seed))
        training_weights.assign(model, _sent_by_rank_0(source, model, place))
    elif source is not None:
        source.fill(model)


def _sent_by_rank_0(source, model, place):
    """(name, whole tensor) of a source's weights, on every rank."""
    tensors = {}

    def shapes():
        tensors.update(source.tensors_for(model))
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    for name, shape in from_main(shapes, place).items():
        tensor = torch.empty(shape, device=place.device)
        if place.is_main:
            tensor.copy_(tensors.pop(name).detach())
        dist.broadcast(tensor, src=0)
        yield name, tensor


def wrap(objective, module, place, config):
    """The module ready for the job, in the mode that the config asks for.

    Names of parameters stay; `distributed_optimizers` has to follow.

    Args:
        objective: over a model from `build`. module: it, or it compiled.
    """
    if place.world_size == 1 or (place.data_size == 1 and not config.use_fsdp):
        return module
    if is_sharded(config, place):
        return _shard(objective, place, config)
    device_ids = [place.device.index] if place.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


def _shard(objective, place, config):
    """FSDP2 (Zhao et al. 2023, in torch's second form): every block a unit, and one of all that is outside blocks.

    Weights are gathered in float32 and autocast decides the precision of products, as in every other mode, unless
    fsdp_dtype says otherwise. Gradients are averaged in float32. Over a mesh of two dimensions torch copies the shards
    along the first (HSDP: gathers stay within a group, gradients are averaged over groups).
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    over = ("replicate", "shard") if place.replicas > 1 else "shard"
    settings = {
        "mesh": place.mesh[over],
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[config.fsdp_dtype], reduce_dtype=torch.float32),
        "offload_policy": OffloadPolicy(),
    }
    if config.fsdp_cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=place.device.type == "cuda")
    reshard = config.fsdp_reshard_after_forward
    for block in objective.model.blocks:
        for part in training_mesh.parts_with(block, "split_experts") if place.expert_parallel > 1 else ():
            _shard_experts(part, place, {**settings, "mesh": place.expert_mesh[over], "reshard_after_forward": reshard})
        fully_shard(block, reshard_after_forward=reshard, **settings)
        register_fsdp_forward_method(block, "step")
    fully_shard(objective, **settings)
    # Text is written by all ranks together, and gathers weights as a forward pass does
    objective.generate = objective.model.generate
    register_fsdp_forward_method(objective, "generate")
    objective.model.generate = objective.generate
    return objective


def _shard_experts(part, place, settings):
    """FSDP2 within the experts of one rank: over the ranks that hold the same, whose number may be 1."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    n = place.expert_mesh["shard"].size()

    def dimension(parameter):  # the first is the expert, and taken
        return Shard(next(dim for dim in (1, 2, 0) if parameter.size(dim) % n == 0 or dim == 0))

    fully_shard(part, shard_placement_fn=dimension, **settings)


def distributed_optimizers(optimizers, model, place, config):
    """The optimizers, which have no state yet, for the model as `wrap` left it.

    Sharding and splitting put parameters of their own in the place of those that they were built with. ZeRO-1
    (Rajbhandari et al. 2020, section 5.1) shares the parameters out: each is stepped, and its state kept, on one rank.
    """
    if is_split(config, place):
        parameters, orders = dict(model.named_parameters()), training_mesh.row_orders(model)
        for optimizer in optimizers:
            optimizer.param_groups[:] = [
                part for group in optimizer.param_groups for part in _by_mesh(group, parameters, orders)
            ]
    if place.world_size == 1 or not config.use_zero1:
        return optimizers
    from torch.distributed.optim import ZeroRedundancyOptimizer

    shared_out = []
    for optimizer in optimizers:
        taken = inspect.signature(type(optimizer)).parameters
        settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
        shared_out.append(ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings))
    return shared_out


def _by_mesh(group, parameters, orders):
    """A group of an optimizer as several, because one kernel takes the tensors of one mesh."""
    by_mesh = {}
    for name in group["names"]:
        by_mesh.setdefault(getattr(parameters[name], "device_mesh", None), []).append(name)
    for names in by_mesh.values():
        own = {name: orders[name] for name in names if name in orders}
        yield {**group, "params": [parameters[name] for name in names], "names": names, "row_orders": own}


def bytes_held(memory, place, config, split=0.0):
    """{'weights': bytes, ...} of a whole model -> those that stay on one rank between steps.

    Args:
        split: the share of its weights that tensor parallelism divides (`training_mesh.split_share`). Experts make no
            difference: their weights are sharded over as many ranks as all others.
    """
    left = 1 - split + split / place.tensor_parallel
    shards = place.data_size // place.replicas if is_sharded(config, place) else 1
    held = {name: size if name == "activations" else size * left / shards for name, size in memory.items()}
    if config.use_zero1:
        held["optimizer"] /= place.world_size
    return held


@contextlib.contextmanager
def gradient_sync(module, is_last, config):
    """Context that leaves gradients unsummed until the last micro-batch of a step, where that costs no memory.

    DDP has whole gradients anyway. FSDP2 scatters those of each micro-batch, which leaves a rank its share, and sums
    the shares over replicas once; fsdp_accumulate=whole scatters once too, and ranks have whole gradients until then.
    """
    if hasattr(module, "set_requires_all_reduce"):
        module.set_requires_gradient_sync(is_last or config.fsdp_accumulate == "sharded")
        module.set_requires_all_reduce(is_last)  # second, because the first sets it too
    with contextlib.nullcontext() if is_last or not hasattr(module, "no_sync") else module.no_sync():
        yield
    if is_last:
        training_mesh.sum_shared_gradients(module)


def wants_compile(config, place):
    return place.device.type == "cuda" if config.compile == "auto" else config.compile


def compile_module(module, example_batch, place, by_block=False):
    """(module to call, what happened): compiled and tried on one batch, or as it was when compiling fails.

    by_block compiles each block in its place, for what is sharded by block afterwards, and tries one of each kind: the
    whole may have no memory yet.

    The trial runs forward and backward once, so that compiling stands apart from training; gradients and random state
    are put back as they were.
    """
    import torch._dynamo

    batch = {name: tensor.to(place.device) for name, tensor in example_batch.items()}
    try:
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
            if by_block:
                compiled = module
                _try_blocks(module.model, module.config.seed, batch, place)
            else:
                compiled = torch.compile(module)
                with place.autocast():
                    loss = compiled(batch)["loss"]
                loss.backward()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
    except Exception as error:
        torch._dynamo.reset()
        for block in module.model.blocks if by_block else ():
            block._compiled_call_impl = None
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return module, f"off: torch.compile failed ({reason.strip()[:160]})"
    finally:
        module.zero_grad(set_to_none=True)
    return compiled, "on"


def _try_blocks(model, seed, batch, place):
    """Compile every block, and run the first of each kind on hidden states of a batch's shape, forward and backward."""
    for block in model.blocks:
        block.compile()
    carried = {} if any(block.carries for block in model.blocks) else None
    x = torch.randn(*batch["inputs"].shape, model.config.n_embd, device=place.device, requires_grad=True)
    with training_weights.blocks_in_memory(model, seed, place.device) as blocks:
        with place.autocast():
            for block in blocks:
                inputs = (x, batch.get("positions"), batch.get("document_ids"))
                if carried is None:
                    x = block(*inputs)
                else:
                    x, carried = block(*inputs, carried)
        x.sum().backward()
