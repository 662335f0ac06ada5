"""What a run says and leaves behind: a progress line, the metrics files, a plot, TensorBoard, wandb.

`metrics.jsonl` is the source of truth, one flushed line per logged step and evaluation. `training_log.json`,
`metrics.csv` and the plot are made from it at the end, so that they can never disagree with it.
"""

import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch

from configurator import save_sources
from model_builder import NotFiniteError
from model_flops import active_parameters, mfu
from training_checkpoint import write_atomically, write_json
from training_ledger import own_scores
from training_place import peak_memory_bytes
from training_report import human_count, human_seconds, printable
from training_run_record import FORMAT, earlier_sessions
from training_sinks import import_wandb, sinks_of
from training_tokenizers import TOKENIZER_FILE
from training_weights import squared_norms
from user_errors import UserError

# ---- the run folder --------------------------------------------------------------------------------------------------


def new_run_folder(settings, dataset_name):
    """Path of a folder that does not exist yet: run_name as given, or a name that says what the run is.

    With auto_resume it may exist, where it holds no more than the beginning of the same run.

    Raises:
        UserError: a run_name that is taken; nothing of an earlier run is ever overwritten. Or restarts by torchrun,
            each of which would begin a run of its own.
    """
    config, model = settings.train, settings.model
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not config.auto_resume:
        raise UserError(
            f"torchrun would begin a new run at each of its {restarts} restarts; add --auto_resume=True and "
            "--run_name=NAME, so that they go on, or leave --max-restarts out"
        )
    if config.run_name is not None:
        folder = Path(config.runs_dir) / config.run_name
        if folder.exists() and not (config.auto_resume and only_begun(folder, settings)):
            raise UserError(
                f"run_name='{config.run_name}' exists in {config.runs_dir}; continue it with --init_from=resume, "
                "or choose another name"
            )
        return folder
    what = model.arch_preset if model.arch_preset != "custom" else "+".join(model.mixers())
    shape = model.model_size or f"{model.n_layer}x{model.n_embd}"
    name = f"{what}-{shape}-{dataset_name}-s{config.seed}"
    folder, copy = Path(config.runs_dir) / name, 1
    while folder.exists():
        copy += 1
        folder = Path(config.runs_dir) / f"{name}-{copy}"
    return folder


def only_begun(folder, settings):
    """Whether a run of these very settings was stopped here before its first checkpoint."""
    path = folder / "config.json"
    if not path.exists():
        return {name for name in os.listdir(folder) if not name.startswith(".")} <= {"config", TOKENIZER_FILE}
    record = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps({"model": settings.model.to_dict(), "training": settings.train.to_dict()}))
    return asked == {"model": record["model_config"], "training": record["training_config"]}


# ---- while it runs ---------------------------------------------------------------------------------------------------


class SilentLogger:
    """Says and writes nothing: for the ranks that are not rank 0."""

    def say(self, text=""):
        pass

    def train(self, row, eta_seconds):
        pass

    def evaluation(self, row, is_best):
        pass

    def sample(self, model, dataset, n_tokens, seed, device):
        """(text that the model writes after the first words of the validation split, why there is none), one is None.

        Every rank calls it, because ranks may share the weights.
        """
        if not model.config.causal:
            return None, "with causal=False a model fills gaps, and writes no text from left to right"
        if dataset.meta["tokenizer"]["name"] is None:
            return None, "the dataset's tokenizer is unknown"
        prompt = torch.from_numpy(dataset.val[:16].astype("int64"))[None].to(device)
        generator = torch.Generator(device=device).manual_seed(seed)
        try:
            ids = model.generate(prompt, n_tokens, temperature=0.8, top_k=200, generator=generator)
        except NotFiniteError:
            return None, "the model's logits are not finite"
        return dataset.tokenizer.decode(ids[0]), None

    def write_summary(self, summary):
        pass

    def finish(self, summary, flops, plot=False):
        pass


class ConsoleLogger(SilentLogger):
    """Shows the progress of a run and writes nothing: for a run that is only evaluated."""

    def __init__(self, total_steps):
        self.total_steps, self.is_terminal, self.width = total_steps, sys.stdout.isatty(), 0

    def say(self, text=""):
        """Print a line that stays."""
        self._clear()
        print(text, flush=True)

    def train(self, row, eta_seconds):
        """Show a training row; on a terminal the line is overwritten by the next."""
        line = (
            f"{self._step(row)}  loss {row['loss']:.4f}  {human_count(row['tokens_per_second'])} tok/s"
            f"  MFU {100 * row['mfu']:.1f}%  ETA {human_seconds(eta_seconds)}"
            f"  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}"
        )
        if self.is_terminal:
            self._clear()
            line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be overwritten
            print(line, end="", flush=True)
            self.width = len(line)
        else:
            print(line, flush=True)

    def evaluation(self, row, is_best):
        """Show an evaluation row."""
        scores = "" if row["perplexity"] is None else f"  perplexity {row['perplexity']:.2f}"
        scores += "" if row["bits_per_byte"] is None else f"  {row['bits_per_byte']:.4f} bits/byte"
        own = own_scores(row).items()
        scores += "".join(f"  {name} {value:.4f}" for name, value in own if isinstance(value, float))
        mark = "  best so far" if is_best else ""
        self.say(
            f"{self._step(row)}  val {row['val_loss']:.4f}{scores}  {human_count(row['tokens_processed'])} tokens{mark}"
        )

    def _step(self, row):
        return f"step {row['step']:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _clear(self):
        if self.width:
            print("\r" + " " * self.width + "\r", end="")
            self.width = 0


