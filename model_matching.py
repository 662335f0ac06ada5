"""Solve width, depth and heads so that two architectures have equal parameters, FLOPs or state.

    python train.py config/arch_mamba2.py --match=params --match_to=llama@5M

Nothing here knows an architecture: a shape is built on the meta device and counted by `model_flops`. What is counted:
- params: all of them, the tied head once, embedding and position tables included: what summary.json calls n_params.
- active_params: those that one token passes through; experts by their active fraction.
- flops: per token, for training, at block_size (`model_flops.CONVENTION`).
- state: float32 bytes that generating one sequence keeps at block_size tokens.

`matched` is a measured word: within 1% of the target. Beyond that the nearest shape is still taken, and called what it
is, with its miss.
"""

import dataclasses
import math
from functools import cached_property

from model_builder import ConfigurableGPT, on_meta
from model_config import ModelArchitectureConfig
from model_flops import active_parameters, flops_per_token, state_bytes
from training_config import read_count
from user_errors import UserError

TOLERANCE = 0.01  # DESIGN 4.5: within this, `matched` may be said
SHAPE = ("n_layer", "n_embd", "n_head")
WIDTH_STEPS = (64, 32, 16)  # widths that are multiples of these, the first best: matrix units work in such tiles
LAST_STEP = 8  # what they need at the least: tried where nothing usual comes within 1%
HEAD_STEP = 8  # widths of heads: what attention kernels are written for
MOST_WIDTH, MOST_LAYERS = 2**15, 2**10  # past these a target counts as out of reach
# Width over depth, depth in blocks of 12 n_embd^2 weights so that half as heavy a block may come twice. GPT-2's sizes
# have 64 to 33; the ends keep out shapes that nobody would train.
NATURAL_ASPECT, LEAST_ASPECT, MOST_ASPECT = 48, 4, 160


def costs(config):
    """{'params', 'active_params', 'flops', 'state'} of a config, built without memory.

    Raises:
        UserError: parts or numbers that do not go together.
    """
    with on_meta():
        model = ConfigurableGPT(config)
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "active_params": active_parameters(model),
        "flops": flops_per_token(model).training,
        "state": state_bytes(model, config.block_size),
    }


def reference_config(match_to, config):
    """The preset at a size that 'llama@5M' names, with `config`'s vocabulary and context; None for a number."""
    if not isinstance(match_to, str) or "@" not in match_to:
        return None
    preset, _, size = match_to.partition("@")
    same = {"vocab_size": config.vocab_size, "block_size": config.block_size}
    return ModelArchitectureConfig(arch_preset=preset, model_size=size, **same)


def record(config, match, match_to):
    """How a config's cost compares with what it is to equal, JSON-ready.

    Args:
        match: 'params', 'active_params', 'flops' or 'state'. match_to: a number, '5.4M', or 'llama@5M'.

    Returns:
        {'match', 'match_to', 'target', 'value', 'miss_percent', 'is_matched'}; the miss is signed, over the target.
    """
    target, value = _target(match, match_to, config), costs(config)[match]
    miss = value / target - 1
    return {"match": match, "match_to": match_to, "target": target, "value": value,
            "miss_percent": 100 * miss, "is_matched": abs(miss) <= TOLERANCE}  # fmt: skip


def sentence(record):
    """A `record` in words; it says `matched` of no more than 1%."""
    numbers = f"{record['match']} {record['value']:,.0f} for {record['target']:,.0f}"
    whose = f" of {record['match_to']}" if "@" in str(record["match_to"]) else ""
    verdict = "matched" if record["is_matched"] else f"the nearest shape, beyond {TOLERANCE:.0%}: do not call it equal"
    return f"{numbers}{whose} ({record['miss_percent']:+.2f}%): {verdict}"


def solve(config, match, match_to, fixed=()):
    """`config` with the n_layer, n_embd and n_head whose cost comes nearest to the target.

    Of the shapes within 1% the most usual one: width over depth as the reference has it, width a multiple of 64, then
    32, then 16, heads of 32, 64 or 128. Where none is within 1%, the nearest.

    Args:
        match, match_to: as in `record`.
        fixed: the names of SHAPE to keep as `config` has them.

    Raises:
        UserError: nothing is left to solve, the parts fit no shape, or the target is out of reach.
    """
    if {"n_layer", "n_embd"} <= set(fixed):
        raise UserError(
            f"match={match} has nothing to solve: n_layer={config.n_layer} and n_embd={config.n_embd} are both set; "
            "drop one of them"
        )
    return _Search(config, match, match_to, frozenset(fixed)).solve()


