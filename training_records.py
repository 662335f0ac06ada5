"""Records: sequences of tokens that end in an outcome, each read by itself, such as games.

    train.bin             the tokens of all records one after another, as in a token file
    train_records.bin     for each record where its tokens end, its outcome, and the line or number it came from
    train_chances.bin     float32 for each token: the true probability that the outcome is 1, where that is known

meta.json has `kind` 'records', and of each split what `records` and `chances` are, beside what it has of token files.
A batch holds whole records, padded to block_size; padding is never supervised. No torch here.

Records of the user's own are lines of JSON: {"tokens": [1, 17, 4], "outcome": 1}, and where the truth is known
"chances": [0.5, 0.61, 1.0], a number for each token.
"""

import contextlib
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from model_config import IGNORE_INDEX
from training_token_files import SPLITS, check_file, describe, fsync_folder, map_file, map_tokens, write_json
from user_errors import UserError

INDEX = np.dtype([("end", "<i8"), ("line", "<i8"), ("outcome", "u1")])


class Record(NamedTuple):
    split: str  # train or val
    line: int  # of the file it came from, or its number, from 1 on
    tokens: np.ndarray  # (n,)
    outcome: int  # 0 or 1
    chances: np.ndarray | None  # (n,) the true probability of outcome 1 after each token


# -- reading


class Records:
    """The records of one split. Its length and its slices are those of its tokens.

    Attributes:
        index: (n,) of INDEX.  chances: float32 of every token, or None where the truth is not known.
        source: what the lines of the index are lines of, in words.
    """

    def __init__(self, folder, meta, split, checksums=False):
        self.split, self.source = split, meta["source"]
        self.tokens = map_tokens(folder, meta, split)
        self.index = self.map(folder, meta, "records", INDEX, checksums)
        self.chances = self.map(folder, meta, "chances", np.dtype("<f4"), checksums)

    def map(self, folder, meta, what, dtype, checksums):
        facts = meta["splits"][self.split][what]
        if facts is None:
            return None
        check_file(folder, facts["name"], facts["count"] * dtype.itemsize, facts["sha256"] if checksums else None)
        return map_file(folder / facts["name"], dtype)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, key):
        return self.tokens[key]

    def windows(self, block_size, split):
        """Each record as a window of its own."""
        return RecordWindows(self, block_size)

    def span(self, number):
        """(first, end) of a record's tokens."""
        return int(self.index["end"][number - 1]) if number else 0, int(self.index["end"][number])


class RecordWindows:
    """Every record as a window of block_size tokens, padded at its end.

    Raises:
        UserError: a record that is longer, naming the line that it came from.
    """

    n_offsets = 1  # a record begins where it begins

    def __init__(self, records, block_size):
        self.records, self.block_size = records, block_size
        self.per_epoch = self.available = len(records.index)
        lengths = np.diff(records.index["end"], prepend=0)
        if lengths.max() > block_size + 1:
            first = int((lengths > block_size + 1).argmax())
            raise UserError(
                f"a game of the {records.split} split, line {records.index['line'][first]} of {records.source}, has "
                f"{lengths[first]:,} tokens, and block_size={block_size} holds {block_size + 1:,}; set "
                f"--block_size={lengths.max() - 1} or more, or leave out the long ones"
            )

    def starts(self, windows, offset=0):
        """What stands for each window in the stream: its record's number."""
        return windows

    def batch(self, starts):
        """{'inputs', 'targets' (B, T) int64, 'outcomes' (B,) float32, 'chances' (B, T) float32 where known}.

        Padding is token 0 as input and IGNORE_INDEX as target; its chance is 0.5.
        """
        B, T = len(starts), self.block_size
        batch = {"inputs": np.zeros((B, T), dtype=np.int64), "targets": np.full((B, T), IGNORE_INDEX, dtype=np.int64)}
        batch["outcomes"] = self.records.index["outcome"][starts].astype(np.float32)
        if self.records.chances is not None:
            batch["chances"] = np.full((B, T), 0.5, dtype=np.float32)
        for row, number in enumerate(starts.tolist()):
            first, end = self.records.span(number)
            n = end - first - 1
            batch["inputs"][row, :n] = self.records.tokens[first : end - 1]
            batch["targets"][row, :n] = self.records.tokens[first + 1 : end]
            if self.records.chances is not None:
                batch["chances"][row, :n] = self.records.chances[first : end - 1]
        return batch


