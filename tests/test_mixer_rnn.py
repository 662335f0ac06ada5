"""LSTM, GRU and RNN: torch.nn's numbers and gradients, both forms, decoding, documents, initial values, cost."""

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT, parameter_plan
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

LENGTHS = [1, 2, 9, 65]
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
VARIANTS = {
    "lstm": {}, "lstm-wide": {"expand": 2.5, "bias": True}, "gru": {}, "gru-narrow": {"expand": 0.5},
    "rnn": {}, "rnn-relu-wide": {"rnn_activation": "relu", "expand": 2.0},
}  # fmt: skip
by_variant = pytest.mark.parametrize("variant", VARIANTS)
by_mixer = pytest.mark.parametrize("mixer", TORCH)
by_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
DOCUMENTS = torch.tensor([[0] * 9, [0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 5, 5, 0]])


@pytest.fixture
def make(tiny):
    return mixer_maker(tiny, VARIANTS, std=0.3)


def torch_twin(mixer):
    """torch.nn's layer with a mixer's weights."""
    kind = TORCH[type(mixer).__name__.lower()]
    more = {"nonlinearity": mixer.options.rnn_activation} if kind is nn.RNN else {}
    twin = kind(mixer.d_input, mixer.d_hidden, batch_first=True, dtype=mixer.weight_ih.dtype, **more)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(twin, f"{name}_l0").copy_(getattr(mixer, name))
    return twin


def gradients(y, inputs):
    return torch.autograd.grad((y * random(*y.shape, dtype=y.dtype, seed=7)).sum(), inputs)


@by_variant
@by_dtype
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("recurrence", ["kernel", "recurrent"])
def test_it_equals_torch_nn_in_output_gradients_and_state(make, variant, dtype, T, recurrence):
    mixer = make(variant, dtype, recurrence=recurrence)
    twin, results = torch_twin(mixer), []
    own = [mixer.weight_ih, mixer.weight_hh, mixer.bias_ih, mixer.bias_hh]
    for run, weights in ((mixer, own), (lambda x: mixer.out(twin(x)[0]), list(twin.parameters()))):
        x = random(3, T, 16, dtype=dtype).requires_grad_()
        y = run(x)
        results.append([y, *gradients(y, [x, *weights, mixer.out.weight])])
    assert_all_close(*results, dtype)
    state = mixer.step(x, mixer.init_state(3, dtype=dtype))[1]
    last = twin(x)[1]
    for one, other in zip(state.values(), last if isinstance(last, tuple) else (last,), strict=True):
        torch.testing.assert_close(one, other[0], **TOLERANCES[dtype])


def test_lstm_is_its_equation(make):
    mixer, (T, H) = make("lstm"), (5, 16)
    x, h, c, wanted = random(1, T, 16)[0], torch.zeros(H).double(), torch.zeros(H).double(), []
    for t in range(T):
        W, U, b = mixer.weight_ih, mixer.weight_hh, mixer.bias_ih + mixer.bias_hh
        rows = [slice(k * H, (k + 1) * H) for k in range(4)]
        i, f, g, o = (W[gate] @ x[t] + U[gate] @ h + b[gate] for gate in rows)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        wanted.append(mixer.out.weight @ h)
    torch.testing.assert_close(mixer(x[None])[0], torch.stack(wanted), **TOLERANCES[torch.float64])


@by_variant
@by_dtype
def test_both_forms_are_one_across_documents(make, variant, dtype):
    results = []
    for recurrence in ("kernel", "recurrent"):
        mixer, x = make(variant, dtype, recurrence=recurrence), random(3, 9, 16, dtype=dtype).requires_grad_()
        y = mixer(x, document_ids=DOCUMENTS)
        results.append([y, *gradients(y, [x, *mixer.parameters()])])
    assert_all_close(*results, dtype)


@by_variant
@pytest.mark.parametrize("recurrence", ["kernel", "recurrent"])
def test_documents_are_separate_texts_to_the_gradient(make, variant, recurrence):
    mixer, x = make(variant, recurrence=recurrence), random(3, 9, 16).requires_grad_()
    alone = torch.stack([
        torch.cat([mixer(piece[None])[0] for piece in row.split(sizes)])
        for row, sizes in zip(x, ([9], [3, 4, 2], [1, 5, 2, 1]), strict=True)
    ])  # fmt: skip
    packed = mixer(x, document_ids=DOCUMENTS)
    assert_all_close(*([y, *gradients(y, [x, *mixer.parameters()])] for y in (packed, alone)))