def with_matched_shape(settings):
    """Settings whose model has the shape that their match and match_to ask for; what the command named stays."""
    train = settings.train
    model = solve(settings.model, train.match, train.match_to, settings.named & {*SHAPE})
    return dataclasses.replace(settings, model=model)


def _target(match, match_to, config):
    reference = reference_config(match_to, config)
    return read_count("match_to", match_to) if reference is None else costs(reference)[match]


class _Search:
    """The shapes of one config, their costs, counted once each, and what speaks for them."""

    def __init__(self, config, match, match_to, fixed):
        self.config, self.match, self.match_to, self.fixed = config.replace(model_size=None), match, match_to, fixed
        self.target = _target(match, match_to, config)
        self.period = len(config.pattern())  # depth grows by whole repeats of block_pattern
        self.base = self.period  # costs are counted at this depth and twice of it, and extrapolated from there
        self.counted, self.heads_by_width = {}, {}

    def solve(self):
        """The best shape; a cost that was extrapolated is counted before it is believed."""
        best = self.best_shape()
        self.check_reach(*best)
        while not math.isclose(self.count(*best)[self.match], self.value(*best), rel_tol=1e-12):
            self.base *= 2  # the first blocks differ from the later ones
            best = self.best_shape()
        return self.shaped(*best)

    def best_shape(self):
        """The shape of least `preference`; widths that are odd multiples of 8 only where they come within 1%."""
        shapes = set()
        for step in (256, *WIDTH_STEPS, LAST_STEP):  # 256 so that large models need few counts
            near = self.shapes_near_target(step)
            shapes |= {shape for shape in near if step != LAST_STEP or self.preference(shape)[0] == 0}
            best = min(shapes, key=self.preference, default=None)
            if best is not None and self.preference(best)[:2] < (0, 1):  # within 1%, and of usual proportions
                return best
        if best is None:
            raise UserError(f"match={self.match} finds no shape for match_to={self.match_to}; set n_layer or n_embd")
        return best

    def preference(self, shape):
        """Lower is better: whole per cents beyond 1, then how unusual the shape is, then the miss."""
        n_layer, n_embd = shape
        miss = abs(self.value(n_layer, n_embd) / self.target - 1)
        percents = 0 if miss <= TOLERANCE else math.ceil(100 * miss)
        stretched = math.log2(self.aspect(n_layer, n_embd) / self.usual_aspect)
        uneven = next((i for i, step in enumerate(WIDTH_STEPS) if n_embd % step == 0), len(WIDTH_STEPS))
        oddness = head_oddness(n_embd // self.heads(n_embd), n_embd) if self.has_heads else 0
        # Squared: twice as wide or as narrow for its depth is still usual, five times is another kind of network.
        return percents, stretched**2 + 0.5 * uneven + oddness, miss

    # -- candidates

    def shapes_near_target(self, step):
        """{(n_layer, n_embd)} just below and just above the target, at widths that are multiples of `step`."""
        config = self.config
        if "n_embd" in self.fixed:
            return {(n_layer, config.n_embd) for n_layer in self.depths(config.n_embd, 1)}
        step = math.lcm(step, config.n_head) if "n_head" in self.fixed else step
        most = MOST_WIDTH // step
        if "n_layer" in self.fixed:
            near = _around(lambda k: self.value(config.n_layer, k * step), self.target, most)
            return {(config.n_layer, k * step) for k in near}
        first, last = (_around(lambda k: self.natural_aspect_of(k * step), aspect, most)[0]
                       for aspect in (LEAST_ASPECT, MOST_ASPECT))  # fmt: skip
        deepest = self.depths(first * step, self.period)
        if deepest[-1] + self.period > MOST_LAYERS:  # out of reach: spare the search
            return {(deepest[-1], first * step)}
        widths = range(first * step, last * step + 1, step)
        return {(n_layer, n_embd) for n_embd in widths for n_layer in self.depths(n_embd, self.period)
                if LEAST_ASPECT <= self.aspect(n_layer, n_embd) <= MOST_ASPECT}  # fmt: skip

    def depths(self, n_embd, step):
        """The depths, one pattern deep and `step` more each, just below and just above the target at one width."""
        most = (MOST_LAYERS - self.period) // step + 1
        near = _around(lambda k: self.value(self.period + (k - 1) * step, n_embd), self.target, most)
        return [self.period + (k - 1) * step for k in near]

    def natural_aspect_of(self, n_embd):
        """The aspect of the shape at this width that meets the target; grows with width."""
        return self.aspect(self.depths(n_embd, self.period)[0], n_embd)

    # -- costs

    def aspect(self, n_layer, n_embd):
        """Width over depth, depth in blocks of 12 n_embd^2 weights, of experts those that a token passes through."""
        one, two = (self.count(k * self.period, n_embd)["active_params"] for k in (1, 2))
        weights = max(1, two - one) / self.period * n_layer
        return 12 * n_embd**3 / weights

    @cached_property
    def usual_aspect(self):
        reference = reference_config(self.match_to, self.config)
        return NATURAL_ASPECT if reference is None else reference.n_embd / reference.n_layer

    @cached_property
    def has_heads(self):
        """Whether some part reads n_head: to a Mamba it is a number without a meaning."""
        with on_meta():
            model = ConfigurableGPT(self.config.replace(n_layer=self.period))
        return any(hasattr(module, "n_head") for module in model.modules())

    def value(self, n_layer, n_embd):
        """The cost to be matched; that of many blocks is extrapolated from two shorter models."""
        if n_layer <= 2 * self.base or n_layer % self.period:
            return self.count(n_layer, n_embd)[self.match]
        near, far = (self.count(depth, n_embd)[self.match] for depth in (self.base, 2 * self.base))
        return near + (far - near) * (n_layer - self.base) / self.base

    def count(self, n_layer, n_embd):
        if (n_layer, n_embd) not in self.counted:
            self.counted[n_layer, n_embd] = costs(self.shaped(n_layer, n_embd))
        return self.counted[n_layer, n_embd]

    def shaped(self, n_layer, n_embd):
        return self.config.replace(n_layer=n_layer, n_embd=n_embd, n_head=self.heads(n_embd))

    def heads(self, n_embd):
        """Heads for a width: as set, or the first of the usual head widths that the parts can be built with."""
        if "n_head" in self.fixed:
            return self.config.n_head
        if n_embd not in self.heads_by_width:
            self.heads_by_width[n_embd] = self.find_heads(n_embd)
        return self.heads_by_width[n_embd]

    def find_heads(self, n_embd):
        dims = [dim for dim in range(HEAD_STEP, 2 * usual_head(n_embd) + 1, HEAD_STEP) if n_embd % dim == 0]
        counts = [n_embd // dim for dim in sorted(dims, key=lambda dim: head_oddness(dim, n_embd))]
        refusal = None
        for n_head in counts or [math.gcd(n_embd, self.config.n_head)]:
            config = self.config.replace(n_layer=self.period, n_embd=n_embd, n_head=n_head)
            try:
                self.counted[self.period, n_embd] = costs(config)
                return n_head
            except UserError as error:
                refusal = refusal or error
        raise UserError(f"match={self.match} cannot build n_embd={n_embd}: {refusal}")

    def check_reach(self, n_layer, n_embd):
        miss = self.value(n_layer, n_embd) / self.target - 1
        if abs(miss) > 0.5:
            kept = ", ".join(f"{name}={getattr(self.config, name)}" for name in SHAPE if name in self.fixed)
            raise UserError(
                f"match_to={self.match_to} is out of reach{' with ' * bool(kept)}{kept}: the nearest shape, "
                f"n_layer={n_layer} and n_embd={n_embd}, has {self.match} {self.value(n_layer, n_embd):,.0f} for "
                f"{self.target:,.0f}; choose another target"
            )


def usual_head(n_embd):
    """The width of a head in published models of this width."""
    return 128 if n_embd >= 2048 else 64 if n_embd >= 256 else 32


def head_oddness(dim, n_embd):
    """How unusual heads this wide are: powers of two within an octave of the usual cost nothing, multiples of 16 a
    quarter, others a half; further away as many as octaves.
    """
    octaves = abs(math.log2(dim / usual_head(n_embd)))
    if octaves > 1:
        return octaves
    return (0 if dim & (dim - 1) == 0 else 0.25 if dim % 16 == 0 else 0.5) + octaves / 100  # the nearer of equals


def _around(f, target, most):
    """The largest k in [1, most] with f(k) <= target, f growing, and the one after it; [1] where f(1) is beyond."""
    if f(1) > target:
        return [1]
    low, high = 1, 2
    while high <= most and f(high) <= target:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if f(middle) <= target else (low, middle)
    return [low, low + 1] if low < most else [low]
