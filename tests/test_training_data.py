"""The batch stream and the validation set: what every comparison rests on."""

# ruff: noqa: F401, F811 - book and pages are fixtures

import math
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from data_helpers import OFFLINE_TOKENIZERS, Endless, StubDataset, book, counting, pages, with_tokenizer
from model_config import IGNORE_INDEX
from training_data import (
    BatchStream,
    Prefetcher,
    ValidationSet,
    bits_per_byte,
    load_dataset,
    shuffled,
    windows_over,
)
from training_token_files import ShardedTokens
from user_errors import UserError

# -- the permutation


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097, 100_003])
def test_the_shuffle_is_a_permutation(n):
    keys = np.arange(1, 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, keys)), np.arange(n))


def test_the_shuffle_is_even():
    """Over many keys every position goes everywhere equally often: chi-squared of 16 x 16 cells, 225 free."""
    counts = np.zeros((16, 16))
    rng = np.random.default_rng(0)
    for _ in range(3200):
        counts[np.arange(16), shuffled(np.arange(16), 16, rng.integers(0, 2**64, 7, dtype=np.uint64))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 320


def test_neighbours_are_pulled_apart():
    n = 1_000_003
    order = shuffled(np.arange(100_000), n, np.arange(1, 8, dtype=np.uint64))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(order.mean() / n - 0.5) < 0.01


# -- the stream


@pytest.mark.parametrize(
    "n_tokens, T", [(101, 10), (109, 10), (110, 10), (1000, 7), (11, 10), (19, 10), (20, 10), (21, 10)]
)
def test_no_window_comes_twice_in_an_epoch_and_none_overlap(n_tokens, T):
    stream = BatchStream(counting(n_tokens), T, sequences_per_step=1, seed=5)
    per_epoch = stream.windows_per_epoch
    assert per_epoch == max(1, n_tokens // T - 1)
    for epoch in range(4):
        starts = np.concatenate([stream.window_starts(epoch * per_epoch + i) for i in range(per_epoch)])
        gaps = np.diff(np.sort(starts))
        assert len(starts) == per_epoch and (gaps == T).all()
        assert starts.min() >= 0 and starts.max() + T + 1 <= n_tokens


def test_epochs_differ_in_order_and_in_offset():
    stream = BatchStream(counting(10_000), 50, sequences_per_step=199, seed=1)
    assert stream.windows_per_epoch == 199 and stream.steps_per_epoch == 1
    epochs = [stream.window_starts(epoch) for epoch in range(20)]
    assert len({tuple(starts) for starts in epochs}) == 20
    assert len({int(starts.min()) for starts in epochs}) > 10


@pytest.mark.parametrize("n_sequences", [1, 3, 12, 5000])
def test_a_step_is_the_same_however_it_is_reached(n_sequences):
    """Asked in order, alone, backwards, by another object, or as part of other steps."""
    dataset = counting(7_000)
    stream = BatchStream(dataset, 8, n_sequences, seed=3)
    in_order = [stream.window_starts(step).copy() for step in range(40)]
    backwards = [stream.window_starts(step).copy() for step in reversed(range(40))][::-1]
    alone = BatchStream(dataset, 8, n_sequences, seed=3).window_starts(37)
    assert np.array_equal(in_order, backwards) and np.array_equal(in_order[37], alone)
    singly = BatchStream(dataset, 8, 1, seed=3)
    n_singly = min(200, 3 * n_sequences)
    assert np.concatenate(in_order)[:n_singly].tolist() == [int(singly.window_starts(i)[0]) for i in range(n_singly)]


def test_the_stream_is_what_it_was_when_it_was_written():
    """Frozen numbers: a change here makes every earlier run incomparable."""
    stream = BatchStream(counting(100_000), 64, 4, seed=1337)
    assert stream.window_starts(0).tolist() == [26377, 74633, 53321, 87369]
    assert stream.hash_after(0) == "84906508bd67ead119f3ae96acf87f3f"


def test_no_global_generator_moves_or_is_moved():
    stream = BatchStream(counting(5000), 8, 4, seed=3)
    expected = stream.window_starts(5).tolist()
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    np.random.seed(7)
    torch.manual_seed(7)
    seeded = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = BatchStream(counting(5000), 8, 4, seed=3)
    again.batches(5)
    assert again.window_starts(5).tolist() == expected
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == seeded != states


def test_seeds_give_other_orders():
    orders = {tuple(BatchStream(counting(5000), 8, 16, seed).window_starts(0)) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 24), (1, 4), (2, 4), (3, 8), (6, 2), (24, 1)])
