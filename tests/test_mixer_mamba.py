"""Mamba-1 and Mamba-2: every form against the equation written out, transformers' mixers, decoding, documents, cost."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mamba_helpers import mamba2_inputs, mamba_inputs, runs_of
from mixer_attention import MIXER_REGISTRY
from mixer_mamba import Mamba, Mamba2
from mixer_mamba_scan import selective_scan_recurrent, ssd_recurrent
from model_builder import ConfigurableGPT, initialise, parameter_plan
from recurrence_helpers import (
    TOLERANCES,
    assert_all_close,
    check_it_trains_compiled,
    check_state_has_one_size,
    check_steps_leave_the_state_before_alone,
    mixer_maker,
    random,
)
from user_errors import UserError

by_documents = pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
by_mixer = pytest.mark.parametrize("mixer", ["mamba", "mamba2"])

MIXERS = {
    "mamba": {},
    "mamba-bias-rank2-conv1": {"bias": True, "dt_rank": 2, "d_conv": 1, "d_state": 3},
    "mamba-conv3-wide": {"d_conv": 3, "expand": 3.0, "conv_bias": False},
    "mamba2": {"d_state": 8, "chunk_size": 16},
    "mamba2-heads": {"d_state": 8, "headdim": 4, "chunk_size": 8},
    "mamba2-groups": {"d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 8, "bias": True, "d_conv": 2},
    "mamba2-heads-are-groups": {"d_state": 4, "headdim": 8, "ngroups": 4, "chunk_size": 5, "conv_bias": False},
}
by_variant = pytest.mark.parametrize("variant", MIXERS)


@pytest.fixture
def make(tiny):
    return mixer_maker(tiny, MIXERS, std=0.5)


# ---- the mixers -----------------------------------------------------------------------------------------------------


@by_variant
@by_documents
@pytest.mark.parametrize("T", [1, 9, 33])
def test_both_forms_of_a_mixer_are_one(make, variant, documents, T):
    ids = runs_of(2, T) if documents else None
    results = []
    for recurrence in ("chunk", "recurrent"):
        mixer = make(variant, recurrence=recurrence)
        x = random(2, T, 16).requires_grad_()
        y = mixer(x, document_ids=ids)
        results.append([y, *torch.autograd.grad((y * random(*y.shape, seed=1)).sum(), [x, *mixer.parameters()])])
    assert_all_close(*results)


@by_variant
def test_steps_equal_forward_and_leave_the_state_before_alone(make, variant):
    for recurrence in ("chunk", "recurrent"):
        cuts = [1] * 40, [17, 1, 20, 2], [40], [1, 39]
        check_steps_leave_the_state_before_alone(make(variant, recurrence=recurrence), 40, cuts)


@by_variant
def test_the_last_state_is_that_of_single_steps(make, variant):
    mixer, x = make(variant), random(2, 40, 16)
    at_once = mixer.step(x, mixer.init_state(2, dtype=torch.float64))[1]
    state = mixer.init_state(2, dtype=torch.float64)
    for token in x.split(1, dim=1):
        state = mixer.step(token, state)[1]
    for name in state:
        torch.testing.assert_close(at_once[name], state[name], **TOLERANCES[torch.float64])


@by_variant
def test_documents_are_separate_texts_to_the_gradient(make, variant):
    mixer, x = make(variant), random(1, 40, 16).requires_grad_()
    ids = torch.tensor([[7] * 3 + [8] * 1 + [7] * 17 + [2] * 19])  # 7 comes twice: interrupted, it does not go on
    alone = torch.cat([mixer(piece) for piece in x.split([3, 1, 17, 19], dim=1)], dim=1)
    packed = mixer(x, document_ids=ids)
    weights, inputs = random(1, 40, 16, seed=3), [x, *mixer.parameters()]
    assert_all_close(*([y, *torch.autograd.grad((y * weights).sum(), inputs)] for y in (alone, packed)))


@by_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_state_has_one_size_for_ever(make, mixer, dtype):
    state = check_state_has_one_size(make(mixer, dtype=dtype), dtype)
    assert state["ssm"].dtype == torch.promote_types(dtype, torch.float32)


@by_mixer
def test_half_precision_is_close(make, mixer):
    wanted = make(mixer, fresh=True, dtype=torch.float32)
    x = random(2, 33, 16, dtype=torch.float32)
    y = wanted(x)
    y.square().mean().backward()
    half = make(mixer, fresh=True, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), y, rtol=0.1, atol=2e-2 * y.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        cast = make(mixer, fresh=True, dtype=torch.float32)
        z = cast(x)
    z.float().square().mean().backward()
    torch.testing.assert_close(z.float(), y, rtol=0.1, atol=2e-2 * y.abs().max().item())
    for (name, one), other in zip(wanted.named_parameters(), cast.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 0.1 * one.grad.norm(), name


@by_mixer
def test_it_compiles_in_one_piece(make, mixer):
    x = random(2, 20, 16, dtype=torch.float32)
    check_it_trains_compiled(make(mixer, dtype=torch.float32), x, runs_of(2, 20))


# ---- against transformers -------------------------------------------------------------------------------------------


def hf_mamba(transformers, config):
    from transformers.models.mamba.modeling_mamba import MambaMixer

    theirs = transformers.MambaConfig(
        hidden_size=16, state_size=config["d_state"], expand=config["expand"], conv_kernel=config["d_conv"],
        time_step_rank=config["dt_rank"], use_bias=config["bias"], use_conv_bias=config["conv_bias"],
        num_hidden_layers=1,
    )  # fmt: skip
    return MambaMixer(theirs, 0)


def hf_mamba2(transformers, config):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = transformers.Mamba2Config(
        hidden_size=16, state_size=config["d_state"], expand=config["expand"], conv_kernel=config["d_conv"],
        head_dim=config["headdim"], num_heads=16 * config["expand"] // config["headdim"], n_groups=config["ngroups"],
        use_bias=config["bias"], use_conv_bias=config["conv_bias"], chunk_size=8, num_hidden_layers=1,
    )  # fmt: skip
    return Mamba2Mixer(theirs, 0)


HF = {
    "mamba": (hf_mamba, dict(d_state=16, d_conv=4, expand=2, dt_rank=1, bias=False, conv_bias=True)),
    "mamba-bias": (hf_mamba, dict(d_state=5, d_conv=3, expand=3, dt_rank=4, bias=True, conv_bias=False)),
    "mamba2": (hf_mamba2, dict(d_state=8, d_conv=4, expand=2, headdim=8, ngroups=1, bias=False, conv_bias=True)),
    "mamba2-groups": (hf_mamba2, dict(d_state=4, d_conv=4, expand=2, headdim=4, ngroups=2, bias=True, conv_bias=True)),
    "mamba2-bare": (hf_mamba2, dict(d_state=3, d_conv=2, expand=1, headdim=16, ngroups=1, bias=False, conv_bias=False)),
}


@pytest.mark.parametrize("T", [1, 13, 32])
@pytest.mark.parametrize("recurrence", ["chunk", "recurrent"])
@pytest.mark.parametrize("variant", HF)
def test_it_equals_transformers_parameter_by_parameter(transformers, tiny, variant, recurrence, T):
    if variant == "mamba2-groups" and transformers.__version__.startswith("5.20."):
        pytest.skip("transformers 5.20, the last for Python 3.10, norms all groups of Mamba-2 together")
    build, options = HF[variant]
    theirs = build(transformers, options)
    own = {**options, "expand": float(options["expand"]), "recurrence": recurrence, "chunk_size": 5}
    ours = MIXER_REGISTRY[variant.partition("-")[0]](tiny(position_encoding="none", **own), 0)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    for (name, parameter), seed in zip(theirs.named_parameters(), range(99), strict=False):
        parameter.data.copy_(0.5 * random(*parameter.shape, seed=seed))
        ours.get_parameter(name).data.copy_(parameter)
    results = []
    for mixer in (ours, theirs):
        x = random(2, T, 16, dtype=torch.float32).requires_grad_()
        y = mixer(x)
        grads = torch.autograd.grad((y * random(*y.shape, dtype=torch.float32, seed=1)).sum(), [x, *mixer.parameters()],
                                    allow_unused=True)  # fmt: skip
        by_name = dict(zip(dict(mixer.named_parameters()), grads[1:], strict=True))
        results.append([y, grads[0], *(by_name[name] for name in sorted(by_name))])
    for one, other in zip(*results, strict=True):  # theirs has float32 inside, whatever it is given
        assert (one - other).abs().max() <= 3e-6 * T * other.abs().max().clamp(min=1)


# ---- initial values, the plan ---------------------------------------------------------------------------------------


@by_mixer
def test_dt_starts_where_it_is_told(make, mixer):
    layer = make(mixer, fresh=True, n_embd=256, n_head=4, headdim=2)
    dt = F.softplus(layer.dt_proj.bias if mixer == "mamba" else layer.dt_bias)
    assert dt.min() >= 0.001 * (1 - 1e-4) and dt.max() <= 0.1 * (1 + 1e-4)
    log = ((dt.log() - math.log(0.001)) / math.log(100)).detach()
    assert 0.4 < log.mean() < 0.6 and log.std().item() == pytest.approx(12**-0.5, rel=0.2)
    other = make(mixer, fresh=True, dt_min=0.5, dt_max=0.5, dt_init_floor=0.01)
    dt = F.softplus(other.dt_proj.bias if mixer == "mamba" else other.dt_bias)
    torch.testing.assert_close(dt, torch.full_like(dt, 0.5), rtol=1e-5, atol=0)


def test_a_and_the_rest_start_as_the_papers_say(make):
    mamba = make("mamba", fresh=True, n_embd=64, dt_rank=9)
    wanted = -torch.arange(1.0, 17).expand(128, -1).double()
    torch.testing.assert_close(-mamba.A_log.exp(), wanted, rtol=1e-6, atol=0)
    assert (mamba.D == 1).all() and mamba.conv1d.weight.abs().max() <= 0.5 and mamba.conv1d.weight.std() > 0.25
    weight = mamba.dt_proj.weight
    assert weight.abs().max() <= 1 / 3 and weight.std().item() == pytest.approx(1 / 3**1.5, rel=0.1)
    constant = make("mamba", fresh=True, dt_rank=4, dt_init="constant", dt_scale=3.0)
    assert (constant.dt_proj.weight == 1.5).all()
    mamba2 = make("mamba2", fresh=True, n_embd=256, n_head=4, headdim=2)
    A = mamba2.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, rel=0.1) and (mamba2.D == 1).all()


def test_what_decays_and_what_starts_small(tiny):
    for mixer, never in (("mamba", {"A_log", "D"}), ("mamba2", {"A_log", "D", "dt_bias"})):
        model = ConfigurableGPT(tiny(block_pattern=f"{mixer}/none", position_encoding="none", bias=True))
        plan = {s.name.removeprefix("blocks.0.mixer."): s for s in parameter_plan(model) if "blocks.0.mixer." in s.name}
        decayed = {name for name, spec in plan.items() if spec.weight_decay}
        assert decayed == {n for n in plan if n.endswith(".weight") and n != "norm.weight"} and not decayed & never
        assert {name for name, spec in plan.items() if spec.init == "residual"} == {"out_proj.weight"}
        assert {n for n, spec in plan.items() if spec.init == "normal"} <= {"in_proj.weight", "x_proj.weight"}


def test_another_initialisation_leaves_the_own_values_in_place(tiny):
    model = ConfigurableGPT(tiny(block_pattern="mamba2/none", position_encoding="none"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    initialise(model, 1337)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- cost -----------------------------------------------------------------------------------------------------------


class CountElementwise(TorchDispatchMode):
    """FLOPs of multiplications, additions and sums, one each."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.total += {"mul": y, "add": y, "sum": args[0]}[name].numel() if name in ("mul", "add", "sum") else 0
        return y


