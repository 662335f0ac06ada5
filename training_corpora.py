"""Where text comes from: each dataset is a class that yields its documents, one at a time.

    corpus = CORPUS_REGISTRY["tinystories"](variant="small", input=None, folder="data/tinystories")
    for split, text, ends_document in corpus.documents(): ...        # 'train' or 'val', str or bytes, bool

A corpus may be larger than memory: `documents` reads as it goes, and a long text comes in pieces of which only the last
ends its document. The split is decided here and depends on nothing but the text: two machines get the same one.

    python_stdlib     the standard library of the Python that runs this      byte    no download
    shakespeare_char  Tiny Shakespeare by characters                         char    1.1 MB, checksummed
    shakespeare       the same text                                          gpt2    1.1 MB, checksummed
    tinystories       simple stories written by a language model             bpe     `datasets`, streamed
    openwebtext       the pages that Reddit linked to, as GPT-2 read them    gpt2    `datasets`, streamed
    fineweb_edu       web pages of educational value                         gpt2    `datasets`, streamed
    text              your own .txt, .jsonl or .parquet                      byte    --input=FILE or folder

`input` gives a local copy in place of any download.
"""

import hashlib
import logging
import os
import sysconfig
import urllib.request
from itertools import islice
from pathlib import Path
from typing import ClassVar

from registry import Registry
from training_text_files import file_contains, kind_of_file, read_texts, text_files
from user_errors import UserError, did_you_mean

CORPUS_REGISTRY = Registry("dataset")

END_OF_STORY = "<|endoftext|>"


class Corpus:
    """One dataset: what it is, and its documents.

    Args:
        input: a local file or folder to read instead of the source, or None.
        variant: one of `variants`, or None for the first of them.
        folder: where a download is kept.
    """

    name = None  # the registered name
    tokenizer = "byte"  # unless the user chooses another
    tokenizer_vocab_size = None  # for a tokenizer that is learned
    variants = ()  # the first is the default
    ends_documents = True  # a token marks the end of each document; one long text has no end to mark

    def __init__(self, input=None, variant=None, folder="."):
        self.input = None if input is None else Path(input).expanduser()
        self.variant = self.check_variant(variant)
        self.folder = Path(folder)
        if self.input is not None and not self.input.exists():
            raise UserError(f"input={str(input)!r} does not exist; give the path of a local copy of {self.name}")

    @classmethod
    def check_variant(cls, variant):
        """The variant itself, or the default for None; an unknown one is refused."""
        if variant is None:
            return cls.variants[0] if cls.variants else None
        if not cls.variants:
            raise UserError(f"dataset {cls.name} has no variants; leave out variant={variant!r}")
        if variant not in cls.variants:
            hint = did_you_mean(variant, cls.variants)
            raise UserError(
                f"variant={variant!r} of {cls.name} does not exist{hint} (known: {', '.join(cls.variants)})"
            )
        return variant

    def documents(self):
        """Yield (split, text, ends_document) in a fixed order; can be called again."""
        raise NotImplementedError

    def source(self):
        """Where the text came from, in words, for meta.json."""
        raise NotImplementedError

    def expected_bytes(self):
        """About how many bytes of text are to come, for the progress bar, or None."""
        return None


# -- the Python standard library

STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@CORPUS_REGISTRY("python_stdlib")
class PythonStandardLibrary(Corpus):
    """The .py files of the standard library without its tests. `input` reads another folder of Python files."""

    name = "python_stdlib"

    def __init__(self, input=None, variant=None, folder="."):
        super().__init__(input, variant, folder)
        self.root = self.input or Path(sysconfig.get_paths()["stdlib"])
        if not self.files():
            raise UserError(f"there are no .py files under {self.root}; give a folder of them with --input=FOLDER")

    def files(self):
        """Paths relative to the root, sorted the same way on every system."""
        paths = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
            relative = Path(folder).relative_to(self.root)
            paths += [(relative / name).as_posix() for name in names if name.endswith(".py")]
        # _sysconfigdata holds the paths of the machine that built this Python
        return sorted(path for path in paths if not path.startswith("_sysconfigdata"))

    def documents(self):
        for path in self.files():
            # One file in sixteen, by the hash of its name: the same files in every version of Python.
            is_val = hashlib.sha256(path.encode("utf-8")).digest()[0] % 16 == 0
            source = (self.root / path).read_bytes().replace(b"\r\n", b"\n")
            yield ("val" if is_val else "train"), source, True

    def source(self):
        return f"Python files of {self.root.name}" if self.input else f"standard library of {self.root.name}"

    def expected_bytes(self):
        return sum((self.root / path).stat().st_size for path in self.files())


