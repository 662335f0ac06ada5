"""Token files, or padded records, as a stream of batches that every run shares, and a fixed set to validate on.

    dataset = load_dataset(config)                                    # prepared on first use
    stream = BatchStream(dataset, block_size=256, sequences_per_step=48, seed=1337)
    micro_batches = stream.batches(step, rank, world_size, micro_batch_size=12)      # [{'inputs', 'targets'}, ...]
    validation = ValidationSet(dataset, block_size=256, n_windows=240)

The stream is a pure function of (dataset, seed, step). Nothing else moves it: not the architecture, the number of GPUs,
the size of a micro-batch, an evaluation or a resume. So two runs differ by their architecture alone, and a step can be
computed again at any time. `hash_after` chains the steps into one number, by which runs are told apart.

`training_prepare.py` makes the files.
"""

import hashlib
import math
import queue
import threading
import time
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from model_config import IGNORE_INDEX
from training_corpora import PROBE_REGISTRY
from training_prepare import check_meets, prepare, recipe_of, summary_of
from training_records import Records
from training_token_files import SPLITS, check_shards, map_tokens, read_meta, tokenizer_of
from user_errors import UserError

CHECKSUMMED_BYTES = 2**26  # larger splits are held to their files' sizes: reading them all would delay every start


# -- prepared datasets


class Dataset:
    """A prepared folder: memory-mapped tokens and what meta.json says of them.

    Attributes:
        train, val: 1-D arrays of tokens, ShardedTokens of several files or Records, read from disk as they are sliced.
        meta: the dict of meta.json.  fingerprint: names the tokens, whatever the folder is called.
        token_bytes: int64 array, bytes of text for each token, or None where that is unknown.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        if self.meta is None:
            raise UserError(f"{folder} has no meta.json; prepare the dataset first")
        self.name = self.folder.name
        self.vocab_size = self.meta["vocab_size"]
        self.fingerprint = self.meta["fingerprint"]
        sizes = self.meta["token_bytes"]
        self.token_bytes = None if sizes is None else np.array(sizes, dtype=np.int64)
        self.train, self.val = (self.map_split(split) for split in SPLITS)

    def map_split(self, split):
        """The tokens of a split, after holding its files to what meta.json says."""
        n_bytes = self.meta["splits"][split]["tokens"] * np.dtype(self.meta["dtype"]).itemsize
        checksums = n_bytes <= CHECKSUMMED_BYTES
        check_shards(self.folder, self.meta, split, checksums)
        if self.has_outcomes:
            return Records(self.folder, self.meta, split, checksums)
        return map_tokens(self.folder, self.meta, split)

    @property
    def has_outcomes(self):
        """Whether it holds records, each with an outcome, in place of one stream of text."""
        return self.meta.get("kind") == "records"

    def n_tokens(self, split):
        return self.meta["splits"][split]["tokens"]

    @property
    def tokenizer_name(self):
        return self.meta["tokenizer"]["name"] or "unknown tokenizer"

    @cached_property
    def tokenizer(self):
        return tokenizer_of(self.meta)

    def check_vocab(self, vocab_size, extra_tokens=0):
        """Refuse a model with fewer tokens than the dataset; more is fine, as a padded vocabulary has.

        Args:
            extra_tokens: ids that the objective needs beside the dataset's.
        """
        if vocab_size < self.vocab_size + extra_tokens:
            beside = f" and the objective needs {extra_tokens} more" if extra_tokens else ""
            raise UserError(
                f"vocab_size={vocab_size} is too small for {self.folder}, whose tokens go up to {self.vocab_size - 1}"
                f"{beside}; set vocab_size={self.vocab_size + extra_tokens}, or use the dataset the model was made for"
            )

    def facts(self):
        """What config.json says of the dataset beside its name and its size."""
        return {}

    def is_solved(self, scores):
        """Whether an evaluation's scores leave nothing to learn, so that a run may end."""
        return False

    def summary(self):
        return summary_of(self.folder)


def load_dataset(settings, may_prepare=True, quiet=False):
    """The Dataset that the settings name; prepared here when it is missing, made on the spot when it is a probe.

    Args:
        settings: a TrainConfig.
        may_prepare: False on all ranks but one of a machine: they wait until that one has prepared it.
    """
    if settings.dataset in PROBE_REGISTRY:
        return PROBE_REGISTRY[settings.dataset](settings)
    recipe = recipe_of(settings)
    while not may_prepare and read_meta(recipe.folder) is None:
        time.sleep(0.5)  # torchrun ends the waiting ranks should the preparing one fail
    meta = read_meta(recipe.folder)
    if meta is None:
        if not quiet:
            print(f"preparing {recipe.folder}, once", flush=True)
        prepare(settings, quiet=quiet)
        meta = read_meta(recipe.folder)
    check_meets(meta, recipe)
    return Dataset(recipe.folder)


