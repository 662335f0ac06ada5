"""Causal attention on a CPU as one node of autograd: two projections by oneDNN, the turn by RoPE, a fused kernel.

The kernel is compiled from cpu_attention.c where that can be, and torch's otherwise. The plain path is
`mixer_attention.Attention.forward`. What is saved is the bookkeeping of a dozen views and, because queries, keys and
values stay in the one tensor that they were projected to, the copies that put their gradients back together; RoPE takes
two passes instead of four, or in C none of its own (`docs/performance.md`).
"""

import functools

import torch
from torch.autograd.function import once_differentiable

from kernels import checks, compiled
from kernels.cpu_linear import bias_gradient, input_gradient, product, takes, weight_gradient
from mixer_attention import MIXER_REGISTRY, SDPABackend
from model_components import POSITION_ENCODING_REGISTRY

aten = torch.ops.aten
SHORT = 64  # tokens: at 128 torch's kernel and all scores at once are as fast, at 256 the latter is half as fast
LONG = 1024  # tokens: up to here a block of scores is in the cache, and C is faster than torch's kernel
QUERIES = 48  # of a block of scores, in cpu_attention.c too
LANES = 16  # floats of a vector, in vectors.h too


class AttentionFunction(torch.autograd.Function):
    """x (B, T, C) -> (B, T, C). qkv (3 H D, C) and out (C, H D) with biases or None; cos and sin (T, D) or None."""

    @staticmethod
    def forward(ctx, x, n_head, cos, sin, qkv, qkv_bias, out, out_bias):
        B, T, _ = x.shape
        projected = product(x, qkv, qkv_bias).view(B, T, 3, n_head, -1)
        turned = projected[:, :, :2] if cos is None else turn(projected[:, :, :2], *_by_token(cos, sin))
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
            else:
                turn(part, cos[:, None], _back(sin)[:, None], out=of_projected[:, :, place])
        of_projected[:, :, 2] = of_v
        return _gradients(ctx, grad, x, qkv, of_projected.flatten(2), mixed)