def test_ranks_and_micro_batches_divide_the_same_rows(world_size, micro_batch_size):
    stream = BatchStream(counting(9000), 16, 24, seed=11)
    whole = stream.batches(7, micro_batch_size=24)[0]
    rows = [None] * (24 // micro_batch_size)
    for rank in range(world_size):
        for k, batch in enumerate(stream.batches(7, rank, world_size, micro_batch_size)):
            assert batch["inputs"].shape == batch["targets"].shape == (micro_batch_size, 16)
            rows[k * world_size + rank] = batch
    for name in ("inputs", "targets"):
        assert torch.equal(torch.cat([batch[name] for batch in rows]), whole[name])


def test_batches_are_the_tokens_and_the_ones_after():
    stream = BatchStream(counting(9000), 16, 6, seed=0)
    batch = stream.batches(3)[0]
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["inputs"], torch.from_numpy(stream.window_starts(3).copy())[:, None] + torch.arange(16))
    assert torch.equal(batch["targets"], batch["inputs"] + 1)
    assert batch["inputs"].is_contiguous() and batch["targets"].is_contiguous()
    example = stream.example_batch(5)
    assert {name: (t.shape, t.dtype, t.is_contiguous()) for name, t in example.items()} == {
        name: (torch.Size([5, *t.shape[1:]]), t.dtype, True) for name, t in batch.items()
    }


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 24), (1, 4), (2, 4), (3, 8)])
def test_every_window_has_its_number_in_the_stream(world_size, micro_batch_size):
    stream = BatchStream(counting(9000), 16, 24, seed=0)
    for rank in range(world_size):
        for batch in stream.batches(7, rank, world_size, micro_batch_size):
            for number, tokens in zip(batch["window"].tolist(), batch["inputs"], strict=True):
                step, row = divmod(number, 24)
                assert step == 7 and tokens[0] == stream.window_starts(7)[row]


@pytest.mark.parametrize("world_size, micro_batch_size", [(2, 24), (5, 2), (1, 7)])
def test_a_step_that_does_not_divide_is_refused(world_size, micro_batch_size):
    stream = BatchStream(counting(9000), 16, 24, seed=0)
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        stream.batches(0, 0, world_size, micro_batch_size)


def test_the_hash_goes_on_where_it_stopped():
    stream = BatchStream(counting(9000), 16, 6, seed=0)
    hashes = [stream.initial_hash]
    for step in range(30):
        hashes.append(stream.hash_after(step, hashes[-1]))
    assert len(set(hashes)) == 31 and hashes[1] == stream.hash_after(0)
    resumed = BatchStream(counting(9000), 16, 6, seed=0)
    value = hashes[12]
    for step in range(12, 30):
        value = resumed.hash_after(step, value)
    assert value == hashes[30]


def test_the_hash_tells_data_block_and_seed_apart():
    other_data = counting(9000)
    other_data.fingerprint = "another"
    streams = [
        BatchStream(counting(9000), 16, 6, seed=0),
        BatchStream(other_data, 16, 6, seed=0),
        BatchStream(counting(9000), 8, 6, seed=0),
        BatchStream(counting(9000), 16, 6, seed=1),
    ]
    assert len({stream.hash_after(0) for stream in streams}) == 4


def test_more_tokens_than_four_bytes_can_count():
    stream = BatchStream(StubDataset(Endless()), 1024, 4096, seed=9)
    starts = stream.window_starts(10**5)
    assert len(set(starts.tolist())) == 4096 and starts.min() >= 0 and starts.max() > 2**39
    batch = stream.batches(10**5, micro_batch_size=16)[3]
    assert batch["targets"][5, -1] == starts[3 * 16 + 5] + 1024
    last_epoch = stream.windows_per_epoch // 4096  # the step where one epoch passes into the next
    assert stream.window_starts(last_epoch).max() + 1025 <= 2**40


def test_a_sparse_file_beyond_four_gigabytes_is_read_at_its_far_end(tmp_path):
    if sys.platform == "win32":
        pytest.skip("Windows would write the eight gigabytes")
    n_tokens = 2**32 + 5000
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.seek(2 * (n_tokens - 100))
        file.write(np.arange(100, dtype="<u2").tobytes())
    if path.stat().st_blocks * 512 > 2**24:
        pytest.skip("this file system has no sparse files")
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    stream = BatchStream(StubDataset(tokens), 2**20, 1, seed=1)
    ends = max(int(stream.window_starts(step)[0]) for step in range(stream.windows_per_epoch))
    assert ends > 2**32 - 2**22 and tokens[n_tokens - 1] == 99


def test_windows_beyond_both_borders_of_an_index_are_read_right(tmp_path):
    """2^31 and 2^32 tokens, the second within a window that lies in two files."""
    if sys.platform == "win32":
        pytest.skip("Windows would write the eight gigabytes")
    shards = [(tmp_path / "train_00000.bin", 2**32 - 20), (tmp_path / "train_00001.bin", 2**31)]
    for path, n_tokens in shards:
        with open(path, "wb") as file:
            file.truncate(2 * n_tokens)
    for path, first in ((shards[0][0], 2**31 - 50), (shards[0][0], 2**32 - 120), (shards[1][0], 0)):
        with open(path, "r+b") as file:
            file.seek(2 * first)
            file.write(np.arange(first, first + 100).astype("<u2").tobytes())
    if sum(path.stat().st_blocks for path, _ in shards) * 512 > 2**24:
        pytest.skip("this file system has no sparse files")
    tokens = ShardedTokens(shards, np.dtype("<u2"))
    starts = np.array([2**31 - 32, 2**32 - 20 - 32], dtype=np.int64)
    near, across = windows_over(tokens, 64, "training").batch(starts)["targets"]
    assert near.tolist() == [n % 2**16 for n in range(2**31 - 31, 2**31 + 33)]
    assert across.tolist() == [n % 2**16 for n in range(2**32 - 51, 2**32 - 20)] + list(range(33))


