"""What each rank's memory grows by until a sharded model has its first weights, beside building all of it first.

    python scripts/measure_start.py                                       # LLaMA of 367M parameters on two ranks, FSDP2
    python scripts/measure_start.py --ranks=4 config/arch_moe.py --use_fsdp=True --expert_parallel=4 --n_layer=12

Each row is a torchrun of its own on this machine's CPU: a tiny model first, so that everything is imported, then the
one asked for. What the peak of a rank's resident memory grew by is printed. Linux and macOS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from user_errors import Parser, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
ASKED = [
    "config/arch_llama.py",
    "--use_fsdp=True",
    "--n_layer=24",
    "--n_embd=1024",
    "--n_head=16",
    "--vocab_size=32000",
]
SMALL = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--vocab_size=64"]


def child(way, arguments):
    """Print {'rank', 'grew', 'weights'} in bytes."""
    import configurator
    import training_parallel as parallel
    import training_place
    from model_builder import ConfigurableGPT
    from model_interop import NoSource
    from training_objectives import OBJECTIVE_REGISTRY

    def start(settings, place):
        config = settings.train
        if way == "whole":
            model = ConfigurableGPT(settings.model, config.seed)
        else:
            model = parallel.build(settings, None, place)
        objective = OBJECTIVE_REGISTRY[config.objective](model, config)
        parallel.split_weights(model, place)
        parallel.wrap(objective, objective, place, config)
        parallel.fill(model, NoSource() if way == "shards" else None, place, config)
        return 4 * sum(parameter.numel() for parameter in model.parameters())

    where = ["--device=cpu", "--threads=1"]
    small, asked = (configurator.read_settings([*arguments, *where, *more]) for more in (SMALL, []))
    place = training_place.find_place(asked.train)
    with training_place.joined(place):
        start(small, place)
        before = training_place.peak_memory_bytes(place)
        weights = start(asked, place)
        grew = training_place.peak_memory_bytes(place) - before
        print(json.dumps({"rank": place.rank, "grew": grew, "weights": weights}), flush=True)


@exit_on_user_error
def main(arguments):
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2, help="processes, one for each rank")
    args, settings = parser.parse_known_args(arguments)
    print(f"{'weights':>10} {'way':>8}   grew by, on each rank (MiB)")
    for way in ("whole", "shards"):
        rows = measured(way, args.ranks, settings or ASKED)
        grew = "  ".join(f"{row['grew'] / 2**20:,.0f}" for row in rows)
        print(f"{rows[0]['weights'] / 2**20:>10,.0f} {way:>8}   {grew}", flush=True)


def measured(way, n_ranks, settings):
    """[what `child` printed] by rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}", __file__]
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, env={**os.environ, "MEASURE_START": way}, stdout=subprocess.PIPE, text=True,
        encoding="utf-8", check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    return sorted(rows, key=lambda row: row["rank"])


if __name__ == "__main__":
    if "MEASURE_START" in os.environ:
        child(os.environ["MEASURE_START"], sys.argv[1:])
    else:
        main(sys.argv[1:])
