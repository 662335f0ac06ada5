"""Probes: small tasks with a known answer, each asking for one ability that an average loss hides.

    python train.py config/arch_llama.py config/size_probe.py --dataset=mqar --n_pairs=8    # a probe is a dataset
    python sweep.py config/sweep_mqar.py                                                    # a whole comparison
    python evaluate.py --probes induction mqar+n_pairs=2                                    # ask finished runs

A probe makes its examples on the spot. Example number i of a split is a pure function of i and the probe's options, so
the batch stream is what it is for text: a pure function of (seed, step), and validation is a fixed set. An example
fills one window, and only the places where an answer is due have targets.

`show('mqar', block_size=12)` prints an example; `chance` is the accuracy of the best guess that does not read the
prompt. `eval_probing.py` asks models that are there.
"""

import hashlib
import json
import math
from itertools import permutations

import numpy as np

from model_config import IGNORE_INDEX
from registry import options_of
from training_config import TrainConfig
from training_corpora import PROBE_REGISTRY
from training_data import Dataset, TokenWindows, keys_of, scrambled
from user_errors import UserError

FORMAT = 1  # of the examples: a probe whose examples change takes another, and so another fingerprint
TOKENS = {"train": 2**42, "val": 2**18}  # of the splits; a window of T tokens is an example
MAX_SYMBOLS = 2**17  # of a probe: each is a row of the embedding
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step from one state to the next


class Draws:
    """Random numbers for B examples, by counting and hashing (splitmix64): the same on every machine.

    Args:
        name: of the split; another name gives independent numbers.
        numbers: (B,) int64, which examples.
    """

    def __init__(self, name, numbers):
        self.name, self.numbers = name, np.asarray(numbers, dtype=np.int64).astype(np.uint64)

    def noise(self, what, n):
        """(B, n) uint64; `what` tells this draw from the others of an example."""
        key_in, key_out = keys_of("probe", self.name, what, n_keys=2)
        start = scrambled(self.numbers[:, None] ^ key_in)  # (B, 1)
        return scrambled(start + np.arange(n, dtype=np.uint64) * GOLDEN ^ key_out)

    def below(self, what, bound, n):
        """(B, n) int64, independent and uniform in [0, bound)."""
        return (self.noise(what, n) % np.uint64(bound)).astype(np.int64)

    def distinct(self, what, bound, n):
        """(B, n) int64, n different numbers of [0, bound), in random order."""
        return np.argsort(self.noise(what, bound), axis=1, kind="stable")[:, :n]


class Split:
    """What a Dataset has as `train` and `val`: so many windows, made when they are asked for."""

    def __init__(self, probe, name):
        self.probe, self.name = probe, name

    def __len__(self):
        return TOKENS[self.name] + 1

    def windows(self, block_size, split):
        """The examples by number, one a window.

        Raises:
            UserError: an example does not fit a window.
        """
        self.probe.check_block_size(block_size)
        return ProbeWindows(self, block_size, split)