def test_the_order_of_a_petabyte_takes_no_more_memory_than_that_of_a_book():
    class Counted(Endless):
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

    def peak(n_tokens):
        stream = BatchStream(StubDataset(Counted(n_tokens)), 1024, 64, seed=9)
        tracemalloc.start()
        for step in range(20):
            stream.window_starts(step * 97)  # nowhere near one another
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10**8)  # what is made once
    assert peak(10**15) < 1.1 * peak(10**8) < 2**20


# -- validation


def test_validation_windows_are_fixed_spread_and_apart():
    dataset = StubDataset(np.arange(10), np.arange(10_000))
    validation = ValidationSet(dataset, 16, n_windows=50)
    assert len(validation) == 50 and validation.n_tokens == 800
    assert (np.diff(validation.starts) >= 16).all() and validation.starts[0] == 0
    assert validation.starts[-1] > 9500 and validation.starts[-1] + 17 <= 10_000
    assert validation.hash == ValidationSet(dataset, 16, 50).hash != ValidationSet(dataset, 16, 49).hash
    everything = ValidationSet(dataset, 16)
    assert len(everything) == 9999 // 16 == len(ValidationSet(dataset, 16, 10**6))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_every_validation_window_counts_once(batch_size, world_size):
    validation = ValidationSet(StubDataset(np.arange(10), np.arange(1000)), 16, n_windows=50)
    seen, n_batches = [], set()
    for rank in range(world_size):
        batches = list(validation.batches(batch_size, rank, world_size))
        n_batches.add(len(batches))
        for batch in batches:
            assert batch["inputs"].shape == (batch_size, 16)  # one shape, also where rows are filler
            real = batch["targets"][:, 0] != IGNORE_INDEX
            assert (batch["targets"][~real] == IGNORE_INDEX).all()
            seen += batch["inputs"][real][:, 0].tolist()
    assert sorted(seen) == validation.starts.tolist() and len(n_batches) == 1


@pytest.mark.parametrize("name", OFFLINE_TOKENIZERS)
def test_bits_per_byte_do_not_depend_on_the_tokenizer(name, pages):
    """A model that spends 5 bits on each byte of every token scores 5 bits per byte with them all."""
    dataset = load_dataset(with_tokenizer(pages, name), quiet=True)
    validation = ValidationSet(dataset, 8)
    n_bytes, nats = 0, 0.0
    for batch in validation.batches(6):
        n_bytes += validation.target_bytes(batch["targets"])
        supervised = batch["targets"][batch["targets"] != IGNORE_INDEX].numpy()
        nats += (dataset.token_bytes[supervised] * 5 * math.log(2)).sum()
    assert n_bytes == validation.n_bytes
    text = (
        dataset.tokenizer.decode(dataset.val[1 : len(validation) * 8 + 1])
        .replace("\0", "")
        .replace("<|endoftext|>", "")
    )
    assert abs(n_bytes - len(text.encode("utf-8"))) <= 4  # a character may be cut at the end
    assert bits_per_byte(nats, n_bytes) == pytest.approx(5)


def test_without_bytes_for_each_token_the_ratio_of_the_split_serves(book):
    dataset = load_dataset(with_tokenizer(book, "bpe"), quiet=True)
    validation = ValidationSet(dataset, 8)
    exact = validation.n_bytes
    dataset.token_bytes = None
    assert ValidationSet(dataset, 8).n_bytes == pytest.approx(exact, rel=0.05)


# -- reading ahead


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_prefetcher_gives_the_stream(depth):
    stream = BatchStream(counting(9000), 16, 8, seed=0)
    with Prefetcher(stream, 5, 12, micro_batch_size=2, depth=depth, rank=1, world_size=2) as prefetcher:
        for step in range(5, 12):
            batches, seconds = prefetcher.next()
            assert seconds >= 0
            for got, expected in zip(batches, stream.batches(step, 1, 2, 2), strict=True):
                assert torch.equal(got["inputs"], expected["inputs"])
        with pytest.raises(IndexError):
            prefetcher.next()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failure_of_the_reading_thread_reaches_the_loop(depth):
    stream = BatchStream(counting(9000), 16, 8, seed=0)
    with Prefetcher(stream, micro_batch_size=3, depth=depth) as prefetcher, pytest.raises(UserError, match="divide"):
        prefetcher.next()


def test_closing_a_prefetcher_that_no_one_reads_ends_its_thread():
    prefetcher = Prefetcher(BatchStream(counting(9000), 16, 8, seed=0), depth=1)
    prefetcher.close()
    prefetcher.close()
    assert not prefetcher.thread.is_alive()
