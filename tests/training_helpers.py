"""Runs of train.py inside the test's own process, on a text written once, with a model of a few thousand weights.

from training_helpers import book, workshop          # fixtures

folder = workshop.run("--max_iters=8")             # runs/<name>, as train.py leaves it
sentence = workshop.refused("--n_layr=2")            # what stands after 'error: ', once all else is checked
"""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import training_report
from model_flops import HardwarePeak
from training_checkpoint import sha256
from training_memory import StepMemory

ROOT = Path(__file__).resolve().parents[1]

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards brew potions in old kettles"

TINY = (
    "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--max_iters=8",
    "--learning_rate=0.01", "--warmup_iters=2", "--eval_interval=4", "--eval_iters=2", "--log_interval=1",
    "--sample_tokens=0", "--device=cpu", "--threads=1", "--plot=False", "--tensorboard=False",
)  # fmt: skip

# What a clock or a memory meter decides, and so differs between two runs that are otherwise the same.
MEASURED = {
    "seconds", "tokens_per_second", "mfu", "data_wait", "train_seconds", "eval_seconds", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """A folder with book.txt, 5 kB of sentences from sixteen words, and data/ where it is prepared once.

    Evaluations, which read its whole validation split, cost most of a tiny run: hence a short text.
    """
    folder, rng = tmp_path_factory.mktemp("book"), random.Random(1)
    words = SENTENCE.split()
    lines = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(80)]
    (folder / "book.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def write_games(path, n, seed=0):
    """Write n records of 4 to 17 tokens with their chances as lines of JSON, and return them as dicts.

    The second token is 2 or 3, which tells the outcome in 9 of 10 records; the last is 4 or 5 and tells it for certain.
    """
    rng, lines = random.Random(seed), []
    for _ in range(n):
        favours = rng.random() < 0.5
        outcome = int(favours == (rng.random() < 0.9))
        middle = [rng.choice((6, 7, 8)) for _ in range(rng.randrange(1, 15))]
        tokens = [1, 3 if favours else 2, *middle, 4 + outcome]
        chances = [0.5] + [0.9 if favours else 0.1] * (len(middle) + 1) + [float(outcome)]
        lines.append({"tokens": tokens, "outcome": outcome, "chances": chances})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8", newline="\n")
    return lines


class Workshop:
    """A folder for runs, the book to train on, and what a command printed."""

    def __init__(self, folder, book, capsys=None):
        self.folder, self.book, self.capsys = folder, book, capsys
        self.runs, self.numbers = folder / "runs", itertools.count(1)

    @property
    def data(self):
        return (f"--data_dir={self.book / 'data'}", "--dataset=text", f"--input={self.book / 'book.txt'}")

    def command(self, *arguments, name=None):
        """Arguments of a tiny run called `name`."""
        named = () if name is None else (f"--run_name={name}",)
        return [*self.data, f"--runs_dir={self.runs}", *TINY, *named, *arguments]

    def run(self, *arguments, name=None):
        """Train from scratch, and return the run folder."""
        name = name or f"run{next(self.numbers)}"
        with pytest.MonkeyPatch.context() as patch:
            measure_nothing(patch)
            train.main(self.command(*arguments, name=name))
        return self.runs / name

    def resume(self, folder, *arguments):
        train.main([f"--runs_dir={folder.parent}", f"--run_name={folder.name}", "--init_from=resume", *arguments])
        return folder

    def printed(self):
        """Standard output since it was last asked for."""
        return self.capsys.readouterr().out

    def refused(self, *arguments, main=train.main):
        """The sentence that a mistake costs; held to be one line, with exit code 2 and no trace of Python."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return err[len("error: ") : -1]


def a_memory(settings, place):
    return StepMemory({"weights": 1, "activations": 2}, 3, "forward and backward")


def a_peak(device, precision):
    return HardwarePeak(1e11, "a number")


def measure_nothing(patch):
    """Let no time go into measuring the processor's peak and counting memory."""
    patch.setattr(train, "hardware_peak", a_peak)
    patch.setattr(training_report, "step_memory", a_memory)


@pytest.fixture
def workshop(tmp_path, book, capsys, monkeypatch):
    """A Workshop in which train.main measures nothing either."""
    measure_nothing(monkeypatch)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, book, capsys)


