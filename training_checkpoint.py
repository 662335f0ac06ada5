"""Checkpoints: when they are due, written whole or not at all, read back with every byte checked.

runs/<name>/checkpoint-5000/
  model.safetensors     unsharded and unprefixed: loads on a laptop, whatever trained it
  training_state.pt     optimizer by parameter name, random state, scaler, stream (loads with weights_only=True)
  metadata.json         step, token counters, both configs, checksums
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training_config import scheduled_counts
from training_parallel import restore_state, unique_tensors, whole_state
from user_errors import UserError

FORMAT = 1
FIRST_OF_EPOCH = 1000  # a generated schedule begins at a thousandth of the first epoch, whatever a step holds


# ---- when ------------------------------------------------------------------------------------------------------------


def evaluation_steps(total_steps, interval, halvings=3):
    """Steps to evaluate after: multiples of the interval, before it its halvings (early learning is fast), the end."""
    early = {interval // 2**power for power in range(1, halvings + 1)} - {0}
    regular = range(interval, total_steps + 1, interval)
    return {step for step in {*early, *regular, total_steps} if step <= total_steps}


def checkpoint_steps(total_steps, interval):
    """Steps to save after: multiples of the interval (0: none) and the end."""
    return {*(range(interval, total_steps + 1, interval) if interval else ()), total_steps}


def token_schedule(config, tokens_per_epoch, total_tokens):
    """The ascending token counts at which a run's checkpoints are due, its end among them; [] where none are set.

    It depends on nothing that a batch size changes, so that runs with different batches line up.

    Args:
        config: TrainConfig. total_tokens: the length asked for; what lies beyond it falls away.
    """
    if not config.has_token_schedule:
        return []
    if config.checkpoint_tokens is not None:
        counts = scheduled_counts(config.checkpoint_tokens)
    else:
        counts = generated_counts(
            tokens_per_epoch, total_tokens, config.first_epoch_checkpoints, config.subsequent_epochs_spacing,
            config.min_checkpoints_per_epoch,
        )  # fmt: skip
    return sorted({count for count in counts if count < total_tokens} | {total_tokens})


def generated_counts(tokens_per_epoch, total_tokens, first_epoch, spacing, at_least):
    """Token counts of whole epochs until `total_tokens` is covered: dense early, the end of each epoch included.

    The first epoch, or the run where that is shorter, has `first_epoch` counts, log-spaced from a thousandth of it to
    its end. A later one has as many as going on at that ratio takes, and not fewer than `at_least`, with `spacing`
    'log' or 'linear'.
    """
    E, ratio = tokens_per_epoch, FIRST_OF_EPOCH ** (1 / max(1, first_epoch - 1))
    counts = {max(1, round(min(E, total_tokens) / ratio**i)) for i in range(first_epoch)}
    for epoch in range(1, math.ceil(total_tokens / E)):
        grows = (epoch + 1) / epoch
        n = max(at_least, math.ceil(math.log(grows) / math.log(ratio)))
        if spacing == "log":
            counts |= {round(E * epoch * grows ** (i / n)) for i in range(1, n + 1)}
        else:
            counts |= {round(E * (epoch + i / n)) for i in range(1, n + 1)}
    return sorted(counts)


def scheduled_steps(counts, tokens_per_step, total_steps):
    """{step: token count}: each count at the first step at or beyond it; of several at one step the latest stays."""
    return {min(total_steps, -(-count // tokens_per_step)): count for count in sorted(counts)}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Write bytes so that `path` holds either all of them or what it held before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def save_checkpoint(run_folder, tensors, training_state, metadata):
    """Write `checkpoint-<step>` under a temporary name, sync it, rename it: a folder that exists is whole.

    Args:
        tensors: `whole_weights` of the bare ConfigurableGPT.
        training_state: of tensors, numbers, strings, lists and dicts, so that it loads with weights_only=True.
        metadata: JSON-ready; `global_step` names the folder, checksums are added here.

    Raises:
        UserError: the disk does not take it; the checkpoints before it stay.
    """
    target = Path(run_folder) / f"checkpoint-{metadata['global_step']}"
    for leftover in target.parent.glob(".checkpoint-*.tmp"):  # of a process that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors")
        torch.save(training_state, temporary / "training_state.pt")
        checksums = {name: sha256(temporary / name) for name in ("model.safetensors", "training_state.pt")}
        write_json(temporary / "metadata.json", {"format": FORMAT, **metadata, "checksums": checksums})
        for path in temporary.iterdir():
            _sync(path)
        os.replace(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what the libraries make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        remedy = "make room on the disk, then --init_from=resume"
        raise UserError(f"{target} could not be written ({error}); {remedy}") from error
    _sync(target.parent)
    return target


def _sync(path):
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def optimizer_state(optimizers):
    """[{parameter name: {'exp_avg': tensor, ...}}] per optimizer: names survive a change of grouping or of ranks.

    Every rank calls it; rank 0 gets it.
    """
    return [whole_state(optimizer) for optimizer in optimizers]


def prune(run_folder, keep, always_keep=()):
    """Remove all but the `keep` latest checkpoints (0 keeps all) and those of the steps in `always_keep`."""
    folders = list_checkpoints(run_folder)
    for step, folder in folders[:-keep] if keep else []:
        if step not in always_keep:
            leaving = folder.with_name(f".{folder.name}.tmp")  # renamed first: a folder that exists is whole
            with contextlib.suppress(OSError):  # held open by another program: it stays until the next time
                os.replace(folder, leaving)
                shutil.rmtree(leaving, ignore_errors=True)


def set_aside(run_folder, step):
    """Rename checkpoints after `step` to `abandoned-checkpoint-N`: a run that goes on from there writes its own."""
    for later, folder in list_checkpoints(run_folder):
        if later > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)


# ---- reading ---------------------------------------------------------------------------------------------------------


def list_checkpoints(run_folder):
    """[(step, folder)] of a run, earliest first."""
    folders = Path(run_folder).glob("checkpoint-*")
    return sorted((int(folder.name[11:]), folder) for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name))


def find_checkpoint(run_folder, step=None):
    """The folder of a run's checkpoint at `step`, or its latest.

    Raises:
        UserError: no such run, no checkpoint, or not at that step.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise UserError(f"there is no run at {run_folder}; `ls {run_folder.parent}` shows those there are")
    found = dict(list_checkpoints(run_folder))
    if not found:
        raise UserError(f"run {run_folder} has no checkpoint yet; start it again under another run_name")
    if step is None:
        return found[max(found)]
    if step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise UserError(f"run {run_folder} has no checkpoint at step {step}; it has {steps}")
    return found[step]


