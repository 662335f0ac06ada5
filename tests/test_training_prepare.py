"""Preparing a dataset: tokens that decode to the text, folders, damage, files of other programs, scripts."""

# ruff: noqa: F401, F811 - book and pages are fixtures

import math
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import training_prepare
from data_helpers import OFFLINE_TOKENIZERS, TEXT, book, flip_a_byte, pages, settings, with_tokenizer
from training_corpora_base import Corpus
from training_data import (
    BatchStream,
    Dataset,
    ValidationSet,
    bits_per_byte,
    load_dataset,
)
from training_prepare import prepare, recipe_of, summary_of
from training_token_files import describe_token_files, read_meta
from training_tokenizers import TOKENIZER_REGISTRY
from user_errors import UserError

ROOT = Path(__file__).resolve().parents[1]


# -- preparing


@pytest.mark.parametrize("name", OFFLINE_TOKENIZERS)
def test_prepared_tokens_decode_to_the_text(name, book):
    dataset = load_dataset(with_tokenizer(book, name), quiet=True)
    cut = int(len(TEXT) * 0.9)
    assert dataset.tokenizer.decode(dataset.train) == TEXT[:cut]
    assert dataset.tokenizer.decode(dataset.val) == TEXT[cut:]
    facts = dataset.meta["splits"]
    assert facts["train"]["bytes"] + facts["val"]["bytes"] == len(TEXT.encode("utf-8"))
    assert facts["train"]["tokens"] == len(dataset.train) == dataset.n_tokens("train")
    assert facts["train"]["documents"] == facts["val"]["documents"] == 1
    assert dataset.vocab_size > max(dataset.train) and dataset.tokenizer_name == name


@pytest.mark.parametrize("name", OFFLINE_TOKENIZERS)
def test_documents_end_with_their_token(name, pages):
    dataset = load_dataset(with_tokenizer(pages, name), quiet=True)
    end = dataset.tokenizer.end_of_document_id
    for split, n_documents in (("train", 360), ("val", 40)):
        tokens = getattr(dataset, split)
        assert tokens[-1] == end and (tokens == end).sum() == n_documents
        facts = dataset.meta["splits"][split]
        assert facts["documents"] == n_documents
        assert dataset.token_bytes[tokens].sum() == facts["bytes"]


@pytest.mark.parametrize("name", OFFLINE_TOKENIZERS)
@pytest.mark.parametrize("kind", ["book", "pages"])
def test_in_pieces_by_threads_or_whole_the_tokens_are_the_same(name, kind, request, tmp_path, monkeypatch):
    base = with_tokenizer(request.getfixturevalue(kind), name)
    whole = Dataset(prepare(base, workers=1, chunk_bytes=10**9, quiet=True))
    monkeypatch.setattr("training_text_files.PIECE_CHARACTERS", 1000)
    base.data_dir = str(tmp_path / "other")
    pieces = Dataset(prepare(base, workers=4, chunk_bytes=700, quiet=True))
    assert pieces.fingerprint == whole.fingerprint
    assert pieces.meta["splits"] == whole.meta["splits"]


def test_a_large_vocabulary_takes_four_bytes(book, monkeypatch):
    class Wide(TOKENIZER_REGISTRY["byte"]):
        name = "wide"
        pieces = tuple(bytes([i % 256]) for i in range(70_000))

    monkeypatch.setitem(TOKENIZER_REGISTRY, "wide", Wide)  # taken out again when the test ends
    book.tokenizer = "wide"
    folder = prepare(book, quiet=True)
    assert read_meta(folder)["dtype"] == "uint32"
    assert Dataset(folder).train[:4].tolist() == list(b"Line")


def test_choices_have_folders_of_their_own(tmp_path):
    def folder(dataset, **changes):
        return recipe_of(settings(tmp_path, dataset=dataset, **changes)).folder.name

    assert folder("tinystories") == folder("tinystories", variant="small", tokenizer="bpe") == "tinystories"
    assert folder("tinystories", variant="full", tokenizer="gpt2") == "tinystories-full-gpt2"
    assert folder("tinystories", tokenizer_vocab_size=8192) == "tinystories-bpe8192"
    assert folder("python_stdlib", tokenizer="unigram") == "python_stdlib-unigram4096"
    assert folder("text", input="books/emma.txt", tokenizer="char") == "text-emma-char"


