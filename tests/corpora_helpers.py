"""Files of documents, and stand-ins for the Hugging Face Hub and for what lies on it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import training_corpora_hub


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def write_lines(path, rows):
    return write(path, "\n".join(json.dumps(row) for row in rows) + "\n")


def stories(n, first=0):
    return [f"Story {i}. Once upon a time.\nThe end." for i in range(first, first + n)]


class HubRows:
    """As much of datasets 5.2's IterableDataset as is used: iteration, skip, and a state that counts what was given."""

    def __init__(self, texts, breaks=()):
        self.texts, self.breaks, self.start, self.given = texts, breaks, 0, None

    def __iter__(self):
        self.given = self.start
        for text in self.texts[self.start :]:
            if self.given in self.breaks:
                self.breaks.remove(self.given)
                raise ConnectionError("Server Disconnected")
            self.given += 1
            yield {"text": text, "url": "https://example.org"}

    def state_dict(self):
        return None if self.given is None else {"examples_iterable": {"shard_example_idx": self.given}, "epoch": 0}

    def load_state_dict(self, state):
        self.start = state["examples_iterable"]["shard_example_idx"]

    def skip(self, n):
        return HubRows(self.texts[n:], self.breaks)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: 6,000 rows for each split, and a record of what was asked."""

    class Hub:
        __version__ = "5.2.0"
        asked = []  # noqa: RUF012
        breaks = []  # noqa: RUF012 - rows before which the stream breaks off, once each
        waited = []  # noqa: RUF012

        @staticmethod
        def load_dataset(path, config, split, streaming, revision):
            Hub.asked.append((path, config, split, streaming, revision))
            return HubRows([f"{split} {i}" for i in range(6000)], Hub.breaks)

    monkeypatch.setattr(training_corpora_hub.time, "sleep", Hub.waited.append)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    return Hub


@pytest.fixture
def real_rows(tmp_path, monkeypatch):
    """openwebtext reads three parquet files of 40, 50 and 60 rows, through datasets.load_dataset; yields the texts."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    texts, files = [f"page {i} é " * 5 for i in range(150)], []
    for number, (first, last) in enumerate(((0, 40), (40, 90), (90, 150))):
        table = pyarrow.table({"text": texts[first:last], "url": ["x"] * (last - first)})
        files.append(str(tmp_path / f"{number:04d}.parquet"))
        pyarrow.parquet.write_table(table, files[-1], row_group_size=16)
    load_dataset = datasets.load_dataset

    def load(path, config, split, streaming, revision):
        assert (path, split, streaming) == ("Skylion007/openwebtext", "train", True)
        return load_dataset("parquet", data_files={"train": files}, split=split, streaming=True, cache_dir=tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(training_corpora_hub.time, "sleep", lambda seconds: None)
    return texts


@pytest.fixture
def tables(real_rows, monkeypatch):
    """What `datasets` reads of parquet files: [(file, row group), ...], and `fail`: how many readings break off."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    read, record = Parquet._generate_tables, SimpleNamespace(read=[], fail=[])

    def recorded(self, files, row_groups_list):
        for group, (key, table) in enumerate(read(self, files, row_groups_list)):
            record.read.append((Path(files[0]).stem, group))
            if record.read[-1] in record.fail:
                record.fail.remove(record.read[-1])
                raise ConnectionError("Server Disconnected")
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", recorded)
    return record
