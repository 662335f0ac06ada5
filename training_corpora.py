"""Where text comes from: each dataset is a class that yields its documents, one at a time.

    corpus = CORPUS_REGISTRY["tinystories"](variant="small", input=None, folder="data/tinystories")
    for split, text, ends_document in corpus.documents(): ...        # 'train' or 'val', str or bytes, bool

A corpus may be larger than memory: `documents` reads as it goes, and a long text comes in pieces of which only the last
ends its document. The split is decided here and depends on nothing but the text: two machines get the same one, and so
does a preparation that was interrupted: `placed_documents` goes on behind any document.

    python_stdlib     the standard library of the Python that runs this      byte    no download
    shakespeare_char  Tiny Shakespeare by characters                         char    1.1 MB, checksummed
    shakespeare       the same text                                          gpt2    1.1 MB, checksummed
    tinystories       simple stories written by a language model             bpe     `datasets`, streamed
    openwebtext       the pages that Reddit linked to, as GPT-2 read them    gpt2    `datasets`, streamed
    fineweb_edu       web pages of educational value                         gpt2    `datasets`, streamed
    games             a simulated game of two teams, or your own .jsonl      -       no download
    text              your own .txt, .jsonl or .parquet                      byte    --input=FILE or folder

`input` gives a local copy in place of any download.
"""

import hashlib
import logging
import os
import sysconfig
import time
import urllib.request
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

import training_games
from registry import Registry
from training_records import Record, read_json_lines
from training_text_files import file_contains, kind_of_file, read_placed_texts, read_texts, text_files
from user_errors import UserError, did_you_mean

CORPUS_REGISTRY = Registry("dataset")
PROBE_REGISTRY = Registry("probe", of="train")  # datasets that are made instead of read: eval_probes.py

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
    input_is_the_data = False  # what is read is the user's own, so the folder is named after it; else a copy
    holds_records = False  # it yields `records` with an outcome, of tokens, in place of documents of text

    def __init__(self, input=None, variant=None, folder="."):
        self.input = None if input is None else Path(input).expanduser()
        self.variant = self.check_variant(variant)
        self.folder = Path(folder)
        if self.input is not None and not self.input.exists():
            raise UserError(f"input={str(input)!r} does not exist; give the path of a local copy of {self.name}")

    @classmethod
    def vocab_size(cls, recipe):
        """The size of the vocabulary where the tokens are the corpus's own, None where a tokenizer gives it."""
        return None

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
        return (document for document, _ in self.placed_documents())

    def placed_documents(self, place=None):
        """Yield (document, here): until the next one is asked for, here() is the JSON-able place behind this document,
        from which another call goes on.

        A corpus writes this method, or `documents` alone: then it is read again from its start and the place counts.
        """
        n_read = place or 0
        for n, document in enumerate(islice(self.documents(), n_read, None), n_read + 1):
            yield document, partial(int, n)

    def pin(self, revision=None):
        """Hold the source to one revision, the one given or the latest, and return it; None where there are none."""
        return None

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
    input_is_the_data = True
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

    def documents(self):
        return (document for document, _ in self.placed_documents())

    def placed_documents(self, place=None):
        """A place is {'file', 'within' it, 'documents' so far, 'n_train': characters that still train, 'cut': how much
        of the next text is done}."""
        place = place or {"file": 0, "within": None, "documents": 0, "n_train": self.characters_that_train(), "cut": 0}
        n_documents, n_train, cut = place["documents"], place["n_train"], place["cut"]
        for file in range(place["file"], len(self.paths)):
            within = place["within"] if file == place["file"] else None
            for text, ends_text, after in read_placed_texts(self.paths[file], self.separator, within):
                text, cut, ends = text[cut:], 0, ends_text and self.ends_documents
                if n_train is None:
                    split = "val" if n_documents % ONE_IN == ONE_IN - 1 else "train"
                elif not text:
                    continue
                else:
                    if 0 < n_train < len(text):  # the border between the splits lies in this text
                        here = partial(dict, file=file, within=within, documents=n_documents, n_train=0, cut=n_train)
                        yield ("train", text[:n_train], False), here
                        text, n_train = text[n_train:], 0
                    split, n_train = ("train" if n_train else "val"), max(0, n_train - len(text))
                within, n_documents = after, n_documents + ends
                here = partial(dict, file=file, within=within, documents=n_documents, n_train=n_train, cut=0)
                yield (split, text, ends), here

    def characters_that_train(self):
        """How many characters train where the split is by character; None where it is by document."""
        n_documents, n_characters = 0, 0
        for text, ends in self.texts():
            n_documents, n_characters = n_documents + ends, n_characters + len(text)
            if n_documents >= MANY_DOCUMENTS:
                return None
        return int(n_characters * (1 - 1 / ONE_IN))

    def texts(self):
        """Yield (text, ends_document) over all files."""
        for path in self.paths:
            for text, ends in read_texts(path, self.separator):
                yield text, ends and self.ends_documents

    def source(self):
        return f"local {'folder' if self.input.is_dir() else 'file'} {self.input.name}"

    def expected_bytes(self):
        if any(kind_of_file(path) == ".parquet" for path in self.paths):
            return None  # compressed
        return sum(path.stat().st_size for path in self.paths)


