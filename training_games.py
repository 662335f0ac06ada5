"""A two-team arcade game, simulated, and the true probability of winning it after every event.

    games = simulate(n_games=2000, seed=(0, 0))     # [Game(tokens, outcome, chances), ...]
    print(as_text(games[0].tokens[:4]))             # start gold:4-takes gold:3-takes blue:2-runs

Gold and blue each have a queen and four workers. There are three ways to win:

    military    the other queen has lost her three lives
    economic    twelve berries are in the own hive
    snail       the snail has been ridden from the middle to the own goal

A worker is free, carries a berry, is a warrior or rides the snail. It takes a berry, and brings it home or spends it
at a gate to become a warrior; warriors take lives of the other queen, cut down warriors and throw riders off. One event
is one token, so a game is START, its events, and one of six ends:

    tokens      start  gold:4-takes  gold:3-takes  ...  blue:3-takes  gold:2-brings  gold-wins-by-economic
    chances     0.500  0.501         0.500         ...  0.423         1.000          1.000

`chances` is the probability that gold wins, given the tokens so far. It is exact. Which event comes next depends on the
counts of carriers and warriors of both teams, on who rides and on where the snail is: the inner state, a Markov chain.
Berries and lost lives only grow. So with all of them fixed the probabilities solve one linear system, whose matrix is
always the same, and the systems are solved backwards from the last berry and life (`solve`). How strong gold is, is
hidden: one of three strengths, drawn at the start. The chances are the mean over these, weighted by how likely each
made the events so far (Bayes' rule).

Random bits come from counters (Philox, Salmon et al. 2011), so a game is the same on every machine. NumPy only.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

TEAMS = ("gold", "blue")
N_WORKERS = 4
FREE, CARRIER, WARRIOR, RIDER = range(4)  # what a worker is

# Of each team: (kind of event, tokens it has, what the worker was, what it is then). One token for each worker, or one.
KINDS = (
    ("takes", N_WORKERS, FREE, CARRIER),
    ("brings", N_WORKERS, CARRIER, FREE),
    ("arms", N_WORKERS, CARRIER, WARRIOR),  # the berry is spent
    ("falls", N_WORKERS, WARRIOR, FREE),
    ("mounts", N_WORKERS, FREE, RIDER),
    ("runs", N_WORKERS, FREE, FREE),
    ("thrown", 1, RIDER, FREE),
    ("rides", 1, RIDER, RIDER),  # the snail goes one step towards the own goal
    ("queen-dies", 1, None, None),
    ("queen-patrols", 1, None, None),
    ("queen-dives", 1, None, None),
    ("queen-tags", 1, None, None),
)
KIND = {kind: number for number, (kind, *_) in enumerate(KINDS)}
CLOCK = 2 * len(KINDS)  # an event of neither team
WAYS = ("military", "economic", "snail")


def token_names():
    """What each of the 69 tokens says."""
    names = ["padding", "start"] + [f"{team}-wins-by-{way}" for team in TEAMS for way in WAYS] + ["clock"]
    for team in TEAMS:
        for kind, n, *_ in KINDS:
            names += [f"{team}:{worker + 1}-{kind}" for worker in range(n)] if n > 1 else [f"{team}:{kind}"]
    return names


TOKENS = token_names()
VOCAB_SIZE = len(TOKENS)  # 69
PADDING, START = 0, 1
FIRST_OF_KIND = [TOKENS.index(f"{team}:1-{kind}" if n > 1 else f"{team}:{kind}")
                 for team in TEAMS for kind, n, *_ in KINDS] + [TOKENS.index("clock")]  # fmt: skip


def as_text(tokens):
    return " ".join(TOKENS[token] for token in tokens)


@dataclass(frozen=True)
class Rules:
    """Sizes of the game, and how fast things happen: relative weights of the events, per worker that can do them."""

    lives: int = 3  # of each queen
    berries: int = 12  # that fill a hive
    track: int = 3  # steps of the snail from the middle to either goal
    most: int = 2  # carriers, and warriors, that a team has at once
    strengths: tuple = (0.8, 1.0, 1.25)  # gold's, hidden: its rates are multiplied by it, blue's divided
    prior: tuple = (0.3, 0.4, 0.3)
    takes: float = 0.0300
    brings: float = 0.0031
    arms: float = 0.0200
    falls: float = 0.0300  # and as much again for each warrior of the other team
    mounts: float = 0.0080
    thrown: float = 0.0500
    thrown_by: float = 0.0500  # more for each warrior of the other team
    rides: float = 0.0066
    dies: float = 0.0002
    dies_by: float = 0.0007  # more for each warrior of the other team
    runs: float = 0.0200
    queen: float = 0.0200  # of each thing that a queen does
    clock: float = 0.0300


RULES = Rules()


class Inner(NamedTuple):
    """Inner states, as arrays or numbers: counts by team, who rides (0 nobody, 1 gold, 2 blue), where the snail is."""

    carriers: tuple
    warriors: tuple
    rider: object
    snail: object  # 0 to 2 track - 2, the middle is track - 1; gold's goal lies above


def inner_shape(rules):
    n = rules.most + 1
    return n, n, n, n, 3, 2 * rules.track - 1


@cache
def inner_states(rules):
    """Inner of all states: arrays (S,). Some of them never come about."""
    gold_c, gold_w, blue_c, blue_w, rider, snail = np.indices(inner_shape(rules)).reshape(6, -1)
    return Inner((gold_c, blue_c), (gold_w, blue_w), rider, snail)


def index_of(rules, inner):
    (gold_c, blue_c), (gold_w, blue_w) = inner.carriers, inner.warriors
    return np.ravel_multi_index((gold_c, gold_w, blue_c, blue_w, inner.rider, inner.snail), inner_shape(rules))


# -- the rules, as tables over the inner states


@cache
def probabilities(rules, strength):
    """(S, 25): how likely each kind of event comes next, gold's kinds first, then blue's, then the clock."""
    inner, columns = inner_states(rules), []
    for team, rival in ((0, 1), (1, 0)):
        pace = strength if team == 0 else 1 / strength
        carriers, warriors, rivals = inner.carriers[team], inner.warriors[team], inner.warriors[rival]
        rides = inner.rider == team + 1
        free = np.maximum(N_WORKERS - carriers - warriors - rides, 0)
        weights = {
            "takes": rules.takes * free * (carriers < rules.most),
            "brings": rules.brings * carriers * pace,
            "arms": rules.arms * carriers * (warriors < rules.most) * pace,
            "falls": rules.falls * warriors * (1 + rivals) / pace,
            "mounts": rules.mounts * free * (inner.rider == 0),
            "runs": rules.runs * free,
            "thrown": (rules.thrown + rules.thrown_by * rivals) * rides,
            "rides": rules.rides * rides * pace,
            "queen-dies": (rules.dies + rules.dies_by * rivals) / pace,
            "queen-patrols": rules.queen,
            "queen-dives": rules.queen,
            "queen-tags": rules.queen,
        }
        columns += [np.broadcast_to(weights[kind], free.shape) for kind in KIND]
    table = np.stack([*columns, np.full(len(inner.snail), rules.clock)], axis=1)
    return table / table.sum(axis=1, keepdims=True)


@cache
def transitions(rules):
    """(S, 25) int64: the inner state after each kind of event; -1 where the snail reaches a goal.

    What cannot come about leads anywhere.
    """
    inner, columns = inner_states(rules), []
    for team in range(2):
        for kind, _, before, after in KINDS:
            counts = {CARRIER: list(inner.carriers), WARRIOR: list(inner.warriors)}
            for mode, change in ((before, -1), (after, 1)):
                if mode in counts:
                    counts[mode][team] = np.clip(counts[mode][team] + change, 0, rules.most)
            rider = np.full_like(inner.rider, team + 1) if kind == "mounts" else inner.rider
            rider = np.zeros_like(rider) if kind == "thrown" else rider
            snail = inner.snail + (0 if kind != "rides" else 1 if team == 0 else -1)
            last = 2 * rules.track - 2
            there = index_of(rules, Inner(counts[CARRIER], counts[WARRIOR], rider, np.clip(snail, 0, last)))
            columns.append(np.where((snail < 0) | (snail > last), -1, there))
    return np.stack([*columns, np.arange(len(inner.snail))], axis=1)


def column(team, kind):
    return team * len(KINDS) + KIND[kind]


# -- the value of every state


@cache
def solve(rules, strength):
    """The probability that gold wins, (lives, lives, berries, berries, S): lives left less one, and berries brought, of
    gold and of blue, then the inner state.

    With Q the steps that keep berries and lives, and r what all other steps lead to, v = Q v + r. All states with as
    many lives left and berries brought together need only states already solved: one set of right hand sides.
    """
    P, after = probabilities(rules, strength), transitions(rules)
    n = len(P)
    leaving = {column(team, kind) for team in range(2) for kind in ("brings", "queen-dies")}
    Q = np.zeros((n, n))
    for event in {*range(P.shape[1])} - leaving:
        stays = after[:, event] >= 0
        np.add.at(Q, (np.flatnonzero(stays), after[stays, event]), P[stays, event])
    inverse = np.linalg.inv(np.eye(n) - Q)
    by_snail = P[:, column(0, "rides")] * (after[:, column(0, "rides")] < 0)

    L, B = rules.lives, rules.berries
    values = np.zeros((L, L, B, B, n))
    for lives in range(2 * L - 1):  # left in all, less two
        for berries in reversed(range(2 * B - 1)):
            layers = [(a, lives - a, c, berries - c) for a in range(L) for c in range(B)
                      if 0 <= lives - a < L and 0 <= berries - c < B]  # fmt: skip
            right = np.stack([by_snail + leaves(values, layer, P, after) for layer in layers], axis=1)
            for layer, value in zip(layers, (inverse @ right).T, strict=True):
                values[layer] = value
    return values


def leaves(values, layer, P, after):
    """(S,): the chance that the next event is a berry or a life, times the chance to win from there."""
    (gold_lives, blue_lives, gold_berries, blue_berries), B = layer, values.shape[2]
    gold_brings, blue_brings = column(0, "brings"), column(1, "brings")
    gold_dies, blue_dies = column(0, "queen-dies"), column(1, "queen-dies")
    full = gold_berries + 1 == B
    total = P[:, gold_brings] * (
        1.0 if full else values[gold_lives, blue_lives, gold_berries + 1, blue_berries, after[:, gold_brings]]
    )
    total = total + P[:, blue_dies] * (
        1.0 if blue_lives == 0 else values[gold_lives, blue_lives - 1, gold_berries, blue_berries]
    )
    if blue_berries + 1 < B:
        total += (
            P[:, blue_brings] * values[gold_lives, blue_lives, gold_berries, blue_berries + 1][after[:, blue_brings]]
        )
    if gold_lives > 0:
        total += P[:, gold_dies] * values[gold_lives - 1, blue_lives, gold_berries, blue_berries]
    return total


# -- playing


class Game(NamedTuple):
    tokens: np.ndarray  # (n,) uint16, START to the end
    outcome: int  # 1 where gold wins
    chances: np.ndarray  # (n,) float32, the probability that gold wins, given the tokens up to and with this one


def simulate(n_games, seed, rules=RULES):
    """[Game, ...], the same for the same seed; of a smaller n_games not the first of a larger one.

    Args:
        seed: an int, or a pair of them.
    """
    return Table(n_games, seed, rules).play()


class Table:
    """Games played side by side: arrays of the unfinished ones, which get shorter as games end."""

    def __init__(self, n_games, seed, rules):
        self.rules, self.after = rules, transitions(rules)
        self.P = np.stack([probabilities(rules, strength) for strength in rules.strengths])  # (K, S, 25)
        self.cumulative = self.P.cumsum(axis=-1)
        self.values = [solve(rules, strength) for strength in rules.strengths]
        self.bits = np.random.Philox(key=np.array(np.broadcast_to(seed, 2), dtype=np.uint64))
        self.game = np.arange(n_games)
        self.strength = np.searchsorted(np.cumsum(rules.prior), self.uniform(n_games), side="right")
        self.strength = np.minimum(self.strength, len(rules.prior) - 1)
        self.posterior = np.tile(rules.prior, (n_games, 1))  # (N, K)
        start = Inner((0, 0), (0, 0), 0, rules.track - 1)
        self.inner = np.full(n_games, index_of(rules, start))
        self.lives = np.full((n_games, 2), rules.lives - 1)
        self.berries = np.zeros((n_games, 2), dtype=np.int64)
        self.workers = np.full((n_games, 2 * N_WORKERS), FREE, dtype=np.int8)

    def uniform(self, n):
        """(n,) float64 in [0, 1), of the generator's raw bits, which no version of NumPy changes."""
        return (self.bits.random_raw(n) >> np.uint64(11)) * 2.0**-53

    def chances(self):
        """(N,): the probability that gold wins."""
        at = (*self.lives.T, *self.berries.T, self.inner)
        return (self.posterior * np.stack([values[at] for values in self.values], axis=1)).sum(axis=1)

    def play(self):
        columns = [(self.game, np.full(len(self.game), START), self.chances())]
        outcomes = np.zeros(len(self.game), dtype=np.int64)
        while len(self.game):
            event = self.draw()
            tokens = self.tokens_of(event)
            ended = self.apply(event)  # 0, or the token of the end
            chances = self.chances()
            over = ended > 0
            gold_won = ended < START + 1 + len(WAYS)
            chances[over] = gold_won[over]
            columns.append((self.game, tokens, chances))
            columns.append((self.game[over], ended[over], chances[over]))
            outcomes[self.game[over]] = gold_won[over]
            self.keep(~over)
        return gathered(columns, outcomes)

    def draw(self):
        """(N,) events, each by the strength of its game."""
        cumulative = self.cumulative[self.strength, self.inner]  # (N, 25)
        draws = self.uniform(len(self.game))[:, None] * cumulative[:, -1:]
        return (draws >= cumulative).sum(axis=1)

    def tokens_of(self, event):
        """(N,) tokens; which worker it is, is drawn from those that can, who then are what the event makes of them."""
        tokens, chance = np.array(FIRST_OF_KIND)[event], self.uniform(len(event))
        for team in range(2):
            crew = self.workers[:, team * N_WORKERS : (team + 1) * N_WORKERS]
            for kind, n_tokens, before, after in KINDS:
                rows = np.flatnonzero(event == column(team, kind))
                if before is None or len(rows) == 0:
                    continue
                can = crew[rows] == before  # (n, 4)
                nth = np.floor(chance[rows] * can.sum(axis=1)) + 1
                worker = (can.cumsum(axis=1) == nth[:, None]).argmax(axis=1)
                crew[rows, worker] = after
                tokens[rows] += worker if n_tokens > 1 else 0
        return tokens

    def apply(self, event):
        """Move every game on, and weigh the strengths by what happened. (N,): the token that ends it, or 0."""
        self.posterior *= self.P[:, self.inner, event].T
        self.posterior /= self.posterior.sum(axis=1, keepdims=True)
        there = self.after[self.inner, event]
        ended = np.zeros(len(event), dtype=np.int64)
        for team in range(2):
            self.berries[:, team] += event == column(team, "brings")
            self.lives[:, team] -= event == column(team, "queen-dies")
        for team, rival in ((0, 1), (1, 0)):
            ways = (
                self.lives[:, rival] < 0,
                self.berries[:, team] == self.rules.berries,
                (there < 0) & (event == column(team, "rides")),
            )
            for way, won in enumerate(ways):
                ended[won] = START + 1 + team * len(WAYS) + way
        over = ended > 0
        self.lives[over], self.berries[over] = 0, 0  # so that every game has a place in the tables
        self.inner = np.where(over, 0, there)
        return ended

    def keep(self, rows):
        for name in ("game", "strength", "posterior", "inner", "lives", "berries", "workers"):
            setattr(self, name, getattr(self, name)[rows])


def gathered(columns, outcomes):
    """[Game, ...] from [(games, their tokens, their chances), ...], one for each moment."""
    games, tokens, chances = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.argsort(games, kind="stable")
    ends = np.cumsum(np.bincount(games, minlength=len(outcomes)))[:-1]
    tokens = np.split(tokens[order].astype(np.uint16), ends)
    chances = np.split(chances[order].astype(np.float32), ends)
    return [Game(*parts) for parts in zip(tokens, outcomes.tolist(), chances, strict=True)]
