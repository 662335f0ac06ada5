"""metrics.jsonl and evals.jsonl: lines cut off, garbled or written twice, and which of them count."""

import json

from comparison_helpers import make_run
from comparison_logs import prompt_problems, prompt_score, read_metrics
from comparison_runs import load_run


def line_of(step, score, seed=1, sha="a" * 64, kind="prompts"):
    asked = {"prompt_file": {"name": "p.json", "sha256": sha}, "decoding": {"seed": seed}}
    return json.dumps({"kind": kind, "step": step, "score": score, **asked}) + "\n"


def test_a_line_cut_off_at_the_end_is_reported_and_the_rest_is_used(tmp_path):
    folder = make_run(tmp_path, "going", summary=None)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    run, problems = load_run(folder)
    assert problems == ["metrics.jsonl: line 22 cannot be read (cut off at the end); the rest is used"]
    assert run.values["final_val_loss"] > 2.0


def test_garbled_lines_are_counted(tmp_path):
    lines = [b'{"step": 1, "kind": "train"}', b"\xff\xfe", b"[1]", b'{"kind": "eval"}', b"", b'{"step": 2}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    rows, problems = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert problems == ["metrics.jsonl: 3 lines, the first 2, cannot be read; the rest is used"]


def test_steps_logged_again_after_a_resume_count_once(tmp_path):
    losses = ((1, 5.0), (2, 4.0), (3, 9.0), (2, 4.5), (3, 4.4))
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in losses]
    folder = make_run(tmp_path, "resumed", metrics=rows)
    assert [row["loss"] for row in read_metrics(folder)[0]] == [5.0, 4.5, 4.4]


def test_the_prompt_score_is_of_the_last_line_about_the_latest_checkpoint(tmp_path):
    folder = make_run(tmp_path, "a")
    assert load_run(folder)[0].values["prompt_score"] is None
    lines = [line_of(100, 0.1), line_of(100, 0.2), line_of(50, 0.9), line_of(100, 0.7, kind="other"), '{"cut of']
    (folder / "evals.jsonl").write_text("".join(lines), encoding="utf-8")
    run, problems = load_run(folder)
    assert run.values["prompt_score"] == 0.2 and not problems and not prompt_problems([run])
    assert prompt_score(folder, 50)[1] == 0.9 and prompt_score(folder, 60) == (None, None)


def test_prompt_scores_that_cannot_be_compared_are_told(tmp_path):
    runs = []
    for name, line in (("a", line_of(100, 0.1)), ("b", line_of(100, 0.1, 2)), ("c", line_of(50, 0.1, sha="b" * 64))):
        folder = make_run(tmp_path, name)
        (folder / "evals.jsonl").write_text(line, encoding="utf-8")
        runs.append(load_run(folder)[0])
    assert prompt_problems(runs[:1]) == []
    assert ["different settings of decoding" in line for line in prompt_problems(runs[:2])] == [True]
    step, files = prompt_problems([runs[0], runs[2]])
    assert step == "c: its prompt score is of step 50, not of its last, 100" and "different prompt files" in files
