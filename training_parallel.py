"""Where a run happens: ranks, device, precision, and how a finished model is wrapped for it.

Model files know nothing of this one. Launched by `torchrun` a run is distributed; otherwise it is alone, and every
function here does the obvious thing. How one layer is split over ranks is in `training_mesh`.
"""

import contextlib
import datetime
import functools
import gc
import hashlib
import importlib
import inspect
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import training_mesh
import training_weights
from model_builder import ConfigurableGPT, on_meta
from user_errors import SECONDS_FOR_RANK_0, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Place:
    """One process's view of the job."""

    device: torch.device
    dtype: str  # of the matrix products: float32, bfloat16 or float16
    tf32: bool
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    replicas: int = 1  # groups of ranks that each hold the whole sharded model
    tensor_parallel: int = 1  # ranks that share the heads and hidden units of a layer, and read the same data
    expert_parallel: int = 1  # ranks that share the experts of a layer, each with data of its own

    @property
    def is_main(self):
        """The one process that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self):
        """Which share of the data this process reads: neighbours, who are close, share heads."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self):
        """Into how many shares the data is divided."""
        return self.world_size // self.tensor_parallel

    @functools.cached_property
    def mesh(self):
        """The ranks as (replicate, shard, tensor), without replicas or tensor where those are 1."""
        shards = self.data_size // self.replicas
        return _device_mesh(self.device, {"replicate": self.replicas, "tensor": self.tensor_parallel}, shard=shards)

    @functools.cached_property
    def expert_mesh(self):
        """The ranks as (replicate, shard, expert, tensor): here `shard` divides the weights of an expert."""
        shards = self.data_size // self.replicas // self.expert_parallel
        sizes = {"replicate": self.replicas, "expert": self.expert_parallel, "tensor": self.tensor_parallel}
        return _device_mesh(self.device, sizes, shard=shards)

    @property
    def precision(self):
        """What the hardware's peak is looked up under."""
        return "tf32" if self.dtype == "float32" and self.tf32 else self.dtype

    def autocast(self):
        """Context in which matrix products run in `dtype`; weights stay float32."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    def device_name(self):
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return _processor_name()


def _device_mesh(device, sizes, shard):
    sizes = {"replicate": sizes["replicate"], "shard": shard, **sizes}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return dist.device_mesh.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def find_place(config):
    """Choose device and precision for this process, and join the others when torchrun launched it.

    Raises:
        UserError: a device that is not there, or a number of processes that the settings cannot share out.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, local_rank, world_size = 0, 0, 1
    if distributed:
        rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = _device(config.device, local_rank if distributed else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if device.type == "cpu":
        keep_freed_memory()
    tf32 = config.tf32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    place = Place(
        device, _dtype(config.dtype, device), tf32, rank, local_rank, world_size,
        config.fsdp_replicas, config.tensor_parallel, config.expert_parallel,
    )  # fmt: skip
    check_world(config, place)
    if distributed:
        # DDP and FSDP2 import this later, when its functions would keep the group as a default argument: for ever, and
        # gloo's threads with it, which abort the interpreter where they outlive it.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl" if config.fsdp_cpu_offload else "nccl"
        patience = datetime.timedelta(seconds=config.collective_timeout)
        dist.init_process_group(backend, timeout=patience, **_own_store(rank, world_size))
    return place


def _own_store(rank, world_size):
    """What `init_process_group` is given besides, so that a restarted job does not meet addresses of ranks that died.

    torchrun keeps one store through its restarts, old keys included (https://github.com/pytorch/pytorch/issues/135712).
    Nodes may count restarts differently, so that the count tells attempts apart on one node alone.

    Raises:
        UserError: restarts over several nodes with that store.
    """
    restarts, shares = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts == "0" or shares != "True":
        return {}
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UserError(
            f"--max-restarts={restarts} on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment "
            "of each torchrun: without it, restarted ranks find the addresses of ranks that died"
        )
    store = next(dist.rendezvous("env://"))[0]
    attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": attempt, "rank": rank, "world_size": world_size}


def check_world(config, place):
    """Refuse a number of processes that the settings cannot share out, before any of them waits for another.

    Raises:
        UserError: in a sentence naming the setting.
    """
    n, tensor, expert, replicas = place.world_size, place.tensor_parallel, place.expert_parallel, place.replicas
    processes = f"{n} process{'es' if n > 1 else ''}"
    if n % tensor:
        raise UserError(f"tensor_parallel={tensor} does not divide {processes}; start a multiple of it, or lower it")
    if tensor > 1 and n > tensor and not config.use_fsdp:
        raise UserError(
            f"tensor_parallel={tensor} of {processes} leaves {n // tensor} groups with data of their own; "
            "set use_fsdp=True, which shards over them"
        )
    shards = f"{processes}" + (f" with tensor_parallel={tensor}" if tensor > 1 else "")
    if place.data_size % replicas:
        raise UserError(f"fsdp_replicas={replicas} does not divide {shards}; change one of them")
    if place.data_size // replicas % expert:
        shards += f" with fsdp_replicas={replicas}" if replicas > 1 else ""
        raise UserError(f"expert_parallel={expert} does not divide {shards}; change one of them")
    if place.dtype == "float16" and tensor * expert > 1:
        name = "tensor_parallel" if tensor > 1 else "expert_parallel"
        raise UserError(
            f"dtype=float16 needs its gradients scaled, which {name}={max(tensor, expert)} does not do; "
            "use dtype=bfloat16 or float32"
        )


def place_of_reader(config, device):
    """The Place of one process that reads a run, however many trained it: to write text, or to score it."""
    alone = {"use_fsdp": False, "use_zero1": False, "fsdp_replicas": 1, "fsdp_cpu_offload": False,
             "tensor_parallel": 1, "expert_parallel": 1}  # fmt: skip
    return find_place(config.replace(device=device, dtype="auto", **alone))


@contextlib.contextmanager
def joined(place):
    """Leave the other ranks at the end.

    After an error NCCL's connections end with the process: closing them in order would wait for ranks that wait for us.
    """
    is_orderly = place.device.type != "cuda"
    try:
        yield
        is_orderly = True
    except UserError as error:
        if place.world_size > 1:
            error.said_by_rank_0 = _said_by_rank_0(str(error), place)
        raise
    finally:
        if place.world_size > 1 and is_orderly:
            gc.collect()  # wrapped models hold the group, and a group that is held keeps its threads
            dist.destroy_process_group()


def _said_by_rank_0(sentence, place):
    """Whether rank 0 found the same wrong: it leaves word in torchrun's store, where the others look for a while."""
    key = "said/" + hashlib.sha256(sentence.encode()).hexdigest()
    patience = datetime.timedelta(seconds=SECONDS_FOR_RANK_0)
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, patience)
        store.set(key, "") if place.is_main else store.wait([key], patience)
    except RuntimeError:  # nobody said it, or there is no store any more
        return False
    return not place.is_main