def test_what_is_there_is_used_and_never_overwritten(book):
    folder = prepare(book, quiet=True)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert set(before) == {"train.bin", "val.bin", "meta.json"}
    assert prepare(book, quiet=True) == folder
    load_dataset(book, may_prepare=False)
    Path(book.input).unlink()  # no longer needed
    load_dataset(book)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_a_prepared_folder_answers_to_its_own_name(book):
    folder = prepare(book, quiet=True)
    plain = settings(folder, dataset=folder.name, data_dir=str(folder.parent))
    assert load_dataset(plain).fingerprint == Dataset(folder).fingerprint
    plain.tokenizer = "char"
    with pytest.raises(UserError, match="tokenizer=byte, not tokenizer=char"):
        load_dataset(plain)


def test_another_input_of_the_same_name_is_noticed(book, tmp_path):
    prepare(book, quiet=True)
    Path(book.input).write_text(TEXT + "more", encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match="and now it has"):
        prepare(book, quiet=True)
    other = tmp_path / "book.jsonl"
    other.write_text('{"text": "x"}\n', encoding="utf-8")
    book.input = str(other)
    with pytest.raises(UserError, match=r"input=book\.txt, not input=book\.jsonl"):
        prepare(book, quiet=True)


@pytest.mark.parametrize("damage", ["encode", "empty"])
def test_a_failure_leaves_nothing_behind(damage, book, tmp_path, monkeypatch):
    if damage == "encode":
        monkeypatch.setattr(training_prepare, "encode_chunk", lambda *args: 1 / 0)
        expected = ZeroDivisionError
    else:
        Path(book.input).write_text("", encoding="utf-8")
        expected = UserError
    with pytest.raises(expected):
        prepare(book, quiet=True)
    assert list((tmp_path / "data").rglob("*")) == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dataset": "shakespear_char"}, "did you mean 'shakespeare_char'"),
        ({"dataset": "nothing_like_it"}, "known: .*python_stdlib.*--dataset=text"),
        ({"dataset": "text"}, "--input=PATH"),
        ({"dataset": "text", "tokenizer": "bite"}, "did you mean 'byte'"),
        ({"dataset": "text", "tokenizer": "char", "tokenizer_vocab_size": 99}, "no meaning for tokenizer=char"),
        ({"dataset": "tinystories", "variant": "smal"}, "did you mean 'small'"),
        ({"dataset": "python_stdlib", "variant": "small"}, "has no variants"),
    ],
)
def test_settings_that_cannot_be_meant_cost_one_sentence(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        load_dataset(settings(tmp_path, **changes), quiet=True)
    assert "\n" not in str(caught.value)


# -- damage


def damage_meta(folder, text):
    (folder / "meta.json").write_text(text, encoding="utf-8")


def truncate(path, n_bytes):
    os.truncate(path, n_bytes)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda folder: truncate(folder / "train.bin", 100), "truncated"),
        (lambda folder: truncate(folder / "val.bin", 0), "is empty"),
        (lambda folder: (folder / "val.bin").unlink(), "is missing"),
        (lambda folder: (folder / "train.bin").open("ab").write(b"xx"), "not the one described"),
        (lambda folder: flip_a_byte(folder / "train.bin"), "wrong checksum"),
        (lambda folder: damage_meta(folder, '{"format": 1'), "is damaged"),
        (lambda folder: damage_meta(folder, "{}"), "is damaged"),
        (lambda folder: damage_meta(folder, '{"format": 99}'), "has format 99"),
        (lambda folder: (folder / "meta.json").unlink(), "holds token files but no meta.json"),
    ],
)
def test_damaged_files_cost_one_sentence(damage, sentence, book):
    folder = prepare(book, quiet=True)
    damage(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        load_dataset(book, quiet=True)
    assert str(folder) in str(caught.value)


def test_a_vocabulary_must_hold_the_tokens(book):
    dataset = load_dataset(book, quiet=True)
    dataset.check_vocab(256)
    dataset.check_vocab(50304)  # a padded one
    with pytest.raises(UserError, match="vocab_size=255 is too small"):
        dataset.check_vocab(255)


def test_splits_shorter_than_a_window_are_refused(book):
    dataset = load_dataset(book, quiet=True)
    n_train, n_val = len(dataset.train), len(dataset.val)
    BatchStream(dataset, n_train - 1, 1, seed=0).batches(0)
    assert len(ValidationSet(dataset, n_val - 1)) == 1
    with pytest.raises(UserError, match="--block_size"):
        BatchStream(dataset, n_train, 1, seed=0)
    with pytest.raises(UserError, match=r"validation split .*--block_size"):
        ValidationSet(dataset, n_val)


# -- token files made elsewhere


def test_token_files_of_another_program_are_described_then_used(tmp_path):
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    plain = settings(tmp_path, dataset="mine")
    tokens = np.arange(1000, dtype="<u2") % 90
    tokens.tofile(folder / "train.bin")
    tokens[:200].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"never read")
    with pytest.raises(UserError, match="--describe"):
        load_dataset(plain)
    with pytest.raises(UserError, match="holds token 89, beyond a vocabulary of 60"):
        describe_token_files(folder, vocab_size=60)
    with pytest.raises(UserError, match="say what the tokens"):
        describe_token_files(folder)
    with pytest.raises(UserError, match="learned from a corpus"):
        describe_token_files(folder, tokenizer="bpe")
    describe_token_files(folder, tokenizer="byte")
    dataset = load_dataset(plain)
    assert dataset.train.tolist() == tokens.tolist() and dataset.tokenizer.name == "byte"
    with pytest.raises(UserError, match="nothing to describe"):
        describe_token_files(folder, tokenizer="byte")


