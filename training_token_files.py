"""Token files: a folder with tokens in .bin files and the meta.json that says what they are.

    train.bin, val.bin    tokens one after another, little-endian uint16, or uint32 from 65,537 tokens on: as nanoGPT's
    train_00000.bin ...   the same of a split that is longer than one shard; together they are one sequence of tokens
    meta.json             format, kind, dataset, variant, source, dtype, vocab_size, fingerprint, tokenizer (everything
                          to rebuild it), token_bytes (bytes of text for each token), and for each split its tokens,
                          bytes, documents, sha256 (of all its tokens) and shards: name, tokens and sha256 of each file

meta.json is written last: a folder that has it is whole. Neither the fingerprint nor a batch depends on the sharding.
`describe_token_files` writes a meta.json for files made elsewhere; `training_shards.py` writes the files of a corpus.
"""

import hashlib
import json
import os
import time
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from training_tokenizers import tokenizer_from_meta, tokenizer_part
from user_errors import UserError

FORMAT = 1
SPLITS = ("train", "val")


# -- reading meta.json


def read_meta(folder):
    """The dict of a folder's meta.json, or None where there is none."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}, not {FORMAT}; prepare the dataset again")
        meta["fingerprint"]  # what all rely on, as the next two lines
        for split in SPLITS:
            if meta["splits"][split]["tokens"] != sum(shard["tokens"] for shard in shards_of(meta, split)):
                raise ValueError(f"the {split} shards do not add up")
        meta["dtype"], meta["vocab_size"], meta["tokenizer"], meta["token_bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {how_to_prepare_again(folder)}") from error
    return meta


def how_to_prepare_again(folder):
    return f"remove meta.json and the .bin files from {folder} and it is prepared again"


def tokenizer_of(meta):
    """The tokenizer of a dataset, from its meta."""
    return tokenizer_from_meta(meta["tokenizer"])


# -- reading tokens


def shards_of(meta, split):
    """[{'name', 'tokens', 'sha256'}, ...] of a split's files; older folders have one file and no list."""
    facts = meta["splits"][split]
    whole = {"name": f"{split}.bin", "tokens": facts["tokens"], "sha256": facts["sha256"]}
    return facts.get("shards", [whole])


def check_shards(folder, meta, split, checksums):
    """Refuse a shard that is missing or has another size than meta.json says; with checksums=True its bytes count."""
    itemsize = np.dtype(meta["dtype"]).itemsize
    for shard in shards_of(meta, split):
        check_file(folder, shard["name"], shard["tokens"] * itemsize, shard["sha256"] if checksums else None)


def check_file(folder, name, expected, sha256=None):
    """Refuse a file that is missing, has not `expected` bytes, or another checksum where one is given."""
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{path} is missing; {how_to_prepare_again(folder)}")
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        raise UserError(f"{path} is empty; {how_to_prepare_again(folder)}")
    if n_bytes != expected:
        state = "truncated" if n_bytes < expected else "not the one described"
        raise UserError(
            f"{path} has {n_bytes:,} bytes where meta.json says {expected:,}: it is {state}; "
            f"{how_to_prepare_again(folder)}"
        )
    if sha256 is not None and sha256_of(path) != sha256:
        raise UserError(f"{path} has a wrong checksum: it was changed; {how_to_prepare_again(folder)}")


