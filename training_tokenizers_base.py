"""What the tokenizers share: the class, its registry, GPT-2's stand-ins for bytes, where a text may be cut."""

import json
from pathlib import Path

from registry import Registry

TOKENIZER_REGISTRY = Registry("tokenizer")

TOKENIZER_FILE = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
NUL = "\0"  # ends a document where tokens are bytes or characters: text never holds it


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


# -- bytes as characters, as GPT-2 writes them


def byte_characters():
    """GPT-2's table: one printable character for each byte, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_characters())}


def byte_level_library_tokenizer(ids, merges, special):
    """A BPE tokenizer of the library over GPT-2's stand-ins for bytes, cut into words by GPT-2's pattern."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special])
    return tokenizer


def last_cut(text):
    """Where a text may be cut without changing its tokens, as late as possible; 0 where there is no such place.

    Tokenizers cut between a word and the white space after it whatever comes next, so a cut there changes nothing.
    """
    for space in ("\n", " "):
        if cut := len(text[: max(text.rfind(space), 0)].rstrip()):
            return cut
    return 0
