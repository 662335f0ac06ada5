"""The one ledger of a run: steps, tokens, FLOPs, seconds, joules, evaluations, and steps that were skipped.

Seconds and joules of training stand apart from those of evaluation; saving and compiling are in neither.
"""

import math
import statistics
import time
from dataclasses import dataclass, field

from user_errors import UserError

# Every evaluation's row has these; what else is in it are scores of the objective's own, such as masked_accuracy.
EVALUATION_FIELDS = (
    "kind", "step", "tokens_processed", "tokens_scheduled", "stream_hash", "val_loss", "perplexity", "bits_per_byte",
    "train_seconds", "train_joules", "flops", "seconds",
)  # fmt: skip


def own_scores(evaluation):
    """{name: number} of an evaluation's row that the objective adds to the scores of a language model."""
    return {name: value for name, value in evaluation.items() if name not in EVALUATION_FIELDS}


@dataclass
class Ledger:
    """Counters that a checkpoint carries (`state`), and the evaluations so far, which metrics.jsonl carries."""

    tokens_per_step: int
    flops_per_token: float  # training
    stream_hash: str
    step: int = 0
    tokens_supervised: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    train_joules: float | None = 0.0  # of all ranks' devices; None once a step was taken where one does not tell
    non_finite_steps: int = 0
    status: str = "running"  # then finished, interrupted or failed
    evaluations: list = field(default_factory=list)
    speeds: list = field(default_factory=list)  # tokens per second of the logged steps

    SAVED = ("step", "tokens_supervised", "train_seconds", "eval_seconds", "train_joules", "non_finite_steps",
             "stream_hash")  # fmt: skip

    @property
    def tokens_processed(self):
        return self.step * self.tokens_per_step

    @property
    def flops(self):
        return self.tokens_processed * self.flops_per_token

    def state(self):
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in self.SAVED}

    def restore(self, state, metrics_rows):
        """Continue from a checkpoint's state and the rows of metrics.jsonl, those logged until then."""
        for name in self.SAVED:
            setattr(self, name, state.get(name))  # train_joules: None in checkpoints from before it was kept
        rows = [row for row in metrics_rows if row["step"] <= self.step]
        self.evaluations = [row for row in rows if row["kind"] == "eval"]
        self.speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "train" and row["step"] > 1]

    def add_joules(self, by_rank):
        """Count these more: [joules of rank 0, of rank 1, ...], None where one was not told."""
        is_known = self.train_joules is not None and None not in by_rank
        self.train_joules = self.train_joules + sum(by_rank) if is_known else None

    def at_evaluation(self):
        """What an evaluation's row keeps of the training until then."""
        names = ("tokens_processed", "stream_hash", "train_seconds", "train_joules", "flops")
        return {name: getattr(self, name) for name in names}

    def diverged(self, config, n_steps, run_name):
        """The UserError for a run whose last n_steps were not finite."""
        return UserError(
            f"loss or gradient was not finite {n_steps} steps in a row, to step {self.step}; lower "
            f"learning_rate={config.learning_rate} and continue with --init_from=resume --run_name={run_name}, "
            f"or raise max_non_finite_steps={config.max_non_finite_steps}"
        )

    def best(self, among=None):
        """The evaluation with the lowest loss, of those at the steps in `among` where it is given; {} where none is."""
        scored = [row for row in self.evaluations if row["val_loss"] is not None and math.isfinite(row["val_loss"])]
        scored = [row for row in scored if among is None or row["step"] in among]
        return min(scored, key=lambda row: row["val_loss"], default={})

    def evaluated_at(self, step):
        return any(row["step"] == step for row in self.evaluations)

    def summary(self):
        """The counters as summary.json wants them."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {
            "status": self.status,
            "steps": self.step,
            "final_val_loss": last.get("val_loss"),
            "best_val_loss": self.best().get("val_loss"),
            "best_step": self.best().get("step"),
            "bits_per_byte": last.get("bits_per_byte"),
            **own_scores(last),
            "tokens_processed": self.tokens_processed,
            "tokens_supervised": self.tokens_supervised,
            "stream_hash": self.stream_hash,
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "train_joules": self.train_joules,
            "tokens_per_second": statistics.median(self.speeds) if self.speeds else None,
            "flops_per_token": self.flops_per_token,
            "total_flops": self.flops,
            "non_finite_steps": self.non_finite_steps,
        }


# ---- seconds and joules of steps -------------------------------------------------------------------------------------


class StepMeter:
    """A clock, and the device's own count of energy beside it, for what lies between `start` and `stop`.

    Args:
        device: torch.device of this rank.
        counter: a function that returns joules since any moment, or None where nothing tells; None finds NVML's.
    """

    def __init__(self, device, counter=None):
        self.counter = energy_counter(device) if counter is None else counter
        self.take_joules()

    def start(self):
        self.t0, self.joules0 = time.perf_counter(), self.counter()

    def stop(self):
        """Seconds since `start`."""
        seconds, joules = time.perf_counter() - self.t0, self.counter()
        is_known = None not in (self.joules, self.joules0, joules)
        self.joules = self.joules + joules - self.joules0 if is_known else None
        return seconds

    def take_joules(self):
        """Joules of the steps since this was last asked, None where some were not told."""
        joules = getattr(self, "joules", None)
        self.joules = None if self.counter() is None else 0.0
        return joules


def silent_counter():
    return None


def energy_counter(device):
    """A function that returns the joules that a CUDA device has used so far, or None where it cannot tell.

    NVML counts millijoules since the driver was loaded (Volta and later); before that it tells the power alone, which
    is then summed over time. Needs nvidia-ml-py. The whole board is counted, whoever else uses it; the host is not.
    """
    if device.type != "cuda":
        return silent_counter
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return nvml_counter(pynvml, board)
    except Exception:  # no NVML, no driver, a MIG slice, an AMD device: each has errors of its own
        return silent_counter


def nvml_counter(nvml, board):
    """The counter of a board: its total energy, or its power summed over time; errors later on tell nothing."""

    def total():
        return nvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000

    def power():
        return nvml.nvmlDeviceGetPowerUsage(board) / 1000

    try:
        total()
        return quiet(total, nvml.NVMLError)
    except nvml.NVMLError:
        power()
        return quiet(SummedPower(power), nvml.NVMLError)


def quiet(counter, error):
    """`counter`, with None for an error."""

    def read():
        try:
            return counter()
        except error:
            return None

    return read


class SummedPower:
    """Watts at each call -> joules since the first, by the trapezoid rule."""

    def __init__(self, watts, clock=time.perf_counter):
        self.watts, self.clock = watts, clock
        self.joules, self.last = 0.0, None

    def __call__(self):
        now = self.clock(), self.watts()
        if self.last is not None:
            self.joules += (now[0] - self.last[0]) * (now[1] + self.last[1]) / 2
        self.last = now
        return self.joules
