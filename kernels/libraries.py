"""Kernels of other packages, called as the plain forms are: mamba_ssm, and fla (flash-linear-attention).

Each `*_form` takes the library's function, the plain form and the run's dtype, and returns a form with the plain one's
signature. Layouts and conventions differ only here: heads before or after time, who scales the queries, the sign of
what a delta rule removes. The libraries serve training, from no state to no state. Decoding, and documents where a
library has no notion of them, take the plain form.

mamba_ssm 2.3 (Dao & Gu), fla 0.6 (Yang & Zhang). Both are imported when a model asks for them, on CUDA only.
"""

import contextlib
import importlib
import importlib.util
import sys
import types

import torch

from kernels.checks import one_line

MAMBA_CHUNK = 256  # tokens; the size that mamba_ssm's kernels are tuned for


class AbsentError(Exception):
    """A kernel that is not here; the message follows its name in a sentence."""


# ---- finding them ---------------------------------------------------------------------------------------------------


def needs_cuda(device):
    if device.type != "cuda":
        raise AbsentError("needs CUDA")


def imported(module, name, package):
    """`name` of the module, or AbsentError with what to install."""
    if not is_installed(module.partition(".")[0]):
        raise AbsentError(f"is not installed (pip install {package})")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # an import may fail in as many ways as there are builds
        raise AbsentError(f"does not import here ({one_line(error)})") from None


def is_installed(module):
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def without_compiled_scan():
    """Lets mamba_ssm be imported where its CUDA part was not built: its Triton kernels do not need it."""
    name = "selective_scan_cuda"
    if is_installed(name):
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = None
    try:
        yield
    finally:
        del sys.modules[name]


