"""Checkpoints: when they are due, written whole or not at all, read back with every byte checked.

runs/<name>/checkpoint-5000/
  model.safetensors     unsharded and unprefixed: loads on a laptop, whatever trained it
  training_state.pt     optimizer by parameter name, random state, scaler, stream (loads with weights_only=True)
  metadata.json         step, token counters, both configs, checksums

With checkpoint_format=sharded a folder `shards` stands in the place of the weights and of the optimizer's tensors.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training_config import scheduled_counts
from training_mesh import row_orders
from training_ranks import from_main, gather
from training_weights import (
    assign,
    empty_like,
    held,
    held_state,
    restore_state,
    unique_tensors,
    whole_state,
    whole_weights,
)
from user_errors import UserError

FORMAT = 1
SHARDS = "shards"  # the folder of a sharded checkpoint's tensors
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


def steps_due(config, due, total_steps):
    """(steps to evaluate after, steps to save after), with those of the schedule `due` {step: tokens} in both."""
    to_evaluate = {*due, total_steps}
    if config.eval_schedule == "interval":
        to_evaluate = evaluation_steps(total_steps, config.eval_interval)
    return to_evaluate, {*due, *checkpoint_steps(total_steps, config.save_interval)}


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
    remove_leftovers(run_folder)
    target, temporary = _names(run_folder, metadata)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors")
        _complete(target, temporary, training_state, metadata, {"model.safetensors"}, {})
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what the libraries make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(target, error) from error
    return target


def remove_leftovers(run_folder):
    """Remove what a process that was killed while it saved has left."""
    for leftover in Path(run_folder).glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _names(run_folder, metadata):
    """(the folder of a checkpoint, the folder in which it is written)."""
    target = Path(run_folder) / f"checkpoint-{metadata['global_step']}"
    return target, target.with_name(f".{target.name}.tmp")


def _complete(target, temporary, training_state, metadata, to_check, checksums):
    """Write what stands beside the tensors, sync everything and give the folder its name.

    Args:
        to_check: names of files whose checksums are taken here. checksums: those that are known.
    """
    torch.save(training_state, temporary / "training_state.pt")
    checksums = {name: sha256(temporary / name) for name in sorted({*to_check, "training_state.pt"})} | checksums
    write_json(temporary / "metadata.json", {"format": FORMAT, **metadata, "checksums": checksums})
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    os.replace(temporary, target)
    _sync(target.parent)


def _not_written(target, error):
    remedy = "make room on the disk, then --init_from=resume"
    return UserError(f"{target} could not be written ({error}); {remedy}")


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
    """Rename checkpoints after `step` to `abandoned-checkpoint-N`: a run that goes on from there writes its own.

    What a killed process has half written is removed now: later, other ranks may be writing shards there.
    """
    remove_leftovers(run_folder)
    for later, folder in list_checkpoints(run_folder):
        if later > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)


class Writer:
    """Saves a run's checkpoints, one after another. Every rank has one, and all call it together.

    with WRITERS["unsharded"](folder, place) as writer:
        writer.save(model, optimizers, state, metadata, afterwards)
    """

    def __init__(self, run_folder, place):
        self.folder, self.place, self.step = Path(run_folder), place, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def save(self, model, optimizers, state, metadata, afterwards):
        """Save the step of `metadata`, unless it was the last one saved.

        Args:
            model: as it is wrapped. optimizers: likewise.
            state: the rest of training_state.pt. metadata: as for `save_checkpoint`.
            afterwards: called on rank 0 when the checkpoint is there.

        Raises:
            UserError: the disk did not take this one, or one that was still being written.
        """
        if self.step != metadata["global_step"]:
            self.step = metadata["global_step"]
            self.write(model, optimizers, state, metadata, afterwards)


class UnshardedWriter(Writer):
    """Rank 0 gathers everything and writes it, while the others wait."""

    def write(self, model, optimizers, state, metadata, afterwards):
        weights, state = whole_weights(model), {**state, "optimizers": optimizer_state(optimizers)}
        if self.place.is_main:
            save_checkpoint(self.folder, weights, state, metadata)
            afterwards()


class ShardedWriter(Writer):
    """Each rank writes what it holds, in a thread, while training goes on; one checkpoint at a time."""

    def __init__(self, run_folder, place):
        super().__init__(run_folder, place)
        import training_sharded_checkpoint  # a second to import, for those who want it

        self.sharded, self.saving, self.target = training_sharded_checkpoint, None, None
        self.group = self.sharded.background_group()

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.wait()
        elif self.saving is not None:
            self.saving.exception()  # it may still become whole

    def write(self, model, optimizers, state, metadata, afterwards):
        self.wait()
        self.target, temporary = _names(self.folder, metadata)
        target, state = self.target, {**state, "optimizers": [{} for _ in optimizers]}

        def complete(checksums):
            checksums = {f"{SHARDS}/{name}": checksum for name, checksum in checksums.items()}
            _complete(target, temporary, state, metadata, (), checksums)
            afterwards()

        tensors, orders = tensors_in_shards(model, optimizers)
        self.saving = self.sharded.save_in_background(temporary / SHARDS, tensors, orders, self.group, sha256, complete)

    def wait(self):
        """Until the checkpoint that is being written is there.

        Raises:
            UserError: the disk did not take it, on any rank; the checkpoints before it stay.
        """
        saving, self.saving = self.saving, None
        error = saving and saving.exception()
        if error is None:
            return
        cause = self.sharded.failure(error)
        if cause is error or not isinstance(cause, (OSError, RuntimeError)):
            raise cause
        if self.place.is_main:
            remove_leftovers(self.folder)
        raise _not_written(self.target, cause) from error


WRITERS = {"unsharded": UnshardedWriter, "sharded": ShardedWriter}


def tensors_in_shards(model, optimizers, states=None):
    """({name: tensor} of all that this rank holds, {name: order of its rows, where ranks have one of their own}).

    Names are `model.<name>` and `optimizers.<index>.<parameter>.exp_avg`, ...

    Args:
        states: {parameter: state} of each optimizer, in the place of what it has.
    """
    parameters, tensors, orders = unique_tensors(model), {}, {}
    own_orders = row_orders(model)

    def add(key, tensor, parameter):
        if not torch.is_tensor(tensor):
            raise UserError(f"checkpoint_format=sharded writes tensors alone, and {key} is {tensor!r}; use unsharded")
        tensors[key] = tensor
        if parameter in own_orders and tensor.dim() and tensor.size(0) == len(own_orders[parameter]):
            orders[key] = own_orders[parameter]

    for name, tensor in parameters.items():
        add(f"model.{name}", tensor, name)
    for index, of_optimizer in enumerate(states or [held_state(optimizer) for optimizer in optimizers]):
        for name, state in of_optimizer.items():
            for key, value in state.items():
                add(f"optimizers.{index}.{name}.{key}", value, name)
    return tensors, orders


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


def is_sharded(folder):
    """Whether a checkpoint's tensors are in shards."""
    return (Path(folder) / SHARDS).is_dir()


