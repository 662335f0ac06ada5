"""train.py from end to end: what it leaves behind, that it learns, that a resumed run is the run it would have been."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import compare_architectures
import sample
import train
from registry import ALL_REGISTRIES
from training_data import BatchStream, Dataset
from training_helpers import (
    MEASURED,
    ROOT,
    Workshop,
    a_peak,
    assert_same,
    assert_same_run,
    book,
    environment,
    files_in,
    read_json,
    rows,
    script,
    steps_of_checkpoints,
    summary,
    training_state,
    weights,
    workshop,
)
from training_objectives import OBJECTIVE_REGISTRY, CausalLM

# ---- what a run leaves behind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(book, tmp_path_factory):
    """A run with everything switched on."""
    shop = Workshop(tmp_path_factory.mktemp("whole"), book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "hardware_peak", a_peak)
        return shop.run(
            "--tensorboard=True", "--plot=True", "--sample_tokens=20", "--layer_stats_interval=4", "--batch_size=2",
            "--gradient_accumulation_steps=2", "--keep_checkpoints=0", "--grad_clip=0", name="whole",
        )  # fmt: skip


def test_a_run_leaves_every_file_of_the_plan(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "config.json", "config", "tokenizer.json", "metrics.jsonl", "metrics.csv", "training_log.json", "summary.json",
        "tensorboard", "plots", "sample.txt", "checkpoint-4", "checkpoint-8",
    }  # fmt: skip
    for folder in (whole / "checkpoint-4", whole / "checkpoint-8"):
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "training_state.pt", "metadata.json"}
    assert (whole / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((whole / "plots" / "loss.png").read_bytes()) > 5000
    assert len((whole / "sample.txt").read_text(encoding="utf-8")) > 20


def test_config_json_tells_the_whole_story(whole):
    config = read_json(whole / "config.json")
    assert config["architecture"] == "1L-2H-16D-Learned-LNnb-GELU-PreNorm"
    assert config["model_config"]["n_embd"] == 16 and config["model_config"]["vocab_size"] == 256
    assert config["training_config"]["batch_size"] == 2 and config["training_config"]["seed"] == 1337
    assert config["parameters"]["total"] == sum(config["parameters"]["groups"].values()) == 7472
    assert config["flops"]["per_token_training"] == 3 * config["flops"]["per_token_forward"] > 0
    assert "causal half" in config["flops"]["convention"]
    assert config["state"] == {"bytes_per_sequence": 16 * 2 * 16 * 4, "context": 16}  # T keys and values of C float32
    assert len(config["dataset"]["fingerprint"]) == 64 and config["dataset"]["tokenizer"] == "byte"
    assert config["resolved"]["device"] == "cpu" and config["resolved"]["kernels"]["attention"].startswith("sdpa")
    assert "attention" not in config["resolved"]["kernels_not_taken"]
    assert config["resolved"]["tokens_per_step"] == 64 and config["resolved"]["dtype"] == "float32"
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["git"]) == {"commit", "dirty"}
    assert config["command"].startswith("python train.py ") and "--batch_size=2" in config["command"]


def test_metrics_hold_a_row_for_every_step_and_evaluation(whole):
    found = rows(whole)
    train_rows = [row for row in found if row["kind"] == "train"]
    evaluations = [row for row in found if row["kind"] == "eval"]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in evaluations] == [1, 2, 4, 8]  # early learning is fast
    assert all(row["tokens_processed"] == 64 * row["step"] for row in found)
    for row in train_rows:
        assert row["loss"] > 0 and row["learning_rate"] > 0 and row["grad_norm"] > 0
    log = read_json(whole / "training_log.json")
    assert all(
        MEASURED - {"eval_seconds"} <= set(entry) for entry in log["training_iterations"] if entry["kind"] == "train"
    )
    for row in evaluations:
        # Every byte is a token here, so that bits per byte are the loss in another unit.
        assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2), rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]), rel=1e-6)


def test_training_log_has_its_published_shape(whole):
    log = read_json(whole / "training_log.json")
    assert log["config"] == read_json(whole / "config.json")
    assert len(log["training_iterations"]) == 12
    flops = log["config"]["flops"]["per_token_training"]
    for entry in log["training_iterations"]:
        assert entry["iter"] == entry["step"]
        if entry["kind"] == "train":
            assert entry["mfu"]["architecture"] == log["config"]["architecture"]
            assert entry["mfu"]["flops_per_token"] == flops
            assert entry["mfu"]["mfu"] == pytest.approx(flops * entry["tokens_per_second"] / 1e11)
            assert entry["memory"]["peak_bytes"] > 2**20
            assert entry["gradients"]["norm"] == entry["grad_norm"]


def test_norms_by_layer_come_at_their_interval_and_add_up(whole):
    log = read_json(whole / "training_log.json")["training_iterations"]
    rows_with_layers = [entry for entry in log if "gradient_norms" in entry]
    assert [entry["step"] for entry in rows_with_layers] == [4, 8]
    layers = {"token_embedding", "position_embedding", "blocks.0.mixer", "blocks.0.ffn", "blocks.0.mixer_norm",
              "blocks.0.ffn_norm", "final_norm"}  # fmt: skip
    for entry in rows_with_layers:
        assert set(entry["gradient_norms"]) == set(entry["weight_norms"]) == layers
        assert math.hypot(*entry["gradient_norms"].values()) == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["gradients"]["blocks.0.ffn"] == entry["gradient_norms"]["blocks.0.ffn"]
        assert entry["weight_norms"]["final_norm"] == pytest.approx(4, rel=0.1)  # sixteen ones, barely trained


def test_norms_by_layer_are_those_before_clipping(workshop):
    arguments = ("--layer_stats_interval=1", "--max_iters=1")
    plain, clipped = workshop.run(*arguments, "--grad_clip=0"), workshop.run(*arguments, "--grad_clip=0.01")
    assert rows(plain, "train")[0]["gradient_norms"] == rows(clipped, "train")[0]["gradient_norms"]


def test_summary_adds_up(whole):
    found, evaluations = summary(whole), rows(whole, "eval")
    assert found["status"] == "finished" and found["steps"] == 8
    assert found["final_val_loss"] == evaluations[-1]["val_loss"]
    assert found["best_val_loss"] == min(row["val_loss"] for row in evaluations)
    assert found["bits_per_byte"] == evaluations[-1]["bits_per_byte"]
    assert found["tokens_processed"] == found["tokens_supervised"] == 8 * 64
    assert found["total_flops"] == found["flops_per_token"] * 8 * 64
    assert found["n_params"] == found["n_active_params"] == 7472
    assert found["non_finite_steps"] == 0 and found["peak_memory_bytes"] > 2**20
    assert found["train_seconds"] > 0 and found["eval_seconds"] > 0 and found["tokens_per_second"] > 0
    assert found["mfu"] == pytest.approx(found["flops_per_token"] * found["tokens_per_second"] / 1e11)
    assert len(found["stream_hash"]) == 32


def test_the_csv_has_the_numbers_of_the_metrics(whole):
    with open(whole / "metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    found = rows(whole)
    assert [(row["kind"], int(row["step"])) for row in table] == [(row["kind"], row["step"]) for row in found]
    for line, row in zip(table, found, strict=True):
        column = "loss" if row["kind"] == "train" else "val_loss"
        assert float(line[column]) == row[column]
    assert "gradient_norms" not in table[0]


def test_tensorboard_shows_curves_by_step_and_by_tokens(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in rows(whole, "train")]
    by_step, by_tokens = events.Scalars("train/loss"), events.Scalars("by_tokens/train/loss")
    assert [event.step for event in by_step] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.step for event in by_tokens] == [64 * step for step in range(1, 9)]
    assert [event.value for event in by_step] == pytest.approx(losses)
    assert [event.value for event in by_tokens] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/val_loss")] == [1, 2, 4, 8]
    assert len(events.Scalars("gradient_norms/blocks.0.mixer")) == 2


def test_metadata_counts_tokens(whole):
    metadata = read_json(whole / "checkpoint-4" / "metadata.json")
    assert metadata["experiment_name"] == "whole" and metadata["global_step"] == 4
    assert metadata["token_metrics"] == {
        "total_tokens_processed": 256, "total_tokens_supervised": 256, "tokens_per_step": 64, "effective_batch_size": 4,
        "sequence_length": 16, "estimated_tokens_at_step": 256,
    }  # fmt: skip
    assert 0 < metadata["epoch"] < 1
    assert metadata["training_config"]["batch_size"] == 2 and metadata["model_config"]["n_embd"] == 16
    assert set(metadata["checksums"]) == {"model.safetensors", "training_state.pt"}


def test_progress_is_said_line_by_line(workshop):
    workshop.run(name="said")
    text = workshop.printed()
    for words in ("1 x block, each", "attention  2 heads x 8", "ready after", "step 8/8  loss ", " tok/s  MFU ",
                  "  ETA ", "bits/byte", "best so far"):  # fmt: skip
        assert words in text


def test_from_the_shell(workshop, tmp_path):
    good = [*workshop.command(name="shell"), "--arch_preset=llama"]
    commands = {
        "good": script("train.py", ROOT / "config" / "arch_llama.py", *good),
        "bad": script("train.py", ROOT / "config" / "arch_llama.py", *good, "--n_layr=2"),
    }
    children = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                               cwd=tmp_path, env=environment())
        for name, command in commands.items()
    }  # fmt: skip
    out, err = children["good"].communicate(timeout=60)
    assert children["good"].returncode == 0 and err == ""
    assert "swiglu" in out and "step 8/8  loss" in out and "data sheet" not in out
    assert read_json(workshop.runs / "shell" / "config.json")["architecture"] == "1L-2H-16D-RoPE-RMS-SwiGLU-PreNorm"
    assert sorted(path.name for path in (workshop.runs / "shell" / "config").iterdir()) == ["00_arch_llama.py"]
    out, err = children["bad"].communicate(timeout=60)
    assert children["bad"].returncode == 2 and out == ""
    assert err == "error: the command line: 'n_layr' is not a setting; did you mean 'n_layer'? (--help lists all)\n"


def test_help_lists_every_setting_with_its_reason(workshop):
    train.main(["--help"])
    text = workshop.printed()
    for words in (
        "python train.py config/arch_llama.py",
        "--n_layer=4",
        "--grad_clip=1.0",
        "clipped to this",
        "--muon_momentum=0.95",
    ):
        assert words in text


# ---- learning -------------------------------------------------------------------------------------------------------


def test_it_learns(workshop):
    folder = workshop.run(
        "--max_iters=200", "--eval_interval=100", "--log_interval=100", "--n_embd=32", "--batch_size=8"
    )
    assert rows(folder, "train")[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert summary(folder)["final_val_loss"] < 0.45 * math.log(256)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02)])
def test_low_precision_learns_as_float32_does(workshop, dtype, tolerance, optimizer):
    arguments = (f"--optimizer={optimizer}", "--max_iters=20", "--eval_interval=20")
    exact, rough = workshop.run(*arguments), workshop.run(*arguments, f"--dtype={dtype}")
    assert summary(rough)["non_finite_steps"] == 0
    assert summary(rough)["final_val_loss"] == pytest.approx(summary(exact)["final_val_loss"], abs=tolerance)
    assert summary(rough)["final_val_loss"] != summary(exact)["final_val_loss"]
    assert {tensor.dtype for tensor in weights(rough, 20).values()} == {torch.float32}
    assert read_json(rough / "config.json")["resolved"]["dtype"] == dtype


def test_float16_lowers_its_scale_where_gradients_overflow(workshop, monkeypatch):
    class Steep(CausalLM):
        def forward(self, batch):
            sums = super().forward(batch)
            return {**sums, "loss": sums["loss"] * (512 if self.training else 1)}

    monkeypatch.setitem(OBJECTIVE_REGISTRY, "steep", Steep)
    folder = workshop.run("--objective=steep", "--dtype=float16", "--keep_checkpoints=0", "--checkpoint_interval=1")
    skipped = summary(folder)["non_finite_steps"]
    assert 0 < skipped < 8
    assert_same(weights(folder, 1), weights(folder, skipped))
    assert training_state(folder, skipped)["scaler"]["scale"] == 65536 / 2**skipped
    assert not torch.equal(weights(folder, 8)["token_embedding.weight"], weights(folder, 1)["token_embedding.weight"])


def test_accumulation_changes_nothing_but_memory(workshop):
    whole, halves = workshop.run("--batch_size=8"), workshop.run("--batch_size=4", "--gradient_accumulation_steps=2")
    assert [row["loss"] for row in rows(whole, "train")] == pytest.approx(
        [row["loss"] for row in rows(halves, "train")], abs=1e-6
    )
    assert [row["grad_norm"] for row in rows(whole, "train")] == pytest.approx(
        [row["grad_norm"] for row in rows(halves, "train")], abs=1e-5
    )
    assert summary(whole)["stream_hash"] == summary(halves)["stream_hash"]
    assert summary(whole)["tokens_supervised"] == summary(halves)["tokens_supervised"] == 8 * 8 * 16


@pytest.mark.parametrize("length, steps", [
    ("--max_tokens=640", 10),
    ("--max_tokens=641", 11),
    ("--max_tokens=1", 1),
    ("--epochs=0.05", 9),  # of 717 windows, four at a time
], ids=["tokens", "rounded-up", "one", "epochs"])  # fmt: skip
def test_a_run_lasts_as_long_as_it_was_told(workshop, length, steps):
    folder = workshop.run(length)
    assert summary(folder)["steps"] == steps
    assert read_json(folder / "config.json")["resolved"]["max_iters"] == steps
    assert steps_of_checkpoints(folder)[-1] == steps
    assert rows(folder, "eval")[-1]["step"] == steps


def test_the_stream_hash_is_that_of_all_steps(workshop):
    folder = workshop.run()
    config = read_json(folder / "config.json")["training_config"]
    dataset = Dataset(workshop.book / "data" / "text-book")
    stream, value = BatchStream(dataset, 16, 4, config["seed"]), None
    for step in range(8):
        value = stream.hash_after(step, value)
    assert summary(folder)["stream_hash"] == value
    assert summary(workshop.run("--arch_preset=llama"))["stream_hash"] == value  # whatever the architecture
    assert summary(workshop.run("--seed=2"))["stream_hash"] != value


def test_two_runs_of_one_command_are_the_same_run(workshop):
    first, second = workshop.run("--dropout=0.1"), workshop.run("--dropout=0.1", "--prefetch_batches=0")
    assert_same_run(first, second, 8)
    assert not torch.equal(weights(first, 8)["token_embedding.weight"],
                           weights(workshop.run("--dropout=0.1", "--seed=1"), 8)["token_embedding.weight"])  # fmt: skip


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


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["--optimizer=adamw", "--schedule=cosine"],
    ["--optimizer=adamw", "--schedule=linear", "--min_lr=0.0"],
    ["--optimizer=adamw", "--schedule=wsd", "--wsd_decay_fraction=0.5"],
    ["--optimizer=adamw", "--schedule=constant", "--prefetch_batches=0"],
    ["--optimizer=muon", "--schedule=cosine", "--muon_learning_rate=0.02"],
    ["--optimizer=muon", "--schedule=wsd", "--position_encoding=rope", "--ffn_type=swiglu", "--weight_tying=False"],
    ["--dtype=float16", "--optimizer=muon"],
    ["--arch_preset=gpt2", "--dropout=0.2", "--grad_clip=0.5", "--z_loss=1e-4"],
    ["--arch_preset=bert", "--objective=masked_lm", "--pseudo_perplexity_tokens=20", "--pseudo_perplexity_always=True"],
], ids=lambda arguments: " ".join(arguments).replace("--", ""))  # fmt: skip
def test_n_and_n_steps_are_2n_steps_bit_for_bit(workshop, arguments):
    arguments = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--batch_size=2", "--lr_decay_iters=14",
                 "--eval_interval=7", *arguments]  # fmt: skip
    straight = workshop.run("--max_iters=14", *arguments)
    halved = workshop.run("--max_iters=7", *arguments)
    resumed = workshop.resume(halved, "--max_iters=14")
    assert_same_run(straight, resumed, 14)
    assert summary(straight)["stream_hash"] == summary(resumed)["stream_hash"]
    same = (
        "steps",
        "final_val_loss",
        "best_val_loss",
        "tokens_processed",
        "tokens_supervised",
        "total_flops",
        "status",
    )
    assert [summary(straight)[name] for name in same] == [summary(resumed)[name] for name in same]


def test_a_resume_goes_through_the_end_of_an_epoch(workshop, tmp_path):
    (tmp_path / "short.txt").write_text("A short text, of which nothing is seen twice in an epoch.\n" * 20)
    data = (f"--input={tmp_path / 'short.txt'}", f"--data_dir={tmp_path / 'data'}", "--lr_decay_iters=40")
    straight = workshop.run("--max_iters=40", *data)
    assert rows(straight, "train")[-1]["epoch"] > 2
    assert_same_run(straight, workshop.resume(workshop.run("--max_iters=20", *data), "--max_iters=40"), 40)


def test_evaluating_more_often_changes_no_weight(workshop):
    often = workshop.run("--dropout=0.1", "--eval_interval=1")
    rarely = workshop.run("--dropout=0.1", "--eval_interval=8")
    assert_same(weights(often, 8), weights(rarely, 8))
    assert rows(often, "train") == rows(rarely, "train")


def test_a_resumed_run_may_split_its_batch_otherwise(workshop):
    arguments = ("--lr_decay_iters=8", "--max_iters=8")
    straight = workshop.run("--batch_size=4", *arguments)
    halved = workshop.run("--batch_size=4", "--lr_decay_iters=8", "--max_iters=4")
    resumed = workshop.resume(halved, "--batch_size=2", "--gradient_accumulation_steps=2", "--max_iters=8")
    assert [row["loss"] for row in rows(straight, "train")] == pytest.approx(
        [row["loss"] for row in rows(resumed, "train")], abs=1e-5
    )
    assert summary(straight)["stream_hash"] == summary(resumed)["stream_hash"]


def test_going_back_to_an_earlier_checkpoint_keeps_what_came_after(workshop):
    arguments = ("--lr_decay_iters=8", "--keep_checkpoints=0")
    folder = workshop.run(*arguments)
    later = files_in(folder / "checkpoint-8")
    workshop.resume(folder, "--resume_step=4", "--learning_rate=0.005")
    assert steps_of_checkpoints(folder) == [4, 8]
    assert files_in(folder / "abandoned-checkpoint-8") == later
    assert files_in(folder / "checkpoint-8") != later
    abandoned = (folder / "metrics_abandoned.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(abandoned) == 5  # four steps and an evaluation
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in rows(folder, "eval")] == [1, 2, 4, 8]


def test_the_step_to_resume_from_is_for_one_command(workshop):
    folder = workshop.run("--keep_checkpoints=0")
    workshop.resume(folder, "--resume_step=4", "--max_iters=12")
    workshop.resume(folder, "--max_iters=16")
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 17))
    assert "12" in (folder / "config.json").read_text(encoding="utf-8")
    assert not (folder / "abandoned-checkpoint-12").exists()


def test_a_length_takes_the_place_of_the_one_before(workshop):
    folder = workshop.run("--max_tokens=256")
    assert summary(workshop.resume(folder, "--max_iters=6"))["steps"] == 6
    assert summary(workshop.resume(folder, "--epochs=0.05"))["steps"] == 9


def test_settings_of_a_run_are_not_held_to_the_defaults(workshop):
    # min_lr is above the default learning rate, but not above that of the run.
    folder = workshop.run("--max_iters=4", "--learning_rate=0.01")
    assert summary(workshop.resume(folder, "--max_iters=8", "--min_lr=0.005"))["steps"] == 8


def test_a_moved_run_goes_on_where_it_is(workshop, tmp_path):
    train.main([*workshop.command(name="before"), f"--runs_dir={tmp_path / 'there'}", "--max_iters=4"])
    workshop.runs.mkdir()
    (tmp_path / "there" / "before").rename(workshop.runs / "after")
    train.main(["--run_name=after", "--init_from=resume", "--max_iters=8"])  # in runs/, where nothing says otherwise
    assert summary(workshop.runs / "after")["steps"] == 8
    assert list((tmp_path / "there").iterdir()) == []


def test_the_sessions_before_stay_in_the_record(workshop):
    folder = workshop.run("--max_iters=2")
    workshop.resume(folder, "--max_iters=4")
    workshop.resume(folder, "--max_iters=6")
    record = read_json(folder / "config.json")
    assert "--max_iters=6" in record["command"]
    assert [session["command"].split()[-1] for session in record["earlier_sessions"]] == [
        "--max_iters=2",
        "--max_iters=4",
    ]
    assert all({"created", "git", "versions", "resolved"} <= set(session) for session in record["earlier_sessions"])


def test_a_run_whose_data_changed_is_refused(workshop, tmp_path):
    (tmp_path / "mine.txt").write_text("Something to read, again and again.\n" * 50)
    folder = workshop.run(f"--input={tmp_path / 'mine.txt'}", f"--data_dir={tmp_path / 'data'}", "--max_iters=4")
    for path in (tmp_path / "data" / "text-mine").iterdir():
        path.unlink()
    (tmp_path / "mine.txt").write_text("Something to read, often and often.\n" * 50)
    before = files_in(folder)
    sentence = workshop.refused(
        f"--runs_dir={workshop.runs}", "--init_from=resume", f"--run_name={folder.name}", "--max_iters=8"
    )
    assert "trained on other tokens" in sentence and "text-mine" in sentence
    assert files_in(folder) == before


# ---- names and folders ----------------------------------------------------------------------------------------------


def test_a_name_that_exists_is_never_overwritten(workshop):
    folder = workshop.run(name="mine")
    before = files_in(workshop.folder)
    sentence = workshop.refused(*workshop.command("--seed=2", name="mine"))
    assert "run_name='mine' exists" in sentence and "--init_from=resume" in sentence
    assert files_in(folder.parents[1]) == before


def test_names_made_here_get_a_suffix(workshop):
    for _ in range(3):
        train.main(workshop.command("--max_iters=1", "--arch_preset=llama"))
    assert sorted(path.name for path in workshop.runs.iterdir()) == [
        "llama-1x16-text-book-s1337", "llama-1x16-text-book-s1337-2", "llama-1x16-text-book-s1337-3",
    ]  # fmt: skip
    assert (
        read_json(workshop.runs / "llama-1x16-text-book-s1337-2" / "config.json")["run_name"]
        == "llama-1x16-text-book-s1337-2"
    )


def test_a_name_taken_meanwhile_is_noticed(workshop, monkeypatch):
    original = train.run_record.config_record

    def record(*arguments):
        (workshop.runs / "raced").mkdir(parents=True)  # another process, between the check and the making
        return original(*arguments)

    monkeypatch.setattr(train.run_record, "config_record", record)
    assert "made by another process" in workshop.refused(*workshop.command(name="raced"))
    assert list((workshop.runs / "raced").iterdir()) == []


def test_pruning_keeps_the_best_and_the_last(workshop, monkeypatch):
    losses = dict(zip(range(1, 9), [9.0, 8.0, 1.0, 7.0, 6.0, 5.0, 4.0, 3.0], strict=True))
    steps = iter(losses.values())
    monkeypatch.setattr(
        train, "validation_scores", lambda *_: {"val_loss": next(steps), "perplexity": 1.0, "bits_per_byte": 1.0}
    )
    folder = workshop.run("--eval_interval=1", "--checkpoint_interval=1", "--keep_checkpoints=2")
    assert steps_of_checkpoints(folder) == [3, 7, 8]
    assert summary(folder)["best_step"] == 3 and summary(folder)["best_val_loss"] == 1.0
    assert workshop.printed().count("best so far") == 3


def test_pruning_keeps_the_best_that_was_saved(workshop, monkeypatch):
    losses = iter([9.0, 8.0, 7.0, 1.0, 6.0, 5.0, 4.5, 5.5, 5.6, 5.7, 5.8, 5.9])  # the best, of step 4, is not saved
    monkeypatch.setattr(
        train, "validation_scores", lambda *_: {"val_loss": next(losses), "perplexity": 1.0, "bits_per_byte": 1.0}
    )
    folder = workshop.run("--max_iters=12", "--eval_interval=1", "--checkpoint_interval=3", "--keep_checkpoints=1")
    assert steps_of_checkpoints(folder) == [6, 12]


@pytest.mark.parametrize("interval, kept", [("None", [4, 8]), ("0", [8]), ("3", [3, 6, 8])])
def test_checkpoints_come_at_their_interval_and_at_the_end(workshop, interval, kept):
    assert steps_of_checkpoints(workshop.run(f"--checkpoint_interval={interval}", "--keep_checkpoints=0")) == kept


# ---- steps that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def sabotage(monkeypatch):
    """An objective that turns chosen training steps (counted from 0) into nan; `kind` says where."""

    class Sabotaged(CausalLM):
        bad_steps, kind, micro_batches = (), "loss", 1

        def __init__(self, model, config):
            super().__init__(model, config)
            self.calls = 0

        def forward(self, batch):
            sums = super().forward(batch)
            if self.training:
                step, self.calls = self.calls // self.micro_batches, self.calls + 1
                if step in self.bad_steps:
                    sums = self.spoil(sums)
            return sums

        def spoil(self, sums):
            if self.kind == "loss":
                return {**sums, "loss": sums["loss"] * math.nan, "nats": sums["nats"] * math.nan}
            return {**sums, "loss": sums["loss"] + (self.model.head.weight * 0).sum().sqrt()}  # 0, of gradient nan

    monkeypatch.setitem(OBJECTIVE_REGISTRY, "sabotaged", Sabotaged)
    return Sabotaged


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(workshop, sabotage, kind):
    sabotage.bad_steps, sabotage.kind, sabotage.micro_batches = (3, 5), kind, 2
    folder = workshop.run(
        "--objective=sabotaged", "--checkpoint_interval=1", "--keep_checkpoints=0", "--gradient_accumulation_steps=2",
        "--max_non_finite_steps=2", "--tensorboard=True",
    )  # fmt: skip
    for before, after, skipped in ((2, 3, False), (3, 4, True), (4, 5, False), (5, 6, True), (6, 7, False)):
        same = torch.equal(
            weights(folder, before)["token_embedding.weight"], weights(folder, after)["token_embedding.weight"]
        )
        assert same == skipped
    assert_same(training_state(folder, 3)["optimizers"], training_state(folder, 4)["optimizers"])
    assert [row["non_finite_steps"] for row in rows(folder, "train")] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert rows(folder, "train")[3]["grad_norm"] is None
    assert (rows(folder, "train")[3]["loss"] is None) == (kind == "loss")
    assert summary(folder)["status"] == "finished" and summary(folder)["non_finite_steps"] == 2
    assert "NaN" not in (folder / "metrics.jsonl").read_text() + (folder / "training_log.json").read_text()


def test_too_many_in_a_row_stop_the_run_with_a_sentence(workshop, sabotage):
    sabotage.bad_steps = range(3, 99)
    arguments = ("--objective=sabotaged", "--max_non_finite_steps=3", "--max_iters=12", "--eval_interval=3")
    sentence = workshop.refused(*workshop.command(*arguments, "--plot=True", name="diverged"))
    folder = workshop.runs / "diverged"
    for words in (
        "not finite 3 steps in a row, to step 6",
        "learning_rate=0.01",
        "--run_name=diverged",
        "max_non_finite_steps=3",
    ):
        assert words in sentence
    assert summary(folder)["status"] == "failed" and summary(folder)["non_finite_steps"] == 3
    assert read_json(folder / "training_log.json")["training_iterations"][-1]["step"] == 6
    # What it left can be continued, as the sentence says.
    assert_same(weights(folder, 3), weights(folder, 6))
    sabotage.bad_steps = ()
    workshop.resume(folder, "--learning_rate=0.001")
    assert summary(folder)["status"] == "finished" and summary(folder)["steps"] == 12
    assert summary(folder)["non_finite_steps"] == 3
    assert all(tensor.isfinite().all() for tensor in weights(folder, 12).values())


def test_a_run_that_is_never_finite_still_leaves_whole_files(workshop, sabotage):
    sabotage.bad_steps = range(99)
    workshop.refused(*workshop.command("--objective=sabotaged", "--max_non_finite_steps=2", "--plot=True",
                                       "--eval_interval=50", name="never"))  # fmt: skip
    assert summary(workshop.runs / "never")["final_val_loss"] is None
    assert steps_of_checkpoints(workshop.runs / "never") == [2]


# ---- crashes --------------------------------------------------------------------------------------------------------


def reading_threads():
    return [thread for thread in threading.enumerate() if "read_ahead" in thread.name]


def test_a_crash_in_an_evaluation_loses_nothing(workshop, monkeypatch):
    straight = workshop.run("--dropout=0.1", name="straight")
    with monkeypatch.context() as patch:
        real = train.validation_scores
        counted = iter(range(99))

        def crash(*arguments):
            if next(counted) == 2:  # after those of steps 1 and 2, the one of step 4
                raise RuntimeError("evaluation crashed")
            return real(*arguments)

        patch.setattr(train, "validation_scores", crash)
        with pytest.raises(RuntimeError, match="evaluation crashed"):
            train.main(workshop.command("--dropout=0.1", name="crashed"))
    crashed = workshop.runs / "crashed"
    assert steps_of_checkpoints(crashed) == [4]
    assert summary(crashed)["status"] == "failed" and summary(crashed)["steps"] == 4
    assert [row["step"] for row in rows(crashed, "eval")] == [1, 2]
    assert reading_threads() == []
    workshop.resume(crashed)
    assert_same_run(straight, crashed, 8)  # the missed evaluation among the rows


def test_a_crash_of_the_loader_keeps_its_traceback_and_readable_files(workshop, monkeypatch):
    batches = BatchStream.batches

    def crash(stream, step, *arguments):
        if step == 5:
            raise OSError("the disk went away")
        return batches(stream, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "batches", crash)
        with pytest.raises(OSError, match="the disk went away"):
            train.main(workshop.command("--plot=True", "--tensorboard=True", name="crashed"))
    folder = workshop.runs / "crashed"
    assert reading_threads() == []
    assert summary(folder)["status"] == "failed" and summary(folder)["steps"] == 5
    assert len(read_json(folder / "training_log.json")["training_iterations"]) == 5 + 3
    workshop.resume(folder)
    assert summary(folder)["status"] == "finished"
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_full_disk_costs_a_sentence_and_no_checkpoint(workshop, monkeypatch):
    resource = pytest.importorskip("resource")
    save_file = train.checkpoint.save_file
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_the_disk(tensors, path):
        if "checkpoint-8" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            save_file(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train.checkpoint, "save_file", fill_the_disk)
    try:
        sentence = workshop.refused(*workshop.command(name="full"))
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint-8 could not be written" in sentence and "make room" in sentence
    assert [path.name for path in (workshop.runs / "full").glob("*checkpoint*")] == ["checkpoint-4"]
    assert summary(workshop.runs / "full")["status"] == "failed"


# ---- signals, within this process (test_signals.py sends them to another) -------------------------------------------


@pytest.fixture
def signalling(monkeypatch):
    """An objective that sends this process `signals` during training step `at` (counted from 1)."""

    class Signalling(CausalLM):
        at, signals = 0, ()

        def __init__(self, model, config):
            super().__init__(model, config)
            self.calls = 0

        def forward(self, batch):
            self.calls += self.training
            if self.training and self.calls == self.at:
                for signum in self.signals:
                    signal.raise_signal(signum)
            return super().forward(batch)

    monkeypatch.setitem(OBJECTIVE_REGISTRY, "signalling", Signalling)
    return Signalling


@pytest.mark.parametrize("signum, name, at", [
    (signal.SIGTERM, "SIGTERM", 3),
    (signal.SIGINT, "Ctrl-C", 4),  # where a checkpoint and an evaluation are due
    (signal.SIGTERM, "SIGTERM", 7),
], ids=lambda value: str(value))  # fmt: skip
def test_a_signal_saves_and_leaves(workshop, signalling, signum, name, at):
    straight = workshop.run("--objective=signalling", "--dropout=0.1")
    signalling.at, signalling.signals = at, (signum,)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    workshop.printed()
    stopped = workshop.run("--objective=signalling", "--dropout=0.1", name="stopped")
    assert f"stopped by {name} at step {at}; continue with --init_from=resume --run_name=stopped" in workshop.printed()
    assert summary(stopped)["status"] == "interrupted" and summary(stopped)["steps"] == at
    assert steps_of_checkpoints(stopped)[-1] == at
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert reading_threads() == []
    signalling.at = 0
    workshop.resume(stopped)
    assert_same_run(straight, stopped, 8)


def test_a_signal_in_the_last_step_changes_nothing(workshop, signalling):
    signalling.at, signalling.signals = 8, (signal.SIGTERM,)
    assert summary(workshop.run("--objective=signalling"))["status"] == "finished"


def test_a_second_ctrl_c_leaves_at_once(workshop, signalling):
    signalling.at, signalling.signals = 6, (signal.SIGINT, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)  # Python's own, or none at all where the tests run in the background
    with pytest.raises(SystemExit) as stop:
        workshop.run("--objective=signalling", name="impatient")
    assert stop.value.code == 130
    folder = workshop.runs / "impatient"
    assert summary(folder)["status"] == "interrupted" and summary(folder)["steps"] == 5
    assert steps_of_checkpoints(folder) == [4]
    assert reading_threads() == []
    assert signal.getsignal(signal.SIGINT) is before


# ---- sinks ----------------------------------------------------------------------------------------------------------


class FakeWandb:
    """Weights & Biases as far as the sink uses it."""

    def __init__(self, login):
        self.login_succeeds = login
        self.logged, self.metrics, self.is_finished = [], {}, False

    def login(self, prompt):
        assert prompt is False  # a run that waits for an answer is a run that stands still
        if self.login_succeeds is None:
            raise OSError("no network")
        return self.login_succeeds

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.is_finished = True


@pytest.mark.parametrize(
    "login, mode", [(False, "offline"), (True, None), (None, "offline")], ids=["no-login", "login", "no-network"]
)
def test_wandb_gets_every_row_against_steps_and_tokens(workshop, monkeypatch, login, mode):
    fake = FakeWandb(login)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = workshop.run("--wandb_log=True", "--wandb_project=mine", "--layer_stats_interval=8", name="watched")
    assert (
        fake.arguments["mode"] == mode and fake.arguments["project"] == "mine" and fake.arguments["name"] == "watched"
    )
    assert fake.arguments["config"] == read_json(folder / "config.json")
    assert fake.metrics["train/*"] == "step" and fake.metrics["by_tokens/*"] == "tokens_processed"
    assert len(fake.logged) == 12 and fake.is_finished
    assert fake.logged[0]["train/loss"] == fake.logged[0]["by_tokens/train/loss"] == rows(folder, "train")[0]["loss"]
    assert fake.logged[-2]["step"] == 8 and fake.logged[-2]["tokens_processed"] == 512
    assert "gradient_norms/blocks.0.ffn" in fake.logged[-2]


def test_the_real_wandb_writes_offline(workshop, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = workshop.run("--wandb_log=True", "--max_iters=2")
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of wandb's own writes it, on a busy machine after the run has ended
    while written.stat().st_size <= 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written.stat().st_size > 1000


def test_a_missing_wandb_is_named_and_leaves_nothing(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sentence = workshop.refused(*workshop.command("--wandb_log=True", name="unwatched"))
    assert "pip install wandb" in sentence and "wandb_log=False" in sentence
    assert not (workshop.runs / "unwatched").exists()


# ---- evaluating alone -----------------------------------------------------------------------------------------------


def test_eval_only_prints_and_leaves_nothing_behind(workshop):
    train.main(workshop.command("--eval_only=True", name="glance"))
    assert "val 5.5" in workshop.printed()
    assert not workshop.runs.exists()


def test_eval_only_of_a_finished_run_leaves_it_alone(workshop):
    folder = workshop.run("--keep_checkpoints=0")
    before, loss = files_in(folder), {row["step"]: row["val_loss"] for row in rows(folder, "eval")}
    workshop.printed()
    for arguments, step in (((), 8), (("--resume_step=4",), 4)):
        workshop.resume(folder, "--eval_only", *arguments)
        assert f"step {step}/8  val {loss[step]:.4f}" in workshop.printed()
    assert files_in(folder) == before


# ---- parts of one's own ---------------------------------------------------------------------------------------------

PART = '''
"""A component of one's own, chosen in the file that defines it."""
import torch.nn as nn
from model_components import FFN, FFN_REGISTRY