def read_json_lines(path, vocab_size):
    """Yield (line number, tokens, outcome, chances or None) of a file of one record a line, empty lines aside.

    Raises:
        UserError: a line that is none, naming it.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, *record_of(text, f"{path.name}, line {number}:", vocab_size)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input={str(path)!r} cannot be read: {error}") from None


def record_of(text, where, vocab_size):
    """(tokens, outcome, chances) of one line of JSON; `where` begins the sentence about a mistake."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(values, dict) or not {"tokens", "outcome"} <= set(values):
        raise UserError(f'{where} must be {{"tokens": [...], "outcome": 0 or 1}}')
    tokens, outcome, chances = values["tokens"], values["outcome"], values.get("chances")
    if not isinstance(tokens, list) or len(tokens) < 2 or not all(type(token) is int for token in tokens):
        raise UserError(f'{where} "tokens" must be a list of two or more whole numbers')
    if min(tokens) < 0:
        raise UserError(f"{where} has token {min(tokens)}; tokens count from 0")
    if max(tokens) >= vocab_size:
        raise UserError(
            f"{where} has token {max(tokens)}, beyond a vocabulary of {vocab_size}; mend it, or set "
            f"--tokenizer_vocab_size={max(tokens) + 1} or more"
        )
    if type(outcome) is not int or outcome not in (0, 1):
        raise UserError(f'{where} "outcome" must be 0 or 1, not {json.dumps(outcome)}')
    if chances is not None and not are_chances(chances, len(tokens)):
        raise UserError(f'{where} "chances" must be {len(tokens)} numbers in [0, 1], one for each token')
    return np.array(tokens), outcome, None if chances is None else np.array(chances, dtype=np.float32)


def are_chances(values, n):
    if not isinstance(values, list) or len(values) != n:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


# -- writing


class RecordFiles:
    """The files of one split under temporary names."""

    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtypes = folder, split, {"": dtype, "_records": INDEX, "_chances": "<f4"}
        self.files, self.sha256, self.end, self.n, self.longest, self.n_won = {}, {}, 0, 0, 0, 0
        self.entropy = 0.0  # of the true chances, over all tokens that have a next one

    def append(self, record):
        self.end += len(record.tokens)
        self.n, self.n_won = self.n + 1, self.n_won + record.outcome
        self.longest = max(self.longest, len(record.tokens))
        self.write("", record.tokens)
        self.write("_records", [(self.end, record.line, record.outcome)])
        if record.chances is not None:
            self.write("_chances", record.chances)
            self.entropy += entropy(record.chances[:-1].astype(np.float64)).sum()

    def write(self, suffix, values):
        if suffix not in self.files:
            self.files[suffix] = open(self.path(suffix, ".tmp"), "wb")  # noqa: SIM115 - open over many calls
            self.sha256[suffix] = hashlib.sha256()
        raw = np.asarray(values, dtype=self.dtypes[suffix]).tobytes()
        self.files[suffix].write(raw)
        self.sha256[suffix].update(raw)

    def path(self, suffix, ending=""):
        return self.folder / f"{self.split}{suffix}.bin{ending}"

    def close(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def publish(self):
        for suffix in self.files:
            os.replace(self.path(suffix, ".tmp"), self.path(suffix))

    def facts(self):
        """What meta.json says of this split."""

        def of(suffix, count):
            return {"name": self.path(suffix).name, "count": count, "sha256": self.sha256[suffix].hexdigest()}

        sha256, has_chances = self.sha256[""].hexdigest(), "_chances" in self.files
        return {
            "tokens": self.end, "bytes": None, "documents": self.n, "sha256": sha256,
            "shards": [{"name": self.path("").name, "tokens": self.end, "sha256": sha256}],
            "records": of("_records", self.n),
            "chances": of("_chances", self.end) if has_chances else None,
            "longest": self.longest, "outcomes": self.n_won,
            "best_wp_loss": self.entropy / (self.end - self.n) if has_chances else None,
        }  # fmt: skip


def entropy(p):
    """Nats of a chance p, elementwise."""
    p, q = np.clip(p, 1e-300, 1), np.clip(1 - p, 1e-300, 1)  # so that 0 log 0 is 0
    return -(p * np.log(p) + q * np.log(q))


def write_records(folder, records, vocab_size, facts):
    """Write a folder of records. Interrupted it leaves nothing and starts over: meta.json is written last.

    Args:
        records: an iterable of Record. facts: what else meta.json is to say; `source` is in errors.
    """
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    splits = {split: RecordFiles(folder, split, dtype) for split in SPLITS}
    knows_chances = None
    with removed_on_failure(folder, splits.values()):
        for record in records:
            knows = record.chances is not None
            if knows_chances not in (None, knows):
                which = "has no" if knows_chances else "is the first with"
                where = f"line {record.line} of {facts['source']}"
                raise UserError(f'{where} {which} "chances"; all records have them, or none')
            knows_chances = knows
            splits[record.split].append(record)
        for split, files in splits.items():
            if files.n == 0:
                raise UserError(f"{facts['source']} gives no records for the {split} split: it is too short to divide")
            files.close()
        tokenizer = {"name": None, "vocab_size": vocab_size}
        described = {split: files.facts() for split, files in splits.items()}
        for files in splits.values():
            files.publish()
        fsync_folder(folder)
        write_json(folder / "meta.json", describe(tokenizer, None, dtype, described, kind="records", **facts))


@contextlib.contextmanager
def removed_on_failure(folder, splits):
    try:
        yield
    except BaseException:
        for files in splits:
            for file in files.files.values():
                file.close()
            for suffix in files.files:
                files.path(suffix, ".tmp").unlink(missing_ok=True)
        raise
