"""Texts to prepare, and datasets that are arrays."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from training_tokenizers import TOKENIZER_REGISTRY

OFFLINE_TOKENIZERS = [name for name in TOKENIZER_REGISTRY if name not in ("gpt2", "hf")]
TEXT = "".join(f"Line {i}: one fish, two fish, {i % 7} fish, blue fish é.\n" for i in range(600))


def settings(folder, **changes):
    defaults = {"dataset": "text", "data_dir": str(folder / "data"), "input": None, "variant": None}
    return SimpleNamespace(**{**defaults, "tokenizer": None, "tokenizer_vocab_size": None, **changes})


@pytest.fixture
def book(tmp_path):
    """Settings of a text of 30 kB that lies in a file."""
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    return settings(tmp_path, input=str(path))


@pytest.fixture
def pages(tmp_path):
    """Settings of 400 short documents."""
    path = tmp_path / "pages.jsonl"
    path.write_text(
        "".join(json.dumps({"text": TEXT[i * 40 : i * 40 + 90]}) + "\n" for i in range(400)), encoding="utf-8"
    )
    return settings(tmp_path, input=str(path))


def with_tokenizer(base, name):
    size = 400 if TOKENIZER_REGISTRY[name].takes_vocab_size else None
    return SimpleNamespace(**{**vars(base), "tokenizer": name, "tokenizer_vocab_size": size})


class StubDataset:
    """As much of a Dataset as the stream needs, around any array."""

    fingerprint = "stub"
    token_bytes = None

    def __init__(self, train, val=()):
        self.train, self.val = train, val


def counting(n):
    return StubDataset(np.arange(n, dtype=np.uint32))


class Endless:
    """2^40 tokens without a byte of memory: token i is i."""

    def __len__(self):
        return 2**40

    def __getitem__(self, window):
        return np.arange(window.start, window.stop)


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
