"""Token counts of checkpoints that add up pass; each way of not adding up is a sentence with both numbers."""

import copy
import json

import pytest

from comparison_checkpoints import problems_between, problems_of_metadata, problems_of_run, read_run
from user_errors import UserError


def metadata(step, batch=4, due=None, **changes):
    """What train.py writes at a step of `batch` x 8 tokens."""
    processed = step * batch * 8
    tokens = {
        "total_tokens_processed": processed, "total_tokens_supervised": processed, "tokens_per_step": batch * 8,
        "effective_batch_size": batch, "sequence_length": 8, "estimated_tokens_at_step": due or processed,
    }  # fmt: skip
    training = {"batch_size": batch // 2, "gradient_accumulation_steps": 2, "objective": "o", "dataset": "d"}
    return {"format": 1, "experiment_name": "r", "global_step": step, "epoch": 0.1,
            "token_metrics": {**tokens, **changes}, "training_config": training,
            "model_config": {"block_size": 8}, "checksums": {}}  # fmt: skip


def run(folder, batch=4, schedule=(50, 100, 320), edit=None, leave_out=()):
    """A run folder with a checkpoint for each scheduled count."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"resolved": {"checkpoint_schedule": [*schedule]}}))
    rows = []
    for count in schedule:
        step = -(-count // (batch * 8))
        rows.append(json.dumps({"kind": "eval", "step": step, "tokens_processed": step * batch * 8}))
        if count not in leave_out:
            (folder / f"checkpoint-{step}").mkdir()
            record = metadata(step, batch, count)
            (folder / f"checkpoint-{step}" / "metadata.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 1')  # the last line cut short
    return folder


def problems(*folders):
    runs = [read_run(folder) for folder in folders]
    return [problem for run in runs for problem in problems_of_run(run)] + problems_between(runs)


def test_runs_of_unequal_batch_line_up(tmp_path):
    assert problems(run(tmp_path / "a"), run(tmp_path / "b", batch=6), run(tmp_path / "c", batch=2)) == []
    assert sorted(read_run(tmp_path / "a").checkpoints) != sorted(read_run(tmp_path / "b").checkpoints)


@pytest.mark.parametrize("changes, words", [
    ({"total_tokens_processed": 90}, ["total_tokens_processed=90", "global_step=3 x tokens_per_step=32"]),
    ({"tokens_per_step": 30}, ["tokens_per_step=30", "effective_batch_size=4 x sequence_length=8"]),
    ({"total_tokens_supervised": 97}, ["total_tokens_supervised=97 exceeds total_tokens_processed=96"]),
    ({"estimated_tokens_at_step": 97}, ["estimated_tokens_at_step=97", "global_step=3"]),
    ({"estimated_tokens_at_step": 64}, ["estimated_tokens_at_step=64"]),  # step 2 has them already
    ({"effective_batch_size": 8}, ["effective_batch_size=8 is 4 by training_config"]),
    ({"sequence_length": 4}, ["sequence_length=4 is 8 by model_config"]),
    ({"tokens_per_step": 32.5}, ["tokens_per_step=32.5 is no count"]),
    ({"total_tokens_supervised": -1}, ["total_tokens_supervised=-1 is no count"]),
    ({"total_tokens_processed": None}, ["total_tokens_processed=None is no count"]),
], ids=str)  # fmt: skip
def test_counts_that_do_not_add_up_within_a_file(changes, words):
    assert problems_of_metadata(metadata(3)) == []
    found = " ".join(problems_of_metadata(metadata(3, **changes)))
    assert all(word in found for word in words), found


@pytest.mark.parametrize("name", [*metadata(3), *(f"token_metrics.{name}" for name in metadata(3)["token_metrics"])])
def test_what_every_metadata_file_has(name):
    record = copy.deepcopy(metadata(3))
    inner = name.partition(".")[2]
    del (record["token_metrics"] if inner else record)[inner or name]
    assert problems_of_metadata(record) == [f"has no {name}"]


def test_a_file_in_the_wrong_folder():
    assert problems_of_metadata(metadata(3), step=4) == ["global_step=3 is not the 4 of its folder"]


def edit(folder, step, **changes):
    path = folder / f"checkpoint-{step}" / "metadata.json"
    record = json.loads(path.read_text())
    record["token_metrics"].update(changes)
    path.write_text(json.dumps(record))


def test_a_checkpoint_that_the_schedule_has_and_the_run_has_not(tmp_path):
    assert problems(run(tmp_path / "a", leave_out=[100])) == [
        f"{tmp_path / 'a'}: no checkpoint was saved at 100 tokens, which its schedule has"
    ]
    assert problems(run(tmp_path / "b", leave_out=[320])) == []  # it has not got there yet


def test_a_damaged_file_is_named(tmp_path):
    folder = run(tmp_path / "a")
    path = folder / "checkpoint-2" / "metadata.json"
    path.write_text("[1")
    assert problems(folder) == [f"{path}: cannot be read"]


def test_metrics_that_say_otherwise(tmp_path):
    folder = run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 2, "tokens_processed": 60}\n')
    assert "total_tokens_processed=64 and metrics.jsonl logged 60" in problems(folder)[0]


def test_supervised_tokens_only_grow(tmp_path):
    folder = run(tmp_path / "a")
    edit(folder, 2, total_tokens_supervised=64)
    edit(folder, 4, total_tokens_supervised=63)
    assert problems(folder) == [f"{folder}: total_tokens_supervised goes down from one checkpoint to a later one"]


def test_runs_that_do_not_line_up(tmp_path):
    a = run(tmp_path / "a")
    assert "end at 320 and 400 tokens" in problems(a, run(tmp_path / "longer", schedule=(50, 100, 320, 400)))[0]
    assert "50 tokens is in one alone" in " ".join(problems(a, run(tmp_path / "other", schedule=(60, 100, 320))))
    fewer = run(tmp_path / "fewer")
    edit(fewer, 10, total_tokens_supervised=300)
    assert "supervised 320 and 300 of the same 320 tokens" in problems(a, fewer)[0]
    variant = json.loads((fewer / "checkpoint-10" / "metadata.json").read_text(encoding="utf-8"))
    variant["training_config"]["variant"] = "small"  # other records, other padding
    (fewer / "checkpoint-10" / "metadata.json").write_text(json.dumps(variant), encoding="utf-8")
    assert problems(a, fewer) == []
    empty = run(tmp_path / "empty", schedule=())
    assert "empty has no checkpoint" in problems(a, empty)[0]


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        read_run(tmp_path / "nothing")