class ProbeWindows(TokenWindows):
    """Windows of a Split; where one starts says which example it is."""

    def batch(self, starts):
        """{'inputs', 'targets'} of the windows at `starts`, int64 (B, T)."""
        split = self.tokens
        inputs, targets = split.probe.examples(Draws(split.name, starts // self.block_size), self.block_size)
        return {"inputs": inputs, "targets": targets}


class Probe(Dataset):
    """A dataset of examples that are computed.

    Args:
        settings: TrainConfig, whose options are the difficulty.

    Attributes:
        kind: the registered name.  name: with the options that are not at their defaults, 'mqar+n_pairs=8'.
        chance: accuracy of the best guess that does not read the prompt, exactly.
        least_length: tokens that an example needs.
        answers: the range of tokens that an answer may be.
        is_zero_shot: whether a language model may be asked, with its own tokens for the symbols.
    """

    is_zero_shot = False

    class Options:
        solved_at: float = 0.99  # a probe: the share of right answers that ends a run as solved; above 1 goes on

    def __init__(self, settings):
        self.options, self.kind = settings.options_for(type(self)), settings.dataset
        for name in ("tokenizer", "tokenizer_vocab_size", "variant", "input"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"{name}={getattr(settings, name)!r} is for text, and dataset={self.kind!r} is a probe, made of "
                    f"symbols of its own; drop {name}"
                )
        if not self.options.solved_at > 0:
            raise UserError(f"solved_at={self.options.solved_at} must be above 0; above 1 a run goes on to its end")
        self.set_up(self.options)
        if self.vocab_size > MAX_SYMBOLS:
            sizes = ", ".join(f"{name}={value}" for name, value in self.difficulty().items())
            raise UserError(f"dataset={self.kind!r} would have {self.vocab_size:,} symbols at {sizes}; take fewer")
        defaults = {name: option.default for name, option in options_of(type(self)).items()}
        changed = [f"{name}={value}" for name, value in self.difficulty().items() if value != defaults[name]]
        self.name = "+".join([self.kind, *changed])
        described = json.dumps([FORMAT, self.kind, self.difficulty()], sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode("utf-8")).hexdigest()
        self.folder, self.token_bytes = self.name, None
        splits = {split: {"tokens": n, "bytes": None} for split, n in TOKENS.items()}
        self.meta = {"tokenizer": {"name": None}, "splits": splits}
        self.train, self.val = Split(self, "train"), Split(self, "val")

    def difficulty(self):
        """{option: value} that the examples depend on."""
        return {name: value for name, value in vars(self.options).items() if name != "solved_at"}

    def set_up(self, options):
        """Check the options, and set what follows from them: vocab_size, answers, least_length.

        Raises:
            UserError: naming the option.
        """
        raise NotImplementedError

    def at_least(self, **bounds):
        """Refuse an option below its bound."""
        for name, least in bounds.items():
            value = getattr(self.options, name)
            if value < least:
                raise UserError(f"{name}={value} must be at least {least} in dataset={self.kind!r}")

    def check_block_size(self, block_size):
        """Refuse a window that an example does not fit into."""
        if block_size < self.least_length:
            shape = ", ".join(f"{name}={value}" for name, value in self.difficulty().items())
            raise UserError(
                f"block_size={block_size} is too short for dataset={self.kind!r}, whose examples need "
                f"{self.least_length} tokens at {shape}"
            )

    def examples(self, draws, T):
        """(inputs, targets) of the examples of `draws`, int64 (B, T); IGNORE_INDEX where no answer is due."""
        raise NotImplementedError

    @property
    def chance(self):
        return 1 / len(self.answers)

    @property
    def tokenizer_name(self):
        return f"symbols, chance {100 * self.chance:.3g}%"

    def facts(self):
        return {"probe": self.difficulty(), "chance": self.chance}

    def is_solved(self, scores):
        return scores["answer_accuracy"] >= self.options.solved_at

    def summary(self):
        return f"{self.name}: answers are right by chance in {100 * self.chance:.3g}%"


def blank(draws, T):
    """(inputs of zeros, targets of IGNORE_INDEX), int64 (B, T)."""
    shape = len(draws.numbers), T
    return np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)


def put(array, places, values):
    """array (B, T) takes values (B, n) at places (B, n)."""
    np.put_along_axis(array, places, values, axis=1)


# ---- recall ----------------------------------------------------------------------------------------------------------


@PROBE_REGISTRY("mqar")
class MultiQueryAssociativeRecall(Probe):
    """Pairs of key and value, then the keys again in any order with gaps between: which value did each have?

    Arora et al. 2023 (Zoology, arXiv:2312.04927, section 4). Keys and values of an example are distinct. Who knows the
    values and cannot bind them to keys is right in 1 of n_pairs. Unlike theirs, a key is as likely asked late as early.

    >>> show("mqar", block_size=12, n_pairs=2, n_keys=4, n_values=4)
    inputs   2 6 3 5 0 2 0 0 0 0 3 0
    answers  . . . . . 6 . . . . 5 .
    """

    is_zero_shot = True

    class Options:
        n_pairs: int = 4  # mqar: pairs to remember
        n_questions: int | None = None  # mqar: keys that are asked, drawn with repetition; None asks each key once
        n_keys: int = 64  # symbols that keys are drawn from
        n_values: int = 64  # symbols that values are drawn from

    def set_up(self, o):
        self.at_least(n_pairs=1, n_keys=1, n_values=2)
        for name in ("n_keys", "n_values"):
            if getattr(o, name) < o.n_pairs:
                raise UserError(f"{name}={getattr(o, name)} is too few for the different ones of n_pairs={o.n_pairs}")
        if o.n_questions is not None:
            self.at_least(n_questions=1)
        self.vocab_size = 1 + o.n_keys + o.n_values
        self.least_length = 2 * o.n_pairs + (o.n_questions or o.n_pairs)
        self.answers = range(1 + o.n_keys, self.vocab_size)

    def examples(self, draws, T):
        o, (inputs, targets) = self.options, blank(draws, T)
        n = o.n_pairs
        keys = 1 + draws.distinct("keys", o.n_keys, n)
        values = 1 + o.n_keys + draws.distinct("values", o.n_values, n)
        inputs[:, 0 : 2 * n : 2], inputs[:, 1 : 2 * n : 2] = keys, values
        places = 2 * n + draws.distinct("places", T - 2 * n, o.n_questions or n)
        if o.n_questions is not None:
            asked = draws.below("asked", n, o.n_questions)
            keys, values = (np.take_along_axis(each, asked, axis=1) for each in (keys, values))
        put(inputs, places, keys)
        put(targets, places, values)
        return inputs, targets


@PROBE_REGISTRY("induction")
class Induction(Probe):
    """Random symbols with a mark among them; the last token is the mark again: which symbol came after it before?

    Fu et al. 2022 (H3, arXiv:2212.14052, table 1), after the induction heads of Olsson et al. 2022.

    >>> show("induction", block_size=8, number=2, n_symbols=4)
    inputs   0 3 3 1 1 3 3 0
    answers  . . . . . . . 3
    """

    is_zero_shot = True

    class Options:
        n_symbols: int = 16  # induction, copying: symbols that an answer may be

    def set_up(self, o):
        self.at_least(n_symbols=2)
        self.vocab_size, self.least_length = 1 + o.n_symbols, 3
        self.answers = range(1, self.vocab_size)

    def examples(self, draws, T):
        inputs, targets = blank(draws, T)
        inputs += 1 + draws.below("symbols", self.options.n_symbols, T)
        mark = draws.below("mark", T - 2, 1)
        put(inputs, mark, 0)
        inputs[:, -1] = 0
        targets[:, -1:] = np.take_along_axis(inputs, mark + 1, axis=1)
        return inputs, targets


@PROBE_REGISTRY("copying")
class Copying(Probe):
    """Symbols, a pause as long as the window allows, then as many marks: say the symbols again, one at each mark.

    Arjovsky et al. 2016 (arXiv:1511.06464, section 4.1).

    >>> show("copying", block_size=9, number=1, n_copied=3, n_symbols=4)
    inputs   5 5 2 0 0 0 1 1 1
    answers  . . . . . . 5 5 2
    """

    class Options:
        n_copied: int = 8  # copying, selective_copying: symbols to say again
        n_symbols: int = 16  # induction, copying: symbols that an answer may be

    def set_up(self, o):
        self.at_least(n_copied=1, n_symbols=2)
        self.vocab_size, self.least_length = 2 + o.n_symbols, 2 * o.n_copied
        self.answers = range(2, self.vocab_size)

    def places(self, draws, T):
        """(B, n) ascending: where the symbols stand."""
        return np.tile(np.arange(self.options.n_copied), (len(draws.numbers), 1))

    def examples(self, draws, T):
        o, (inputs, targets) = self.options, blank(draws, T)
        symbols = 2 + draws.below("symbols", o.n_symbols, o.n_copied)
        put(inputs, self.places(draws, T), symbols)
        inputs[:, T - o.n_copied :] = 1
        targets[:, T - o.n_copied :] = symbols
        return inputs, targets


@PROBE_REGISTRY("selective_copying")
class SelectiveCopying(Copying):
    """Copying with the symbols anywhere before the marks, blanks between: what to keep depends on the content.

    Gu & Dao 2023 (Mamba, arXiv:2312.00752, section 4.1.1).

    >>> show("selective_copying", block_size=10, n_copied=3, n_symbols=4)
    inputs   2 4 0 0 0 0 2 1 1 1
    answers  . . . . . . . 2 4 2
    """

    def places(self, draws, T):
        n = self.options.n_copied
        return np.sort(draws.distinct("places", T - n, n), axis=1)


@PROBE_REGISTRY("needle")
class NeedleInNoise(Probe):
    """Pairs of key and value somewhere in noise that looks like values; at the end one key: which value did it have?

    After "needle in a haystack" tests of long contexts: what must be kept is a small share of what is read.

    >>> show("needle", block_size=10, number=1, n_needles=2, n_keys=4, n_values=4)
    inputs   5 5 4 5 0 6 7 3 5 3
    answers  . . . . . . . . . 5
    """

    is_zero_shot = True

    class Options:
        n_needles: int = 1  # needle: pairs in the noise, one of which is asked for
        n_keys: int = 64  # symbols that keys are drawn from
        n_values: int = 64  # symbols that values are drawn from

    def set_up(self, o):
        self.at_least(n_needles=1, n_keys=1, n_values=2)
        if o.n_keys < o.n_needles:
            raise UserError(f"n_keys={o.n_keys} is too few for the different ones of n_needles={o.n_needles}")
        self.vocab_size, self.least_length = o.n_keys + o.n_values, 2 * o.n_needles + 1
        self.answers = range(o.n_keys, self.vocab_size)

    def examples(self, draws, T):
        o, (inputs, targets) = self.options, blank(draws, T)
        inputs += o.n_keys + draws.below("noise", o.n_values, T)
        keys = draws.distinct("keys", o.n_keys, o.n_needles)
        # n gaps among T - 1 - n places, each then widened by one, so that no two pairs overlap
        places = np.sort(draws.distinct("places", T - 1 - o.n_needles, o.n_needles), axis=1) + np.arange(o.n_needles)
        put(inputs, places, keys)
        asked = draws.below("asked", o.n_needles, 1)
        inputs[:, -1:] = np.take_along_axis(keys, asked, axis=1)
        targets[:, -1:] = np.take_along_axis(inputs, np.take_along_axis(places, asked, axis=1) + 1, axis=1)
        return inputs, targets


# ---- state tracking and arithmetic -----------------------------------------------------------------------------------


class StateTracking(Probe):
    """A state that every token changes; at every answer_every-th token it is asked for."""

    class Options:
        answer_every: int = 1  # parity, permutations: tokens from one answer to the next; block_size asks at the end

    def set_up(self, o):
        self.at_least(answer_every=1)
        self.answers, self.least_length = range(self.vocab_size), o.answer_every

    def answered(self, states):
        """targets (B, T) from the states (B, T) after each token."""
        due = np.arange(1, states.shape[1] + 1) % self.options.answer_every == 0
        return np.where(due, states, IGNORE_INDEX)


@PROBE_REGISTRY("parity")
class Parity(StateTracking):
    """Bits; is the number of ones so far odd? Linear recurrences cannot say so where no eigenvalue is negative.

    Grazzi et al. 2024 (arXiv:2411.12537, section 4).

    >>> show("parity", block_size=8, number=2)
    inputs   0 1 0 1 0 0 1 1
    answers  0 1 1 0 0 0 1 0
    """

    vocab_size = 2

    def examples(self, draws, T):
        bits = draws.below("bits", 2, T)
        return bits, self.answered(np.cumsum(bits, axis=1) % 2)


@PROBE_REGISTRY("permutations")
class Permutations(StateTracking):
    """Permutations of n_objects things, one after the other: how do the things stand now?

    Merrill et al. 2024 (arXiv:2404.08819): from five objects on, attention and diagonal recurrences of constant depth
    cannot for any length, unless TC0 = NC1. Token i is permutation number i in lexicographic order, 0 leaves all as it
    is; the answer is the one permutation that those so far make, the first applied first.

    >>> show("permutations", block_size=8, number=1, n_objects=3)
    inputs   3 3 5 3 2 1 3 1
    answers  3 4 1 2 0 1 2 4
    """

    class Options:
        n_objects: int = 5  # permutations: things to keep track of, n! tokens; 3 is the group S3, 5 the group S5

    def set_up(self, o):
        self.at_least(n_objects=2)
        if o.n_objects > 6:
            raise UserError(f"n_objects={o.n_objects} would make {math.factorial(o.n_objects):,} tokens; 6 is the most")
        self.vocab_size, self.table = math.factorial(o.n_objects), composition_table(o.n_objects)
        super().set_up(o)

    def examples(self, draws, T):
        moves = draws.below("moves", self.vocab_size, T)
        states, state = np.empty_like(moves), np.zeros(len(moves), dtype=np.int64)
        for t in range(T):
            state = states[:, t] = self.table[state, moves[:, t]]
        return moves, self.answered(states)


def composition_table(n):
    """(n!, n!) int64: the number of 'first a, then b', where permutation p sends the thing at place i to place p[i]."""
    every = np.array(list(permutations(range(n))), dtype=np.int64)  # (n!, n)
    then = every[:, every].swapaxes(0, 1)  # [a, b, i] = b[a[i]]
    digits = n ** np.arange(n - 1, -1, -1)  # read as a number, lexicographic order is the order of numbers
    return np.searchsorted(every @ digits, then @ digits)


@PROBE_REGISTRY("modular_addition")
class ModularAddition(Probe):
    """Sums of n_terms numbers modulo a number, one after the other; the answer is due at the sign behind the terms.

    Power et al. 2022 (arXiv:2201.02177), whose problems stand alone.

    >>> show("modular_addition", block_size=8, number=3, modulus=5)
    inputs   2 2 5 2 1 5 5 5
    answers  . . 4 . . 3 . .
    """

    class Options:
        modulus: int = 97  # modular_addition: sums are taken modulo this; primes are the custom
        n_terms: int = 2  # modular_addition: numbers to add

    def set_up(self, o):
        self.at_least(modulus=2, n_terms=1)
        self.vocab_size, self.answers, self.least_length = o.modulus + 1, range(o.modulus), o.n_terms + 1

    def examples(self, draws, T):
        o, (inputs, targets) = self.options, blank(draws, T)
        inputs += o.modulus  # the sign, and what is left over at the end
        n = T // self.least_length
        terms = draws.below("terms", o.modulus, n * o.n_terms).reshape(len(inputs), n, o.n_terms)
        problems = inputs[:, : n * self.least_length].reshape(len(inputs), n, self.least_length)
        problems[..., :-1] = terms
        inputs[:, : n * self.least_length] = problems.reshape(len(inputs), -1)
        targets[:, o.n_terms : n * self.least_length : self.least_length] = terms.sum(-1) % o.modulus
        return inputs, targets


# ---- by hand ---------------------------------------------------------------------------------------------------------


def make_probe(name, **options):
    """The probe of that name with these options at other values than their defaults."""
    return PROBE_REGISTRY[name](TrainConfig(dataset=name, part_options=options))


def show(name, block_size, number=0, **options):
    """Print example `number` of the training split."""
    probe = make_probe(name, **options)
    probe.check_block_size(block_size)
    inputs, targets = probe.examples(Draws("train", [number]), block_size)
    width = len(str(probe.vocab_size - 1))
    for label, row in (("inputs", inputs[0]), ("answers", targets[0])):
        print(f"{label:<8}", *(f"{'.' if token == IGNORE_INDEX else token:>{width}}" for token in row.tolist()))
