"""Local text files as a stream of texts: .txt, .jsonl (field "text") and .parquet (column "text").

    for text, ends_document in read_texts(Path("pages.jsonl")): ...
    for text, ends_document, place in read_placed_texts(path, place=saved): ...        # goes on behind that text

A place is JSON: a byte offset, a row, or a count of texts: a .txt is read again up to it, the others are not. A long
.txt comes in pieces of about a million characters, of which only the last ends its document. Line ends become "\\n" and
a byte order mark goes, so that a text is the same on every system.
"""

import json
from itertools import islice

from training_tokenizers_base import last_cut
from user_errors import UserError

PIECE_CHARACTERS = 2**20  # of a long text at once


def kind_of_file(path):
    """'.jsonl', '.parquet', or '.txt' for anything else that was named as input."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".jsonl", ".parquet") else ".txt"


def text_files(path):
    """The files to read at a path: itself, or what a folder holds, sorted by name."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".jsonl", ".parquet")]
    if not files:
        raise UserError(f"the folder {path} holds no .txt, .jsonl or .parquet files; give one that does")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def read_texts(path, separator=None):
    """Yield (text, ends_document) of one file."""
    return ((text, ends) for text, ends, _ in read_placed_texts(path, separator))


def read_placed_texts(path, separator=None, place=None):
    """Yield (text, ends_document, place) of one file; a place that was yielded goes on behind its text."""
    kind = kind_of_file(path)
    if kind == ".jsonl":
        return ((text, True, after) for text, after in read_json_lines(path, *(place or ())))
    if kind == ".parquet":
        return ((text, True, after) for text, after in read_parquet(path, place or 0))
    n_read = place or 0
    texts = islice(read_plain_text(path, separator), n_read, None)
    return ((text, ends, after) for after, (text, ends) in enumerate(texts, n_read + 1))


def read_plain_text(path, separator):
    """Pieces of one document, or whole documents where a separator stands between them."""
    if separator is not None and file_contains(path, separator):
        return ((text.strip(), True) for text in split_stream(read_characters(path), separator) if text.strip())
    return cut_between_words(read_characters(path))


def read_characters(path):
    """Yield a UTF-8 file in strings of about a million characters, with line ends as '\\n'."""
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            while text := file.read(PIECE_CHARACTERS):
                yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error


def cut_between_words(strings):
    """Yield (piece, is_last) with every cut before a space or newline that follows a word.

    Tokenizers cut there too (see `last_cut`), so that a text encoded in pieces gives the very tokens of the whole.
    """
    rest = ""
    for text in strings:
        rest += text
        cut = last_cut(rest)
        if cut == 0 and len(rest) > 8 * PIECE_CHARACTERS:
            cut = len(rest) - 1  # millions of characters without a space: cut anywhere rather than hold them all
        if cut:
            yield rest[:cut], False
            rest = rest[cut:]
    if rest:  # what is left is never empty, but for an empty file
        yield rest, True


def split_stream(strings, separator):
    """Yield what stands between separators; one may lie across two strings."""
    rest = ""
    for text in strings:
        *whole, rest = (rest + text).split(separator)
        yield from whole
    yield rest


def file_contains(path, separator):
    """Whether a separator occurs in the first million characters of a file."""
    return separator in next(read_characters(path), "")


def read_json_lines(path, offset=0, n_lines=0):
    """Yield (field 'text', [offset behind the line, its number]) of each line behind an offset in bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, n_lines + 1):
            offset += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise UserError(f"line {number} of {path} is not JSON ({error}); mend or remove it") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"line {number} of {path} has no field 'text' that holds a string; rename or add it")
            yield row["text"], [offset, number]


def read_parquet(path, n_read=0):
    """Yield (column 'text', number of rows so far) of each row behind the first n_read, a thousand rows in memory."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet needs pyarrow: pip install pyarrow, or give .txt or .jsonl") from error
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # else it holds whole files
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column 'text' (it has: {names}); rename the one to read")
            row, groups = groups_behind(file.metadata, n_read)
            for batch in file.iter_batches(batch_size=1000, row_groups=groups, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > n_read and text is not None:
                        yield text, row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); replace it") from error


def groups_behind(metadata, n_read):
    """(rows before them, the row groups that hold anything behind the first n_read rows)."""
    row = 0
    for group in range(metadata.num_row_groups):
        n_rows = metadata.row_group(group).num_rows
        if row + n_rows > n_read:
            return row, list(range(group, metadata.num_row_groups))
        row += n_rows
    return row, []
