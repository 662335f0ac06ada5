"""Sweeps: what a file means, the plan, the choice of learning rates, and whole sweeps of tiny runs."""

import contextlib
import io
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import model_matching as matching
import sweep
import sweep_plan as planning
import train
from sweep_executors import SlurmExecutor, make_executor
from training_helpers import ROOT, TINY, a_peak, book, read_json, summary  # noqa: F401  fixtures

SWEEP_FILES = sorted((ROOT / "config").glob("sweep_*.py"))
FILE = """
variants = {{"one": "--n_embd=16", "two": "--n_embd=8 --ffn_type=swiglu"}}
{more}
n_layer, n_head, block_size, batch_size, max_iters = 1, 2, 16, 4, 8
"""


@pytest.fixture
def write(tmp_path):
    def file(more="", name="sweep_mine.py"):
        (tmp_path / name).write_text(FILE.format(more=more), encoding="utf-8")
        return str(tmp_path / name)

    return file


@pytest.fixture
def read(write):
    return lambda more="", *arguments: planning.read_sweep([write(more), *arguments])


class OneEpoch:
    """A dataset of 1,000 tokens for plans that read none."""

    vocab_size, fingerprint, name, train = 31, "x", "x", np.zeros(1001, dtype=np.uint8)


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_sweep_file_is_a_config_file_with_a_few_names_more(read):
    sweep_ = read("sizes = {'wide': '--n_embd=32'}\nseeds = (3, 9)\nlearning_rates = (1e-3, 1e-2)", "--max_iters=5")
    assert sweep_.config.sweep_name == "mine" and sweep_.seeds == (3, 9)
    assert sweep_.shared["max_iters"] == 8 and sweep_.overrides == {"max_iters": 5}
    assert planning.cells(sweep_) == [("one", "wide"), ("two", "wide")]
    arguments = planning.run_arguments(sweep_, "two", "wide")
    order = [arguments.index(word) for word in ("--max_iters=8", "--n_embd=8", "--n_embd=32", "--max_iters=5")]
    assert order == sorted(order)  # shared, variant, size, command line: what comes later wins


def test_a_size_may_give_each_variant_a_shape_of_its_own(read):
    sweep_ = read("sizes = {'S': {'one': '--n_layer=3', 'two': '--n_layer=2 --n_head=1'}, 'L': '--n_layer=5'}")
    found = {cell: planning.run_arguments(sweep_, *cell)[-2:] for cell in planning.cells(sweep_)}
    assert found["one", "S"][-1] == "--n_layer=3" and found["two", "S"] == ["--n_layer=2", "--n_head=1"]
    assert found["one", "L"][-1] == found["two", "L"][-1] == "--n_layer=5"


def test_the_tiers_of_the_games_have_the_known_shapes(monkeypatch):
    """Vocabulary 69, block 2560: docs/matching.md, and of the head n_embd + 1."""
    monkeypatch.chdir(ROOT)
    sweep_ = planning.read_sweep(["config/sweep_games_tiers.py"])
    dataset = OneEpoch()
    dataset.vocab_size, dataset.train = 69, np.zeros(10_000, dtype=np.uint8)
    sizes = {cell: planning.cost_of(planning.plan_run(sweep_, dataset, *cell, 1).settings).parameters
             for cell in planning.cells(sweep_)}  # fmt: skip
    assert sizes == {
        ("transformer", "1.1M"): 1_129_856 + 129, ("transformer", "5.4M"): 5_412_096 + 257,
        ("linear_attention", "1.1M"): 1_129_856 + 129, ("linear_attention", "5.4M"): 5_412_096 + 257,
        ("mamba", "1.1M"): 1_155_616 + 113, ("mamba", "5.4M"): 5_196_352 + 225,
    }  # fmt: skip


@pytest.mark.parametrize("seeds, meant", [(2, (1337, 1338)), ((5,), (5,)), (1, (1337,))])
def test_seeds_are_a_number_or_a_list(read, seeds, meant):
    assert read(f"seeds = {seeds!r}").seeds == meant


