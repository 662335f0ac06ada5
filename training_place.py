"""Where a run happens: ranks, device, precision, memory; and that all ranks run the same.

Launched by `torchrun` a run is distributed; otherwise it is alone, and every function here does the obvious thing.
"""

import contextlib
import datetime
import functools
import gc
import hashlib
import importlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import training_mesh
from model_builder import ConfigurableGPT, on_meta
from training_ranks import gather
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
    """Of every Python file beside this one, and all code in kernels/."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("kernels/*.py"), *here.glob("kernels/*.[ch]")]):
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


# ---- memory ----------------------------------------------------------------------------------------------------------


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
