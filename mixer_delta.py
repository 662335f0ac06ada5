"""The delta rule: before a value is written under a key, what the state held there is taken out.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        y_t = S_t^T q_t        S (K, V) for each head

`delta_net` has alpha = 1; `gated_delta_net` learns to forget as well. `recurrent` is the equation, `chunk` the same in
matrix products and one triangular solve for each chunk (the UT transform of Yang et al. 2024, section 3.2).
"""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY
from mixer_chunks import (
    causal_mask,
    chunk_length,
    cut_at_runs,
    decays_across,
    document_cuts,
    into_chunks,
    padded_chunks,
    pair_decays,
    scaled,
)
from mixer_linear import LinearMixer, split_heads

# ---- the recurrence, token by token ---------------------------------------------------------------------------------


def delta_recurrent(q, k, v, beta, log_decay=None, state=None, runs=None, chunk_size=None, keep_state=True):
    """The equation above: (y (B, H, T, V), the last S (B, H, K, V)).

    Args:
        q, k, v: (B, H, T, K), (B, H, T, K), (B, H, T, V); keys of length 1.
        beta: (B, H, T, 1), how much of what a key held is replaced.
        log_decay: (B, H, T, 1), log alpha; None forgets nothing.
        state: (B, H, K, V) to go on from; None is zeros.
        runs: (B, T) from document_runs: S starts at zero where it changes.
    """
    S, y = state, []
    if S is None:
        S = k.new_zeros(*k.shape[:2], k.size(-1), v.size(-1))
    decay = cut_at_runs(None if log_decay is None else log_decay.exp(), runs, q)
    # unbind once: indexing x[:, :, t] in the loop makes the backward quadratic in T
    decays = [None] * q.size(2) if decay is None else decay.unsqueeze(-1).unbind(2)
    for q_t, k_t, v_t, beta_t, decay_t in zip(*(x.unbind(2) for x in (q, k, v, beta)), decays, strict=True):
        S = scaled(S, decay_t)
        held = (k_t[..., None, :] @ S).squeeze(-2)  # (B, H, V), what the state answers to this key
        S = S + k_t[..., :, None] * (beta_t * (v_t - held))[..., None, :]
        y.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(y, dim=2), S


# ---- the same in chunks ---------------------------------------------------------------------------------------------


def delta_chunked(q, k, v, beta, log_decay=None, state=None, runs=None, chunk_size=64, keep_state=True):
    """What delta_recurrent computes, in matrix products over chunks of `chunk_size` tokens.

    Each token writes k_i u_i^T, where u_i is what it adds to the decayed state. With b the sum of the log decays since
    the start of a chunk, D_ij = exp(b_i - b_j) and S the state before it,

        u_i = beta_i (v_i - exp(b_i) S^T k_i - sum_(j < i) D_ij (k_i . k_j) u_j)
        that is  (I + L) U = beta V - beta exp(b) K S

    so that U = U0 - W S for a U0 and a W that one triangular solve gives for all chunks at once. Then, as without the
    delta rule,

        y_i = exp(b_i) S^T q_i + sum_(j <= i) D_ij (q_i . k_j) u_j
        S' = exp(b_C) S + sum_j exp(b_C - b_j) k_j u_j^T
    """
    T, C = q.size(2), chunk_length(q.size(2), chunk_size)
    q, k, v, beta = (into_chunks(x, C) for x in (q, k, v, beta))  # (B, H, N, C, K, V or 1)
    log_decay = None if log_decay is None else into_chunks(log_decay, C)  # (B, H, N, C, 1)
    cut = document_cuts(runs, C, q.dtype)
    mask = causal_mask(C, cut, q.device)
    decays = mask.to(q.dtype) if log_decay is None else pair_decays(log_decay, mask)  # (..., C, C)
    keys = k.transpose(-2, -1)
    L = (beta * k) @ keys * decays  # its diagonal and what is above are never read
    scores = q @ keys * decays
    if q.size(2) == 1 and state is None and not keep_state:
        y, last = scores @ solve_unit_lower(L, beta * v), None
    else:
        from_before, to_end, through = decays_across(log_decay, cut)
        known = torch.cat((beta * v, scaled(beta * k, from_before)), dim=-1)
        U0, W = solve_unit_lower(L, known).split((v.size(-1), k.size(-1)), dim=-1)
        state = k.new_zeros(*k.shape[:2], k.size(-1), v.size(-1)) if state is None else state
        U, states, last = delta_carry(U0, W, scaled(k, to_end).transpose(-2, -1), through, state)
        y = scores @ U + scaled(q, from_before) @ states
    return y.flatten(2, 3)[:, :, :T], last


def solve_unit_lower(L, known):
    """X of (I + L) X = known for L (..., C, C), of which only what lies below the diagonal is read."""
    return torch.linalg.solve_triangular(L, known, upper=False, unitriangular=True)


