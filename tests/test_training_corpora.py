"""Documents and their splits, from local files only: nothing here touches the network."""

# ruff: noqa: F401, F811 - hub is a fixture

import hashlib
import json
import random
import sys
from itertools import islice

import pytest

import training_corpora
import training_text_files
from corpora_helpers import HubRows, hub, stories, write, write_lines
from training_corpora import CORPUS_REGISTRY
from training_corpora_hub import END_OF_STORY
from user_errors import UserError


def split_of(corpus, split):
    """What a split holds, documents marked off by '|'."""
    return "".join(as_str(text) + "|" * ends for name, text, ends in corpus.documents() if name == split)


def as_str(text):
    return text if isinstance(text, str) else text.decode("utf-8")


# -- python_stdlib


def test_the_standard_library_comes_without_its_tests():
    corpus = CORPUS_REGISTRY["python_stdlib"]()
    files = corpus.files()
    assert files == sorted(files) and {"os.py", "json/decoder.py"} <= set(files)
    assert not [path for path in files if "site-packages" in path or "/test/" in path or "/tests/" in path]
    sizes = {"train": 0, "val": 0}
    for split, text, ends in corpus.documents():
        assert isinstance(text, bytes) and ends and b"\r\n" not in text
        sizes[split] += len(text)
    assert 0.02 < sizes["val"] / sum(sizes.values()) < 0.15


def test_python_files_go_to_the_same_split_wherever_they_lie(tmp_path):
    for folder in ("one", "two"):
        for i in range(60):
            write(tmp_path / folder / f"module_{i}.py", f"x = {i}\r\n")
        write(tmp_path / folder / "test" / "test_x.py", "no")
        write(tmp_path / folder / "notes.txt", "no")
    one, two = (list(CORPUS_REGISTRY["python_stdlib"](input=tmp_path / name).documents()) for name in ("one", "two"))
    assert one == two and len(one) == 60 and {split for split, _, _ in one} == {"train", "val"}
    assert ("train", b"x = 0\n", True) in one or ("val", b"x = 0\n", True) in one


def test_a_folder_without_python_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.py files"):
        CORPUS_REGISTRY["python_stdlib"](input=tmp_path)


# -- Tiny Shakespeare


def test_shakespeare_is_split_as_nanogpt_splits_it(tmp_path, monkeypatch):
    text = "".join(f"{i}. To be, or not to be\n" for i in range(1001))
    corpus_class = CORPUS_REGISTRY["shakespeare_char"]
    monkeypatch.setattr(corpus_class, "sha256", hashlib.sha256(text.encode()).hexdigest())
    corpus = corpus_class(input=write(tmp_path / "input.txt", text))
    cut = int(len(text) * 0.9)
    assert split_of(corpus, "train") == text[:cut] and split_of(corpus, "val") == text[cut:]


def test_another_text_is_not_taken_for_shakespeare(tmp_path):
    corpus = CORPUS_REGISTRY["shakespeare"](input=write(tmp_path / "mine.txt", "To be"))
    with pytest.raises(UserError, match="--dataset=text"):
        list(corpus.documents())


