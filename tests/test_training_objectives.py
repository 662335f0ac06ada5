"""The loss: chunked equals whole equals F.cross_entropy with both gradients, and sums that are divided once."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import training_objectives
from model_builder import ConfigurableGPT, parameter_plan
from training_config import TrainConfig
from training_objectives import (
    IGNORE_INDEX,
    OBJECTIVE_REGISTRY,
    CausalLM,
    ChunkedLinearCrossEntropy,
    linear_cross_entropy,
    supervised_tokens,
    validation_scores,
)
from user_errors import UserError

EXACT = {"rtol": 1e-11, "atol": 1e-11}
N, C, V = 13, 6, 11


def problem(dtype=torch.float64, ignored=(0, 4, 5, 12)):
    """Hidden states (N, C), weights (V, C) and targets (N,), some of them not supervised."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[list(ignored)] = IGNORE_INDEX
    return hidden, weight, targets


def reference(hidden, weight, targets, cap=0.0, z_loss=0.0):
    """F.cross_entropy of the logits, and the rest as its paper has it."""
    logits = hidden @ weight.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    supervised = targets != IGNORE_INDEX
    return nats + z_loss * logits[supervised].exp().sum(-1).log().square().sum(), nats


def with_gradients(function, hidden, weight, targets, *args, scale=0.37):
    loss, nats = function(hidden, weight, targets, *args)
    return [loss, nats, *torch.autograd.grad(loss * scale, [hidden, weight])]


# ---- cross-entropy of a linear head ---------------------------------------------------------------------------------

SETTINGS = {"plain": (0.0, 0.0), "cap": (1.7, 0.0), "z": (0.0, 0.3), "cap-z": (1.7, 0.3)}
by_setting = pytest.mark.parametrize("cap, z_loss", SETTINGS.values(), ids=SETTINGS)


@by_setting
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 99])  # 13 rows: most do not divide them
def test_any_chunk_size_equals_cross_entropy(cap, z_loss, rows):
    got = with_gradients(linear_cross_entropy, *problem(), cap, z_loss, rows * V)
    wanted = with_gradients(reference, *problem(), cap, z_loss)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@by_setting
def test_gradients_are_those_of_the_values(cap, z_loss):
    hidden, weight, targets = problem()
    for elements in (3 * V, 10**6):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_cross_entropy(h, w, targets, cap, z_loss, elements)[0],  # noqa: B023
            (hidden, weight),
        )


def test_less_than_a_row_at_a_time_still_works():
    got, wanted = linear_cross_entropy(*problem(), chunk_elements=1), reference(*problem())
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("elements", [2 * V, 10**6], ids=["chunked", "whole"])
def test_nothing_supervised_costs_nothing(elements):
    hidden, weight, targets = problem(ignored=range(N))
    loss, _, *gradients = with_gradients(linear_cross_entropy, hidden, weight, targets, 0.0, 0.3, elements)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("elements", [2 * V, 10**6], ids=["chunked", "whole"])
def test_large_logits_do_not_overflow(elements):
    hidden, weight, targets = problem(torch.float32)
    hidden = (200 * hidden).detach().requires_grad_()
    results = with_gradients(linear_cross_entropy, hidden, weight, targets, 0.0, 0.1, elements)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_is_right(frozen):
    hidden, weight, targets = problem()
    wanted = with_gradients(reference, hidden, weight, targets)[2:]
    side, other = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    other.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_elements=2 * V)
    (0.37 * loss).backward()
    torch.testing.assert_close(side.grad, wanted[frozen == "hidden"], **EXACT)
    assert other.grad is None


def test_logits_in_memory_stay_below_the_limit(monkeypatch):
    sizes = []
    real = F.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda h, w: sizes.append(len(h) * len(w)) or real(h, w))
    linear_cross_entropy(*problem(), chunk_elements=4 * V + 3)
    assert sizes == [4 * V, 4 * V, 4 * V, V]
    sizes.clear()
    linear_cross_entropy(*problem(), chunk_elements=N * V)
    assert sizes == [N * V], "all fit, and were formed in pieces"


@by_setting
@pytest.mark.parametrize("elements", [4 * V, 10**6], ids=["chunked", "whole"])
def test_under_bfloat16_autocast_it_stays_close(cap, z_loss, elements):
    wanted = with_gradients(reference, *problem(), cap, z_loss)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(linear_cross_entropy, *problem(torch.float32), cap, z_loss, elements)
    assert all(result.dtype == torch.float32 for result in got)
    for ours, theirs in zip(got, wanted, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * scale)


def test_the_sum_is_kept_in_float32_when_the_weights_are_bfloat16():
    hidden, weight, targets = problem(torch.bfloat16)
    for elements in (4 * V, 10**6):
        loss, nats = linear_cross_entropy(hidden, weight, targets, 0.0, 0.1, elements)
        assert loss.dtype == nats.dtype == torch.float32
        gradients = torch.autograd.grad(loss, [hidden, weight])
        assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


# ---- the objective --------------------------------------------------------------------------------------------------


