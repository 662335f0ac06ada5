"""C beside this file, compiled at start by the machine's own compiler and called with tensors.

    scan = compiled.library("cpu_scan")      # AbsentError where there is no compiler, or it cannot
    scan("scan_forward", x, dt, 16)          # tensors as pointers to their data, whole numbers as int64_t

No file is kept: what is compiled for one processor must not meet another from the same home directory. A model's
files take a second or two. Threads are those of torch: OpenMP's symbols come from the library that it has loaded.
"""

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kernels.libraries import AbsentError

SOURCES = Path(__file__).parent
OPTIONS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wno-unknown-pragmas", "-Wno-psabi")
THREADS = (["-fopenmp"], ["-Xclang", "-fopenmp"], [])  # Apple's compiler hides its OpenMP; without, one thread
SECONDS = 120  # for the compiler
C_TYPES = (torch.float32, torch.int32)


class Library:
    """Functions of one C file, which return nothing; calls let other threads of Python run."""

    def __init__(self, path):
        self.functions = ctypes.CDLL(str(path))

    def __call__(self, name, *arguments):
        """A tensor goes as the address of its first number, None as NULL; strides and types are the caller's care.

        Nothing is computed for tensors without data, whose sizes are all that is asked.

        Raises:
            TypeError: a tensor of another type, device or dtype.
        """
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        if any(map(is_fake, tensors)):
            return
        for tensor in tensors:
            if not has_data(tensor) or tensor.device.type != "cpu" or tensor.dtype not in C_TYPES:
                raise TypeError(f"{name} takes float32 and int32 tensors of a CPU, not {type(tensor)}, {tensor.dtype}")
        getattr(self.functions, name)(*map(_as_c, arguments))


def takes(*tensors):
    """Whether these are float32 on a CPU, whole in this process, and nothing else decides how to compute with them."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and all(has_data(tensor) or is_fake(tensor) for tensor in tensors)
        and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    )  # fmt: skip


def has_data(tensor):
    """False for a shard, a trace's symbol, and what else stands for a tensor."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def is_fake(tensor):
    """Whether it is of FakeTensorMode, in which memory is counted without being used."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def in_rows(x):
    """(x, numbers from one token to the next) for x (B, T, ...): x where tokens lie evenly apart, else a copy."""
    (B, T), width = x.shape[:2], math.prod(x.shape[2:])
    step = x.stride(1) if T > 1 else x.stride(0) if B > 1 else width
    is_even = step >= width and (B == 1 or T == 1 or x.stride(0) == T * step)
    if is_even and x.numel() and x[0, 0].is_contiguous():
        return x, step
    return x.contiguous(), width


def _as_c(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def library(name):
    """The Library of kernels/<name>.c, compiled once in a process.

    Raises:
        AbsentError: no compiler is here (`cc`, or what the variable CC names), or it fails on this file.
    """
    found = _found(name)
    if isinstance(found, str):
        raise AbsentError(found)
    return found


def is_here(name):
    """Whether library(name) gives one."""
    return not isinstance(_found(name), str)


@functools.cache
def _found(name):
    """The Library, or why there is none."""
    if sys.platform == "win32":
        return "is not for Windows"
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
    except ValueError as error:
        return f"cannot read the variable CC ({error})"
    if not compiler or shutil.which(compiler[0]) is None:
        return f"needs a C compiler, and {' '.join(compiler) or 'CC'} is not here"
    failures = []
    for native in (["-march=native"], []):  # not every compiler knows the processor that it runs on
        for threads in THREADS:
            if built := _built(name, [*compiler, *OPTIONS, *native], threads, failures):
                return built if threads or torch.get_num_threads() == 1 else "does not find torch's OpenMP here"
    return f"does not compile here ({failures[0]})"


def _built(name, command, threads, failures):
    """The Library, or None and one line more in `failures`. Linking OpenMP would bring a second pool of threads."""
    lookup = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    try:
        with tempfile.TemporaryDirectory(prefix="nanoarch-", ignore_cleanup_errors=True) as folder:
            compiled, linked = Path(folder) / f"{name}.o", Path(folder) / f"{name}.so"
            _run([*command, *threads, "-c", str(SOURCES / f"{name}.c"), "-o", str(compiled)])
            _run([*command, *lookup, "-shared", str(compiled), "-o", str(linked), "-lm"])
            return Library(linked)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        failures.append(next((line.strip() for line in said if "error" in line), said[-1]))


def _run(command):
    subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace",
                   stdin=subprocess.DEVNULL, timeout=SECONDS)  # fmt: skip
