"""Every table against the class it describes: logits, gradients of every weight, settings, export, refusals."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model_interop as interop
import sample
from model_builder import ConfigurableGPT
from model_config import PRESETS
from model_helpers import scrambled
from model_interop_rules import COMMON_KEYS, HF_CLASS_REGISTRY, differences, resolved
from training_helpers import book, read_json, summary, weights, workshop
from training_tokenizers import load_tokenizer
from user_errors import UserError

V, T = 29, 20

# -- shapes: (class, {key of the configuration: value}); every one with random weights

LLAMA = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=32, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
GPT2 = dict(vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=4)
MAMBA = dict(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2)
MAMBA2 = dict(MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=8)
BERT = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip
GRANITE = dict(
    LLAMA, num_key_value_heads=2, shared_intermediate_size=24, num_local_experts=0, attention_multiplier=0.5,
    num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"], mamba_n_heads=4,
    mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8,
)  # fmt: skip

SHAPES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", dict(GPT2, tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
    "gpt2-odd": ("GPT2LMHeadModel", dict(GPT2, n_embd=15, n_head=3, n_inner=23, activation_function="gelu")),
    "gpt2-one-head-deep": ("GPT2LMHeadModel", dict(GPT2, n_head=1, n_layer=3, activation_function="relu")),
    "gpt2-leaky": ("GPT2LMHeadModel", dict(GPT2, activation_function="leaky_relu")),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-gqa-tied": ("LlamaForCausalLM", dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mqa": ("LlamaForCausalLM", dict(LLAMA, num_key_value_heads=1, rms_norm_eps=1e-3)),
    "llama-odd": ("LlamaForCausalLM", dict(
        LLAMA, hidden_size=15, num_attention_heads=3, num_key_value_heads=1, head_dim=6, intermediate_size=17)),
    "llama-bias": ("LlamaForCausalLM", dict(LLAMA, attention_bias=True, mlp_bias=True, num_key_value_heads=2)),
    "llama-gelu": ("LlamaForCausalLM", dict(LLAMA, hidden_act="gelu")),
    "llama-linear-rope": ("LlamaForCausalLM", dict(
        LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5})),
    "llama3-rope": ("LlamaForCausalLM", dict(LLAMA, head_dim=8, rope_parameters=LLAMA3)),
    "mistral": ("MistralForCausalLM", dict(LLAMA, num_key_value_heads=2, sliding_window=None)),
    "mistral-window": ("MistralForCausalLM", dict(LLAMA, num_key_value_heads=2, sliding_window=5)),
    "mistral-odd": ("MistralForCausalLM", dict(LLAMA, hidden_size=15, head_dim=6, intermediate_size=17)),
    "mistral-window-one": ("MistralForCausalLM", dict(LLAMA, sliding_window=1, head_dim=6)),
    "qwen3": ("Qwen3ForCausalLM", dict(LLAMA, head_dim=8, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3-window": ("Qwen3ForCausalLM", dict(
        LLAMA, head_dim=4, use_sliding_window=True, sliding_window=3, max_window_layers=0)),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmo2-gqa-tied": ("Olmo2ForCausalLM", dict(LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    "mamba": ("MambaForCausalLM", MAMBA),
    "mamba-odd": ("MambaForCausalLM", dict(
        MAMBA, hidden_size=9, expand=3, conv_kernel=3, time_step_rank=5, tie_word_embeddings=False)),
    "mamba-bias": ("MambaForCausalLM", dict(MAMBA, use_bias=True, use_conv_bias=False)),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2-groups-tied": ("Mamba2ForCausalLM", dict(
        MAMBA2, n_groups=2, use_bias=True, use_conv_bias=False, tie_word_embeddings=True)),
    "mamba2-narrow": ("Mamba2ForCausalLM", dict(MAMBA2, hidden_size=12, expand=1, head_dim=3, conv_kernel=2)),
    "bert": ("BertForMaskedLM", BERT),
    "bert-relu-untied": ("BertForMaskedLM", dict(
        BERT, hidden_act="relu", num_attention_heads=1, type_vocab_size=3, tie_word_embeddings=False)),
    "hybrid": ("GraniteMoeHybridForCausalLM", GRANITE),
    "hybrid-rope-tied-groups": ("GraniteMoeHybridForCausalLM", dict(
        GRANITE, position_embedding_type="rope", mamba_n_groups=2, tie_word_embeddings=True)),
}  # fmt: skip
by_shape = pytest.mark.parametrize("shape", SHAPES)
EXACT = (
    "GPT2LMHeadModel",
    "BertForMaskedLM",
)  # the others compute norms, angles or scans in float32 whatever they are given


def hf_model(transformers, shape, dtype=torch.float32):
    """A model of transformers with large random weights, gains around 1."""
    name, values = SHAPES[shape]
    cls = getattr(transformers, name)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = cls(cls.config_class(**{**values, **tokens})).to(dtype).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith(("A_log", "dt_bias", "dt_proj.bias")):  # their own first values are random
                is_gain = parameter_name.endswith("weight") and (
                    "norm" in parameter_name.lower() or "ln_" in parameter_name
                )
                parameter.normal_(std=0.3).add_(float(is_gain))
    return model


def text(length=T):
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model, idx):
    """(logits, {parameter: gradient of the mean cross-entropy})."""
    logits = model(idx)
    logits = logits.logits if hasattr(logits, "logits") else logits[0]
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_function(theirs, ours, name, **tolerance):
    """Logits, and the gradient of every weight; theirs are mapped as the weights are."""
    logits, gradients = logits_and_gradients(ours, text())
    wanted, their_gradients = logits_and_gradients(theirs, text())
    torch.testing.assert_close(logits, wanted, **tolerance)
    assert logits.std() > 0.3, "logits that hardly differ prove little"
    for parameter in [parameter for parameter in their_gradients if "token_type" in parameter]:
        their_gradients[parameter] = torch.zeros_like(
            their_gradients[parameter]
        )  # a sum of values is none of gradients
    mapped = interop.to_ours(HF_CLASS_REGISTRY[name], their_gradients, ours)
    assert mapped.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert gradient.abs().max() > 0, f"{parameter} has no gradient"
        scale = mapped[parameter].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, mapped[parameter] / scale, **tolerance, msg=parameter)


@by_shape
def test_logits_and_gradients_equal_those_of_transformers(transformers, shape):
    dtype = torch.float64 if SHAPES[shape][0] in EXACT else torch.float32
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    theirs = hf_model(transformers, shape, dtype)
    assert_same_function(theirs, interop.from_hf(theirs), SHAPES[shape][0], rtol=tolerance, atol=tolerance)


@by_shape
def test_there_and_back_is_the_same_model(transformers, shape):
    theirs = hf_model(transformers, shape)
    ours = interop.from_hf(theirs)
    back = interop.to_hf(ours)
    with torch.no_grad():
        assert torch.allclose(back(text()).logits, theirs(text()).logits, rtol=1e-5, atol=1e-5)
    again = interop.from_hf(back)
    assert differences(resolved(again.config), resolved(ours.config), ("block_size",)) == []
    for (name, one), (_, other) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("shape", ["gpt2", "llama-gqa-tied", "mistral-window"])
def test_settings_that_change_no_logit_may_differ(transformers, shape, backend):
    theirs = hf_model(transformers, shape)
    ours = interop.from_hf(theirs, attention_backend=backend, dropout=0.5, block_size=22)
    assert (ours.config.attention_backend, ours.config.dropout, ours.config.block_size) == (backend, 0.5, 22)
    assert_same_function(theirs, ours, SHAPES[shape][0], rtol=1e-4, atol=1e-4)


def test_a_shorter_context_crops_learned_positions(transformers):
    theirs = hf_model(transformers, "gpt2")
    ours = interop.from_hf(theirs, block_size=8)
    assert ours.position_embedding.table.weight.shape == (8, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(text(8))[0], theirs(text(8)).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="block_size=25 is more than the 24 learned positions of GPT2LMHeadModel"):
        interop.from_hf(theirs, block_size=25)


def test_dtype_and_mode_are_kept(transformers):
    theirs = hf_model(transformers, "llama", torch.bfloat16).train()
    ours = interop.from_hf(theirs)
    assert ours.head.weight.dtype == torch.bfloat16 and ours.training
    back = interop.to_hf(ours.eval())
    assert back.dtype == torch.bfloat16 and not back.training


# ---- no key of a configuration passes unseen -------------------------------------------------------------------------

by_class = pytest.mark.parametrize("name", HF_CLASS_REGISTRY)


@by_class
def test_every_key_of_a_configuration_is_known_and_every_known_key_is_one(transformers, name):
    entry = HF_CLASS_REGISTRY[name]
    keys = set(getattr(transformers, entry.config)().to_dict())
    assert keys - entry.keys() == set(), "a rule or a place in `ignored` is missing"
    from_before = {"position_embedding_type"} if name.startswith("Bert") else set()  # what older versions wrote
    assert entry.keys() - {*COMMON_KEYS} - keys <= from_before, "there is no such key"
    assert not entry.read_keys() & {*entry.ignored, *COMMON_KEYS}


@by_class
def test_a_key_that_nobody_knew_is_refused_unless_it_is_at_its_default(transformers, name):
    entry = HF_CLASS_REGISTRY[name]
    values = next(values for shape, values in SHAPES.values() if shape == name)
    values = getattr(transformers, entry.config)(**values).to_dict()
    assert entry.settings({**values, "twist": 0}, {"twist": 0}) == entry.settings(values)
    with pytest.raises(UserError, match="twist=1 of the Hugging Face config is not supported"):
        entry.settings({**values, "twist": 1}, {"twist": 0})


@by_class
def test_every_class_has_shapes_here(name):
    assert [shape for shape, (cls, _) in SHAPES.items() if cls == name]


# ---- what is refused on the way in -----------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 16}
REFUSED_CONFIGS = [
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop=0.3.*resid_pdrop=0.1 differs, and both are dropout here"),
    ("llama", {"attention_bias": True}, "mlp_bias=False.*attention_bias=True differs, and both are bias here"),
    ("llama", {"hidden_act": "relu"}, "hidden_act='relu'.*use one of silu, swish, gelu"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama", {"rope_parameters": YARN}, "rope_type='yarn'.*use one of default, linear, llama3"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}, "rope_type='dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor=0.5"),
    ("llama3-rope", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "'low_freq_factor'.*=2.0"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True,
               "sliding_window": 3}, "layer_types=.*sliding_window is one setting for all layers"),
    ("olmo2", {"attention_bias": True}, "attention_bias=True"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("mamba2", {"time_step_limit": (0.0, 0.1)}, "time_step_limit=.*0.1"),
    ("bert", {"is_decoder": True}, "is_decoder=True"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ("hybrid", {"num_local_experts": 4}, "num_local_experts=4"),
    ("hybrid", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
    ("hybrid", {"attention_multiplier": 1.0}, "attention_multiplier=1.0.*root of the head width"),
]  # fmt: skip


@pytest.mark.parametrize("shape, changes, message", REFUSED_CONFIGS, ids=[row[2][:40] for row in REFUSED_CONFIGS])
def test_a_feature_that_is_not_here_is_refused_by_its_name(transformers, shape, changes, message):
    name, values = SHAPES[shape]
    config = getattr(transformers, HF_CLASS_REGISTRY[name].config)(**{**values, **changes})
    with pytest.raises(UserError, match=message):
        interop.config_from_hf(config, name)


def test_quantized_weights_are_refused(transformers):
    config = transformers.LlamaConfig(**LLAMA, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": 1})
    with pytest.raises(UserError, match="quantization_config with quant_method='bitsandbytes' is not supported"):
        interop.config_from_hf(config, "LlamaForCausalLM")


def test_another_class_is_refused(transformers):
    values = dict(SHAPES["gpt2"][1], num_labels=2, pad_token_id=0)
    with pytest.raises(UserError, match=r"GPT2ForSequenceClassification cannot be imported.*LlamaForCausalLM"):
        interop.from_hf(transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**values)))


def test_weights_of_another_architecture_are_refused(transformers, tiny):
    theirs, ours = hf_model(transformers, "llama"), ConfigurableGPT(tiny(arch_preset="llama", bias=True))
    entry, tensors = HF_CLASS_REGISTRY["LlamaForCausalLM"], dict(theirs.named_parameters())
    with pytest.raises(UserError, match="the weights lack blocks.0"):
        interop.to_ours(entry, tensors, ours)
    ours = interop.from_hf(theirs)
    with pytest.raises(UserError, match="the weights hold, beside what the model has, model.extra"):
        interop.to_ours(entry, {**tensors, "model.extra": torch.zeros(1)}, ours)
    with pytest.raises(UserError, match=r"final_norm.weight is \(3,\) in the weights and \(16,\) in the model"):
        interop.to_ours(entry, {**tensors, "model.norm.weight": torch.zeros(3)}, ours)


@pytest.mark.parametrize("library, message", [(None, "pip install 'transformers>=5'"), ("4.57.1", "4.57.1 is too old")])
def test_a_missing_or_old_library_is_named(monkeypatch, tiny, library, message):
    stand_in = None if library is None else type("transformers", (), {"__version__": library})
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    with pytest.raises(UserError, match=message):
        interop.to_hf(ConfigurableGPT(tiny()))


# ---- export: what holds what -----------------------------------------------------------------------------------------

HELD_BY = [  # (settings, class)
    ({}, "GPT2LMHeadModel"),  # no biases: they are zero there
    ({"arch_preset": "gpt2"}, "GPT2LMHeadModel"),
    ({"arch_preset": "gpt2", "activation": "relu2", "ffn_hidden": 24}, "GPT2LMHeadModel"),
    ({"normalization": "layernorm_nobias", "bias": True}, "GPT2LMHeadModel"),
    ({"arch_preset": "llama"}, "LlamaForCausalLM"),
    ({"arch_preset": "llama", "bias": True, "dropout": 0.1}, "LlamaForCausalLM"),
    ({"arch_preset": "llama", "ffn_type": "geglu", "n_kv_head": 2, "weight_tying": True}, "LlamaForCausalLM"),
    ({"arch_preset": "gqa", "head_dim": 6}, "LlamaForCausalLM"),
    ({"arch_preset": "llama", "n_embd": 15, "n_head": 4, "head_dim": 4}, "MistralForCausalLM"),  # Llama's divides
    ({"arch_preset": "mistral", "sliding_window": 5}, "MistralForCausalLM"),
    ({"arch_preset": "qwen3"}, "Qwen3ForCausalLM"),
    ({"arch_preset": "qwen3", "sliding_window": 5}, "Qwen3ForCausalLM"),
    ({"arch_preset": "olmo2"}, "Olmo2ForCausalLM"),
    ({"arch_preset": "bert"}, "BertForMaskedLM"),
    ({"arch_preset": "mamba"}, "MambaForCausalLM"),
    ({"arch_preset": "mamba", "n_head": 3, "recurrence": "recurrent"}, "MambaForCausalLM"),
    ({"arch_preset": "mamba2", "d_state": 8}, "Mamba2ForCausalLM"),
    ({"arch_preset": "llama", "block_pattern": "mamba2,attention", "d_state": 8}, "GraniteMoeHybridForCausalLM"),
    ({"arch_preset": "llama", "position_encoding": "none", "block_pattern": "mamba2,attention", "n_layer": 3},
     "GraniteMoeHybridForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize("settings, name", HELD_BY, ids=[f"{name}-{i}" for i, (_, name) in enumerate(HELD_BY)])
def test_an_export_computes_the_same(transformers, tiny, settings, name):
    model = scrambled(ConfigurableGPT(tiny(**{"block_size": 32, **settings}))).eval()
    theirs = interop.to_hf(model, end_of_document_id=3)
    assert type(theirs).__name__ == name
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 3
    with torch.no_grad():
        torch.testing.assert_close(theirs(text()).logits, model(text())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_exported_or_refused_in_a_sentence(transformers, tiny, preset):
    model = scrambled(ConfigurableGPT(tiny(arch_preset=preset, block_size=32))).eval()
    try:
        theirs = interop.to_hf(model)
    except UserError as refusal:
        assert str(refusal).startswith("no Hugging Face class can hold ")
        return
    with torch.no_grad():
        torch.testing.assert_close(theirs(text()).logits, model(text())[0], rtol=1e-4, atol=1e-4)


HELD_BY_NONE = [  # (settings, what the sentence says)
    ({"position_encoding": "alibi"}, "position_encoding='alibi'"),
    ({"arch_preset": "hybrid"}, "position_encoding='rope': the nearest, GPT2LMHeadModel, has 'learned_absolute'"),
    ({"arch_preset": "gpt2_postnorm"}, "norm_position='post'"),
    ({"norm_position": "sandwich"}, "norm_position='sandwich'"),
    ({"parallel_blocks": True}, "parallel_blocks=True"),
    ({"residual_scaling": "learned"}, "residual_scaling='learned'"),
    ({"logit_soft_cap": 30.0}, "logit_soft_cap=30.0"),
    ({"sliding_window": 4}, "sliding_window=4"),
    ({"n_kv_head": 2}, "n_kv_head=2"),
    ({"head_dim": 6}, "head_dim=6"),
    ({"arch_preset": "llama", "attention_soft_cap": 20.0, "attention_backend": "manual"}, "attention_soft_cap=20.0"),
    ({"arch_preset": "llama", "rope_scaling": "ntk", "rope_scaling_factor": 2.0}, "rope_scaling='ntk'"),
    ({"arch_preset": "llama", "normalization": "layernorm"}, "normalization='layernorm'"),
    ({"arch_preset": "qwen3", "bias": True}, "bias=True"),
    ({"arch_preset": "mamba", "expand": 1.5}, "expand=1.5"),
    ({"arch_preset": "mamba2", "expand": 1.5}, "as a Mamba2ForCausalLM, headdim=24 does not divide"),
    ({"arch_preset": "mamba2", "expand": 1.5, "headdim": 4}, "expand=1.5"),
    ({"arch_preset": "mamba2", "normalization": "layernorm"}, "normalization='layernorm'"),
    ({"arch_preset": "lstm"}, "block_pattern='lstm/none'"),
    ({"block_pattern": "attention,mamba/none"}, "block_pattern='attention,mamba/none'"),
    ({"arch_preset": "mamba_hybrid"}, "block_pattern='mamba,local_attention'"),
]


@pytest.mark.parametrize("settings, message", HELD_BY_NONE, ids=[message for _, message in HELD_BY_NONE])
def test_what_no_class_holds_is_refused_by_the_setting(transformers, tiny, settings, message):
    with pytest.raises(UserError) as refusal:
        interop.to_hf(ConfigurableGPT(tiny(**settings)))
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("no Hugging Face class can hold ")