@pytest.mark.parametrize("more, arguments, words", [
    ("variants = {}", [], "variants = {'label'"),
    ("variants = {'a b': ''}", [], "label 'a b' cannot be part of a folder's name"),
    ("variants = {'a': 3}", [], "'a' is mapped to 3"),
    ("sizes = {'S': {'one': ''}}", [], "'S' has no shape for the variant 'two'; the variants are one, two"),
    ("sizes = {'S': {'one': '', 'two': '', 'tow': ''}}", [], "'S' names the variant 'tow'; the variants are one, two"),
    ("sizes = {'S': {'one': '', 'two': 3}}", [], "'S' must map 'two' to arguments of train.py, not to 3"),
    ("sizes = {'S': 3}", [], "'S' is mapped to 3"),
    ("learning_rate = 'high'", [], "learning_rate='high' is a str"),
    ("learning_rtes = (1e-3,)", [], "did you mean 'learning_rates'"),
    ("learning_rates = (1e-3, 0)", [], "one is 0"),
    ("learning_rates = ('a',)", [], "one is 'a'"),
    ("seeds = 0", [], "seeds=0 must be"),
    ("seeds = (1, 1)", [], "different whole numbers"),
    ("seed = 4", [], "seed is chosen for each run"),
    ("", ["--run_name=x"], "run_name is chosen for each run"),
    ("", ["--executor=cloud"], "known: local, slurm"),
    ("", ["--nodes=2"], "nodes=2 needs executor='slurm'"),
    ("", ["--tuning_fraction=0"], "tuning_fraction=0.0 must lie in"),
    ("", ["--at_once=-1"], "at_once=-1 must be at least 0"),
])  # fmt: skip
def test_what_no_sweep_can_be_is_refused(read, more, arguments, words):
    with pytest.raises(planning.UserError) as refusal:
        read(more, *arguments)
    assert words in str(refusal.value), str(refusal.value)


@pytest.mark.parametrize("text, words", [
    ("--n_layr=2", "variant 'a': the command line: 'n_layr' is not a setting"),
    ("config/arch_lama.py", "variant 'a': config file config/arch_lama.py does not exist"),
    ("--init_from=resume --run_name=x", "variant 'a'"),
])  # fmt: skip
def test_a_variants_mistake_names_the_variant(read, text, words):
    with pytest.raises(planning.UserError) as refusal:
        planning.run_arguments(read(f"variants = {{'a': {text!r}}}"), "a", "")
    assert words in str(refusal.value), str(refusal.value)


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.stem)
def test_every_sweep_that_ships_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep_ = planning.read_sweep([str(path)])
    assert len(sweep_.seeds) >= 3, "fewer seeds show nothing"
    names, dataset = set(), OneEpoch()
    dataset.train, dataset.vocab_size = np.zeros(10_000, dtype=np.uint8), sweep_.shared.get("tokenizer_vocab_size", 256)
    for cell in planning.cells(sweep_):
        run = planning.plan_run(sweep_, dataset, *cell, 1)
        cost = planning.cost_of(run.settings)
        assert cost.parameters >= cost.active_parameters > 0 and cost.flops_per_token > 0
        train_ = run.settings.train
        assert not train_.match or matching.record(run.settings.model, train_.match, train_.match_to)["is_matched"]
        names.add(run.name)
    assert len(names) == len(planning.cells(sweep_))


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_tokens_are_whole_steps_and_a_trial_is_a_part_of_them(read):
    sweep_ = read()
    run = planning.plan_run(sweep_, OneEpoch(), "one", "", 7)
    assert (run.tokens, run.name, run.settings.train.seed) == (8 * 4 * 16, "one-s7", 7)
    trial = planning.plan_run(sweep_, OneEpoch(), "one", "", 7, {"learning_rate": 3e-3}, fraction=0.3)
    assert trial.tokens == 3 * 4 * 16 == trial.settings.train.max_tokens
    assert trial.name == "one-lr0.003-s7" and trial.settings.train.learning_rate == 3e-3
    epochs = planning.plan_run(read("epochs = 2.0\nmax_iters = None"), OneEpoch(), "one", "", 7)
    assert epochs.tokens == math.ceil(2 * 61 / 4) * 64  # an epoch has 61 windows of 16, somewhere in 1,001 tokens


def test_the_detectable_difference_is_what_a_simulation_finds():
    n, spread, rng = 4, 0.02, np.random.default_rng(5)
    least = planning.detectable_difference(n, spread)
    differences = rng.normal(least, math.sqrt(2) * spread, size=(20_000, n))
    t = differences.mean(1) / (differences.std(1, ddof=1) / math.sqrt(n))
    found = (t > planning.t_quantile(n - 1)).mean()
    assert 0.75 < found < 0.9  # close to the 80% that the formula is for
    assert planning.detectable_difference(1, spread) is None
    assert planning.detectable_difference(9, spread) < least


