"""Optimizers against their equations, groups from the plan, schedules against their formulas, clipping."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from model_builder import ConfigurableGPT, parameter_plan
from model_parameters import ParameterSpec
from training_config import TrainConfig
from training_optim import (
    OPTIMIZER_REGISTRY,
    SCHEDULE_REGISTRY,
    build_schedule,
    clip_gradients,
    set_learning_rate,
)
from user_errors import UserError

CPU = torch.device("cpu")


def optimizers_of(model, **settings):
    config = TrainConfig(**settings)
    return OPTIMIZER_REGISTRY[config.optimizer](parameter_plan(model), dict(model.named_parameters()), config, CPU)


@pytest.fixture
def model(tiny):
    return ConfigurableGPT(tiny(arch_preset="gpt2"))


def names_in(optimizer, decayed):
    groups = [group for group in optimizer.param_groups if bool(group["weight_decay"]) == decayed]
    return {name for group in groups for name in group["names"]}


# ---- AdamW ----------------------------------------------------------------------------------------------------------


def test_adamw_is_its_equation_for_three_steps():
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    lr, beta1, beta2, eps, decay = 0.01, 0.8, 0.95, 1e-3, 0.3
    weights = {"matrix": torch.randn(3, 4, dtype=torch.float64), "gain": torch.randn(3, dtype=torch.float64)}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    plan = [ParameterSpec(name, tuple(p.shape), "ffn", "normal", p.dim() > 1, True) for name, p in parameters.items()]
    config = TrainConfig(learning_rate=lr, beta1=beta1, beta2=beta2, adam_eps=eps, weight_decay=decay)
    (optimizer,) = OPTIMIZER_REGISTRY["adamw"](plan, parameters, config, CPU)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    for t in (1, 2, 3):
        for name, parameter in parameters.items():
            g = parameter.grad = torch.randn_like(parameter)
            m, v = moments[name]
            m, v = moments[name] = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            w = weights[name] * (1 - lr * (decay if name == "matrix" else 0))
            weights[name] = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-12, atol=1e-12)


def test_every_parameter_is_trained_once_and_decayed_where_the_plan_says(model):
    (optimizer,) = optimizers_of(model, weight_decay=0.2)
    plan = parameter_plan(model)
    assert names_in(optimizer, True) == {spec.name for spec in plan if spec.weight_decay}
    assert names_in(optimizer, False) == {spec.name for spec in plan if not spec.weight_decay}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(plan) and {*map(id, parameters)} == {*map(id, model.parameters())}
    for group in optimizer.param_groups:
        assert [id(p) for p in group["params"]] == [id(model.get_parameter(name)) for name in group["names"]]


def test_without_gradients_only_what_decays_moves(tiny):
    model = ConfigurableGPT(tiny(arch_preset="gpt2", residual_scaling="learned", qk_norm=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = optimizers_of(model, weight_decay=0.5, learning_rate=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
    assert any(p.dim() == 1 and p.any() for p in model.parameters())


def test_fused_adamw_equals_the_plain_one(model):
    (fused,) = optimizers_of(model)
    assert fused.defaults["fused"]
    copies = [p.detach().clone().requires_grad_() for group in fused.param_groups for p in group["params"]]
    plain = torch.optim.AdamW(copies, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, foreach=False)
    for group in fused.param_groups:
        group["weight_decay"] = 0.0
    originals = [p for group in fused.param_groups for p in group["params"]]
    for _ in range(2):
        for ours, theirs in zip(originals, copies, strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        fused.step()
        plain.step()
    for ours, theirs in zip(originals, copies, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- Muon -----------------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest(tiny):
    model = ConfigurableGPT(tiny(arch_preset="gpt2", weight_tying=False))
    muon, adamw = optimizers_of(model, optimizer="muon")
    kinds = ["mixer.qkv", "mixer.out", "ffn.up", "ffn.down"]
    matrices = {f"blocks.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert names_in(muon, True) == matrices and names_in(muon, False) == set()
    assert names_in(adamw, True) == {"token_embedding.weight", "position_embedding.table.weight", "head.weight"}
    everything = {name for name, _ in model.named_parameters()}
    assert names_in(adamw, False) == everything - matrices - names_in(adamw, True)


def test_muon_honours_its_settings(model):
    options = {"muon_momentum": 0.8, "muon_learning_rate": 0.02}
    muon, adamw = optimizers_of(model, optimizer="muon", learning_rate=1e-3, weight_decay=0.2, part_options=options)
    assert muon.param_groups[0]["momentum"] == 0.8
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 1e-3)
    assert muon.param_groups[0]["weight_decay"] == adamw.param_groups[0]["weight_decay"] == 0.2
    set_learning_rate([muon, adamw], 0.5)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.01, 5e-4)
    same, _ = optimizers_of(model, optimizer="muon", learning_rate=3e-4)
    assert same.param_groups[0]["lr"] == 3e-4


def test_muons_update_is_orthogonal_and_of_the_size_of_adamws(model):
    muon, _ = optimizers_of(model, optimizer="muon", learning_rate=0.1, weight_decay=0.0)
    for parameter in muon.param_groups[0]["params"]:
        before = parameter.detach().clone()
        parameter.grad = torch.randn_like(parameter)
        before, gradient = parameter.detach().clone(), parameter.grad.clone()
        muon.step()
        update = (before - parameter.detach()) / 0.1
        # Newton-Schulz brings singular values near 1; Liu et al. 2025 scale them by 0.2 sqrt(max(A, B)).
        singular = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
        assert ((singular > 0.4) & (singular < 1.4)).all()
        assert (update * gradient).sum() > 0
        parameter.grad = None


def test_muon_without_a_matrix_is_refused(model):
    plan = [spec for spec in parameter_plan(model) if not spec.is_matrix]
    with pytest.raises(UserError, match="optimizer='muon' found no matrix"):
        OPTIMIZER_REGISTRY["muon"](plan, dict(model.named_parameters()), TrainConfig(optimizer="muon"), CPU)


@pytest.mark.parametrize("option, value", [("muon_learning_rate", 0.0), ("muon_momentum", 1.0), ("muon_momentum", -1)])
def test_muons_settings_are_checked(model, option, value):
    with pytest.raises(UserError, match=f"{option}={value} must"):
        optimizers_of(model, optimizer="muon", part_options={option: value})


def test_an_older_torch_is_told(model, monkeypatch):
    monkeypatch.delattr("torch.optim.Muon")
    with pytest.raises(UserError, match=r"optimizer='muon' needs torch 2\.9 or newer"):
        optimizers_of(model, optimizer="muon")


@pytest.mark.parametrize("name", OPTIMIZER_REGISTRY)
def test_every_optimizer_covers_every_parameter_once_and_lowers_the_loss(model, name):
    optimizers = optimizers_of(model, optimizer=name, learning_rate=3e-3)
    names = [n for optimizer in optimizers for group in optimizer.param_groups for n in group["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    idx, losses = torch.arange(32).view(2, 16) % 29, []
    for _ in range(12):
        loss = F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3


def test_the_learning_rate_is_set_from_each_groups_peak(model):
    optimizers = optimizers_of(model, learning_rate=2e-3)
    assert set_learning_rate(optimizers, 0.25) == pytest.approx(5e-4)
    assert set_learning_rate(optimizers, 0.25) == pytest.approx(5e-4), "factors must not pile up"
    assert {group["lr"] for group in optimizers[0].param_groups} == {5e-4}


# ---- schedules ------------------------------------------------------------------------------------------------------


def nanogpt(step, warmup=10, end=100, floor=0.1):
    """nanoGPT's get_lr with learning_rate 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step > end:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup))) * (1 - floor)


