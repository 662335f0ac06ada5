"""comparison_evals.py: what evaluate.py found stands beside the loss, in every form of the report."""

import csv
import inspect
import json
import re
from pathlib import Path

import pytest

import compare_architectures
import comparison_evals
import eval_lm_harness
import eval_tasks
from comparison_evals import KINDS, eval_problems, findings_of, groups_of
from comparison_helpers import make_run
from comparison_html import EVAL_TOLD
from comparison_ranking import rank
from comparison_runs import find_runs
from eval_prompts import Decoding, Prompt, PromptFile, PromptResult

PLACE = {"format": 1, "checkpoint": "checkpoint-100", "step": 100, "tokens_processed": 76_800}


def loss_line(scale=1.0, **more):
    groups = {
        "whole": {"all": 2.0}, "context": {"1x": 2.0, "2x": 1.9, "4x": None},
        "position": {"1": 4.0, "2-3": 3.0, "4-7": 2.0}, "recall": {"new": 2.5, "seen": 0.5},
        "frequency": {"1-10": 1.0, "11-100": 3.0, "never": 9.0},
    }  # fmt: skip
    parts = {part: {group: {"loss": loss and scale * loss, "targets": 10} for group, loss in each.items()}
             for part, each in groups.items()}  # fmt: skip
    return {**PLACE, "kind": "loss", "loss_tokens": 4096, "parts": parts, **more}


def prompt_line(score=0.25, **more):
    row = {"score": score, "chosen": 0.5}
    return {**PLACE, "kind": "prompts", "prompt_file": {"name": "p.json", "sha256": "ab" * 32}, "decoding": {"seed": 1},
            "score": score, "passed": 0.2, "chosen": 0.5, "chosen_by_chance": 0.3, "answer_nats_per_byte": 1.5,
            "categories": {"pronouns": row, "counting": {**row, "score": 0.0}}, "difficulties": {"all": row},
            **more}  # fmt: skip


def harness_line(value=0.75, **more):
    def task(metrics, main, group=None):
        return {"group": group, "version": 1.0, "n_shot": 0, "questions": 4, "main": main, "metrics": metrics}

    acc = {"acc": {"value": value, "stderr": 0.1, "better": "higher"}}
    tasks = {
        "mmlu": task(acc, "acc"),
        "mmlu_law": task(acc, "acc", "mmlu"),
        "piqa": task(acc, "acc"),
        "wiki": task({"bits_per_byte": {"value": 1.25, "stderr": None, "better": "lower"}}, "bits_per_byte"),
    }
    return {**PLACE, "kind": "lm_eval", "harness": "0.4.13", "limit": None, "seed": 1, "tasks": tasks, **more}


def probe_line(accuracy=0.5, **more):
    def row(name, **changed):
        return {"probe": name, "block_size": 64, "zero_shot": True, "accuracy": accuracy, "chance": 0.25,
                "answers": 80, **changed}  # fmt: skip

    rows = [row("induction+n_symbols=4"), row("parity", chance=0.5, accuracy=1.0, zero_shot=False)]
    return {**PLACE, "kind": "probes", "examples": 20, "probes": rows, **more}


def append(folder, *lines):
    with open(folder / "evals.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def runs_dir(tmp_path):
    """Two seeds of one architecture and one of another, all asked everything."""
    for seed, scale in ((1, 1.0), (2, 1.5)):
        append(make_run(tmp_path / "runs", f"a{seed}", seed=seed), loss_line(scale), prompt_line(), harness_line())
    other = make_run(tmp_path / "runs", "b", {"final_val_loss": 3.0}, seed=1, block_pattern="mamba2")
    append(other, loss_line(2.0), prompt_line(0.5), harness_line(0.5))
    return tmp_path / "runs"


def found_in(runs_dir):
    (ranking,) = rank(find_runs(runs_dir)[0])
    return {found.kind: found for found in findings_of(ranking)}, ranking


def test_tables_of_means_over_seeds(runs_dir):
    found, _ = found_in(runs_dir)
    assert list(found) == ["prompts", "lm_eval", "loss"]
    loss = found["loss"]
    assert loss.columns == ["1x context", "2x context", "seen", "new", "rank never"]  # nobody has the others
    (_, first), (_, second) = loss.rows
    half_width = 12.7062 * 0.5  # of 2.0 and 3.0: their standard error is 0.5, and Student's t with two seeds 12.7062
    assert first[0] == f"2.5000 ± {half_width:.4f}" and second[0] == "4.0000"
    prompts = dict(zip(found["prompts"].columns, found["prompts"].rows[1][1], strict=True))
    assert prompts == {"score": "50.0%", "passed": "20.0%", "chosen": "50.0%", "by chance": "30.0%",
                       "nats/byte": "1.5000"}  # fmt: skip
    harness = dict(zip(found["lm_eval"].columns, found["lm_eval"].rows[0][1], strict=True))
    assert harness == {"mmlu acc": "75.0%", "piqa acc": "75.0%", "wiki bits_per_byte": "1.25"}


@pytest.mark.parametrize("Task", [
    cls for module in (eval_tasks, eval_lm_harness) for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "record")
])  # fmt: skip
def test_every_evaluation_that_is_written_is_read(monkeypatch, Task):
    for name in ("harness", "task_manager"):  # the package may not be there
        monkeypatch.setattr(eval_lm_harness, name, lambda *given: None)
    made = {"PromptTask": (prompts_of_one(), Decoding()), "LossTask": (1,), "ProbeTask": ([], 1), "HarnessTask": ([],)}
    found = {"PromptTask": [PromptResult(prompts_of_one().prompts[0])], "LossTask": ({}, ""), "ProbeTask": [],
             "HarnessTask": {}}  # fmt: skip
    kind = Task(*made[Task.__name__]).record(found[Task.__name__])["kind"]
    assert kind in KINDS and kind in EVAL_TOLD


