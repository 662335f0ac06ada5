"""Datasets of the Hugging Face Hub, streamed: nothing is held but the row being read. Or a local copy of one."""

import hashlib
import logging
import time
from functools import partial
from itertools import islice
from typing import ClassVar

from training_corpora_base import CORPUS_REGISTRY, Corpus
from training_corpora_text import Text
from training_text_files import read_placed_texts
from user_errors import UserError

END_OF_STORY = "<|endoftext|>"
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
