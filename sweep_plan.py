"""What a sweep file says, and the runs that follow from it: names, arguments, cost, and the learning rates to try.

A sweep file is a config file with a few names more. What it assigns beside them is shared by all of its runs:

    variants = {"llama": "config/arch_llama.py", "mamba": "config/arch_mamba.py --d_state=16"}
    sizes = {"5M": "--model_size=5M"}
    seeds = 3
    max_tokens = 20_000_000

A variant and a size are written as train.py would be told; a size may be {variant: arguments} where each has a shape of
its own. Arguments stand in the order: what is shared, the variant, the size, what the command line of the sweep says,
then seed and learning rate; what comes later wins.
"""

import dataclasses
import math
import shlex
import typing
from dataclasses import dataclass, field
from pathlib import Path

import configurator
import eval_probes  # noqa: F401  (fills its registry, so that probes' options are settings)
import model_matching as matching
from comparison_stats import t_quantile
from model_builder import ConfigurableGPT, on_meta
from model_flops import active_parameters, flops_per_token
from model_interop import starting_point
from training_data import BatchStream
from training_objectives import OBJECTIVE_REGISTRY
from user_errors import UserError

FIRST_SEED = 1337


@dataclass(frozen=True)
class SweepConfig:
    # -- the sweep
    sweep_name: str | None = None  # folder under runs_dir; None is the name of the sweep file
    variants: dict = field(default_factory=dict)  # {label: 'config/arch_llama.py --bias=True'}: what is compared
    sizes: dict = field(
        default_factory=dict
    )  # {label: '--model_size=5M'}: every variant is trained at each; {label: {variant: '...'}} for shapes of their own
    seeds: int | tuple = 3  # how many, from 1337 on, or which
    learning_rates: tuple = ()  # tried for each variant and size before the runs; () takes each variant's own
    weight_decays: tuple = ()  # tried with each of them
    tuning_fraction: float = 0.25  # length of a trial over that of a run
    seed_spread: float = 0.01  # standard deviation of the loss over seeds that the plan assumes
    plan_only: bool = False  # show the plan and leave
    timing_steps: int = 3  # steps of each variant and size that are timed for the plan; 0 estimates no time

    # -- where the runs go
    executor: str = "local"  # local, or slurm (pip install submitit)
    at_once: int = 0  # runs at the same time; 0 is one for each device here, and all of them on Slurm
    nodes: int = 1  # machines of a run, on Slurm
    processes_per_node: int = 1  # GPUs, or processes on a CPU, of a run on one machine; above 1 torchrun starts them
    slurm_partition: str | None = None  # None is the cluster's own choice
    slurm_minutes: int = 1440  # after which Slurm ends a run; it is taken up again


