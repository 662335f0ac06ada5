"""eval_loss.py: the parts of a loss add up, and each target is in the group that it belongs to."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval_loss import (
    measure_loss,
    multiples_for,
    position_labels,
    rank_labels,
    seen_before,
    target_nats,
    token_ranks,
)
from model_builder import ConfigurableGPT
from training_config import TrainConfig
from training_data import ValidationSet
from training_objectives import OBJECTIVE_REGISTRY, summed
from training_place import find_place
from user_errors import UserError

V, T = 29, 8


@pytest.fixture
def dataset():
    """1,200 tokens, the rare ones rare, and tokens 27 and 28 nowhere in training."""
    rng = np.random.default_rng(1)
    train, val = np.minimum(rng.geometric(0.2, 1200), 26), np.minimum(rng.geometric(0.15, 40 * T + 3), V - 1)
    return SimpleNamespace(train=train, val=val, vocab_size=V, fingerprint="f", token_bytes=np.arange(V) % 3 + 1)


@pytest.fixture(params=["rope", "alibi", "window", "mamba", "gru"])
def model(request, tiny):
    changes = {
        "rope": {"position_encoding": "rope"},
        "alibi": {"position_encoding": "alibi"},
        "window": {"position_encoding": "rope", "sliding_window": 3},
        "mamba": {"block_pattern": "mamba", "position_encoding": "none"},
        "gru": {"block_pattern": "gru", "position_encoding": "none"},
    }[request.param]
    return ConfigurableGPT(tiny(block_size=T, **changes), seed=2)


def test_each_target_is_scored_as_by_a_forward_of_its_own(model):
    idx = torch.randint(0, V, (3, 2 * T + 1))
    nats = target_nats(model.eval(), idx[:, :-1], idx[:, 1:])
    for row in range(3):
        for t in (0, 1, T, 2 * T - 1):
            logits = model(idx[row : row + 1, : t + 1])[0][0, -1].double()
            assert nats[row, t] == pytest.approx((logits.logsumexp(0) - logits[idx[row, t + 1]]).item(), abs=2e-5)


def test_at_the_training_context_it_is_the_loss_of_the_objective(model, dataset):
    groups = measure_loss(model, dataset, n_tokens=10_000)  # the whole split: 5 windows of 8 contexts
    validation = ValidationSet(dataset, T)
    validation.starts, validation.target_bytes = validation.starts[:40], lambda targets: 0
    objective = OBJECTIVE_REGISTRY["causal_lm"](model, TrainConfig())
    sums = summed(objective, validation.batches(4), validation, find_place(TrainConfig(device="cpu", threads=1)))
    assert groups["whole", "all"].targets == 40 * T
    assert groups["whole", "all"].loss == pytest.approx(objective.scores(sums)["val_loss"], abs=1e-5)


def test_the_parts_add_up(model, dataset):
    groups = measure_loss(model, dataset, n_tokens=200)

    def total(part):
        chosen = [tally for key, tally in groups.items() if key[0] == part]
        return [sum(getattr(tally, name) for tally in chosen) for name in ("nats", "targets", "n_bytes")]

    assert [key for key in groups if key[0] == "context"] == [("context", f"{k}x") for k in (1, 2, 4, 8)]
    for part in ("recall", "frequency"):
        assert total(part) == pytest.approx(total("whole"))
    longest = groups["context", "8x"]
    assert total("position") == pytest.approx([longest.nats, longest.targets, longest.n_bytes])
    counts = {(groups["context", f"{k}x"].targets, groups["context", f"{k}x"].n_bytes) for k in (1, 2, 4, 8)}
    assert len(counts) == 1  # the same targets, whatever the context
    assert groups["context", "1x"].nats == pytest.approx(groups["whole", "all"].nats)
    assert groups["position", "32-63"].targets == 32 * 3 and groups["position", "1"].targets == 3


def test_where_the_context_does_not_matter_the_losses_are_equal(tiny, dataset):
    model = ConfigurableGPT(tiny(block_size=T, block_pattern="gru", position_encoding="none"))
    for block in model.blocks:
        for parameter in block.parameters():
            if parameter.dim() > 1:
                torch.nn.init.zeros_(parameter)  # nothing is written to the residual stream: a bigram model
    groups = measure_loss(model, dataset, n_tokens=10_000)
    assert {round(groups["context", f"{k}x"].loss, 5) for k in (1, 2, 4, 8)} == {round(groups["whole", "all"].loss, 5)}


def test_pairs_seen_before_as_found_by_looking(dataset):
    rows = dataset.val[: 6 * 20].reshape(6, 20)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    found = seen_before(inputs, targets)
    for row in range(6):
        pairs = list(zip(inputs[row], targets[row], strict=True))
        assert found[row].tolist() == [pair in pairs[:t] for t, pair in enumerate(pairs)]
    assert found.any() and not found.all()


def test_groups_by_position_and_by_rank():
    assert position_labels(9).tolist() == ["1", *["2-3"] * 2, *["4-7"] * 4, *["8-9"] * 2]
    assert position_labels(8)[-1] == "8"
    ranks = np.array([0, 1, 10, 11, 100, 101, 1000, 1001, 10_000, 10_001])
    assert rank_labels(ranks).tolist() == [
        "never", "1-10", "1-10", "11-100", "11-100", "101-1000", "101-1000", "1001-10000", "1001-10000", "over 10000",
    ]  # fmt: skip


def test_ranks_are_of_the_training_split(dataset):
    dataset.train = np.array([5, 5, 5, 2, 2, 7])
    ranks = token_ranks(dataset)
    assert (ranks[5], ranks[2], ranks[7]) == (1, 2, 3) and ranks.sum() == 6


def test_a_context_that_cannot_be_read_is_left_out_with_a_word(tiny, dataset):
    learned = ConfigurableGPT(tiny(block_size=T, position_encoding="learned_absolute"))
    multiples, why = multiples_for(learned, dataset)
    assert multiples == (1,) and "position_encoding='learned_absolute' has no positions beyond block_size=8" in why
    assert [key for key in measure_loss(learned, dataset, 100) if key[0] == "context"] == [("context", "1x")]
    dataset.val = dataset.val[: 5 * T]
    multiples, why = multiples_for(ConfigurableGPT(tiny(block_size=T, position_encoding="rope")), dataset)
    assert multiples == (1, 2, 4) and "the validation split has 40 tokens" in why
    dataset.val = dataset.val[:T]
    with pytest.raises(UserError, match="the validation split has 8 tokens"):
        measure_loss(learned, dataset, 100)
