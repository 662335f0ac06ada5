"""Token files: a folder with train.bin, val.bin and the meta.json that says what they are.

    train.bin, val.bin    tokens one after another, little-endian uint16, or uint32 from 65,537 tokens on: as nanoGPT's
    meta.json             format, kind, dataset, variant, source, dtype, vocab_size, fingerprint, tokenizer (everything
                          to rebuild it), token_bytes (bytes of text for each token), and for each split its tokens,
                          bytes, documents and sha256

meta.json is written last: a folder that has it is whole. `describe_token_files` writes one for files made elsewhere.
"""

import errno
import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from training_tokenizers import TOKENIZER_REGISTRY, tokenizer_from_meta
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
        meta["splits"]["train"]["tokens"], meta["splits"]["val"]["tokens"], meta["fingerprint"]  # what all rely on
        meta["dtype"], meta["vocab_size"], meta["tokenizer"], meta["token_bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {how_to_prepare_again(folder)}") from error
    return meta


def how_to_prepare_again(folder):
    return f"remove meta.json, train.bin and val.bin from {folder} and it is prepared again"


def tokenizer_of(meta):
    """The tokenizer of a dataset, from its meta."""
    return tokenizer_from_meta(meta["tokenizer"])


# -- writing


class TokenFile:
    """One split's .bin under a temporary name: append, then publish."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, np.dtype(dtype)
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - stays open over many calls; `token_files` closes it
        self.sha256 = hashlib.sha256()
        self.n_tokens = self.n_bytes = self.n_documents = 0

    def append(self, encoded):
        raw = encoded.tokens.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.sha256.update(raw)
        self.n_tokens += len(encoded.tokens)
        self.n_bytes += encoded.n_bytes
        self.n_documents += encoded.n_documents

    def facts(self):
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": max(self.n_documents, min(self.n_tokens, 1)),  # one long text has no end but is a document
            "sha256": self.sha256.hexdigest(),
        }

    def publish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)


@contextmanager
def token_files(folder, vocab_size):
    """{split: TokenFile}; whatever was not published when the block ends is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --data_dir") from error
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    files = {split: TokenFile(folder / f"{split}.bin", dtype) for split in SPLITS}
    try:
        yield files
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {folder} is full; make room, or choose another --data_dir") from error
        raise
    finally:
        for file in files.values():
            file.file.close()
            file.temporary.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()  # only where nothing is in it


def describe(tokenizer_meta, token_bytes, dtype, splits, **facts):
    """The dict of meta.json. `fingerprint` names the tokens themselves: two datasets that share it are the same."""
    identity = [tokenizer_meta, np.dtype(dtype).name, *(splits[split]["sha256"] for split in SPLITS)]
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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -- token files made elsewhere


def describe_token_files(folder, tokenizer=None, vocab_size=None, dtype="uint16"):
    """Write meta.json for a train.bin and val.bin made by another program, such as nanoGPT's prepare.py.

    Args:
        tokenizer: byte or gpt2, so that text can be read and written; None for tokens of unknown meaning.
        vocab_size: how many tokens there are; needed only without a tokenizer.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} already has a meta.json; nothing to describe")
    if tokenizer is None and vocab_size is None:
        raise UserError(f"say what the tokens of {folder} are: --tokenizer=gpt2, or --vocab_size=N for unknown ones")
    if tokenizer is not None and TOKENIZER_REGISTRY[tokenizer].learns_from is not None:
        raise UserError(
            f"tokenizer={tokenizer} is learned from a corpus and cannot be told from its tokens; "
            "prepare the text here instead"
        )
    known = TOKENIZER_REGISTRY[tokenizer].learn() if tokenizer else None
    token_bytes = known.token_bytes() if known else None
    vocab_size = known.vocab_size if known else vocab_size
    splits = {split: facts_of_file(folder / f"{split}.bin", dtype, vocab_size, token_bytes) for split in SPLITS}
    tokenizer_meta = known.to_meta() if known else {"name": None, "vocab_size": vocab_size}
    facts = {"dataset": folder.name, "source": "token files made elsewhere"}
    meta = describe(tokenizer_meta, token_bytes, dtype, splits, **facts)
    write_json(folder / "meta.json", meta)
    return folder


def facts_of_file(path, dtype, vocab_size, token_bytes):
    """Counts and checksum of a .bin, read in pieces; a token outside the vocabulary is refused."""
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
            n_tokens += len(tokens)
            n_bytes += 0 if sizes is None else int(sizes[tokens].sum())
    return {"tokens": n_tokens, "bytes": n_bytes or None, "documents": None, "sha256": sha256.hexdigest()}
