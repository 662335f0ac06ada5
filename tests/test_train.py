"""train.py from end to end: what it leaves behind, that it learns, and that a run lives from its folder alone."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import math
import subprocess

import pytest
import torch

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
    ("--epochs=0.12", 9),  # of 284 windows, four at a time
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
