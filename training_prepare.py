"""A corpus becomes token files: `data/<name>/` with train.bin (or train_00000.bin and on), val.bin and meta.json.

    folder = prepare(TrainConfig(dataset="tinystories", variant="small"))
    python data/tinystories/prepare.py --variant=full --tokenizer=gpt2        # the same from a terminal

Documents flow through in chunks of a megabyte, so a corpus larger than memory works; threads encode several at once,
because the tokenizer libraries let go of Python's lock (starting processes would cost seconds and gain nothing).

A preparation that ends early, by Ctrl-C, a kill or a lost network, loses at most the file being written: run again, it
goes on behind the last whole one, and gives the same files byte for byte. meta.json is written last: a folder that has
it is whole. Nothing that is there is ever overwritten. Records (`training_records.py`) are written by another path, and
start over. This file imports no torch, so that preparing starts at once.
"""

import argparse
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from training_config import TrainConfig
from training_corpora import CORPUS_REGISTRY, PROBE_REGISTRY
from training_records import write_records
from training_shards import PROGRESS, check_no_token_files, unfinished
from training_token_files import (
    SPLITS,
    check_shards,
    describe,
    describe_token_files,
    how_to_prepare_again,
    read_meta,
    shards_of,
    write_json,
)
from training_tokenizers import (
    TOKENIZER_REGISTRY,
    tokenizer_from_meta,
    tokenizer_identity,
    tokenizer_label,
    tokenizer_part,
)
from training_tokenizers_base import as_text
from training_tokenizers_learned import LEARN_FROM_BYTES
from user_errors import Parser, UserError, did_you_mean, exit_on_user_error

CHUNK_BYTES = 2**20  # of text, encoded together
DEFAULT_LEARNED_VOCAB_SIZE = 4096
LEAST_SHARD_TOKENS = 1024  # smaller files would be too many for any file system


# -- which dataset is meant, and where it lives


@dataclass(frozen=True)
class Recipe:
    """A dataset as the settings ask for it; None is 'whatever is there'."""

    dataset: str
    folder: Path
    variant: str | None
    tokenizer: str | None
    tokenizer_vocab_size: int | None
    input: str | None
    shard_tokens: int


def recipe_of(settings):
    """The Recipe of settings that have dataset, data_dir, variant, tokenizer, tokenizer_vocab_size and input, and may
    have shard_tokens.

    The dataset's own variant and tokenizer live in `data/<dataset>`, any other choice in a folder of its own:
    `data/tinystories-full-gpt2`, `data/tinystories-bpe8192`, `data/text-mybook`.
    """
    if settings.tokenizer is not None:
        tokenizer_part(settings.tokenizer)  # a miss names the nearest
    variant, tokenizer, vocab_size = settings.variant, settings.tokenizer, settings.tokenizer_vocab_size
    parts = [settings.dataset]
    if settings.dataset in CORPUS_REGISTRY:
        corpus = CORPUS_REGISTRY[settings.dataset]
        if corpus.input_is_the_data and settings.input is not None:
            parts.append(Path(settings.input).expanduser().resolve().stem)
        if corpus.holds_records:
            variant, vocab_size = corpus.check_choices(settings)
        else:
            variant, tokenizer = corpus.check_variant(variant), tokenizer or corpus.tokenizer
            vocab_size = learned_vocab_size(corpus, tokenizer, vocab_size)
        parts += choices_that_differ(corpus, variant, tokenizer, vocab_size)
    folder = Path(settings.data_dir) / "-".join(parts)
    shard_tokens = getattr(settings, "shard_tokens", TrainConfig.shard_tokens)
    if shard_tokens < LEAST_SHARD_TOKENS:
        raise UserError(f"shard_tokens={shard_tokens} must be at least {LEAST_SHARD_TOKENS}: each shard is a file")
    return Recipe(settings.dataset, folder, variant, tokenizer, vocab_size, settings.input, shard_tokens)


def choices_that_differ(corpus, variant, tokenizer, vocab_size):
    """What a folder's name must add because it is not the dataset's default."""
    parts = []
    if variant not in (None, corpus.check_variant(None)):
        parts.append(variant)
    if (tokenizer, vocab_size) != (corpus.tokenizer, corpus.tokenizer_vocab_size):
        parts.append(f"{tokenizer_label(tokenizer) if tokenizer else 'vocab'}{vocab_size or ''}")
    return parts


def learned_vocab_size(corpus, tokenizer, asked):
    """The size of a vocabulary that is learned, or None for the others, where asking for one is a mistake."""
    if tokenizer_part(tokenizer)[0].takes_vocab_size:
        return asked or corpus.tokenizer_vocab_size or DEFAULT_LEARNED_VOCAB_SIZE
    if asked is not None:
        learned = ", ".join(name for name, part in TOKENIZER_REGISTRY.items() if part.takes_vocab_size)
        raise UserError(
            f"tokenizer_vocab_size={asked} has no meaning for tokenizer={tokenizer}, whose size is given; "
            f"leave it out, or choose one of {learned}"
        )
    return None


