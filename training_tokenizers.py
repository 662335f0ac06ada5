"""Tokenizers: text to numbers and back, without a byte lost.

    tokenizer = TOKENIZER_REGISTRY["bpe"].learn(documents, vocab_size=4096)
    ids = tokenizer.encode("One day, a fish")       # numpy int64
    tokenizer.decode(ids)                           # 'One day, a fish'
    tokenizer.save("runs/mine"); load_tokenizer("runs/mine")

    byte        the 256 bytes                             nothing to learn
    char        the characters of the corpus, sorted      as nanoGPT's shakespeare_char
    gpt2        GPT-2's own 50,257 tokens                 tiktoken
    bpe         merges learned here                       the tokenizers library
    wordpiece   the same pieces, longest match first      the tokenizers library
    unigram     pieces with probabilities, best path      the tokenizers library, learned by `learn_unigram`
    hf:FOLDER   a Hugging Face model's own                the tokenizers library

Every token stands for a known number of bytes, so that losses of different tokenizers compare as bits per byte. What is
saved is JSON. The heavy libraries are imported where they are used, because every run imports this file.
"""

import json
import math
from pathlib import Path

import numpy as np

import training_tokenizers_learned  # noqa: F401  (registers itself)
from training_tokenizers_base import (
    END_OF_DOCUMENT,
    NUL,
    TOKENIZER_FILE,
    TOKENIZER_REGISTRY,
    Tokenizer,
    as_text,
    byte_characters,
    byte_level_library_tokenizer,
)
from training_tokenizers_hf import read_library_file
from user_errors import UserError


def tokenizer_part(name):
    """(class, folder or None) of a setting: 'bpe', or 'hf:FOLDER'.

    Raises:
        UserError: no such tokenizer, a folder for one that takes none, or none for one that does.
    """
    kind, colon, folder = name.partition(":")
    part = TOKENIZER_REGISTRY[kind]  # a miss names the nearest
    if part.is_from_folder != bool(folder):
        how = f"tokenizer={kind}:FOLDER" if part.is_from_folder else f"tokenizer={kind}"
        raise UserError(f"tokenizer={name} must be given as {how}")
    return part, folder if colon else None


def tokenizer_identity(name):
    """What tells a setting's tokenizer apart: its name, or of one from a folder the start of its file's sha256."""
    part, folder = tokenizer_part(name)
    return name if folder is None else part.identity_of(read_library_file(folder))


def tokenizer_label(name):
    """A setting's tokenizer in the name of a dataset's folder: 'bpe', or 'hf-' and the name of the model's folder."""
    _, folder = tokenizer_part(name)
    return name if folder is None else f"hf-{Path(folder).expanduser().resolve().name}"


def tokenizer_from_meta(meta):
    """The tokenizer that `to_meta` described."""
    if meta["name"] is None:
        raise UserError("the dataset's tokenizer is unknown, so it can be trained on but not read as text")
    return TOKENIZER_REGISTRY[meta["name"]].from_meta(meta)


def load_tokenizer(source):
    """A tokenizer from a folder or file written by `save`, from a dataset's folder, or from a `to_meta` dict."""
    if isinstance(source, dict):
        return tokenizer_from_meta(source)
    path = Path(source)
    candidates = [path] if path.is_file() else [path / TOKENIZER_FILE, path / "meta.json"]
    for candidate in candidates:
        if candidate.is_file():
            break
    else:
        raise UserError(f"{path} has no {TOKENIZER_FILE}; give the folder of a run or of a prepared dataset")
    try:
        meta = json.loads(candidate.read_text(encoding="utf-8"))
        meta = meta.get("tokenizer", meta)
        return tokenizer_from_meta(meta)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{candidate} does not describe a tokenizer ({error!r}); prepare the dataset again") from error


# -- tokens that need no library


