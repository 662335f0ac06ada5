"""Optimizers from the parameter plan, learning rate schedules as pure functions of the step, gradient clipping.

optimizers = OPTIMIZER_REGISTRY['adamw'](plan, parameters, config, device)   # a list: Muon comes with an AdamW
factor = SCHEDULE_REGISTRY['cosine'](config, total_steps)                    # factor(step) in [0, 1]
"""

import math

import torch

from registry import Registry
from training_weights import laid_out_as, squared_norms, whole
from user_errors import UserError

OPTIMIZER_REGISTRY = Registry("optimizer", of="train")
SCHEDULE_REGISTRY = Registry("schedule", of="train")


# ---- optimizers: (plan, {name: parameter}, config, device) -> [torch optimizers] -------------------------------------


@OPTIMIZER_REGISTRY("adamw")
def adamw(plan, parameters, config, device):
    """AdamW (Loshchilov & Hutter 2019) on everything; weight decay where the plan says so."""
    return [_adamw([spec for spec in plan], parameters, config, device)]


@OPTIMIZER_REGISTRY("muon")
class MuonWithAdamW:
    """Muon (Jordan et al. 2024) on the matrices inside blocks, AdamW on embeddings, head, norms and biases.

    torch's own Muon, with updates scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one
    learning rate serves both.
    """

    class Options:
        muon_momentum: float = 0.95  # decay of Muon's momentum
        muon_learning_rate: float | None = None  # None is learning_rate

    def __new__(cls, plan, parameters, config, device):
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer='muon' needs torch 2.9 or newer and this is {torch.__version__}; use 'adamw'")
        o = config.options_for(cls)
        matrices = [spec for spec in plan if spec.is_matrix]
        if not matrices:
            raise UserError("optimizer='muon' found no matrix inside a block to train; use optimizer='adamw'")
        learning_rate = config.learning_rate if o.muon_learning_rate is None else o.muon_learning_rate
        if not learning_rate > 0:
            raise UserError(f"muon_learning_rate={learning_rate} must be above 0, or None for learning_rate")
        if not 0 <= o.muon_momentum < 1:
            raise UserError(f"muon_momentum={o.muon_momentum} must lie in [0, 1)")
        muon = Muon(
            _groups(matrices, parameters, config, learning_rate), lr=learning_rate, momentum=o.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        return [muon, _adamw([spec for spec in plan if not spec.is_matrix], parameters, config, device)]


class Muon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):
    """torch's own, which orthogonalises whole matrices: those that are sharded are gathered for it, one at a time.

    Every rank then computes the same update and keeps its part of it. torch's works on the shards too, a product of its
    iteration at a time, each with its exchange.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if not any(hasattr(parameter, "full_tensor") for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_whole(parameter, {name: group[name] for name in self.defaults})

    def _step_whole(self, parameter, settings):
        matrix = torch.nn.Parameter(whole(parameter).clone())
        matrix.grad = whole(parameter.grad)
        alone = torch.optim.Muon([matrix], **settings)
        alone.state[matrix] = {name: whole(value) for name, value in self.state[parameter].items()}
        alone.step()
        parameter.copy_(laid_out_as(parameter, matrix.detach()))
        self.state[parameter] = {name: laid_out_as(parameter, value) for name, value in alone.state[matrix].items()}


def _adamw(plan, parameters, config, device):
    groups = _groups(plan, parameters, config, config.learning_rate)
    settings = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    fused = device.type in ("cpu", "cuda", "mps", "xpu")  # one kernel for all parameters, where torch has it
    return torch.optim.AdamW(groups, fused=fused, **settings)


def _groups(plan, parameters, config, learning_rate):
    """Two groups, decayed and not; `names` makes checkpoints readable and `peak_lr` is what schedules multiply."""
    groups = []
    for decayed in (True, False):
        names = [spec.name for spec in plan if spec.weight_decay == decayed]
        if names:
            groups.append({
                "params": [parameters[name] for name in names], "names": names, "lr": learning_rate,
                "weight_decay": config.weight_decay if decayed else 0.0, "peak_lr": learning_rate,
            })  # fmt: skip
    return groups


def set_learning_rate(optimizers, factor):
    """Set every group to factor x its peak, and return the first group's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return optimizers[0].param_groups[0]["lr"]


# ---- schedules: step -> factor of the peak ---------------------------------------------------------------------------


class Schedule:
    """Linear warm-up over warmup_iters, then `decay` from 1 to min_lr / learning_rate at lr_decay_iters.

    Args:
        config: TrainConfig.
        total_steps: the run's length, where the decay ends unless lr_decay_iters says otherwise.
    """

    def __init__(self, config, total_steps):
        self.warmup = config.warmup_iters
        self.end = config.lr_decay_iters or total_steps
        self.floor = config.min_learning_rate / config.learning_rate
        self.options = config.options_for(type(self))

    def __call__(self, step):
        """Factor for the step-th update, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if step >= self.end:
            return self.decay(1.0)
        return self.decay((step - self.warmup) / max(1, self.end - self.warmup))

    def decay(self, progress):
        """Factor at `progress` in [0, 1] from the end of the warm-up to the end of the decay."""
        raise NotImplementedError


@SCHEDULE_REGISTRY("cosine")
class Cosine(Schedule):
    """Half a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    def decay(self, progress):
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


@SCHEDULE_REGISTRY("linear")
class Linear(Schedule):
    """A straight line."""

    def decay(self, progress):
        return 1 + (self.floor - 1) * progress


@SCHEDULE_REGISTRY("wsd")
class WarmupStableDecay(Schedule):
    """Stay at the peak, then fall in a line over the last part (Hu et al. 2024, MiniCPM)."""

    class Options:
        wsd_decay_fraction: float = 0.2  # the part of the run, after warm-up, that decays

    def __init__(self, config, total_steps):
        super().__init__(config, total_steps)
        if not 0 < self.options.wsd_decay_fraction <= 1:
            raise UserError(f"wsd_decay_fraction={self.options.wsd_decay_fraction} must lie in (0, 1]")

    def decay(self, progress):
        into_decay = max(0.0, 1 - (1 - progress) / self.options.wsd_decay_fraction)
        return 1 + (self.floor - 1) * into_decay


@SCHEDULE_REGISTRY("constant")
class Constant(Schedule):
    """The peak, for ever."""

    def decay(self, progress):
        return 1.0


def build_schedule(config, total_steps):
    """The schedule of a run; decay_lr=False keeps the peak, whatever the schedule."""
    return SCHEDULE_REGISTRY[config.schedule if config.decay_lr else "constant"](config, total_steps)


# ---- gradients -------------------------------------------------------------------------------------------------------


def clip_gradients(parameters, max_norm):
    """Scale gradients so that their global norm is at most max_norm (0: leave them), and return the norm before."""
    by_mesh = {}  # one call takes the gradients of one mesh, or those that are whole
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    gradients = [parameter.grad for group in by_mesh.values() for parameter in group]
    is_whole = by_mesh.keys() == {None}
    norm = torch.nn.utils.get_total_norm(gradients) if is_whole else squared_norms(gradients).sum().sqrt()
    # On a CPU looking at the norm is free and a pass over all gradients is not; a GPU would have to be waited for.
    if max_norm and not (norm.device.type == "cpu" and norm <= max_norm):
        for group in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
