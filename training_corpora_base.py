"""What the datasets share: the class of a corpus, and its registry."""

from functools import partial
from itertools import islice
from pathlib import Path

from registry import Registry
from user_errors import UserError, did_you_mean

CORPUS_REGISTRY = Registry("dataset")
ONE_IN = 10  # documents for validation, or the last tenth of the text


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