def test_the_scans_cost_what_their_equations_do(tiny):
    T = 8
    x, dt, A, B, C, state = mamba_inputs(T, batch=1)
    with CountElementwise() as counter:
        selective_scan_recurrent(x, dt, A, B, C, state)
    D, N = 6, 4
    assert counter.total == T * (6 * D * N + D)
    mamba = Mamba(tiny(d_state=4, d_conv=3), 0)
    assert mamba.mixing_flops(T) == 6 * 32 * 4 + 3 * 32 + 2 * 32 * (3 + 1) == mamba.elementwise_flops(T)
    x, dt, A, B, C, state = mamba2_inputs(T, batch=1)
    with CountElementwise() as counter:
        ssd_recurrent(x, dt, A, B, C, state)
    assert counter.total == T * (5 * 18 * 4 + 18 + 6)  # 6 more: dt A
    options = dict(d_state=4, headdim=8, d_conv=3, conv_bias=False)
    mamba2 = Mamba2(tiny(recurrence="recurrent", **options), 0)
    assert mamba2.mixing_flops(T) == 5 * 32 * 4 + 3 * 32 + 2 * 4 + 2 * (32 + 8) * 3 == mamba2.elementwise_flops(T)


@pytest.mark.parametrize("T", [5, 8, 16, 40])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_chunks_cost_the_products_that_they_make(tiny, T, ngroups):
    mamba2 = Mamba2(tiny(d_state=4, headdim=8, ngroups=ngroups, chunk_size=8), 0)
    for parameter in mamba2.parameters():
        nn.init.normal_(parameter)
    with FlopCounterMode(display=False) as counter:
        y = mamba2(torch.randn(2, T, 16, requires_grad=True))
        forward = counter.get_total_flops()
        y.sum().backward()
    linear = 2 * sum(m.weight.numel() for m in mamba2.modules() if isinstance(m, nn.Linear))
    last_chunk = 4 * 32 * 4 * 8 / T if T > 8 else 0  # its state is never made
    assert forward / (2 * T) == pytest.approx(linear + mamba2.product_flops(T) - last_chunk)
    assert counter.get_total_flops() == 3 * forward