def read_metadata(folder, place=None):
    """metadata.json of a checkpoint, its files' checksums verified.

    Args:
        place: of the ranks that share the checking and call this together; None checks alone.

    Raises:
        UserError: a missing, unreadable or altered file, naming another checkpoint to go on from; on every rank alike.
    """
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        checksums = dict(metadata["checksums"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _corrupt(folder, "metadata.json cannot be read") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{folder} has format {metadata.get('format')!r} and this version reads {FORMAT}")
    rank, world_size = (place.rank, place.world_size) if place else (0, 1)
    names = sorted(checksums)[rank::world_size]
    problem = next(filter(None, (_problem(folder, name, checksums[name]) for name in names)), None)
    for found in filter(None, gather(problem, place) if place else [problem]):
        raise _corrupt(folder, found)
    return metadata


def _problem(folder, name, checksum):
    """What is wrong with a file, or None."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    return None if sha256(folder / name) == checksum else f"{name} does not match its checksum"


def _corrupt(folder, what):
    others = [step for step, other in list_checkpoints(folder.parent) if other != folder]
    remedy = "the run has no other checkpoint, so start it again under another run_name"
    if others:
        remedy = f"go on from step {others[-1]}, with --resume_step={others[-1]} (sample.py: --step={others[-1]})"
    return UserError(f"checkpoint {folder} is damaged: {what}; {remedy}")


def load_model(model, folder):
    """Fill a ConfigurableGPT, wrapped or not, from a checkpoint, each rank what it holds; the tied tensor included.

    Of an unsharded checkpoint one tensor at a time is read. A model built without the heads of an objective leaves
    those of the checkpoint aside: to write text, say.

    Raises:
        UserError: tensors of another architecture, or files that cannot be read.
    """
    if is_sharded(folder):
        return restore_shards(model, [], folder)
    with _whole_tensors(folder) as file:
        assign(model, ((name, file.get_tensor(name)) for name in check_architecture(model, folder)))


@contextlib.contextmanager
def _whole_tensors(folder):
    """model.safetensors, open; what cannot be read in this context costs a sentence."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise _corrupt(folder, f"model.safetensors cannot be read ({error})") from None


def check_architecture(model, folder):
    """The names of a checkpoint's weights that are the model's, which needs no memory.

    Raises:
        UserError: tensors of another architecture, or files that cannot be read.
    """
    if is_sharded(folder):
        with _shards_of(folder) as (sharded, shards):
            layouts = sharded.layouts(shards)
        shapes = {name[len("model.") :]: shape for name, (shape, _) in layouts.items() if name.startswith("model.")}
    else:
        with _whole_tensors(folder) as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return [*_check_architecture(model, shapes, folder)]


def _check_architecture(model, shapes, folder):
    """Those of {name: shape} that are the model's: an objective's heads stay where it was built without them."""
    own = unique_tensors(model)
    shapes = {name: shape for name, shape in shapes.items() if name in own or not name.startswith("heads.")}
    for name in own:
        if name in shapes and own[name].shape != shapes[name]:
            raise UserError(
                f"checkpoint {folder} is of another architecture: {name} is {tuple(shapes[name])} there "
                f"and {tuple(own[name].shape)} here"
            )
    if set(own) != set(shapes):
        odd = sorted(set(own) ^ set(shapes))[0]
        raise UserError(f"checkpoint {folder} is of another architecture: {odd} is in one and not in the other")
    return shapes


def restore_shards(model, optimizers, folder):
    """Fill a model and optimizers, wrapped or not, from a sharded checkpoint: each rank reads what it holds.

    Raises:
        UserError: tensors of another architecture, or files that cannot be read.
    """
    with _shards_of(folder) as (sharded, shards):
        layouts = sharded.layouts(shards)
        check_architecture(model, folder)
        states = [_empty_states(optimizer, f"optimizers.{i}.", layouts) for i, optimizer in enumerate(optimizers)]
        sharded.read_into(*tensors_in_shards(model, optimizers, states), shards)
    for optimizer, of_optimizer in zip(optimizers, states, strict=True):
        restore_state(optimizer, of_optimizer)


def _empty_states(optimizer, prefix, layouts):
    """{parameter name: {'exp_avg': empty tensor, ...}} for what was saved of the parameters that this rank steps."""
    saved = {}
    for name, layout in layouts.items():
        owner, _, key = name.rpartition(".")
        saved.setdefault(owner, {})[key] = layout
    return {
        name: {key: empty_like(parameter, *layout) for key, layout in saved[prefix + name].items()}
        for name, parameter in held(optimizer).items() if prefix + name in saved
    }  # fmt: skip


@contextlib.contextmanager
def _shards_of(folder):
    """(module that reads shards, their folder), in a context where what cannot be read costs a sentence."""
    import training_sharded_checkpoint

    try:
        yield training_sharded_checkpoint, folder / SHARDS
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
        raise _corrupt(folder, f"{SHARDS} cannot be read ({reason})") from error


def read_whole(folder):
    """(weights, training state, metadata) of a sharded checkpoint, as `save_checkpoint` takes them, on the CPU.

    Raises:
        UserError: a damaged checkpoint.
    """
    metadata, state = read_metadata(folder), load_training_state(folder)
    with _shards_of(folder) as (sharded, shards):
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sharded.layouts(shards).items()}
        sharded.read_into(tensors, {}, shards)
    weights = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = tensor
        else:
            index, _, rest = rest.partition(".")
            parameter, _, key = rest.rpartition(".")
            state["optimizers"][int(index)].setdefault(parameter, {})[key] = tensor
    return weights, state, metadata


def taken_up(run_folder, step, model, place):
    """(folder of a run's checkpoint, its training state), whose weights fit the model.

    Raises:
        UserError: none is there, it is damaged, or of another architecture.
    """
    folder = from_main(lambda: find_checkpoint(run_folder, step), place)
    read_metadata(folder, place)  # refuses damaged files
    check_architecture(model, folder)
    state = load_training_state(folder, in_file=True)
    random_states = [{name: tensor.clone() for name, tensor in one.items()} for one in state["random_states"]]
    return folder, {**state, "random_states": random_states}


def load_training_state(folder, in_file=False):
    """The dict given to `save_checkpoint`, on the CPU, read without running any code that the file might hold.

    Args:
        in_file: leave tensors in the file until they are used, so that ranks that share them read their part alone.
    """
    try:
        return torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True, mmap=in_file)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _corrupt(folder, f"training_state.pt cannot be read ({type(error).__name__})") from None


def restore(model, optimizers, saved, folder):
    """What a wrapped model and its optimizers take from a checkpoint.

    Args:
        saved: what `load_training_state` gave; the optimizers' tensors leave it.
    """
    if len(saved["optimizers"]) != len(optimizers):
        raise UserError(f"{folder} was trained with another optimizer; resume with the one it had")
    states = saved.pop("optimizers")
    if is_sharded(folder):
        return restore_shards(model, optimizers, folder)
    load_model(model, folder)
    for optimizer, state in zip(optimizers, states, strict=True):
        restore_state(optimizer, state)


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


# SIGUSR1 is what schedulers are told to send ahead of a time limit; Windows does not have it.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the loop to save and leave after the step in progress; a second Ctrl-C leaves
    at once.

    with StopSignals() as stop:      # the handlers of before are back afterwards; wanted=False leaves them alone
        ... stop.received ...        # the signal, or None
    """

    def __init__(self, wanted=True):
        self.received = self.name = None
        self.signals = STOPPING if wanted else ()

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self._note) for signum in self.signals}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        self.name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
