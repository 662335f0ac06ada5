"""Chunks of a text, what decays between their tokens, and where documents cut them: for mixers with a state.

A recurrence S' = decay S + ... in matrix products: the text (B, H, T, D) becomes N chunks of C tokens (B, H, N, C, D),
each is attention inside, and a state passes from one to the next. Decays come as logarithms, at most 0, and are summed
over what lies between two tokens, so that nothing overflows, whatever they are.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# ---- chunks and documents -------------------------------------------------------------------------------------------


def chunk_length(T, chunk_size, halves=False):
    """Tokens of a chunk: no longer than the text; a power of two where `halves` are to be made of it."""
    C = min(T, chunk_size)
    return 2 ** math.ceil(math.log2(C)) if halves else C


def into_chunks(x, C):
    """(B, H, T, D) -> (B, H, N, C, D); zeros fill the last chunk: no key, no value, no decay."""
    return F.pad(x, (0, 0, 0, -x.size(2) % C)).unflatten(2, (-1, C))


@dataclass(frozen=True)
class DocumentCuts:
    """Where documents cut a chunked text; 1 where information passes and 0 where not."""

    within: torch.Tensor  # (B, 1, N, C, C) bool: two tokens of a chunk are of one document
    from_before: torch.Tensor  # (B, 1, N, C, 1): a token is of the document that the chunk before ended with
    to_end: torch.Tensor  # (B, 1, N, C, 1): a token is of the document that this chunk ends with
    through: torch.Tensor  # (B, 1, N, 1, 1): one document from the chunk before to the end of this one


def document_cuts(runs, C, dtype):
    """DocumentCuts of runs (B, T) in chunks of C, or None."""
    if runs is None:
        return None
    rest = -runs.size(1) % C
    runs = torch.cat((runs, runs[:, -1:].expand(-1, rest)), dim=1).unflatten(1, (-1, C))[:, None]  # (B, 1, N, C)
    last = runs[..., -1]
    before = torch.cat((runs[:, :, :1, 0], last[:, :, :-1]), dim=2)  # the first chunk goes on from the state
    return DocumentCuts(
        within=runs[..., :, None] == runs[..., None, :],
        from_before=(runs == before[..., None])[..., None].to(dtype),
        to_end=(runs == last[..., None])[..., None].to(dtype),
        through=(before == last)[..., None, None].to(dtype),
    )


def causal_mask(C, cut, device, diagonal=0):
    """Bool (C, C) or (B, 1, N, C, C): what row i may read, itself included where diagonal=0 and not where -1."""
    mask = torch.ones(C, C, dtype=torch.bool, device=device).tril(diagonal)
    return mask if cut is None else mask & cut.within


def padded_chunks(T, C):
    """(C, tokens computed over tokens of the text)."""
    return C, math.ceil(T / C) * C / T


def cut_at_runs(decay, runs, like):
    """`decay` (B, H, T, 1 or K) with zeros where a run begins, so that nothing gets past it."""
    if runs is None:
        return decay
    goes_on = F.pad(runs[:, 1:] == runs[:, :-1], (1, 0), value=True)[:, None, :, None].to(like.dtype)  # (B, 1, T, 1)
    return goes_on if decay is None else decay * goes_on


# ---- decays ---------------------------------------------------------------------------------------------------------


def segment_sums(x):
    """(..., C, D) -> (..., C, C, D): the sum of x_l over j < l <= i, 0 above the diagonal.

    Summed and not subtracted, sum_(l <= i) - sum_(l <= j): that loses a small sum beside a large one, and carries a
    trace of one document into another.
    """
    C = x.size(-2)
    after = torch.ones(C, C, dtype=torch.bool, device=x.device).tril(-1)[..., None]  # l > j
    return (x[..., :, None, :] * after).cumsum(-3)


def pair_decays(log_decay, mask):
    """exp of the log decays (..., C, 1) between j and i where `mask`, 0 elsewhere: (..., C, C)."""
    return segment_sums(log_decay).squeeze(-1).exp() * mask


LEAF = 4  # tokens; below this products are too small to be worth a call


def decayed_scores(q, k, log_decay):
    """sum_K q_i k_j exp(b_i - b_j) for j <= i, 0 above: (..., C, K) each -> (..., C, C), C a power of two.

    b is the running sum of the log decays. As a product, exp(b_i) exp(-b_j) overflows where a gate is nearly closed. So
    a chunk is halved: between the later half's queries and the earlier half's keys both exponents are summed from the
    border, and neither is above 0; each half is then halved again.
    """
    C = q.size(-2)
    if C <= LEAF:
        lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()[..., None]
        decay = segment_sums(log_decay).exp() * lower  # (..., C, C, K)
        return (q[..., :, None, :] * k[..., None, :, :] * decay).sum(-1)
    q, k, log_decay = (x.unflatten(-2, (2, C // 2)) for x in (q, k, log_decay))  # (..., 2, C/2, K)
    keys = k[..., 0, :, :] * sums_after(log_decay[..., 0, :, :]).exp()
    across = (q[..., 1, :, :] * log_decay[..., 1, :, :].cumsum(-2).exp()) @ keys.transpose(-2, -1)  # (..., C/2, C/2)
    first, second = decayed_scores(q, k, log_decay).unbind(-3)
    return torch.cat((F.pad(first, (0, C // 2)), torch.cat((across, second), dim=-1)), dim=-2)


def sums_after(x):
    """(..., C, D): for each of C the sum of those after it."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def decays_across(log_decay, cut):
    """What a chunk's tokens and its state are scaled by: (from before, to the end, through); None where by nothing.

    (B, H, N, C, K or 1) for queries that read the state before, the same for keys that reach the end, and
    (B, H, N, K or 1, 1) for the state that goes through.
    """
    if log_decay is None:
        return (None, None, None) if cut is None else (cut.from_before, cut.to_end, cut.through)
    b = log_decay.cumsum(-2)
    from_before, to_end, through = b.exp(), sums_after(log_decay).exp(), b[..., -1:, :].transpose(-2, -1).exp()
    if cut is None:
        return from_before, to_end, through
    return from_before * cut.from_before, to_end * cut.to_end, through * cut.through


def scaled(x, scale):
    return x if scale is None else x * scale


def carry(added, through, state):
    """S' = through S + added over the chunks: (the states before each (B, H, N, K, V), the last (B, H, K, V))."""
    states = []
    passes = [None] * added.size(2) if through is None else through.unbind(2)
    for added_c, through_c in zip(added.unbind(2), passes, strict=True):
        states.append(state)
        state = scaled(state, through_c) + added_c
    return torch.stack(states, dim=2), state
