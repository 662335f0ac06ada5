"""Fast paths, each beside the plain one that it must equal, and the choice between them.

    chosen = kernels.choose(model, device, "auto")      # {'linear': 'onednn', 'attention': 'sdpa'}

A kernel is used only where it is present and a forward and backward check against the plain path passes on this device
at start. Nothing is chosen by timing it: a run and its resumption must compute the same bits.
"""

from kernels import cpu_linear
from user_errors import UserError, did_you_mean

BACKENDS = ("auto", "plain")


def choose(model, device, backend):
    """Install the fast paths that `backend` allows into `model`, and return {part: kernel}.

    Args:
        model: ConfigurableGPT on `device`, neither compiled nor wrapped.
        backend: 'auto', or 'plain' for none.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"kernel_backend={backend!r} does not exist{did_you_mean(backend, BACKENDS)} (known: {', '.join(BACKENDS)})"
        )
    chosen = {"linear": "plain"}
    if any("attention" in mixer for mixer in model.config.mixers()):
        chosen["attention"] = model.config.attention_backend
    if backend == "auto" and cpu_linear.is_faster_here(device) and cpu_linear.equals_plain():
        cpu_linear.install(model)
        chosen["linear"] = "onednn"
    return chosen
