"""Where rows go beside metrics.jsonl: TensorBoard and Weights & Biases.

for sink in sinks_of(config, folder): sink.log(row)         # a sink has log(row) and close()
"""

import json
import os
import time

from user_errors import UserError


def sinks_of(config, folder):
    """The sinks that the settings ask for, each ready to log."""
    sinks = []
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if config.wandb_log:
        sinks.append(WandbSink(config, folder))
    return sinks


def _scalars(row):
    """{'train/loss': 1.2, ...}: the numbers of a row, nested ones by path."""
    scalars = {}
    for key, value in row.items():
        if isinstance(value, dict):
            numbers = {name: item for name, item in value.items() if isinstance(item, (int, float))}
            scalars.update({f"{key}/{name}": item for name, item in numbers.items()})
        elif isinstance(value, (int, float)) and key not in ("step", "tokens_processed"):
            scalars[f"{row['kind']}/{key}"] = value
    return scalars


class TensorBoardSink:
    """Event files; every curve twice, against steps and, under `by_tokens/`, against tokens."""

    def __init__(self, folder):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(exist_ok=True)
        self.writer = EventFileWriter(str(folder))

    def log(self, row):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for prefix, step in (("", row["step"]), ("by_tokens/", row["tokens_processed"])):
            values = [Summary.Value(tag=prefix + name, simple_value=number) for name, number in _scalars(row).items()]
            self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self):
        self.writer.close()


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs Weights & Biases: pip install wandb, or leave wandb_log=False") from None
    return wandb


def wandb_mode(wandb):
    """None where WANDB_MODE or a login decides, else 'offline'."""
    if "WANDB_MODE" in os.environ:
        return None
    try:
        return None if wandb.login(prompt=False) else "offline"
    except Exception as error:  # a key that is refused, or no network: neither is worth a run
        print(f"Weights & Biases is offline ({error}); `wandb sync` uploads the run later", flush=True)
        return "offline"


class WandbSink:
    """Weights & Biases, offline when nobody is logged in; curves against steps, with tokens to choose as the x axis."""

    def __init__(self, config, folder):
        wandb = import_wandb()
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.run = wandb.init(
            project=config.wandb_project, name=config.wandb_run_name or folder.name, dir=str(folder), config=settings,
            mode=wandb_mode(wandb),
        )  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("tokens_processed")
        self.run.define_metric("train/*", step_metric="step")
        self.run.define_metric("eval/*", step_metric="step")
        self.run.define_metric("by_tokens/*", step_metric="tokens_processed")

    def log(self, row):
        scalars = _scalars(row)
        by_tokens = {f"by_tokens/{name}": number for name, number in scalars.items()}
        self.run.log({**scalars, **by_tokens, "step": row["step"], "tokens_processed": row["tokens_processed"]})

    def close(self):
        self.run.finish()