def read_metadata(folder):
    """metadata.json of a checkpoint, its files' checksums verified.

    Raises:
        UserError: a missing, unreadable or altered file, naming another checkpoint to go on from.
    """
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        checksums = dict(metadata["checksums"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _corrupt(folder, "metadata.json cannot be read") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{folder} has format {metadata.get('format')!r} and this version reads {FORMAT}")
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise _corrupt(folder, f"{name} is missing")
        if sha256(folder / name) != checksum:
            raise _corrupt(folder, f"{name} does not match its checksum")
    return metadata


def _corrupt(folder, what):
    others = [step for step, other in list_checkpoints(folder.parent) if other != folder]
    remedy = "the run has no other checkpoint, so start it again under another run_name"
    if others:
        remedy = f"go on from step {others[-1]}, with --resume_step={others[-1]} (sample.py: --step={others[-1]})"
    return UserError(f"checkpoint {folder} is damaged: {what}; {remedy}")


def load_model(model, folder):
    """Fill a bare ConfigurableGPT from model.safetensors, the tied tensor included.

    A model built without the heads of an objective leaves those of the checkpoint aside: to write text, say.

    Raises:
        UserError: tensors of another architecture.
    """
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _corrupt(folder, f"model.safetensors cannot be read ({error})") from None
    own = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in own or not name.startswith("heads.")}
    for name in own:
        if name in tensors and own[name].shape != tensors[name].shape:
            raise UserError(
                f"checkpoint {folder} is of another architecture: {name} is {tuple(tensors[name].shape)} there "
                f"and {tuple(own[name].shape)} here"
            )
    expected = set(unique_tensors(model))
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise UserError(f"checkpoint {folder} is of another architecture: {odd} is in one and not in the other")
    model.load_state_dict(tensors, strict=False)  # tied names share the tensor that is loaded


def load_training_state(folder, device="cpu"):
    """The dict given to `save_checkpoint`, read without running any code that the file might hold."""
    try:
        return torch.load(folder / "training_state.pt", map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _corrupt(folder, f"training_state.pt cannot be read ({type(error).__name__})") from None


def restore_optimizers(optimizers, saved, folder):
    """Put the state of `optimizer_state` back, each tensor to its parameter by name."""
    if len(saved) != len(optimizers):
        raise UserError(f"{folder} was trained with another optimizer; resume with the one it had")
    for optimizer, states in zip(optimizers, saved, strict=True):
        restore_state(optimizer, states)


def random_state(device):
    """The global generators' state, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state, device):
    """Put a `random_state` back."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# ---- leaving ---------------------------------------------------------------------------------------------------------


class StopSignals:
    """Ctrl-C and SIGTERM ask the loop to save and leave after the step in progress; a second Ctrl-C leaves at once.

    with StopSignals() as stop:      # the handlers of before are back afterwards
        ... stop.received ...        # the signal, or None
    """

    def __init__(self):
        self.received = self.name = None

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        self.name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
