"""Mixture of experts: held to the equations, to transformers, and to itself computed otherwise."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import grouped
from model_builder import ConfigurableGPT, initialise, on_meta, parameter_plan
from model_config import ModelArchitectureConfig
from model_flops import active_parameters, count, flops_per_token
from model_helpers import scrambled
from model_moe import MoE, loads_of
from training_config import TrainConfig
from training_helpers import assert_same_run, book, read_json, rows, weights, workshop
from training_objectives import CausalLM, added
from training_optim import OPTIMIZER_REGISTRY
from user_errors import UserError

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
B, T, C = 2, 11, 16

CASES = {  # every way to score, weigh and build experts
    "mixtral": {},
    "one-unnormalised": {"experts_per_token": 1, "normalize_router_weights": False},
    "all": {"n_experts": 3, "experts_per_token": 3},
    "sigmoid": {"router_score": "sigmoid", "n_experts": 6, "experts_per_token": 3},
    "shared": {"n_shared_experts": 2, "expert_hidden": 8},
    "standard": {"expert_type": "standard", "activation": "relu2", "n_shared_experts": 1},
    "geglu": {"expert_type": "geglu", "router_bias_rate": 0.1},
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def moe(tiny):
    """A MoE with large random weights, in float64 unless told otherwise."""

    def make(case="mixtral", dtype=torch.float64, **options):
        part = scrambled(MoE(tiny(ffn_type="moe", **{**CASES[case], **options}), 0)).to(dtype)
        if part.choice_bias is not None:
            part.choice_bias.normal_(std=0.3)
        return part

    return make


@pytest.fixture
def objective(tiny):
    """causal_lm over a model of two moe layers and its batch of B x T tokens."""

    def make(dtype=torch.float64, backend="auto", **options):
        model = scrambled(ConfigurableGPT(tiny(ffn_type="moe", **options)), 0.2).to(dtype)
        kernels.choose(model, CPU, backend)
        return CausalLM(model, TrainConfig())

    return make


def batch_of(seed, b=B, t=T):
    tokens = torch.randint(29, (b, t + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = -100  # not supervised
    return {"inputs": tokens[:, :-1], "targets": targets}


def inputs(dtype=torch.float64, b=B, t=T):
    return torch.randn(b, t, C, dtype=dtype, generator=torch.Generator().manual_seed(5))


def heard(part, x):
    """(output, auxiliary loss, counts) of one forward."""
    part.is_heard = True
    y = part(x)
    return y, *part.found


# ---- the equations --------------------------------------------------------------------------------------------------


def by_hand(part, x, config):
    """The sum over the chosen experts, one token at a time, each expert a plain network."""
    o, act = part.options, {"swiglu": F.silu, "geglu": F.gelu, "standard": lambda a: F.relu(a).square()}
    act, H = act[o.expert_type], part.hidden

    def network(token, up, down):
        if o.expert_type == "standard":
            return down @ act(up @ token)
        return down @ (act(up[:H] @ token) * (up[H:] @ token))

    def one(token):
        logits = part.router.weight @ token
        scores = logits.exp() / logits.exp().sum() if o.router_score == "softmax" else 1 / (1 + (-logits).exp())
        ranked = scores if part.choice_bias is None else scores + part.choice_bias
        chosen = sorted(range(o.n_experts), key=lambda e: -ranked[e].item())[: o.experts_per_token]
        total = sum(scores[e] for e in chosen) if o.normalize_router_weights else 1
        y = sum(scores[e] / total * network(token, part.experts.up[e], part.experts.down[e]) for e in chosen)
        return y if part.shared is None else y + part.shared(token)

    return torch.stack([one(token) for token in x.flatten(0, 1)]).view_as(x)


def all_gradients(y, part, x):
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(y.dtype)
    names = [name for name, _ in part.named_parameters()]
    return dict(zip(["x", *names], torch.autograd.grad((y * grad).sum(), [x, *part.parameters()]), strict=True))


@every_case
def test_outputs_and_gradients_are_the_equations(moe, tiny, case):
    part, x = moe(case), inputs().requires_grad_()
    y, wanted = part(x), by_hand(part, x, tiny())
    torch.testing.assert_close(y, wanted, **EXACT)
    torch.testing.assert_close(all_gradients(y, part, x), all_gradients(wanted, part, x), **EXACT)


@every_case
@pytest.mark.parametrize("shape", [(B, T), (1, 1), (4, 64)], ids=str)
def test_sorted_equals_plain(moe, case, shape):
    plain, x = moe(case), inputs(b=shape[0], t=shape[1]).requires_grad_()
    fast = copy.deepcopy(plain)
    assert grouped.install(fast, CPU) == "sorted" and "combine" in vars(fast.experts)
    torch.testing.assert_close(fast(x), plain(x), **EXACT)
    torch.testing.assert_close(all_gradients(fast(x), fast, x), all_gradients(plain(x), plain, x), **EXACT)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
@every_case
def test_grouped_mm_equals_plain(moe, case, dtype, tolerance):
    plain, x = moe(case, dtype), inputs(dtype).requires_grad_()
    fast = copy.deepcopy(plain)
    fast.experts.combine = functools.partial(grouped.experts, fast.experts, use_grouped_mm=grouped._always)
    torch.testing.assert_close(fast(x), plain(x), rtol=tolerance, atol=tolerance * plain(x).abs().max().item())
    wanted = all_gradients(plain(x), plain, x)
    for name, gradient in all_gradients(fast(x), fast, x).items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < tolerance, name


def test_the_check_refuses_products_that_are_wrong(moe, tiny, monkeypatch):
    part, collect = moe(dtype=torch.float32), grouped.sum_of_choices
    assert grouped.equals_plain(part.experts, torch.float32, grouped.SORTED)
    monkeypatch.setattr(grouped, "sum_of_choices", lambda y, inverse: 1.01 * collect(y, inverse))
    assert not grouped.equals_plain(part.experts, torch.float32, grouped.SORTED)
    assert grouped.install(part, CPU) == "plain" and "combine" not in vars(part.experts)
    assert grouped.install(ConfigurableGPT(tiny()), CPU) is None


def test_kernels_say_how_experts_are_computed(tiny):
    model = ConfigurableGPT(tiny(ffn_type="moe"))
    assert kernels.choose(model, CPU, "plain")["experts"] == "plain"
    assert kernels.choose(model, CPU, "auto")["experts"] in ("sorted", "compiled")
    assert "experts" not in kernels.choose(ConfigurableGPT(tiny()), CPU, "auto")


@pytest.mark.parametrize("path", ["plain", "sorted"])
def test_half_precision_routes_in_float32(moe, path):
    part, x = moe(dtype=torch.float32), inputs(torch.float32)
    if path == "sorted":
        grouped.install(part, CPU)
    wanted, logits = part(x), part.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part.route(x), logits)
        y = part(x)
    assert y.dtype == torch.float32
    assert 0 < (y - wanted).norm() / wanted.norm() < 0.02


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(8, 2), (4, 3), (5, 5)])
def test_a_layer_equals_mixtrals(transformers, moe, n, k):
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    part, x = moe(n_experts=n, experts_per_token=k, expert_hidden=24), inputs().requires_grad_()
    config = transformers.MixtralConfig(
        hidden_size=C, intermediate_size=24, num_local_experts=n, num_experts_per_tok=k, experts_implementation="eager"
    )
    theirs = MixtralSparseMoeBlock(config).double()
    ours = {"gate.weight": part.router.weight, "experts.gate_up_proj": part.experts.up,
            "experts.down_proj": part.experts.down}  # fmt: skip
    theirs.load_state_dict({name: tensor.detach() for name, tensor in ours.items()})
    y = part(x)
    # transformers takes the softmax in float32 whatever the model is in
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)
    gradients, wanted = all_gradients(y, part, x), all_gradients(theirs(x), theirs, x)
    for name, mine in [("x", "x"), ("gate.weight", "router.weight"), ("experts.gate_up_proj", "experts.up"),
                       ("experts.down_proj", "experts.down")]:  # fmt: skip
        torch.testing.assert_close(gradients[mine], wanted[name], rtol=1e-5, atol=1e-4)
    _, loss, _ = heard(part, x)
    logits = part.route(x)
    torch.testing.assert_close(loss, 0.01 * load_balancing_loss_func((logits,), n, k).double(), rtol=1e-6, atol=0)
    (mine,) = torch.autograd.grad(loss, part.router.weight)
    (balance,) = torch.autograd.grad(0.01 * load_balancing_loss_func((part.route(x),), n, k), part.router.weight)
    torch.testing.assert_close(mine, balance, rtol=1e-5, atol=1e-8)


def test_choosing_by_sigmoid_and_bias_equals_deepseek_v3s(transformers, moe):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    part, x = moe("sigmoid", router_bias_rate=0.1), inputs()
    config = transformers.DeepseekV3Config(
        hidden_size=C, n_routed_experts=6, num_local_experts=6, num_experts_per_tok=3, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, norm_topk_prob=True,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    router.load_state_dict({"weight": part.router.weight.detach(), "e_score_correction_bias": part.choice_bias})
    _, wanted, experts = router(x)
    chosen, mine = part.choose(torch.sigmoid(part.route(x)))
    without_bias = torch.sigmoid(part.route(x)).topk(3).indices
    assert not torch.equal(chosen.sort().values, without_bias.sort().values), "the bias changes no choice"
    for row in range(B * T):
        assert dict(zip(chosen[row].tolist(), mine[row].tolist(), strict=True)) == pytest.approx(
            dict(zip(experts[row].tolist(), wanted[row].tolist(), strict=True)), rel=1e-5
        )


# ---- balance --------------------------------------------------------------------------------------------------------


def test_the_auxiliary_loss_is_the_papers(moe):
    part, x = moe(n_experts=4, load_balance_loss=0.3, router_z_loss=0.7), inputs()
    _, loss, counts = heard(part, x)
    logits = part.route(x)
    p = torch.softmax(logits, -1)
    f = [sum(e in row for row in p.topk(2).indices.tolist()) / (B * T) for e in range(4)]
    balance = 4 * sum(f[e] * p[:, e].sum() / (B * T) for e in range(4))  # Switch, eq. 4 to 6
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / (B * T)  # ST-MoE, eq. 5
    assert loss.item() == pytest.approx(0.3 * balance.item() + 0.7 * z, rel=1e-12)
    assert counts.tolist() == [f[e] * B * T for e in range(4)] + [0]


def test_an_even_load_costs_the_least(moe):
    part = moe(n_experts=4, load_balance_loss=1.0)
    loads = torch.tensor([5, 5, 5, 5])
    even = part.auxiliary_loss(torch.zeros(10, 4), torch.full((10, 4), 0.25), loads)
    assert even.item() == pytest.approx(2.0)  # k, as f sums to k
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(10, 4)
    assert part.auxiliary_loss(skewed.log(), skewed, torch.tensor([10, 4, 3, 3])) > even


def test_the_bias_moves_towards_even_loads(moe):
    part = moe(n_experts=4, router_bias_rate=0.25)
    part.choice_bias.zero_()
    part.after_step(torch.tensor([9, 4, 5, 2, 7]))  # mean 5; the last is what was dropped
    assert part.choice_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    plain = moe()
    plain.after_step(torch.tensor([9, 4, 5, 2, 2, 2, 2, 2, 0]))
    assert plain.choice_bias is None and "choice_bias" not in plain.state_dict()


def test_the_bias_alone_evens_the_load(moe):
    part, x = moe(n_experts=4, router_bias_rate=0.01, load_balance_loss=0.0), inputs(t=200) + 0.5
    part.choice_bias.zero_()
    part.router.weight.data *= 0.5  # scores within reach of the bias
    spread = []
    for _ in range(150):
        loads = loads_of(part.choose(torch.softmax(part.route(x), -1))[0], 4)
        spread.append((loads.max() / loads.float().mean()).item())
        part.after_step(torch.cat((loads, loads[:1] * 0)))
    assert spread[-1] < 1.1 < 1.3 < spread[0]


def test_what_a_row_shows(moe):
    part = moe(n_experts=4)
    report = part.report(torch.tensor([30, 10, 0, 40, 20]))
    assert report["expert_load"] == [0.375, 0.125, 0.0, 0.5]
    assert report["expert_max_load"] == 2.0 and report["dropped_tokens"] == 0.25
    assert report["expert_entropy"] == pytest.approx(
        -(0.375 * math.log(0.375) + 0.125 * math.log(0.125) + 0.5 * math.log(0.5)) / math.log(4)
    )
    even = part.report(torch.tensor([7, 7, 7, 7, 0]))
    assert even["expert_max_load"] == even["expert_entropy"] == 1.0


# ---- capacity -------------------------------------------------------------------------------------------------------


def test_places_go_to_the_first_that_come(moe):
    part = moe(n_experts=3, experts_per_token=2, capacity_factor=0.75)  # ceil(0.75 x 4 x 2 / 3) = 2 places
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0], [1, 0], [2, 1], [2, 0], [2, 1]])  # two sequences of 4
    assert part.has_place(chosen, 4).tolist() == [
        [True, True], [True, True], [False, True], [False, False],
        [True, True], [True, True], [True, True], [False, False],
    ]  # fmt: skip


def test_a_choice_without_a_place_adds_nothing_and_is_counted(moe):
    part, x = moe(n_experts=4, capacity_factor=0.5), inputs()
    y, _, counts = heard(part, x)
    chosen, row_weights = part.choose(torch.softmax(part.route(x), -1))
    has_place = part.has_place(chosen, T)
    assert counts[-1] == (~has_place).sum() > 0 and counts[:-1].sum() == B * T * 2
    wanted = part.experts(x.flatten(0, 1), chosen, row_weights * has_place).view_as(x)
    torch.testing.assert_close(y, wanted, **EXACT)
    assert not torch.allclose(y, part.eval()(x)), "evaluation drops nothing"
    roomy = moe(n_experts=4, capacity_factor=4.0)
    torch.testing.assert_close(roomy(x), moe(n_experts=4)(x), **EXACT)


def test_with_a_capacity_no_token_sees_a_later_one(moe):
    part, x = moe(n_experts=4, capacity_factor=0.5), inputs()
    for t in (1, 5, T - 1):
        changed = x.clone()
        changed[:, t] += 1
        torch.testing.assert_close(part(changed)[:, :t], part(x)[:, :t], rtol=1e-12, atol=1e-12)
    other = x.clone()
    other[0] += 1
    torch.testing.assert_close(part(other)[1], part(x)[1], rtol=1e-12, atol=1e-12)


# ---- the loss of a step ---------------------------------------------------------------------------------------------


def test_the_objective_adds_it_once_per_supervised_token(objective):
    told = objective(load_balance_loss=0.5, router_z_loss=0.1)
    batch = batch_of(1)
    sums = told(batch)
    told.model.listen()
    told.model.hidden_states(batch["inputs"])
    auxiliary, counts = told.model.take_findings()
    assert sums["tokens"] == B * T - 3 and auxiliary > 0
    torch.testing.assert_close(sums["loss"] - sums["nats"], auxiliary * (B * T - 3), **EXACT)
    assert {name: part.tolist() for name, part in sums["counts"].items()} == {
        name: part.tolist() for name, part in counts.items()
    }
    assert {*counts} == {"blocks.0.ffn", "blocks.1.ffn"} and all(part.sum() == B * T * 2 for part in counts.values())
    silent = objective(load_balance_loss=0.0)(batch)
    assert silent["loss"] == silent["nats"] == pytest.approx(sums["nats"].item(), rel=1e-12)


def test_every_part_that_finds_something_is_added(objective):
    told, alone = objective(load_balance_loss=0.5), batch_of(1)
    per_layer = []
    for block in told.model.blocks:
        block.ffn.options = copy.copy(block.ffn.options)
        block.ffn.options.load_balance_loss = 0.0
    for block in told.model.blocks:
        block.ffn.options.load_balance_loss = 0.5
        sums = told(alone)
        per_layer.append((sums["loss"] - sums["nats"]).item())
        block.ffn.options.load_balance_loss = 0.0
    both = objective(load_balance_loss=0.5)(alone)
    assert (both["loss"] - both["nats"]).item() == pytest.approx(sum(per_layer), rel=1e-9)


def test_outside_an_objective_nothing_is_kept(objective):
    told = objective()
    model, idx = told.model, batch_of(1)["inputs"]
    model(idx)  # with gradients, so that something was found
    model.generate(idx[:, :4], 3)
    with torch.no_grad():
        assert told(batch_of(1))["counts"] == {}
    assert all(part.found is None and not part.is_heard for _, part in model._finding)
    told(batch_of(1))
    assert all(part.found is None and not part.is_heard for _, part in model._finding)
    copy.deepcopy(model)


def gradients_of(told, batch):
    told.model.zero_grad()
    sums = told(batch)
    sums["loss"].backward()
    return sums, {name: p.grad.clone() for name, p in told.model.named_parameters()}


@pytest.mark.parametrize("backend", ["plain", "auto"])
def test_recomputed_activations_change_nothing(objective, backend):
    told = objective(backend=backend, load_balance_loss=0.5, capacity_factor=0.7)
    wanted_sums, wanted = gradients_of(told, batch_of(2))
    for block in told.model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    sums, gradients = gradients_of(told, batch_of(2))
    torch.testing.assert_close(sums, wanted_sums, **EXACT)
    torch.testing.assert_close(gradients, wanted, **EXACT)
    assert all(part.found is None for _, part in told.model._finding), "a recomputed graph is held"


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_it_is_the_same(objective, recompute):
    told = objective(load_balance_loss=0.5, router_z_loss=0.1)
    if recompute:
        for block in told.model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    wanted_sums, wanted = gradients_of(told, batch_of(2))
    torch._dynamo.reset()
    compiled = torch.compile(told, backend="aot_eager")
    for _ in range(2):
        told.model.zero_grad()
        sums = compiled(batch_of(2))
        sums["loss"].backward()
        torch.testing.assert_close(sums, wanted_sums, **EXACT)
        torch.testing.assert_close({n: p.grad for n, p in told.model.named_parameters()}, wanted, **EXACT)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_with_grouped_mm_it_is_one_graph(objective):
    told = objective(torch.float32, "plain", load_balance_loss=0.5, capacity_factor=0.7)
    for block in told.model.blocks:
        module = block.ffn.experts
        module.combine = functools.partial(grouped.experts, module, use_grouped_mm=grouped._always)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):  # the one precision in which torch compiles grouped_mm
        wanted_sums, wanted = gradients_of(told, batch_of(2))
        compiled = torch.compile(told, backend="aot_eager", fullgraph=True)
        told.model.zero_grad()
        sums = compiled(batch_of(2))
    sums["loss"].backward()
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-3, atol=0)
    for name, parameter in told.model.named_parameters():
        assert (parameter.grad - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


def test_counts_add_up(objective):
    first, second = ({"a": torch.tensor([1, 2])}, {"a": torch.tensor([3, 4]), "b": torch.tensor([5])})
    assert {name: part.tolist() for name, part in added(added({}, first), second).items()} == {"a": [4, 6], "b": [5]}
    assert first["a"].tolist() == [1, 2]


# ---- the plan, parameters and FLOPs ----------------------------------------------------------------------------------


def test_mixtral_8x7b_has_47_billion_parameters_of_which_13_are_active():
    config = ModelArchitectureConfig.from_preset(
        "moe", n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, expert_hidden=14336, vocab_size=32000, block_size=4096
    )
    with on_meta():
        model = ConfigurableGPT(config)
    assert sum(p.numel() for p in model.parameters()) == 46_702_792_704
    assert active_parameters(model) == 12_879_925_248
    flops = flops_per_token(model)
    weights_read = 12_879_925_248 - 32000 * 4096  # all but the embedding table
    assert flops.forward - sum(flops.mixing.values()) == 2 * weights_read


def test_shared_experts_count_in_full(tiny):
    def ffn(**options):
        return count(tiny(ffn_type="moe", expert_hidden=8, n_layer=1, **options))

    without, with_two = ffn(), ffn(n_shared_experts=2)
    assert with_two[1].linear["ffn"] - without[1].linear["ffn"] == 2 * 3 * 16 * 16
    assert without[1].linear["ffn"] == 2 * (8 * 16 + 2 * 3 * 16 * 8)  # the router, and two experts
    assert without[0]["ffn"] == 8 * 16 + 8 * 3 * 16 * 8


def test_expert_weights_are_drawn_decayed_and_left_to_adamw(tiny):
    model = ConfigurableGPT(tiny(ffn_type="moe", n_shared_experts=1))
    plan = {spec.name: spec for spec in parameter_plan(model)}
    up, down = (plan[f"blocks.0.ffn.experts.{name}"] for name in ("up", "down"))
    assert (up.init, up.weight_decay, up.is_matrix, up.shape) == ("normal", True, False, (8, 2 * 40, 16))  # 8/3 of 16
    assert (down.init, down.weight_decay, down.is_matrix) == ("residual", True, False)
    assert plan["blocks.0.ffn.shared.down.weight"].init == "residual" and plan["blocks.0.ffn.router.weight"].is_matrix
    parameters = dict(model.named_parameters())
    _, adamw = OPTIMIZER_REGISTRY["muon"]([*plan.values()], parameters, TrainConfig(), CPU)
    of_adamw = {name for group in adamw.param_groups for name in group["names"]}
    assert {"blocks.0.ffn.experts.up", "blocks.1.ffn.experts.down"} <= of_adamw


def test_a_bias_filled_later_starts_at_zero(tiny):
    with on_meta():
        hollow = ConfigurableGPT(tiny(ffn_type="moe", router_bias_rate=0.1))
    hollow.to_empty(device="cpu")
    for block in hollow.blocks:
        block.ffn.choice_bias.fill_(float("nan"))
    initialise(hollow, seed=1)
    assert all(not block.ffn.choice_bias.any() for block in hollow.blocks)


# ---- names and mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, name", [
    ({"ffn_type": "moe"}, "2L-4H-16D-Learned-LNnb-MoE8x2-PreNorm"),
    ({"ffn_type": "moe", "n_experts": 64, "experts_per_token": 6, "n_shared_experts": 2},
     "2L-4H-16D-Learned-LNnb-MoE64x6+2-PreNorm"),
    ({"block_pattern": "attention/moe,attention/swiglu"}, "2L-4H-16D-Learned-LNnb-MoE8x2+SwiGLU-PreNorm"),
])  # fmt: skip
def test_the_name_says_how_many(tiny, settings, name):
    assert tiny(**settings).architecture_name() == name
    ConfigurableGPT(tiny(**settings))


@pytest.mark.parametrize("settings, words", [
    ({"experts_per_token": 9}, ["experts_per_token=9 is more than there are", "n_experts=8"]),
    ({"n_experts": 0}, ["n_experts=0 must be at least 1"]),
    ({"experts_per_token": 0}, ["experts_per_token=0 must be at least 1"]),
    ({"expert_hidden": 0}, ["expert_hidden=0 must be at least 1"]),
    ({"n_shared_experts": -1}, ["n_shared_experts=-1 must not be below 0"]),
    ({"capacity_factor": -1.0}, ["capacity_factor=-1.0 must not be below 0"]),
    ({"load_balance_loss": math.nan}, ["load_balance_loss=nan"]),
    ({"experts_per_token": 1}, ["experts_per_token=1 with normalize_router_weights=True", "no gradient"]),
    ({"router_score": "relu"}, ["router_score='relu' must be softmax or sigmoid"]),
    ({"expert_type": "moe"}, ["expert_type='moe' must be swiglu, geglu or standard"]),
])  # fmt: skip
def test_what_no_mixture_can_be_is_refused(tiny, settings, words):
    with pytest.raises(UserError) as error:
        ConfigurableGPT(tiny(ffn_type="moe", **settings))
    assert all(word in str(error.value) for word in words)


# ---- runs -----------------------------------------------------------------------------------------------------------

MOE = ("--ffn_type=moe", "--n_experts=4", "--expert_hidden=8", "--router_bias_rate=0.01", "--lr_decay_iters=8")


def test_a_run_says_logs_and_keeps_what_a_mixture_is(workshop):
    folder = workshop.run(*MOE, "--capacity_factor=0.6", "--gradient_accumulation_steps=2", "--log_interval=3")
    printed = workshop.printed()
    assert "moe  2 of 4 swiglu, hidden 8" in printed and "of which a token passes through" in printed
    record = read_json(folder / "config.json")
    assert "MoE4x2" in record["architecture"] and record["resolved"]["kernels"]["experts"] in ("sorted", "compiled")
    idle = 2 * 3 * 16 * 8
    assert record["parameters"]["total"] - record["parameters"]["active"] == idle
    assert read_json(folder / "summary.json")["n_active_params"] == record["parameters"]["active"]
    trained = rows(folder, "train")
    for row in trained:
        (load,) = row["expert_load"].values()
        assert {*row["expert_load"]} == {"blocks.0.ffn"} and len(load) == 4 and sum(load) == pytest.approx(1)
        assert row["expert_max_load"]["blocks.0.ffn"] == pytest.approx(4 * max(load))
        assert 0 < row["dropped_tokens"]["blocks.0.ffn"] < 1
        tokens = {1: 1, 3: 2, 6: 3, 8: 2}[row["step"]] * 4 * 2 * 16  # of the steps since the row before
        assert sum(round(share * tokens * 2) == pytest.approx(share * tokens * 2) for share in load) == 4
    assert read_json(folder / "training_log.json")["training_iterations"][0]["expert_load"]
    bias = weights(folder, 8)["blocks.0.ffn.choice_bias"]
    assert bias.any() and torch.allclose(bias / 0.01, (bias / 0.01).round(), atol=1e-4)


def test_a_row_of_scalars_for_tensorboard(moe):
    from training_sinks import _scalars

    row = {"kind": "train", "step": 1, "tokens_processed": 2, "loss": 3.0, "expert_load": {"blocks.0.ffn": [0.5, 0.5]},
           "expert_max_load": {"blocks.0.ffn": 1.0}}  # fmt: skip
    assert _scalars(row) == {"train/loss": 3.0, "expert_max_load/blocks.0.ffn": 1.0}


def test_resumed_with_a_bias_it_is_the_same_run(workshop):
    settings = (*MOE, "--seed=1")  # with which the loads of four steps do not cancel
    straight = workshop.run(*settings)
    halved = workshop.resume(workshop.run(*settings, "--max_iters=4"), "--max_iters=8")
    assert_same_run(straight, halved, 8)
    assert weights(straight, 4)["blocks.0.ffn.choice_bias"].any(), "there is nothing to carry over"


def test_splitting_a_step_moves_the_bias_alike(workshop):
    # Without a balance loss, which is taken over each micro-batch, a step is the same however it is split
    whole = workshop.run(*MOE, "--load_balance_loss=0", "--max_iters=3")
    split = workshop.run(*MOE, "--load_balance_loss=0", "--max_iters=3", "--batch_size=1",
                         "--gradient_accumulation_steps=4")  # fmt: skip
    assert torch.equal(weights(whole, 3)["blocks.0.ffn.choice_bias"], weights(split, 3)["blocks.0.ffn.choice_bias"])
    for one, other in zip(rows(whole, "train"), rows(split, "train"), strict=True):
        assert one["expert_load"] == other["expert_load"] and one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_packed_documents_and_a_capacity_are_refused_together(tiny):
    model, idx = ConfigurableGPT(tiny(ffn_type="moe", capacity_factor=0.5)), torch.zeros(1, 6, dtype=torch.int64)
    model(idx)
    with pytest.raises(UserError, match="capacity_factor above 0 lets the documents"):
        model(idx, document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))
