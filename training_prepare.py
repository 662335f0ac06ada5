"""A corpus becomes token files: `data/<name>/` with train.bin, val.bin and meta.json, which says what they are.

    folder = prepare(TrainConfig(dataset="tinystories", variant="small"))
    python data/tinystories/prepare.py --variant=full --tokenizer=gpt2        # the same from a terminal

Documents flow through in chunks of a megabyte, so a corpus larger than memory works; threads encode several at once,
because the tokenizer libraries let go of Python's lock (starting processes would cost seconds and gain nothing).

meta.json is written last: a folder that has it is whole. Nothing that is there is ever overwritten. This file imports
no torch, so that preparing starts at once.
"""

import argparse
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from training_corpora import CORPUS_REGISTRY
from training_token_files import (
    SPLITS,
    describe,
    describe_token_files,
    how_to_prepare_again,
    read_meta,
    token_files,
    write_json,
)
from training_tokenizers import LEARN_FROM_BYTES, TOKENIZER_REGISTRY, as_text
from user_errors import Parser, UserError, did_you_mean, exit_on_user_error

CHUNK_BYTES = 2**20  # of text, encoded together
DEFAULT_LEARNED_VOCAB_SIZE = 4096


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


def recipe_of(settings):
    """The Recipe of settings that have dataset, data_dir, variant, tokenizer, tokenizer_vocab_size and input.

    The dataset's own variant and tokenizer live in `data/<dataset>`, any other choice in a folder of its own:
    `data/tinystories-full-gpt2`, `data/tinystories-bpe8192`, `data/text-mybook`.
    """
    if settings.tokenizer is not None:
        TOKENIZER_REGISTRY[settings.tokenizer]  # a miss names the nearest
    variant, tokenizer, vocab_size = settings.variant, settings.tokenizer, settings.tokenizer_vocab_size
    parts = [settings.dataset]
    if settings.dataset in CORPUS_REGISTRY:
        corpus = CORPUS_REGISTRY[settings.dataset]
        variant = corpus.check_variant(variant)
        tokenizer = tokenizer or corpus.tokenizer
        vocab_size = learned_vocab_size(corpus, tokenizer, vocab_size)
        parts += choices_that_differ(corpus, variant, tokenizer, vocab_size)
    if settings.dataset == "text" and settings.input is not None:
        parts.insert(1, Path(settings.input).expanduser().resolve().stem)
    folder = Path(settings.data_dir) / "-".join(parts)
    return Recipe(settings.dataset, folder, variant, tokenizer, vocab_size, settings.input)


def choices_that_differ(corpus, variant, tokenizer, vocab_size):
    """What a folder's name must add because it is not the dataset's default."""
    parts = []
    if variant != corpus.check_variant(None):
        parts.append(variant)
    if (tokenizer, vocab_size) != (corpus.tokenizer, corpus.tokenizer_vocab_size):
        parts.append(f"{tokenizer}{vocab_size or ''}")
    return parts


def learned_vocab_size(corpus, tokenizer, asked):
    """The size of a vocabulary that is learned, or None for the others, where asking for one is a mistake."""
    if TOKENIZER_REGISTRY[tokenizer].takes_vocab_size:
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
        "tokenizer": tokenizer.get("name"),
        "tokenizer_vocab_size": meta.get("tokenizer_vocab_size"),
        "input": (meta.get("input") or {}).get("name"),
    }
    asked = {name: getattr(recipe, name) for name in there}
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
        return recipe.folder
    check_absent(recipe)
    corpus = CORPUS_REGISTRY[recipe.dataset](recipe.input, recipe.variant, recipe.folder)
    with progress_bar(quiet) as advance:
        tokenizer = learn_tokenizer(corpus, recipe, advance)
        with token_files(recipe.folder, tokenizer.vocab_size) as files:
            encode_corpus(corpus, tokenizer, files, workers or available_cores(), chunk_bytes, advance)
            finish(corpus, tokenizer, recipe, files)
    return recipe.folder


def check_absent(recipe):
    """Refuse a dataset that no one can make, and token files that nothing describes."""
    folder = recipe.folder
    if (folder / "train.bin").exists() or (folder / "val.bin").exists():
        raise UserError(
            f"{folder} holds token files but no meta.json that says what they are; remove train.bin and val.bin to "
            f"prepare them here, or describe them: python data/text/prepare.py --describe={folder} --tokenizer=gpt2"
        )
    if recipe.dataset not in CORPUS_REGISTRY:
        known = sorted({*CORPUS_REGISTRY, *prepared_datasets(folder.parent)})
        hint = did_you_mean(recipe.dataset, known)
        raise UserError(
            f"dataset={recipe.dataset!r} does not exist{hint} (known: {', '.join(known)}; "
            "your own text: --dataset=text --input=FILE)"
        )