@FFN_REGISTRY("two_powers")
class TwoPowers(FFN):
    class Options(FFN.Options):
        power: int = 2  # of the hidden layer

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.power = config.options_for(type(self)).power
        self.up = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.down = nn.Linear(2 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.down(self.up(x).relu() ** self.power)


ffn_type = "two_powers"
power = 3
max_iters = 4
lr_decay_iters = 8
'''


def test_a_run_with_a_part_of_its_own_lives_from_its_folder_alone(workshop, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PART)
    no_length = [argument for argument in workshop.command() if "max_iters" not in argument]
    for name, length in (("straight", ["--max_iters=8"]), ("mine", [])):
        train.main([*no_length, str(path), f"--run_name={name}", *length])
    folder = workshop.runs / "mine"
    assert (folder / "config" / "00_mine.py").read_text() == PART
    path.unlink()
    del ALL_REGISTRIES["ffn_type"]["two_powers"]
    workshop.resume(folder, "--max_iters=8")
    assert_same_run(workshop.runs / "straight", folder, 8)
    assert (folder / "config" / "00_mine.py").read_text() == PART
    del ALL_REGISTRIES["ffn_type"]["two_powers"]
    workshop.printed()
    sample.main([f"--runs_dir={workshop.runs}", "--run_name=mine", "--max_new_tokens=5", "--device=cpu"])
    assert len(workshop.printed()) > 5


# ---- data whose text is unknown -------------------------------------------------------------------------------------


def test_tokens_of_an_unknown_tokenizer_are_trained_on(workshop, tmp_path):
    import numpy as np

    from training_token_files import describe_token_files

    tokens = tmp_path / "data" / "tokens"
    tokens.mkdir(parents=True)
    for split, n in (("train", 2000), ("val", 400)):
        (np.arange(n) * 7 % 50).astype("<u2").tofile(tokens / f"{split}.bin")
    describe_token_files(tokens, vocab_size=50)
    arguments = [
        a
        for a in workshop.command("--sample_tokens=5", name="numbers")
        if not a.startswith(("--data_dir", "--dataset", "--input"))
    ]
    train.main([*arguments, f"--data_dir={tmp_path / 'data'}", "--dataset=tokens"])
    folder = workshop.runs / "numbers"
    assert summary(folder)["status"] == "finished" and summary(folder)["bits_per_byte"] is None
    assert "no sample" in workshop.printed()
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", "--run_name=numbers", main=sample.main)
    assert "tokenizer is unknown" in sentence


def test_a_padded_vocabulary_is_sampled_without_its_padding(workshop):
    folder = workshop.run("--vocab_size=320", "--max_iters=1", "--sample_tokens=100")
    assert (folder / "sample.txt").exists()