# -- a dataset that is there already


def check_meets(meta, recipe):
    """Refuse a prepared dataset that is not the one asked for."""
    tokenizer = meta["tokenizer"] or {}
    there = {
        "variant": meta.get("variant"),
        "tokenizer": tokenizer.get("identity", tokenizer.get("name")),
        "tokenizer_vocab_size": meta.get("tokenizer_vocab_size"),
        "input": (meta.get("input") or {}).get("name"),
    }
    asked = {name: getattr(recipe, name) for name in there}
    asked["tokenizer"] = tokenizer_asked(recipe.tokenizer)
    if recipe.input is not None:
        asked["input"] = Path(recipe.input).expanduser().resolve().name
    for name, value in asked.items():
        if value is not None and value != there[name]:
            raise UserError(
                f"{recipe.folder} was prepared with {name}={there[name]}, not {name}={value}; "
                "choose another --data_dir, or move that folder away"
            )
    if recipe.input is not None:
        check_input_unchanged(meta["input"], recipe)


def tokenizer_asked(name):
    """What a prepared dataset's tokenizer must be; None where that is open, or a model's folder is no longer there."""
    folder = None if name is None else tokenizer_part(name)[1]
    is_gone = folder is not None and not Path(folder).expanduser().is_dir()
    return None if name is None or is_gone else tokenizer_identity(name)


def check_input_unchanged(recorded, recipe):
    path = Path(recipe.input).expanduser()
    if path.exists() and bytes_at(path) != recorded["bytes"]:
        raise UserError(
            f"{recipe.folder} was prepared from {recorded['name']} when it had {recorded['bytes']:,} bytes, and now it "
            f"has {bytes_at(path):,}; {how_to_prepare_again(recipe.folder)}"
        )


def bytes_at(path):
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


# -- preparing


def prepare(settings, workers=None, chunk_bytes=CHUNK_BYTES, quiet=False):
    """Make the dataset that the settings name, unless it is there already, and return its folder.

    Args:
        settings: a TrainConfig, or anything with its data settings.
        workers: threads that encode; None is one for each core.
        quiet: no progress bar, which is only drawn on a terminal anyway.
    """
    recipe = recipe_of(settings)
    meta = read_meta(recipe.folder)
    if meta is not None:
        check_meets(meta, recipe)
        with suppress(OSError):
            (recipe.folder / PROGRESS).unlink()  # of a process that was killed between the last two things it does
        return recipe.folder
    check_absent(recipe)
    corpus = CORPUS_REGISTRY[recipe.dataset](recipe.input, recipe.variant, recipe.folder)
    with unfinished(recipe.folder, settings_of(recipe, corpus)) as preparation, progress_bar(quiet) as advance:
        if preparation is None:  # another process made it meanwhile
            check_meets(read_meta(recipe.folder), recipe)
            return recipe.folder
        if corpus.holds_records:
            facts = {"source": corpus.source(), "input": facts_of_input(corpus), **corpus.facts()}
            names, vocab_size = ("dataset", "variant", "tokenizer_vocab_size"), corpus.vocab_size(recipe)
            facts |= {name: getattr(recipe, name) for name in names}
            write_records(recipe.folder, corpus.records(vocab_size, advance), vocab_size, facts)
            return recipe.folder
        tokenizer = take_up(preparation, corpus, recipe, advance)
        with kept_on_failure(preparation):
            if not preparation.finished:
                encode_corpus(corpus, tokenizer, preparation, workers or available_cores(), chunk_bytes, advance)
            finish(corpus, tokenizer, recipe, preparation)
    return recipe.folder


def check_absent(recipe):
    """Refuse a dataset that no one can make, and token files that nothing describes."""
    folder = recipe.folder
    if not (folder / PROGRESS).exists():
        check_no_token_files(folder)
    if recipe.dataset not in CORPUS_REGISTRY:
        known = sorted({*CORPUS_REGISTRY, *PROBE_REGISTRY, *prepared_datasets(folder.parent)})
        hint = did_you_mean(recipe.dataset, known)
        raise UserError(
            f"dataset={recipe.dataset!r} does not exist{hint} (known: {', '.join(known)}; "
            "your own text: --dataset=text --input=FILE)"
        )


