"""Tokens on their way to disk: what is whole stays, whatever happens, and the next preparation goes on behind it.

    with unfinished(folder, settings) as preparation:                  # once no other process has it
        preparation.begin(tokenizer, revision)                         # what was kept is checked
        preparation.append({"train": encoded, "val": encoded}, place)  # place: where the corpus is behind these
        splits = preparation.finish()                                  # for meta.json
        preparation.done()

A split is written as train_00000.bin, train_00001.bin and so on, each of exactly shard_tokens tokens but the last; one
that fits into a single file is train.bin. So the files are a pure function of the tokens and of shard_tokens.

While it is under way, files are called *.tmp and `progress.jsonl` says what holds: settings and tokenizer in its first
line, then a line for each time that a file was filled, with the names, counts and checksums of the files that are
whole, the length of those that are not, and the place in the corpus. A line is written when its tokens are on the disk
and before files get their names; so after any interruption the last whole line can be made true. The file is also the
lock that keeps a second process out.
"""

import errno
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np

from training_token_files import SPLITS, fsync_folder, sha256_of
from user_errors import UserError

PROGRESS = "progress.jsonl"
PROGRESS_FORMAT = 1


# -- one file, one split


class TokenFile:
    """One .bin under a temporary name, which keeps its first n_tokens if it was begun before."""

    def __init__(self, path, dtype, n_tokens=0):
        self.path, self.dtype, self.n_tokens = path, np.dtype(dtype), n_tokens
        self.temporary = temporary_name(path)
        self.file = open(self.temporary, "r+b" if n_tokens else "wb")  # noqa: SIM115 - open over many calls
        self.file.truncate(n_tokens * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)
        self.sha256 = hashlib.sha256()

    def append(self, raw):
        self.file.write(raw)
        self.sha256.update(raw)
        self.n_tokens += len(raw) // self.dtype.itemsize

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def facts(self):
        return {"name": self.path.name, "tokens": self.n_tokens, "sha256": self.sha256.hexdigest()}


def temporary_name(path):
    return path.with_name(f"{path.name}.tmp")


class SplitFiles:
    """The files of one split: those that have their names, those that are full, and the one being filled.

    Attributes:
        shards: facts of the whole files: name, tokens, sha256.
        sha256: of all tokens, which names them whatever the sharding.
        n_bytes, n_documents: of the text behind them.
    """

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.shards, self.full, self.current = [], [], None
        self.sha256 = hashlib.sha256()
        self.n_bytes = self.n_documents = 0

    @property
    def n_tokens(self):
        open_files = [*self.full, *([self.current] if self.current else [])]
        return sum(shard["tokens"] for shard in self.shards) + sum(file.n_tokens for file in open_files)

    def open_next(self, n_tokens=0):
        number = len(self.shards) + len(self.full)
        self.current = TokenFile(self.folder / f"{self.split}_{number:05d}.bin", self.dtype, n_tokens)

    def append(self, encoded):
        self.n_bytes += encoded.n_bytes
        self.n_documents += encoded.n_documents
        raw = memoryview(encoded.tokens.astype(self.dtype).tobytes())
        self.sha256.update(raw)
        while len(raw):
            if self.current is None:
                self.open_next()
            room = (self.shard_tokens - self.current.n_tokens) * self.dtype.itemsize
            self.current.append(raw[:room])
            if len(raw) > room:  # full, and more to come: the last file is never empty
                self.close_current()
            raw = raw[room:]

    def close_current(self):
        """The file being filled is whole. Synced here, because the next one may be long in coming."""
        self.current.sync()
        self.current.file.close()
        self.full.append(self.current)
        self.current = None

    def close_last(self):
        """There is nothing more to come."""
        if self.current is not None and not self.shards and not self.full:
            self.current.path = self.folder / f"{self.split}.bin"
        if self.current is not None:
            self.close_current()

    def state(self):
        """What a line of progress.jsonl says of this split; the tokens are on the disk when it returns."""
        current = None
        if self.current is not None:
            self.current.sync()
            current = self.current.facts()
        return {
            "bytes": self.n_bytes,
            "documents": self.n_documents,
            "full": [{**file.facts(), "temporary": file.temporary.name} for file in self.full],
            "current": current,
        }

    def publish(self):
        """Give the full files their names; the line that lists them is written."""
        for file in self.full:
            os.replace(file.temporary, file.path)
            self.shards.append(file.facts())
        self.full = []

    def go_on(self, states, checked):
        """Take up what earlier lines say, and check every byte of it: the checksum of the split goes on from there.
        checked(n_bytes) is told of each file."""
        for written in [written for state in states for written in state["full"]]:
            shard = {name: written[name] for name in ("name", "tokens", "sha256")}
            path, temporary = self.folder / shard["name"], self.folder / written["temporary"]
            # An interruption between the line and the new name, unless the file already has it
            if temporary.exists() and not path.exists():
                os.replace(temporary, path)
            self.check(path, shard, self.sha256)
            self.shards.append(shard)
            checked(shard["tokens"] * self.dtype.itemsize)
        self.n_bytes, self.n_documents = states[-1]["bytes"], states[-1]["documents"]
        if current := states[-1]["current"]:
            path = temporary_name(self.folder / current["name"])
            if not path.is_file():
                raise UserError(f"{path} is missing; {how_to_start_over(self.folder)}")
            self.open_next(current["tokens"])
            self.check(path, current, self.sha256, self.current.sha256)

    def check(self, path, facts, *digests):
        if not path.is_file():
            raise UserError(f"{path} is missing; {how_to_start_over(self.folder)}")
        if sha256_of(path, *digests) != facts["sha256"]:
            raise UserError(f"{path} is truncated or was changed; {how_to_start_over(self.folder)}")

    def close(self):
        if self.current is not None:
            self.current.file.close()

    def facts(self):
        """What meta.json says of this split."""
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": max(self.n_documents, min(self.n_tokens, 1)),  # one long text has no end but is a document
            "sha256": self.sha256.hexdigest(),
            "shards": self.shards,
        }