def test_variants_that_see_different_tokens_are_named(read):
    sweep_ = read("variants = {'a': '', 'b': '--batch_size=8', 'c': '--block_size=8'}")
    first = {cell: planning.plan_run(sweep_, OneEpoch(), *cell, 1) for cell in planning.cells(sweep_)}
    text = "\n".join(sweep.differences(first))
    assert "not equal: tokens: a 512, b 1024, c 256" in text
    assert "not equal: sequences per step: a 4, b 8, c 4" in text and "not equal: block_size" in text
    assert sweep.differences({("a", ""): first["a", ""]}) == []


# ---- learning rates -------------------------------------------------------------------------------------------------


def results(losses, rates=(1e-4, 1e-3, 1e-2, 1e-1), decay=None):
    extra = {} if decay is None else {"weight_decay": decay}
    return [({"learning_rate": rate, **extra}, loss) for rate, loss in zip(rates, losses, strict=True)]


def test_the_lowest_point_of_a_parabola_in_log_rate_is_found_exactly():
    rates, lowest = (1e-4, 7e-4, 2e-3, 1e-2), 1.3e-3
    found = planning.best_of(results([(math.log(rate / lowest)) ** 2 for rate in rates], rates), tokens=40)
    assert found.settings["learning_rate"] == pytest.approx(lowest, rel=5e-3)
    assert (found.n_trials, found.tokens, found.note) == (4, 40, "")
    assert found.loss == pytest.approx(math.log(2e-3 / lowest) ** 2)


@pytest.mark.parametrize("losses, rate, words", [
    ([1.0, 2.0, 3.0, 4.0], 1e-4, "is the lowest tried; widen learning_rates with lower"),
    ([4.0, 3.0, 2.0, 1.0], 1e-1, "is the highest tried; widen learning_rates with higher"),
    ([4.0, 3.0, 2.0, None], 1e-2, "a neighbour of the best learning rate, 0.01, diverged"),
    ([4.0, 3.0, 2.0, math.nan], 1e-2, "diverged"),
])  # fmt: skip
def test_an_edge_or_a_divergence_is_said(losses, rate, words):
    found = planning.best_of(results(losses), tokens=1)
    assert found.settings["learning_rate"] == rate and words in found.note


def test_where_nothing_worked_nothing_is_chosen():
    found = planning.best_of(results([None, math.nan, math.inf, None]), tokens=1)
    assert found.loss is None and found.settings == {} and "every trial" in found.note


def test_the_rate_is_found_at_the_best_weight_decay():
    rates = (1e-3, 3e-3, 9e-3)
    found = planning.best_of(results([3, 2.0, 3], rates, 0.0) + results([3, 1.0, 2], rates, 0.1), tokens=1)
    assert found.settings["weight_decay"] == 0.1 and 3e-3 < found.settings["learning_rate"] < 9e-3


def test_every_rate_is_tried_with_every_decay(read):
    tried = planning.trials(read("learning_rates = (1e-2, 1e-3)\nweight_decays = (0, 0.1)"))
    assert tried == [{"learning_rate": r, "weight_decay": d} for d, r in itertools.product((0.0, 0.1), (1e-3, 1e-2))]
    assert planning.trials(read("weight_decays = (0.1,)")) == [{"weight_decay": 0.1}]


# ---- whole sweeps ---------------------------------------------------------------------------------------------------


class HereAndNow:
    """An executor that runs train.py inside the test's process: no second of importing for each run."""

    capacity = 1

    def __init__(self, config, folder):
        pass

    def start(self, name, arguments, log_path):
        said, code = io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                train.main(arguments)
            except SystemExit as stop:
                code = stop.code
        log_path.write_text(said.getvalue(), encoding="utf-8")
        return SimpleNamespace(ended=lambda: code == 0, stop=lambda: None, wait=lambda: None)


@pytest.fixture
def run(write, book, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Run a sweep of tiny runs, and return (its folder, what it printed)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "hardware_peak", a_peak)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.0)

    def go(more="", *arguments, code=None, real=False):
        monkeypatch.setattr(sweep, "make_executor", make_executor if real else HereAndNow)
        tiny = [argument for argument in TINY if "n_embd" not in argument]
        command = [write(more), *tiny, "--dataset=text", f"--input={book / 'book.txt'}", f"--data_dir={book / 'data'}",
                   f"--runs_dir={tmp_path / 'runs'}", "--timing_steps=0", *arguments]  # fmt: skip
        if code is None:
            sweep.main(command)
        else:
            with pytest.raises(SystemExit) as stop:
                sweep.main(command)
            assert stop.value.code == code
        printed = capsys.readouterr()
        return tmp_path / "runs" / "mine", printed.out + printed.err

    return go