def prepared_datasets(data_dir):
    """Names of the folders of data_dir that hold a whole dataset."""
    return sorted(path.parent.name for path in Path(data_dir).glob("*/meta.json"))


def available_cores():
    """Cores this process may use, which under Slurm or in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def learn_tokenizer(corpus, recipe, advance):
    """The tokenizer of the recipe; one that learns reads its documents first."""
    part = TOKENIZER_REGISTRY[recipe.tokenizer]
    expected_bytes = corpus.expected_bytes()
    if part.takes_vocab_size and expected_bytes is not None:
        expected_bytes = min(expected_bytes, LEARN_FROM_BYTES)

    def documents():
        for split, text, _ in corpus.documents():
            if part.learns_from in ("all", split):
                advance(f"learning {recipe.tokenizer} tokens", len(text), expected_bytes)
                yield text

    return part.learn(documents(), vocab_size=recipe.tokenizer_vocab_size, ends_documents=corpus.ends_documents)


def encode_corpus(corpus, tokenizer, files, workers, chunk_bytes, advance):
    """Encode every document and append its tokens to the file of its split, in the corpus's own order."""
    end_id = tokenizer.end_of_document_id if corpus.ends_documents else None
    expected_bytes = corpus.expected_bytes()
    # At most two chunks for each worker are in flight: what bounds memory however fast the corpus is read.
    with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        pending = deque()

        def write_oldest():
            chunk = pending.popleft()
            encoded = chunk.result() if pool else chunk
            for split, part in encoded.items():
                files[split].append(part)
            advance("encoding", sum(part.n_bytes for part in encoded.values()), expected_bytes)

        for documents in in_chunks(corpus.documents(), chunk_bytes):
            job = (encode_chunk, tokenizer, end_id, documents)
            pending.append(pool.submit(*job) if pool else job[0](*job[1:]))
            if len(pending) >= 2 * workers:
                write_oldest()
        while pending:
            write_oldest()


def in_chunks(documents, chunk_bytes):
    """Lists of (split, text, ends_document) that hold about chunk_bytes together."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document[1])
        if size >= chunk_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


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


def finish(corpus, tokenizer, recipe, files):
    """Publish the token files and, last, meta.json."""
    for split, file in files.items():
        if file.n_tokens == 0:
            name = recipe.input or recipe.dataset
            raise UserError(f"{name} gives no tokens for the {split} split: it is empty or too short to divide")
    meta = describe(
        tokenizer.to_meta(),
        tokenizer.token_bytes(),
        files["train"].dtype,
        {split: file.facts() for split, file in files.items()},
        dataset=recipe.dataset,
        variant=recipe.variant,
        tokenizer_vocab_size=recipe.tokenizer_vocab_size,
        source=corpus.source(),
        input=None if corpus.input is None else {"name": corpus.input.resolve().name, "bytes": bytes_at(corpus.input)},
    )
    if (recipe.folder / "meta.json").exists():
        return  # another process made it meanwhile; the same corpus gives the same files
    for file in files.values():
        file.publish()
    write_json(recipe.folder / "meta.json", meta)


# -- what the user sees


@contextmanager
def progress_bar(quiet=False):
    """A function advance(what, n_bytes, expected_bytes) that moves a bar on stderr, one for each `what`."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, n_bytes, expected_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def advance(what, n_bytes, expected_bytes):
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=expected_bytes)
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
        lines.append(f"  {split:5s} {', '.join(counts)}")
    return "\n".join(lines)


@exit_on_user_error
def prepare_from_command_line(dataset, description, arguments=None):
    """The main of every data/<name>/prepare.py."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    corpus = CORPUS_REGISTRY[dataset]
    parser.add_argument("--input", help="a local file or folder to read instead of a download")
    parser.add_argument("--variant", help=f"one of {', '.join(corpus.variants)}" if corpus.variants else "none here")
    parser.add_argument("--tokenizer", help=f"{', '.join(TOKENIZER_REGISTRY)}; default {corpus.tokenizer}")
    parser.add_argument("--tokenizer_vocab_size", type=int, help="for bpe, unigram and wordpiece")
    parser.add_argument("--data_dir", default=str(Path(__file__).resolve().parent / "data"), help="where datasets live")
    if dataset == "text":
        parser.add_argument("--describe", metavar="FOLDER", help="write meta.json for token files made elsewhere")
        parser.add_argument("--vocab_size", type=int, help="with --describe, for tokens of an unknown tokenizer")
        parser.add_argument("--dtype", default="uint16", choices=["uint16", "uint32"], help="with --describe")
    options = parser.parse_args(arguments)
    if getattr(options, "describe", None):
        folder = describe_token_files(options.describe, options.tokenizer, options.vocab_size, options.dtype)
    else:
        try:
            folder = prepare(SimpleNamespace(dataset=dataset, **vars(options)))
        except KeyboardInterrupt:
            raise UserError("interrupted; nothing was kept, run it again to start over") from None
    print(summary_of(folder))