def test_several_files_of_another_program_are_one_split(tmp_path):
    tokens = np.arange(1000, dtype="<u2") % 90
    for i, part in enumerate(np.split(tokens, [300, 700])):
        part.tofile(tmp_path / f"train_{i:06d}.bin")
    tokens.tofile(tmp_path / "val.bin")
    dataset = Dataset(describe_token_files(tmp_path, tokenizer="byte"))
    facts = dataset.meta["splits"]
    assert np.array_equal(dataset.train, tokens) and facts["train"]["sha256"] == facts["val"]["sha256"]
    assert facts["train"]["bytes"] == facts["val"]["bytes"] and len(facts["train"]["shards"]) == 3
    (tmp_path / "meta.json").unlink()
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin and train_000000\.bin"):
        describe_token_files(tmp_path, tokenizer="byte")


def test_tokens_of_an_unknown_tokenizer_train_but_have_no_text(tmp_path):
    for split in ("train", "val"):
        np.arange(100, dtype="<u4").tofile(tmp_path / f"{split}.bin")
    describe_token_files(tmp_path, vocab_size=100, dtype="uint32")
    dataset = Dataset(tmp_path)
    assert dataset.vocab_size == 100 and "unknown" in dataset.summary()
    validation = ValidationSet(dataset, 10)
    assert math.isnan(validation.n_bytes) and bits_per_byte(5.0, validation.n_bytes) is None
    with pytest.raises(UserError, match="tokenizer is unknown"):
        dataset.tokenizer  # noqa: B018


# -- the scripts that users run


def test_every_dataset_has_a_script_and_every_script_a_dataset():
    scripts = {path.parent.name for path in (ROOT / "data").glob("*/prepare.py")}
    assert scripts == set(training_prepare.CORPUS_REGISTRY)


@pytest.mark.parametrize("name", sorted(training_prepare.CORPUS_REGISTRY))
def test_scripts_prepare_their_dataset(name, monkeypatch):
    asked = []
    monkeypatch.setattr(training_prepare, "prepare_from_command_line", lambda *args: asked.append(args))
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "data" / name / "prepare.py"), run_name="__main__")
    assert asked[0][0] == name and f"data/{name}/prepare.py" in asked[0][1]


def test_a_script_prints_the_counts_and_a_mistake_leaves_with_two(book, capsys):
    arguments = [f"--input={book.input}", f"--data_dir={book.data_dir}", "--tokenizer=char"]
    training_prepare.prepare_from_command_line("text", "about", arguments)
    folder = Path(book.data_dir) / "text-book-char"
    out = capsys.readouterr().out
    assert out.strip() == summary_of(folder) and "1 documents" in out
    with pytest.raises(SystemExit) as caught:
        training_prepare.prepare_from_command_line("text", "about", ["--input=nothing.txt"])
    assert caught.value.code == 2 and "error: input='nothing.txt' does not exist" in capsys.readouterr().err


def test_encoding_holds_few_chunks_at_a_time(monkeypatch, tmp_path):
    """A corpus larger than memory works because reading never runs far ahead of writing."""
    read, written, ahead = [0], [0], []

    class Endless(Corpus):
        def documents(self):
            for _ in range(300):
                read[0] += 1
                yield "train", "x" * 100, True

    class Written:
        place, n_bytes = None, 0

        def append(self, encoded, place):
            written[0] += encoded["train"].n_documents
            ahead.append(read[0] - written[0])
            assert place == written[0]

    tokenizer = TOKENIZER_REGISTRY["byte"].learn()
    training_prepare.encode_corpus(Endless(), tokenizer, Written(), 2, 100, lambda *args: None)
    assert written[0] == 300 and max(ahead) <= 5


def test_the_summary_shows_what_was_made(pages):
    lines = summary_of(prepare(pages, quiet=True)).splitlines()
    assert len(lines) == 3 and "text-pages: byte tokens" in lines[0]
    assert "360 documents" in lines[1] and "40 documents" in lines[2]