# -- Tiny Shakespeare


class TinyShakespeare(Corpus):
    """1,115,394 characters of plays: the first 90% train, the rest validate, exactly as in nanoGPT."""

    ends_documents = False
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def documents(self):
        raw = self.read()
        if hashlib.sha256(raw).hexdigest() != self.sha256:
            raise UserError(
                f"{self.input} is not the Tiny Shakespeare of 1,115,394 bytes that results are compared on; "
                "use --dataset=text for a text of your own"
            )
        text = raw.decode("utf-8")
        n_train = int(len(text) * 0.9)
        yield "train", text[:n_train], False
        yield "val", text[n_train:], False

    def read(self):
        if self.input is None:
            return download(self.url, self.sha256, self.folder / "input.txt").read_bytes()
        if self.input.is_dir():
            raise UserError(f"input={str(self.input)!r} is a folder; give the file of Tiny Shakespeare itself")
        return self.input.read_bytes()

    def source(self):
        return self.url

    def expected_bytes(self):
        return 1_115_394


@CORPUS_REGISTRY("shakespeare_char")
class ShakespeareByCharacter(TinyShakespeare):
    name = "shakespeare_char"
    tokenizer = "char"


@CORPUS_REGISTRY("shakespeare")
class ShakespeareByGPT2Token(TinyShakespeare):
    name = "shakespeare"
    tokenizer = "gpt2"


def download(url, sha256, path):
    """The file at path, fetched from url when it is not there yet; a wrong checksum is never kept."""
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read()
    except OSError as error:
        raise UserError(f"could not download {url} ({error}); give a local copy with --input=FILE") from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f"what {url} sent has a wrong checksum; give a local copy with --input=FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(raw)
    os.replace(temporary, path)
    return path


# -- your own text

ONE_IN = 10  # documents for validation, or the last tenth of the text
MANY_DOCUMENTS = 100  # from here on the split is by document


@CORPUS_REGISTRY("text")
class Text(Corpus):
    """A .txt, .jsonl (field "text") or .parquet (column "text") file, or a folder of them in sorted order.

    From 100 documents on, every tenth validates; below that, the last tenth of the characters does. A .txt file is one
    document. Line ends become "\\n" and a byte order mark goes, so that the text is the same on every system.
    """

    name = "text"
    separator = None  # what stands between documents in a .txt file

    def __init__(self, input=None, variant=None, folder="."):
        super().__init__(input, variant, folder)
        if self.input is None:
            raise UserError(f"dataset={self.name} needs your text: give a file or a folder with --input=PATH")
        self.paths = text_files(self.input)
        single_text = len(self.paths) == 1 and kind_of_file(self.paths[0]) == ".txt" and not self.has_separator()
        self.ends_documents = not single_text

    def has_separator(self):
        return self.separator is not None and file_contains(self.paths[0], self.separator)

    def texts(self):
        """Yield (text, ends_document) over all files."""
        for path in self.paths:
            for text, ends in read_texts(path, self.separator):
                yield text, ends and self.ends_documents

    def documents(self):
        n_documents, n_characters = 0, 0
        for text, ends in self.texts():
            n_documents, n_characters = n_documents + ends, n_characters + len(text)
            if n_documents >= MANY_DOCUMENTS:
                return self.split_by_document()
        return self.split_by_character(int(n_characters * (1 - 1 / ONE_IN)))

    def split_by_document(self):
        index = 0
        for text, ends in self.texts():
            yield ("val" if index % ONE_IN == ONE_IN - 1 else "train"), text, ends
            index += ends

    def split_by_character(self, n_train):
        for text, ends in self.texts():
            head, tail = text[:n_train], text[n_train:]
            n_train -= len(head)
            if head:
                yield "train", head, ends and not tail
            if tail:
                yield "val", tail, ends

    def source(self):
        return f"local {'folder' if self.input.is_dir() else 'file'} {self.input.name}"

    def expected_bytes(self):
        if any(kind_of_file(path) == ".parquet" for path in self.paths):
            return None  # compressed
        return sum(path.stat().st_size for path in self.paths)


# -- datasets of the Hugging Face Hub, streamed: nothing is held but the row being read