@by_variant
@pytest.mark.parametrize("recurrence", ["kernel", "recurrent"])
def test_steps_equal_forward_and_leave_the_state_before_alone(make, variant, recurrence):
    mixer = make(variant, recurrence=recurrence)
    check_steps_leave_the_state_before_alone(mixer, 12, ([1] * 12, [5, 1, 6], [12]))


@by_variant
@by_dtype
def test_the_state_has_one_size_for_ever(make, variant, dtype):
    state = check_state_has_one_size(make(variant, dtype), dtype)
    assert {*state} == ({"h", "c"} if variant.startswith("lstm") else {"h"})


@by_mixer
def test_half_precision_is_close(make, mixer):
    layer, x = make(mixer, fresh=True, dtype=torch.float32), random(2, 9, 16, dtype=torch.float32)
    wanted = layer(x)
    for recurrence in ("kernel", "recurrent"):
        with torch.autocast("cpu", torch.bfloat16):
            y = make(mixer, fresh=True, dtype=torch.float32, recurrence=recurrence)(x)
        torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=2e-2 * wanted.abs().max().item())
        half = make(mixer, fresh=True, dtype=torch.bfloat16, recurrence=recurrence)
        y = half(x.bfloat16())
        torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=2e-2 * wanted.abs().max().item())
        _, state = half.step(x.bfloat16(), half.init_state(2, dtype=torch.bfloat16))
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@by_mixer
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said when oneDNN is switched off
def test_it_compiles_in_one_piece(make, mixer):
    x = random(2, 9, 16, dtype=torch.float32)
    check_it_trains_compiled(make(mixer, dtype=torch.float32), x, DOCUMENTS[:2])


# ---- initial values, plan, cost -------------------------------------------------------------------------------------


@by_mixer
def test_initial_values(make, mixer):
    layer = make(mixer, fresh=True, n_embd=64, expand=0.25)
    for weight in (layer.weight_ih, layer.weight_hh):
        assert weight.abs().max() <= 0.25 and weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.1)
    wanted = torch.zeros_like(layer.bias_ih)
    if mixer == "lstm":
        wanted[16:32] = 1.0  # the forget gate: rows are i, f, g, o
    assert torch.equal(layer.bias_ih, wanted) and not layer.bias_hh.any()
    if mixer == "lstm":
        assert (make(mixer, fresh=True, forget_bias=-2.0).bias_ih[16:32] == -2).all()


@by_mixer
def test_what_decays_and_what_starts_small(tiny, mixer):
    plan = parameter_plan(ConfigurableGPT(tiny(block_pattern=f"{mixer}/none", position_encoding="none", bias=True)))
    plan = {spec.name.partition("mixer.")[2]: spec for spec in plan if "blocks.0.mixer." in spec.name}
    assert {name for name, spec in plan.items() if spec.weight_decay} == {"weight_ih", "weight_hh", "out.weight"}
    assert {name for name, spec in plan.items() if spec.init == "residual"} == {"out.weight"}


@by_variant
def test_it_costs_its_weights(make, variant):
    mixer = make(variant)
    weights = sum(p.numel() for name, p in mixer.named_parameters() if not name.startswith("out"))
    assert mixer.mixing_flops(64) == mixer.mixing_flops(4096) == 2 * weights
    with FlopCounterMode(display=False) as counter:
        mixer(random(2, 9, 16))
    products = mixer.mixing_flops(9) - mixer.elementwise_flops(9) + 2 * mixer.out.weight.numel()
    assert counter.get_total_flops() == 18 * products


@pytest.mark.parametrize("mixer, options, message", [
    ("lstm", {"expand": 0.0}, "expand=0.0 must be above 0"),
    ("gru", {"recurrence": "chunk"}, "recurrence='chunk' does not exist"),
    ("rnn", {"rnn_activation": "gelu"}, "rnn_activation='gelu' must be tanh or relu"),
])  # fmt: skip
def test_bad_options_are_refused_in_a_sentence(tiny, mixer, options, message):
    with pytest.raises(UserError, match=message):
        MIXER_REGISTRY[mixer](tiny(position_encoding="none", **options), 0)
