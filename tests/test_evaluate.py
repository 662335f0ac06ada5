"""evaluate.py: which checkpoints it asks, what it leaves behind, and a sentence where it cannot."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import json

import pytest

import compare_architectures
import evaluate
import train
from comparison_evals import KINDS
from eval_loss import Tally
from eval_tasks import LossTask
from training_helpers import Workshop, a_peak, book, files_in, poison, workshop, write_games

PROMPTS = {"defaults": {"category": "words"}, "prompts": [
    {"id": "fox", "prompt": "the quick brown", "answers": ["fox"], "wrong_answers": ["zzzz"], "difficulty": "easy"},
    {"id": "dog", "prompt": "a lazy", "answers": [r"\w"], "match": "regex", "score": 2, "difficulty": "hard"},
    {"id": "no", "prompt": "over", "answers": ["QQQQ"], "match": "prefix", "category": "never"},
]}  # fmt: skip


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    """A Workshop with runs of one kind each, saved at steps 4 and 8; `wide` has twice the batch."""
    shop = Workshop(tmp_path_factory.mktemp("trained"), book)
    saved = ("--checkpoint_interval=4", "--keep_checkpoints=0", "--warmup_iters=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "hardware_peak", a_peak)
        shop.run(*saved, "--tokenizer=byte", name="plain")
        shop.run(*saved, "--arch_preset=mamba", "--tokenizer=char", name="recurrent")
        shop.run(*saved, "--batch_size=8", "--max_iters=4", "--checkpoint_interval=2", name="wide")
    (shop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    return shop


@pytest.fixture
def ask(trained, tmp_path, capsys):
    """Run evaluate.py, and return (folder of results, what it printed)."""

    def run(*arguments, out="out", plots=False):
        evaluate.main([
            f"--runs_dir={trained.runs}", f"--prompts={trained.folder / 'prompts.json'}", "--device=cpu",
            f"--out_dir={tmp_path / out}", "--max_new_bytes=8", *(() if plots else ("--no_plots",)), *arguments,
        ])  # fmt: skip
        return tmp_path / out, capsys.readouterr().out

    for path in trained.runs.glob("*/evals.jsonl"):
        path.unlink()
    return run


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evals(trained, run):
    return [json.loads(line) for line in (trained.runs / run / "evals.jsonl").read_text("utf-8").splitlines()]


def test_every_run_at_its_latest_checkpoint(trained, ask):
    before = files_in(trained.runs)
    out, printed = ask(plots=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "breakdown.png", "category_breakdown.csv", "difficulty_breakdown.csv", "eval_results.csv", "summary_table.csv",
        "summary_table.md",
    ]  # fmt: skip
    rows = table(out / "eval_results.csv")
    assert [(row["run"], row["step"], row["id"]) for row in rows] == [
        (run, step, name) for run, step in (("plain", "8"), ("recurrent", "8"), ("wide", "4"))
        for name in ("fox", "dog", "no")
    ]  # fmt: skip
    assert {row["points"] for row in rows if row["id"] == "no"} == {"0.0"}
    assert "plain" in printed and "[1/3] plain checkpoint-8" in printed and "eval_results.csv" in printed
    after = files_in(trained.runs)
    assert {path for path in after if before.get(path) != after[path]} == {
        str(path.relative_to(trained.runs)) for path in trained.runs.glob("*/evals.jsonl")
    }


def test_the_tables_add_up(trained, ask):
    out, _ = ask("--run_names", "plain")
    rows, (whole,) = table(out / "eval_results.csv"), table(out / "summary_table.csv")
    points, most = (sum(float(row[name]) for row in rows) for name in ("points", "max_points"))
    assert most == 4.0 and float(whole["points"]) == points and float(whole["score"]) == points / most
    for name, expected in (("category", {"words": 2, "never": 1}), ("difficulty", {"easy": 1, "hard": 1, "all": 1})):
        parts = table(out / f"{name}_breakdown.csv")
        assert {part[name]: int(part["prompts"]) for part in parts} == expected
        assert sum(float(part["points"]) for part in parts) == points
    assert f"{100 * points / most:.1f}%" in (out / "summary_table.md").read_text("utf-8")
    assert json.loads(rows[0]["log_probability_per_byte"]).keys() == {"fox", "zzzz"}


def test_a_line_is_appended_for_each_checkpoint(trained, ask):
    path = trained.runs / "plain" / "evals.jsonl"
    path.write_text('{"kind": "other"}\n{"cut of', encoding="utf-8")
    ask("--run_names", "plain", "--all_checkpoints")
    lines = path.read_text("utf-8").splitlines()
    assert lines[:2] == ['{"kind": "other"}', '{"cut of']
    rows = [json.loads(line) for line in lines[2:]]
    assert [(row["step"], row["tokens_processed"], row["checkpoint"]) for row in rows] == [
        (4, 4 * 64, "checkpoint-4"), (8, 8 * 64, "checkpoint-8"),
    ]  # fmt: skip
    assert rows[0]["kind"] == "prompts" and rows[0]["prompts"] == 3
    assert rows[0]["prompt_file"]["name"] == "prompts.json" and len(rows[0]["prompt_file"]["sha256"]) == 64
    assert rows[0]["decoding"]["seed"] == 1337 and rows[0]["categories"]["never"]["score"] == 0


def test_nothing_is_written_over_and_the_same_question_has_the_same_answer(trained, ask, tmp_path):
    sampled = ("--temperature=1", "--num_samples=2")
    first, _ = ask(*sampled)
    ask(*sampled)
    second = tmp_path / "out-2"
    assert (first / "eval_results.csv").read_bytes() == (second / "eval_results.csv").read_bytes()
    ask(*sampled, "--seed=3")
    assert (tmp_path / "out-3" / "eval_results.csv").read_bytes() != (first / "eval_results.csv").read_bytes()
    assert len(json.loads(table(first / "eval_results.csv")[0]["written"])) == 2


@pytest.mark.parametrize("arguments, asked", [
    (["--run_names", "plain", "--checkpoint_step", "4"], [("plain", "4")]),
    (["--run_names", "plain", "--checkpoint", "checkpoint-4"], [("plain", "4")]),
    (["--run_names", "plain", "wide", "--at_tokens", "256"], [("plain", "4"), ("wide", "2")]),
    (["--run_names", "*i*", "--at_tokens=256,512"], [("plain", "4"), ("plain", "8"), ("wide", "2"), ("wide", "4")]),
    (["--run_names", "wide", "--all_checkpoints"], [("wide", "2"), ("wide", "4")]),
], ids=lambda value: " ".join(map(str, value[1:])))  # fmt: skip
def test_which_checkpoints_are_asked(ask, arguments, asked):
    out, _ = ask(*arguments)
    assert [(row["run"], row["step"]) for row in table(out / "summary_table.csv")] == asked


def test_token_counts_that_not_all_share_are_told(ask):
    _, printed = ask("--run_names", "plain", "wide", "--checkpoint_step", "4")
    assert "not all runs are evaluated at these token counts: 256, 512" in printed


def test_a_character_that_a_run_lacks_is_told(trained, ask):
    _, printed = ask("--run_names", "recurrent")
    assert "recurrent: 1 of 3 prompts: failed, for the character 'Q'" in printed


def test_the_score_stands_beside_the_loss(trained, ask, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    arguments = ["plain", "wide", f"--runs_dir={trained.runs}", "--no_plots"]
    compare_architectures.main([*arguments, f"--out_dir={tmp_path / 'before'}"])
    assert "prompt" not in capsys.readouterr().out
    ask("--run_names", "plain", "wide")
    compare_architectures.main([*arguments, f"--out_dir={tmp_path / 'after'}"])
    printed = capsys.readouterr().out
    assert "prompt" in printed and "cannot be held" not in printed
    scores = {row["name"]: float(row["prompt_score"]) for row in table(tmp_path / "after" / "summary_table.csv")}
    assert scores == {run: evals(trained, run)[-1]["score"] for run in ("plain", "wide")}

    ask("--run_names", "plain", "--seed=5", "--temperature=0.5")
    ask("--run_names", "wide", "--checkpoint_step=2")  # older than the latest that has a line: not shown
    compare_architectures.main([*arguments, f"--out_dir={tmp_path / 'mixed'}"])
    assert "prompt scores are of different settings of decoding" in capsys.readouterr().out


def test_the_loss_taken_apart(trained, ask, capsys):
    out, printed = ask("--loss", "--loss_tokens=512", "--run_names", "plain", "wide", plots=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "breakdown.png", "loss_breakdown.csv", "summary_table.md",
    ]  # fmt: skip
    assert (out / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    rows = table(out / "loss_breakdown.csv")
    assert [row["run"] for row in rows if row["part"] == "whole"] == ["plain", "wide"]
    record = evals(trained, "plain")[-1]
    assert record["kind"] == "loss" and record["parts"]["whole"]["all"]["targets"] > 256
    (loss,) = [row["loss"] for row in rows if (row["run"], row["part"], row["group"]) == ("plain", "context", "1x")]
    assert f"{float(loss):.4f}" in printed
    assert "plain: longer contexts were left out: position_encoding='learned_absolute'" in printed


def test_the_loss_of_a_run_on_other_tokens_is_refused(workshop):
    folder = workshop.run("--max_iters=2", name="moved")
    record = json.loads((folder / "config.json").read_text("utf-8"))
    record["dataset"]["fingerprint"] = "another"
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", "--loss", "--device=cpu", main=evaluate.main)
    assert "moved was left out: it was trained on other tokens than" in sentence


@pytest.mark.parametrize("name, value, why", [
    ("blocks.0.mixer_norm.weight", float("nan"), "the weights are not finite"),
    ("final_norm.weight", 3e38, "the logits are not finite"),
])  # fmt: skip
def test_a_run_that_diverged_fails_with_a_word_and_others_are_scored(workshop, name, value, why):
    poison(workshop.run("--max_iters=2", name="diverged"), 2, name, value)
    workshop.run("--max_iters=2", "--seed=2", name="well")
    (workshop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    given = [f"--runs_dir={workshop.runs}", f"--prompts={workshop.folder / 'prompts.json'}", "--device=cpu"]
    workshop.printed()
    evaluate.main([*given, "--max_new_bytes=4"])
    assert f"diverged: 3 of 3 prompts: failed, for {why}" in workshop.printed()
    evaluate.main([*given, "--loss", "--loss_tokens=256", "--out_dir=loss"])
    printed = workshop.printed()
    assert "diverged: its loss is not finite" in printed and "well: its loss" not in printed
    for run in ("diverged", "well"):
        lines = [json.loads(line) for line in (workshop.runs / run / "evals.jsonl").read_text("utf-8").splitlines()]
        loss = lines[1]["parts"]["whole"]["all"]["loss"]
        assert (loss is None) is (run == "diverged") and lines[0]["kind"] == "prompts"
    compare_architectures.main([f"--runs_dir={workshop.runs}", "--out_dir=compared"])


# ---- what it is asked in vain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--run_names", "plian"], ["there is no run 'plian'", "did you mean 'plain'"]),
    (["--run_names", "x*"], ["no run", "matches 'x*'"]),
    (["--runs_dir=nowhere"], ["there is no folder 'nowhere'"]),
    (["--run_names", "plain", "--checkpoint_step=5"], ["no checkpoint at step 5", "4, 8"]),
    (["--run_names", "plain", "--checkpoint=checkpoint-5"], ["no checkpoint at step 5", "4, 8"]),
    (["--checkpoint=best"], ["--checkpoint=best", "such as checkpoint-5000"]),
    (["--checkpoint_step=5"], ["plain was left out", "no checkpoint at step 5", "2 more like it"]),
    (["--run_names", "plain", "--at_tokens=300"], ["no checkpoint at 300 tokens", "256, 512", "--checkpoint_tokens"]),
    (["--at_tokens="], ["--at_tokens= names no token count"]),
    (["--at_tokens=many"], ["--at_tokens=many must be a number of tokens"]),
    (["--checkpoint_step=4", "--all_checkpoints"], ["not allowed with", "--help"]),
    (["--num_samples=3"], ["--num_samples=3 with --temperature=0"]),
    (["--temperature=nan"], ["--temperature=nan must be at least 0"]),
    (["--max_new_bytes=0"], ["--max_new_bytes=0 must be at least 1"]),
    (["--loss", "--loss_tokens=0"], ["--loss_tokens=0 must be at least 1"]),
    (["--top_p=2"], ["--top_p=2.0 must lie in (0, 1]"]),
    (["--prompts=none.json"], ["--prompts=none.json cannot be read: No such file"]),
    (["--promts=none.json"], ["did you mean '--prompts'"]),
    (["--device=gpu"], ["device='gpu' is not a device"]),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_a_mistake_costs_one_sentence(trained, workshop, arguments, words):
    given = [f"--runs_dir={trained.runs}", f"--prompts={trained.folder / 'prompts.json'}", *arguments]
    sentence = workshop.refused(*given, main=evaluate.main)
    assert all(word in sentence for word in words), sentence
    assert not (workshop.folder / "comparisons").exists()  # nothing was begun


def test_a_run_that_fills_gaps_is_refused_and_where_others_are_left_out(workshop):
    workshop.run("--arch_preset=bert", "--objective=masked_lm", "--max_iters=2", name="filler")
    (workshop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    given = [f"--runs_dir={workshop.runs}", f"--prompts={workshop.folder / 'prompts.json'}"]
    for arguments in ([], ["--run_names", "filler"]):
        sentence = workshop.refused(*given, *arguments, main=evaluate.main)
        assert "filler" in sentence and "it has causal=False and objective='masked_lm': it fills gaps" in sentence
    workshop.run("--max_iters=2", name="writer")
    workshop.printed()
    evaluate.main([*given, "--device=cpu", "--max_new_bytes=2", "--no_plots"])
    assert "filler was left out: it has causal=False" in workshop.printed()
    assert (workshop.folder / "comparisons" / "eval_harness" / "eval_results.csv").is_file()


UNFIT = {  # what is asked: {run: why it is not fit for it}
    "prompts": {"games": "the dataset's tokenizer is unknown", "parity": "the dataset's tokenizer is unknown"},
    "loss": {"games": "it was trained on records", "parity": "it was trained on the probe 'parity'"},
    "probes": {"games": "probe 'parity' can only be asked", "text": "probe 'parity' can only be asked"},
}


@pytest.fixture(scope="module")
def mixed(book, tmp_path_factory):
    """A Workshop with a run each of games, a probe and text, whose names stand in this order."""
    shop = Workshop(tmp_path_factory.mktemp("mixed"), book)
    write_games(shop.folder / "mine.jsonl", 60)
    (shop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "hardware_peak", a_peak)
        shop.run("--dataset=games", "--objective=lm_plus_win", "--dropout=0.0", f"--data_dir={shop.folder / 'data'}",
                 f"--input={shop.folder / 'mine.jsonl'}", "--max_iters=1", name="games")  # fmt: skip
        probe = [a for a in shop.command("--max_iters=1", name="parity") if not a.startswith(("--input", "--dataset"))]
        train.main([*probe, "--dataset=parity"])
        shop.run("--max_iters=1", name="text")
    return shop


@pytest.mark.parametrize("kind", UNFIT)
def test_runs_of_other_kinds_are_left_out_before_any_is_asked(mixed, workshop, kind):
    asked = {"prompts": ["--max_new_bytes=2"], "loss": ["--loss", "--loss_tokens=256"],
             "probes": ["--probes", "parity", "--probe_examples=8"]}[kind]  # fmt: skip
    for path in mixed.runs.glob("*/evals.jsonl"):
        path.unlink()
    given = [f"--runs_dir={mixed.runs}", f"--prompts={mixed.folder / 'prompts.json'}", "--device=cpu", "--no_plots"]
    fit = ({"games", "parity", "text"} - UNFIT[kind].keys()).pop()
    for name, why in UNFIT[kind].items():
        sentence = workshop.refused(*given, *asked, "--run_names", fit, name, main=evaluate.main)
        assert sentence.startswith(f"run '{name}': {why}"), sentence
    assert not list(mixed.runs.glob("*/evals.jsonl")) and not (workshop.folder / "comparisons").exists()
    evaluate.main([*given, *asked])
    printed = workshop.printed()
    assert all(f"{name} was left out: {why}" in printed for name, why in UNFIT[kind].items())
    assert [path.parent.name for path in mixed.runs.glob("*/evals.jsonl")] == [fit]
    (record,) = evals(mixed, fit)
    assert record["kind"] == kind and record["kind"] in KINDS
    assert list((workshop.folder / "comparisons" / "eval_harness").glob("*.csv"))


def test_an_answer_that_fills_the_context_is_found_before_any_run_is_asked(trained, workshop):
    prompts = [{"id": "long", "prompt": "a", "answers": ["x" * 20]}]
    (workshop.folder / "long.json").write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    given = [f"--runs_dir={trained.runs}", f"--prompts={workshop.folder / 'long.json'}", "--device=cpu"]
    for path in trained.runs.glob("*/evals.jsonl"):
        path.unlink()
    sentence = workshop.refused(*given, "--run_names", "recurrent", "plain", main=evaluate.main)
    assert sentence.startswith("run 'plain': prompt 'long' has an answer of 21 tokens and the context is 16")
    assert not list(trained.runs.glob("*/evals.jsonl"))


def test_weights_that_cannot_be_read_do_not_cost_what_others_found(workshop):
    for name in ("cut", "whole"):
        workshop.run("--max_iters=2", name=name)
    (weights,) = (workshop.runs / "cut" / "checkpoint-2").glob("model*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    (workshop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    given = [f"--runs_dir={workshop.runs}", f"--prompts={workshop.folder / 'prompts.json'}", "--device=cpu",
             "--max_new_bytes=2", "--no_plots"]  # fmt: skip
    workshop.printed()
    evaluate.main(given)
    assert "cut checkpoint-2 was left out: " in workshop.printed()
    assert [path.parent.name for path in workshop.runs.glob("*/evals.jsonl")] == ["whole"]
    assert "cut checkpoint-2 was left out: " in workshop.refused(*given, "--run_names", "cut", main=evaluate.main)


def test_a_run_without_a_checkpoint_and_one_without_a_tokenizer(workshop):
    folder = workshop.run("--max_iters=2", name="bare")
    (workshop.folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    given = [f"--runs_dir={workshop.runs}", f"--prompts={workshop.folder / 'prompts.json'}", "--device=cpu"]
    (folder / "tokenizer.json").unlink()
    assert "bare was left out: it has no tokenizer.json" in workshop.refused(*given, main=evaluate.main)
    (folder / "checkpoint-2").rename(folder / "away")
    assert "bare was left out: it has no checkpoint yet" in workshop.refused(*given, main=evaluate.main)


def test_the_figure_leaves_out_frequencies_that_few_targets_have():
    """Four targets of 1,000 at 14 nats would set the scale of all panels; the tables keep them."""
    few, most = Tally(14.0 * 4, 4, 9), Tally(2.0 * 996, 996, 4000)
    groups = {("whole", "all"): Tally(2048.0, 1000, 4009), ("position", "1"): few, ("frequency", "1-10"): most,
              ("frequency", "never"): few}  # fmt: skip
    task = LossTask(1000)
    assert task.panels((groups, "")) == {"position": {"1": 14.0}, "frequency": {"1-10": 2.0}}
    assert task.record((groups, ""))["parts"]["frequency"]["never"] == {"loss": 14.0, "targets": 4}
