"""How fast a large corpus becomes token files here, in how much memory, and what a kill costs.

    python scripts/measure_preparing.py                                       # 500 MB of .jsonl, bytes
    python scripts/measure_preparing.py --kind=parquet --tokenizer=gpt2 --megabytes=2000

Writes a corpus of made-up words (Zipf's law, seeded), prepares it with data/text/prepare.py in a process of its own,
then a second time with a kill -9 in the middle, and compares the files. Everything goes into a temporary folder, which
needs about four times the size of the corpus; it is removed at the end. Linux and macOS.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from user_errors import Parser, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
N_WORDS, WORDS_PER_DOCUMENT = 50_000, 500


def documents(n_bytes, seed=0):
    """Texts of made-up words, about n_bytes together."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(1, 11))) for _ in range(N_WORDS)])
    frequency = 1 / np.arange(1, N_WORDS + 1)
    cumulative = np.cumsum(frequency) / frequency.sum()
    while n_bytes > 0:
        text = " ".join(words[np.searchsorted(cumulative, rng.random(WORDS_PER_DOCUMENT))])
        yield text
        n_bytes -= len(text)


def write_corpus(folder, kind, n_bytes):
    """The file, and how many bytes of text it holds."""
    path, size = folder / f"corpus.{kind}", 0
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        texts = list(documents(n_bytes))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
        return path, sum(map(len, texts))
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in documents(n_bytes):
            file.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text + "\n")
            size += len(text)
    return path, size


def prepare(path, data_dir, arguments, kill_when=None):
    """(seconds, peak MiB) of one command; killed once the file kill_when exists."""
    command = [sys.executable, str(ROOT / "data/text/prepare.py"), f"--input={path}", f"--data_dir={data_dir}"]
    t0 = time.perf_counter()
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
    while kill_when is not None and not kill_when.exists() and process.poll() is None:
        time.sleep(0.01)
    if kill_when is not None:
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill_when is None else -signal.SIGKILL):
        sys.exit(f"the preparation ended with {process.returncode}")
    return time.perf_counter() - t0, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def sums_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}


@exit_on_user_error
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of text; default %(default)s")
    parser.add_argument("--kind", choices=["jsonl", "txt", "parquet"], default="jsonl")
    parser.add_argument("--tokenizer", default="byte", help="byte, gpt2, bpe, ...; default %(default)s")
    parser.add_argument("--shard_tokens", type=int, default=50_000_000, help="default %(default)s")
    options = parser.parse_args()
    arguments = [f"--tokenizer={options.tokenizer}", f"--shard_tokens={options.shard_tokens}"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path, n_bytes = write_corpus(folder, options.kind, options.megabytes * 10**6)
        seconds, peak = prepare(path, folder / "whole", arguments)
        print(f"{n_bytes / 1e6:.0f} MB: {seconds:.1f} s, {n_bytes / 1e6 / seconds:.0f} MB/s, peak {peak:.0f} MiB")
        (whole,) = (folder / "whole").iterdir()
        n_shards = len(list(whole.glob("train_*.bin")))
        middle = folder / "killed" / whole.name / f"train_{n_shards // 2:05d}.bin.tmp"
        before, _ = prepare(path, folder / "killed", arguments, kill_when=middle)
        after, peak = prepare(path, folder / "killed", arguments)
        same = sums_of(whole) == sums_of(folder / "killed" / whole.name)
        print(
            f"killed after {before:.1f} s with {n_shards // 2} of {n_shards} files whole, finished in {after:.1f} s, "
            f"peak {peak:.0f} MiB; files {'the same' if same else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