def delta_carry(U0, W, write, through, state, added=None):
    """Over the chunks, U = U0 - W S and S' = through S + write U + added.

    Args:
        U0, W: (B, H, N, C, V) and (B, H, N, C, K).
        write: (B, H, N, K, C).
        through: (B, H, N, 1 or K, 1), or None where S goes through as it is.
        added: (B, H, N, K, V) or None.

    Returns:
        (U (B, H, N, C, V), the states before each chunk (B, H, N, K, V), the last).
    """
    N, written, states = U0.size(2), [], []
    passes, extra = ([None] * N if x is None else x.unbind(2) for x in (through, added))
    chunks = zip(U0.unbind(2), W.unbind(2), write.unbind(2), passes, extra, strict=True)
    for U0_c, W_c, write_c, through_c, added_c in chunks:
        U = U0_c - W_c @ state
        written.append(U)
        states.append(state)
        state = scaled(state, through_c) + write_c @ U
        state = state if added_c is None else state + added_c
    return torch.stack(written, dim=2), torch.stack(states, dim=2), state


# ---- the mixers -----------------------------------------------------------------------------------------------------


def unit_length(x):
    """x / |x| over the last dimension; fla's eps, under the root, keeps zeros from dividing."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@MIXER_REGISTRY("delta_net")
class DeltaNet(LinearMixer):
    """DeltaNet (Schlag et al. 2021; Yang et al. 2024, section 3.3).

    q and k = silu(conv(x W)), of length 1; beta = sigmoid(x W).
    """

    operation = "delta"
    forms: ClassVar = {"chunk": delta_chunked, "recurrent": delta_recurrent}

    class Options:
        d_conv: int = 4  # width of a short causal convolution over queries, keys and values; 0 is none
        output_norm: str = "rmsnorm"  # norm of each head's output: none, or a normalization
        negative_eigenvalues: bool = False  # beta up to 2, so that a key can be reversed (Grazzi et al. 2024)

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.beta_scale = 2.0 if config.options_for(type(self)).negative_eigenvalues else 1.0
        self.beta = nn.Linear(config.n_embd, self.n_head, bias=False)

    def prepare(self, x, q, k, v, positions):
        beta = self.beta_scale * split_heads(self.beta(x), self.n_head).sigmoid()  # (B, H, T, 1)
        q, k = unit_length(F.silu(q)), unit_length(F.silu(k))
        return {"q": q * self.key_dim**-0.5, "k": k, "v": F.silu(v), "beta": beta}

    def recurrence_flops(self, T, K, V):
        """chunk, C tokens each: 2 C K for k k^T, 2 C K for q k^T, 2 C V for the solve, 2 C V for what the scores weigh,
        the causal halves not taken off; with more than one chunk, 2 C K more for the solve and 2 K V each to correct,
        write and read.
        recurrent: 2 K V each to ask and to read, and 2 K V elementwise to write.
        """
        if self.form == "recurrent" or T == 1:
            return 4 * K * V, 2 * K * V
        C, padding = padded_chunks(T, chunk_length(T, self.chunk_size))
        return padding * (4 * C * (K + V) + (2 * C * K + 6 * K * V if T > C else 0)), 0


@MIXER_REGISTRY("gated_delta_net")
class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (Yang et al. 2025, eq. 10): alpha = exp(-exp(A_log) softplus(x W + dt_bias)), Mamba-2's decay."""

    no_weight_decay = ("A_log", "dt_bias")
    own_init = ("A_log", "dt_bias")

    class Options:
        expand_k: float = 0.75  # width of all queries (and keys) over n_embd
        expand_v: float = 1.5  # width of all values over n_embd; with the gate, 6 n_embd^2 weights (the paper's)
        output_gate: bool = True  # multiply the output by silu(gate(x))

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.decay = nn.Linear(config.n_embd, self.n_head, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_head))
        self.dt_bias = nn.Parameter(torch.empty(self.n_head))

    def init_own_parameters(self, generator):
        """Mamba-2's: A uniform up to 16, softplus(dt_bias) log-uniform from 0.001 to 0.1, as in the authors' code."""
        A = (16 * torch.rand(self.n_head, generator=generator)).clamp(min=1e-3)
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(low + (high - low) * torch.rand(self.n_head, generator=generator))
        self.A_log.copy_(A.log())
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def prepare(self, x, q, k, v, positions):
        dt = split_heads(self.decay(x), self.n_head) + self.dt_bias[:, None, None]  # (B, H, T, 1)
        # softplus(dt) = -logsigmoid(-dt), and torch 2.13 compiles the strides of softplus's gradient wrongly
        log_decay = self.A_log.exp()[:, None, None] * F.logsigmoid(-dt)
        return {**super().prepare(x, q, k, v, positions), "log_decay": log_decay}
