"""What the order of a very large corpus costs each rank, in memory and time. No token is read: there need be none.

    python scripts/measure_stream.py                                   # up to 10^12 windows, 10^15 tokens
    python scripts/measure_stream.py --sequences_per_step=4096

For each size of corpus: the largest amount of memory that the window starts of 1,000 consecutive steps needed (Python's
and NumPy's own, by tracemalloc), the mean time of a step's, and that of the running hash of the stream. Steps begin in
the last tenth of the first epoch and cross into the second where that is near.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_data import BatchStream
from user_errors import Parser, exit_on_user_error


class NoTokens:
    """A split of so many tokens, which has a length alone."""

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens

    def __len__(self):
        return self.n_tokens


def measure(n_windows, block_size, sequences_per_step, n_steps):
    """(peak bytes, median seconds of a step, of a step's hash)."""
    dataset = SimpleNamespace(train=NoTokens((n_windows + 1) * block_size), fingerprint="none")
    stream = BatchStream(dataset, block_size, sequences_per_step, seed=1337)
    first = int(stream.steps_per_epoch * 0.9)
    seconds, hashing, running = [], [], None
    for step in range(first, first + n_steps):
        t0 = time.perf_counter()
        stream.window_starts(step)
        t1 = time.perf_counter()
        running = stream.hash_after(step, running)
        seconds.append(t1 - t0)
        hashing.append(time.perf_counter() - t1)
    stream = BatchStream(dataset, block_size, sequences_per_step, seed=1337)
    tracemalloc.start()
    for step in range(first, first + n_steps):
        stream.window_starts(step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, sum(seconds) / n_steps, statistics.median(hashing)


@exit_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block_size", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--sequences_per_step", type=int, default=512, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="default %(default)s")
    options = parser.parse_args(arguments)
    print(f"{'windows':>10}{'tokens':>10}{'peak memory':>14}{'starts of a step':>18}{'its hash':>12}")
    for exponent in (4, 6, 9, 12):
        peak, seconds, hashing = measure(10**exponent, options.block_size, options.sequences_per_step, options.steps)
        print(f"{f'10^{exponent}':>10}{10**exponent * options.block_size:>10.2g}{peak / 2**10:>10.0f} KiB"
              f"{1e6 * seconds:>15.0f} us{1e6 * hashing:>9.0f} us")  # fmt: skip


if __name__ == "__main__":
    main()
