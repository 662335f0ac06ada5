"""Where a validation loss comes from: the length of the context, the place in it, recall, and how rare a token is.

    groups = measure_loss(model, dataset, n_tokens=2**16)
    groups['context', '4x'].loss           # nats per token when the model reads four times its training context

The parts, each with groups that are told apart by what the target is:

    whole       all             at the training context
    context     1x 2x 4x 8x     the same targets, cut into windows of that many training contexts
    position    1, 2-3, 4-7...  how many tokens the model may look back on; at the longest context
    recall      seen, new       whether the token before and the target stood side by side earlier in the window
    frequency   1-10, 11-100... the target's rank among the tokens of the training split

`recall` is the split of Arora et al. (2023, Zoology, section 3), who found most of the gap between attention and
recurrent models in the first group. recall and frequency are at the training context.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from training_data import ValidationSet, bits_per_byte

PARTS = ("whole", "context", "position", "recall", "frequency")
MULTIPLES = (1, 2, 4, 8)  # of the training context
BATCH_TOKENS = 2**14  # that a forward pass reads, unless one window is longer
HEAD_TOKENS = 2**10  # whose logits are held at a time
COUNTED_TOKENS = 2**26  # of the training split, for frequencies
RANKS = (10, 100, 1000, 10_000)


@dataclass
class Tally:
    """A sum over targets, divided once."""

    nats: float = 0.0
    targets: int = 0
    n_bytes: int = 0  # of text; 0 where that is unknown

    @property
    def loss(self):
        """Nats per target."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self):
        return bits_per_byte(self.nats, self.n_bytes)


def multiples_for(model, dataset):
    """(the multiples of the training context that can be read, why not all of them or '')."""
    T = model.config.block_size
    if model.position_embedding is not None:
        encoding = model.config.position_encoding
        return MULTIPLES[:1], f"position_encoding='{encoding}' has no positions beyond block_size={T}"
    fitting = tuple(k for k in MULTIPLES if k == 1 or k * T < len(dataset.val))
    return fitting, "" if fitting == MULTIPLES else f"the validation split has {len(dataset.val):,} tokens"


def measure_loss(model, dataset, n_tokens, progress=lambda done: None):
    """{(part, group): Tally} of a causal model over about `n_tokens` of the validation split.

    Windows as long as the longest context are spread evenly over the split; for each multiple they are cut into pieces,
    so that all see the same targets and only the context differs.

    Args:
        progress: called with the share of the windows that is done.
    """
    T, (multiples, _) = model.config.block_size, multiples_for(model, dataset)
    longest = T * multiples[-1]
    validation = ValidationSet(dataset, longest, max(1, n_tokens // longest))
    ranks, groups, was_training = token_ranks(dataset), defaultdict(Tally), model.training
    model.eval()
    for number in range(len(validation)):
        window = validation.windows_at(np.array([number]))
        for k in multiples:
            inputs, targets = (window[name].reshape(-1, k * T) for name in ("inputs", "targets"))  # (B, k T)
            nats = target_nats(model, inputs, targets)
            labels = {"context": np.full(nats.shape, f"{k}x")}
            if k == multiples[-1]:
                labels["position"] = np.broadcast_to(position_labels(k * T), nats.shape)
            if k == 1:
                labels["whole"] = np.full(nats.shape, "all")
                labels["recall"] = np.where(seen_before(inputs.numpy(), targets.numpy()), "seen", "new")
                labels["frequency"] = rank_labels(ranks[targets.numpy()])
            for part, names in labels.items():
                add(groups, part, names, nats, targets.numpy(), dataset.token_bytes)
        progress((number + 1) / len(validation))
    model.train(was_training)
    return {key: groups[key] for key in sorted(groups, key=place_of_group)}


def place_of_group(key):
    """Parts in the order of the module's table, their groups by the first number in the name, 'never' last."""
    part, group = key
    digits = re.search(r"\d+", group)
    return PARTS.index(part), int(digits[0]) if digits else math.inf, group


def add(groups, part, names, nats, targets, token_bytes):
    for name in np.unique(names):
        chosen, tally = names == name, groups[part, str(name)]
        tally.nats += float(nats[chosen].sum())
        tally.targets += int(chosen.sum())
        tally.n_bytes += 0 if token_bytes is None else int(token_bytes[targets[chosen]].sum())


@torch.no_grad()
def target_nats(model, inputs, targets):
    """(B, T) float64 array: -log p of each target, given the inputs up to its place."""
    device, rows = model.head.weight.device, max(1, BATCH_TOKENS // inputs.size(1))
    nats = []
    for start in range(0, len(inputs), rows):
        hidden = model.hidden_states(inputs[start : start + rows].to(device)).flatten(0, 1)  # (B T, C)
        of_rows = targets[start : start + rows].to(device).flatten()
        nats += [
            F.cross_entropy(model.logits(piece).float(), wanted, reduction="none").cpu()
            for piece, wanted in zip(hidden.split(HEAD_TOKENS), of_rows.split(HEAD_TOKENS), strict=True)
        ]
    return torch.cat(nats).double().view(inputs.shape).numpy()


# ---- what a target is ------------------------------------------------------------------------------------------------


def position_labels(T):
    """(T,) array of '1', '2-3', '4-7', ...: how many tokens stand before a target, itself not counted."""
    lows = 2 ** np.floor(np.log2(np.arange(1, T + 1))).astype(np.int64)
    highs = np.minimum(2 * lows - 1, T)
    return np.array([f"{low}" if low == high else f"{low}-{high}" for low, high in zip(lows, highs, strict=True)])


def seen_before(inputs, targets):
    """(B, T) truths: whether (the token before, target) stood side by side earlier in the same window."""
    seen = np.zeros(inputs.shape, dtype=bool)
    for row, pairs in enumerate(inputs.astype(np.int64) << 32 | targets):
        _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        seen[row] = first[inverse] < np.arange(len(pairs))
    return seen


def token_ranks(dataset):
    """(V,) array: 1 for the most frequent token of the training split, 0 for one that is not there."""
    counts = np.bincount(np.asarray(dataset.train[:COUNTED_TOKENS], dtype=np.int64), minlength=dataset.vocab_size)
    ranks = np.zeros(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return np.where(counts > 0, ranks, 0)


def rank_labels(ranks):
    """'1-10', '11-100', ... and 'over 10000' of ranks; 'never' for 0."""
    lows = (0, *RANKS)
    names = ["never", *(f"{low + 1}-{high}" for low, high in zip(lows, RANKS, strict=False)), f"over {RANKS[-1]}"]
    return np.array(names)[np.searchsorted(np.array(lows), ranks, side="left")]