def check_agreement(settings, place):
    """Refuse ranks that run other code or other settings than rank 0, and a model that they cannot share.

    Raises:
        UserError: on every rank, the same sentence.
    """
    if place.world_size > 1:
        described = {"code": code_hash(), "torch": str(torch.__version__), **_flat(settings)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        if len(set(gather(digest, place))) > 1:
            raise UserError(difference(gather(described, place)))
    if place.tensor_parallel * place.expert_parallel > 1:
        with on_meta():
            training_mesh.check_model(ConfigurableGPT(settings.model), place)


def _flat(settings):
    """Every setting that ranks must share: a machine may have its own folders and threads."""
    own = {"device", "threads", "data_dir", "input"}
    flat = settings.model.to_dict() | settings.train.to_dict()
    return {name: value for name, value in flat.items() if name not in own}


def code_hash():
    """Of every Python file beside this one and in kernels/."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("kernels/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def difference(described):
    """The sentence for [what rank 0 runs, what rank 1 runs, ...], of which not all are equal."""
    rank = next(rank for rank, other in enumerate(described) if other != described[0])
    first, other = described[0], described[rank]
    name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
    return (
        f"rank {rank} runs with {name}={other.get(name)!r} and rank 0 with {name}={first.get(name)!r}; "
        "start every rank from the same files with the same settings"
    )


def _device(wanted, local_rank):
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if has_mps and local_rank is None else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device={wanted!r} is not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device='{wanted}' needs a CUDA GPU and torch sees none; use device=cpu, or device=auto")
        index = local_rank if local_rank is not None else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"device='cuda:{index}' does not exist: torch sees {torch.cuda.device_count()} GPU(s)")
        return torch.device("cuda", index)
    if device.type == "mps" and not has_mps:
        raise UserError("device='mps' needs an Apple GPU and torch sees none; use device=cpu, or device=auto")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device={wanted!r} is not supported; use auto, cpu, cuda or mps")
    return device


def _dtype(wanted, device):
    if wanted == "auto":
        if device.type != "cuda":
            return "float32"  # half precision is emulated on most CPUs: hundreds of times slower
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return wanted


def keep_freed_memory():
    """Ask glibc to keep freed tensors' memory for the next one, instead of giving it back and faulting it in again.

    A CPU training step frees and allocates the same gigabytes each time; `docs/performance.md` has what this saves.
    Does nothing where the C library is another.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    import ctypes

    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _processor_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---- wrapping --------------------------------------------------------------------------------------------------------


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
        tensor = tensors.pop(name).to(place.device, torch.float32) if place.is_main else None
        tensor = torch.empty(shape, device=place.device) if tensor is None else tensor.contiguous()
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


def recomputed(blocks, config):
    """Those of the blocks whose matrix products are computed again in backward."""
    every = {"full": 1, "selective": 2}.get(config.gradient_checkpointing, len(blocks) + 1)
    return blocks[every - 1 :: every]


split_weights = training_mesh.split_weights


def checkpoint_activations(model, config):
    """Make every block, or with 'selective' every second one, keep its input alone and compute the rest again.

    With 'products' every block keeps the results of its linear layers and of attention too, and computes what is cheap.
    Parameters and their names stay. Chen et al. 2016, section 3; Korthikanti et al. 2022, section 5.
    """
    if config.gradient_checkpointing == "products":
        for block in model.blocks:
            block.forward = functools.partial(_cheap_computed_again, block.forward)
    for block in recomputed(model.blocks, config):
        block.forward = functools.partial(_computed_again, block.forward)


def _computed_again(forward, *inputs, **settings):
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, **settings)


