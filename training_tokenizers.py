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

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from registry import Registry
from user_errors import UserError

TOKENIZER_REGISTRY = Registry("tokenizer")

TOKENIZER_FILE = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
NUL = "\0"  # ends a document where tokens are bytes or characters: text never holds it

# What `learn` reads of the training split: more text barely moves a vocabulary, and the counts must fit in memory.
LEARN_FROM_BYTES = 2**26


def as_text(document):
    """str of a document; bytes that are not UTF-8 and lone surrogates become replacement characters."""
    if isinstance(document, bytes):
        return document.decode("utf-8", errors="replace")
    try:
        document.encode("utf-8")
        return document
    except UnicodeEncodeError:
        return document.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


class Tokenizer:
    """What the tokenizers share. A subclass fills `pieces` and writes `encode_text`.

    Attributes:
        pieces: list of bytes, what each token decodes to.
        end_of_document_id: the token that ends a document, or None. It stands for no byte of the text.
        learns_from: None, or the documents that `learn` wants: 'train', or 'all' splits.
    """

    name = None  # the registered name
    learns_from = None
    takes_vocab_size = False  # whether the user chooses the size
    takes_bytes = False  # whether bytes that are not UTF-8 keep their values
    is_from_folder = False  # whether it is read from the folder in `tokenizer=NAME:FOLDER`, by `from_folder`
    pieces = ()
    end_of_document_id = None

    @classmethod
    def learn(cls, documents=(), vocab_size=None, ends_documents=True):
        """A tokenizer from an iterable of documents (str or bytes), read once and never held whole."""
        return cls()

    @classmethod
    def from_meta(cls, meta):
        return cls()

    def to_meta(self):
        """A JSON-able dict with everything `tokenizer_from_meta` needs."""
        return {"name": self.name, "vocab_size": self.vocab_size}

    @property
    def vocab_size(self):
        return len(self.pieces)

    def encode_text(self, text):
        raise NotImplementedError

    def encode(self, text):
        """Token ids of a str (or bytes) as int64. Nothing in the text is ever taken for a special token."""
        return self.encode_text(as_text(text))

    def encode_batch(self, texts):
        """[ids, ...] of clean texts (see `as_text`); where a library has a faster way for many, that."""
        return [self.encode_text(text) for text in texts]

    def decode(self, ids):
        """The text of token ids (list, array or tensor); an incomplete UTF-8 sequence shows as U+FFFD.

        Ids beyond the vocabulary, which a model with a padded one may write, stand for nothing.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join([self.pieces[i] for i in ids if i < len(self.pieces)]).decode("utf-8", errors="replace")

    def token_bytes(self):
        """How many bytes of text each token stands for: the denominator of bits per byte."""
        sizes = [len(piece) for piece in self.pieces]
        if self.end_of_document_id is not None:
            sizes[self.end_of_document_id] = 0
        return sizes

    @property
    def end_of_document_text(self):
        """How the token that ends a document is spelt, or None where there is none."""
        return None if self.end_of_document_id is None else self.pieces[self.end_of_document_id].decode("utf-8")

    def to_library(self):
        """A tokenizer of the `tokenizers` library with the same ids, for other programs; None where there is none.

        It takes the end of a document for a special token, also where a text spells it, as is the custom there.
        """

    def save(self, folder):
        path = Path(folder) / TOKENIZER_FILE
        path.write_text(json.dumps(self.to_meta(), ensure_ascii=False), encoding="utf-8", newline="\n")
        return path


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


def byte_level_library_tokenizer(ids, merges, special):
    """A BPE tokenizer of the library over GPT-2's stand-ins for bytes, cut into words by GPT-2's pattern."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special])
    return tokenizer


def load_gpt2_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy's error page, a file whose checksum is wrong, an unwritable cache
        raise UserError(
            f"the GPT-2 tokenizer's files are not here and could not be fetched ({type(error).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder that holds them, or use another tokenizer, such as --tokenizer=bpe"
        ) from error