# ---- reading runs ---------------------------------------------------------------------------------------------------


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder, kind=None):
    """Rows of metrics.jsonl without what a clock decides."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    found = [{key: value for key, value in row.items() if key not in MEASURED} for row in found]
    return [row for row in found if kind in (None, row["kind"])]


def summary(folder):
    return read_json(folder / "summary.json")


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def poison(folder, step, name="blocks.0.mixer_norm.weight", value=float("nan")):
    """Fill a parameter of a checkpoint, and make its checksums fit: what a diverged training would have saved."""
    place = folder / f"checkpoint-{step}"
    tensors = load_file(place / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, place / "model.safetensors")
    metadata = read_json(place / "metadata.json")
    metadata["checksums"]["model.safetensors"] = sha256(place / "model.safetensors")
    (place / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def training_state(folder, step):
    """training_state.pt without what a clock decides."""
    state = torch.load(folder / f"checkpoint-{step}" / "training_state.pt", weights_only=True)
    state["ledger"] = {key: value for key, value in state["ledger"].items() if key not in MEASURED}
    return state


def steps_of_checkpoints(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def files_in(folder):
    """{path: bytes} of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(a, b, where="value"):
    """Equal to the last bit, tensors included."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a, b, step):
    """Two runs agree at a checkpoint in weights, optimizer, stream and counters, and in every logged number."""
    assert_same(weights(a, step), weights(b, step), "weights")
    assert_same(training_state(a, step), training_state(b, step), "training_state")
    assert rows(a, "train") == rows(b, "train")
    assert rows(a, "eval") == rows(b, "eval")


def assert_same_training(one, other, steps=10, atol=1e-5):
    """Two runs agree in every logged loss and norm, in the stream and counters, and in weights and optimizer state."""
    for column in ("loss", "grad_norm"):
        found, expected = ([row[column] for row in rows(folder, "train")] for folder in (one, other))
        assert len(found) == steps and found == pytest.approx(expected, abs=atol), column
    for name in ("stream_hash", "tokens_processed", "tokens_supervised", "steps", "status", "n_params"):
        assert summary(one)[name] == summary(other)[name], name
    assert summary(one)["final_val_loss"] == pytest.approx(summary(other)["final_val_loss"], abs=atol)
    torch.testing.assert_close(weights(one, steps), weights(other, steps), rtol=0, atol=10 * atol)
    found, expected = (training_state(folder, steps)["optimizers"] for folder in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=10 * atol)


# ---- other processes ------------------------------------------------------------------------------------------------


def environment(**changes):
    """For a child process: one thread, and none of torchrun's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **changes}


def script(name, *arguments):
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


# One launch of torchrun, because starting ranks takes seconds: commands run one after another in its processes, with
# its own number for {rank} in each. They join at the first command and part after the last: a process can join once.
DRIVER = """
import json, os, sys
import torch.distributed as dist
import train, training_report, user_errors
from model_flops import HardwarePeak
from training_memory import StepMemory

join, part = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *where, **how: None if dist.is_initialized() else join(*where, **how)
dist.destroy_process_group = lambda: None
train.hardware_peak = lambda device, precision: HardwarePeak(1e11, "a number")
user_errors.SECONDS_FOR_RANK_0 = 0  # torchrun ends nobody here, whom it would where they wait to join


def say(line):  # in one write, which no other rank's can come between
    sys.stdout.flush()
    os.write(1, (line + os.linesep).encode())


for command in json.load(open(sys.argv[1])):
    try:
        train.main([argument.replace("{rank}", os.environ["RANK"]) for argument in command])
    except SystemExit as stop:
        say(f"left with {stop.code}")
    # The first command has counted its memory.
    training_report.step_memory = lambda settings, place: StepMemory({"weights": 1, "activations": 2}, 3, "a step")
part()
if sys.platform == "linux":
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    say(f"threads of gloo left: {sum('gloo' in name for name in names)}")
"""


def torchrun(folder, n_ranks, script, *arguments, timeout=300):
    """The finished process of `torchrun --nproc_per_node=n_ranks script arguments`, and its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}", str(script),
         *arguments],
        cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, encoding="utf-8",
        timeout=timeout,
    )  # fmt: skip


def launch(shop, commands, n_ranks=2, timeout=300):
    """What the ranks printed that went through the commands one after another."""
    (shop.folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    (shop.folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    done = torchrun(shop.folder, n_ranks, "driver.py", "commands.json", timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
