"""Hold the memory that a dry run counts to what a run on this CPU takes.

    python scripts/measure_memory.py                                         # a table of architectures, about 8 minutes
    python scripts/measure_memory.py config/arch_llama.py --n_layer=8 --batch_size=16

Each row is a process of its own: a step of the same parts at a width of 32 first, so that everything is imported and
checked, then a run of a few steps at the size asked for. What the peak of its resident memory grew by is 'measured';
'counted' is what `python train.py ... --dry_run=True` prints. Linux and macOS.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from user_errors import Parser, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
MEDIUM = ["--n_layer=6", "--n_embd=256", "--n_head=4", "--block_size=256", "--batch_size=16"]
DEEP = ["--n_layer=16", "--n_embd=256", "--n_head=4", "--block_size=128", "--batch_size=24"]
WIDE = ["--n_layer=4", "--n_embd=1024", "--n_head=8", "--block_size=128", "--batch_size=4"]
AGAIN = ["--gradient_checkpointing=full"]
CASES = [
    ("gpt2", MEDIUM), ("gpt2", MEDIUM + AGAIN), ("gpt2", DEEP), ("gpt2", WIDE),
    ("llama", MEDIUM), ("llama", MEDIUM + AGAIN), ("llama", WIDE),
    ("mamba", MEDIUM), ("mamba", MEDIUM + AGAIN), ("mamba2", MEDIUM),
    ("moe", MEDIUM), ("moe", MEDIUM + AGAIN), ("lstm", MEDIUM), ("lstm", WIDE), ("gru", MEDIUM),
    ("bert", MEDIUM), ("bert", WIDE),
]  # fmt: skip
STEPS = 4
RUN = [
    f"--max_iters={STEPS}", "--warmup_iters=1", "--log_interval=1", "--eval_interval=1000", "--eval_iters=1",
    "--checkpoint_interval=0", "--sample_tokens=0", "--plot=False", "--tensorboard=False", "--device=cpu",
    "--dtype=float32", "--compile=False", "--dataset=text", "--pseudo_perplexity_tokens=0",
]  # fmt: skip
SMALL = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_size=2"]


def child(gives_back, folder, arguments):
    """Print {'measured', 'counted'} in bytes."""
    import contextlib
    import io

    import configurator
    import train
    import training_place

    if gives_back:
        training_place.keep_freed_memory = lambda: None
    from training_memory import step_memory
    from training_place import peak_memory_bytes

    (folder / "text.txt").write_text("".join(f"{i} is a number, and so is {i * i}.\n" for i in range(30_000)))
    where = [f"--data_dir={folder / 'data'}", f"--runs_dir={folder}", f"--input={folder / 'text.txt'}"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*arguments, *RUN, *where, *SMALL, "--run_name=small"])
        before = peak_memory_bytes(CPU)
        train.main([*arguments, *RUN, *where, "--run_name=real"])
    rows = [json.loads(line) for line in (folder / "real" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = next(row["peak_memory_bytes"] for row in rows if row["kind"] == "train" and row["step"] == STEPS)
    settings = configurator.read_settings([*arguments, *RUN])
    memory = step_memory(configurator.with_vocabulary(settings, 256), CPU)
    print(json.dumps({"measured": peak - before, "counted": memory.peak, "when": memory.when}))


def measure(arguments, gives_back):
    """What `child` prints. gives_back: with an allocator that returns every tensor's memory once it is freed."""
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if gives_back else {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", str(int(gives_back)), folder, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@exit_on_user_error
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).print_help()
    cases = [("", arguments)] if arguments else [(name, [f"config/arch_{name}.py", *more]) for name, more in CASES]
    print(f"{'architecture and size':<84}{'counted':>11}{'measured':>11}{'counted is':>11}{'as trained':>12}")
    for name, settings in cases:
        settings = [str(ROOT / each) if (ROOT / each).is_file() else each for each in settings]
        held, trained = measure(settings, gives_back=True), measure(settings, gives_back=False)
        words = " ".join([name, *(each.lstrip("-") for each in settings if each.startswith("--"))])
        miss = 100 * (held["counted"] / held["measured"] - 1)
        sizes = [f"{size / 2**20:>7.0f} MiB" for size in (held["counted"], held["measured"], trained["measured"])]
        print(f"{words:<84}{sizes[0]}{sizes[1]}{miss:>+10.1f}%{sizes[2]:>12}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        import torch

        from training_place import Place

        CPU = Place(torch.device("cpu"), "float32", tf32=False)
        child(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main(sys.argv[1:])