def prompts_of_one():
    return PromptFile(Path("p.json"), "ab", (Prompt("fox", "the quick", ("fox",)),))


def test_probes_stand_beside_chance(runs_dir, tmp_path, capsys):
    for name, accuracy in (("a1", 0.5), ("a2", 0.75), ("b", 0.3)):
        append(runs_dir / name, probe_line(accuracy))
    found, ranking = found_in(runs_dir)
    assert list(found) == ["prompts", "lm_eval", "probes", "loss"]
    probes, (a, b) = found["probes"], ranking.configurations
    zero_shot = "induction+n_symbols=4 zero-shot (by chance 25.0%)"
    assert probes.columns == [zero_shot, "parity (by chance 50.0%)"] and probes.rows[1][1] == ["30.0%", "100.0%"]
    assert probes.rows[0][1][0].startswith("62.5% ± ") and probes.note.endswith("20 examples of each")
    assert probes.panels["probes"][a][zero_shot] == [0.5, 0.75] and probes.panels["probes"][b][zero_shot] == [0.3]
    out = compare(runs_dir, tmp_path / "out")
    page, printed = (out / "report.html").read_text("utf-8"), re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"{zero_shot} 30.0% · parity (by chance 50.0%) 100.0%" in printed and zero_shot in page
    with open(out / "evaluations.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "probes" and row["part"] == "summary"]
    assert [float(row["value"]) for row in rows if row["group"] == zero_shot] == [0.5, 0.75, 0.3]


@pytest.mark.parametrize("changed", [{"zero_shot": False}, {"block_size": 128}], ids=str)
def test_probes_asked_differently_cost_a_line(runs_dir, changed):
    append(runs_dir / "a1", probe_line())
    append(runs_dir / "a2", probe_line(0.9))
    assert eval_problems(find_runs(runs_dir)[0]) == []
    line = probe_line()
    line["probes"][0].update(changed)
    append(runs_dir / "b", line)
    (problem,) = eval_problems(find_runs(runs_dir)[0])
    assert problem.startswith("probes: runs were asked differently: induction+n_symbols=4 in 64 tokens zero-shot, ")


def test_panels_hold_a_number_of_each_run(runs_dir):
    found, ranking = found_in(runs_dir)
    a, b = ranking.configurations
    assert list(found["loss"].panels) == ["context", "recall", "frequency", "position"]
    assert found["loss"].panels["recall"] == {a: {"new": [2.5, 3.75], "seen": [0.5, 0.75]},
                                              b: {"new": [5.0], "seen": [1.0]}}  # fmt: skip
    assert list(found["loss"].panels["frequency"][a]) == ["1-10", "11-100", "never"]
    assert list(found["prompts"].panels) == ["by category, written", "by category, chosen"]  # one difficulty: no panel
    assert list(found["lm_eval"].panels["tasks"][b]) == ["mmlu acc", "piqa acc"]


def test_frequencies_that_few_targets_have_are_not_drawn(runs_dir):
    line = loss_line()
    line["parts"]["whole"]["all"]["targets"], line["parts"]["frequency"]["never"]["targets"] = 1000, 9
    assert comparison_evals.FEW_TARGETS == eval_tasks.FEW_TARGETS
    append(runs_dir / "b", line)
    found, ranking = found_in(runs_dir)
    b = ranking.configurations[1]
    assert list(found["loss"].panels["frequency"][b]) == ["1-10", "11-100"]


def test_groups_stand_in_the_order_of_their_numbers():
    assert groups_of({"x": {"1": 0, "2-3": 0, "64-127": 0, "256": 0}, "y": {"1": 0, "32": 0, "4-7": 0}}) == [
        "1", "2-3", "4-7", "32", "64-127", "256"]  # fmt: skip
    assert groups_of({"x": {"never": 0, "over 10000": 0, "1001-10000": 0, "1-10": 0}})[2:] == ["over 10000", "never"]
    assert groups_of({"x": {"wmt16": 0, "arc_2": 0}}) == ["wmt16", "arc_2"]


def test_the_last_line_about_the_latest_checkpoint_counts(runs_dir):
    append(runs_dir / "b", loss_line(9.0, step=50), loss_line(3.0), loss_line(8.0, step=60))
    (runs_dir / "b" / "evals.jsonl").open("a").write('{"kind": "loss", "st')
    found, _ = found_in(runs_dir)
    assert found["loss"].rows[1][1][0] == "6.0000"


def test_runs_that_were_asked_differently_cost_a_line(runs_dir):
    runs = find_runs(runs_dir)[0]
    assert eval_problems(runs) == []
    append(runs_dir / "b", loss_line(loss_tokens=99), harness_line(limit=5))
    problems = eval_problems(find_runs(runs_dir)[0])
    assert [problem.partition(":")[0] for problem in problems] == ["tasks of the harness", "anatomy of the loss"]
    assert "4096 validation tokens and 99 validation tokens" in problems[1] and "the first 5 questions" in problems[0]
    for name in ("a1", "a2", "b"):
        (runs_dir / name / "evals.jsonl").unlink()
    append(runs_dir / "b", loss_line(step=50))
    (problem,) = eval_problems(find_runs(runs_dir)[0])
    assert problem == "b: its anatomy of the loss is of step 50, not of its last, 100"


def compare(runs_dir, out, *arguments):
    compare_architectures.main([f"--runs_dir={runs_dir}", f"--out_dir={out}", *arguments])
    return out


def test_every_form_of_the_report_has_them(runs_dir, tmp_path, capsys):
    out = compare(runs_dir, tmp_path / "out")
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    markdown = re.sub(r"\s+", " ", (out / "summary_table.md").read_text("utf-8"))
    for text in (printed, markdown):
        assert "#2 b" in text and "seen 1.0000 · new 5.0000" in text.replace("\\", "")
        assert "mmlu acc 50.0% · piqa acc 50.0%" in text.replace("\\", "") and "chosen 50.0%" in text
    assert "loss_parts.png" in markdown and (out / "loss_parts.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text("utf-8")
    section = page[page.index('id="evals"') : page.index('id="costs"')]
    assert section.count("<svg") == 7 and section.count("<table") == 3
    assert all(f">{group}<" in section for group in ("seen", "11-100", "4-7", "2x", "pronouns", "mmlu acc"))
    with open(out / "evaluations.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    (seen,) = [row for row in rows if (row["run"], row["part"], row["group"]) == ("a2", "recall", "seen")]
    assert float(seen["value"]) == 0.75 and seen["kind"] == "loss" and seen["seed"] == "2"


def test_without_evaluations_nothing_changes(tmp_path, capsys):
    make_run(tmp_path / "runs", "a", seed=1)
    make_run(tmp_path / "runs", "b", {"final_val_loss": 3.0}, seed=1, block_pattern="mamba2")
    out = compare(tmp_path / "runs", tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert not names & {"evaluations.csv", "loss_parts.png"} and "report.html" in names
    assert 'id="evals"' not in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("line", [
    {**PLACE, "kind": "loss"}, {**PLACE, "kind": "loss", "parts": {"recall": 3, "whole": {"all": None}}},
    {**PLACE, "kind": "prompts", "score": 0.5}, {**PLACE, "kind": "lm_eval", "tasks": {"x": {}, "y": 2}},
    {**PLACE, "kind": "probes"}, {**PLACE, "kind": "probes", "probes": [3, {}, {"probe": "x", "accuracy": "y"}]},
    {**PLACE, "kind": "probes", "probes": 3}, {**PLACE, "kind": "other"}, {**PLACE, "kind": ["x"]},
], ids=str)  # fmt: skip
def test_a_line_that_lacks_what_it_should_have_leaves_a_gap(tmp_path, line):
    append(make_run(tmp_path / "runs", "a", seed=1), line)
    make_run(tmp_path / "runs", "b", {"final_val_loss": 3.0}, seed=1, block_pattern="mamba2")
    out = compare(tmp_path / "runs", tmp_path / "out")
    assert (out / "report.html").is_file()
