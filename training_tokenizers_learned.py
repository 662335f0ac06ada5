"""Tokenizers learned here, over GPT-2's printable stand-ins for the 256 bytes: no text is ever unknown.

tokenizer = UnigramTokenizer.learn(documents, vocab_size=4096)
scored_pieces = learn_unigram({"Ġfish": 12, ...}, n_pieces=4095)
"""

import json
import math
from collections import Counter

import numpy as np

from training_tokenizers_base import (
    BYTE_OF_CHARACTER,
    END_OF_DOCUMENT,
    TOKENIZER_REGISTRY,
    Tokenizer,
    as_text,
    byte_characters,
    last_cut,
)
from user_errors import UserError

# What `learn` reads of the training split: more text barely moves a vocabulary, and the counts must fit in memory.
LEARN_FROM_BYTES = 2**26


class LearnedTokenizer(Tokenizer):
    """A model of the `tokenizers` library plus one token, the last, that ends a document.

    The library does not know the last token, so that no text can spell it.
    """

    learns_from = "train"
    takes_vocab_size = True

    def __init__(self, library_tokenizer):
        self.library_tokenizer = library_tokenizer
        id_of_piece = library_tokenizer.get_vocab()
        pieces = [b""] * len(id_of_piece)
        for piece, i in id_of_piece.items():
            pieces[i] = bytes([BYTE_OF_CHARACTER[character] for character in piece])
        self.pieces = [*pieces, END_OF_DOCUMENT.encode("utf-8")]
        self.end_of_document_id = len(pieces)

    @classmethod
    def learn(cls, documents=(), vocab_size=None, ends_documents=True):
        if vocab_size is None or vocab_size <= 257:
            raise UserError(
                f"tokenizer_vocab_size={vocab_size} is too small for tokenizer={cls.name}: the 256 bytes and the end "
                "of a document come first, so ask for more than 257"
            )
        return cls(cls.learn_model(first_bytes(documents, LEARN_FROM_BYTES), vocab_size - 1))

    @classmethod
    def learn_model(cls, texts, n_pieces):
        """A library tokenizer with at most n_pieces pieces, the 256 bytes among them."""
        raise NotImplementedError

    @classmethod
    def from_meta(cls, meta):
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(json.dumps(meta["model"])))

    def to_meta(self):
        return {**super().to_meta(), "model": json.loads(self.library_tokenizer.to_str())}

    def to_library(self):
        import tokenizers
        from tokenizers import decoders

        tokenizer = tokenizers.Tokenizer.from_str(self.library_tokenizer.to_str())
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
        return tokenizer

    def encode_text(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        pieces = [list(short_pieces(text)) for text in texts]
        encodings = iter(self.library_tokenizer.encode_batch_fast([piece for row in pieces for piece in row]))
        rows = [[i for _ in row for i in next(encodings).ids] for row in pieces]
        return [np.array(row, dtype=np.int64) for row in rows]


def short_pieces(text, n_characters=2**13):
    """A text in pieces that encode to its tokens: the library encodes the texts of a batch on all cores, and needs
    less memory and time for many short ones."""
    start = 0
    while len(text) - start > n_characters:
        cut = last_cut(text[start : start + n_characters])
        if cut == 0:  # a word longer than a piece: it must stay whole
            break
        yield text[start : start + cut]
        start += cut
    yield text[start:]


def first_bytes(documents, n_bytes):
    """Pieces of the first documents, about n_bytes together."""
    for document in documents:
        text = as_text(document)
        yield from short_pieces(text)
        n_bytes -= len(text)
        if n_bytes <= 0:
            return


def split_into_words():
    """GPT-2's pattern of words, in byte characters. A word of 64 bytes ends there: wordpiece looks for the longest
    match, which over one 'word' of a million equal signs would never end."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(64)])


@TOKENIZER_REGISTRY("bpe")
class BPETokenizer(LearnedTokenizer):
    """Byte-level BPE: the pair seen most often becomes a token, again and again."""

    name = "bpe"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        import tokenizers
        from tokenizers import models, trainers

        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split_into_words()
        trainer = trainers.BpeTrainer(
            vocab_size=n_pieces, min_frequency=2, initial_alphabet=byte_characters(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


@TOKENIZER_REGISTRY("wordpiece")
class WordPieceTokenizer(LearnedTokenizer):
    """The pieces that BPE finds, applied as BERT does: the longest that fits, from the left. Pieces inside a word carry
    no '##', because the space is part of the piece that starts one."""

    name = "wordpiece"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        import tokenizers
        from tokenizers import models

        id_of_piece = BPETokenizer.learn_model(texts, n_pieces).get_vocab()
        model = models.WordPiece(id_of_piece, unk_token="!", continuing_subword_prefix="", max_input_chars_per_word=64)
        tokenizer = tokenizers.Tokenizer(model)  # unk_token must be a piece; with all bytes known it is never used
        tokenizer.pre_tokenizer = split_into_words()
        return tokenizer


@TOKENIZER_REGISTRY("unigram")
class UnigramTokenizer(LearnedTokenizer):
    """Pieces with probabilities; a text becomes its most probable sequence (Kudo 2018, https://arxiv.org/abs/1804.10959)."""

    name = "unigram"

    @classmethod
    def learn_model(cls, texts, n_pieces):
        words = split_into_words()
        counts = Counter()
        for text in texts:
            counts.update(word for word, _ in words.pre_tokenize_str(text))
        tokenizer = unigram_library_tokenizer(learn_unigram(counts, n_pieces))
        tokenizer.pre_tokenizer = words
        return tokenizer


# -- learning a unigram model. The library's own trainer gives another vocabulary each time it runs (the order of a hash
#    map decides between equals), and a dataset that cannot be made twice cannot be compared. This one is repeatable.

MAX_PIECE_LENGTH = 16
MAX_WORDS = 500_000  # the most frequent ones; the tail of a large corpus is misspellings
SEED_PIECES = 10  # times the size asked for
KEPT_PER_ROUND = 0.75  # as SentencePiece


def learn_unigram(word_counts, n_pieces):
    """[(piece, log probability)]: many frequent substrings, of which the least useful are dropped round by round."""
    ranked = sorted(word_counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
    words, counts = [word for word, _ in ranked], np.array([count for _, count in ranked], dtype=np.float64)
    scores = seed_pieces(ranked, SEED_PIECES * n_pieces)
    while True:
        for _ in range(2):
            usage = count_pieces(scores, words, counts)
            scores = log_probabilities(usage)
        if len(scores) <= n_pieces:
            return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        scores = drop_least_useful(scores, usage, max(n_pieces, int(len(scores) * KEPT_PER_ROUND)))


def seed_pieces(ranked_words, n_pieces):
    """The 256 bytes and the substrings that cover the most text, with log probabilities."""
    counts = Counter(dict.fromkeys(byte_characters(), 1))
    for word, count in ranked_words:
        for start in range(len(word)):
            for end in range(start + 1, min(start + MAX_PIECE_LENGTH, len(word)) + 1):
                counts[word[start:end]] += count
        if len(counts) > 20 * n_pieces + 2_000_000:  # a bound on memory: what was seen once so far goes
            counts = Counter({piece: n for piece, n in counts.items() if n > 1 or len(piece) == 1})
    longer = [(piece, n) for piece, n in counts.items() if len(piece) > 1 and n > 1]
    longer.sort(key=lambda item: (-item[1] * len(item[0]), item[0]))
    kept = {piece: n for piece, n in counts.items() if len(piece) == 1}
    kept.update(longer[: max(0, n_pieces - len(kept))])
    return log_probabilities(kept)


def log_probabilities(usage):
    """{piece: log probability} from {piece: count}; a piece that is never used keeps a little."""
    usage = {piece: max(count, 0.1) for piece, count in usage.items()}
    log_total = math.log(sum(usage.values()))
    return {piece: math.log(count) - log_total for piece, count in usage.items()}


def count_pieces(scores, words, counts):
    """{piece: uses} when every word is cut along its most probable path."""
    pieces = list(scores)
    tokenizer = unigram_library_tokenizer(list(scores.items()))
    uses = np.zeros(len(pieces))
    for start in range(0, len(words), 10_000):
        batch = tokenizer.encode_batch_fast(words[start : start + 10_000])
        ids = [encoding.ids for encoding in batch]
        weights = np.repeat(counts[start : start + 10_000], [len(row) for row in ids])
        uses += np.bincount(np.concatenate([np.array(row, np.int64) for row in ids]), weights, minlength=len(pieces))
    return dict(zip(pieces, uses.tolist(), strict=True))


def drop_least_useful(scores, usage, n_kept):
    """Keep the bytes, and the pieces whose absence would cost the corpus most likelihood."""

    def cost_of_absence(piece):
        return usage[piece] * (scores[piece] - best_path_without(piece, scores))

    kept = [piece for piece in scores if len(piece) == 1]
    longer = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: (-cost_of_absence(piece), piece))
    kept += longer[: n_kept - len(kept)]
    return {piece: scores[piece] for piece in kept}


def best_path_without(piece, scores):
    """The log probability of the best way to spell a piece by others."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            score = scores.get(piece[start:end])
            if score is not None and end - start < len(piece):
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def unigram_library_tokenizer(scored_pieces):
    import tokenizers
    from tokenizers import models

    return tokenizers.Tokenizer(models.Unigram(scored_pieces, unk_id=None, byte_fallback=False))
