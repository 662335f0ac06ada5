"""The loss: chunked equals whole equals F.cross_entropy with both gradients, and sums that are divided once."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import training_objectives
from model_builder import ConfigurableGPT, parameter_plan
from model_config import IGNORE_INDEX
from model_helpers import scrambled
from registry import options_of
from training_config import TrainConfig
from training_data import ValidationSet
from training_objectives import (
    OBJECTIVE_REGISTRY,
    CausalLM,
    ChunkedLinearCrossEntropy,
    MaskedLM,
    linear_cross_entropy,
    supervised_tokens,
    validation_scores,
)
from training_place import Place
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


@by_setting
@pytest.mark.parametrize("rows", [1, 5, 13, 99])
def test_with_a_bias_any_chunk_size_equals_cross_entropy(cap, z_loss, rows):
    hidden, weight, targets = problem()
    bias = torch.randn(V, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    ones = torch.cat((hidden, torch.ones(N, 1, dtype=torch.float64)), dim=1)  # a bias is one more column
    results = []
    for loss, nats in (
        linear_cross_entropy(hidden, weight, targets, cap, z_loss, rows * V, bias),
        reference(ones, torch.cat((weight, bias[:, None]), dim=1), targets, cap, z_loss),
    ):
        results.append([loss, nats, *torch.autograd.grad(0.37 * loss, [hidden, weight, bias])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    bias.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, targets, cap, z_loss, rows * V, bias)
    for ours, theirs in zip(torch.autograd.grad(0.37 * loss, [hidden, weight]), results[1][2:4], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_the_gradient_of_the_bias_is_that_of_the_values():
    hidden, weight, targets = problem()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    for elements in (3 * V, 10**6):
        assert torch.autograd.gradcheck(
            lambda b: linear_cross_entropy(hidden, weight, targets, 1.7, 0.3, elements, b)[0],  # noqa: B023
            (bias,),
        )


def test_a_bias_under_bfloat16_autocast_stays_close():
    hidden, weight, targets = problem(torch.float32)
    bias = torch.linspace(-1, 1, V).requires_grad_()
    results = []
    for is_low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            loss, _ = linear_cross_entropy(hidden, weight, targets, 0.0, 0.1, 4 * V, bias)
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight, bias])])
    for exact, low in zip(*results, strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


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
    monkeypatch.setattr("torch.nn.functional.linear", lambda h, w, b: sizes.append(len(h) * len(w)) or real(h, w, b))
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


# ---- masked LM ------------------------------------------------------------------------------------------------------

MASK = 28  # the last of 29


@pytest.fixture
def masked(tiny):
    """Make a MaskedLM of a small BERT whose weights are large; train settings and options by name."""

    def objective(dropout=0.0, **train):
        options = {name: train.pop(name) for name in list(train) if name in options_of(MaskedLM)}
        model = scrambled(ConfigurableGPT(tiny(arch_preset="bert", dropout=dropout))).double()
        return MaskedLM(model, TrainConfig(**train, part_options=options))

    return objective


def windows(b=8, t=16, first=0, seed=2):
    """A batch as a stream has it, none of whose tokens is the mask."""
    tokens = torch.randint(MASK, (b, t + 1), generator=torch.Generator().manual_seed(seed))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "window": torch.arange(first, first + b)}


def test_what_is_hidden_is_what_is_asked_for(masked):
    batch, objective = windows(4000), masked(mask_fraction=0.25)
    hidden = objective.prepare(batch, 1337)
    places, targets = hidden["places"], hidden["targets"]
    assert places.shape == targets.shape == (4000, 4) and objective.head_fraction == 4 / 16
    assert (places.diff() > 0).all()  # in order, none twice
    assert torch.equal(targets, batch["inputs"].gather(1, places))
    changed = hidden["inputs"] != batch["inputs"]
    assert not changed.scatter(1, places, False).any(), "a token that is not predicted was changed"
    # 16,000 draws: four standard deviations are below 0.013
    assert torch.bincount(places.flatten(), minlength=16).div(16_000).sub(1 / 16).abs().max() < 0.008
    shown = hidden["inputs"].gather(1, places)
    is_mask, is_kept = shown == MASK, shown == targets
    others = shown[~is_mask & ~is_kept]
    assert abs(is_mask.double().mean() - 0.8) < 0.013
    assert abs(is_kept.double().mean() - (0.1 + 0.1 / 28)) < 0.01
    assert set(others.tolist()) == set(range(MASK))


@pytest.mark.parametrize("options, share", [
    ({"mask_random_fraction": 0.0, "mask_keep_fraction": 0.0}, 1.0),
    ({"mask_random_fraction": 0.0, "mask_keep_fraction": 1.0}, 0.0),
    ({"mask_random_fraction": 1.0, "mask_keep_fraction": 0.0}, 0.0),
], ids=["masks", "kept", "random"])  # fmt: skip
def test_the_shares_reach_all_and_nothing(masked, options, share):
    batch = windows(100)
    hidden = masked(**options).prepare(batch, 1)
    assert (hidden["inputs"] == MASK).sum() == share * hidden["places"].numel()
    assert torch.equal(hidden["inputs"], batch["inputs"]) == (options["mask_keep_fraction"] == 1)


PLACES = [[0, 3], [6, 11], [6, 8]]  # of the first three windows under seed 1337, as first computed


def test_masks_are_a_function_of_seed_and_window_alone(masked):
    objective = masked()
    whole = objective.prepare(windows(8), 1337)
    torch.manual_seed(99)
    np.random.seed(99)
    parts = [objective.prepare({name: rows[i : i + 4] for name, rows in windows(8).items()}, 1337) for i in (0, 4)]
    for name, rows in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), rows), name
    assert not torch.equal(objective.prepare(windows(8), 1338)["places"], whole["places"])
    later = objective.prepare(windows(8, first=8), 1337)  # the same tokens, met again
    assert not torch.equal(later["places"], whole["places"])
    assert whole["places"][:3].tolist() == PLACES, "a resumed run may be on another machine"


def test_where_nothing_was_supervised_nothing_is(masked):
    batch = windows(3)
    batch["targets"] = batch["targets"].clone()
    batch["targets"][1] = IGNORE_INDEX
    hidden = masked().prepare(batch, 1)
    assert (hidden["targets"] == IGNORE_INDEX).sum(1).tolist() == [0, 2, 0]
    assert masked()(hidden)["tokens"] == 4


@pytest.mark.parametrize("elements", [3 * 29, 2**24], ids=["chunked", "whole"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_masked_lm_is_the_cross_entropy_at_the_hidden_places(masked, z_loss, elements):
    objective = masked(z_loss=z_loss, loss_chunk_elements=elements)
    batch = objective.prepare(windows(), 5)
    logits = objective.model(batch["inputs"])[0]  # everywhere
    logits = logits[torch.arange(8)[:, None], batch["places"]].flatten(0, 1)
    batch["targets"][:3] = logits.argmax(-1).view(8, 2)[:3]  # so that some guesses are right
    nats = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")
    (nats + z_loss * logits.logsumexp(-1).square().sum()).backward()
    wanted = [parameter.grad.clone() for parameter in objective.parameters()]
    objective.zero_grad()
    sums = objective(batch)
    sums["loss"].backward()
    torch.testing.assert_close(sums["nats"], nats.detach(), **EXACT)
    for parameter, gradient in zip(objective.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    assert "correct" not in sums
    correct = objective.eval()(batch)["correct"]
    assert correct == (logits.argmax(-1) == batch["targets"].flatten()).sum() and 6 <= correct < 16


def test_two_micro_batches_of_four_are_one_of_eight(masked):
    objective, gradients = masked(), []
    for size in (8, 4):
        objective.zero_grad()
        for part in (objective.prepare(each, 3) for each in in_pieces(windows(8), size)):
            (objective(part)["loss"] / 16).backward()
        gradients.append([parameter.grad.clone() for parameter in objective.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, **EXACT)


def in_pieces(batch, size):
    return [{name: rows[i : i + size] for name, rows in batch.items()} for i in range(0, len(batch["inputs"]), size)]


def test_masked_lm_compiles_as_one_graph_for_every_batch(masked):
    objective, graphs = masked(), []
    compiled = torch.compile(objective, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for first in (0, 8, 16):
        batch = objective.prepare(windows(first=first), 3)
        torch.testing.assert_close(compiled(batch)["loss"], objective(batch)["loss"], **EXACT)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("options, sentence", [
    ({"mask_fraction": 0.0}, r"mask_fraction=0\.0 must lie in \(0, 1\]"),
    ({"mask_fraction": 1.5}, r"mask_fraction=1\.5 must lie"),
    ({"mask_random_fraction": 0.6, "mask_keep_fraction": 0.5}, r"mask_random_fraction=0\.6 and .*_fraction=0\.5"),
    ({"mask_keep_fraction": -0.1}, r"mask_keep_fraction=-0\.1 must be shares"),
    ({"mask_token": 29}, r"mask_token=29 is not in the vocabulary of vocab_size=29"),
    ({"pseudo_perplexity_tokens": -1}, r"pseudo_perplexity_tokens=-1 must be at least 0"),
], ids=str)  # fmt: skip
def test_options_of_masked_lm_that_cannot_be(masked, options, sentence):
    with pytest.raises(UserError, match=sentence):
        masked(**options)


def test_masked_lm_of_a_causal_model_is_refused(tiny):
    with pytest.raises(UserError, match=r"objective='masked_lm'.*causal=True.*causal=False.*'causal_lm'"):
        MaskedLM(ConfigurableGPT(tiny()), TrainConfig())


def test_the_mask_takes_an_id_more_or_one_that_there_is(masked):
    assert CausalLM.extra_tokens(TrainConfig()) == 0
    assert MaskedLM.extra_tokens(TrainConfig()) == 1
    assert MaskedLM.extra_tokens(TrainConfig(part_options={"mask_token": 3})) == 0
    hidden = masked(mask_token=3, mask_random_fraction=0.0).prepare(windows(200), 1)
    assert 0.8 < (hidden["inputs"].gather(1, hidden["places"]) == 3).double().mean() < 0.99
    assert (masked(mask_token=3, mask_random_fraction=1.0, mask_keep_fraction=0.0).prepare(windows(200), 1)["inputs"]
            .gather(1, hidden["places"]) != 3).all()  # fmt: skip


# ---- pseudo-perplexity ----------------------------------------------------------------------------------------------


class Book:
    """A dataset of 16 x 5 + 1 validation tokens."""

    fingerprint, token_bytes, meta = "00", None, {"splits": {"val": {"bytes": None}}}
    val = np.random.RandomState(0).randint(MASK, size=81).astype("<u2")


@pytest.mark.parametrize("batch_size", [1, 3, 80, 100])
def test_pseudo_perplexity_hides_one_token_at_a_time(masked, batch_size):
    objective, validation = masked(dropout=0.3, pseudo_perplexity_tokens=10**6), ValidationSet(Book(), 16)
    scores = validation_scores(objective, validation, batch_size, place(), True)
    objective.eval()
    nats = []
    for window in torch.from_numpy(Book.val[:80].astype("int64")).view(5, 16):
        for t in range(16):  # Salazar et al. 2020, equation 2, word for word
            hidden = window.clone()
            hidden[t] = MASK
            nats.append(-objective.model(hidden[None])[0][0, t].log_softmax(-1)[window[t]].item())
    assert scores["pseudo_nats"] == pytest.approx(sum(nats) / 80, rel=1e-10)
    assert scores["pseudo_perplexity"] == pytest.approx(math.exp(sum(nats) / 80), rel=1e-10)
    assert scores["perplexity"] is None and scores["bits_per_byte"] is None
    assert scores["val_loss"] > 0 and 0 <= scores["masked_accuracy"] <= 1


@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (7, 1), (4, 2), (3, 3)])
def test_the_tokens_scored_are_fixed_however_they_are_split(masked, batch_size, world_size):
    objective, validation, seen = masked(), ValidationSet(Book(), 16), []
    for rank in range(world_size):
        batches = list(objective.one_at_a_time(validation, 20, batch_size, rank, world_size))
        assert len(batches) == -(-20 // (batch_size * world_size))
        for batch in batches:
            assert batch["inputs"].shape == (batch_size, 16) and batch["targets"].shape == (batch_size, 1)
            supervised = (batch["targets"] != IGNORE_INDEX)[:, 0]
            seen += zip(batch["window"][supervised].tolist(), batch["places"][supervised, 0].tolist(), strict=True)
    assert len(seen) == len(set(seen)) == 20
    one = [(b["window"].item(), b["places"].item()) for b in objective.one_at_a_time(validation, 20, 1)]
    assert set(seen) == set(one) and len({place for _, place in one}) > 8
    fewer = [(b["window"].item(), b["places"].item()) for b in objective.one_at_a_time(validation, 6, 1)]
    assert fewer == one[:6]


@pytest.mark.parametrize("options, is_final, there", [
    ({}, True, True), ({}, False, False), ({"pseudo_perplexity_always": True}, False, True),
    ({"pseudo_perplexity_tokens": 0}, True, False),
], ids=str)  # fmt: skip
def test_when_pseudo_perplexity_is_measured(masked, options, is_final, there):
    scores = validation_scores(masked(**options), ValidationSet(Book(), 16), 4, place(), is_final)
    assert ("pseudo_perplexity" in scores) == there and "masked_accuracy" in scores


def test_validation_masks_are_those_of_every_seed_and_batch_size(masked):
    validation = ValidationSet(Book(), 16)
    one, other = (validation_scores(masked(seed=seed), validation, size, place()) for seed, size in ((1, 5), (2, 3)))
    for name in ("val_loss", "masked_accuracy"):
        assert one[name] == pytest.approx(other[name], rel=1e-12)


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
    return Place(torch.device("cpu"), "float32", tf32=False)


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