def find_mamba_ssm_scan(plain, device, dtype):
    needs_cuda(device)
    if is_installed("mamba_ssm") and not is_installed("selective_scan_cuda"):
        raise AbsentError("was installed without its compiled scan")
    return mamba_form(imported("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "mamba-ssm"), plain)


def find_mamba_ssm_ssd(plain, device, dtype):
    needs_cuda(device)
    with without_compiled_scan():
        scan = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm")
    return ssd_form(scan, plain, dtype)


def find_triton_scan(plain, device, dtype):
    needs_cuda(device)
    imported("triton", "jit", "triton")
    return imported("kernels.selective_scan", "selective_scan", "triton")


def find_fla(make_form, *functions):
    """The finder of a form that is made of functions of fla.ops, such as 'gla.chunk_gla'."""

    def find(plain, device, dtype):
        needs_cuda(device)
        paths = (path.rpartition(".") for path in functions)
        found = [imported(f"fla.ops.{module}", name, "flash-linear-attention") for module, _, name in paths]
        return make_form(*found, plain, dtype)

    return find


# ---- mamba_ssm ------------------------------------------------------------------------------------------------------


def mamba_form(selective_scan_fn, plain):
    """selective_scan_fn(u (B, D, T), delta (B, D, T), A (D, N), B (B, N, T), C (B, N, T)) -> (B, D, T)."""
    call = torch.compiler.disable(_call_mamba)  # not as a decorator: it imports the compiler

    def form(x, dt, A, B, C, state=None, keep=None, chunk_size=8):
        if state is not None or keep is not None:
            return plain(x, dt, A, B, C, state, keep, chunk_size)
        return call(selective_scan_fn, x, dt, A, B, C), None

    return form


def _call_mamba(selective_scan_fn, x, dt, A, B, C):
    x, dt, B, C = (tensor.transpose(1, 2) for tensor in (x, dt, B, C))
    return selective_scan_fn(x, dt, A.t().contiguous(), B, C).transpose(1, 2)


def ssd_form(mamba_chunk_scan_combined, plain, dtype):
    """mamba_chunk_scan_combined(x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), chunk) -> (B, T, H, P)."""
    call = torch.compiler.disable(_call_ssd)

    def form(x, dt, A, B, C, state=None, runs=None, chunk_size=64, D=None):
        if state is not None:
            return plain(x, dt, A, B, C, state, runs, chunk_size, D)
        y = call(mamba_chunk_scan_combined, x, dt, A, B, C, runs, dtype)
        return y if D is None else torch.addcmul(y, x, D[:, None]), None

    return form


def _call_ssd(mamba_chunk_scan_combined, x, dt, A, B, C, runs, dtype):
    runs = None if runs is None else runs.to(torch.int32)
    low = (tensor.to(dtype) for tensor in (x, B, C))
    y = mamba_chunk_scan_combined(next(low), dt, A, next(low), next(low), MAMBA_CHUNK, seq_idx=runs)
    return y.to(x.dtype)


# ---- fla: q, k (B, T, H, K), v (B, T, H, V), gates as logarithms ----------------------------------------------------


def training_only(call, plain):
    """A form that serves whole texts from no state, and leaves everything else to the plain one."""
    call = torch.compiler.disable(call)

    def form(*, state=None, runs=None, chunk_size=64, keep_state=True, **inputs):
        if state is not None or runs is not None or keep_state:
            return plain(**inputs, state=state, runs=runs, chunk_size=chunk_size, keep_state=keep_state)
        return call(**inputs), None

    return form


def _time_first(dtype, *tensors):
    """(B, H, T, D) -> (B, T, H, D) in `dtype`."""
    return (tensor.transpose(1, 2).to(dtype).contiguous() for tensor in tensors)


def _heads_first(y, like):
    return y.transpose(1, 2).to(like.dtype)


def _one_per_head(gate, like):
    """A gate (B or 1, H, T, 1) -> (B, T, H), beside q, k and v of `like`'s (B, H, T, D)."""
    return gate.squeeze(-1).expand(like.shape[:3]).transpose(1, 2).contiguous()


def linear_form(chunk_simple_gla, chunk_gla, plain, dtype):
    """No decay or one for each head: chunk_simple_gla(g (B, T, H)); one for each channel: chunk_gla(g (B, T, H, K))."""

    def call(q, k, v, log_decay=None):
        like = v
        gate = None
        if log_decay is not None and log_decay.size(-1) > 1:
            (gate,) = _time_first(log_decay.dtype, log_decay.expand(q.shape))
        elif log_decay is not None:
            gate = _one_per_head(log_decay, q)
        chunked = chunk_gla if gate is not None and gate.dim() == 4 else chunk_simple_gla
        q, k, v = _time_first(dtype, q, k, v)
        return _heads_first(chunked(q=q, k=k, v=v, g=gate, scale=1.0)[0], like)

    return training_only(call, plain)


def delta_form(chunk_delta_rule, chunk_gated_delta_rule, plain, dtype):
    """chunk_delta_rule(beta (B, T, H)), chunk_gated_delta_rule(g, beta (B, T, H)); keys are of length 1 already."""

    def call(q, k, v, beta, log_decay=None):
        like, beta = v, _one_per_head(beta, q).to(dtype)
        gate = {} if log_decay is None else {"g": _one_per_head(log_decay, q)}
        chunked = chunk_gated_delta_rule if gate else chunk_delta_rule
        q, k, v = _time_first(dtype, q, k, v)
        return _heads_first(chunked(q=q, k=k, v=v, beta=beta, scale=1.0, **gate)[0], like)

    return training_only(call, plain)


def rwkv7_form(chunk_rwkv7, plain, dtype):
    """chunk_rwkv7(r, w, k, v, a, b): S_t = diag(exp(w)) S + b (a^T S) + k v^T, so that a = -kappa, b = rate kappa."""

    def call(r, log_decay, k, v, kappa, rate):
        like = v
        r, k, v, a, b = _time_first(dtype, r, k, v, -kappa, rate * kappa)
        (w,) = _time_first(log_decay.dtype, log_decay)
        return _heads_first(chunk_rwkv7(r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0)[0], like)

    return training_only(call, plain)
