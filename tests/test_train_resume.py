"""A resumed run is the run it would have been, bit for bit; what a run is called, and which checkpoints it keeps."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import pytest

import train
from training_helpers import (
    assert_same,
    assert_same_run,
    book,
    files_in,
    read_json,
    rows,
    steps_of_checkpoints,
    summary,
    weights,
    workshop,
)

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
    assert summary(workshop.resume(folder, "--epochs=0.12"))["steps"] == 9


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
