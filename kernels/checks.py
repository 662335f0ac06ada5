"""A fast path against the plain one, forward and backward, on the inputs that the model itself gives it.

    calls = recorded_calls(mixer, width, device, dtype)
    reason = refusal(plain, fast, calls, dtype)          # None when they agree

The inputs are those of a fresh model with its own shapes: head sizes that a kernel mishandles are met here and not in
training. The text is long enough for several chunks of every kernel and no multiple of any.
"""

import contextlib
import functools
import math

import torch
from torch.utils._pytree import tree_map

TOKENS = 529  # two chunks of 256, eight of 64, and a rest
BATCH = 2


def tolerance(dtype):
    """The largest relative error that rounding explains; a kernel that computes something else is far above it."""
    if dtype == torch.float32:
        return 2e-3 if torch.get_float32_matmul_precision() != "highest" else 1e-4  # TF32 keeps 10 bits
    return 3e-2


def precision(device, dtype):
    """The context that a training step of this dtype runs in."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def example(width, device, tokens=TOKENS):
    """A mixer's input (B, T, C), as a norm would give it, and ids of documents: a fifth of the text, and one token."""
    x = torch.randn(BATCH, tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    ids = (torch.arange(tokens, device=device) + torch.tensor([[0], [tokens // 8]], device=device)) // (tokens // 5 + 1)
    ids[1, tokens // 2] = tokens
    return x, ids


def recorded_calls(mixer, width, device, dtype, tokens=TOKENS):
    """[(args, kwargs), ...]: what the mixer calls its 'chunk' form with, on one text and on several documents."""
    calls, before, plain = [], vars(mixer).get("forms"), mixer.forms["chunk"]
    x, document_ids = example(width, device, tokens)

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return plain(*args, **kwargs)

    mixer.forms = {**mixer.forms, "chunk": record}
    try:
        with torch.no_grad(), precision(device, dtype):
            for ids in (None, document_ids):
                mixer(x, None, ids)
    finally:
        del mixer.forms
        if before is not None:
            mixer.forms = before
    return calls


def outputs_and_gradients(form, args, kwargs):
    """[y, gradients of a fixed sum of y over every floating-point input, None where there is none]."""
    leaves = []

    def leaf(value):
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map(leaf, (args, kwargs))
    y = form(*args, **kwargs)
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)]


def same_module(module, fast, shape, allowed=1e-4):
    """Whether fast(x) equals the module's own forward for x of this shape on a CPU, with all gradients, in float32.

    The module's own parameters are what it is tried on, and get no gradient from it.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results, leaves = [], [x, *module.parameters()]
    try:
        for forward in (functools.partial(type(module).forward, module), fast):
            y = forward(x)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    except (RuntimeError, AttributeError, TypeError):  # an operation that this torch does not have, or has otherwise
        return False
    return all(relative_error(plain, other) <= allowed for plain, other in zip(*results, strict=True))


def relative_error(plain, fast):
    """The larger of |fast - plain| / |plain| as norms, over all and at the worst element; inf for what is not finite.

    The second finds a tile that is wrong in a tensor that is right elsewhere.
    """
    if fast is None or fast.shape != plain.shape or not fast.isfinite().all():
        return math.inf
    plain, fast = plain.double(), fast.double()
    apart = fast - plain
    if not plain.any():
        return math.inf if apart.any() else 0.0
    return max((apart.norm() / plain.norm()).item(), (apart.abs().max() / plain.abs().max()).item())


def refusal(plain, fast, calls, dtype):
    """Why `fast` may not stand for `plain`, to follow the kernel's name in a sentence; None when it may."""
    allowed = tolerance(dtype)
    try:
        for args, kwargs in calls:
            wanted = outputs_and_gradients(plain, args, kwargs)
            got = outputs_and_gradients(fast, args, kwargs)
            pairs = [(one, two) for one, two in zip(wanted, got, strict=True) if one is not None]
            errors = [relative_error(one, two) for one, two in pairs]
            if not max(errors) <= allowed:
                where = "its output" if errors[0] > allowed else "a gradient"
                return f"is off the plain path by {max(errors):.1g} in {where} ({allowed:g} is allowed)"
    except Exception as error:  # whatever a library may raise: the run goes on without it
        return f"failed its check: {one_line(error)}"
    return None


def one_line(error):
    """'AssertionError: heads above 256 are not supported'."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
