"""What a training step holds in memory, counted on tensors that have a shape and no data.

    memory = step_memory(settings, place)
    memory.kinds          # {'weights': bytes, 'gradients', 'optimizer', 'activations', ...} on one rank
    memory.peak           # the most that are there at once: not their sum, as activations go while gradients come

A step of the very model, objective and optimizer runs under torch's FakeTensorMode, and every storage is followed from
the operator that makes it to its end. So what autograd keeps is counted, not guessed: masks, experts, scans, chunks of
logits and recomputed blocks alike, and any part of the user's own. What a kernel uses inside itself is not seen, nor
what the allocator adds: rounding, fragments, the context of a device (`docs/scaling.md`).
"""

import dataclasses
import math
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from model_builder import ConfigurableGPT, on_meta, parameter_plan
from training_mesh import parts_with, split_share
from training_objectives import OBJECTIVE_REGISTRY
from training_optim import OPTIMIZER_REGISTRY
from training_parallel import bytes_held, is_sharded
from training_place import DTYPES
from training_recompute import checkpoint_activations

NOT_COUNTED = "the allocator's rounding and fragments, kernels' workspaces, the device's context"
WHOLE = {"weights": 1.0, "gradients": 1.0, "optimizer": 1.0}
MAX_OPERATORS = 100_000  # a loop over tokens has more, and would take longer to count than to run


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank.

    Attributes:
        kinds: the most of each kind. 'communication' is what the mode adds: buckets, gathered weights.
        peak: the most of all at once.  when: 'forward and backward' or 'optimizer step'.
    """

    kinds: dict
    peak: float
    when: str


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live.

    Args:
        known: tensors that are there before, and count nothing.
        gradient_share: the part of each gradient that stays on this rank once it is accumulated.

    Attributes:
        activations, gradients: bytes alive.  most_activations, peak: the highest so far, of one and of both.
        phase: of the step, under which the highest are kept apart: {phase: bytes}.
    """

    def __init__(self, known=(), gradient_share=1.0):
        super().__init__()
        self.gradient_share, self.sizes, self.is_gradient = gradient_share, {}, set()
        self.n_operators = self.activations = self.gradients = self.n_ready = 0
        self.phase, self.most_by_phase, self.peak_by_phase = "", {"": 0}, {"": 0}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.n_operators += 1
        if self.n_operators > MAX_OPERATORS:
            raise NotImplementedError(f"a step has more than {MAX_OPERATORS:,} operators, as a loop over tokens makes")
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return made

    def add(self, storage):
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.activations += self.sizes[key]
        weakref.finalize(storage, self.remove, key)
        self.look()

    def remove(self, key):
        size = self.sizes.pop(key)
        if key in self.is_gradient:
            self.is_gradient.discard(key)
            self.gradients -= size
        else:
            self.activations -= size

    def look(self):
        both = self.activations + self.gradient_share * self.gradients
        for highest, now in ((self.most_by_phase, self.activations), (self.peak_by_phase, both)):
            highest[self.phase] = max(highest.get(self.phase, 0), now)

    @property
    def most_activations(self):
        return max(self.most_by_phase.values())

    @property
    def peak(self):
        return max(self.peak_by_phase.values())

    def gradient_is_there(self, parameter):
        """After a gradient was accumulated: from now on it is no activation."""
        key = parameter.grad.untyped_storage()._cdata
        if key in self.sizes and key not in self.is_gradient:
            self.is_gradient.add(key)
            self.activations -= self.sizes[key]
            self.gradients += self.sizes[key]


def step_memory(settings, place):
    """StepMemory of a run with these settings at a Place, whose device need not be there.

    Raises:
        NotImplementedError, RuntimeError: a part whose shapes depend on the data, or an operator without a shape rule.
    """
    config = settings.train
    with on_meta():
        share = split_share(ConfigurableGPT(settings.model))
    shares = bytes_held(WHOLE, place, config, share)
    left = 1 - share * (1 - 1 / place.tensor_parallel)
    between = left if keeps_whole_gradients(config, place) else shares["gradients"]
    found = counted(settings, place, between)
    kinds = {
        "weights": found["weights"] * shares["weights"], "gradients": found["gradients"] * between,
        "optimizer": found["optimizer"] * shares["optimizer"], "activations": highest(found, "activations"),
        "communication": found["communication"] * left,
    }  # fmt: skip
    kept = kinds["weights"] + kinds["optimizer"] + kinds["communication"]
    in_passes = kept + highest(found, "peak")
    in_update = kept + found["gradients"] * shares["gradients"] + found["scratch"] * shares["optimizer"]
    when = "forward and backward" if in_passes >= in_update else "optimizer step"
    return StepMemory({kind: size for kind, size in kinds.items() if size}, max(in_passes, in_update), when)


def counted(settings, place, between):
    """{what: bytes} of a whole model, of which `step_memory` takes a rank's share.

    Where blocks repeat, two shallow models are counted and the rest follows: each repetition adds as much as the last,
    to the highest of each phase of a step. Which phase has the highest of all may change with the depth.

    Args:
        between: the part of the gradients that a rank keeps between micro-batches.
    """
    depth, period = settings.model.n_layer, len(settings.model.pattern())
    if settings.train.gradient_checkpointing == "selective":
        period = math.lcm(period, 2)
    short = depth % period + 2 * period
    if depth <= short + period:
        return counted_whole(settings, place, between)
    one, two = (
        counted_whole(dataclasses.replace(settings, model=settings.model.replace(n_layer=n)), place, between)
        for n in (short, short + period)
    )
    return {what: one[what] + (two[what] - one[what]) * (depth - short) / period for what in one}