def batch_of(b=4, t=16, supervised=1.0, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(29, (b, t + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(b, t, generator=generator) > supervised] = IGNORE_INDEX
    return {"inputs": tokens[:, :-1], "targets": targets}


@pytest.fixture
def build(tiny):
    def objective(train=(), **changes):
        torch.manual_seed(3)
        model = ConfigurableGPT(tiny(**changes)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return CausalLM(model, TrainConfig(**dict(train)))

    return objective


def test_causal_lm_is_registered():
    assert OBJECTIVE_REGISTRY["causal_lm"] is CausalLM


def test_a_model_that_sees_the_next_token_is_refused(build):
    with pytest.raises(UserError, match=r"objective='causal_lm'.*causal=False"):
        build(causal=False)


@pytest.mark.parametrize("elements", [100, 2**24], ids=["chunked", "whole"])
@pytest.mark.parametrize("cap, z_loss", SETTINGS.values(), ids=SETTINGS)
def test_causal_lm_returns_sums(build, cap, z_loss, elements):
    objective = build({"z_loss": z_loss, "loss_chunk_elements": elements}, logit_soft_cap=cap)
    batch = batch_of(supervised=0.6)
    sums = objective(batch)
    logits, mean = objective.model(batch["inputs"], batch["targets"])
    supervised = batch["targets"] != IGNORE_INDEX
    assert sums["tokens"] == supervised.sum() == supervised_tokens(batch) and sums["tokens"].dtype == torch.int64
    assert 0 < sums["tokens"] < 64
    torch.testing.assert_close((sums["nats"] / sums["tokens"]).float(), mean)
    penalty = z_loss * logits[supervised].logsumexp(-1).square().sum()
    torch.testing.assert_close(sums["loss"], sums["nats"] + penalty, **EXACT)
    assert not sums["nats"].requires_grad and sums["loss"].requires_grad


def test_large_vocabularies_go_through_in_chunks(build, monkeypatch):
    taken = []
    spy = lambda *args: taken.append(args[-1]) or (args[0].sum(), args[0].sum())  # noqa: E731
    monkeypatch.setattr(ChunkedLinearCrossEntropy, "apply", spy)
    build({"loss_chunk_elements": 10 * 29})(batch_of())
    assert taken == [10]
    build({"loss_chunk_elements": 64 * 29})(batch_of())
    assert taken == [10]


def test_positions_and_documents_reach_the_model(build):
    objective, batch = build(position_encoding="learned_absolute"), batch_of(2)
    packed = {
        **batch,
        "positions": torch.tensor([[*range(9), *range(7)]] * 2),
        "document_ids": torch.tensor([[0] * 9 + [1] * 7] * 2),
    }
    pieces = [{name: batch[name][:, piece] for name in batch} for piece in (slice(9), slice(9, 16))]
    apart = sum(objective(piece)["nats"] for piece in pieces)
    torch.testing.assert_close(objective(packed)["nats"], apart, **EXACT)
    assert not torch.allclose(objective(batch)["nats"], apart)


def test_micro_batches_of_uneven_supervision_give_the_gradient_of_one_big_batch(build):
    # A mean of means would weigh a token by how lonely it is in its micro-batch.
    objective = build({"z_loss": 0.1})
    parts = [batch_of(2, supervised=share, seed=i) for i, share in enumerate((1.0, 0.3, 0.05))]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [int(supervised_tokens(part)) for part in parts]
    assert len(set(counts)) == 3

    sums = objective(whole)
    (sums["loss"] / sums["tokens"]).backward()
    wanted = [parameter.grad.clone() for parameter in objective.parameters()]
    objective.zero_grad()
    for part in parts:  # as train.py does
        (objective(part)["loss"] * (1 / sum(counts))).backward()
    for parameter, gradient in zip(objective.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)


def test_a_tied_head_gathers_both_gradients(build):
    objective, batch = build(), batch_of()
    objective(batch)["loss"].backward()
    ours = [parameter.grad.clone() for parameter in objective.model.parameters()]
    objective.zero_grad()
    logits = objective.model(batch["inputs"])[0]
    F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum").backward()
    for spec, gradient in zip(parameter_plan(objective.model), ours, strict=True):
        wanted = objective.model.get_parameter(spec.name).grad
        torch.testing.assert_close(gradient, wanted, **EXACT, msg=lambda text, spec=spec: f"{spec.name}: {text}")


# ---- validation -----------------------------------------------------------------------------------------------------


class Windows:
    """Validation batches of uneven size and supervision, 3 bytes to a supervised token."""

    def __init__(self, has_bytes=True):
        self.parts = [batch_of(3, supervised=0.9, seed=1), batch_of(1, supervised=0.2, seed=2)]
        self.has_bytes = has_bytes

    def batches(self, batch_size, rank, world_size):
        return iter(self.parts)

    def target_bytes(self, targets):
        return 3 * int((targets != IGNORE_INDEX).sum()) if self.has_bytes else None


def place():
    import contextlib

    return SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1, autocast=contextlib.nullcontext)


def test_validation_divides_once(build):
    objective, windows = build(dropout=0.4), Windows()
    objective.train()
    scores = validation_scores(objective, windows, 3, place())
    assert objective.training
    objective.eval()
    nats = sum(objective(part)["nats"].item() for part in windows.parts)
    tokens = sum(int(supervised_tokens(part)) for part in windows.parts)
    assert scores["val_loss"] == pytest.approx(nats / tokens, rel=1e-12)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-12)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * tokens), rel=1e-12)
    means = [objective(part)["nats"].item() / int(supervised_tokens(part)) for part in windows.parts]
    assert abs(sum(means) / 2 - scores["val_loss"]) > 1e-3, "the batches are too alike to tell"
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_bits_per_byte_are_left_open_where_bytes_are_unknown(build):
    assert validation_scores(build(), Windows(has_bytes=False), 3, place())["bits_per_byte"] is None


def test_sums_over_ranks_come_before_the_division(build, monkeypatch):
    # Another rank with the same windows doubles every sum and changes no score.
    objective, seen = build(), []
    alone = validation_scores(objective, Windows(), 3, place())
    monkeypatch.setattr(training_objectives, "sum_over_ranks", lambda sums, place: seen.append(len(sums)) or 2 * sums)
    assert validation_scores(objective, Windows(), 3, place()) == alone
    assert seen == [3]
