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
import os
import sysconfig
import urllib.request
from pathlib import Path
from typing import ClassVar

import training_corpora_hub  # noqa: F401  (registers itself, as the next does)
import training_corpora_text  # noqa: F401
import training_games
from registry import Registry
from training_corpora_base import CORPUS_REGISTRY, ONE_IN, Corpus
from training_records import Record, read_json_lines
from user_errors import UserError

PROBE_REGISTRY = Registry("probe", of="train")  # datasets that are made instead of read: eval_probes.py

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
