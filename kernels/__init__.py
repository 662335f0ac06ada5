"""Fast paths, each beside the plain one that it must equal, and the choice between them.

    chosen = kernels.choose(model, device, "auto", torch.bfloat16)
    chosen              {'linear': 'plain', 'attention': 'sdpa flash', 'mamba': 'triton'}
    chosen.not_taken    {'mamba': {'mamba_ssm': 'is not installed (pip install mamba-ssm)'}}

A kernel is used only where it is present and a forward and backward check against the plain path passes on this device
at start. Nothing is chosen by timing it: a run and its resumption must compute the same bits.

A mixer offers itself by naming its `operation` and keeping its recurrence in `forms`; a kernel is a function that
stands for forms['chunk'], with the same arguments. To add one, add a line to KERNELS.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import (
    attention,
    checks,
    cpu_attention,
    cpu_conv,
    cpu_experts,
    cpu_ffn,
    cpu_gate,
    cpu_linear,
    cpu_norm,
    cpu_scan,
    cpu_ssd,
    grouped,
    libraries,
)
from registry import ALL_REGISTRIES
from user_errors import UserError, did_you_mean


@dataclass(frozen=True)
class Kernel:
    """A function that may stand for the 'chunk' form of the mixers of an operation.

    `find(plain form, device, dtype)` returns it, or raises libraries.AbsentError with the reason.
    """

    name: str
    operation: str
    find: Callable
    is_one_node: bool = True  # to torch.compile; else it steps aside there


KERNELS = [  # the first that is here and passes is taken
    Kernel("mamba_ssm", "selective_scan", libraries.find_mamba_ssm_scan),
    Kernel("triton", "selective_scan", libraries.find_triton_scan),
    Kernel("compiled", "selective_scan", cpu_scan.find),
    Kernel("mamba_ssm", "ssd", libraries.find_mamba_ssm_ssd),
    Kernel("compiled", "ssd", cpu_ssd.find, is_one_node=False),
    Kernel("fla", "linear",
           libraries.find_fla(libraries.linear_form, "simple_gla.chunk_simple_gla", "gla.chunk_gla")),
    Kernel("fla", "delta",
           libraries.find_fla(libraries.delta_form, "delta_rule.chunk_delta_rule",
                              "gated_delta_rule.chunk_gated_delta_rule")),
    Kernel("fla", "rwkv7", libraries.find_fla(libraries.rwkv7_form, "rwkv7.chunk_rwkv7")),
]  # fmt: skip


COMPILED_PARTS = {"short conv": cpu_conv, "gated norm": cpu_gate, "experts": cpu_experts}  # in C, what is no recurrence


class Choice(dict):
    """{part: kernel}, and in `not_taken` {part: {kernel: why not}}, each reason to follow the kernel's name."""

    def __init__(self):
        super().__init__()
        self.not_taken = {}

    def refuse(self, part, kernel, reason):
        self.not_taken.setdefault(part, {})[kernel] = reason


def backends():
    """What kernel_backend may be."""
    return ("auto", "plain", *dict.fromkeys(("onednn", *(kernel.name for kernel in KERNELS))))


def choose(model, device, backend, dtype=torch.float32, will_compile=False):
    """Install the fast paths that `backend` allows into `model`, and return the Choice.

    Args:
        model: ConfigurableGPT on `device`, neither compiled nor wrapped.
        backend: 'auto', 'plain' for none, or the name of the one kernel to use, which then must be usable.
        dtype: what matrix products run in.
        will_compile: torch.compile comes after, for which most kernels of CPUs step aside.

    Raises:
        UserError: no kernel has that name; or the one that was asked for is absent, fails its check, or has nothing
            to compute in this model.
    """
    if backend not in backends():
        known = ", ".join(backends())
        raise UserError(
            f"kernel_backend={backend!r} does not exist{did_you_mean(backend, backends())} (known: {known})"
        )
    choice = Choice()
    choose_linear(choice, model, device, backend)
    experts = grouped.install(model, device, "auto" if backend in ("auto", "compiled") else "plain")
    if experts is not None:
        choice["experts"] = experts
    if backend == "auto" and device.type == "cpu" and cpu_norm.equals_plain() and cpu_norm.install(model):
        choice["norm"] = "fewer passes"
    if choice["linear"] == "onednn" and not will_compile and dtype == torch.float32:
        cpu_attention.install(model)
        if cpu_ffn.install(model):
            choice["ffn"] = "one node"
    if device.type == "cpu" and backend in ("auto", "compiled"):
        for part in COMPILED_PARTS:
            choose_compiled(choice, model, part, "torch.compile" if will_compile else dtype)
    for part, mixers in mixers_by_part(model).items():
        if mixers[0].operation == "attention":
            choose_attention(choice, part, mixers, model.config, device, backend, dtype)
            if all("forward" in vars(mixer) for mixer in mixers):
                choice[part] += ", one node" + ", compiled" * cpu_attention.is_compiled(model.config.block_size)
        else:
            choose_recurrence(choice, part, mixers, model.config, device, backend, dtype, will_compile)
    if backend not in ("auto", "plain"):
        insist(choice, backend)
    return choice


