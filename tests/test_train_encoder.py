"""Training an encoder from end to end: what it learns, hides and counts, and that it is ranked apart."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import math

import pytest

import compare_architectures
from training_helpers import (
    book,
    read_json,
    rows,
    summary,
    workshop,
)

# ---- an encoder -----------------------------------------------------------------------------------------------------

ENCODER = ("--arch_preset=bert", "--objective=masked_lm", "--pseudo_perplexity_tokens=200")


def test_an_encoder_learns_and_keeps_its_own_scores(workshop):
    # Until it attends to the neighbours it knows how often letters come, 3.05 nats, and the shown tenth of the targets.
    folder = workshop.run(
        *ENCODER, "--position_encoding=rope", "--max_iters=700", "--eval_interval=700", "--n_layer=2", "--n_embd=32",
        "--batch_size=16", "--dropout=0.0", "--log_interval=100", "--learning_rate=0.003",
    )  # fmt: skip
    first, *_, last = rows(folder, "eval")
    assert rows(folder, "train")[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    assert last["pseudo_nats"] < 2.5 and last["val_loss"] < 2.5 and last["masked_accuracy"] > 0.3
    assert last["pseudo_perplexity"] == pytest.approx(math.exp(last["pseudo_nats"]))
    assert "pseudo_perplexity" not in first and last["bits_per_byte"] is None and last["perplexity"] is None
    found = summary(folder)
    scores = ("masked_accuracy", "pseudo_nats", "pseudo_perplexity")
    assert [found[name] for name in scores] == [last[name] for name in scores]
    log = read_json(folder / "training_log.json")["training_iterations"]
    assert [row for row in log if row["kind"] == "eval"][-1]["pseudo_perplexity"] == last["pseudo_perplexity"]
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["pseudo_perplexity"]) == last["pseudo_perplexity"]


def test_an_encoder_reads_the_stream_of_every_model_and_counts_what_it_predicts(workshop):
    folder, causal = workshop.run(*ENCODER), workshop.run("--arch_preset=gpt2")
    found, other = summary(folder), summary(causal)
    assert found["stream_hash"] == other["stream_hash"]
    assert found["tokens_processed"] == other["tokens_processed"] == 8 * 4 * 16
    assert found["tokens_supervised"] == 8 * 4 * 2 and other["tokens_supervised"] == 8 * 4 * 16
    config = read_json(folder / "config.json")
    assert config["model_config"]["vocab_size"] == 257 and config["dataset"]["vocab_size"] == 256
    assert config["flops"]["linear"]["head"] == 2 * 257 * 16 * 2 / 16  # two tokens in sixteen go on to the head
    assert config["resolved"]["scoring"] == {"ranked_by": "pseudo_perplexity", "tokens": 200}
    assert read_json(causal / "config.json")["resolved"]["scoring"] == {"ranked_by": "final_val_loss"}


def test_accumulation_changes_no_mask(workshop):
    whole = workshop.run(*ENCODER, "--dropout=0.0", "--batch_size=8")
    halves = workshop.run(*ENCODER, "--dropout=0.0", "--batch_size=4", "--gradient_accumulation_steps=2")
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows(whole, "train")] == pytest.approx(
            [row[name] for row in rows(halves, "train")], abs=1e-5
        )
    for name in ("final_val_loss", "masked_accuracy", "pseudo_perplexity"):
        assert summary(whole)[name] == pytest.approx(summary(halves)[name], rel=1e-4), name


def test_a_resumed_encoder_keeps_what_it_hides(workshop):
    folder = workshop.run(*ENCODER, "--max_iters=4")
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", f"--run_name={folder.name}", "--init_from=resume",
                                "--max_iters=8", "--mask_fraction=0.5")  # fmt: skip
    assert "was made with mask_fraction=0.15 and this command says 0.5" in sentence


def test_an_encoder_is_listed_apart_from_causal_models(workshop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # wide enough for a line of the table
    for name, arguments in {
        "bert": ENCODER, "bert-more": (*ENCODER, "--mask_fraction=0.3", "--learning_rate=0.02"),
        "gpt2": ("--arch_preset=gpt2",),
    }.items():  # fmt: skip
        workshop.run(*arguments, name=name)
    workshop.printed()
    compare_architectures.main([f"--runs_dir={workshop.runs}", f"--out_dir={workshop.folder / 'out'}", "--no_plots"])
    text = workshop.printed()
    assert "NOT COMPARABLE: 2 separate rankings" in text
    assert "masked_lm: bert, bert-more · causal_lm: gpt2" in text
    with open(workshop.folder / "out" / "summary_table.csv", encoding="utf-8", newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert table["bert"]["ranking"] == table["bert-more"]["ranking"] != table["gpt2"]["ranking"]
    better, worse = sorted(("bert", "bert-more"), key=lambda name: summary(workshop.runs / name)["pseudo_perplexity"])
    assert (table[better]["rank"], table[worse]["rank"], table["gpt2"]["rank"]) == ("1", "2", "1")
    assert table["bert"]["bits_per_byte"] == table["gpt2"]["pseudo_perplexity"] == ""
