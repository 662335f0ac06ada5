"""What a run writes down: rows, rewinding, files made from rows, the record."""

import csv
import json
import math

import pytest
import torch

import training_logger as logger
import training_run_record as run_record
from model_builder import ConfigurableGPT
from training_config import TrainConfig
from training_ledger import Ledger
from user_errors import UserError


def write_rows(folder, rows, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_rewinding_keeps_what_came_after_in_a_file_of_its_own(tmp_path):
    rows = [{"kind": "train", "step": step, "loss": float(step)} for step in range(1, 7)]
    write_rows(tmp_path, rows)
    logger.rewind_metrics(tmp_path, 4)
    assert logger.read_metrics(tmp_path / "metrics.jsonl") == rows[:4]
    assert logger.read_metrics(tmp_path / "metrics_abandoned.jsonl") == rows[4:]
    logger.rewind_metrics(tmp_path, 2)
    assert logger.read_metrics(tmp_path / "metrics.jsonl") == rows[:2]
    assert logger.read_metrics(tmp_path / "metrics_abandoned.jsonl") == [*rows[4:], *rows[2:4]]


def test_rewinding_to_the_end_leaves_no_file_behind(tmp_path):
    write_rows(tmp_path, [{"kind": "train", "step": 1}])
    logger.rewind_metrics(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_short_by_a_crash_is_left_out_and_not_written_on(tmp_path):
    rows = [{"kind": "train", "step": 1}, {"kind": "train", "step": 2}]
    write_rows(tmp_path, rows, tail='{"kind": "train", "st')
    assert logger.read_metrics(tmp_path / "metrics.jsonl") == rows
    logger.rewind_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_a_run_that_logged_nothing(tmp_path):
    assert logger.read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_json_lacks_becomes_null():
    row = {
        "loss": math.nan,
        "grad_norm": math.inf,
        "lr": 0.5,
        "step": 3,
        "nested": {"a": -math.inf, "b": 1.0},
        "word": "nan",
    }
    assert logger.finite(row) == {
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
        "step": 3,
        "nested": {"a": None, "b": 1.0},
        "word": "nan",
    }
    json.dumps(logger.finite(row), allow_nan=False)


# ---- made from it ---------------------------------------------------------------------------------------------------

TRAIN_ROW = {"kind": "train", "step": 1, "tokens_processed": 64, "loss": 2.5, "grad_norm": 1.0,
             "tokens_per_second": 10.0, "mfu": 0.5, "peak_memory_bytes": 7,
             "gradient_norms": {"head": 0.5}}  # fmt: skip
EVAL_ROW = {"kind": "eval", "step": 1, "tokens_processed": 64, "val_loss": 2.25, "bits_per_byte": None}


def test_the_csv_has_a_column_for_every_number(tmp_path):
    logger.write_csv(tmp_path / "metrics.csv", [TRAIN_ROW, {**EVAL_ROW, "note": 'commas, "quotes"\nand lines'}])
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        train, evaluation = csv.DictReader(file)
    assert train["loss"] == "2.5" and train["val_loss"] == "" and "gradient_norms" not in train
    assert evaluation["loss"] == "" and evaluation["val_loss"] == "2.25" and evaluation["bits_per_byte"] == ""
    assert evaluation["note"] == 'commas, "quotes"\nand lines'


def test_the_training_log_spells_the_mfu_out(tiny):
    flops = logger_flops(tiny)
    log = logger.training_log({"architecture": "A"}, [TRAIN_ROW, EVAL_ROW], flops)
    train, evaluation = log["training_iterations"]
    assert log["config"] == {"architecture": "A"}
    assert train["iter"] == 1 and train["loss"] == 2.5
    assert train["mfu"] == {
        "mfu": 0.5, "architecture": "A", "flops_per_token": flops.training, "flops_per_token_forward": flops.forward,
        "flops_per_token_backward": 2 * flops.forward, "context": 16, "flops_per_second": flops.training * 10.0,
    }  # fmt: skip
    assert train["memory"] == {"peak_bytes": 7} and train["gradients"] == {"norm": 1.0, "head": 0.5}
    assert evaluation == {"iter": 1, **EVAL_ROW}


def logger_flops(tiny):
    from model_flops import flops_per_token

    return flops_per_token(ConfigurableGPT(tiny()))


@pytest.mark.parametrize("rows", [
    [TRAIN_ROW, EVAL_ROW],
    [{**TRAIN_ROW, "loss": None}],
    [{**TRAIN_ROW, "loss": None}, {**EVAL_ROW, "val_loss": None}],
], ids=["both", "no-finite-loss", "nothing"])  # fmt: skip
def test_the_plot_takes_what_there_is_without_a_warning(tmp_path, rows, recwarn):
    logger.plot_loss(tmp_path / "plots" / "loss.png", rows, "a run")
    assert (tmp_path / "plots" / "loss.png").stat().st_size > 5000
    assert not [str(warning.message) for warning in recwarn if "legend" in str(warning.message).lower()]


# ---- what is shown --------------------------------------------------------------------------------------------------


def shown_rows(log):
    log.train(
        {"step": 7, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.25, "tokens_per_second": 12345.0, "mfu": 0.123},
        75.0,
    )
    log.evaluation(
        {"step": 7, "val_loss": 2.25, "perplexity": 9.49, "bits_per_byte": None, "tokens_processed": 1234567}, True
    )


def test_lines_of_progress(capsys):
    shown_rows(logger.ConsoleLogger(1000))
    assert capsys.readouterr().out == (
        "step    7/1000  loss 2.5000  12.3k tok/s  MFU 12.3%  ETA 1m15s  lr 1.00e-03  grad 1.25\n"
        "step    7/1000  val 2.2500  perplexity 9.49  1.23M tokens  best so far\n"
    )


def test_scores_of_the_objective_are_shown_by_their_names(capsys):
    row = {"step": 7, "val_loss": 2.25, "perplexity": None, "bits_per_byte": None, "tokens_processed": 1234}
    logger.ConsoleLogger(10).evaluation({**row, "masked_accuracy": 0.25, "pseudo_perplexity": 8.0}, False)
    shown = "step  7/10  val 2.2500  masked_accuracy 0.2500  pseudo_perplexity 8.0000  1.23k tokens\n"
    assert capsys.readouterr().out == shown


def test_on_a_terminal_a_step_is_written_over_and_an_evaluation_stays(capsys, monkeypatch):
    monkeypatch.setattr(logger.sys.stdout, "isatty", lambda: True, raising=False)
    shown_rows(logger.ConsoleLogger(1000))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("best so far\n")
    assert "ETA 1m15s" in out and "\r" in out


def test_the_other_ranks_say_nothing(capsys):
    log = logger.SilentLogger()
    log.say("hello")
    shown_rows(log)
    log.write_summary({})
    log.finish({}, None)
    assert capsys.readouterr().out == ""


# ---- names, records, norms ------------------------------------------------------------------------------------------


def settings(tmp_path, tiny, run_name=None, **model):
    from configurator import Settings

    return Settings(tiny(**model), TrainConfig(runs_dir=str(tmp_path), run_name=run_name), [], {})


@pytest.mark.parametrize("model, name", [
    ({}, "attention-2x16-book-s1337"),
    ({"arch_preset": "llama"}, "llama-2x16-book-s1337"),
    ({"arch_preset": "gpt2", "model_size": "1M", "n_layer": 4, "n_head": 4, "n_embd": 128}, "gpt2-1M-book-s1337"),
])  # fmt: skip
def test_a_name_says_what_the_run_is(tmp_path, tiny, model, name):
    assert logger.new_run_folder(settings(tmp_path, tiny, **model), "book") == tmp_path / name
    (tmp_path / name).mkdir()
    assert logger.new_run_folder(settings(tmp_path, tiny, **model), "book") == tmp_path / f"{name}-2"


def test_a_chosen_name_is_kept_or_refused(tmp_path, tiny):
    assert logger.new_run_folder(settings(tmp_path, tiny, "mine"), "book") == tmp_path / "mine"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="run_name='mine' exists"):
        logger.new_run_folder(settings(tmp_path, tiny, "mine"), "book")


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_record.subprocess, "run", missing)
    assert run_record.git_state() == {"commit": None, "dirty": None}