def sha256_of(path, *others):
    """The hex sha256 of a file, read in pieces, which also go into other hashes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while raw := file.read(2**20):
            for digest in (sha256, *others):
                digest.update(raw)
    return sha256.hexdigest()


def map_tokens(folder, meta, split):
    """A split as one sequence of tokens, read from disk as it is indexed."""
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    shards = [(Path(folder) / shard["name"], shard["tokens"]) for shard in shards_of(meta, split)]
    return map_file(shards[0][0], dtype) if len(shards) == 1 else ShardedTokens(shards, dtype)


def map_file(path, dtype):
    # a plain array over the map: slicing a np.memmap itself costs ten times as much
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class ShardedTokens:
    """Files of tokens as one long sequence: `tokens[a:b]`, `tokens[i]`, `len(tokens)`, `np.asarray(tokens)`.

    A file is mapped when it is first touched. A slice within one file is a view of it; one that crosses into the next
    is copied, and nothing but the slice is.

    Args:
        shards: [(path, number of tokens), ...], in order.
    """

    def __init__(self, shards, dtype):
        self.paths, self.dtype = [path for path, _ in shards], np.dtype(dtype)
        self.ends = list(accumulate(n_tokens for _, n_tokens in shards))  # Python integers: they have no largest
        self.maps = [None] * len(shards)

    def __len__(self):
        return self.ends[-1]

    def map(self, i):
        if self.maps[i] is None:
            self.maps[i] = map_file(self.paths[i], self.dtype)
        return self.maps[i]

    def __getitem__(self, key):
        if not isinstance(key, slice):
            position = range(len(self))[key]
            return self[position : position + 1][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError("tokens in several files are sliced without a step; take np.asarray(tokens[a:b])[::step]")
        parts, i = [], bisect_right(self.ends, start)
        while start < stop:
            first = self.ends[i - 1] if i else 0
            parts.append(self.map(i)[start - first : stop - first])
            start, i = self.ends[i], i + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def __array__(self, dtype=None, copy=None):
        tokens = self[:]
        return tokens if dtype is None else tokens.astype(dtype)


# -- writing meta.json


def describe(tokenizer_meta, token_bytes, dtype, splits, **facts):
    """The dict of meta.json. `fingerprint` names the tokens themselves: two datasets that share it are the same."""
    identity = [tokenizer_meta, np.dtype(dtype).name, *(splits[split]["sha256"] for split in SPLITS)]
    identity += [splits[split]["records"]["sha256"] for split in SPLITS if "records" in splits[split]]
    identity = json.dumps(identity, sort_keys=True)
    return {
        "format": FORMAT,
        "kind": "text",  # windows anywhere in one stream of tokens
        **facts,
        "dtype": np.dtype(dtype).name,
        "vocab_size": tokenizer_meta["vocab_size"],
        "splits": splits,
        "fingerprint": hashlib.sha256(identity.encode("utf-8")).hexdigest(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tokenizer": tokenizer_meta,
        "token_bytes": token_bytes,
    }


def write_json(path, value):
    """Write under a temporary name, fsync, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder):
    """Make renames durable; where a folder cannot be opened (Windows) the system does it itself."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- token files made elsewhere


def describe_token_files(folder, tokenizer=None, vocab_size=None, dtype="uint16"):
    """Write meta.json for a train.bin and val.bin made by another program, such as nanoGPT's prepare.py; a split may
    also lie in several files, train_00000.bin and on, which are taken in the order of their names.

    Args:
        tokenizer: byte, gpt2 or hf:FOLDER, so that text can be read and written; None for tokens of unknown meaning.
        vocab_size: how many tokens there are; needed only without a tokenizer.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} already has a meta.json; nothing to describe")
    if tokenizer is None and vocab_size is None:
        raise UserError(f"say what the tokens of {folder} are: --tokenizer=gpt2, or --vocab_size=N for unknown ones")
    part, source = (None, None) if tokenizer is None else tokenizer_part(tokenizer)
    if part is not None and part.learns_from is not None:
        raise UserError(
            f"tokenizer={tokenizer} is learned from a corpus and cannot be told from its tokens; "
            "prepare the text here instead"
        )
    known = None if part is None else part.learn() if source is None else part.from_folder(source)
    token_bytes = known.token_bytes() if known else None
    vocab_size = known.vocab_size if known else vocab_size
    splits = {split: facts_of_split(folder, split, dtype, vocab_size, token_bytes) for split in SPLITS}
    tokenizer_meta = known.to_meta() if known else {"name": None, "vocab_size": vocab_size}
    facts = {"dataset": folder.name, "source": "token files made elsewhere"}
    meta = describe(tokenizer_meta, token_bytes, dtype, splits, **facts)
    write_json(folder / "meta.json", meta)
    return folder


def facts_of_split(folder, split, dtype, vocab_size, token_bytes):
    """What meta.json says of a split whose files are there."""
    whole = folder / f"{split}.bin"
    several = sorted(folder.glob(f"{split}_*.bin"))
    if whole.exists() and several:
        raise UserError(f"{folder} holds {whole.name} and {several[0].name}; keep the ones that are meant")
    sha256, n_bytes, shards = hashlib.sha256(), 0, []
    for path in several or [whole]:
        shard, n_bytes_of_shard = facts_of_file(path, dtype, vocab_size, token_bytes, sha256)
        shards.append(shard)
        n_bytes += n_bytes_of_shard
    n_tokens = sum(shard["tokens"] for shard in shards)
    counts = {"tokens": n_tokens, "bytes": n_bytes or None, "documents": None}
    return {**counts, "sha256": sha256.hexdigest(), "shards": shards}


def facts_of_file(path, dtype, vocab_size, token_bytes, split_sha256):
    """(name, tokens and checksum of a .bin; bytes of text behind it, 0 where unknown), read in pieces, which also go
    into the checksum of the split; a token outside the vocabulary is refused."""
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{path} does not exist or is empty; put the token file there")
    dtype = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size % dtype.itemsize:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, which is no whole number of {dtype.name} tokens; give its dtype"
        )
    sha256, n_tokens, n_bytes = hashlib.sha256(), 0, 0
    sizes = None if token_bytes is None else np.array(token_bytes, dtype=np.int64)
    with open(path, "rb") as file:
        while raw := file.read(2**24):
            tokens = np.frombuffer(raw, dtype=dtype)
            if int(tokens.max()) >= vocab_size:
                raise UserError(
                    f"{path} holds token {tokens.max()}, beyond a vocabulary of {vocab_size}; "
                    "give the right tokenizer or dtype"
                )
            sha256.update(raw)
            split_sha256.update(raw)
            n_tokens += len(tokens)
            n_bytes += 0 if sizes is None else int(sizes[tokens].sum())
    return {"name": path.name, "tokens": n_tokens, "sha256": sha256.hexdigest()}, n_bytes