# -- tokens learned here, over GPT-2's printable stand-ins for the 256 bytes: no text is ever unknown


def byte_characters():
    """GPT-2's table: one printable character for each byte, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_characters())}


class LearnedTokenizer(Tokenizer):
    """A model of the `tokenizers` library plus one token, the last, that ends a document.

    The library does not know the last token, so that no text can spell it.
    """

    learns_from = "train"
    takes_vocab_size = True

    def __init__(self, library_tokenizer):
        self.library_tokenizer = library_tokenizer
        id_of_piece = library_tokenizer.get_vocab()
        pieces = [b""] * len(id_of_piece)
        for piece, i in id_of_piece.items():
            pieces[i] = bytes([BYTE_OF_CHARACTER[character] for character in piece])
        self.pieces = [*pieces, END_OF_DOCUMENT.encode("utf-8")]
        self.end_of_document_id = len(pieces)

    @classmethod
    def learn(cls, documents=(), vocab_size=None, ends_documents=True):
        if vocab_size is None or vocab_size <= 257:
            raise UserError(
                f"tokenizer_vocab_size={vocab_size} is too small for tokenizer={cls.name}: the 256 bytes and the end "
                "of a document come first, so ask for more than 257"
            )
        return cls(cls.learn_model(first_bytes(documents, LEARN_FROM_BYTES), vocab_size - 1))

    @classmethod
    def learn_model(cls, texts, n_pieces):
        """A library tokenizer with at most n_pieces pieces, the 256 bytes among them."""
        raise NotImplementedError

    @classmethod
    def from_meta(cls, meta):
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(json.dumps(meta["model"])))

    def to_meta(self):
        return {**super().to_meta(), "model": json.loads(self.library_tokenizer.to_str())}

    def to_library(self):
        import tokenizers
        from tokenizers import decoders

        tokenizer = tokenizers.Tokenizer.from_str(self.library_tokenizer.to_str())
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
        return tokenizer

    def encode_text(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        pieces = [list(short_pieces(text)) for text in texts]
        encodings = iter(self.library_tokenizer.encode_batch_fast([piece for row in pieces for piece in row]))
        rows = [[i for _ in row for i in next(encodings).ids] for row in pieces]
        return [np.array(row, dtype=np.int64) for row in rows]


def last_cut(text):
    """Where a text may be cut without changing its tokens, as late as possible; 0 where there is no such place.

    Tokenizers cut between a word and the white space after it whatever comes next, so a cut there changes nothing.
    """
    for space in ("\n", " "):
        if cut := len(text[: max(text.rfind(space), 0)].rstrip()):
            return cut
    return 0


def short_pieces(text, n_characters=2**13):
    """A text in pieces that encode to its tokens: the library encodes the texts of a batch on all cores, and needs
    less memory and time for many short ones."""
    start = 0
    while len(text) - start > n_characters:
        cut = last_cut(text[start : start + n_characters])
        if cut == 0:  # a word longer than a piece: it must stay whole
            break
        yield text[start : start + cut]
        start += cut
    yield text[start:]


def first_bytes(documents, n_bytes):
    """Pieces of the first documents, about n_bytes together."""
    for document in documents:
        text = as_text(document)
        yield from short_pieces(text)
        n_bytes -= len(text)
        if n_bytes <= 0:
            return


def split_into_words():
    """GPT-2's pattern of words, in byte characters. A word of 64 bytes ends there: wordpiece looks for the longest
    match, which over one 'word' of a million equal signs would never end."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(64)])