@by_mixer
def test_no_cost_grows_with_the_context(make, mixer):
    layer = make(mixer)
    assert layer.mixing_flops(512) == layer.mixing_flops(8192)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer, options, message", [
    ("mamba", {"d_state": 0}, "d_state=0 must be above 0"),
    ("mamba2", {"d_conv": 0}, "d_conv=0 must be above 0"),
    ("mamba", {"chunk_size": 0}, "chunk_size=0 must be above 0"),
    ("mamba", {"dt_rank": -1}, "dt_rank=-1 must be above 0"),
    ("mamba", {"dt_min": 0.2}, "dt_max=0.1 must not be below dt_min=0.2"),
    ("mamba", {"recurrence": "fast"}, "recurrence='fast' does not exist"),
    ("mamba", {"dt_init": "zero"}, "dt_init='zero' must be random or constant"),
    ("mamba2", {"headdim": 5}, "headdim=5 does not divide the inner width 32 of expand=2.0 and n_embd=16"),
    ("mamba2", {"headdim": 8, "ngroups": 3}, "ngroups=3 does not divide the 4 heads of headdim=8"),
    ("mamba2", {"a_init_min": 0.0}, "a_init_min=0.0 must be above 0"),
])  # fmt: skip
def test_bad_options_are_refused_in_a_sentence(tiny, mixer, options, message):
    with pytest.raises(UserError, match=message):
        MIXER_REGISTRY[mixer](tiny(position_encoding="none", **options), 0)
