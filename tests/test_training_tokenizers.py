"""Every tokenizer: text survives the round trip, bytes add up, learning repeats, JSON rebuilds it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from training_tokenizers import (
    NUL,
    TOKENIZER_REGISTRY,
    as_text,
    byte_characters,
    learn_unigram,
    load_tokenizer,
    split_into_words,
    tokenizer_from_meta,
)
from user_errors import UserError

STORY = "Once upon a time there was a fish. The fish liked to swim, and the other fishes liked it too.\n"
ODD = "tabs\t\r\n  two  spaces é ñ 漢字 🎉 \u00a0 <|endoftext|> " + "=" * 300 + "\x00\x1c end "
LEARNED = [name for name, part in TOKENIZER_REGISTRY.items() if part.takes_vocab_size]
GPT2_FILE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for GPT-2's vocab.bpe
has_gpt2 = (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")) / GPT2_FILE).is_file()
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not has_gpt2, reason="TIKTOKEN_CACHE_DIR does not hold GPT-2's files"))
    if name == "gpt2"
    else name
    for name in TOKENIZER_REGISTRY
]


def learn(name, documents=(STORY * 20, ODD), vocab_size=400):
    return TOKENIZER_REGISTRY[name].learn(documents, vocab_size=vocab_size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [STORY, ODD, "", " ", "\n\n"], ids=["story", "odd", "empty", "space", "lines"])
def test_text_survives_and_its_bytes_add_up(name, text):
    tokenizer = learn(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    sizes = np.array(tokenizer.token_bytes())
    assert len(sizes) == tokenizer.vocab_size
    n_ends = text.count(NUL) if name in ("byte", "char") else 0  # the byte that ends documents counts for nothing
    assert sizes[ids].sum() == len(text.encode("utf-8")) - n_ends


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_encodes_the_same(name, tmp_path):
    tokenizer = learn(name)
    path = tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), load_tokenizer(path), load_tokenizer(tokenizer.to_meta())):
        assert again.name == name and again.vocab_size == tokenizer.vocab_size
        assert again.encode(ODD).tolist() == tokenizer.encode(ODD).tolist()
        assert again.end_of_document_id == tokenizer.end_of_document_id


@pytest.mark.parametrize("name", NAMES)
def test_text_never_spells_the_end_of_a_document(name):
    tokenizer = learn(name)
    assert tokenizer.end_of_document_id is not None
    assert tokenizer.end_of_document_id not in tokenizer.encode(STORY + "<|endoftext|>")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [STORY, ODD, "", " ", "\n\n"], ids=["story", "odd", "empty", "space", "lines"])
def test_other_programs_get_the_same_tokens(name, text):
    tokenizer, text = learn(name), text.replace("<|endoftext|>", "")
    library = tokenizer.to_library()
    ids = tokenizer.encode(text).tolist()
    assert library.encode(text).ids == ids and library.decode(ids, skip_special_tokens=False) == text
    assert library.get_vocab_size() == tokenizer.vocab_size
    assert library.token_to_id(tokenizer.end_of_document_text) == tokenizer.end_of_document_id
    again = type(library).from_str(library.to_str())
    assert again.encode(text).ids == ids
    end = library.encode("a" + tokenizer.end_of_document_text).ids[-1]
    assert end == tokenizer.end_of_document_id, "there a text may spell the end of a document"


def test_a_character_that_nobody_knows_is_an_error_elsewhere_too():
    with pytest.raises(Exception, match="vocabulary"):
        learn("char").to_library().encode("\u2603")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_encoded_as_its_texts_are(name):
    tokenizer = learn(name)
    texts = [STORY, ODD, "", STORY[:7]]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("name", LEARNED)
def test_learning_repeats_itself_and_keeps_to_the_size(name):
    first, second = learn(name, vocab_size=300), learn(name, vocab_size=300)
    assert json.dumps(first.to_meta()) == json.dumps(second.to_meta())
    assert 257 < first.vocab_size <= 300
    assert set(first.pieces[:-1]) >= {bytes([byte]) for byte in range(256)}
    assert len(first.encode(STORY)) < len(STORY) * 0.7


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("size", [None, 100, 257])
def test_a_vocabulary_smaller_than_the_bytes_is_refused(name, size):
    with pytest.raises(UserError, match="more than 257"):
        learn(name, vocab_size=size)


@pytest.mark.parametrize("name", LEARNED)
def test_learning_from_nothing_still_knows_the_bytes(name):
    tokenizer = learn(name, documents=[])
    assert tokenizer.vocab_size == 257 and tokenizer.decode(tokenizer.encode(ODD)) == ODD


def test_learning_reads_documents_one_at_a_time(monkeypatch):
    """It stops reading once it has seen enough, so a corpus of any size can be learned from."""
    monkeypatch.setattr("training_tokenizers.LEARN_FROM_BYTES", 10 * len(STORY))
    read = []

    def endless():
        while True:
            read.append(STORY)
            yield STORY

    TOKENIZER_REGISTRY["unigram"].learn(endless(), vocab_size=300)
    assert len(read) == 10


def test_unigram_prefers_words_to_letters():
    words = split_into_words()
    counts = {}
    for word, _ in words.pre_tokenize_str(STORY * 10):
        counts[word] = counts.get(word, 0) + 1
    pieces = learn_unigram(counts, 280)
    assert len(pieces) == 280 and {piece for piece, _ in pieces} >= set(byte_characters())
    assert "Ġfish" in {piece for piece, _ in pieces}
    assert all(score < 0 for _, score in pieces)


def test_wordpiece_takes_the_longest_piece_first():
    tokenizer = learn("wordpiece")
    first = tokenizer.pieces[tokenizer.encode(" fishes")[0]]
    longest = max((piece for piece in tokenizer.pieces[:-1] if b" fishes".startswith(piece)), key=len)
    assert first == longest


def test_characters_are_sorted_and_an_unknown_one_is_named():
    tokenizer = TOKENIZER_REGISTRY["char"].learn(["hello", b"world"], ends_documents=False)
    assert tokenizer.characters == "dehlorw" and tokenizer.end_of_document_id is None
    assert tokenizer.encode("lord").tolist() == [3, 4, 5, 0]
    for unknown in ("z", "é", "🎉", "a"):
        with pytest.raises(UserError, match=f"U\\+{ord(unknown):04X}"):
            tokenizer.encode("hell" + unknown)


def test_bytes_that_are_no_text_are_kept_by_byte_and_replaced_by_the_rest():
    raw = bytes(range(256))
    assert bytes(TOKENIZER_REGISTRY["byte"].learn().encode(raw).tolist()) == raw
    tokenizer = learn("bpe")
    assert tokenizer.decode(tokenizer.encode(raw)) == raw.decode("utf-8", errors="replace")


def test_lone_surrogates_do_no_harm():
    assert as_text("a\ud800b") == "a\ufffdb" and as_text("\ud83c\udf89") == "🎉"
    for name in ("byte", *LEARNED):
        tokenizer = learn(name)
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_gpt2_files_that_cannot_be_had_cost_one_sentence(monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer_from_meta({"name": "gpt2"})


@pytest.mark.skipif(not has_gpt2, reason="TIKTOKEN_CACHE_DIR does not hold GPT-2's files")
def test_gpt2_numbers_are_the_published_ones():
    tokenizer = TOKENIZER_REGISTRY["gpt2"].learn()
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_document_id == 50256
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.token_bytes()[50256] == 0


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"name": "char"}'])
def test_a_damaged_file_costs_one_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="does not describe a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_and_an_unknown_name_cost_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="did you mean 'unigram'"):
        tokenizer_from_meta({"name": "unigrams"})