def test_without_a_network_the_sentence_says_input(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(training_corpora.urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match="--input=FILE"):
        list(CORPUS_REGISTRY["shakespeare_char"](folder=tmp_path).documents())


class Response:
    def __init__(self, raw):
        self.raw = raw

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def read(self):
        return self.raw


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    raw, asked = b"To be, or not to be", []

    def urlopen(url, timeout):
        asked.append(url)
        return Response(raw)

    monkeypatch.setattr(training_corpora.urllib.request, "urlopen", urlopen)
    path = tmp_path / "new" / "input.txt"
    for _ in range(2):  # the second time it is there
        assert training_corpora.download("http://x", hashlib.sha256(raw).hexdigest(), path).read_bytes() == raw
    assert len(asked) == 1 and [file.name for file in path.parent.iterdir()] == ["input.txt"]
    with pytest.raises(UserError, match="wrong checksum"):
        training_corpora.download("http://x", "0" * 64, tmp_path / "other.txt")
    assert not (tmp_path / "other.txt").exists()


# -- your own text


def test_one_text_gives_its_last_tenth(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(500))
    corpus = CORPUS_REGISTRY["text"](input=write(tmp_path / "a.txt", text))
    assert not corpus.ends_documents
    assert split_of(corpus, "train") == text[: int(len(text) * 0.9)]
    assert split_of(corpus, "val") == text[int(len(text) * 0.9) :]


def test_line_ends_and_the_byte_order_mark_are_the_systems_business(tmp_path):
    corpus = CORPUS_REGISTRY["text"](input=write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n" * 1))
    assert split_of(corpus, "train") + split_of(corpus, "val") == "one\ntwo\nthree\n"


@pytest.mark.parametrize("n_documents", [3, 250])
def test_json_lines(n_documents, tmp_path):
    rows = [{"text": f"document {i} é\ud800", "id": i} for i in range(n_documents)]
    corpus = CORPUS_REGISTRY["text"](input=write_lines(tmp_path / "a.jsonl", rows))
    documents = list(corpus.documents())
    assert sum(ends for _, _, ends in documents) == n_documents
    assert "".join(text for _, text, _ in documents) == "".join(row["text"] for row in rows)
    n_val = sum(len(text) for split, text, _ in documents if split == "val")
    assert 0.08 < n_val / sum(len(row["text"]) for row in rows) < 0.12
    if n_documents >= 100:
        assert [split for split, _, _ in documents] == (["train"] * 9 + ["val"]) * (n_documents // 10)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i} é" for i in range(2500)]
    parquet.write_table(pyarrow.table({"id": range(2500), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    corpus = CORPUS_REGISTRY["text"](input=tmp_path / "a.parquet")
    assert [text for _, text, _ in corpus.documents()] == texts
    parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*content"):
        list(CORPUS_REGISTRY["text"](input=tmp_path / "b.parquet").documents())
    write(tmp_path / "c.parquet", "not parquet")
    with pytest.raises(UserError, match="not a readable parquet"):
        list(CORPUS_REGISTRY["text"](input=tmp_path / "c.parquet").documents())


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(CORPUS_REGISTRY["text"](input=write(tmp_path / "c.parquet", "x")).documents())


def test_a_folder_is_read_in_order_and_each_txt_is_a_document(tmp_path):
    write(tmp_path / "b.txt", "second " * 10)
    write(tmp_path / "a" / "z.txt", "first " * 10)
    write_lines(tmp_path / "c.jsonl", [{"text": "third"}, {"text": "fourth"}])
    write(tmp_path / "readme.md", "not me")
    corpus = CORPUS_REGISTRY["text"](input=tmp_path)
    assert corpus.ends_documents
    assert split_of(corpus, "train") + split_of(corpus, "val") == f"{'first ' * 10}|{'second ' * 10}|third|fourth|"


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 .* is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1 .* no field 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 .* no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "no field 'text' that holds a string"),
        ("a.jsonl", b"\xff\xfe\n", "line 1 .* is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_costs_one_sentence(name, content, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        list(CORPUS_REGISTRY["text"](input=write(tmp_path / name, content)).documents())


def test_input_must_be_given_and_exist(tmp_path):
    with pytest.raises(UserError, match="--input=PATH"):
        CORPUS_REGISTRY["text"]()
    with pytest.raises(UserError, match="does not exist"):
        CORPUS_REGISTRY["text"](input=tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"holds no \.txt"):
        CORPUS_REGISTRY["text"](input=tmp_path)


@pytest.mark.parametrize("piece", [1, 7, 100, 10_000])
def test_a_long_text_is_cut_only_before_white_space(piece, monkeypatch):
    monkeypatch.setattr(training_text_files, "PIECE_CHARACTERS", piece)
    rng = random.Random(piece)
    text = "".join(rng.choice(["word", "é", " ", "  ", "\n", "\n\n \n", "=" * 30, "\u00a0"]) for _ in range(600))
    pieces = list(training_text_files.cut_between_words(text[i : i + piece] for i in range(0, len(text), piece)))
    assert "".join(text for text, _ in pieces) == text
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    if piece >= 100:
        assert all(left[-1].strip() and not right[0].strip() for (left, _), (right, _) in zip(pieces, pieces[1:]))  # noqa: B905, RUF007


# -- stories and pages


def test_stories_are_cut_at_their_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(training_text_files, "PIECE_CHARACTERS", 200)
    text = f"\n{END_OF_STORY}\n".join(stories(300)) + f"\n{END_OF_STORY}\n"
    corpus = CORPUS_REGISTRY["tinystories"](input=write(tmp_path / "some.txt", text))
    assert corpus.variant == "small" and corpus.ends_documents
    documents = list(corpus.documents())
    assert [text for _, text, _ in documents] == stories(300) and all(ends for _, _, ends in documents)
    assert sum(split == "val" for split, _, _ in documents) == 30


def test_small_keeps_the_first_stories_of_the_published_files(tmp_path, monkeypatch):
    corpus_class = CORPUS_REGISTRY["tinystories"]
    limits = {"small": {"train": 5, "val": 2}, "full": {"train": None, "val": None}}
    monkeypatch.setattr(corpus_class, "kept_stories", limits)
    write(tmp_path / "TinyStories-train.txt", END_OF_STORY.join(stories(20)))
    write(tmp_path / "TinyStories-valid.txt", END_OF_STORY.join(stories(4, first=100)))
    for variant, n_train, n_val in (("small", 5, 2), ("full", 20, 4)):
        documents = list(corpus_class(input=tmp_path, variant=variant).documents())
        assert [text for split, text, _ in documents if split == "train"] == stories(n_train)
        assert [text for split, text, _ in documents if split == "val"] == stories(n_val, first=100)


def test_a_single_file_of_stories_is_limited_in_both_splits(tmp_path, monkeypatch):
    corpus_class = CORPUS_REGISTRY["tinystories"]
    monkeypatch.setattr(corpus_class, "kept_stories", {"small": {"train": 50, "val": 8}})
    corpus = corpus_class(input=write(tmp_path / "some.txt", END_OF_STORY.join(stories(300))))
    splits = [split for split, _, _ in corpus.documents()]
    assert splits.count("train") == 50 and splits.count("val") == 8


def test_local_pages_are_read_as_text(tmp_path):
    path = write_lines(tmp_path / "pages.jsonl", [{"text": f"page {i}"} for i in range(200)])
    corpus = CORPUS_REGISTRY["openwebtext"](input=path)
    assert [split for split, _, _ in corpus.documents()].count("val") == 20


@pytest.mark.parametrize("name", [name for name in CORPUS_REGISTRY if name != "text"])
def test_variants_are_known_by_name(name):
    corpus = CORPUS_REGISTRY[name]
    assert corpus.check_variant(None) == (corpus.variants[0] if corpus.variants else None)
    with pytest.raises(UserError, match="variant"):
        corpus.check_variant("smalll")


# -- going on behind a document


def published_stories(folder):
    write(folder / "TinyStories-train.txt", END_OF_STORY.join(stories(20)))
    write(folder / "TinyStories-train-2.txt", END_OF_STORY.join(stories(15, first=50)))
    return write(folder / "TinyStories-valid.txt", END_OF_STORY.join(stories(9, first=100))).parent


def mixed_files(folder):
    write_lines(folder / "a.jsonl", [{"text": f"line {i} é" * (i % 3)} for i in range(60)])
    write(folder / "b.txt", "one long text\n" * 40)
    return write_lines(folder / "c.jsonl", [{"text": f"other {i}"} for i in range(60)]).parent


def python_files(folder):
    for i in range(30):
        write(folder / f"m{i}.py", f"x = {i}")
    return folder


def rows_of_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for name, n in (("a", 70), ("b", 1), ("c", 55)):
        texts = [None if i % 7 == 3 else f"{name} {i}" for i in range(n)]
        parquet.write_table(pyarrow.table({"text": texts}), folder / f"{name}.parquet", row_group_size=16)
    return folder


PLACES = [
    ("python_stdlib", None, python_files),
    ("text", None, mixed_files),
    ("text", None, rows_of_parquet),
    ("text", None, lambda folder: write(folder / "one.txt", "a word and é\n" * 70)),
    ("text", None, lambda folder: write_lines(folder / "few.jsonl", [{"text": "four " * i} for i in range(9)])),
    ("openwebtext", None, mixed_files),
    ("tinystories", "small", published_stories),
    ("tinystories", "full", published_stories),
    ("tinystories", "small", lambda folder: write(folder / "some.txt", END_OF_STORY.join(stories(200)))),
    ("tinystories", "small", None),
    ("openwebtext", None, None),
]


@pytest.mark.parametrize("name, variant, make", PLACES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(PLACES)])
def test_behind_any_document_the_rest_is_the_same(name, variant, make, tmp_path, hub, monkeypatch):
    """Also through JSON, in another object, and where the border between the splits lies within a text."""
    monkeypatch.setattr(training_text_files, "PIECE_CHARACTERS", 100)
    limits = {"small": {"train": 16, "val": 5}, "full": {"train": None, "val": None}}
    monkeypatch.setattr(CORPUS_REGISTRY["tinystories"], "kept_stories", limits)

    def corpus():
        return CORPUS_REGISTRY[name](input=source, variant=variant, folder=tmp_path)

    source = None if make is None else make(tmp_path / "source")
    if name == "openwebtext" and source is None:
        monkeypatch.setattr(hub, "load_dataset", lambda *args, **kwargs: HubRows([f"{i}" for i in range(90)]))
    documents, places = [], []
    for document, here in corpus().placed_documents():
        documents.append(document)
        places.append(json.dumps(here()))
    assert documents == list(corpus().documents()) and len(documents) > 8
    for i, place in enumerate(places):
        assert [document for document, _ in corpus().placed_documents(json.loads(place))] == documents[i + 1 :]


def test_what_lies_before_a_place_is_not_read_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(300)])
    *_, (_, here) = islice(CORPUS_REGISTRY["text"](input=path).placed_documents(), 200)
    raw = path.read_bytes()
    path.write_bytes(b"no JSON" + raw[7:])
    rest = list(CORPUS_REGISTRY["text"](input=path).placed_documents(here()))
    assert len(rest) == 100 and rest[0][0][1] == "line 200"
    path.write_bytes(raw[:-4] + b"no\n\n")
    with pytest.raises(UserError, match="line 300 of"):  # still counted from the start of the file
        list(CORPUS_REGISTRY["text"](input=path).placed_documents(here()))