def settings_of(recipe, corpus):
    """What the token files depend on, in JSON: an interrupted preparation goes on only where all of it is the same."""
    names = ("dataset", "variant", "tokenizer", "tokenizer_vocab_size", "shard_tokens")
    settings = {name: getattr(recipe, name) for name in names}
    if recipe.tokenizer is not None:
        settings["tokenizer"] = tokenizer_identity(recipe.tokenizer)
    return {**settings, "source": corpus.source(), "input": facts_of_input(corpus)}


def facts_of_input(corpus):
    return None if corpus.input is None else {"name": corpus.input.resolve().name, "bytes": bytes_at(corpus.input)}


def take_up(preparation, corpus, recipe, advance):
    """Begin a preparation, or an interrupted one again, and return its tokenizer."""
    header = preparation.header or {}
    revision = corpus.pin(header.get("revision"))
    if "tokenizer" in header:
        tokenizer = tokenizer_from_meta(header["tokenizer"])
    else:
        tokenizer = learn_tokenizer(corpus, recipe, advance)
    preparation.begin(tokenizer, revision, advance)
    return tokenizer


@contextmanager
def kept_on_failure(preparation):
    """A user's mistake, or the network's, says what is kept."""
    try:
        yield
    except UserError as error:
        if not preparation.lines:
            raise
        raise UserError(f"{error}; {what_is_kept(preparation.folder)}") from error


def what_is_kept(folder):
    n_files = sum(1 for split in SPLITS for _ in folder.glob(f"{split}*.bin"))
    return f"{n_files} whole files are kept in {folder}, and the same command goes on behind them"


def prepared_datasets(data_dir):
    """Names of the folders of data_dir that hold a whole dataset."""
    return sorted(path.parent.name for path in Path(data_dir).glob("*/meta.json"))


def available_cores():
    """Cores this process may use, which under Slurm or in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def learn_tokenizer(corpus, recipe, advance):
    """The tokenizer of the recipe; one that learns reads its documents first."""
    part, source = tokenizer_part(recipe.tokenizer)
    if source is not None:
        return part.from_folder(source)
    expected_bytes = corpus.expected_bytes()
    if part.takes_vocab_size and expected_bytes is not None:
        expected_bytes = min(expected_bytes, LEARN_FROM_BYTES)

    def documents():
        for split, text, _ in corpus.documents():
            if part.learns_from in ("all", split):
                advance(f"learning {recipe.tokenizer} tokens", len(text), expected_bytes)
                yield text

    return part.learn(documents(), vocab_size=recipe.tokenizer_vocab_size, ends_documents=corpus.ends_documents)


def encode_corpus(corpus, tokenizer, preparation, workers, chunk_bytes, advance):
    """Encode every document that is still to come and append its tokens to its split, in the corpus's own order."""
    end_id = tokenizer.end_of_document_id if corpus.ends_documents else None
    expected_bytes = corpus.expected_bytes()
    advance("encoding", 0, expected_bytes, preparation.n_bytes)
    # At most two chunks for each worker are in flight: what bounds memory however fast the corpus is read.
    with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        pending = deque()

        def write_oldest():
            chunk, place = pending.popleft()
            encoded = chunk.result() if pool else chunk
            preparation.append(encoded, place)
            advance("encoding", sum(part.n_bytes for part in encoded.values()), expected_bytes)

        for documents, place in in_chunks(corpus.placed_documents(preparation.place), chunk_bytes):
            job = (encode_chunk, tokenizer, end_id, documents)
            pending.append((pool.submit(*job) if pool else job[0](*job[1:]), place))
            if len(pending) >= 2 * workers:
                write_oldest()
        while pending:
            write_oldest()


def in_chunks(placed_documents, chunk_bytes):
    """(list of (split, text, ends_document) that hold about chunk_bytes together, the place behind them)."""
    chunk, size = [], 0
    for document, here in placed_documents:
        chunk.append(document)
        size += len(document[1])
        if size >= chunk_bytes:
            yield chunk, here()
            chunk, size = [], 0
    if chunk:
        yield chunk, here()


@dataclass
class Encoded:
    """What a chunk gives to one split."""

    tokens: np.ndarray
    n_bytes: int
    n_documents: int


def encode_chunk(tokenizer, end_id, documents):
    """{split: Encoded} of a list of (split, text, ends_document)."""
    texts = [text for _, text, _ in documents]
    if not tokenizer.takes_bytes:
        texts = [as_text(text) for text in texts]
    sizes = [len(text if isinstance(text, bytes) else as_text(text).encode("utf-8")) for text in texts]
    ids = tokenizer.encode_batch(texts)
    ending = np.array([] if end_id is None else [end_id], dtype=np.int64)
    encoded = {}
    for split in sorted({split for split, _, _ in documents}):
        rows = [i for i, document in enumerate(documents) if document[0] == split]
        parts = [part for i in rows for part in ((ids[i], ending) if documents[i][2] else (ids[i],))]
        n_documents = sum(documents[i][2] for i in rows)
        encoded[split] = Encoded(np.concatenate(parts), sum(sizes[i] for i in rows), n_documents)
    return encoded


