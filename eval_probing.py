"""Ask a model that is there a probe: one that was trained on it, or zero-shot any that writes from left to right.

asked = read_probe("mqar+n_pairs=8")                               # as `evaluate.py --probes` takes it
result = ask_probe(model, asked, n_examples=1024, vocab_size=257)
result.accuracy, asked.probe.chance
"""

from dataclasses import dataclass

import numpy as np
import torch

from configurator import parse_value
from eval_probes import Draws, Probe, make_probe
from model_config import IGNORE_INDEX
from registry import options_of
from training_corpora import PROBE_REGISTRY
from user_errors import UserError

BATCH_TOKENS = 2**13  # that a forward pass reads
HEAD_TOKENS = 2**10  # whose logits are held at a time


@dataclass(frozen=True)
class Asked:
    """A probe as a command line names it: 'mqar+n_pairs=8+block_size=128'."""

    text: str
    probe: Probe
    block_size: int | None  # None is the model's own


def read_probe(text):
    """Asked of 'name+option=value'.

    Raises:
        UserError: no such probe, an option that it does not have, a wrong value.
    """
    kind, *words = text.split("+")
    known, values = {"block_size", *options_of(PROBE_REGISTRY[kind])} - {"solved_at"}, {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise UserError(f"probe '{text}': {word!r} is no option of {kind}; it has {', '.join(sorted(known))}")
        values[name] = parse_value(name, value)
    block_size = values.pop("block_size", None)
    if block_size is not None and block_size < 1:
        raise UserError(f"probe '{text}': block_size={block_size} must be at least 1")
    try:
        return Asked(text, make_probe(kind, **values), block_size)
    except UserError as error:
        raise UserError(f"probe '{text}': {error}") from None


@dataclass
class ProbeResult:
    """How a model did on a probe."""

    asked: Asked
    block_size: int
    is_zero_shot: bool
    answers: np.ndarray  # (T,) answers that were due at each place, over all examples
    correct: np.ndarray  # (T,) those that were right

    @property
    def accuracy(self):
        return self.correct.sum() / self.answers.sum()


def ask_probe(model, asked, n_examples, vocab_size, own=None):
    """ProbeResult of a causal model on the first examples of the probe's validation split.

    A model that was trained on the probe (`own`) has to find the answer among all of its tokens. Any other is asked
    zero-shot: in each example the symbols are other tokens, drawn from the model's vocabulary, and of those that an
    answer may be the likeliest counts, so that chance is the probe's.

    Args:
        vocab_size: tokens that the model knows.
        own: the probe that the model was trained on, or None.

    Raises:
        UserError: a probe that this model cannot be asked.
    """
    check_can_ask(model, asked, vocab_size, own)
    probe, T = asked.probe, asked.block_size or model.config.block_size
    is_own = own is not None and own.kind == probe.kind
    answers, correct = np.zeros(T, dtype=np.int64), np.zeros(T, dtype=np.int64)
    rows, was_training = max(1, BATCH_TOKENS // T), model.training
    model.eval()
    for start in range(0, n_examples, rows):
        draws = Draws("val", np.arange(start, min(start + rows, n_examples)))
        inputs, targets = probe.examples(draws, T)
        symbols = None
        if not is_own:
            symbols = draws.distinct("tokens", vocab_size, probe.vocab_size)  # (B, V): the token of each symbol
            inputs = np.take_along_axis(symbols, inputs, axis=1)
        is_due = targets != IGNORE_INDEX  # (B, T)
        said = answers_of(model, torch.from_numpy(inputs), torch.from_numpy(is_due), symbols, probe.answers)
        answers += is_due.sum(0)
        correct += (said == targets).sum(0)
    model.train(was_training)
    return ProbeResult(asked, T, not is_own, answers, correct)


def check_can_ask(model, asked, vocab_size, own):
    """Refuse, in a sentence, what this model cannot be asked; its weights are not read."""
    probe, T, limit = asked.probe, asked.block_size or model.config.block_size, model.context_limit()
    probe.check_block_size(T)
    if model.position_embedding is not None and limit < T:
        raise UserError(
            f"probe '{asked.text}' has block_size={T}, and position_encoding='{model.config.position_encoding}' has no "
            f"positions beyond {limit}"
        )
    if own is not None and (own.kind != probe.kind or own.vocab_size != probe.vocab_size):
        raise UserError(
            f"probe '{asked.text}' has other symbols than dataset '{own.name}', which the run was trained on"
        )
    if own is None and not probe.is_zero_shot:
        able = ", ".join(name for name, part in PROBE_REGISTRY.items() if part.is_zero_shot)
        raise UserError(
            f"probe '{asked.text}' can only be asked of a run that was trained on it (--dataset={probe.kind}); "
            f"any run may be asked {able}"
        )
    if own is None and vocab_size < probe.vocab_size:
        raise UserError(
            f"probe '{asked.text}' has {probe.vocab_size} symbols and the run's vocabulary {vocab_size}; "
            "ask with fewer, such as n_values=16"
        )


@torch.no_grad()
def answers_of(model, inputs, is_due, symbols, answers):
    """(B, T) int64 array: what the model answers where an answer is due, as a symbol of the probe; -1 elsewhere.

    The head reads those places alone, HEAD_TOKENS at a time: it is most of the work and the memory where a vocabulary
    is large.

    Args:
        is_due: (B, T) truths.
        symbols: (B, V) the token that stands for each symbol, or None where tokens are the symbols.
        answers: range of the symbols that an answer may be.
    """
    device, n = model.head.weight.device, int(is_due.sum(1).max())
    places = is_due.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (B, K): those due, then fillers
    hidden = model.hidden_states(inputs.to(device), places=places.to(device)).flatten(0, 1)  # (B K, C)
    if symbols is None:
        said = [model.logits(piece).float().cpu().argmax(-1) for piece in hidden.split(HEAD_TOKENS)]
    else:
        tokens = torch.from_numpy(symbols[:, answers.start : answers.stop]).repeat_interleave(n, dim=0)  # (B K, A)
        said = [
            answers.start + model.logits(piece).float().gather(1, own.to(device)).cpu().argmax(-1)
            for piece, own in zip(hidden.split(HEAD_TOKENS), tokens.split(HEAD_TOKENS), strict=True)
        ]
    found = torch.full(inputs.shape, -1).scatter_(1, places, torch.cat(said).view(places.shape))
    return torch.where(is_due, found, -1).numpy()
