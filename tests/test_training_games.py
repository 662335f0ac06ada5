"""The simulated game: its rules by a second reading of them, and its chances by value iteration and by playing."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import training_games as games
from training_games import CLOCK, KINDS, RULES, TEAMS, TOKENS, column, probabilities, simulate, solve, transitions

# Small enough to solve at once; strengths far enough apart that a few events betray them.
SMALL = replace(RULES, lives=2, berries=3, track=2, most=1, strengths=(0.25, 1.0, 4.0), takes=0.05, brings=0.08,
                mounts=0.01, dies_by=0.01)  # fmt: skip


@pytest.fixture(scope="module")
def played():
    return simulate(3000, 5, SMALL)


# ---- the rules ------------------------------------------------------------------------------------------------------


def test_the_vocabulary():
    assert len(TOKENS) == len(set(TOKENS)) == games.VOCAB_SIZE == 69
    assert games.as_text([1, 2]) == "start gold-wins-by-military"
    for number, first in enumerate(games.FIRST_OF_KIND[:-1]):
        team, kind = divmod(number, len(KINDS))
        n_tokens = KINDS[kind][1]
        assert all(TOKENS[first + i].endswith(f"-{KINDS[kind][0]}") for i in range(n_tokens if n_tokens > 1 else 0))
        assert TOKENS[first].startswith(TEAMS[team])


CHANGES = {
    "takes": ("free", "carrier"), "brings": ("carrier", "free"), "arms": ("carrier", "warrior"),
    "falls": ("warrior", "free"), "mounts": ("free", "rider"), "runs": ("free", "free"),
}  # fmt: skip


class Referee:
    """The rules once more, a token at a time, each worker by itself; refuses what cannot happen."""

    def __init__(self, rules):
        self.rules, self.snail = rules, 0
        self.workers = {team: ["free"] * 4 for team in TEAMS}
        self.berries, self.lives = dict.fromkeys(TEAMS, 0), dict.fromkeys(TEAMS, rules.lives)
        self.winner = None

    def hears(self, name):
        assert self.winner is None
        if name == "clock":
            return
        team, what = name.split(":")
        rival = TEAMS[1 - TEAMS.index(team)]
        if what[0].isdigit():
            self.moves(team, int(what[0]) - 1, what[2:])
            if what.endswith("brings"):
                self.berries[team] += 1
        elif what == "thrown":
            self.workers[team][self.workers[team].index("rider")] = "free"
        elif what == "rides":
            assert "rider" in self.workers[team]
            self.snail += 1 if team == "gold" else -1
        elif what == "queen-dies":
            self.lives[team] -= 1
        for side, other in ((team, rival), (rival, team)):
            goal = self.rules.track if side == "gold" else -self.rules.track
            if self.lives[other] == 0:
                self.winner = f"{side}-wins-by-military"
            elif self.berries[side] == self.rules.berries:
                self.winner = f"{side}-wins-by-economic"
            elif self.snail == goal:
                self.winner = f"{side}-wins-by-snail"

    def moves(self, team, worker, what):
        before, after = CHANGES[what]
        assert self.workers[team][worker] == before
        self.workers[team][worker] = after
        assert max(self.workers[team].count(mode) for mode in ("carrier", "warrior")) <= self.rules.most
        assert sum(crew.count("rider") for crew in self.workers.values()) <= 1


@pytest.mark.parametrize("rules", [SMALL, replace(SMALL, most=2, mounts=0.05, rides=0.05)], ids=["small", "wider"])
def test_games_keep_to_the_rules_and_end_as_they_say(rules):
    ways = Counter()
    for game in simulate(150, 3, rules):
        names, referee = [TOKENS[token] for token in game.tokens], Referee(rules)
        assert names[0] == "start"
        for name in names[1:-1]:
            referee.hears(name)
        assert names[-1] == referee.winner and game.outcome == names[-1].startswith("gold")
        ways[names[-1].rpartition("-")[2]] += 1
    assert set(ways) == {"military", "economic", "snail"}


def test_a_game_is_as_long_as_it_is_said_to_be():
    # Playing needs no values, so the rules of the real game are played with made-up ones.
    table = games.Table.__new__(games.Table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(games, "solve", lambda rules, strength: np.zeros((3, 3, 12, 12, len(probabilities(rules, 1.0)))))
        table.__init__(150, 11, RULES)
        found = table.play()
    lengths = [len(game.tokens) for game in found]
    assert 640 < np.mean(lengths) < 800 and max(lengths) <= 2561  # 717 over 60,000 games
    ways = Counter(TOKENS[game.tokens[-1]].rpartition("-")[2] for game in found)
    assert min(ways.values()) > 12 and len(ways) == 3


def test_games_are_a_pure_function_of_the_seed():
    one, same, other = simulate(5, (0, 7), SMALL), simulate(5, (0, 7), SMALL), simulate(5, (1, 7), SMALL)
    assert all(np.array_equal(a, b) for first, second in zip(one, same, strict=True)
               for a, b in zip(first, second, strict=True))  # fmt: skip
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(one, other, strict=True))
    raw = b"".join(game.tokens.astype("<u2").tobytes() for game in one)
    assert hashlib.sha256(raw).hexdigest()[:16] == "83db5f7b5172a8a1"  # of any machine, and any version of NumPy


# ---- the chances ----------------------------------------------------------------------------------------------------


def iterated(rules, strength, sweeps=4000):
    """The values by applying the rules over and over, from 'gold never wins' on; no system is solved."""
    P, after = probabilities(rules, strength), transitions(rules)
    L, B, n = rules.lives, rules.berries, len(P)
    values = np.zeros((L + 1, L + 1, B + 1, B + 1, n))  # lives left and berries brought, the ends of the game included
    values[1:, 0] = 1.0
    values[1:, 1:, B, :B] = 1.0
    inner = (slice(1, None), slice(1, None), slice(0, B), slice(0, B))
    for _ in range(sweeps):
        new = P[:, CLOCK] * values[inner]
        for event in range(CLOCK):
            team, kind = divmod(event, len(KINDS))
            name, there = KINDS[kind][0], after[:, event]
            place = list(inner)
            if name == "brings":
                place[2 + team] = slice(1, B + 1)
            if name == "queen-dies":
                place[team] = slice(0, L)
            led_to = values[tuple(place)][..., np.maximum(there, 0)]
            new = new + P[:, event] * np.where(there < 0, 1.0 - team, led_to)
        change = np.abs(new - values[inner]).max()
        values[inner] = new
        if change < 1e-13:
            return values[inner]
    raise AssertionError("the values did not settle")


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_what_is_solved_is_what_the_rules_lead_to_in_the_end(strength):
    rules = replace(SMALL, runs=0.0, queen=0.0, clock=0.01)  # little else happens, so that it settles soon
    np.testing.assert_allclose(solve(rules, strength), iterated(rules, strength), rtol=0, atol=1e-9)


def mirrored(rules, values):
    """The same with the teams changed over."""
    n, S = rules.most + 1, 2 * rules.track - 1
    shape = (rules.lives, rules.lives, rules.berries, rules.berries, n, n, n, n, 3, S)
    turned = values.reshape(shape).transpose(1, 0, 3, 2, 6, 7, 4, 5, 8, 9)[..., [0, 2, 1], ::-1]
    return turned.reshape(values.shape)


def test_no_team_is_favoured():
    for strength in SMALL.strengths:
        ours, theirs = solve(SMALL, strength), solve(SMALL, 1 / strength)
        possible = feasible(SMALL)
        np.testing.assert_allclose((ours + mirrored(SMALL, theirs))[..., possible], 1.0, rtol=0, atol=1e-12)


def feasible(rules):
    """(S,): inner states in which no team has more than four workers."""
    inner = games.inner_states(rules)
    crews = [inner.carriers[team] + inner.warriors[team] + (inner.rider == team + 1) for team in range(2)]
    return (crews[0] <= 4) & (crews[1] <= 4)


def test_the_real_game_is_solved_too():
    """With its own rules but fewer berries: each value is the mean over the next events, and the start is even."""
    rules = replace(RULES, berries=2, lives=2)
    values, P, after = solve(rules, 1.0), probabilities(rules, 1.0), transitions(rules)
    start = games.index_of(rules, games.Inner((0, 0), (0, 0), 0, rules.track - 1))
    assert values[1, 1, 0, 0, start] == pytest.approx(0.5, abs=1e-12)
    layer = values[0, 0, 1, 1]  # one life and one berry each: every such event ends the game
    ends = {
        column(0, "brings"): 1.0,
        column(1, "brings"): 0.0,
        column(0, "queen-dies"): 0.0,
        column(1, "queen-dies"): 1.0,
    }
    mean = np.zeros(len(P))
    for event in range(P.shape[1]):
        won = 1.0 if event == column(0, "rides") else 0.0
        mean += P[:, event] * ends.get(event, np.where(after[:, event] < 0, won, layer[after[:, event]]))
    np.testing.assert_allclose(mean, layer, rtol=0, atol=1e-12)


def test_outcomes_come_as_often_as_the_chances_say(played):
    """Monte Carlo at moments that do not depend on the future; the bounds are 4.5 standard errors."""
    for moment in (1, 20, 60):
        going = [game for game in played if len(game.tokens) > moment + 1]
        p = np.array([game.chances[moment] for game in going], dtype=np.float64)
        won = np.array([game.outcome for game in going])
        for low in np.arange(0, 1, 0.2):
            chosen = (p >= low) & (p < low + 0.2)
            if chosen.sum() > 50:
                error = np.sqrt((p[chosen] * (1 - p[chosen])).sum()) / chosen.sum()
                assert abs(won[chosen].mean() - p[chosen].mean()) < 4.5 * error, (moment, low)
    first = [game.chances[0] for game in played]
    assert np.allclose(first, 0.5, atol=1e-6)
    assert all(game.chances[-1] == game.chances[-2] == game.outcome for game in played)


def test_chances_move_without_drift(played):
    """A martingale: what the next token brings is zero in the mean, wherever one stands."""
    before = np.concatenate([game.chances[:-2] for game in played]).astype(np.float64)
    step = np.concatenate([np.diff(game.chances.astype(np.float64))[:-1] for game in played])
    for low in np.arange(0, 1, 0.1):
        chosen = (before >= low) & (before < low + 0.1)
        assert chosen.sum() > 500
        assert abs(step[chosen].sum()) < 4.5 * np.sqrt(np.square(step[chosen]).sum()), low


def test_chances_are_a_martingale_exactly():
    """After every token of a game: the mean over what may come next, by hidden strength, is what it is now."""
    K = len(SMALL.strengths)
    P = np.stack([probabilities(SMALL, strength) for strength in SMALL.strengths])
    table, seen = games.Table(60, 2, SMALL), 0
    while len(table.game) > 20:
        now, expected = table.chances(), np.zeros(len(table.game))
        seen += len(now)
        for event in range(P.shape[2]):
            likely = table.posterior * P[:, table.inner, event].T  # (N, K)
            possible = likely.sum(axis=1) > 0
            assert likely.shape == (len(now), K)
            after = copy_of(table, possible)
            ended = after.apply(np.full(possible.sum(), event))
            p = np.where(ended > 0, (ended < 5) * 1.0, after.chances())
            expected[possible] += likely.sum(axis=1)[possible] * p
        np.testing.assert_allclose(expected, now, rtol=0, atol=1e-12)
        event = table.draw()
        table.tokens_of(event)
        table.keep(table.apply(event) == 0)
    assert seen > 1000


def copy_of(table, rows):
    """The games of some rows, to try an event on."""
    other = games.Table.__new__(games.Table)
    vars(other).update(vars(table))
    other.lives, other.berries = table.lives.copy(), table.berries.copy()
    other.posterior = table.posterior.copy()
    other.keep(rows)
    return other


def test_a_strong_team_shows(played):
    """The hidden strength is learned from what happens: the same board stands for other chances after another past."""
    without = replace(SMALL, prior=(0.0, 1.0, 0.0))
    known = np.mean([np.square(game.chances - game.outcome).mean() for game in simulate(600, 1, without)])
    value = solve(SMALL, 1.0)
    start = games.index_of(SMALL, games.Inner((0, 0), (0, 0), 0, SMALL.track - 1))
    early = np.concatenate([game.chances[2:12] for game in played])
    assert np.unique(early.round(5)).size > 50 and 0 < known < 0.25
    assert value[1, 1, 0, 0, start] == pytest.approx(0.5) and early.min() < 0.4 and early.max() > 0.6