# -- the order of windows

KEYS_PER_EPOCH = 8  # seven rounds of shuffling and the offset: one digest of blake2b


def keys_of(*parts, n_keys):
    """n_keys uint64 from anything printable; blake2b, because numpy's generators may change between versions."""
    text = " ".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8 * n_keys).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def shuffled(positions, n, keys):
    """Where each of the positions in [0, n) goes under the permutation that the keys choose.

    A Feistel network permutes [0, 4^h), the smallest such range that holds n, without any table; what lands at n or
    beyond is sent through again until it falls inside (cycle walking, at most 4 passes on average). Memory does not
    depend on n, and n may be anything below 2^62.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (scrambled(right ^ key) & mask)
        return (left << half) | right

    x = network(np.asarray(positions, dtype=np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def scrambled(x):
    """splitmix64's finalizer (Steele, Lea & Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenWindows:
    """Windows of T = block_size tokens anywhere in one stream of them, plus the token after each, the last target.

    Args:
        split: its name, for the sentence about one that is too short.

    Attributes:
        available: how many fit without overlap.  per_epoch: one less, so that all can be moved by an offset.
        n_offsets: that offset lies below this.
    """

    def __init__(self, tokens, block_size, split):
        self.tokens, self.block_size = tokens, block_size
        n_tokens = len(tokens)
        if n_tokens < block_size + 1:
            raise UserError(
                f"the {split} split has {n_tokens} tokens, fewer than the {block_size + 1} of one window; "
                "lower --block_size, or use more text"
            )
        self.available = (n_tokens - 1) // block_size
        self.per_epoch = tokens_in_epoch(n_tokens, block_size) // block_size
        self.n_offsets = min(block_size, n_tokens - self.per_epoch * block_size)

    def starts(self, windows, offset=0):
        """Where windows with these numbers begin, int64."""
        return offset + windows * self.block_size

    def batch(self, starts):
        """{'inputs', 'targets'} of the windows at `starts`, int64 (B, T); targets are the inputs one token on."""
        rows = np.empty((len(starts), self.block_size + 1), dtype=np.int64)  # (B, T + 1)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self.tokens[start : start + self.block_size + 1]
        return {"inputs": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}


def windows_over(tokens, block_size, split):
    """How a split is cut into rows of block_size tokens: records one by one, other tokens into windows."""
    if hasattr(tokens, "windows"):
        return tokens.windows(block_size, split)
    return TokenWindows(tokens, block_size, split)


def window_batch(windows, starts, numbers):
    """A batch of tensors: what `windows` has at `starts`, and 'window', each row's number."""
    return {name: torch.from_numpy(values) for name, values in {**windows.batch(starts), "window": numbers}.items()}


