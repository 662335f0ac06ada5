"""Every mixer whose recurrence is made of matrix products: forms, documents, steps, compiling, cost."""

import pytest

from mixer_attention import MIXER_REGISTRY
from recurrence_helpers import (
    check_autocast,
    check_compiles,
    check_cost_per_token,
    check_documents,
    check_forms_agree,
    check_prefill_then_steps,
    check_recurrent_flops,
    check_state_is_constant,
)

NAMES = [name for name, part in MIXER_REGISTRY.items() if part.operation in ("linear", "delta", "rwkv7")]
VARIANTS = {
    "linear_attention": ("linear_attention", {}),
    "linear_attention-plain": (
        "linear_attention",
        {"feature_map": "identity", "normaliser": False, "output_norm": "rmsnorm"},
    ),
    "linear_attention-conv": ("linear_attention", {"d_conv": 4, "expand_k": 0.5, "feature_map": "relu", "bias": True}),
    "retention": ("retention", {}),
    "retention-rope": ("retention", {"position_encoding": "rope"}),
    "gla": ("gla", {}),
    "gla-conv": ("gla", {"d_conv": 3, "gate_temperature": 0.1, "output_norm": "layernorm"}),
    "delta_net": ("delta_net", {}),
    "delta_net-bare": ("delta_net", {"d_conv": 0, "output_norm": "none", "bias": True}),
    "delta_net-negative": ("delta_net", {"negative_eigenvalues": True, "expand_k": 0.5, "output_gate": True}),
    "gated_delta_net": ("gated_delta_net", {}),
    "gated_delta_net-bare": ("gated_delta_net", {"d_conv": 0, "output_gate": False}),
    "rwkv7": ("rwkv7", {}),
    "rwkv7-ranks": ("rwkv7", {"bias": True, "decay_rank": 3, "rate_rank": 2, "output_gate_rank": 5}),
}
every_mixer = pytest.mark.parametrize("name", NAMES)
every_variant = pytest.mark.parametrize("name, options", VARIANTS.values(), ids=VARIANTS)


def test_every_one_of_them_has_a_variant():
    assert {name for name, _ in VARIANTS.values()} == {*NAMES}


@every_variant
def test_forms_of_a_layer_agree(name, options):
    check_forms_agree(name, **options)


@every_variant
def test_documents_are_separate_texts(name, options):
    check_documents(name, **options)


@every_variant
def test_prefill_then_steps_equal_forward(name, options):
    check_prefill_then_steps(name, **options)


@every_mixer
def test_it_compiles_without_a_graph_break(name):
    check_compiles(name)


@every_mixer
def test_under_autocast_the_memory_stays_float32(name):
    check_autocast(name)


@every_mixer
def test_declared_flops_of_both_forms(name):
    check_recurrent_flops(name)


@every_mixer
def test_cost_per_token_does_not_grow(name):
    check_cost_per_token(name)


@every_mixer
def test_state_is_constant(name):
    check_state_is_constant(name)