def test_a_sweep_tunes_runs_and_is_not_run_twice(run):
    folder, text = run("seeds = (1, 2)\nlearning_rates = (1e-3, 1e-2, 1e-1)")
    assert sorted(path.name for path in (folder / "tuning").iterdir()) == sorted(
        f"{variant}-lr{rate}-s1" for variant in ("one", "two") for rate in ("0.001", "0.01", "0.1")
    )
    runs = {path.name: path for path in folder.glob("*-s[12]")}
    assert {*runs} == {"one-s1", "one-s2", "two-s1", "two-s2"}
    assert all(summary(path)["status"] == "finished" for path in runs.values())
    assert summary(runs["one-s1"])["stream_hash"] == summary(runs["two-s1"])["stream_hash"]
    record = read_json(folder / "sweep.json")
    for path in runs.values():
        settings = read_json(path / "config.json")["training_config"]
        found = record["tuned"][path.name.split("-")[0]]
        assert settings["learning_rate"] == found["settings"]["learning_rate"]
        assert (settings["tuning_runs"], settings["tuning_tokens"]) == (3, 3 * 2 * 64)
    assert "in 4 of 5 sweeps" in text and "4 of 4 runs finished" in text
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    _, text = run("seeds = (1, 2)\nlearning_rates = (1e-3, 1e-2, 1e-1)")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")} == before
    assert "6 of 6 trials were finished before" in text and "4 of 4 runs were finished before" in text


def test_a_matched_sweep_plans_the_shapes_that_it_trains_and_goes_on(run):
    more = """
sizes = {"S": "--match=params --match_to=12k"}
variants = {"one": "", "two": "--ffn_type=swiglu --activation=silu"}
"""
    tiny = ["--n_head=1", "--max_iters=2"]
    folder, text = run(more, "--seeds=2", *tiny)
    shapes = {name: read_json(folder / f"{name}-S-s1337" / "config.json") for name in ("one", "two")}
    for name, made in shapes.items():
        assert f"{made['parameters']['total']:,}" in text, name
        assert made["resolved"]["matching"]["target"] == 12_000
    _, text = run(more, "--seeds=2", *tiny)
    assert "4 of 4 runs were finished before" in text


def test_the_plan_says_how_equal_the_sizes_are(read):
    more = "variants = {'one': '', 'two': '--ffn_type=swiglu'}"
    sweep_ = read(more + "\nsizes = {'S': '--match=params --match_to=12k', 'L': '--n_embd=32'}")
    first = {cell: planning.plan_run(sweep_, OneEpoch(), *cell, 1) for cell in planning.cells(sweep_)}
    costs = {cell: planning.cost_of(run_.settings) for cell, run_ in first.items()}
    lines = sweep.how_equal(first, costs)
    n_one, n_two = (costs[name, "L"].parameters for name in ("one", "two"))
    assert f"L: parameters not matched ({100 * (max(n_one, n_two) / min(n_one, n_two) - 1):.1f}% apart)" in lines[-1]
    for cell in (("one", "S"), ("two", "S")):
        miss = 100 * (costs[cell].parameters / 12_000 - 1)
        said = [line for line in lines if line.startswith("-".join(cell))]
        assert bool(said) == (abs(miss) > 1) and all(f"({miss:+.2f}%)" in line for line in said)


def test_an_objective_that_adds_to_the_vocabulary_goes_on_too(run):
    more = "variants = {'one': '', 'two': '--normalization=layernorm'}\nobjective = 'masked_lm'\narch_preset = 'bert'"
    _, text = run(more, "--seeds=1", "--max_iters=2", "--n_embd=16")
    assert "2 of 2 runs finished" in text


