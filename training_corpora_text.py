"""Your own text, `dataset=text`: a .txt, .jsonl or .parquet file, or a folder of them."""

from functools import partial

from training_corpora_base import CORPUS_REGISTRY, ONE_IN, Corpus
from training_text_files import file_contains, kind_of_file, read_placed_texts, read_texts, text_files
from user_errors import UserError

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
