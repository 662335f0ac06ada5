"""Causal attention on a CPU as one node of autograd: two projections by oneDNN, the turn by RoPE, a fused kernel.

The plain path is `mixer_attention.Attention.forward`. What is saved is the bookkeeping of a dozen views and, because
queries, keys and values stay in the one tensor that they were projected to, the copies that put their gradients back
together; RoPE takes two passes instead of four (`docs/performance.md`).
"""

import functools

import torch
from torch.autograd.function import once_differentiable

from kernels import checks
from kernels.cpu_linear import bias_gradient, input_gradient, product, takes, weight_gradient
from mixer_attention import MIXER_REGISTRY, SDPABackend
from model_components import POSITION_ENCODING_REGISTRY

aten = torch.ops.aten


class AttentionFunction(torch.autograd.Function):
    """x (B, T, C) -> (B, T, C). qkv (3 H D, C) and out (C, H D) with biases or None; cos and sin (T, D) or None."""

    @staticmethod
    def forward(ctx, x, n_head, cos, sin, qkv, qkv_bias, out, out_bias):
        B, T, _ = x.shape
        projected = product(x, qkv, qkv_bias).view(B, T, 3, n_head, -1)
        turned = projected[:, :, :2] if cos is None else turn(projected[:, :, :2], cos, sin)
        q, k, v = _heads(turned[:, :, 0], turned[:, :, 1], projected[:, :, 2])
        y, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        mixed = y.transpose(1, 2).reshape(B, T, -1)
        ctx.save_for_backward(x, qkv, out, q, k, v, y, log_sums, mixed, cos, sin)
        ctx.n_head, ctx.has_bias = n_head, out_bias is not None
        return product(mixed, out, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, qkv, out, q, k, v, y, log_sums, mixed, cos, sin = ctx.saved_tensors
        B, T, _ = x.shape
        of_y = input_gradient(grad, out).view(B, T, ctx.n_head, -1).transpose(1, 2)
        of_heads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_y, q, k, v, y, log_sums, 0.0, True
        )  # fmt: skip
        of_projected = x.new_empty(B, T, 3, *of_y.shape[1::2])
        of_q, of_k, of_v = _heads(*of_heads)
        for place, part in enumerate((of_q, of_k)):
            if cos is None:
                of_projected[:, :, place] = part
            else:  # the turn is a rotation: its transpose goes back by the same angle
                turn(part, cos, sin.roll(sin.size(-1) // 2, -1), out=of_projected[:, :, place])
        of_projected[:, :, 2] = of_v
        of_projected = of_projected.flatten(2)
        return (
            input_gradient(of_projected, qkv), None, None, None,
            weight_gradient(of_projected, x), bias_gradient(of_projected) if ctx.has_bias else None,
            weight_gradient(grad, mixed), bias_gradient(grad) if ctx.has_bias else None,
        )  # fmt: skip


def _heads(*parts):
    """(B, T, H, D) <-> (B, H, T, D), each."""
    return (part.transpose(1, 2) for part in parts)


def turn(x, cos, sin, out=None):
    """RoPE: x (B, T, ..., D), cos and sin (T, D) with its first half negated -> x cos + (x's halves swapped) sin."""
    cos, sin = (table.view(table.size(0), *(1,) * (x.dim() - 3), -1) for table in (cos, sin))
    half = x.size(-1) // 2
    out = torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def is_here(mixer):
    """Whether this is attention with nothing that this file does not have."""
    kinds = MIXER_REGISTRY["attention"], MIXER_REGISTRY["local_attention"]
    if type(mixer) not in kinds or mixer.backend is not SDPABackend:
        return False
    if not mixer.causal or mixer.dropout or mixer.query_norm is not None or mixer.n_kv_head != mixer.n_head:
        return False
    return mixer.position_encoding is None or type(mixer.position_encoding) is POSITION_ENCODING_REGISTRY["rope"]


def install(model):
    """Let the attention layers of `model` that agree with their plain path compute as one node; how many do."""
    mixers, agrees = [mixer for mixer in model.modules() if is_here(mixer)], {}
    for mixer in mixers:
        if type(mixer) not in agrees:
            shape = 2, min(9, mixer.window or 9), mixer.qkv.in_features
            agrees[type(mixer)] = checks.same_module(mixer, functools.partial(_forward, mixer), shape)
        if agrees[type(mixer)]:
            mixer.forward = functools.partial(_forward, mixer)
    return sum(agrees[type(mixer)] for mixer in mixers)


def _forward(mixer, x, positions=None, document_ids=None):
    is_plain = positions is None and document_ids is None and not 0 < mixer.window < x.size(1)
    if not (is_plain and takes(x) and torch.is_grad_enabled() and type(mixer.out.weight) is torch.nn.Parameter):
        return type(mixer).forward(mixer, x, positions, document_ids)
    rope = mixer.position_encoding
    cos, sin = (None, None) if rope is None else rope.cos_sin_of_range(x.size(1), x.device, x.dtype)
    weights = mixer.qkv.weight, mixer.qkv.bias, mixer.out.weight, mixer.out.bias
    return AttentionFunction.apply(x, mixer.n_head, cos, sin, *weights)