def test_sigterm_stops_what_is_running_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sweep.terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_run_does_not_outlive_a_sweep_that_was_killed(tmp_path):
    leaves = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('left'))); print('up', flush=True)"
    sweeper = f"""
import os, pathlib, sys, time
from sweep_executors import LocalJob
log = pathlib.Path({str(tmp_path / "log")!r})
LocalJob([sys.executable, "-u", "-c", {leaves + "; time.sleep(60)"!r}], dict(os.environ), log)
while "up" not in log.read_text():
    time.sleep(0.02)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", sweeper], cwd=ROOT).returncode == -9
    end = time.monotonic() + 30
    while "left" not in (tmp_path / "log").read_text("utf-8") and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "log").read_text("utf-8").split() == ["up", "left"]


def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(run):
    folder, _ = run("seeds = (1,)", "--checkpoint_interval=2", "--keep_checkpoints=0")
    whole = summary(folder / "one-s1")
    shutil.rmtree(folder / "two-s1")  # never started
    (folder / "one-s1" / "summary.json").write_text(json.dumps({"status": "running"}), encoding="utf-8")
    for step in (6, 8):  # as a kill in mid-run leaves it
        shutil.rmtree(folder / "one-s1" / f"checkpoint-{step}")
    folder, text = run("seeds = (1,)", "--checkpoint_interval=2", "--keep_checkpoints=0")
    again = summary(folder / "one-s1")
    assert again["final_val_loss"] == whole["final_val_loss"] and again["stream_hash"] == whole["stream_hash"]
    assert summary(folder / "two-s1")["status"] == "finished" and "2 of 2 runs finished" in text


def test_a_run_that_stopped_before_its_first_checkpoint_is_put_aside(run):
    folder, _ = run("seeds = (1,)\nvariants = {'one': ''}", "--n_embd=16")
    kept = (folder / "one-s1" / "metrics.jsonl").read_bytes()
    (folder / "one-s1" / "summary.json").unlink()
    for checkpoint in (folder / "one-s1").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run("seeds = (1,)\nvariants = {'one': ''}", "--n_embd=16")
    assert (folder / "one-s1.stopped-1" / "metrics.jsonl").read_bytes() == kept
    assert summary(folder / "one-s1")["status"] == "finished"


def test_a_failing_run_is_tried_twice_and_stops_nothing_else(run):
    more = "seeds = (1,)\nvariants = {'one': '', 'two': '--attention_backend=flex'}"  # which does not train on a CPU
    folder, text = run(more, "--n_embd=16", code=2)
    assert summary(folder / "one-s1")["status"] == "finished"
    assert "two-s1 failed, trying once more: error:" in text and "two-s1 failed twice, going on without it" in text
    assert "1 of 2 runs finished" in text and "error: 1 run(s) failed twice: two-s1" in text


def test_a_variant_without_a_trial_that_worked_is_missed_at_the_end(run):
    more = "seeds = (1,)\nvariants = {'one': '', 'two': '--attention_backend=flex'}\nlearning_rates = (1e-2, 1e-1)"
    folder, text = run(more, "--n_embd=16", code=2)
    assert summary(folder / "one-s1")["status"] == "finished" and not (folder / "two-s1").exists()
    assert "two: left out; every trial failed or diverged" in text and "1 of 2 runs finished" in text
    assert "error: no trial of two worked; read" in text


def test_a_folder_of_other_runs_is_refused(run):
    folder, _ = run("seeds = (1,)\nvariants = {'one': ''}", "--n_embd=16")
    before = (folder / "one-s1" / "summary.json").read_bytes()
    _, text = run("seeds = (1,)\nvariants = {'one': '--dropout=0.1'}", "--n_embd=16", code=2)
    assert "was made with dropout=0.0 and this sweep says 0.1" in text and text.count("\n") < 20
    assert (folder / "one-s1" / "summary.json").read_bytes() == before


def test_processes_of_their_own_do_the_same(run):
    folder, text = run("seeds = (1,)", "--at_once=2", "--timing_steps=1", "--max_iters=2", real=True)
    assert [summary(folder / name)["status"] for name in ("one-s1", "two-s1")] == ["finished", "finished"]
    assert (
        "2 at once" in text and ", about " in text and "step 2/2" in (folder / "logs" / "one-s1.log").read_text("utf-8")
    )


@pytest.mark.skipif(shutil.which("sinfo") is None, reason="needs Slurm (slurm-wlm and munge) on this machine")
def test_slurm_does_the_same(run):
    if subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
        pytest.skip("Slurm is installed and no controller answers")
    folder, text = run("seeds = (1,)", "--executor=slurm", "--max_iters=2", real=True)
    assert [summary(folder / name)["status"] for name in ("one-s1", "two-s1")] == ["finished", "finished"]
    assert "Slurm job" in (folder / "logs" / "one-s1.log").read_text("utf-8") and "2 of 2 runs finished" in text


def test_what_every_node_of_a_job_runs():
    config = planning.SweepConfig(executor="slurm", nodes=2, processes_per_node=8)
    words = SlurmExecutor.command(SimpleNamespace(config=config), ["--run_name=a b"])
    assert words[:2] == ["bash", "-c"] and "--nnodes=2" in words and "--nproc_per_node=8" in words
    assert "train.py '--run_name=a b'" in words[2] and '--rdzv_endpoint="$head:29500"' in words[2]


def test_plan_only_leaves_nothing_behind(run):
    folder, text = run("seeds = (1,)", "--plan_only=True")
    assert not folder.exists() and "one seed: no difference between variants can be claimed" in text