# -- records with an outcome


@CORPUS_REGISTRY("games")
class Games(Corpus):
    """Games of two teams, simulated with the true chances of winning (`training_games.py`), or the user's own.

    Of the user's, a line of JSON each (`training_records.py`), every tenth validates.
    """

    name = "games"
    tokenizer = None
    variants = ("small", "full")
    input_is_the_data = holds_records = True
    n_games: ClassVar = {"small": {"train": 4000, "val": 400}, "full": {"train": 60_000, "val": 2000}}
    games_at_once = 2000  # of one seed: their number and order follow from it

    @classmethod
    def check_choices(cls, settings):
        """(variant, tokenizer_vocab_size) of settings; a choice that has no meaning is refused."""
        variant, vocab_size = settings.variant, settings.tokenizer_vocab_size
        if settings.tokenizer is not None:
            raise UserError(f"dataset={cls.name} has tokens of its own; leave out tokenizer={settings.tokenizer}")
        if settings.input is None and vocab_size is not None:
            raise UserError(
                f"tokenizer_vocab_size={vocab_size} is for games of your own (--input=FILE.jsonl): the simulated ones "
                f"have {training_games.VOCAB_SIZE} tokens"
            )
        if settings.input is not None and variant is not None:
            raise UserError(
                f"variant={variant} is of simulated games; leave it out, or leave out input={settings.input}"
            )
        return (cls.check_variant(variant) if settings.input is None else None), vocab_size

    @classmethod
    def vocab_size(cls, recipe):
        return recipe.tokenizer_vocab_size or training_games.VOCAB_SIZE

    def records(self, vocab_size, advance):
        """Yield Record after Record; advance(what, n_bytes, expected_bytes) is told of each lot."""
        if self.input is not None:
            for n, (line, *record) in enumerate(read_json_lines(self.input, vocab_size)):
                yield Record("val" if n % ONE_IN == ONE_IN - 1 else "train", line, *record)
            return
        for number, (split, n_games) in enumerate(self.n_games[self.variant].items()):
            for first in range(0, n_games, self.games_at_once):
                n = min(self.games_at_once, n_games - first)
                games = training_games.simulate(n, (number, first))
                advance(f"playing {split}", sum(game.tokens.nbytes for game in games), None)
                for line, game in enumerate(games, first + 1):
                    yield Record(split, line, *game)

    def facts(self):
        """What meta.json is to say beside counts."""
        return {"token_names": None if self.input is not None else training_games.TOKENS}

    def source(self):
        return f"local file {self.input.name}" if self.input is not None else "the simulator of training_games.py"


# -- datasets of the Hugging Face Hub, streamed: nothing is held but the row being read


RETRY_SECONDS = (1, 4, 16, 60)  # between attempts that bring no row; `datasets` itself retries a lost connection before


def placed_rows(name, path, split, config=None, revision=None, place=None):
    """Yield (text, here) of each row of one split; from the JSON-able place here() another call goes on.

    A stream that breaks off is opened again where it broke. Before the first row there is no second attempt: there the
    name or the network is wrong, and waiting would only delay the sentence that says so.
    """
    datasets, failures, n_rows, began = import_datasets(name), 0, place["rows"] if place else 0, False
    while True:
        try:
            rows = open_at(datasets, place, path, config, split=split, streaming=True, revision=revision)
            for row in rows:
                n_rows, failures, began = n_rows + 1, 0, True
                yield row["text"], partial(place_of, datasets, rows, n_rows)
            return
        except Exception as error:  # a dozen kinds, from the resolver to the parquet reader: none is the user's code
            if not began or failures == len(RETRY_SECONDS):
                raise UserError(
                    f"could not read {path} from the Hugging Face Hub ({type(error).__name__}: {first_line(error)}); "
                    "check the network, or give a local copy with --input=FILE"
                ) from error
            if place is None or n_rows > place["rows"]:
                place = place_of(datasets, rows, n_rows)
        time.sleep(RETRY_SECONDS[failures])
        failures += 1


