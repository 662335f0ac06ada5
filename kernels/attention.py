"""Attention's backends on a GPU: held to the equation at start, and which of torch's kernels SDPA would use there."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from kernels.checks import TOKENS, example, precision, refusal
from registry import ALL_REGISTRIES


class SDPAWatch(TorchFunctionMode):
    """Inside it, `kernel` becomes what torch picks for the last scaled_dot_product_attention: 'flash', 'math', ..."""

    kernel = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.kernel = chosen_kernel(*args, **kwargs)
        return func(*args, **kwargs)


def chosen_kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """'flash', 'efficient', 'cudnn', 'math', by the rule that torch itself goes by; None where it does not say."""
    rule = getattr(torch, "_fused_sdp_choice", None)
    if rule is None:
        return None
    choice = rule(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    names = {int(backend): name.partition("_")[0].lower() for name, backend in SDPBackend.__members__.items()}
    return names.get(int(choice))


def kernel_of(mixer, config, device, dtype):
    """The kernel that this mixer's training would use, None where it calls no SDPA."""
    x, _ = example(config.n_embd, device, config.block_size)
    with SDPAWatch() as watch, precision(device, dtype):
        mixer(x.requires_grad_())  # with gradients: some kernels serve inference alone
    return watch.kernel


def check(mixer, config, device, dtype):
    """Why this mixer's backend may not stand for 'manual', or None."""
    plain, fast = ALL_REGISTRIES["attention_backend"]["manual"], mixer.backend
    x, ids = example(config.n_embd, device, min(TOKENS, config.block_size))
    calls = []

    class Recorder:
        @staticmethod
        def attend(*args):
            calls.append((args, {}))
            return plain.attend(*args)

    was_training = mixer.training
    mixer.backend = Recorder
    mixer.eval()  # two dropouts never agree
    try:
        with torch.no_grad(), precision(device, dtype):
            for documents in (None, ids):
                mixer(x, None, documents)
    finally:
        mixer.backend = fast
        mixer.train(was_training)
    return refusal(plain.attend, fast.attend, calls, dtype)
