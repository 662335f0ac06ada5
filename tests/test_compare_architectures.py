"""The script as a user runs it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare_architectures
from comparison_helpers import make_run
from comparison_ranking import COLUMN, OF_ONE_OBJECTIVE

ROOT = Path(__file__).resolve().parent.parent
FILES = ["pairs.csv", "report.html", "summary_table.csv", "summary_table.md"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with runs/gpt2 and runs/llama, where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    runs = tmp_path / "runs"
    make_run(runs, "gpt2", {"final_val_loss": 2.1}, normalization="layernorm", created="2026-01-01T00:00:00")
    make_run(runs, "llama", {"final_val_loss": 2.0}, created="2026-01-02T00:00:00")
    return tmp_path


def refused(capsys, *arguments):
    """Run and return the one sentence on stderr."""
    with pytest.raises(SystemExit) as stop:
        compare_architectures.main(list(arguments))
    assert stop.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    return sentence


def test_table_plots_and_files(workplace, capsys):
    compare_architectures.main(["--out_dir", "out"])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.index("1  llama") < output.out.index("2  gpt2")
    assert "normalization: layernorm -> rmsnorm  -0.1000 (one seed)" in output.out
    assert "\x1b" not in output.out
    files = sorted(path.name for path in (workplace / "out").iterdir())
    assert files == [*FILES, "training_loss.png", "validation_loss.png"]


WAYS = [["--latest", "1"], ["--latest=1"], ["llama"], ["ll*"], ["runs/llama"], ["runs/ll*"]]


@pytest.mark.parametrize("arguments", WAYS, ids=" ".join)
def test_ways_to_choose(workplace, capsys, arguments):
    compare_architectures.main([*arguments, "--no_plots"])
    output = capsys.readouterr().out
    assert "1  llama" in output
    assert "gpt2" not in output
    (folder,) = (workplace / "comparisons").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_nothing_is_written_over(workplace):
    (workplace / "empty").mkdir()
    (workplace / "file").write_text("mine", encoding="utf-8")
    for out_dir in ("out", "out", "empty", "file"):
        compare_architectures.main(["--no_plots", "--out_dir", out_dir])
    folders = sorted(path.name for path in workplace.iterdir() if path.is_dir() and path.name != "runs")
    assert folders == ["empty", "file-2", "out", "out-2"]
    assert (workplace / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["lama"], "did you mean 'llama'"),
        (["x*"], "matches 'x*'"),
        (["runs"], "--runs_dir"),
        (["--runs_dir", "nowhere"], "no folder 'nowhere'"),
        (["--latest=0"], "--latest=0 must be at least 1"),
        (["--latest=x"], "--latest"),
        (["--latset=2"], "did you mean '--latest'"),
        (["--sort=mfuu"], "did you mean 'mfu'"),
        (["--sort=loss"], "final_val_loss"),
        (["--max_rows=-1"], "must be 0 or more"),
        (["--out_dir=runs/llama/config.json/x"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_cost_one_sentence(workplace, capsys, arguments, words):
    assert words in refused(capsys, "--no_plots", *arguments)


@pytest.mark.parametrize("column", [name for name in COLUMN if name not in OF_ONE_OBJECTIVE])
def test_sorts_by_every_column(workplace, capsys, column):
    compare_architectures.main(["--no_plots", "--sort", column])
    assert f"by {COLUMN[column].title}" in capsys.readouterr().out


def test_damaged_runs_are_named_and_the_rest_is_compared(workplace, capsys):
    broken = make_run(workplace / "runs", "broken")
    (broken / "config.json").write_text("{", encoding="utf-8")
    going = make_run(workplace / "runs", "going", summary=None, n_layer=3)
    (going / "metrics.jsonl").write_bytes((going / "metrics.jsonl").read_bytes()[:-20])
    compare_architectures.main(["--out_dir", "out"])
    output = capsys.readouterr().out
    assert "broken: left out: config.json cannot be read" in output
    assert "going: metrics.jsonl: line 22 cannot be read" in output
    assert "1  llama" in output
    assert "-  going (unfinished)" in output


def test_incomparable_runs_get_plots_of_their_own(workplace, capsys):
    make_run(workplace / "runs", "other", dataset__fingerprint="ffff")
    compare_architectures.main(["--out_dir", "out"])
    assert capsys.readouterr().out.startswith("NOT COMPARABLE")
    assert (workplace / "out" / "ranking_2_validation_loss.png").exists()


def test_as_a_script_without_torch_and_with_any_encoding(workplace):
    """Neither torch, nor rich or matplotlib before they are needed; ASCII output does not end in a traceback."""
    code = (
        "import sys, compare_architectures as script\n"
        "assert not {'torch', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "script.main(['--no_plots'])\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment.pop("COLUMNS")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=workplace)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1 |llama" in done.stdout
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--at_tokens=abc"], "--at_tokens=abc must be a number of tokens, such as 100M or 5e6"),
        (["--at_tokens=0"], "must be at least 1"),
        (["--to_loss=0"], "--to_loss=0.0 must be a number above 0"),
        (["--to_loss=nan"], "must be a number above 0"),
        (["--to_loss=low"], "--to_loss"),
    ],
)
def test_a_point_that_cannot_be_meant_is_refused(workplace, capsys, arguments, words):
    assert words in refused(capsys, "--no_plots", *arguments)


@pytest.mark.parametrize(
    "text, tokens", [("100M", 10**8), ("1.5k", 1500), ("5e6", 5 * 10**6), ("2B", 2 * 10**9), ("1_000", 1000), ("7", 7)]
)
def test_token_counts_as_people_write_them(text, tokens):
    assert compare_architectures.token_count(text) == tokens


def test_held_at_a_token_count_and_to_a_loss(workplace, capsys):
    compare_architectures.main(["--no_plots", "--at_tokens=40k", "--to_loss=3", "--out_dir", "out"])
    output = capsys.readouterr().out
    nearest = "At 38,400 tokens, the nearest count to the 40,000 asked for at which all runs were evaluated."
    assert nearest in " ".join(output.split())
    assert "To reach 3.0000: as asked for" in output
    page = (workplace / "out" / "report.html").read_text(encoding="utf-8")
    assert nearest in page and "python compare_architectures.py --no_plots --at_tokens=40k" in page


def test_no_finished_run_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs", "a", {"status": "running"})
    make_run(tmp_path / "runs", "b", {"final_val_loss": None}, n_layer=3)
    monkeypatch.chdir(tmp_path)
    compare_architectures.main(["--no_plots"])
    sentence = "Nothing can be ranked: no run has finished with a finite final validation loss: "
    output = capsys.readouterr().out
    assert sentence + "a (unfinished), b (finished)" in " ".join(output.split())
    assert "b: its final validation loss is not a finite number" in output


def test_damaged_curves_are_told_where_the_runs_are(workplace, capsys):
    path = workplace / "runs" / "llama" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    compare_architectures.main(["--no_plots", "--out_dir", "out"])
    sentence = "llama: metrics.jsonl: line 22 cannot be read (cut off at the end); the rest is used"
    assert sentence in capsys.readouterr().out
    assert sentence in (workplace / "out" / "report.html").read_text(encoding="utf-8")
    assert "the logs of llama contradict each other" in (workplace / "out" / "summary_table.md").read_text(
        encoding="utf-8"
    )


def test_rows_of_nonsense_do_not_stop_the_rest(workplace, capsys):
    rows = [
        {"kind": "eval", "step": 1, "tokens_processed": "many", "val_loss": 3.0, "train_seconds": -1},
        {"kind": "eval", "step": 2, "tokens_processed": 200, "val_loss": "low", "train_seconds": None},
        {"kind": "eval", "step": 3, "tokens_processed": 76_800, "val_loss": float("nan")},
        {"kind": ["eval"], "step": 4, "val_loss": {}},
    ]
    make_run(workplace / "runs", "odd", metrics=rows, n_layer=3, model_config__part_options=[1], resolved__kernels="x")
    compare_architectures.main(["--no_plots", "--out_dir", "out", "--at_tokens=100"])
    output = capsys.readouterr().out
    assert "odd: metrics.jsonl: 2 of 3 evaluations have no finite loss; left out of curves" in output
    assert (
        "2  llama" in output and "3  gpt2" in output and "No evaluation at a token count that all runs share" in output
    )


def test_a_thousand_runs_take_seconds(workplace, capsys):
    """The promise is 10 s on a quiet machine; here it is a fifth as many runs, and room for a busy one."""
    for index in range(200):
        name, seed, loss = f"run{index // 3}-s{index % 3}", index % 3, 2 + index / 1000
        make_run(workplace / "many", name, {"final_val_loss": loss}, seed=seed, n_layer=1 + index // 3)
    before = time.process_time()
    compare_architectures.main(["--no_plots", "--runs_dir", "many", "--out_dir", "out"])
    assert time.process_time() - before < 10
    assert "and 37 more rows" in capsys.readouterr().out