class BatchStream:
    """The training batches of (dataset, seed), by step.

    An epoch is a permutation of windows that do not overlap. Their common offset in [0, block_size) is drawn anew for
    each epoch, so that no token always sits first. Of records an epoch is a permutation of them all.

    Args:
        sequences_per_step: of the whole job: batch_size x gradient_accumulation_steps, over all ranks.
    """

    def __init__(self, dataset, block_size, sequences_per_step, seed):
        self.windows, self.seed = windows_over(dataset.train, block_size, "training"), seed
        self.block_size, self.sequences_per_step = block_size, sequences_per_step
        self.windows_per_epoch = self.windows.per_epoch
        starts_at_once = min(4096, 4 * self.windows_per_epoch)
        self.steps_per_block = max(1, starts_at_once // sequences_per_step)
        self.block_of_starts = lru_cache(maxsize=2)(self.compute_block)  # two: the prefetcher may be a block ahead
        self.initial_hash = hashlib.blake2b(f"{dataset.fingerprint} {block_size}".encode(), digest_size=16).hexdigest()

    @property
    def tokens_per_step(self):
        return self.sequences_per_step * self.block_size

    @property
    def tokens_per_epoch(self):
        """Tokens in one pass, padding included, the same for every batch size."""
        return self.windows_per_epoch * self.block_size

    @property
    def steps_per_epoch(self):
        """Steps in one pass, as a fraction: an epoch may end within a step."""
        return self.windows_per_epoch / self.sequences_per_step

    def epoch(self, step):
        """Passes over the training split before this step, as a fraction."""
        return step * self.sequences_per_step / self.windows_per_epoch

    def window_starts(self, step):
        """Where each sequence of a step begins, as int64 (sequences_per_step,), in canonical order."""
        block, row = divmod(step, self.steps_per_block)
        return self.block_of_starts(block)[row]

    def compute_block(self, block):
        """The window starts of steps_per_block steps, (steps, sequences): numpy is called once for many steps."""
        n = self.steps_per_block * self.sequences_per_step
        index = block * n + np.arange(n, dtype=np.int64)
        epochs, positions = np.divmod(index, self.windows_per_epoch)
        starts = np.empty_like(index)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            *keys, offset = keys_of("window order", self.seed, epoch, n_keys=KEYS_PER_EPOCH)
            windows = shuffled(positions[chosen], self.windows_per_epoch, keys)
            starts[chosen] = self.windows.starts(windows, int(offset) % self.windows.n_offsets)
        starts.setflags(write=False)  # shared by all who ask
        return starts.reshape(self.steps_per_block, self.sequences_per_step)

    def batches(self, step, rank=0, world_size=1, micro_batch_size=None):
        """The micro-batches of one rank: a list of {'inputs', 'targets', 'window'}, int64 (B, T), (B, T) and (B,), and
        of records what they have beside (`RecordWindows.batch`).

        'window' is each row's number in the stream, from the first step on. Micro-batch m of the job is rows m*B to
        (m+1)*B; rank r takes m = r, r + world_size, ... The rows of all ranks together are the same however they are
        split.
        """
        B = micro_batch_size or self.sequences_per_step // world_size
        check_split(self.sequences_per_step, B, world_size)
        starts = self.window_starts(step).reshape(-1, B)[rank::world_size]  # (micro-batches of this rank, B)
        n = self.sequences_per_step
        windows = np.arange(step * n, (step + 1) * n, dtype=np.int64).reshape(-1, B)[rank::world_size]
        return [window_batch(self.windows, rows, numbers) for rows, numbers in zip(starts, windows, strict=True)]

    def example_batch(self, batch_size, device="cpu"):
        """A micro-batch of the shape and type of every other: what a compiler needs to see."""
        zeros = np.zeros(batch_size, dtype=np.int64)
        return on_device(window_batch(self.windows, zeros, zeros), device)

    def hash_after(self, step, previous=None):
        """The running hash once this step is taken: `previous` is that of the step before, None at the first.

        It covers the data, the block size and every window of every step, of all ranks: equal hashes mean equal tokens
        in the same order.
        """
        previous = self.initial_hash if previous is None else previous
        digest = hashlib.blake2b(bytes.fromhex(previous), digest_size=16)
        digest.update(self.window_starts(step).astype("<i8").tobytes())
        return digest.hexdigest()


def tokens_in_epoch(n_tokens, block_size):
    """Tokens of the windows that one pass over n_tokens has: one fewer than fit, so that their offset may vary."""
    return max(1, n_tokens // block_size - 1) * block_size


def check_split(sequences_per_step, micro_batch_size, world_size):
    """Refuse a step that does not divide evenly among the ranks."""
    accumulation, rest = divmod(sequences_per_step, micro_batch_size)
    if rest or accumulation % world_size:
        raise UserError(
            f"gradient_accumulation_steps={accumulation} does not divide among {world_size} ranks "
            f"(batch_size={micro_batch_size}); make it a multiple of {world_size}"
        )


def on_device(batch, device):
    """A batch's tensors on a device; from pinned memory the copy does not wait."""
    # Pinned memory alone: an unpinned tensor can be freed, and reused, before MPS has copied it
    return {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in batch.items()}


# -- validation


EVAL_ITER_TOKENS = 2**14  # what one of eval_iters stands for; not a batch, so that no batch size changes the set


def windows_of(eval_iters, block_size):
    """Validation windows that eval_iters asks for, None for the whole split."""
    return -(-eval_iters * EVAL_ITER_TOKENS // block_size) or None


class ValidationSet:
    """The same windows (or records) of the validation split for every run, evenly spaced, none overlapping.

    Args:
        n_windows: how many; None, or more than there are, takes the whole split.
    """

    def __init__(self, dataset, block_size, n_windows=None):
        self.dataset, self.block_size = dataset, block_size
        self.windows = windows_over(dataset.val, block_size, "validation")
        available = self.windows.available
        n_windows = available if n_windows is None else min(n_windows, available)
        self.starts = self.windows.starts(np.arange(n_windows, dtype=np.int64) * available // n_windows)
        self.hash = hashlib.blake2b(
            f"{dataset.fingerprint} {block_size} ".encode() + self.starts.astype("<i8").tobytes(), digest_size=16
        ).hexdigest()

    def __len__(self):
        return len(self.starts)

    @property
    def n_tokens(self):
        return len(self.starts) * self.block_size

    @cached_property
    def n_bytes(self):
        """Bytes of text that the targets of the whole set stand for; NaN where that is unknown."""
        return sum(self.target_bytes(batch["targets"]) for batch in self.batches(batch_size=min(256, len(self))))

    def batches(self, batch_size, rank=0, world_size=1, device="cpu"):
        """Yield this rank's {'inputs', 'targets', 'window'}; every window is in exactly one batch of one rank.

        All ranks yield equally many batches of one shape, which sharded models need (and compiled ones like). Rows that
        fill the last ones up have IGNORE_INDEX as targets, so carry sums and counts and divide once at the end.
        """
        n_batches = -(-len(self) // (batch_size * world_size))
        for i in range(n_batches):
            first = (i * world_size + rank) * batch_size
            windows = np.arange(first, first + batch_size, dtype=np.int64)
            batch = self.windows_at(np.where(windows < len(self), windows, 0))
            batch["targets"][max(0, len(self) - first) :] = IGNORE_INDEX
            yield on_device(batch, device)

    def windows_at(self, windows):
        """{'inputs', 'targets', 'window'} of the windows with these numbers, (B,) int64."""
        return window_batch(self.windows, self.starts[windows], windows)

    def target_bytes(self, targets):
        """Bytes of text behind supervised targets (a tensor on any device); NaN where that is unknown.

        Counted token by token where meta.json has token_bytes; else by the split's ratio of bytes to tokens.
        """
        supervised = targets[targets != IGNORE_INDEX]
        if self.dataset.token_bytes is not None:
            return int(self.dataset.token_bytes[supervised.cpu().numpy()].sum())
        facts = self.dataset.meta["splits"]["val"]
        return math.nan if facts["bytes"] is None else supervised.numel() * facts["bytes"] / facts["tokens"]


def bits_per_byte(nats, n_bytes):
    """Summed loss in nats over targets that stand for n_bytes of text, whatever the tokenizer; None if unknown."""
    return nats / math.log(2) / n_bytes if n_bytes > 0 else None


# -- reading ahead


class Prefetcher:
    """Batches of a stream, read by a thread while the model computes.

    Args:
        start_step, end_step: the steps to read; end_step None goes on for ever.
        depth: steps read ahead; 0 reads when asked.
        device: batches for CUDA are pinned by the thread, so that copying them there does not wait.
        prepare: applied to every micro-batch, by the thread; None leaves them as they are.
    """

    def __init__(
        self, stream, start_step=0, end_step=None, micro_batch_size=None, depth=2, rank=0, world_size=1, device="cpu",
        prepare=None,
    ):  # fmt: skip
        self.stream, self.step, self.end_step, self.prepare = stream, start_step, end_step, prepare
        self.split = (rank, world_size, micro_batch_size)
        self.device = torch.device(device)
        self.ready, self.stopped, self.thread = queue.Queue(maxsize=max(depth, 1)), threading.Event(), None
        if depth > 0:
            # The current GPU belongs to a thread: pinning in a new one would open a context on GPU 0.
            gpu = torch.cuda.current_device() if self.device.type == "cuda" else None
            self.thread = threading.Thread(target=self.read_ahead, args=(start_step, gpu), daemon=True)
            self.thread.start()

    def read_ahead(self, step, gpu):
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            while step != self.end_step and not self.stopped.is_set():
                self.offer(self.read(step))
                step += 1
        except BaseException as error:  # handed to the training loop, where it can be seen
            self.offer(error)

    def read(self, step):
        batches = self.stream.batches(step, *self.split)
        batches = batches if self.prepare is None else [self.prepare(batch) for batch in batches]
        if self.device.type == "cuda":
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def offer(self, item):
        """Put an item into the queue, unless close() comes first."""
        while not self.stopped.is_set():
            with suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return

    def next(self):
        """(micro-batches of the next step on the device, seconds waited for them)."""
        if self.step == self.end_step:
            raise IndexError(f"the prefetcher was made to end at step {self.end_step}")
        t0 = time.perf_counter()
        batches = self.ready.get() if self.thread else self.read(self.step)
        seconds = time.perf_counter() - t0
        if isinstance(batches, BaseException):
            raise batches
        self.step += 1
        return [on_device(batch, self.device) for batch in batches], seconds

    def close(self):
        """Stop the thread; may be called more than once."""
        self.stopped.set()
        if self.thread:
            self.thread.join(timeout=5)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