@TOKENIZER_REGISTRY("byte")
class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 text, or of anything: `encode(b'...')` keeps bytes as they are."""

    name = "byte"
    takes_bytes = True
    pieces = tuple(bytes([i]) for i in range(256))
    end_of_document_id = 0

    def encode(self, text):
        return self.encode_text(text)

    def encode_text(self, text):
        raw = text if isinstance(text, bytes) else as_text(text).encode("utf-8")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def to_library(self):
        # Byte 0 is in the vocabulary as itself: it is the special token, so it never comes as its stand-in.
        return byte_level_library_tokenizer({NUL: 0, **{byte_characters()[i]: i for i in range(1, 256)}}, [], NUL)


@TOKENIZER_REGISTRY("char")
class CharTokenizer(Tokenizer):
    """The characters of one corpus in sorted order. A character outside it cannot be encoded."""

    name = "char"
    learns_from = "all"  # as nanoGPT: a character that only validation has must have a number too

    def __init__(self, characters):
        self.characters = characters
        self.pieces = [character.encode("utf-8") for character in characters]
        self.end_of_document_id = characters.index(NUL) if NUL in characters else None
        points = [ord(character) for character in characters]
        self.id_of_code_point = np.full(max(points, default=0) + 2, -1, dtype=np.int64)  # the last one is never known
        self.id_of_code_point[points] = np.arange(len(points))

    @classmethod
    def learn(cls, documents=(), vocab_size=None, ends_documents=True):
        characters = {NUL} if ends_documents else set()
        for document in documents:
            characters.update(as_text(document))
        return cls("".join(sorted(characters)))

    @classmethod
    def from_meta(cls, meta):
        return cls(meta["characters"])

    def to_meta(self):
        return {**super().to_meta(), "characters": self.characters}

    def encode_text(self, text):
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self.id_of_code_point[np.minimum(points, len(self.id_of_code_point) - 1)]
        if ids.size and ids.min() < 0:
            unknown = chr(points[int(ids.argmin())])
            raise UserError(
                f"the character {unknown!r} (U+{ord(unknown):04X}) is not among the {self.vocab_size} that this char "
                "tokenizer knows; leave it out, or train with tokenizer=byte"
            )
        return ids

    def to_library(self):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        ids = {character: i for i, character in enumerate(self.characters)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=""))  # an unknown character is an error
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        if self.end_of_document_id is not None:
            tokenizer.add_special_tokens([NUL])
        return tokenizer


# -- GPT-2's tokens


@TOKENIZER_REGISTRY("gpt2")
class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through tiktoken, which fetches its two files once and keeps them."""

    name = "gpt2"

    def __init__(self):
        self.encoding = load_gpt2_encoding()
        self.end_of_document_id = self.encoding.eot_token
        self.pieces = [self.encoding.decode_single_token_bytes(i) for i in range(self.encoding.n_vocab)]

    def encode_text(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def to_library(self):
        """The merges follow from the ranks: what a token's bytes were just before the last merge, which made it."""
        stand_in = byte_characters()
        rank = {piece: i for i, piece in enumerate(self.pieces[:-1])}
        name = {piece: "".join(stand_in[byte] for byte in piece) for piece in rank}
        merges = []
        for piece in self.pieces[:-1]:
            if len(piece) > 1:
                left, right = last_merge(piece, rank)
                merges.append((name[left], name[right]))
        ids = {**{name[piece]: i for piece, i in rank.items()}, END_OF_DOCUMENT: self.end_of_document_id}
        return byte_level_library_tokenizer(ids, merges, END_OF_DOCUMENT)


def last_merge(piece, rank):
    """The two parts that byte-pair encoding joins last to make a piece: each step joins the pair of lowest rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        ranks = [rank.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
        i = ranks.index(min(ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_gpt2_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy's error page, a file whose checksum is wrong, an unwritable cache
        raise UserError(
            f"the GPT-2 tokenizer's files are not here and could not be fetched ({type(error).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder that holds them, or use another tokenizer, such as --tokenizer=bpe"
        ) from error