def test_norms_by_layer_are_those_of_all_their_tensors(tiny):
    model = ConfigurableGPT(tiny(bias=True))
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    stats = logger.layer_stats(model)
    ffn = [p for name, p in model.named_parameters() if name.startswith("blocks.1.ffn.")]
    assert stats["weight_norms"]["blocks.1.ffn"] == pytest.approx(
        math.sqrt(sum(float(p.detach().square().sum()) for p in ffn)), rel=1e-6
    )
    assert stats["gradient_norms"]["blocks.1.ffn"] == pytest.approx(
        math.sqrt(sum(float(p.grad.square().sum()) for p in ffn)), rel=1e-6)  # fmt: skip
    model.zero_grad(set_to_none=True)
    model.final_norm.weight.grad = torch.ones_like(model.final_norm.weight)
    assert logger.layer_stats(model)["gradient_norms"] == {"final_norm": pytest.approx(4.0)}


# ---- the ledger -----------------------------------------------------------------------------------------------------


def ledger_with(losses):
    ledger = Ledger(tokens_per_step=64, flops_per_token=10.0, stream_hash="00")
    ledger.evaluations = [
        {"kind": "eval", "step": step, "val_loss": loss, "bits_per_byte": 1.0} for step, loss in losses.items()
    ]
    return ledger


def test_the_best_evaluation_is_the_lowest_that_is_a_number():
    assert ledger_with({}).best() == {}
    assert ledger_with({1: None, 2: math.nan}).best() == {}
    assert ledger_with({1: 3.0, 2: math.nan, 3: 2.0, 4: None, 5: 2.5}).best()["step"] == 3
    assert ledger_with({1: 3.0, 2: 1.0, 3: 2.0}).best(among={1, 3})["step"] == 3
    assert ledger_with({1: 3.0}).best(among={2}) == {}


def test_a_ledger_goes_on_from_its_state_and_the_rows_until_then():
    ledger = Ledger(64, 10.0, "00", step=3, tokens_supervised=190, train_seconds=1.5, non_finite_steps=1)
    other = Ledger(64, 10.0, "ff")
    rows = [{"kind": "train", "step": step, "tokens_per_second": float(step)} for step in range(1, 6)]
    rows += [{"kind": "eval", "step": step, "val_loss": 1.0, "bits_per_byte": 1.0} for step in (2, 3, 4)]
    other.restore(ledger.state(), rows)
    assert other.state() == ledger.state()
    assert other.tokens_processed == 192 and other.flops == 1920
    assert [row["step"] for row in other.evaluations] == [2, 3] and other.evaluated_at(3) and not other.evaluated_at(4)
    assert other.summary()["tokens_per_second"] == 2.5  # of steps 2 and 3: the first warms up


def test_a_summary_before_anything_happened():
    found = Ledger(64, 10.0, "00").summary()
    assert found["status"] == "running" and found["steps"] == found["tokens_processed"] == 0
    assert found["final_val_loss"] is None and found["tokens_per_second"] is None