OWN_FIELDS = {field_.name: field_ for field_ in dataclasses.fields(SweepConfig)}
OWN_TYPES = typing.get_type_hints(SweepConfig)


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was read."""

    config: SweepConfig
    shared: dict  # settings that the sweep's files give to every run
    overrides: dict  # settings that its command line gives to every run
    sources: list  # [(file name, text)]
    models: dict = field(default_factory=dict)  # {(variant, size): architecture}, filled as runs are planned

    @property
    def seeds(self):
        if isinstance(self.config.seeds, int):
            return tuple(range(FIRST_SEED, FIRST_SEED + self.config.seeds))
        return self.config.seeds

    @property
    def tunes(self):
        return bool(self.config.learning_rates or self.config.weight_decays)


@dataclass(frozen=True)
class PlannedRun:
    """One call of train.py."""

    variant: str
    size: str
    seed: int
    name: str  # of its run folder
    arguments: tuple  # for train.py, without run_name and runs_dir
    settings: configurator.Settings
    tokens: int

    @property
    def cell(self):
        return self.variant, self.size


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_sweep(arguments):
    """Sweep of a command line: sweep files, then `--key=value` for the sweep or for every run.

    Raises:
        UserError: no variant, a name that is no setting, a value of another type, a contradiction.
    """
    types = {**configurator.setting_types(), **OWN_TYPES}
    own, shared, overrides, sources = {}, {}, {}, []
    for kind, item in configurator.split_arguments(arguments, types):
        if kind == "file":
            seen = {**{name: default_of(f) for name, f in OWN_FIELDS.items()}, **shared, **own}
            assigned = configurator.exec_config_file(item, seen, types)
            sources.append((Path(item).name, Path(item).read_text(encoding="utf-8")))
            own.setdefault("sweep_name", Path(item).stem.removeprefix("sweep_"))
            target = shared
        else:
            assigned = {item[0]: configurator.parse_value(*item, types)}
            target = overrides
        own.update({name: value for name, value in assigned.items() if name in OWN_FIELDS})
        target.update({name: value for name, value in assigned.items() if name not in OWN_FIELDS})
    sweep = Sweep(SweepConfig(**own), shared, overrides, sources)
    check(sweep)
    return sweep


def default_of(field_):
    return field_.default if field_.default is not dataclasses.MISSING else field_.default_factory()


def check(sweep):
    """Refuse what no sweep can be."""
    config = sweep.config
    if not config.variants:
        raise UserError("a sweep needs variants = {'label': 'config/arch_llama.py', ...}; see config/sweep_*.py")
    for name in ("variants", "sizes"):
        for label, text in getattr(config, name).items():
            if name == "sizes" and isinstance(text, dict) and isinstance(label, str):
                check_size(config, label, text)
            elif not isinstance(label, str) or not isinstance(text, str):
                raise UserError(f"{name} must map labels to arguments of train.py, and {label!r} is mapped to {text!r}")
            if not label or set(label) & set('/\\:*?"<>| '):
                raise UserError(
                    f"{name}: the label {label!r} cannot be part of a folder's name; take letters and digits"
                )
    for name in ("learning_rates", "weight_decays"):
        for value in getattr(config, name):
            if type(value) not in (int, float) or value < 0 or (name == "learning_rates" and value == 0):
                raise UserError(f"{name} must be numbers above 0, and one is {value!r}")
    seeds = sweep.seeds
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={config.seeds!r} must be a number of seeds or different whole numbers")
    if config.executor not in ("local", "slurm"):
        raise UserError(f"executor={config.executor!r} does not exist (known: local, slurm)")
    for name, least in (
        ("at_once", 0),
        ("timing_steps", 0),
        ("nodes", 1),
        ("processes_per_node", 1),
        ("slurm_minutes", 1),
    ):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)} must be at least {least}")
    if config.nodes > 1 and config.executor == "local":
        raise UserError(f"nodes={config.nodes} needs executor='slurm', and executor='local' has this machine alone")
    if not 0 < config.tuning_fraction <= 1:
        raise UserError(f"tuning_fraction={config.tuning_fraction} must lie in (0, 1]")
    for name in ("run_name", "runs_dir", "seed", "init_from"):
        if name in sweep.shared or (name in sweep.overrides and name != "runs_dir"):
            raise UserError(f"{name} is chosen for each run by the sweep; drop it (sweep_name and seeds are settable)")


def check_size(config, label, shapes):
    """Refuse a size that leaves out a variant, or has one that does not exist."""
    for variant in sorted({*shapes} ^ {*config.variants}, key=str):
        what = "has no shape for" if variant in config.variants else "names"
        raise UserError(
            f"sizes: {label!r} {what} the variant {variant!r}; the variants are {', '.join(config.variants)}"
        )
    for variant, text in shapes.items():
        if not isinstance(text, str):
            raise UserError(f"sizes: {label!r} must map {variant!r} to arguments of train.py, not to {text!r}")


def as_arguments(settings):
    """{'bias': True} -> ['--bias=True'], as train.py reads them."""
    return [f"--{name}={value if isinstance(value, str) else repr(value)}" for name, value in settings.items()]


# ---- the runs --------------------------------------------------------------------------------------------------------


def cells(sweep):
    """[(variant, size)] in the order of the file; the size is '' where a sweep has none."""
    return [(variant, size) for size in sweep.config.sizes or {"": ""} for variant in sweep.config.variants]


def plan_run(sweep, dataset, variant, size, seed, tried=None, fraction=1.0, extra=None):
    """PlannedRun of one variant at one size and seed.

    Args:
        dataset: of `training_data.load_dataset`, which decides vocabulary and length in epochs.
        tried: {'learning_rate': ..., 'weight_decay': ...} that take the place of the variant's own.
        fraction: of the run's length: below 1 for a trial.
        extra: further settings.
    """
    arguments = run_arguments(sweep, variant, size) + as_arguments({"seed": seed, **(tried or {}), **(extra or {})})
    settings = with_model(sweep, (variant, size), configurator.read_settings(arguments), dataset)
    tokens = planned_tokens(settings, dataset, fraction)
    if fraction < 1:
        arguments.append(f"--max_tokens={tokens}")
        settings = with_model(sweep, (variant, size), configurator.read_settings(arguments), dataset)
    words = [variant, *([size] if size else [])]
    if fraction < 1:
        words += [f"{word}{value:.3g}" for word, value in zip(("lr", "wd"), (tried or {}).values(), strict=False)]
    return PlannedRun(variant, size, seed, "-".join([*words, f"s{seed}"]), tuple(arguments), settings, tokens)


def run_arguments(sweep, variant, size):
    """What train.py is told of a variant at a size, but for seed and learning rate.

    Raises:
        UserError: as train.py would, with the variant in front.
    """
    arguments = [
        *as_arguments(sweep.shared),
        *shlex.split(sweep.config.variants[variant]),
        *shlex.split(arguments_of_size(sweep.config, variant, size)),
        *as_arguments({name: value for name, value in sweep.overrides.items() if name != "runs_dir"}),
    ]
    try:
        settings = configurator.read_settings(arguments)
    except UserError as error:
        raise UserError(f"variant '{variant}'{f' at size {size!r}' if size else ''}: {error}") from None
    if settings.train.init_from == "resume":
        raise UserError(f"variant '{variant}' has init_from='resume'; a sweep resumes its own runs by itself")
    return arguments


def with_model(sweep, cell, settings, dataset):
    """The settings with the architecture that train.py will build: of `init_from`, for this data, of matched shape.

    It is worked out once for a cell: neither seed nor learning rate changes it, and to solve a shape takes a second.
    """
    if cell not in sweep.models:
        found, _ = starting_point(settings)
        extra_tokens = OBJECTIVE_REGISTRY[settings.train.objective].extra_tokens(settings.train)
        found = configurator.with_vocabulary(found, dataset.vocab_size + extra_tokens)
        sweep.models[cell] = (matching.with_matched_shape(found) if settings.train.match else found).model
    return dataclasses.replace(settings, model=sweep.models[cell])


def planned_tokens(settings, dataset, fraction=1.0):
    """Tokens that a run reads, in whole steps; `fraction` of its length for a trial."""
    stream = BatchStream(dataset, settings.model.block_size, settings.train.sequences_per_step, settings.train.seed)
    steps = settings.train.total_steps(stream.tokens_per_step, stream.steps_per_epoch)
    return max(1, math.ceil(steps * fraction)) * stream.tokens_per_step


def arguments_of_size(config, variant, size):
    """What a size adds for a variant: the same for all, or as the size says by variant."""
    text = config.sizes[size] if size else ""
    return text if isinstance(text, str) else text[variant]


@dataclass(frozen=True)
class Cost:
    """What a variant at a size costs, counted without training it."""

    parameters: int
    active_parameters: int
    flops_per_token: float  # of training


def cost_of(settings):
    """Cost of the model of `settings`, built without memory."""
    kind = OBJECTIVE_REGISTRY[settings.train.objective]
    with on_meta():
        model = ConfigurableGPT(settings.model, heads=kind.heads)
        flops = flops_per_token(model, head_fraction=kind(model, settings.train).head_fraction)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, active_parameters(model), flops.training)


def detectable_difference(n_seeds, spread, power=0.8):
    """The smallest difference between two variants that n seeds show in 4 of 5 sweeps; None for one seed.

    For a paired t test at 95%: (t_0.975 + t_power) s sqrt(2 / n) with n - 1 degrees of freedom, where the two runs of a
    seed differ by sqrt(2) s if sharing a seed makes them no more alike than that.
    """
    if n_seeds < 2:
        return None
    one_sided = 2 * power - 1  # P(|T| < t) where P(T < t) = power
    return (t_quantile(n_seeds - 1) + t_quantile(n_seeds - 1, one_sided)) * spread * math.sqrt(2 / n_seeds)


# ---- learning rates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What the trials of one variant at one size found."""

    settings: dict  # {'learning_rate': ..., 'weight_decay': ...}
    loss: float | None  # of the best trial
    n_trials: int
    tokens: int  # read by all trials
    note: str  # a warning, or ''


