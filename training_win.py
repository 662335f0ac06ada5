"""How well the winner is predicted, from sums that add up over batches and ranks.

    sums = win_sums(logits, outcomes, is_supervised, chances)     # vectors and scalars, of a batch
    win_scores(sums)                                              # {'wp_acc', 'wp_brier', 'wp_ece', 'wp_gap', ...}

Every number is a mean over predictions: one after each token that has a next one, whatever the record's length. Where
the true chances are known, `wp_gap` is the mean Kullback-Leibler divergence of the prediction from them: what wp_loss
has above the best possible in expectation, without the luck of the outcomes. The best possible is the truth's entropy.
"""

import torch

N_BINS = 10  # of the predicted probability, equally wide
N_STAGES = 5  # of a record, equally long


def win_sums(logits, outcomes, is_supervised, chances=None):
    """{name: tensor} of sums over supervised places.

    Args:
        logits: (B, T), of outcome 1. outcomes: (B, T), 0 or 1. is_supervised: (B, T) bool, True first in each row.
        chances: (B, T), the true probability of outcome 1, or None.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # that device has no float64
    logits, outcomes = logits.to(exact), outcomes.to(exact)
    lengths = is_supervised.sum(dim=1, keepdim=True)
    stages = torch.arange(logits.size(1), device=logits.device) * N_STAGES // lengths.clamp(min=1)  # (B, T)
    flat = is_supervised.flatten()
    stages, logits, outcomes = (values.flatten()[flat] for values in (stages, logits, outcomes))
    sums = {f"wp_{name}": value for name, value in judged(torch.sigmoid(logits), outcomes, stages).items()}
    sums["stage_tokens"] = tally(stages, torch.ones_like(logits), N_STAGES)
    if chances is not None:
        truth = chances.to(exact).flatten()[flat]
        sums |= {f"best_{name}": value for name, value in judged(truth, outcomes, stages).items()}
        entropy = -(torch.xlogy(truth, truth) + torch.xlogy(1 - truth, 1 - truth))
        expected = torch.nn.functional.softplus(logits) - truth * logits  # of the loss, were outcomes drawn again
        sums |= {"best_entropy": entropy.sum(), "wp_expected": expected.sum()}
    return sums


def judged(p, outcomes, stages):
    """{'right' by stage, 'brier', and by bin of p 'n', 'p' and 'won'}; a draw at p = 1/2 is half right."""
    right = torch.where(p == 0.5, 0.5, ((p > 0.5) == (outcomes > 0.5)).to(p.dtype))
    bins = (p * N_BINS).long().clamp(0, N_BINS - 1)
    return {
        "right": tally(stages, right, N_STAGES),
        "brier": (p - outcomes).square().sum(),
        "bin_n": tally(bins, torch.ones_like(p), N_BINS),
        "bin_p": tally(bins, p, N_BINS),
        "bin_won": tally(bins, outcomes, N_BINS),
    }


def tally(groups, values, n):
    """(n,) sums of values by group, exact in any order but for rounding."""
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_add_(0, groups, values)


def win_scores(sums):
    """The scores of one evaluation from its sums, as floats and lists."""
    n, stages = sums["tokens"], sums["stage_tokens"]
    scores = quality(sums, "wp", n)
    scores = {f"wp_{name}": value for name, value in scores.items()}
    scores["wp_acc_by_stage"] = by_stage(sums["wp_right"], stages)
    scores["wp_reliability"] = reliability(sums, "wp")
    if "best_entropy" in sums:
        scores["wp_gap"] = (sums["wp_expected"] - sums["best_entropy"]) / n
        scores["wp_best"] = {"loss": sums["best_entropy"] / n, **quality(sums, "best", n)}
        scores["wp_best_acc_by_stage"] = by_stage(sums["best_right"], stages)
    return scores


def quality(sums, whose, n):
    """{'acc', 'brier', 'ece'}: the last the expected calibration error of Naeini et al. 2015, of p(outcome 1)."""
    off = sum(abs(p - won) for p, won in zip(sums[f"{whose}_bin_p"], sums[f"{whose}_bin_won"], strict=True))
    return {"acc": sum(sums[f"{whose}_right"]) / n, "brier": sums[f"{whose}_brier"] / n, "ece": off / n}


def by_stage(right, counts):
    """{'0-20%': accuracy, ...} by how much of the record has been read."""
    edges = [f"{100 * i // N_STAGES}-{100 * (i + 1) // N_STAGES}%" for i in range(N_STAGES)]
    return {edge: r / c if c else None for edge, r, c in zip(edges, right, counts, strict=True)}


def reliability(sums, whose):
    """{'count', 'predicted', 'happened'} by bin: mean probability beside how often outcome 1 came; None where empty."""
    counts = sums[f"{whose}_bin_n"]
    means = {name: [value / n if n else None for value, n in zip(sums[f"{whose}_{key}"], counts, strict=True)]
             for name, key in (("predicted", "bin_p"), ("happened", "bin_won"))}  # fmt: skip
    return {"count": [round(n) for n in counts], **means}