def counted_whole(settings, place, between):
    """What `counted` gives, by running a step of every block."""
    config = settings.train
    n_micro_batches = min(2, max(1, config.gradient_accumulation_steps // place.data_size))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        objective = bare_objective(settings, place)
    batch = example_batch(objective, settings)
    with fake:
        found = {
            "weights": bytes_of([*objective.parameters(), *objective.buffers()]),
            "gradients": bytes_of(objective.parameters()),
            "communication": communication_bytes(objective.model, config, place),
        }
        found["optimizer"], found["scratch"] = measured_update(objective.model, config)
        gathered = DTYPES[config.fsdp_dtype] if is_sharded(config, place) else torch.float32
        cast_parameters(objective, gathered)  # its gradients too, which are float32 again once they are scattered
        passes = measured_passes(objective, batch, place, n_micro_batches, between * 4 / gathered.itemsize)
    found |= {f"activations in {phase}": size for phase, size in passes.most_by_phase.items()}
    return found | {f"peak in {phase}": size for phase, size in passes.peak_by_phase.items()}


def highest(found, what):
    """The highest of all phases."""
    return max(size for name, size in found.items() if name.startswith(f"{what} in "))


def keeps_whole_gradients(config, place):
    """Whether a rank has gradients of all weights between micro-batches, though weights are sharded."""
    accumulates = config.gradient_accumulation_steps > place.data_size
    return is_sharded(config, place) and config.fsdp_accumulate == "whole" and accumulates


def bare_objective(settings, place):
    """The objective over a model that computes as it would at this place, with its blocks checkpointed as asked."""
    kind = OBJECTIVE_REGISTRY[settings.train.objective]
    model = ConfigurableGPT(settings.model, heads=kind.heads)
    kernels.install_without_data(model, place.device, settings.train.kernel_backend)
    for module in model.modules():
        if hasattr(module, "without_data"):
            module.without_data()
    checkpoint_activations(model, settings.train)
    return kind(model, settings.train)


def example_batch(objective, settings):
    """A micro-batch as the objective takes it, of real zeros: preparing one may look at its values."""
    batch = objective.example(settings.train.batch_size, settings.model.block_size)
    return objective.prepare(batch, settings.train.seed)


def measured_passes(objective, batch, place, n_micro_batches, gradient_share):
    """The StorageMeter after forward and backward of so many micro-batches."""
    meter, parameters = StorageMeter([*objective.parameters(), *objective.buffers()], gradient_share), []

    def accumulated(parameter):
        meter.gradient_is_there(parameter)
        meter.n_ready += 1
        half = "first" if meter.n_ready % len(parameters) < len(parameters) / 2 else "second"
        meter.phase = f"{half} half of backward {meter.n_ready // len(parameters)}"

    for parameter in objective.parameters():
        parameters.append(parameter)
        parameter.register_post_accumulate_grad_hook(accumulated)
    precision = torch.autocast("cpu", dtype=DTYPES[place.dtype], enabled=place.dtype != "float32")
    with meter:
        for index in range(n_micro_batches):
            meter.phase = f"forward {index}"
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
            with precision:
                sums = objective(inputs)
            (sums["loss"] * 1.0).backward()
            del sums, inputs
    return meter


def measured_update(model, config):
    """(bytes of the optimizers' state, bytes that an update needs beside it)."""
    optimizers = OPTIMIZER_REGISTRY[config.optimizer](
        parameter_plan(model), dict(model.named_parameters()), config, torch.device("cpu")
    )
    gradients = [torch.empty_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with StorageMeter([*model.parameters(), *model.buffers(), *gradients]) as meter:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    kept = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    state = bytes_of(value for value in kept if torch.is_tensor(value))
    return state, max(0, meter.peak - state)


def cast_parameters(module, dtype):
    """Parameters of another type in the place of the old ones; tied ones stay tied. `Module.to` swaps data, of which
    there is none."""
    new = {parameter: torch.nn.Parameter(parameter.detach().to(dtype)) for parameter in module.parameters()}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, new[parameter])


def communication_bytes(model, config, place):
    """What the ranks' mode needs on each beside its share of weights, gradients and optimizer.

    DDP and ZeRO-1 copy gradients into buckets. FSDP2 has whole weights of the block at work and of the next, which is
    gathered ahead, and of all that is outside the blocks; and whole gradients of a block, in float32. Without
    fsdp_reshard_after_forward every block stays whole.
    """
    if place.data_size == 1:
        return 0
    if not is_sharded(config, place):
        return bytes_of(model.parameters())
    outside, blocks = gathered_bytes(model, place)
    blocks.sort(reverse=True)
    gathered = sum(blocks[:2]) if config.fsdp_reshard_after_forward else sum(blocks)
    factor = DTYPES[config.fsdp_dtype].itemsize / 4
    return factor * (outside + gathered) + blocks[0]


def gathered_bytes(model, place):
    """(bytes outside the blocks, [bytes of each block]) that FSDP2 gathers on a rank: its own share of the experts."""

    def of(module):
        experts = [getattr(part, name) for part in parts_with(module, "split_experts") for name in part.split_experts]
        elsewhere = bytes_of(experts) * (1 - 1 / place.expert_parallel)
        return bytes_of(module.parameters()) - elsewhere

    blocks = [of(block) for block in model.blocks]
    return of(model) - sum(blocks), blocks


def bytes_of(tensors):
    """Bytes of tensors, a shared one once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
