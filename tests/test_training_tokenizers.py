"""Every tokenizer: text survives the round trip, bytes add up, learning repeats, JSON rebuilds it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from training_tokenizers import (
    TOKENIZER_REGISTRY,
    load_tokenizer,
    tokenizer_from_meta,
    tokenizer_identity,
    tokenizer_part,
)
from training_tokenizers_base import NUL, as_text, byte_characters
from training_tokenizers_hf import SPACE, FolderTokenizer
from training_tokenizers_learned import learn_unigram, split_into_words
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
    if name == "hf":  # the pieces of bpe in the folder of a model
        library = json.loads(TOKENIZER_REGISTRY["bpe"].learn(documents, vocab_size=vocab_size).to_library().to_str())
        return FolderTokenizer(library, "<|endoftext|>")
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
    monkeypatch.setattr("training_tokenizers_learned.LEARN_FROM_BYTES", 10 * len(STORY))
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


# ---- a model's own ---------------------------------------------------------------------------------------------------

QWEN_WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special(i, content):
    return {"id": i, "content": content, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}  # fmt: skip


def byte_level_library():
    """As Qwen's: NFC, its own words, GPT-2's stand-ins for bytes."""
    library = json.loads(learn("bpe").to_library().to_str())
    library["normalizer"] = {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    library["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    return library


def sentencepiece_library(metaspace=False):
    """As Llama 2's: spaces as pieces, a byte for what is not in the vocabulary, and a space before a text."""
    words = [SPACE, *"abcdefghijklmnopqrstuvwxyzOT,.", SPACE + "t", SPACE + "th", SPACE + "the", "sh", "ish", "fish"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [[SPACE, "t"], [SPACE + "t", "h"], [SPACE + "th", "e"], ["s", "h"], ["i", "sh"], ["f", "ish"]]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(vocabulary)}, "merges": merges,
             "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    pre = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    around = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
    return {"version": "1.0", "truncation": {"max_length": 5, "strategy": "LongestFirst", "direction": "Right",
            "stride": 0}, "padding": None, "added_tokens": [special(i, vocabulary[i]) for i in range(3)],
            "normalizer": None if metaspace else start, "pre_tokenizer": pre if metaspace else None,
            "post_processor": around, "decoder": None, "model": model}  # fmt: skip


LIBRARIES = {
    "byte level": (byte_level_library, "<|endoftext|>"),
    "sentencepiece": (sentencepiece_library, "</s>"),
    "metaspace": (lambda: sentencepiece_library(metaspace=True), "</s>"),
}
every_library = pytest.mark.parametrize("kind", LIBRARIES)


def model_folder(folder, library, end=None):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(library), encoding="utf-8")
    if end is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}), encoding="utf-8")
    return folder


@every_library
@pytest.mark.parametrize("text", [STORY, ODD, "e\u0301 decomposed", "", " ", "<s>x</s>", "\n\n."], ids=ascii)
def test_a_models_own_tokens_keep_every_byte(tmp_path, kind, text):
    make, end = LIBRARIES[kind]
    tokenizer = FolderTokenizer.from_folder(model_folder(tmp_path / "model", make(), end))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert np.array(tokenizer.token_bytes())[ids].sum() == len(text.encode("utf-8"))
    assert not set(ids.tolist()) & tokenizer.special_ids and tokenizer.end_of_document_text == end
    again = load_tokenizer(tokenizer.save(tmp_path))
    assert again.encode(text).tolist() == ids.tolist() and again.end_of_document_id == tokenizer.end_of_document_id


@every_library
def test_they_are_the_librarys_but_for_the_space_before_a_text(kind):
    import tokenizers

    library, text = LIBRARIES[kind][0](), " the fish" + ODD.replace("<|endoftext|>", "")
    library["truncation"] = None
    theirs = tokenizers.Tokenizer.from_str(json.dumps(library))
    ours = FolderTokenizer(library).encode(text).tolist()
    puts_a_space = kind != "byte level"
    assert ours == theirs.encode(text[1:] if puts_a_space else text, add_special_tokens=False).ids
    if puts_a_space:
        assert ours[:2] == [library["model"]["vocab"][SPACE + "the"], library["model"]["vocab"][SPACE]]


def test_its_export_is_what_it_came_from(tmp_path):
    library = sentencepiece_library()
    tokenizer = FolderTokenizer(library, "</s>")
    assert json.loads(tokenizer.to_library().to_str())["normalizer"] == library["normalizer"]


@pytest.mark.parametrize("files, expected", [
    ({"tokenizer_config.json": {"eos_token": "<s>"}}, "<s>"),
    ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": [1, 2]}}, "<s>"),
    ({"tokenizer_config.json": {"eos_token": "<gone>"}}, "</s>"),
    ({"config.json": {"eos_token_id": 0}}, "<unk>"),
    ({}, "</s>"),
], ids=str)  # fmt: skip
def test_what_ends_a_document_is_read_from_the_folder(tmp_path, files, expected):
    folder = model_folder(tmp_path / "model", sentencepiece_library())
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = FolderTokenizer.from_folder(folder)
    assert tokenizer.end_of_document_text == expected and tokenizer.token_bytes()[tokenizer.end_of_document_id] == 0


def wordpiece(**more):
    model = {"type": "WordPiece", "vocab": {"[UNK]": 0, "the": 1, "fish": 2}, "unk_token": "[UNK]",
             "continuing_subword_prefix": "##", "max_input_chars_per_word": 99}  # fmt: skip
    return {"version": "1.0", "added_tokens": [special(0, "[UNK]")], "normalizer": None, "decoder": None,
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None, "model": model, **more}  # fmt: skip


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    lowering = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(UserError, match=r"changes text before it reads it \(Lowercase\)"):
        FolderTokenizer.from_folder(model_folder(tmp_path / "a", wordpiece(normalizer=lowering)))
    tokenizer = FolderTokenizer.from_folder(model_folder(tmp_path / "b", wordpiece()))
    assert tokenizer.encode("fish").tolist() == [2]
    with pytest.raises(UserError, match="8 bytes became 7 in 'the fish'"):
        tokenizer.encode("the fish")
    eager = {**special(3, "<br>"), "special": False, "rstrip": True}
    with pytest.raises(UserError, match="'<br>', which swallows white space"):
        FolderTokenizer.from_folder(model_folder(tmp_path / "c", wordpiece(added_tokens=[eager])))


@pytest.mark.parametrize("content", [None, "x", "[]", "{}", '{"model": {"type": "Nothing"}, "added_tokens": []}'])
def test_a_folder_that_holds_no_tokenizer_costs_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        FolderTokenizer.from_folder(tmp_path)


def test_how_it_is_named():
    assert tokenizer_part("hf:some/model") == (FolderTokenizer, "some/model")
    assert tokenizer_part("bpe") == (TOKENIZER_REGISTRY["bpe"], None) and tokenizer_identity("bpe") == "bpe"
    for wrong, right in (("hf", "hf:FOLDER"), ("hf:", "hf:FOLDER"), ("bpe:x", "tokenizer=bpe")):
        with pytest.raises(UserError, match=f"tokenizer={wrong} must be given as .*{right}"):
            tokenizer_part(wrong)