def stream_rows(name, path, split, config=None, revision=None):
    """Yield the texts of one split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"dataset={name} needs the package datasets: pip install datasets, or give a local copy with --input=FILE"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would print a line
    try:
        for row in datasets.load_dataset(path, config, split=split, streaming=True, revision=revision):
            yield row["text"]
    except Exception as error:  # a dozen kinds, from the resolver to the parquet reader: none is the user's code
        raise UserError(
            f"could not read {path} from the Hugging Face Hub ({type(error).__name__}: {first_line(error)}); "
            "check the network, or give a local copy with --input=FILE"
        ) from error


def first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


class HubCorpus(Corpus):
    """Rows of the Hub, or a local copy that is read as `text` is.

    A split of its own is used where there is one; else one row in `val_one_in` validates.
    """

    path = None  # on the Hub
    revision = None
    val_split = None
    val_one_in = 2000  # as GPT-2's and nanoGPT's validation: one in two thousand of many million pages
    local_reader = Text
    about_bytes: ClassVar[dict] = {}  # by variant

    def __init__(self, input=None, variant=None, folder="."):
        super().__init__(input, variant, folder)
        self.local = None if self.input is None else self.local_reader(self.input)
        if self.local is not None:
            self.ends_documents = self.local.ends_documents

    def documents(self):
        return self.hub_documents() if self.local is None else self.local.documents()

    def hub_documents(self):
        for index, text in enumerate(self.rows("train")):
            yield ("val" if index % self.val_one_in == self.val_one_in - 1 else "train"), text, True

    def rows(self, split):
        return stream_rows(self.name, self.path, split, self.config(), self.revision)

    def config(self):
        return None

    def source(self):
        return f"{self.path} on the Hugging Face Hub" if self.local is None else self.local.source()

    def expected_bytes(self):
        return self.about_bytes.get(self.variant) if self.local is None else self.local.expected_bytes()


class LocalStories(Text):
    """The files that TinyStories is published as: stories with <|endoftext|> between them."""

    name = "tinystories"
    separator = END_OF_STORY


@CORPUS_REGISTRY("tinystories")
class TinyStories(HubCorpus):
    """`small` keeps the first 50,000 stories for training and 5,000 for validation, `full` all of them.

    A local copy is a file of stories with <|endoftext|> between them, or a folder that holds both of the published
    files, TinyStories-train.txt and TinyStories-valid.txt; of a single file every tenth story validates.
    """

    name = "tinystories"
    tokenizer = "bpe"
    tokenizer_vocab_size = 4096
    variants = ("small", "full")
    path = "roneneldan/TinyStories"
    local_reader = LocalStories
    about_bytes: ClassVar[dict] = {"small": 49_000_000, "full": 1_920_000_000}
    kept_stories: ClassVar[dict] = {"small": {"train": 50_000, "val": 5_000}, "full": {"train": None, "val": None}}

    def documents(self):
        limits = self.kept_stories[self.variant]
        if self.local is not None and not self.has_both_files():
            yield from limit_documents(self.local.documents(), limits)
            return
        for split, rows in (("train", self.stories("train")), ("val", self.stories("valid"))):
            for story in islice(rows, limits[split]):
                yield split, story, True

    def has_both_files(self):
        return self.input.is_dir() and all(self.files_of(part) for part in ("train", "valid"))

    def files_of(self, part):
        return [path for path in self.local.paths if part in path.stem.lower()]

    def stories(self, part):
        """Stories of 'train' or 'valid', from the Hub or from the published files."""
        if self.local is None:
            yield from self.rows("validation" if part == "valid" else part)
            return
        for path in self.files_of(part):
            for story, _ in read_texts(path, END_OF_STORY):
                yield story


def limit_documents(documents, limits):
    """The first limits[split] documents of each split; None is no limit."""
    seen = {"train": 0, "val": 0}
    for split, text, ends in documents:
        if limits[split] is not None and seen[split] >= limits[split]:
            if all(limits[part] is not None and seen[part] >= limits[part] for part in seen):
                return
            continue
        yield split, text, ends
        seen[split] += ends


@CORPUS_REGISTRY("openwebtext")
class OpenWebText(HubCorpus):
    """8,013,769 web pages, about 9 billion GPT-2 tokens: the open copy of what GPT-2 was trained on."""

    name = "openwebtext"
    tokenizer = "gpt2"
    path = "Skylion007/openwebtext"
    revision = "refs/convert/parquet"  # its main branch was a loading script, which `datasets` no longer runs
    about_bytes: ClassVar[dict] = {None: 39_800_000_000}


@CORPUS_REGISTRY("fineweb_edu")
class FineWebEdu(HubCorpus):
    """Web pages that a classifier found educational, in shards; sample-10BT is 10 billion GPT-2 tokens."""

    name = "fineweb_edu"
    tokenizer = "gpt2"
    path = "HuggingFaceFW/fineweb-edu"
    variants = ("sample-10BT", "sample-100BT", "sample-350BT", "default")
    about_bytes: ClassVar[dict] = {"sample-10BT": 48e9, "sample-100BT": 480e9, "sample-350BT": 1680e9}

    def config(self):
        return self.variant