def finish(corpus, tokenizer, recipe, preparation):
    """Publish the last token files and, after them, meta.json."""
    for split, files in preparation.splits.items():
        if files.n_tokens == 0:
            name = recipe.input or recipe.dataset
            raise UserError(f"{name} gives no tokens for the {split} split: it is empty or too short to divide")
    meta = describe(
        tokenizer.to_meta(),
        tokenizer.token_bytes(),
        preparation.splits["train"].dtype,
        preparation.finish(),
        dataset=recipe.dataset,
        variant=recipe.variant,
        tokenizer_vocab_size=recipe.tokenizer_vocab_size,
        source=corpus.source(),
        revision=preparation.header["revision"],
        input=facts_of_input(corpus),
    )
    write_json(recipe.folder / "meta.json", meta)
    preparation.done()


# -- what the user sees


@contextmanager
def progress_bar(quiet=False):
    """A function advance(what, n_bytes, expected_bytes, already=0) that moves a bar on stderr, one for each `what`.

    `already` bytes were done by an earlier process: they count for the bar and not for its speed.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda what, n_bytes, expected_bytes, already=0: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def advance(what, n_bytes, expected_bytes, already=0):
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=expected_bytes, completed=already)
            progress.advance(tasks[what], n_bytes)

        yield advance
        for task in tasks.values():  # the expected size was an estimate
            progress.update(task, total=progress.tasks[task].completed)


def summary_of(folder):
    """Lines with the counts that a folder holds."""
    meta = read_meta(folder)
    tokenizer = meta["tokenizer"]["name"] or "unknown"
    lines = [f"{folder}: {tokenizer} tokens, vocabulary {meta['vocab_size']:,}, from {meta['source']}"]
    for split in SPLITS:
        facts = meta["splits"][split]
        counts = [f"{facts[name]:,} {name}" for name in ("tokens", "bytes", "documents") if facts[name] is not None]
        if facts.get("records"):
            mean, won = facts["tokens"] / facts["documents"], facts["outcomes"] / facts["documents"]
            counts += [f"{mean:,.1f} tokens each, {facts['longest']:,} at most", f"outcome 1 in {100 * won:.1f}%"]
            counts += [] if facts.get("best_wp_loss") is None else [f"wp_loss {facts['best_wp_loss']:.4f} at best"]
        n_files = len(shards_of(meta, split))
        counts += [f"{n_files} files"] if n_files > 1 else []
        lines.append(f"  {split:5s} {', '.join(counts)}")
    return "\n".join(lines)


@exit_on_user_error
def prepare_from_command_line(dataset, description, arguments=None):
    """The main of every data/<name>/prepare.py."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    corpus = CORPUS_REGISTRY[dataset]
    parser.add_argument("--input", help="a local file or folder to read instead of a download")
    parser.add_argument("--variant", help=f"one of {', '.join(corpus.variants)}" if corpus.variants else "none here")
    names = [f"{name}:FOLDER" if part.is_from_folder else name for name, part in TOKENIZER_REGISTRY.items()]
    parser.add_argument("--tokenizer", help=f"{', '.join(names)}; default {corpus.tokenizer}")
    parser.add_argument("--tokenizer_vocab_size", type=int, help="for bpe, unigram and wordpiece")
    parser.add_argument("--data_dir", default=str(Path(__file__).resolve().parent / "data"), help="where datasets live")
    parser.add_argument(
        "--shard_tokens", type=int, default=TrainConfig.shard_tokens,
        help="tokens in each file of a split that is longer than one; default %(default)s"
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read the prepared files and compare every checksum")
    if dataset == "text":
        parser.add_argument("--describe", metavar="FOLDER", help="write meta.json for token files made elsewhere")
        parser.add_argument("--vocab_size", type=int, help="with --describe, for tokens of an unknown tokenizer")
        parser.add_argument("--dtype", default="uint16", choices=["uint16", "uint32"], help="with --describe")
    options = parser.parse_args(arguments)
    if getattr(options, "describe", None):
        folder = describe_token_files(options.describe, options.tokenizer, options.vocab_size, options.dtype)
    else:
        settings = SimpleNamespace(dataset=dataset, **vars(options))
        try:
            folder = prepare(settings)
        except KeyboardInterrupt:
            folder = recipe_of(settings).folder
            kept = (
                what_is_kept(folder) if (folder / PROGRESS).exists() else "nothing was kept, run it again to start over"
            )
            raise UserError(f"interrupted; {kept}") from None
    if options.check:
        for split in SPLITS:
            check_shards(folder, read_meta(folder), split, checksums=True)
    print(summary_of(folder))
