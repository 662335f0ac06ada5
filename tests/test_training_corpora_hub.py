"""Datasets of the Hugging Face Hub, from stand-ins and local files: nothing here touches the network."""

# ruff: noqa: F401, F811 - hub, real_rows and tables are fixtures

import json
import math
import sys
from itertools import islice

import pytest

import training_corpora_hub
from corpora_helpers import hub, real_rows, tables
from training_corpora import CORPUS_REGISTRY
from user_errors import UserError


@pytest.mark.parametrize("name, config", [("openwebtext", None), ("fineweb_edu", "sample-10BT")])
def test_pages_are_streamed_and_about_one_in_two_thousand_validates(name, config, hub):
    corpus = CORPUS_REGISTRY[name]()
    documents = list(corpus.documents())
    assert [text for _, text, _ in documents] == [f"train {i}" for i in range(6000)]
    assert 0 < sum(split == "val" for split, _, _ in documents) < 12
    assert hub.asked[0][1:4] == (config, "train", True)


def test_a_page_validates_by_its_text_alone():
    texts = [f"page {i} é\ud800" for i in range(40_000)]
    chosen = [text for text in texts if training_corpora_hub.is_one_in(20, text)]
    assert abs(len(chosen) - 2000) < 5 * math.sqrt(2000 * 19 / 20)  # binomial, five sigma
    assert chosen[:2] == ["page 22 é\ud800", "page 24 é\ud800"]  # frozen: another choice is another dataset


def test_a_stream_that_breaks_off_goes_on_where_it_broke(hub):
    hub.breaks += [1, 2500, 2501, 5999]
    documents = list(CORPUS_REGISTRY["openwebtext"]().documents())
    assert [text for _, text, _ in documents] == [f"train {i}" for i in range(6000)]
    assert not hub.breaks and hub.waited == [1, 1, 1, 1] and len(hub.asked) == 5


def test_a_stream_that_stays_broken_costs_one_sentence(hub):
    hub.breaks += [3000] * 10
    seen = []
    with pytest.raises(UserError, match=r"ConnectionError: Server Disconnected.*--input=FILE"):
        seen.extend(CORPUS_REGISTRY["openwebtext"]().documents())
    assert len(seen) == 3000 and hub.waited == list(training_corpora_hub.RETRY_SECONDS)


def test_a_stream_that_does_not_begin_is_not_waited_for(hub):
    hub.breaks += [0]
    with pytest.raises(UserError, match="Server Disconnected"):
        list(CORPUS_REGISTRY["openwebtext"]().documents())
    assert hub.waited == []


def test_another_version_of_datasets_skips_rows(hub):
    *_, (_, here) = islice(CORPUS_REGISTRY["openwebtext"]().placed_documents(), 100)
    place = {**here(), "version": "4.0.0", "state": {"unknown": 1}}
    assert next(CORPUS_REGISTRY["openwebtext"]().placed_documents(place))[0][1] == "train 100"


def test_the_source_is_held_to_one_revision(hub, monkeypatch):
    monkeypatch.setattr(training_corpora_hub, "latest_revision", lambda path, revision: f"{path} at {revision}")
    corpus = CORPUS_REGISTRY["openwebtext"]()
    assert corpus.pin() == "Skylion007/openwebtext at refs/convert/parquet"
    next(corpus.documents())
    assert CORPUS_REGISTRY["openwebtext"]().pin("f3808c3") == "f3808c3" and hub.asked[0][-1] == corpus.revision


def test_stories_of_the_hub_keep_its_splits(hub):
    splits = [split for split, _, _ in CORPUS_REGISTRY["tinystories"]().documents()]
    assert splits.count("train") == 6000 and splits.count("val") == 5000
    assert [row[2] for row in hub.asked] == ["train", "validation"]


@pytest.mark.parametrize("name", ["tinystories", "openwebtext", "fineweb_edu"])
def test_no_package_and_no_network_cost_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(CORPUS_REGISTRY[name]().documents())

    class Unreachable:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", Unreachable)
    with pytest.raises(UserError, match="--input=FILE"):
        list(CORPUS_REGISTRY[name]().documents())


# -- the package `datasets` itself, on local files


def test_real_rows_go_on_behind_each_of_them(real_rows):
    places = [here() for _, here in CORPUS_REGISTRY["openwebtext"]().placed_documents()]
    for n in [1, 15, 16, 17, 39, 40, 41, 89, 90, 149, 150]:
        place = json.loads(json.dumps(places[n - 1]))
        for version in (place["version"], "4.0.0"):  # the state of `datasets`, or skip()
            rest = CORPUS_REGISTRY["openwebtext"]().placed_documents({**place, "version": version})
            assert [text for (_, text, _), _ in rest] == real_rows[n:], (n, version)


def test_whole_files_before_a_place_are_not_opened(real_rows, tables):
    """`datasets` goes on from the row group before, which at a file's start is the last one of the file before."""
    for n, files in ((80, {"0001", "0002"}), (100, {"0001", "0002"}), (110, {"0002"})):
        *_, (_, here) = islice(CORPUS_REGISTRY["openwebtext"]().placed_documents(), n)
        tables.read.clear()
        list(CORPUS_REGISTRY["openwebtext"]().placed_documents(here()))
        assert {file for file, _ in tables.read} == files


def test_a_real_stream_that_breaks_off_is_taken_up(real_rows, tables):
    tables.fail += [("0000", 1), ("0001", 0), ("0001", 0), ("0002", 3)]
    documents = list(CORPUS_REGISTRY["openwebtext"]().documents())
    assert [text for _, text, _ in documents] == real_rows and not tables.fail