def factor(schedule, step, total=100, **settings):
    defaults = {"schedule": schedule, "learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10}
    return build_schedule(TrainConfig(**{**defaults, **settings}), total)(step)


STEPS = [0, 1, 5, 9, 10, 11, 40, 55, 80, 82, 91, 99, 100, 101, 500]
FORMULAS = {
    "cosine": lambda s: nanogpt(s),
    "linear": lambda s: 1 - 0.9 * min(1, (s - 10) / 90),
    "wsd": lambda s: 1.0 if s <= 82 else 1 - 0.9 * min(1, (s - 82) / 18),  # the last fifth of 90 steps
    "constant": lambda s: 1.0,
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("step", STEPS)
def test_schedules_equal_their_formula(schedule, step):
    expected = (step + 1) / 11 if step < 10 else FORMULAS[schedule](step)
    assert factor(schedule, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step", range(0, 130, 7))
def test_cosine_is_nanogpts(step):
    assert factor("cosine", step) == pytest.approx(nanogpt(step), rel=1e-12)
    assert factor("cosine", step, total=900, lr_decay_iters=100) == pytest.approx(nanogpt(step), rel=1e-12)
    assert factor("cosine", step, learning_rate=3e-4, min_lr=3e-5) == pytest.approx(nanogpt(step), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULE_REGISTRY)
def test_what_every_schedule_keeps(schedule):
    values = [factor(schedule, step) for step in range(130)]
    assert all(0 < value <= 1 for value in values)
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values[10:]))
    assert len({*values[100:]}) == 1  # nothing moves after the end
    assert values[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert [factor(schedule, step, decay_lr=False) for step in (4, 10, 99, 200)] == pytest.approx([5 / 11, 1, 1, 1])
    assert factor(schedule, 0, warmup_iters=0) == pytest.approx(1.0)
    assert factor(schedule, 0, total=1, warmup_iters=0) == pytest.approx(1.0)


def test_the_floor_is_a_tenth_unless_told():
    assert factor("linear", 100, learning_rate=0.02, min_lr=None) == pytest.approx(0.1)
    assert factor("linear", 100, learning_rate=0.02, min_lr=0.0) == 0.0
    assert factor("linear", 100, learning_rate=0.02, min_lr=0.02) == pytest.approx(1.0)


def test_wsd_decays_over_the_part_asked_for():
    options = {"part_options": {"wsd_decay_fraction": 0.5}}
    assert [factor("wsd", step, **options) for step in (55, 100)] == pytest.approx([1.0, 0.1])
    assert factor("wsd", 77, **options) == pytest.approx(1 - 0.9 * 22 / 45)
    assert factor("wsd", 55, part_options={"wsd_decay_fraction": 1.0}) == pytest.approx(factor("linear", 55))
    for fraction in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match=rf"wsd_decay_fraction={fraction} must lie in \(0, 1\]"):
            factor("wsd", 0, part_options={"wsd_decay_fraction": fraction})


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="schedule='cosin' does not exist; did you mean 'cosine'"):
        factor("cosin", 0)


# ---- clipping -------------------------------------------------------------------------------------------------------


def gradients():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    return parameters  # norm 5, and one that has no gradient


@pytest.mark.parametrize("max_norm, kept", [(1.0, 0.2), (2.5, 0.5), (5.0, 1.0), (9.0, 1.0), (0.0, 1.0)])
def test_clipping_scales_to_the_global_norm_and_returns_what_it_was(max_norm, kept):
    parameters = gradients()
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, kept * torch.tensor([3.0, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters[1].grad, kept * torch.tensor([4.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(max_norm):
    parameters = gradients()
    parameters[0].grad[1] = float("nan")
    assert not math.isfinite(clip_gradients(parameters, max_norm).item())
