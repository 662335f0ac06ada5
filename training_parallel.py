"""Where a run happens: ranks, device, precision, and how a finished model is wrapped for it.

Model files know nothing of this one. Launched by `torchrun` a run is distributed; otherwise it is alone, and every
function here does the obvious thing.
"""

import contextlib
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tf32 = config.tf32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return Place(device, _dtype(config.dtype, device), tf32, rank, local_rank, world_size)


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


def wrap(module, place):
    """The module ready for the job: DistributedDataParallel where there are several ranks."""
    if place.world_size == 1:
        return module
    device_ids = [place.device.index] if place.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


def gradient_sync(module, is_last):
    """Context that leaves gradients unsummed until the last micro-batch of a step."""
    if is_last or not hasattr(module, "no_sync"):
        return contextlib.nullcontext()
    return module.no_sync()


def wants_compile(config, place):
    return place.device.type == "cuda" if config.compile == "auto" else config.compile


def compile_module(module, example_batch, place):
    """(module to call, what happened): compiled and tried on one batch, or as it was when compiling fails.

    The trial runs forward and backward once, so that compiling stands apart from training; gradients and random state
    are put back as they were.
    """
    import torch._dynamo

    try:
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
            compiled = torch.compile(module)
            with place.autocast():
                sums = compiled({name: tensor.to(place.device) for name, tensor in example_batch.items()})
            sums["loss"].backward()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
    except Exception as error:
        torch._dynamo.reset()
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