def import_datasets(name):
    """The package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"dataset={name} needs the package datasets: pip install datasets, or give a local copy with --input=FILE"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would print a line
    return datasets


def open_at(datasets, place, *args, **kwargs):
    """The streamed rows behind a place. The state of `datasets` passes over whole files without opening them; another
    version of it may not know that state, and then the rows before are read and dropped."""
    rows = datasets.load_dataset(*args, **kwargs)
    if place is None:
        return rows
    if place["version"] != datasets.__version__:
        return rows.skip(place["rows"])
    rows.load_state_dict(place["state"])
    return rows


def place_of(datasets, rows, n_rows):
    return {"rows": n_rows, "version": datasets.__version__, "state": rows.state_dict()}


def latest_revision(path, revision):
    """The commit that a dataset's revision (None: its main branch) stands at, or the revision where no one answers."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(path, revision=revision, timeout=30).sha
    except Exception:  # without a network: reading the rows says so in a sentence
        return revision


def first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


def is_one_in(n, text):
    """Whether a text is among the one in n that its own hash chooses: wherever it stands, and every copy of it."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % n == 0


class HubCorpus(Corpus):
    """Rows of the Hub, or a local copy that is read as `text` is.

    A split of its own is used where there is one; else about one row in `val_one_in` validates, chosen by its text.
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
        return (document for document, _ in self.placed_documents())

    def placed_documents(self, place=None):
        if self.local is not None:
            yield from self.local.placed_documents(place)
            return
        for text, here in self.placed_rows("train", place):
            yield ("val" if is_one_in(self.val_one_in, text) else "train", text, True), here

    def placed_rows(self, split, place=None):
        return placed_rows(self.name, self.path, split, self.config(), self.revision, place)

    def pin(self, revision=None):
        if self.local is not None:
            return None
        self.revision = revision or latest_revision(self.path, self.revision)
        return self.revision

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

    def placed_documents(self, place=None):
        """A place is {'seen': documents of each split so far, 'within': the place in the source of the last one}."""
        limits = self.kept_stories[self.variant]
        place = place or {"seen": {"train": 0, "val": 0}, "within": None}
        if self.local is not None and not self.has_both_files():
            return limit_documents(self.local.placed_documents(place["within"]), limits, place["seen"])
        return self.stories_of_both(limits, place)

    def stories_of_both(self, limits, place):
        seen, within = dict(place["seen"]), place["within"]
        for split, part in (("train", "train"), ("val", "valid")):
            if split == "train" and seen["val"]:
                continue  # gone through before the place
            n_left = None if limits[split] is None else limits[split] - seen[split]
            for story, inner in islice(self.stories(part, within if seen[split] else None), n_left):
                seen[split] += 1
                yield (split, story, True), partial(place_of_story, dict(seen), inner)

    def has_both_files(self):
        return self.input.is_dir() and all(self.files_of(part) for part in ("train", "valid"))

    def files_of(self, part):
        return [path for path in self.local.paths if part in path.stem.lower()]

    def stories(self, part, place=None):
        """(story, here) of 'train' or 'valid', from the Hub or from the published files."""
        if self.local is None:
            yield from self.placed_rows("validation" if part == "valid" else part, place)
            return
        first, within = place or (0, None)
        for number, path in islice(enumerate(self.files_of(part)), first, None):
            for story, _, after in read_placed_texts(path, END_OF_STORY, within):
                yield story, partial(list, (number, after))
            within = None


def place_of_story(seen, inner):
    return {"seen": seen, "within": inner()}


def limit_documents(placed_documents, limits, seen):
    """The first limits[split] documents of each split, of which `seen` were given already; None is no limit."""
    seen = dict(seen)
    for (split, text, ends), inner in placed_documents:
        if limits[split] is not None and seen[split] >= limits[split]:
            if all(limits[part] is not None and seen[part] >= limits[part] for part in seen):
                return
            continue
        seen[split] += ends
        yield (split, text, ends), partial(place_of_story, dict(seen), inner)


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
