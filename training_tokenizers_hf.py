"""The tokenizer of a Hugging Face model, `tokenizer=hf:FOLDER`, read so that no byte of a text is lost."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from training_tokenizers_base import BYTE_OF_CHARACTER, END_OF_DOCUMENT, TOKENIZER_REGISTRY, Tokenizer
from user_errors import UserError

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
