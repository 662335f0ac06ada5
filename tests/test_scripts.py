"""What stands in scripts/: run as programs would run it, with exit codes and sentences."""

import importlib.util
import json
import subprocess

import pytest

from training_helpers import (  # noqa: F401
    ROOT,
    book,
    environment,
    read_json,
    rows,
    script,
    steps_of_checkpoints,
    workshop,
)


def main_of(name):
    """`main` of scripts/<name>.py, loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def generate():
    return main_of("generate_checkpoint_schedule")


@pytest.fixture
def sync():
    return main_of("sync_checkpoint_schedules")


@pytest.fixture
def verify():
    return main_of("verify_checkpoints")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "scripts").glob("*_checkpoint*.py"))])
def test_each_says_how_to_run_it(name, capsys):
    needed = name in ("verify_checkpoints", "convert_checkpoint")  # nothing to verify or convert is no success
    for arguments in (*([] if needed else [[]]), ["--help"], ["-h"]):
        main_of(name)(arguments)
        assert f"python scripts/{name}.py" in capsys.readouterr().out


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_a_schedule_is_printed_in_steps_and_tokens(workshop, generate):  # noqa: F811
    size = ("--batch_size=4", "--block_size=16", "--max_tokens=1000")
    generate([*workshop.data, *size, "--checkpoint_tokens=100,110,300"])
    out = workshop.printed()
    assert "64 tokens per step" in out and "1,000 in all" in out
    table = [line.split()[:3] for line in out.splitlines()[2:5]]
    assert table == [["2", "110", "128"], ["5", "300", "320"], ["16", "1,000", "1,024"]]
    assert "1 more fall on steps that others do" in out
    assert out.splitlines()[-1] == "checkpoint_tokens = (100, 110, 300, 1000)"


def test_no_schedule_is_a_sentence(workshop, generate):  # noqa: F811
    assert workshop.refused(*workshop.data, main=generate).startswith("no schedule is set: give --first_epoch")


def test_two_configs_get_one_schedule(workshop, sync):  # noqa: F811
    for name in ("a", "b"):
        (workshop.folder / f"{name}.py").write_text("block_size = 16\nmax_tokens = 1000\n", encoding="utf-8")
    sync(["a.py", "b.py", *workshop.data, "--checkpoint_tokens=200"])
    assert workshop.printed() == "schedule: 2 token counts, 200 to 1,000\na.py: written\nb.py: written\n"
    sync(["a.py", "b.py", *workshop.data])
    assert "a.py: had it already\nb.py: had it already\n" in workshop.printed()
    assert workshop.refused("a.py", main=sync) == "name at least two config files to give one schedule to"
    assert workshop.refused("a.py", "./a.py", main=sync) == "name at least two config files to give one schedule to"
    assert "--checkpoint_tokens=VALUE" in workshop.refused("a.py", "b.py", "--checkpoint_tokens", "5", main=sync)


# ---- runs that save and are scored at one schedule -------------------------------------------------------------------

SCHEDULED = ("--checkpoint_tokens=100,300", "--eval_schedule=checkpoints", "--max_tokens=500", "--keep_checkpoints=1")


def test_runs_of_unequal_batch_save_and_evaluate_in_line(workshop, verify):  # noqa: F811
    small = workshop.run("--batch_size=2", *SCHEDULED)  # 32 tokens a step
    large = workshop.run("--batch_size=6", *SCHEDULED)  # 96
    assert (steps_of_checkpoints(small), steps_of_checkpoints(large)) == ([4, 10, 16], [2, 4, 6])
    for folder in (small, large):
        scored = [(row["tokens_scheduled"], row["tokens_processed"]) for row in rows(folder, "eval")]
        paths = [folder / f"checkpoint-{step}" / "metadata.json" for step in steps_of_checkpoints(folder)]
        saved = [read_json(path)["token_metrics"] for path in paths]
        assert [count for count, _ in scored] == [100, 300, 500]
        assert scored == [(each["estimated_tokens_at_step"], each["total_tokens_processed"]) for each in saved]
    workshop.printed()
    verify([str(small), str(large)])
    assert workshop.printed() == "6 checkpoints of 2 runs agree\n"


def test_a_run_that_stops_and_goes_on_keeps_its_schedule(workshop, verify):  # noqa: F811
    folder = workshop.run(*SCHEDULED, "--max_tokens=200", "--eval_schedule=interval")  # 64 tokens a step
    workshop.resume(folder, "--max_tokens=500", "--checkpoint_tokens=100,200,300")
    assert steps_of_checkpoints(folder) == [2, 4, 5, 8]
    verify([str(folder)])


def test_counts_that_disagree_are_exit_code_1(workshop):  # noqa: F811
    folder = workshop.run("--max_iters=2")
    path = folder / "checkpoint-2" / "metadata.json"
    record = read_json(path)
    record["token_metrics"]["total_tokens_processed"] += 1
    path.write_text(json.dumps(record), encoding="utf-8")
    command = script("scripts/verify_checkpoints.py", folder)
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and done.stderr == ""
    assert "total_tokens_processed=129 is not global_step=2 x tokens_per_step=64" in done.stdout


def test_no_run_to_verify_is_a_sentence(workshop, verify):  # noqa: F811
    assert "there is no run at nothing" in workshop.refused("nothing", main=verify)
    assert workshop.refused(main=verify).startswith("no run folder is given")
    assert workshop.refused("--deep", main=verify) == "--deep is no run folder; see --help"