def _cheap_computed_again(forward, *inputs):
    # A compiler sees operators alone, and gives each kernel's changes in place a tensor of their own
    by_operator = functools.partial(create_selective_checkpoint_contexts, [*PRODUCTS, *ATTENTION])
    kept = by_operator if torch.compiler.is_compiling() else _keeping_products
    return _computed_again(forward, *inputs, context_fn=kept)


PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm"))
ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)  # fmt: skip


class _InLinear(TorchFunctionMode):
    """Knows whether F.linear is being computed.

    Products elsewhere may be changed in place by the kernel around them, as in torch's recurrent layers, and what was
    kept would be wrong.
    """

    is_inside = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.linear:
            return function(*args, **(kwargs or {}))
        self.is_inside = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.is_inside = False

    def policy(self, context, operator, *args, **kwargs):
        keeps = operator in ATTENTION or (operator in PRODUCTS and self.is_inside)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class _Both(contextlib.ExitStack):
    """Two contexts as one, for `checkpoint`."""

    def __init__(self, *contexts):
        super().__init__()
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            self.enter_context(context)
        return self


def _keeping_products():
    """The contexts of a block's forward and of its computing again."""
    mode = _InLinear()
    forward, again = create_selective_checkpoint_contexts(mode.policy)
    return _Both(mode, forward), _Both(mode, again)


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
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []), place.autocast():
            if by_block:
                compiled = module
                _try_blocks(module.model, module.config.seed, batch, place.device)
            else:
                compiled = torch.compile(module)
                compiled(batch)["loss"].backward()
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