class CompiledAttentionFunction(torch.autograd.Function):
    """What AttentionFunction computes, in C from where the projection leaves queries, keys and values."""

    @staticmethod
    def forward(ctx, x, n_head, cos, sin, qkv, qkv_bias, out, out_bias):
        B, T, _ = x.shape
        projected = product(x, qkv, qkv_bias)
        ctx.sizes = B, T, n_head, projected.size(-1) // (3 * n_head)
        cos, sin = (None, None) if cos is None else (cos.contiguous(), sin.contiguous())
        mixed, log_sums = x.new_empty(B, T, projected.size(-1) // 3), x.new_empty(B, n_head, T)
        _run("attention_forward", ctx.sizes, projected, cos, sin, mixed, log_sums)
        ctx.save_for_backward(x, qkv, out, projected, mixed, log_sums, cos, sin)
        ctx.has_bias = out_bias is not None
        return product(mixed, out, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, qkv, out, projected, mixed, log_sums, cos, sin = ctx.saved_tensors
        of_mixed, of_projected = input_gradient(grad, out).contiguous(), torch.empty_like(projected)
        _run("attention_backward", ctx.sizes, of_mixed, projected, cos, sin, mixed, log_sums, of_projected)
        return _gradients(ctx, grad, x, qkv, of_projected, mixed)


def _run(name, sizes, *tensors):
    """A function of cpu_attention.c, with the scratch that its threads need; sizes are B, T, H, D."""
    (_, T, _, D), threads = sizes, torch.get_num_threads()
    width, length = _padded(D), _padded(T)
    floats = 7 * T * width + 2 * D * length + QUERIES * (2 * length + width)
    compiled.library("cpu_attention")(name, *tensors, tensors[0].new_empty(threads, floats), floats, *sizes, threads)


def _padded(n):
    return -(-n // LANES) * LANES


class ShortAttentionFunction(torch.autograd.Function):
    """What AttentionFunction computes, from all scores at once: faster where they stay in the cache."""

    @staticmethod
    def forward(ctx, x, n_head, cos, sin, qkv, qkv_bias, out, out_bias):
        B, T, _ = x.shape
        heads = (
            product(x, qkv, qkv_bias).view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4).contiguous()
        )  # (3, B, H, T, D)
        if cos is not None:
            heads[:2] = turn(heads[:2], cos, sin)
        q, k, v = heads.flatten(1, 2).unbind(0)  # (B H, T, D)
        later = x.new_full((T, T), float("-inf")).triu_(1)
        weights = torch.softmax(torch.baddbmm(later, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5), dim=-1)
        mixed = torch.bmm(weights, v).view(B, n_head, T, -1).transpose(1, 2).reshape(B, T, -1)
        ctx.save_for_backward(x, qkv, out, heads, weights, mixed, cos, sin)
        ctx.has_bias = out_bias is not None
        return product(mixed, out, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, qkv, out, heads, weights, mixed, cos, sin = ctx.saved_tensors
        _, B, H, T, D = heads.shape
        q, k, v = heads.flatten(1, 2).unbind(0)
        of_y = input_gradient(grad, out).view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        of_heads = torch.empty_like(heads)
        of_q, of_k, of_v = of_heads.flatten(1, 2).unbind(0)
        torch.bmm(weights.transpose(1, 2), of_y, out=of_v)
        of_scores = aten._softmax_backward_data(torch.bmm(of_y, v.transpose(1, 2)), weights, -1, weights.dtype)
        torch.baddbmm(of_q, of_scores, k, beta=0, alpha=D**-0.5, out=of_q)
        torch.baddbmm(of_k, of_scores.transpose(1, 2), q, beta=0, alpha=D**-0.5, out=of_k)
        if cos is not None:
            of_heads[:2] = turn(of_heads[:2], cos, _back(sin))
        of_projected = of_heads.permute(1, 3, 0, 2, 4).reshape(B, T, -1)
        return _gradients(ctx, grad, x, qkv, of_projected, mixed)


def _gradients(ctx, grad, x, qkv, of_projected, mixed):
    """What both backwards return, from the gradient of queries, keys and values (B, T, 3 H D)."""
    return (
        input_gradient(of_projected, qkv), None, None, None,
        weight_gradient(of_projected, x), bias_gradient(of_projected) if ctx.has_bias else None,
        weight_gradient(grad, mixed), bias_gradient(grad) if ctx.has_bias else None,
    )  # fmt: skip


def _back(sin):
    """The sines of the turn back: a rotation's transpose is that by the opposite angle."""
    return sin.roll(sin.size(-1) // 2, -1)


def _heads(*parts):
    """(B, T, H, D) <-> (B, H, T, D), each."""
    return (part.transpose(1, 2) for part in parts)


def _by_token(*tables):
    """(T, D) -> (T, 1, 1, D), each."""
    return (table[:, None, None] for table in tables)


def turn(x, cos, sin, out=None):
    """RoPE: x (..., D), the tables as wide with the sine's first half negated -> x cos + (x's halves swapped) sin."""
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
            most = min(model.config.block_size, mixer.window or LONG + 1)
            fast, lengths = functools.partial(_forward, mixer), (9, SHORT + 1, LONG + 1)  # of every function
            shapes = [(2, length, mixer.qkv.in_features) for length in {min(length, most) for length in lengths}]
            agrees[type(mixer)] = all(checks.same_module(mixer, fast, shape) for shape in shapes)
        if agrees[type(mixer)]:
            mixer.forward = functools.partial(_forward, mixer)
    return sum(agrees[type(mixer)] for mixer in mixers)


def is_compiled(T):
    """Whether a text of T tokens is computed in C."""
    return T <= LONG and compiled.is_here("cpu_attention")


def function_for(T):
    """What computes a text of T tokens."""
    if is_compiled(T):
        return CompiledAttentionFunction
    return ShortAttentionFunction if T <= SHORT else AttentionFunction


def _forward(mixer, x, positions=None, document_ids=None):
    is_plain = positions is None and document_ids is None and not 0 < mixer.window < x.size(1)
    if not (is_plain and takes(x) and torch.is_grad_enabled() and type(mixer.out.weight) is torch.nn.Parameter):
        return type(mixer).forward(mixer, x, positions, document_ids)
    rope = mixer.position_encoding
    cos, sin = (None, None) if rope is None else rope.cos_sin_of_range(x.size(1), x.device, x.dtype)
    weights = mixer.qkv.weight, mixer.qkv.bias, mixer.out.weight, mixer.out.bias
    return function_for(x.size(1)).apply(x, mixer.n_head, cos, sin, *weights)