def trials(sweep):
    """[{'learning_rate': ..., 'weight_decay': ...}] to try: the same for every variant and size."""
    rates, decays = sweep.config.learning_rates or (None,), sweep.config.weight_decays or (None,)
    named = [{"learning_rate": rate, "weight_decay": decay} for decay in decays for rate in sorted(rates, key=_or_zero)]
    return [{name: float(value) for name, value in trial.items() if value is not None} for trial in named]


def _or_zero(value):
    return value or 0.0


def best_of(results, tokens):
    """Tuned from [(trial, loss)]; a loss is None or NaN where a trial failed or diverged.

    The rate is the lowest point of the parabola through the best trial and its neighbours in log rate, at the best
    trial's weight decay; the best trial's own where it stands at the edge of the grid.
    """
    finite = [(trial, loss) for trial, loss in results if loss is not None and math.isfinite(loss)]
    if not finite:
        return Tuned({}, None, len(results), tokens, "every trial failed or diverged")
    best, loss = min(finite, key=lambda pair: pair[1])
    chosen, note = dict(best), ""
    if "learning_rate" in best:
        curve = sorted((t["learning_rate"], x) for t, x in results if t.get("weight_decay") == best.get("weight_decay"))
        chosen["learning_rate"], note = lowest_rate(curve, best["learning_rate"])
    return Tuned(chosen, loss, len(results), tokens, note)


def lowest_rate(curve, best):
    """(rate, warning) from [(rate, loss)] in order of the rate, `best` being the rate of the lowest loss."""
    rates = [rate for rate, _ in curve]
    place = rates.index(best)
    if len(curve) < 3:
        return best, "fewer than three rates: no curve to find the lowest point of"
    if place in (0, len(curve) - 1):
        which, way = ("lowest", "lower") if place == 0 else ("highest", "higher")
        return best, f"the best learning rate, {best:g}, is the {which} tried; widen learning_rates with {way} ones"
    around = curve[place - 1 : place + 2]
    if not all(loss is not None and math.isfinite(loss) for _, loss in around):
        return best, f"a neighbour of the best learning rate, {best:g}, diverged; a finer grid would place it better"
    return float(f"{math.exp(parabola_minimum(around)):.3g}"), ""


def parabola_minimum(points):
    """log rate at the lowest point of the parabola through three (rate, loss), the middle loss the least."""
    (x0, y0), (x1, y1), (x2, y2) = [(math.log(rate), loss) for rate, loss in points]
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:  # three equal losses
        return x1
    return x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)