class RunLogger(ConsoleLogger):
    """Progress, metrics files and sinks of one run, on rank 0.

    Args:
        folder: the run folder, made here; with `is_begun` it is there already.
        record: what config.json is to hold.

    Raises:
        UserError: a folder that cannot be made or is taken, or a sink that is not installed; nothing is left behind.
    """

    def __init__(self, folder, settings, record, dataset, total_steps, is_begun=False):
        super().__init__(total_steps)
        self.folder = Path(folder)
        if settings.train.wandb_log:
            import_wandb()
        try:
            self.folder.mkdir(parents=True, exist_ok=is_begun)
        except FileExistsError:
            raise UserError(f"{folder} was made by another process meanwhile; choose another run_name") from None
        except OSError as error:
            runs_dir = settings.train.runs_dir
            raise UserError(f"runs_dir={runs_dir!r} cannot hold runs ({error.strerror}); choose another") from None
        save_sources(settings, self.folder / "config")
        write_json(self.folder / TOKENIZER_FILE, dataset.meta["tokenizer"])
        write_json(self.folder / "config.json", finite(record | earlier_sessions(self.folder)))
        self.metrics_path = self.folder / "metrics.jsonl"
        self.file = open(self.metrics_path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 - `finish` closes it
        self.sinks = sinks_of(settings.train, self.folder)

    def record(self, row):
        """Append one row to metrics.jsonl, flushed, and to every sink."""
        self.file.write(json.dumps(finite(row)) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.log(row)

    def train(self, row, eta_seconds):
        self.record(row)
        super().train(row, eta_seconds)

    def evaluation(self, row, is_best):
        self.record(row)
        super().evaluation(row, is_best)

    def sample(self, *arguments):
        """Print the text, and keep it."""
        text, why_none = super().sample(*arguments)
        if text is None:
            return self.say(f"no sample: {why_none}")
        (self.folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
        self.say(f"\n{printable(text)}\n")

    def write_summary(self, summary):
        write_json(self.folder / "summary.json", finite({"format": FORMAT, **summary}))

    def finish(self, summary, flops, plot=False):
        """Write summary.json and all that is made from metrics.jsonl."""
        self._clear()
        self.file.close()
        for sink in self.sinks:
            sink.close()
        self.write_summary(summary)
        rows = read_metrics(self.metrics_path)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        write_json(self.folder / "training_log.json", training_log(config, rows, flops))
        write_csv(self.folder / "metrics.csv", rows)
        if plot and rows:
            plot_loss(self.folder / "plots" / "loss.png", rows, config["run_name"])


def finite(value):
    """`value` with NaN and infinities as None, which is what JSON has."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- files made from metrics.jsonl -----------------------------------------------------------------------------------


def read_metrics(path):
    """Rows of metrics.jsonl, none where there is no file; a last line cut short by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def rewind_metrics(folder, step):
    """Keep the rows logged up to `step`; those after it, which will be lived again, move to metrics_abandoned.jsonl."""
    path = Path(folder) / "metrics.jsonl"
    kept, dropped = [], []
    for row in read_metrics(path):
        (kept if row["step"] <= step else dropped).append(json.dumps(row) + "\n")
    if dropped:
        with open(path.with_name("metrics_abandoned.jsonl"), "a", encoding="utf-8", newline="\n") as file:
            file.writelines(dropped)
    write_atomically(path, "".join(kept).encode("utf-8"))


def training_log(config, rows, flops):
    """The whole run in one JSON value, each row with its MFU spelled out."""
    iterations = []
    for row in rows:
        entry = {"iter": row["step"], **row}
        if row["kind"] == "train":
            entry["mfu"] = {
                "mfu": row["mfu"], "architecture": config["architecture"], "flops_per_token": flops.training,
                "flops_per_token_forward": flops.forward, "flops_per_token_backward": flops.backward,
                "context": flops.context, "flops_per_second": flops.training * row["tokens_per_second"],
            }  # fmt: skip
            entry["memory"] = {"peak_bytes": row["peak_memory_bytes"]}
            entry["gradients"] = {"norm": row["grad_norm"], **row.get("gradient_norms", {})}
        iterations.append(entry)
    return {"config": config, "training_iterations": iterations}


def write_csv(path, rows):
    """All flat numbers of all rows, one column each."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    lines = [columns] + [[row.get(column, "") for column in columns] for row in rows]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)


def plot_loss(path, rows, title):
    """Training and validation loss against tokens, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, key, label, style in (
        ("train", "loss", "training step", dict(color="#9aa5b1", lw=1)),
        ("eval", "val_loss", "validation", dict(color="#0b6e99", lw=1.8, marker="o", ms=3.5)),
    ):
        points = [(row["tokens_processed"], row[key]) for row in rows if row["kind"] == kind and row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="tokens processed", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value) if value else "0")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


# ---- what rows and the summary say of the model ----------------------------------------------------------------------


def layer_stats(model):
    """{'gradient_norms', 'weight_norms'}: L2 norms by layer and slot, such as 'blocks.0.mixer', before clipping."""
    gradients = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return {"gradient_norms": _norms_by_layer(gradients), "weight_norms": _norms_by_layer(model.named_parameters())}


def _norms_by_layer(named_tensors):
    names, tensors = zip(*named_tensors, strict=True)
    squares = {}
    for name, square in zip(names, squared_norms([tensor.detach() for tensor in tensors]).tolist(), strict=True):
        words = name.split(".")
        layer = ".".join(words[:3] if words[0] == "blocks" else words[:1])
        squares[layer] = squares.get(layer, 0.0) + square
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def size_and_speed(model, ledger, peak, place):
    """What summary.json adds to the ledger."""
    speed = ledger.summary()["tokens_per_second"]
    return {
        "mfu": None if speed is None else mfu(ledger.flops_per_token, speed, peak, place.world_size),
        "peak_memory_bytes": peak_memory_bytes(place),
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "n_active_params": active_parameters(model),
    }
