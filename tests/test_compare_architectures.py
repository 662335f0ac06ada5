"""The script as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare_architectures
from comparison_helpers import make_run
from comparison_report import COLUMN, OF_ONE_OBJECTIVE

ROOT = Path(__file__).resolve().parent.parent
FILES = ["summary_table.csv", "summary_table.md"]


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
