"""Finding and reading runs: every kind of damage once."""

import json

import pytest

from comparison_audit import audit
from comparison_helpers import make_run, write_json
from comparison_runs import find_runs, load_run
from user_errors import UserError


def names(runs):
    return [run.name for run in runs]


# -- finding


def test_every_run_oldest_first_and_nothing_else(tmp_path):
    make_run(tmp_path, "second", created="2026-01-02T00:00:00+00:00")
    make_run(tmp_path, "first", created="2026-01-01T23:30:00Z")
    make_run(tmp_path, "third", created="2026-01-02T09:00:00+01:00")
    (tmp_path / "notes").mkdir()
    runs, problems = find_runs(tmp_path)
    assert names(runs) == ["first", "second", "third"]
    assert problems == []


def test_latest_counts_only_runs_that_can_be_read(tmp_path):
    for day in (1, 2, 3, 4):
        make_run(tmp_path, f"run{day}", created=f"2026-01-0{day}T00:00:00+00:00")
    (tmp_path / "run3" / "summary.json").unlink()
    (tmp_path / "run3" / "metrics.jsonl").unlink()
    runs, problems = find_runs(tmp_path, latest=2)
    assert names(runs) == ["run2", "run4"]
    assert problems == ["run3: left out: it has logged nothing yet"]


def test_names_globs_and_paths_in_the_order_given_each_once(tmp_path):
    for name in ("gpt2", "llama-a", "llama-b", "run[1]"):
        make_run(tmp_path / "runs", name)
    runs, _ = find_runs(tmp_path / "runs", ["llama*", "gpt2", str(tmp_path / "runs" / "llama-a"), "run[1]"])
    assert names(runs) == ["llama-a", "llama-b", "gpt2", "run[1]"]


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path):
    make_run(tmp_path / "monday", "llama")
    make_run(tmp_path / "tuesday", "llama")
    runs, problems = find_runs(tmp_path, ["*/llama"])
    assert names(runs) == ["monday/llama", "tuesday/llama"]
    assert [run.values["name"] for run in runs] == names(runs)
    assert problems == ["llama: 2 runs have this name, told apart as monday/llama, tuesday/llama"]


@pytest.mark.parametrize(
    "patterns, sentence",
    [
        (["lama"], "there is no run 'lama'.*did you mean 'llama'"),
        (["zzz"], r"there is no run 'zzz'.*\(there are: llama\)"),
        (["x*"], "no run in .* matches 'x\\*'"),
    ],
)
def test_an_unknown_run_is_one_sentence(tmp_path, patterns, sentence):
    make_run(tmp_path, "llama")
    with pytest.raises(UserError, match=sentence):
        find_runs(tmp_path, patterns)


def test_wrong_folders_are_one_sentence(tmp_path):
    make_run(tmp_path / "runs", "llama")
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no runs found"):
        find_runs(tmp_path)
    with pytest.raises(UserError, match="a run itself"):
        find_runs(tmp_path / "runs" / "llama")
    with pytest.raises(UserError, match="--runs_dir"):
        find_runs(tmp_path, ["runs"])


def test_no_readable_run_is_one_sentence(tmp_path):
    folder = make_run(tmp_path, "llama")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"no run can be compared; llama: left out: config\.json cannot be read"):
        find_runs(tmp_path)


# -- reading


def test_values_of_a_finished_run(tmp_path):
    run, problems = load_run(make_run(tmp_path, "llama", {"train_seconds": 7200}))
    assert problems == []
    assert run.status == "finished"
    assert run.values["hours"] == 2
    assert run.values["parameters"] == 1_000_000
    assert run.values["flops_per_token"] == 6e6
    assert run.values["final_val_loss"] == 2.0


def test_a_run_without_a_summary_is_read_from_its_metrics(tmp_path):
    folder = make_run(tmp_path, "going", summary=None)
    run, problems = load_run(folder)
    assert (run.status, problems) == ("unfinished", [])
    assert run.values["final_val_loss"] == 2.0
    assert run.values["tokens_processed"] == 76_800
    assert run.values["tokens_per_second"] == 2133.0
    assert run.values["hours"] == 0.01


def test_a_summary_written_on_the_way_is_not_the_end(tmp_path):
    run, _ = load_run(make_run(tmp_path, "going", {"status": "running"}))
    assert run.status == "unfinished"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1'])
def test_a_broken_config_leaves_its_run_out_by_name(tmp_path, content):
    make_run(tmp_path, "good")
    (make_run(tmp_path, "bad") / "config.json").write_text(content, encoding="utf-8")
    runs, problems = find_runs(tmp_path)
    assert names(runs) == ["good"]
    assert len(problems) == 1
    assert problems[0].startswith("bad: left out: config.json")
    assert "\n" not in problems[0]


def test_a_broken_summary_falls_back_on_the_metrics(tmp_path):
    folder = make_run(tmp_path, "edited")
    (folder / "summary.json").write_text('{"format": 1, "final', encoding="utf-8")
    run, problems = load_run(folder)
    assert run.status == "unfinished"
    assert "summary.json cannot be read" in problems[0]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), "2.0"], ids=str)
def test_a_loss_that_is_not_a_number_is_reported(tmp_path, loss):
    folder = make_run(tmp_path, "diverged", metrics=False)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    write_json(folder / "summary.json", summary | {"final_val_loss": loss, "non_finite_steps": 12})
    run, problems = load_run(folder)
    assert run.values["final_val_loss"] is None
    assert problems == ["its final validation loss is not a finite number (12 non-finite steps); it is not ranked"]


def test_an_older_format_is_reported_and_read_as_far_as_it_goes(tmp_path):
    folder = make_run(tmp_path, "old")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for section in ("format", "dataset", "resolved", "git"):
        del config[section]
    write_json(folder / "config.json", config)
    run, problems = load_run(folder)
    assert problems == ["config.json has format None, not 1; what it lacks stays empty"]
    assert run.values["final_val_loss"] == 2.0
    audit([run, run])


def test_metrics_are_not_read_for_a_finished_run(tmp_path):
    folder = make_run(tmp_path, "a")
    (folder / "metrics.jsonl").write_bytes(b"\xff not read")
    assert load_run(folder)[1] == []


# -- prompt scores