def how_to_start_over(folder):
    return f"remove {PROGRESS} and the .bin and .tmp files from {folder} to prepare it from the start"


# -- a folder under way


class Preparation:
    """A folder of token files under way.

    Args:
        settings: a dict of what the tokens depend on, and shard_tokens; another one is refused once anything is kept.
        file: progress.jsonl, open and locked.

    Attributes:
        place: where the corpus goes on, None at its start.  finished: whether all tokens are there.
        header: what the first line says: settings, tokenizer, revision; None for a new preparation.
    """

    def __init__(self, folder, settings, file):
        self.folder, self.settings, self.file = folder, settings, file
        self.header, self.lines, self.splits = *read_progress(file), {}
        if self.header is not None and self.header["settings"] != settings:
            if self.lines:
                raise UserError(self.what_changed())
            self.header = None
        if not self.lines:
            check_no_token_files(folder)

    def what_changed(self):
        before = self.header["settings"]
        name = next(name for name in [*self.settings, *before] if before.get(name) != self.settings.get(name))
        return (
            f"{self.folder} holds an unfinished preparation with {name}={before.get(name)}, not "
            f"{name}={self.settings.get(name)}; finish it with the settings it was begun with, choose another "
            f"--data_dir, or {how_to_start_over(self.folder)}"
        )

    @property
    def place(self):
        return self.lines[-1]["place"] if self.lines else None

    @property
    def finished(self):
        return bool(self.lines) and self.lines[-1]["finished"]

    @property
    def n_bytes(self):
        return sum(files.n_bytes for files in self.splits.values())

    def begin(self, tokenizer, revision=None, advance=None):
        """Open the files; where lines were written before, behind what they say, which advance(what, n_bytes,
        expected_bytes) may show."""
        dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        shard_tokens = self.settings["shard_tokens"]
        self.splits = {split: SplitFiles(self.folder, split, dtype, shard_tokens) for split in SPLITS}
        if self.lines:
            self.go_on(advance or (lambda *args: None))
            return
        self.header = {"format": PROGRESS_FORMAT, "settings": self.settings, "revision": revision}
        self.header["tokenizer"] = tokenizer.to_meta()
        self.file.truncate(0)
        self.write(self.header)

    def go_on(self, advance):
        whole = [file for line in self.lines for split in SPLITS for file in line[split]["full"]]
        n_bytes = sum(file["tokens"] for file in whole) * self.splits["train"].dtype.itemsize
        for split, files in self.splits.items():
            files.go_on([line[split] for line in self.lines], lambda n: advance("checking what is kept", n, n_bytes))

    def append(self, encoded, place):
        """Write {split: Encoded}, behind which the corpus stands at `place`; keep them once a file is full."""
        for split, part in encoded.items():
            self.splits[split].append(part)
        if any(files.full for files in self.splits.values()):
            self.keep(place)

    def finish(self):
        """{split: facts} when every token is written; all files have their names."""
        if not self.finished:
            for files in self.splits.values():
                files.close_last()
            self.keep(None, finished=True)
        return {split: files.facts() for split, files in self.splits.items()}

    def keep(self, place, finished=False):
        line = {"place": place, "finished": finished}
        line |= {split: files.state() for split, files in self.splits.items()}
        for file in [file for files in self.splits.values() for file in files.full]:
            if file.path.exists():
                raise UserError(f"{file.path} is there already and not of this preparation; move it away and go on")
        self.write(line)
        self.lines.append(line)
        for files in self.splits.values():
            files.publish()
        fsync_folder(self.folder)

    def write(self, line):
        self.file.write(json.dumps(line).encode("utf-8") + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def done(self):
        """The folder has its meta.json, so progress.jsonl may go."""
        remove_locked(self.folder / PROGRESS, self.file)

    def close(self):
        """Close the files. Where no line was written nothing stays; else all of it, for the next time."""
        for files in self.splits.values():
            files.close()
        if not self.lines:
            for path in [*self.folder.glob("train_*.bin.tmp"), *self.folder.glob("val_*.bin.tmp")]:
                path.unlink()
            self.done()
        self.file.close()
        with suppress(OSError):
            self.folder.rmdir()  # only where nothing is in it


def read_progress(file):
    """(header or None, the lines after it) of progress.jsonl; a line that was cut off by an interruption is removed."""
    file.seek(0)
    lines, length = [], 0
    for raw in file:
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None:
            break
        lines.append(line)
        length += len(raw)
    file.truncate(length)
    if not lines or lines[0].get("format") != PROGRESS_FORMAT:
        return None, []
    return lines[0], lines[1:]


def check_no_token_files(folder):
    """Refuse token files that nothing describes: they are the user's."""
    found = sorted(path.name for split in SPLITS for path in folder.glob(f"{split}*.bin"))
    if found:
        raise UserError(
            f"{folder} holds token files but no meta.json that says what they are; remove {' and '.join(found[:3])} to "
            f"prepare them here, or describe them: python data/text/prepare.py --describe={folder} --tokenizer=gpt2"
        )


@contextmanager
def unfinished(folder, settings):
    """The Preparation of a folder, which no other process has at the same time; None once it has its meta.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_locked(folder / PROGRESS)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --data_dir") from error
    preparation = None
    try:
        if not (folder / "meta.json").exists():
            preparation = Preparation(folder, settings, file)
        yield preparation
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {folder} is full; make room, or choose another --data_dir") from error
        raise
    finally:
        if preparation is not None:
            preparation.close()
        elif not os.fstat(file.fileno()).st_size:  # nothing was written
            remove_locked(folder / PROGRESS, file)
        file.close()


# -- one process at a time


def open_locked(path):
    """A file open for reading and appending, once no other process has it locked; the system unlocks it on any end."""
    waited = False
    while True:
        file = open(path, "a+b")  # noqa: SIM115 - the lock lasts as long as it is open
        if lock(file) and is_still(path, file):
            return file
        file.close()
        if not waited:
            print(f"another process is preparing {path.parent}; waiting for it", file=sys.stderr, flush=True)
        waited = True
        time.sleep(0.2)


def is_still(path, file):
    """Whether a path names the open file, and not another one or none since the process before removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def remove_locked(path, file):
    """Remove a locked file and let go of it, in this order: in the other it might be another process's by then."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows does not remove what is open
        file.close()
        path.unlink(missing_ok=True)
    file.close()


def lock(file):
    """Take the lock if it is free. A file system that knows no locks lets everyone through."""
    try:
        import fcntl
    except ImportError:
        return lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def lock_on_windows(file):
    import msvcrt

    file.seek(2**30)  # a locked byte cannot be read by others, so one beyond the end
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
