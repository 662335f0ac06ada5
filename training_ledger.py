"""The one ledger of a run: steps, tokens, FLOPs, seconds, evaluations, and steps that were skipped.

Seconds of training stand apart from those of evaluation; saving and compiling are in neither.
"""

import math
import statistics
from dataclasses import dataclass, field

# Every evaluation's row has these; what else is in it are scores of the objective's own, such as masked_accuracy.
EVALUATION_FIELDS = (
    "kind", "step", "tokens_processed", "tokens_scheduled", "val_loss", "perplexity", "bits_per_byte", "train_seconds",
    "flops", "seconds",
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
    non_finite_steps: int = 0
    status: str = "running"  # then finished, interrupted or failed
    evaluations: list = field(default_factory=list)
    speeds: list = field(default_factory=list)  # tokens per second of the logged steps

    SAVED = ("step", "tokens_supervised", "train_seconds", "eval_seconds", "non_finite_steps", "stream_hash")

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
            setattr(self, name, state[name])
        rows = [row for row in metrics_rows if row["step"] <= self.step]
        self.evaluations = [row for row in rows if row["kind"] == "eval"]
        self.speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "train" and row["step"] > 1]

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
            "tokens_per_second": statistics.median(self.speeds) if self.speeds else None,
            "flops_per_token": self.flops_per_token,
            "total_flops": self.flops,
            "non_finite_steps": self.non_finite_steps,
        }
