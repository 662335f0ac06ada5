"""Where a run happens: ranks, device, precision, and how a finished model is wrapped for it.

Model files know nothing of this one. Launched by `torchrun` a run is distributed; otherwise it is alone, and every
function here does the obvious thing.
"""

import contextlib
import functools
import inspect
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from user_errors import UserError

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

    @property
    def is_main(self):
        """The one process that prints and writes."""
        return self.rank == 0

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


def find_place(config):
    """Choose device and precision for this process, and join the others when torchrun launched it.

    Raises:
        UserError: a device that is not there.
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
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **_own_store(rank, world_size))
    tf32 = config.tf32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return Place(device, _dtype(config.dtype, device), tf32, rank, local_rank, world_size)


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


def leave_place(place):
    if place.world_size > 1:
        dist.destroy_process_group()


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
    """How the ranks share a step: 'alone', 'DDP', 'ZeRO-1' or 'FSDP2'."""
    if place.world_size == 1:
        return "alone"
    return "FSDP2" if config.use_fsdp else "ZeRO-1" if config.use_zero1 else "DDP"


def is_sharded(config, place):
    """Whether a model's weights are spread over the ranks."""
    return mode(config, place) == "FSDP2"


def wrap(objective, module, place, config):
    """The module ready for the job, in the mode that the config asks for.

    Names of parameters stay; `distributed_optimizers` has to follow.

    Args:
        objective: over a whole model on this rank's device. module: it, or it compiled.
    """
    if place.world_size == 1:
        return module
    if is_sharded(config, place):
        return _shard(objective, place, config)
    device_ids = [place.device.index] if place.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


def _shard(objective, place, config):
    """FSDP2 (Zhao et al. 2023, in torch's second form): every block a unit, and one of all that is outside blocks.

    Weights are gathered in float32 and autocast decides the precision of products, as in every other mode, unless
    fsdp_dtype says otherwise. Gradients are averaged in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh(place.device.type, (place.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=DTYPES[config.fsdp_dtype], reduce_dtype=torch.float32)
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=config.fsdp_reshard_after_forward)
    return fully_shard(objective, mesh=mesh, mp_policy=precision)


def distributed_optimizers(optimizers, model, place, config):
    """The optimizers, which have no state yet, for the model as `wrap` left it.

    FSDP2 put parameters of its own in the place of those that they were built with. ZeRO-1 (Rajbhandari et al. 2020,
    section 5.1) shares the parameters out: each is stepped, and its state kept, on one rank.
    """
    if is_sharded(config, place):
        parameters = dict(model.named_parameters())
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["params"] = [parameters[name] for name in group["names"]]
    if mode(config, place) != "ZeRO-1":
        return optimizers
    from torch.distributed.optim import ZeroRedundancyOptimizer

    shared_out = []
    for optimizer in optimizers:
        taken = inspect.signature(type(optimizer)).parameters
        settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
        shared_out.append(ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings))
    return shared_out


SPREAD = {"alone": (), "DDP": (), "ZeRO-1": ("optimizer",), "FSDP2": ("weights", "gradients", "optimizer")}


def bytes_held(memory, place, config):
    """{'weights': bytes, ...} of a whole model -> those that stay on one rank between steps."""
    spread = SPREAD[mode(config, place)]
    return {name: size / place.world_size if name in spread else size for name, size in memory.items()}


def recomputed(blocks, config):
    """Those of the blocks whose activations are computed again in backward."""
    every = {"none": len(blocks) + 1, "full": 1, "selective": 2}[config.gradient_checkpointing]
    return blocks[every - 1 :: every]


def checkpoint_activations(model, config):
    """Make every block, or with 'selective' every second one, keep its input alone and compute the rest again.

    Parameters and their names stay. Chen et al. 2016, section 3.
    """
    for block in recomputed(model.blocks, config):
        block.forward = functools.partial(_computed_again, block.forward)


def _computed_again(forward, *inputs):
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def gradient_sync(module, is_last):
    """Context that leaves gradients unsummed until the last micro-batch of a step."""
    if is_last or not hasattr(module, "no_sync"):
        return contextlib.nullcontext()
    return module.no_sync()


def wants_compile(config, place):
    return place.device.type == "cuda" if config.compile == "auto" else config.compile


def compile_module(module, example_batch, place, by_block=False):
    """(module to call, what happened): compiled and tried on one batch, or as it was when compiling fails.

    by_block compiles each block in its place, for what is sharded by block afterwards.

    The trial runs forward and backward once, so that compiling stands apart from training; gradients and random state
    are put back as they were.
    """
    import torch._dynamo

    try:
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
            compiled = module if by_block else torch.compile(module)
            for block in module.model.blocks if by_block else ():
                block.compile()
            with place.autocast():
                sums = compiled({name: tensor.to(place.device) for name, tensor in example_batch.items()})
            sums["loss"].backward()
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


@contextlib.contextmanager
def memory_errors():
    """Turn running out of memory into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            "out of memory; lower batch_size and raise gradient_accumulation_steps by as much, or take a smaller model"
        ) from error


# ---- whole tensors of sharded ones -----------------------------------------------------------------------------------


def whole(tensor):
    """A sharded tensor in full, which all ranks ask for together; any other value as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unique_tensors(model):
    """{name: tensor} of what a checkpoint holds, a tied tensor once, under its first name."""
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}


def whole_weights(model):
    """{name: contiguous CPU tensor}, tied ones once; rank 0 gets them, {} the others. All ranks call it together.

    One tensor at a time is whole on a device.
    """
    tensors = {}
    for name, tensor in unique_tensors(model).items():
        full = whole(tensor.detach())
        if _is_main():
            tensors[name] = full.cpu().contiguous()
    return tensors


def whole_state(optimizer):
    """{parameter name: {'exp_avg': tensor, ...}}, whole and on the CPU, for rank 0; {} for others. All call it."""
    own, found = _own_part(optimizer), {}
    is_shared_out = own is not optimizer
    for name, parameter in _named(optimizer):
        if parameter in own.state:
            full = {key: whole(value) for key, value in own.state[parameter].items()}
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
    own = _own_part(optimizer)
    for name, parameter in held(optimizer).items():
        if name in states:
            own.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in states[name].items()}


def _laid_out_as(parameter, value):
    """A whole tensor where the parameter's is, and sharded as it is where it has the parameter's shape."""
    if not torch.is_tensor(value):
        return value
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _named(optimizer):
    """(name, parameter) of every group, in order."""
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _own_part(optimizer):
    """The optimizer that this rank steps: of ZeRO-1 the one inside."""
    return getattr(optimizer, "optim", optimizer)


def _is_main():
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def gather_weights(objective):
    """Make weights whole on every rank, to the end, so that one rank alone can generate. All call it together."""
    for module in objective.modules():
        if hasattr(module, "unshard"):
            module.set_reshard_after_forward(False)
            module.unshard()


# ---- agreement over ranks --------------------------------------------------------------------------------------------


def sum_over_ranks(tensor, place):
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
    return torch.stack([scalar.to(dtype) for scalar in scalars]).tolist()


def any_rank(flag, place):
    """True on every rank when it is true on one."""
    if place.world_size == 1:
        return bool(flag)
    return bool(sum_over_ranks(torch.tensor(float(bool(flag)), device=place.device), place) > 0)


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