@TOKENIZER_REGISTRY("bpe")
class BPETokenizer(LearnedTokenizer):
    """Byte-level BPE: the pair seen most often becomes a token, again and again."""

    name = "bpe"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        import tokenizers
        from tokenizers import models, trainers

        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split_into_words()
        trainer = trainers.BpeTrainer(
            vocab_size=n_pieces, min_frequency=2, initial_alphabet=byte_characters(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


@TOKENIZER_REGISTRY("wordpiece")
class WordPieceTokenizer(LearnedTokenizer):
    """The pieces that BPE finds, applied as BERT does: the longest that fits, from the left. Pieces inside a word carry
    no '##', because the space is part of the piece that starts one."""

    name = "wordpiece"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        import tokenizers
        from tokenizers import models

        id_of_piece = BPETokenizer.learn_model(texts, n_pieces).get_vocab()
        model = models.WordPiece(id_of_piece, unk_token="!", continuing_subword_prefix="", max_input_chars_per_word=64)
        tokenizer = tokenizers.Tokenizer(model)  # unk_token must be a piece; with all bytes known it is never used
        tokenizer.pre_tokenizer = split_into_words()
        return tokenizer


@TOKENIZER_REGISTRY("unigram")
class UnigramTokenizer(LearnedTokenizer):
    """Pieces with probabilities; a text becomes its most probable sequence (Kudo 2018, https://arxiv.org/abs/1804.10959)."""

    name = "unigram"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        words = split_into_words()
        counts = Counter()
        for text in texts:
            counts.update(word for word, _ in words.pre_tokenize_str(text))
        tokenizer = unigram_library_tokenizer(learn_unigram(counts, n_pieces))
        tokenizer.pre_tokenizer = words
        return tokenizer


# -- a model's own

LIBRARY_FILE = "tokenizer.json"
SPACE = "▁"  # how SentencePiece writes one
# Normalizers that leave a text as it is, and those that are left out: what they add or change is not in the text.
HARMLESS, LEFT_OUT = {"Replace", "Sequence"}, {"Prepend", "NFC"}


@TOKENIZER_REGISTRY("hf")
class FolderTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face model, from the tokenizer.json in its folder.

    Tokens are the library's, with three differences that keep every byte of a text: no space is put before it, it is
    not brought into Unicode's composed form (NFC), and no special token is read in it or added around it. What a
    tokenizer of another kind would lose (BERT's capital letters, unknown characters) is noticed and refused.
    """

    name = "hf"
    is_from_folder = True

    def __init__(self, library, end_of_document=None):
        """library: the dict in tokenizer.json. end_of_document: the spelling of the token that ends one, or None."""
        import tokenizers

        self.library = library
        self.encoder = tokenizers.Tokenizer.from_str(json.dumps(without_additions(library)))
        self.encoder.encode_special_tokens = True  # a text that spells one has not got one
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.special_ids = {token["id"] for token in library.get("added_tokens", []) if token["special"]}
        self.pieces = pieces_of_library(self.encoder, library)
        self.end_of_document_id = None if end_of_document is None else self.encoder.token_to_id(end_of_document)
        self.sizes = np.array(self.token_bytes(), dtype=np.int64)

    @classmethod
    def from_folder(cls, folder):
        """The tokenizer of a folder.

        Raises:
            UserError: no tokenizer.json that the library reads, or one that changes text.
        """
        path, library = Path(folder) / LIBRARY_FILE, read_library_file(folder)
        check_keeps_text(library, path)
        try:
            return cls(library, end_of_document_in(Path(folder), library))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} cannot be read by the tokenizers library ({first_words(error)})") from None

    @classmethod
    def from_meta(cls, meta):
        return cls(meta["model"], meta["end_of_document"])

    @staticmethod
    def identity_of(library):
        """'hf-' and the start of the sha256 of what is in tokenizer.json."""
        return f"hf-{hashlib.sha256(json.dumps(library, sort_keys=True).encode()).hexdigest()[:8]}"

    def to_meta(self):
        return {**super().to_meta(), "identity": self.identity_of(self.library), "model": self.library,
                "end_of_document": self.end_of_document_text}  # fmt: skip

    def to_library(self):
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(self.library))

    def token_bytes(self):
        """Special tokens stand for no text: none is ever read in one."""
        return [0 if i in self.special_ids else size for i, size in enumerate(super().token_bytes())]

    def encode_text(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        encodings = self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        for text, ids in zip(texts, rows, strict=True):
            expected, found = len(text.encode("utf-8")), int(self.sizes[ids].sum())
            if expected != found:
                raise UserError(
                    f"this tokenizer=hf:FOLDER does not keep a text whole: {expected} bytes became {found} in "
                    f"{text[:40]!r}; bits per byte would be wrong, so take another tokenizer"
                )
        return rows


def read_library_file(folder):
    """The dict in a folder's tokenizer.json."""
    path = Path(folder).expanduser() / LIBRARY_FILE
    try:
        library = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer=hf:{folder} needs {path}, which cannot be read ({first_words(error)})") from None
    if not isinstance(library, dict) or not isinstance(library.get("model"), dict):
        raise UserError(f"{path} is no tokenizer of the tokenizers library: it has no model")
    return library


def first_words(error):
    return " ".join(str(error).split())[:160]


def normalizers_in(step):
    """Every normalizer in a tokenizer.json's `normalizer`, those inside a Sequence too."""
    if not step:
        return []
    return [step, *(each for inner in step.get("normalizers", []) for each in normalizers_in(inner))]


def check_keeps_text(library, path):
    """Refuse a tokenizer that would change or lose text."""
    kinds = {step["type"] for step in normalizers_in(library.get("normalizer"))} - HARMLESS - LEFT_OUT
    if kinds:
        raise UserError(f"{path} changes text before it reads it ({', '.join(sorted(kinds))}), so bits per byte would "
                        "be of another text; take a model whose tokenizer keeps it")  # fmt: skip
    eager = [token["content"] for token in library.get("added_tokens", [])
             if not token["special"] and (token.get("lstrip") or token.get("rstrip"))]  # fmt: skip
    if eager:
        raise UserError(f"{path} has the token {eager[0]!r}, which swallows white space beside it; take another")


def without_additions(library):
    """tokenizer.json as it is read here: see FolderTokenizer."""
    library = {**library, "normalizer": kept_normalizer(library.get("normalizer")), "post_processor": None}
    steps = library.get("pre_tokenizer")
    if steps:
        library["pre_tokenizer"] = without_prefix(steps)
    return library


def kept_normalizer(step):
    if not step or step["type"] in LEFT_OUT:
        return None
    if step["type"] != "Sequence":
        return step
    kept = [each for each in map(kept_normalizer, step["normalizers"]) if each]
    return {**step, "normalizers": kept} if kept else None


def without_prefix(step):
    """A pre-tokenizer that puts no space before a text."""
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [without_prefix(each) for each in step["pretokenizers"]]}
    never = {"ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "never"}}
    return {**step, **never.get(step["type"], {})}


def pieces_of_library(encoder, library):
    """[bytes] of every id: of a byte-level vocabulary, of SentencePiece's with <0x0A> for a byte, or of plain text."""
    added = {token["id"] for token in library.get("added_tokens", [])}
    text = json.dumps([library.get(name) for name in ("pre_tokenizer", "normalizer", "decoder")], ensure_ascii=False)
    is_byte_level, has_spaces = '"ByteLevel"' in text, SPACE in text or '"Metaspace"' in text
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, i in vocabulary.items():
        if i in added:
            pieces[i] = piece.encode("utf-8")
        elif is_byte_level and all(character in BYTE_OF_CHARACTER for character in piece):
            pieces[i] = bytes([BYTE_OF_CHARACTER[character] for character in piece])
        elif library["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = (piece.replace(SPACE, " ") if has_spaces else piece).encode("utf-8")
    return pieces


def end_of_document_in(folder, library):
    """The spelling of the token that ends a document: what the folder's configuration says, or a usual one, or None."""
    spelt = {token["id"]: token["content"] for token in library.get("added_tokens", [])}
    for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("content") if isinstance(value, dict) else spelt.get(value, value)
        if value in spelt.values():
            return value
    return next((usual for usual in (END_OF_DOCUMENT, "</s>") if usual in spelt.values()), None)


# -- learning a unigram model. The library's own trainer gives another vocabulary each time it runs (the order of a hash
#    map decides between equals), and a dataset that cannot be made twice cannot be compared. This one is repeatable.

MAX_PIECE_LENGTH = 16
MAX_WORDS = 500_000  # the most frequent ones; the tail of a large corpus is misspellings
SEED_PIECES = 10  # times the size asked for
KEPT_PER_ROUND = 0.75  # as SentencePiece


def learn_unigram(word_counts, n_pieces):
    """[(piece, log probability)]: many frequent substrings, of which the least useful are dropped round by round."""
    ranked = sorted(word_counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
    words, counts = [word for word, _ in ranked], np.array([count for _, count in ranked], dtype=np.float64)
    scores = seed_pieces(ranked, SEED_PIECES * n_pieces)
    while True:
        for _ in range(2):
            usage = count_pieces(scores, words, counts)
            scores = log_probabilities(usage)
        if len(scores) <= n_pieces:
            return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        scores = drop_least_useful(scores, usage, max(n_pieces, int(len(scores) * KEPT_PER_ROUND)))


def seed_pieces(ranked_words, n_pieces):
    """The 256 bytes and the substrings that cover the most text, with log probabilities."""
    counts = Counter(dict.fromkeys(byte_characters(), 1))
    for word, count in ranked_words:
        for start in range(len(word)):
            for end in range(start + 1, min(start + MAX_PIECE_LENGTH, len(word)) + 1):
                counts[word[start:end]] += count
        if len(counts) > 20 * n_pieces + 2_000_000:  # a bound on memory: what was seen once so far goes
            counts = Counter({piece: n for piece, n in counts.items() if n > 1 or len(piece) == 1})
    longer = [(piece, n) for piece, n in counts.items() if len(piece) > 1 and n > 1]
    longer.sort(key=lambda item: (-item[1] * len(item[0]), item[0]))
    kept = {piece: n for piece, n in counts.items() if len(piece) == 1}
    kept.update(longer[: max(0, n_pieces - len(kept))])
    return log_probabilities(kept)


def log_probabilities(usage):
    """{piece: log probability} from {piece: count}; a piece that is never used keeps a little."""
    usage = {piece: max(count, 0.1) for piece, count in usage.items()}
    log_total = math.log(sum(usage.values()))
    return {piece: math.log(count) - log_total for piece, count in usage.items()}


def count_pieces(scores, words, counts):
    """{piece: uses} when every word is cut along its most probable path."""
    pieces = list(scores)
    tokenizer = unigram_library_tokenizer(list(scores.items()))
    uses = np.zeros(len(pieces))
    for start in range(0, len(words), 10_000):
        batch = tokenizer.encode_batch_fast(words[start : start + 10_000])
        ids = [encoding.ids for encoding in batch]
        weights = np.repeat(counts[start : start + 10_000], [len(row) for row in ids])
        uses += np.bincount(np.concatenate([np.array(row, np.int64) for row in ids]), weights, minlength=len(pieces))
    return dict(zip(pieces, uses.tolist(), strict=True))


def drop_least_useful(scores, usage, n_kept):
    """Keep the bytes, and the pieces whose absence would cost the corpus most likelihood."""

    def cost_of_absence(piece):
        return usage[piece] * (scores[piece] - best_path_without(piece, scores))

    kept = [piece for piece in scores if len(piece) == 1]
    longer = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: (-cost_of_absence(piece), piece))
    kept += longer[: n_kept - len(kept)]
    return {piece: scores[piece] for piece in kept}


def best_path_without(piece, scores):
    """The log probability of the best way to spell a piece by others."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            score = scores.get(piece[start:end])
            if score is not None and end - start < len(piece):
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def unigram_library_tokenizer(scored_pieces):
    import tokenizers
    from tokenizers import models

    return tokenizers.Tokenizer(models.Unigram(scored_pieces, unk_id=None, byte_fallback=False))