def mixers_by_part(model):
    """{registered name: [mixers]} of those that name an operation, in the order of the layers."""
    names = {part: name for name, part in ALL_REGISTRIES["mixer"].items()}
    parts = {}
    for module in model.modules():
        if getattr(module, "operation", None) is not None:
            parts.setdefault(names.get(type(module), type(module).__name__), []).append(module)
    return parts


def choose_linear(choice, model, device, backend):
    """oneDNN for nn.Linear, where it is the faster library."""
    choice["linear"] = "plain"
    if backend not in ("auto", "onednn") or (backend == "auto" and device.type != "cpu"):
        return
    if device.type != "cpu":
        choice.refuse("linear", "onednn", f"is for CPUs and this is {device.type}")
    elif backend == "auto" and not cpu_linear.is_faster_here(device):
        choice.refuse("linear", "onednn", "is the faster library on AMD's processors alone")
    elif not cpu_linear.equals_plain():
        choice.refuse("linear", "onednn", "is absent from this torch or off the plain path")
    else:
        cpu_linear.install(model)
        choice["linear"] = "onednn"


def choose_compiled(choice, model, part, will_run):
    """One of COMPILED_PARTS, where this machine compiles it, it is right, and float32 runs operator by operator."""
    kernel = COMPILED_PARTS[part]
    if not kernel.found_in(model):
        return
    try:
        if will_run != torch.float32:
            raise libraries.AbsentError(f"is not for {will_run}")
        kernel.install(model)
        choice[part] = "compiled"
    except libraries.AbsentError as absent:
        choice.setdefault(part, "plain")
        choice.refuse(part, "compiled", str(absent))


def choose_attention(choice, part, mixers, config, device, backend, dtype):
    """attention_backend decides; on CUDA it is checked, and SDPA says which of its kernels it takes."""
    name = choice[part] = config.attention_backend
    if device.type != "cuda" or name == "manual":
        return
    if backend != "plain" and (reason := attention.check(mixers[0], config, device, dtype)):
        choice.refuse(part, name, reason)
        choice[part] = "manual"
        for mixer in mixers:
            mixer.backend = ALL_REGISTRIES["attention_backend"]["manual"]
    elif name == "sdpa" and (kernel := attention.kernel_of(mixers[0], config, device, dtype)):
        choice[part] = f"{name} {kernel}"


def choose_recurrence(choice, part, mixers, config, device, backend, dtype, will_compile):
    """The first kernel for this operation that is allowed, here, and right."""
    choice[part], first, calls = "plain", mixers[0], None
    for kernel in KERNELS:
        if kernel.operation != first.operation or backend not in ("auto", kernel.name):
            continue
        plain = first.forms["chunk"]
        try:
            if getattr(first, "form", "chunk") != "chunk":
                raise libraries.AbsentError(f"is not what recurrence={first.form!r} asks for")
            if will_compile and not kernel.is_one_node:
                raise libraries.AbsentError("is not for torch.compile")
            fast = kernel.find(plain, device, dtype)
        except libraries.AbsentError as absent:
            choice.refuse(part, kernel.name, str(absent))
            continue
        calls = calls or checks.recorded_calls(first, config.n_embd, device, dtype)
        if reason := checks.refusal(plain, fast, calls, dtype):
            choice.refuse(part, kernel.name, reason)
            continue
        for mixer in mixers:
            mixer.forms = {**mixer.forms, "chunk": fast}
        choice[part] = kernel.name
        return


def insist(choice, backend):
    """Stop where the kernel that was asked for is not what runs."""
    for part, refused in choice.not_taken.items():
        if backend in refused:
            raise UserError(f"kernel_backend={backend!r} cannot compute {part!r}: {backend} {refused[backend]}")
    if backend not in choice.values():
        raise UserError(
            f"kernel_backend={backend!r} has nothing to compute in a model of {', '.join(choice)}; use 'auto'"
        )


def install_without_data(model, device, backend):
    """Let `model` hold, on tensors without data, what it would hold as `choose` leaves it: nothing can be checked."""
    grouped.install_without_data(model)
    if device.type != "cpu" or backend not in ("auto", "compiled"):
        return
    if backend == "auto":
        cpu_norm.install(model)
    with contextlib.suppress(libraries.AbsentError):
        for kernel in COMPILED_PARTS.values():
            kernel.install(model, check=False)
    for mixers in mixers_by_part(model).values():
        for kernel in KERNELS:
            if (kernel.name, kernel.operation) == ("compiled", mixers[0].operation):
                install_form(mixers, kernel, device)


def install_form(mixers, kernel, device):
    """The form of a compiled kernel, where there is one and the mixers would use it."""
    with contextlib.suppress(libraries.AbsentError):
        fast = kernel.find(mixers[0].forms["chunk"], device, torch.float32)
        for mixer in mixers:
            mixer.forms = {**mixer.forms, "chunk": fast}