def _try_blocks(model, seed, batch, device):
    """Compile every block, and run the first of each kind on hidden states of a batch's shape, forward and backward."""
    for block in model.blocks:
        block.compile()
    carried = {} if any(block.carries for block in model.blocks) else None
    x = torch.randn(*batch["inputs"].shape, model.config.n_embd, device=device, requires_grad=True)
    with training_weights.blocks_in_memory(model, seed, device) as blocks:
        for block in blocks:
            inputs = (x, batch.get("positions"), batch.get("document_ids"))
            if carried is None:
                x = block(*inputs)
            else:
                x, carried = block(*inputs, carried)
        x.sum().backward()


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo, when another process has ended


@contextlib.contextmanager
def memory_errors():
    """Turn running out of memory, and another rank's end, into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if "RANK" in os.environ and any(words in str(error) for words in LOST):
            lost = UserError(f"another rank stopped, and says why itself ({lines[0].strip()[:200]})")
            lost.said_by_rank_0 = False
            raise lost from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        short = UserError(
            "out of memory; lower batch_size and raise gradient_accumulation_steps by as much, or take a smaller model"
        )
        short.said_by_rank_0 = False  # the others may have had enough
        raise short from error


# ---- agreement over ranks --------------------------------------------------------------------------------------------


def sum_over_ranks(tensor, place):
    """The sum over all data, on every rank: ranks that read the same are counted once."""
    if place.rank % place.tensor_parallel:
        tensor = torch.zeros_like(tensor)
    return sum_over_all(tensor, place)


def sum_over_all(tensor, place):
    """The sum of every rank's tensor, on every rank."""
    if place.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def sums_over_ranks(tensors, place):
    """{name: integer tensor (n,)} -> the same of every rank added up, on every rank, in one exchange."""
    if place.world_size == 1 or not tensors:
        return tensors
    sizes = [tensor.numel() for tensor in tensors.values()]
    sums = sum_over_ranks(torch.cat(list(tensors.values())), place).split(sizes)
    return dict(zip(tensors, sums, strict=True))


def to_host(scalars, place):
    """Floats of several scalar tensors, waiting for the device once."""
    dtype = torch.float32 if place.device.type == "mps" else torch.float64
    return torch.stack([scalar.to(place.device, dtype) for scalar in scalars]).tolist()


def any_rank(flag, place):
    """True on every rank when it is true on one."""
    if place.world_size == 1:
        return bool(flag)
    return bool(sum_over_all(torch.tensor(float(bool(flag)), device=place.device), place) > 0)


def from_main(decide, place):
    """What rank 0 decides, on every rank: of files that come and go, each rank might see something else.

    Raises:
        UserError: that of rank 0, on every rank.
    """
    outcome = [None]
    if place.is_main:
        try:
            outcome = [(decide(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    if place.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    decided, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return decided


def gather(value, place):
    """[value of rank 0, of rank 1, ...], on every rank."""
    values = [value] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all(place):
    """Return when every rank has come here."""
    gather(None, place)


def peak_memory_bytes(place):
    """Peak memory of this process: on the GPU where there is one, else its resident set."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    try:
        import resource
    except ImportError:  # Windows
        return _peak_memory_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _peak_memory_windows():
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = [("cb", wintypes.DWORD), ("faults", wintypes.DWORD)] + [
            (name, ctypes.c_size_t) for name in ("peak", "working", "a", "b", "c", "d", "e", "f")
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return counters.peak
