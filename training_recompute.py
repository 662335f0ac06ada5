"""Activations that are computed again in backward instead of kept (`gradient_checkpointing`).

checkpoint_activations(model, config)       # after weights are split, before blocks are compiled and sharded
"""

import contextlib
import functools

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def recomputed(blocks, config):
    """Those of the blocks whose matrix products are computed again in backward."""
    every = {"full": 1, "selective": 2}.get(config.gradient_checkpointing, len(blocks) + 1)
    return blocks[every - 1 :: every]


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
