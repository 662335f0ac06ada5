"""Predicting the winner: loss and gradients, scores against plain loops, and runs that learn what can be known."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compare_architectures
import evaluate
import sample
from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT, parameter_plan
from model_config import IGNORE_INDEX
from model_flops import flops_per_token
from model_helpers import scrambled
from training_checkpoint import load_model, save_checkpoint
from training_config import TrainConfig
from training_helpers import assert_same_run, book, read_json, rows, summary, weights, workshop, write_games
from training_objectives import OBJECTIVE_REGISTRY, CausalLM
from training_weights import whole_weights
from training_win import N_BINS, N_STAGES, win_scores, win_sums
from user_errors import UserError

LMPlusWin = OBJECTIVE_REGISTRY["lm_plus_win"]
LENGTHS = (16, 9, 1, 5)  # supervised places of each row


def batch_of(T=16, vocab_size=29):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocab_size, (len(LENGTHS), T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, n in enumerate(LENGTHS):
        targets[row, n:] = IGNORE_INDEX
    chances = torch.rand(len(LENGTHS), T, generator=generator)
    outcomes = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return {"inputs": tokens[:, :-1], "targets": targets, "outcomes": outcomes, "chances": chances}


@pytest.fixture
def build(tiny):
    def objective(lambda_wp=0.7, train=(), **changes):
        model = scrambled(ConfigurableGPT(tiny(**changes), heads=LMPlusWin.heads)).double()
        return LMPlusWin(model, TrainConfig(part_options={"lambda_wp": lambda_wp}, **dict(train)))

    return objective


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_wp", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("elements", [100, 2**24], ids=["chunked", "whole"])
def test_the_loss_is_the_two_cross_entropies_and_so_are_gradients(build, lambda_wp, elements):
    objective, batch = build(lambda_wp, {"loss_chunk_elements": elements}), batch_of()
    model, parameters = objective.model, list(objective.parameters())
    hidden = model.hidden_states(batch["inputs"])
    lm = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE_INDEX)
    won = model.heads["win"](hidden)[..., 0]
    y = batch["outcomes"][:, None].expand(-1, 16).double()
    each = [F.binary_cross_entropy_with_logits(won[row, :n], y[row, :n], reduction="sum")
            for row, n in enumerate(LENGTHS)]  # fmt: skip
    expected = lm + lambda_wp * sum(each) / sum(LENGTHS)
    sums = objective(batch)
    assert sums["tokens"] == sum(LENGTHS)
    torch.testing.assert_close(sums["nats"] / sums["tokens"], expected.detach(), rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(sums["loss"] / sums["tokens"], parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for (name, _), one, other in zip(objective.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)
        assert (one.abs().sum() > 0) == (not name.startswith("model.heads") or lambda_wp > 0), name


def test_padding_changes_nothing(build):
    objective, batch = build(), batch_of()
    other = {**batch, "inputs": batch["inputs"].clone(), "chances": batch["chances"].clone()}
    for row, n in enumerate(LENGTHS):
        other["inputs"][row, n:] = 3
        other["chances"][row, n:] = 0.9
    objective.eval()
    one, two = objective(batch), objective(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one if name != "counts")


def test_micro_batches_add_up_to_one_big_batch(build):
    objective, batch = build(), batch_of()
    objective.eval()
    whole = objective(batch)
    parts = [objective({name: tensor[rows_] for name, tensor in batch.items()}) for rows_ in (slice(0, 1), slice(1, 4))]
    for name in whole.keys() - {"counts"}:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", sorted(MIXER_REGISTRY))
def test_every_causal_mixer_can_carry_it(tiny, mixer):
    options = {"position_encoding": "none", "block_pattern": mixer, "n_layer": 1}
    model = ConfigurableGPT(tiny(**options), heads=LMPlusWin.heads)
    sums = LMPlusWin(model, TrainConfig())(batch_of())
    sums["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.heads["win"].weight.grad.abs().sum() > 0


def test_heads_leave_all_other_weights_as_they_are_and_are_counted(tiny):
    plain, headed = ConfigurableGPT(tiny(), 5), ConfigurableGPT(tiny(), 5, {"win": 1})
    own = dict(headed.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, own.pop(name)), name
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        "heads.win.weight": (1, headed.config.n_embd), "heads.win.bias": (1,)
    }  # fmt: skip
    assert own["heads.win.weight"].std() > 0 and own["heads.win.bias"] == 0
    assert {spec.group for spec in parameter_plan(headed)} - {spec.group for spec in parameter_plan(plain)} == {"heads"}
    more = flops_per_token(headed).forward - flops_per_token(plain).forward
    assert more == 2 * headed.config.n_embd + 2


def test_a_model_without_heads_reads_the_rest_of_a_checkpoint(tiny, tmp_path):
    headed = scrambled(ConfigurableGPT(tiny(), heads={"win": 1}))
    folder = save_checkpoint(tmp_path, whole_weights(headed), {}, {"global_step": 1})
    plain = ConfigurableGPT(tiny())
    load_model(plain, folder)
    own = headed.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.state_dict().items())
    bare = save_checkpoint(tmp_path, whole_weights(plain), {}, {"global_step": 2})
    with pytest.raises(UserError, match=r"another architecture: heads\.win"):
        load_model(headed, bare)


@pytest.mark.parametrize("lambda_wp", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(build, lambda_wp):
    with pytest.raises(UserError, match="lambda_wp="):
        build(lambda_wp)


# ---- scores ----------------------------------------------------------------------------------------------------------


def plain_scores(logits, batch):
    """The same numbers, place by place, in Python."""
    n, loss, right, brier, gap, entropy, best = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    bins, stages = [[] for _ in range(N_BINS)], [[] for _ in range(N_STAGES)]
    for row, length in enumerate(LENGTHS):
        y = batch["outcomes"][row].item()
        for t in range(length):
            p, q = 1 / (1 + math.exp(-logits[row, t].item())), batch["chances"][row, t].item()
            n += 1
            loss -= math.log(p if y else 1 - p)
            right += (p > 0.5) == (y == 1)
            brier += (p - y) ** 2
            gap += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            entropy -= q * math.log(q) + (1 - q) * math.log(1 - q)
            best += (q > 0.5) == (y == 1)
            bins[min(N_BINS - 1, int(p * N_BINS))].append((p, y))
            stages[t * N_STAGES // length].append((p > 0.5) == (y == 1))
    ece = sum(abs(sum(p for p, _ in each) - sum(y for _, y in each)) for each in bins) / n
    return {
        "wp_acc": right / n, "wp_brier": brier / n, "wp_ece": ece, "wp_gap": gap / n,
        "best_loss": entropy / n, "best_acc": best / n, "counts": [len(each) for each in bins],
        "stages": [sum(each) / len(each) for each in stages],
    }  # fmt: skip


def as_numbers(sums):
    return {name: value.tolist() for name, value in sums.items()} | {"tokens": sum(LENGTHS)}


def test_scores_are_what_plain_loops_find():
    batch = batch_of()
    logits = 3 * torch.randn(len(LENGTHS), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outcomes = batch["outcomes"][:, None].expand_as(logits)
    found = win_scores(as_numbers(win_sums(logits, outcomes, batch["targets"] != IGNORE_INDEX, batch["chances"])))
    expected = plain_scores(logits, batch)
    for name in ("wp_acc", "wp_brier", "wp_ece", "wp_gap"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    assert found["wp_best"]["loss"] == pytest.approx(expected["best_loss"], abs=1e-6)
    assert found["wp_best"]["acc"] == pytest.approx(expected["best_acc"])
    assert list(found["wp_acc_by_stage"].values()) == pytest.approx(expected["stages"])
    assert list(found["wp_acc_by_stage"]) == ["0-20%", "20-40%", "40-60%", "60-80%", "80-100%"]
    assert found["wp_reliability"]["count"] == expected["counts"]


def test_whoever_knows_the_chances_has_no_gap_and_others_have():
    batch = batch_of()
    is_supervised, outcomes = batch["targets"] != IGNORE_INDEX, batch["outcomes"][:, None].expand(-1, 16)
    logits = torch.logit(batch["chances"].double())
    known = win_scores(as_numbers(win_sums(logits, outcomes, is_supervised, batch["chances"])))
    assert known["wp_gap"] == pytest.approx(0.0, abs=1e-6)
    assert [known[f"wp_{name}"] for name in ("acc", "brier", "ece")] == pytest.approx(
        [known["wp_best"][name] for name in ("acc", "brier", "ece")], abs=1e-6
    )
    assert known["wp_acc_by_stage"] == pytest.approx(known["wp_best_acc_by_stage"])
    even = win_scores(as_numbers(win_sums(torch.zeros(4, 16), outcomes, is_supervised, batch["chances"])))
    assert even["wp_gap"] == pytest.approx(math.log(2) - even["wp_best"]["loss"], abs=1e-6) and even["wp_gap"] > 0.05
    assert even["wp_acc"] == 0.5 and even["wp_reliability"]["count"][5] == sum(LENGTHS)
    assert even["wp_reliability"]["predicted"] == [None] * 5 + [0.5] + [None] * 4


def test_without_the_truth_there_is_no_gap():
    batch = batch_of()
    outcomes = batch["outcomes"][:, None].expand(-1, 16)
    scores = win_scores(as_numbers(win_sums(torch.zeros(4, 16), outcomes, batch["targets"] != IGNORE_INDEX)))
    assert not {"wp_gap", "wp_best", "wp_best_acc_by_stage"} & scores.keys()


# ---- runs ------------------------------------------------------------------------------------------------------------

WIN = ("--dataset=games", "--objective=lm_plus_win", "--dropout=0.0")


@pytest.fixture
def games(workshop):
    """The workshop, arguments of a run on records whose outcome the second token tells in 9 of 10."""
    lines = write_games(workshop.folder / "mine.jsonl", 400)
    return (*WIN, f"--data_dir={workshop.folder / 'data'}", f"--input={workshop.folder / 'mine.jsonl'}"), lines


def test_a_run_learns_what_can_be_known_and_keeps_every_score(workshop, games):
    arguments, lines = games
    folder = workshop.run(*arguments, "--max_iters=150", "--eval_interval=150", "--batch_size=16", "--eval_iters=0",
                          "--n_embd=32", "--learning_rate=0.01", "--log_interval=50", "--tensorboard=True")  # fmt: skip
    first, *_, last = rows(folder, "eval")
    assert first["wp_gap"] > 0.1 > 0.02 > last["wp_gap"] > 0 and last["wp_acc"] > 0.8
    chances = np.concatenate([line["chances"][:-1] for line in lines[9::10]])
    entropy = -(chances * np.log(chances) + (1 - chances) * np.log(1 - chances)).mean()
    assert last["wp_best"]["loss"] == pytest.approx(entropy, abs=1e-6)
    assert last["val_loss"] == pytest.approx(last["lm_loss"] + last["wp_loss"], rel=1e-6)
    assert last["perplexity"] == pytest.approx(math.exp(last["lm_loss"])) and last["bits_per_byte"] is None
    assert last["lm_loss"] < 1.6 and abs(last["wp_acc"] - last["wp_best"]["acc"]) < 0.03
    found = summary(folder)
    assert found["wp_acc_by_stage"] == last["wp_acc_by_stage"] and found["wp_reliability"] == last["wp_reliability"]
    assert sum(found["wp_reliability"]["count"]) == sum(len(line["tokens"]) - 1 for line in lines[9::10])
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["wp_loss"]) == last["wp_loss"]
    assert "wp_gap 0.0" in workshop.printed() and list((folder / "tensorboard").iterdir())
    config = read_json(folder / "config.json")
    assert config["parameters"]["groups"]["heads"] == 33
    assert config["resolved"]["scoring"] == {"ranked_by": "final_val_loss", "loss": "lm_loss + 1 wp_loss"}


def test_processed_and_supervised_tokens_are_counted_apart(workshop, games):
    arguments, lines = games
    folder = workshop.run(*arguments, "--batch_size=10", "--epochs=1")
    tokens = read_json(folder / "checkpoint-36" / "metadata.json")["token_metrics"]
    train = [line for i, line in enumerate(lines) if i % 10 != 9]
    assert tokens["total_tokens_processed"] == 36 * 10 * 16 == summary(folder)["tokens_processed"]
    assert tokens["total_tokens_supervised"] == sum(len(line["tokens"]) - 1 for line in train)  # each once
    assert tokens["tokens_per_step"] == 160 and tokens["sequence_length"] == 16
    text, padding = workshop.printed(), 1 - sum(len(line["tokens"]) for line in train) / (360 * 16)
    assert "1.00 epochs" in text and f"{100 * padding:.0f}% of what is processed, never supervised" in text


def test_a_resumed_run_is_the_run_that_was_not_stopped(workshop, games):
    arguments, _ = games
    straight = workshop.run(*arguments, "--dropout=0.1", "--lr_decay_iters=8")
    halved = workshop.run(*arguments, "--dropout=0.1", "--lr_decay_iters=8", "--max_iters=4")
    assert_same_run(straight, workshop.resume(halved, "--max_iters=8"), 8)
    assert "heads.win.weight" in weights(halved, 8)
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", f"--run_name={halved.name}", "--init_from=resume",
                                "--max_iters=12", "--lambda_wp=2.0")  # fmt: skip
    assert "was made with lambda_wp=1.0 and this command says 2.0" in sentence


def test_accumulation_changes_nothing(workshop, games):
    arguments, _ = games
    whole = workshop.run(*arguments, "--batch_size=8")
    halves = workshop.run(*arguments, "--batch_size=2", "--gradient_accumulation_steps=4", "--prefetch_batches=0")
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows(whole, "train")] == pytest.approx(
            [row[name] for row in rows(halves, "train")], abs=1e-5
        )
    for name in ("final_val_loss", "wp_loss", "wp_brier", "wp_gap", "tokens_supervised"):
        assert summary(whole)[name] == pytest.approx(summary(halves)[name], rel=1e-4), name
    assert summary(whole)["stream_hash"] == summary(halves)["stream_hash"]


def test_other_architectures_and_the_plain_objective_read_the_same_records(workshop, games):
    arguments, _ = games
    win = workshop.run(*arguments)
    mamba = workshop.run(*arguments, "--block_pattern=mamba", "--position_encoding=none")
    plain = workshop.run(*arguments, "--objective=causal_lm")
    hashes = {summary(folder)["stream_hash"] for folder in (win, mamba, plain)}
    assert len(hashes) == 1 and "wp_loss" not in summary(plain)
    assert summary(plain)["tokens_supervised"] == summary(win)["tokens_supervised"] < summary(win)["tokens_processed"]


def test_what_cannot_be_is_refused_in_a_sentence(workshop, games):
    arguments, lines = games
    sentence = workshop.refused(*workshop.command("--objective=lm_plus_win"))
    assert "predicts an outcome" in sentence and "has none; use --dataset=games" in sentence
    sentence = workshop.refused(*workshop.command(*arguments, "--block_size=8"))
    longest = next(i for i, line in enumerate(lines) if i % 10 != 9 and len(line["tokens"]) > 9)
    assert f"line {longest + 1} of local file mine.jsonl, has" in sentence and "--block_size=16 or more" in sentence
    assert "causal=False" in workshop.refused(*workshop.command(*arguments, "--causal=False"))
    folder = workshop.run(*arguments, "--sample_tokens=5")
    assert "no sample: the dataset's tokenizer is unknown" in workshop.printed()
    runs = f"--runs_dir={workshop.runs}"
    assert "tokenizer is unknown" in workshop.refused(runs, f"--run_name={folder.name}", main=sample.main)
    for flags in (("--loss",), ()):
        named = (runs, "--run_names", folder.name, f"--prompts={workshop.folder / 'none.json'}", *flags)
        assert workshop.refused(*named, f"--out_dir={workshop.folder / 'out'}", main=evaluate.main)


def test_runs_are_ranked_within_one_weight_and_shown_by_their_scores(workshop, games):
    arguments, _ = games
    for name, more in {"even": (), "later": ("--learning_rate=0.001",), "half": ("--lambda_wp=0.5",),
                       "plain": ("--objective=causal_lm",)}.items():  # fmt: skip
        workshop.run(*arguments, *more, name=name)
    workshop.printed()
    out = workshop.folder / "out"
    compare_architectures.main([f"--runs_dir={workshop.runs}", f"--out_dir={out}", "--no_plots", "--sort=wp_loss"])
    text = workshop.printed()
    assert "NOT COMPARABLE: 3 separate rankings" in text and "win loss" in " ".join(text.split())
    with open(out / "summary_table.csv", encoding="utf-8", newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert table["even"]["ranking"] == table["later"]["ranking"]
    assert len({table[name]["ranking"] for name in ("even", "half", "plain")}) == 3
    for name in ("lm_loss", "wp_loss", "wp_acc", "wp_gap", "wp_ece", "wp_brier"):
        assert float(table["even"][name]) == pytest.approx(summary(workshop.runs / "even")[name], rel=1e-5)
        assert table["plain"][name] == ""
    better = min(("even", "later"), key=lambda name: summary(workshop.runs / name)["wp_loss"])
    assert table[better]["rank"] == "1"
