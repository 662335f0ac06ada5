"""Every table against the class it describes: logits, gradients of every weight, settings, export, refusals."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model_interop as interop
import sample
import train
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
    "mixtral": ("MixtralForCausalLM", dict(LLAMA, num_local_experts=4, num_key_value_heads=2)),
    "mixtral-window-three": ("MixtralForCausalLM", dict(
        LLAMA, num_local_experts=5, num_experts_per_tok=3, sliding_window=4, head_dim=6, tie_word_embeddings=True)),
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
    groups = values.get("n_groups", values.get("mamba_n_groups", 1))
    if groups > 1 and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("before transformers 5.23 all groups of Mamba-2 are normed together")
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
    with pytest.raises(UserError, match="twist=1 of the imported config is not supported"):
        entry.settings({**values, "twist": 1}, {"twist": 0})


@by_class
def test_every_class_has_shapes_here(name):
    assert [shape for shape, (cls, _) in SHAPES.items() if cls == name]


# Published configurations as older versions wrote them: with keys that nothing reads, and RoPE spelt otherwise.
PUBLISHED = {
    "gpt2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 1024, "n_embd": 768, "n_head": 12,
         "n_layer": 12, "n_positions": 1024, "task_specific_params": {"text-generation": {"max_length": 50}},
         "vocab_size": 50257},
        {"block_size": 1024, "ffn_hidden": 3072, "activation": "gelu_tanh", "vocab_size": 50257, "weight_tying": True},
    ),
    "llama-3.1": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": [128001, 128008],
         "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
         "vocab_size": 128256,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}},
        {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_context": 8192, "rope_theta": 5e5,
         "n_kv_head": 8, "head_dim": 128, "norm_eps": 1e-5},
    ),
    "mamba": (
        {"model_type": "mamba", "d_inner": 1536, "d_model": 768, "fused_add_norm": True, "hidden_size": 768,
         "num_hidden_layers": 2, "n_layer": 24, "ssm_cfg": {}, "rms_norm": True, "vocab_size": 50280},
        {"n_layer": 2, "d_state": 16, "dt_rank": 48, "block_pattern": "mamba/none,mamba/none"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(transformers, tmp_path, name):
    values, wanted = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    own = resolved(interop.open_hf(tmp_path).config)
    assert {setting: own[setting] for setting in wanted} == wanted


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
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
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
    with pytest.raises(UserError, match=r"the weights lack blocks\.0"):
        interop.to_ours(entry, tensors, ours)
    ours = interop.from_hf(theirs)
    with pytest.raises(UserError, match=r"the weights hold, beside what the model has, model\.extra"):
        interop.to_ours(entry, {**tensors, "model.extra": torch.zeros(1)}, ours)
    with pytest.raises(UserError, match=r"final_norm.weight is \(3,\) in the weights and \(16,\) in the model"):
        interop.to_ours(entry, {**tensors, "model.norm.weight": torch.zeros(3)}, ours)


def test_a_head_of_an_objective_starts_anew(transformers):
    theirs = hf_model(transformers, "llama")
    plain = interop.from_hf(theirs)
    headed = ConfigurableGPT(plain.config, heads={"win": 1})
    tensors = dict(theirs.named_parameters())
    found = interop.to_ours(HF_CLASS_REGISTRY["LlamaForCausalLM"], tensors, headed)
    assert found.keys() == dict(plain.named_parameters()).keys() == dict(headed.named_parameters()).keys() - {
        "heads.win.weight", "heads.win.bias"
    }  # fmt: skip


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
    ({"arch_preset": "moe"}, "MixtralForCausalLM"),
    ({"arch_preset": "moe", "n_experts": 3, "expert_hidden": 12, "expert_type": "geglu", "capacity_factor": 1.0},
     "MixtralForCausalLM"),
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
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (3, 3, None)
    assert not theirs.can_generate() or theirs.generation_config.pad_token_id == 3
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
    ({"arch_preset": "mamba2", "expand": 1.5}, "as a Mamba2ForCausalLM: headdim=24 does not divide"),
    ({"arch_preset": "mamba2", "expand": 1.5, "headdim": 4}, "expand=1.5"),
    ({"arch_preset": "mamba2", "normalization": "layernorm"}, "normalization='layernorm'"),
    ({"arch_preset": "llama", "block_pattern": "attention/swiglu,attention/geglu"}, "block_pattern='attention/swiglu,"),
    ({"arch_preset": "llama", "block_pattern": "attention,attention/none"}, "block_pattern='attention,attention/none'"),
    ({"arch_preset": "moe", "n_shared_experts": 1}, "n_shared_experts=1"),
    ({"arch_preset": "moe", "router_score": "sigmoid"}, "router_score='sigmoid'"),
    ({"arch_preset": "moe", "router_bias_rate": 0.1}, "router_bias_rate=0.1"),
    ({"arch_preset": "moe", "expert_type": "standard"}, "expert_type='standard'"),
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


# ---- nanoGPT's files -------------------------------------------------------------------------------------------------


def nanogpt_file(path, theirs, bias=True, prefix="", **changes):
    """What nanoGPT's train.py saves, with the weights of a GPT2LMHeadModel: nn.Linear holds matrices the other way."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        is_matrix = tensor.dim() == 2 and ".h." in name
        if bias or not name.endswith(".bias"):
            state[prefix + name] = tensor.t().contiguous() if is_matrix else tensor.clone()
    config = theirs.config
    args = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.n_positions,
                vocab_size=config.vocab_size, bias=bias, dropout=0.0)  # fmt: skip
    saved = {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "optimizer": {},
             "config": {"dataset": "x"}}  # fmt: skip
    torch.save({**saved, **changes}, path)
    return f"nanogpt:{path}"


def opened(source, **changes):
    """The model that init_from=source starts with."""
    kind, _, path = source.partition(":")
    found = interop.INIT_REGISTRY[kind](path)
    model = ConfigurableGPT(found.config.replace(**changes))
    found.fill(model)
    return model.eval(), found


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_file_of_nanogpt_is_read(transformers, tmp_path, bias, prefix):
    reference = hf_model(transformers, "gpt2")
    for block in reference.transformer.h:
        block.mlp.act = torch.nn.GELU()  # exact, as nanoGPT has it
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(".bias") and not bias:
                parameter.zero_()
    path = tmp_path / "ckpt.pt"
    source = nanogpt_file(path, reference, bias, prefix)
    saved = torch.load(path, weights_only=True)
    saved["model"][f"{prefix}transformer.h.0.attn.bias"] = torch.ones(
        1, 1, 24, 24
    )  # its mask, on old versions of torch
    torch.save(saved, path)
    model, found = opened(source)
    assert found.config.bias is bias and found.record["iter_num"] == 7
    assert found.record["sha256"].keys() == {"ckpt.pt"} and len(found.record["sha256"]["ckpt.pt"]) == 64
    with torch.no_grad():
        torch.testing.assert_close(model(text())[0], reference(text()).logits, rtol=1e-5, atol=1e-5)
        shorter, _ = opened(source, block_size=9)
        torch.testing.assert_close(shorter(text(9))[0], reference(text(9)).logits, rtol=1e-5, atol=1e-5)


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_of_nanogpt_runs_no_code(transformers, tmp_path):
    source = nanogpt_file(tmp_path / "ckpt.pt", hf_model(transformers, "gpt2"), config=Trap(tmp_path / "written"))
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint of nanoGPT \(UnpicklingError\)"):
        opened(source)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("changes, message", [
    ({"model_args": {"n_layer": 2}}, "its model_args lack bias"),
    ({"model_args": 3}, "TypeError"),
    ({"model_args": dict(n_layer="2", n_head=4, n_embd=16, block_size=24, vocab_size=V, bias=True, dropout=0.0)},
     "n_layer='2' is a str, and must be an int"),
    ({"model": {}}, "the weights lack blocks.0.ffn.down.bias"),
])  # fmt: skip
def test_half_a_file_of_nanogpt_is_refused(transformers, tmp_path, changes, message):
    source = nanogpt_file(tmp_path / "ckpt.pt", hf_model(transformers, "gpt2"), **changes)
    with pytest.raises(UserError, match=message):
        opened(source)


# ---- the command and the folder that it writes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A GPT2LMHeadModel over bytes, as save_pretrained leaves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_dir(run_folder):
    return max(run_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("architecture, tokenizer", [
    (("--arch_preset=llama", "--n_kv_head=1"), "bpe"),
    ((), "byte"),
    (("--arch_preset=mamba", "--d_state=4"), "char"),
    (("--arch_preset=gpt2",), "wordpiece"),
    (("--arch_preset=qwen3",), "unigram"),
], ids=["llama-bpe", "default-byte", "mamba-char", "gpt2-wordpiece", "qwen3-unigram"])  # fmt: skip
def test_an_exported_run_opens_elsewhere(transformers, workshop, architecture, tokenizer):
    size = ("--tokenizer_vocab_size=280",) if tokenizer in ("bpe", "wordpiece", "unigram") else ()
    run = workshop.run("--max_iters=4", f"--tokenizer={tokenizer}", *size, *architecture)
    workshop.printed()
    out = workshop.folder / "exported"
    interop.main([str(save_dir(run)), str(out)])
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert workshop.printed() == f"{out} holds a {type(model).__name__}\n"
    assert (out / "model.safetensors").is_file() and not [*out.parent.glob(".exported*")]

    words = "the quick brown fox\n jumps over"
    own, theirs = load_tokenizer(run), transformers.AutoTokenizer.from_pretrained(out)
    ids = theirs(words)["input_ids"]
    assert ids == own.encode(words).tolist() and theirs.decode(ids) == words
    assert theirs.eos_token_id == own.end_of_document_id == model.config.eos_token_id
    assert len(theirs) == own.vocab_size == model.config.vocab_size

    settings = interop.configurator.load_run(run)
    ours = ConfigurableGPT(settings.model).eval()
    interop.checkpoint.load_model(ours, save_dir(run))
    idx = torch.tensor([ids[:16]])
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, ours(idx)[0], rtol=1e-4, atol=1e-4)
    greedy = model.generate(idx[:, :4], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, ours.generate(idx[:, :4], 6, temperature=0))


def test_a_run_whose_tokenizer_nobody_knows_is_exported_without(transformers, workshop):
    run = workshop.run("--max_iters=4")
    (run / "tokenizer.json").write_text('{"name": null}', encoding="utf-8")
    interop.export_hf(save_dir(run), workshop.folder / "out")
    assert {path.name for path in (workshop.folder / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_a_folder_that_cannot_be_exported_is_refused(workshop):
    run = workshop.run("--max_iters=4", "--position_encoding=alibi")
    checkpoint, out = save_dir(run), workshop.folder / "out"
    refused = [
        ((checkpoint, out), "no Hugging Face class can hold position_encoding='alibi'"),
        ((checkpoint, run), "exists; choose another folder, or empty that one"),
        ((run, out), "is no checkpoint; give a folder such as runs/NAME/checkpoint-500"),
        ((workshop.folder / "nowhere", out), "is no checkpoint"),
        ((checkpoint,), "out_folder"),
    ]
    for arguments, message in refused:
        assert message in workshop.refused(*arguments, main=interop.main)
    assert not out.exists()


# ---- init_from -------------------------------------------------------------------------------------------------------

OTHER_TOKENS = "--tokenizer=byte"


def going_on(workshop, source, *arguments):
    """A command of a tiny run from `source`; the architecture is the source's, so it is not named."""
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    command = [argument for argument in workshop.command() if not argument.startswith(shape)]
    return [*command, OTHER_TOKENS, f"--init_from={source}", *arguments]


def test_a_run_from_a_folder_is_trained_resumed_sampled_and_exported(transformers, workshop, hf_folder, capsys):
    source = workshop.folder / "gpt2"
    shutil.copytree(hf_folder, source)
    train.main(going_on(workshop, f"hf:{source}", "--run_name=tuned", "--block_size=16", "--max_iters=4"))
    run, theirs = workshop.runs / "tuned", transformers.AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    record = read_json(run / "config.json")
    assert record["initial_weights"] == {
        "source": f"hf:{source}", "class": "GPT2LMHeadModel", "transformers_version": transformers.__version__,
        "sha256": {"model.safetensors": interop.checkpoint.sha256(hf_folder / "model.safetensors")},
    }  # fmt: skip
    config = record["model_config"]
    assert (config["n_layer"], config["activation"], config["block_size"], config["bias"]) == (2, "gelu_tanh", 16, True)
    assert config["dropout"] == 0.1  # as its own configuration says

    shutil.rmtree(source)  # from here on the run stands alone
    train.main([f"--runs_dir={workshop.runs}", "--run_name=tuned", "--init_from=resume", "--max_iters=6"])
    again = read_json(run / "config.json")
    assert again["initial_weights"] == record["initial_weights"] and again["model_config"] == config
    assert summary(run)["steps"] == 6
    moved = weights(run, 6)["token_embedding.weight"] - theirs.transformer.wte.weight.detach()
    assert 0 < moved.abs().max() < 0.1, "trained, and from these weights"

    capsys.readouterr()
    sample.main(
        [f"--runs_dir={workshop.runs}", "--run_name=tuned", "--device=cpu", "--max_new_tokens=5", "--start=the"]
    )
    assert capsys.readouterr().out.startswith("the")
    assert interop.export_hf(run / "checkpoint-6", workshop.folder / "back") == "GPT2LMHeadModel"


def test_a_model_is_tuned_and_scored_in_its_own_tokens(transformers, workshop, capsys):
    """Exported with a tokenizer learned here, tuned with tokenizer=hf: on the same text: the first run goes on."""
    first = workshop.run("--arch_preset=llama", "--tokenizer=bpe", "--tokenizer_vocab_size=300", name="first")
    folder = workshop.folder / "model"
    interop.export_hf(first / "checkpoint-8", folder)
    tokens = f"--tokenizer=hf:{folder}"
    tune = [argument for argument in going_on(workshop, f"hf:{folder}", tokens) if argument != OTHER_TOKENS]
    train.main([*tune, "--run_name=tuned", "--learning_rate=1e-30", "--data_dir=data"])
    tuned = workshop.runs / "tuned"
    assert sorted(path.name for path in (workshop.folder / "data").iterdir()) == ["text-book-hf-model"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, before = load_tokenizer(tuned), load_tokenizer(first)
    text = (workshop.book / "book.txt").read_text("utf-8")[:3000]
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False) == before.encode(text).tolist()
    assert ours.token_bytes() == before.token_bytes()  # so that bits per byte are the same number
    for name in ("final_val_loss", "bits_per_byte"):
        assert summary(tuned)[name] == pytest.approx(summary(first)[name], abs=1e-5)

    shutil.rmtree(folder)  # from here on the run and its data stand alone
    train.main([f"--runs_dir={workshop.runs}", "--run_name=tuned", "--init_from=resume", "--max_iters=10"])
    capsys.readouterr()
    arguments = [f"--runs_dir={workshop.runs}", "--run_name=tuned", "--device=cpu", "--max_new_tokens=5"]
    sample.main([*arguments, "--start=the quick"])
    assert capsys.readouterr().out.startswith("the quick")
    sentence = workshop.refused(*tune, "--run_name=again", "--data_dir=elsewhere")
    assert "init_from=hf:" in sentence or "tokenizer=hf:" in sentence


def test_a_dataset_of_another_models_tokens_is_refused(workshop):
    for size in (290, 300):
        run = workshop.run("--tokenizer=bpe", f"--tokenizer_vocab_size={size}", "--max_iters=1", name=f"run{size}")
        library = load_tokenizer(run).to_library()
        (workshop.folder / "model").mkdir(exist_ok=True)
        (workshop.folder / "model" / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
        command = workshop.command("--tokenizer=hf:model", "--max_iters=1", "--data_dir=data", name=f"tuned{size}")
        if size == 290:
            train.main(command)
    assert "was prepared with tokenizer=hf-" in workshop.refused(*command)
    assert "has no meaning for tokenizer=hf:model" in workshop.refused(*command, "--tokenizer_vocab_size=300")
    assert "needs none/tokenizer.json" in workshop.refused(*command, "--tokenizer=hf:none").replace("\\", "/")


def test_the_first_loss_is_that_of_the_imported_model(transformers, workshop, hf_folder):
    train.main(going_on(workshop, f"hf:{hf_folder}", "--run_name=first", "--learning_rate=1e-30", "--dropout=0.0"))
    run = workshop.runs / "first"
    tensors = weights(run, 8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    torch.testing.assert_close(tensors["blocks.1.ffn.up.weight"], theirs.transformer.h[1].mlp.c_fc.weight.t())
    assert read_json(run / "config.json")["model_config"]["block_size"] == 32


def test_a_run_from_a_file_of_nanogpt(transformers, workshop, hf_folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    source = nanogpt_file(workshop.folder / "ckpt.pt", theirs)
    train.main(going_on(workshop, source, "--run_name=nano", "--max_iters=2"))
    record = read_json(workshop.runs / "nano" / "config.json")
    assert record["initial_weights"]["source"] == source and record["model_config"]["activation"] == "gelu"


def test_a_source_without_a_longest_text_takes_the_setting(transformers, workshop):
    hf_model(transformers, "mamba").save_pretrained(workshop.folder / "mamba")
    sentence = workshop.refused(*going_on(workshop, f"hf:{workshop.folder / 'mamba'}", "--block_size=24"))
    assert "vocab_size=29 is too small" in sentence and "whose tokens go up to 255" in sentence
    source = interop.starting_point(interop.configurator.read_settings([f"--init_from=hf:{workshop.folder / 'mamba'}"]))
    assert source[0].model.block_size == 256 and source[0].model.n_layer == 2


def test_the_preset_of_the_same_architecture_may_be_named(transformers, tmp_path, hf_folder):
    for name in ("llama", "mamba"):
        hf_model(transformers, name).save_pretrained(tmp_path / name)
        arguments = [f"--arch_preset={name}", f"--init_from=hf:{tmp_path / name}", f"--weight_tying={name == 'mamba'}"]
        settings, _ = interop.starting_point(interop.configurator.read_settings(arguments))
        assert settings.model.vocab_size == V
    arguments = ["--arch_preset=gpt2", "--activation=gelu_tanh", f"--init_from=hf:{hf_folder}"]
    settings, _ = interop.starting_point(interop.configurator.read_settings(arguments))
    assert settings.model.n_embd == 16 and settings.model.dropout == 0.0  # the preset's


@pytest.mark.parametrize("arguments, message", [
    (["--n_layer=3"], "n_layer=3 contradicts init_from=hf:.*, whose model has n_layer=2; drop it"),
    (["--arch_preset=llama"], "position_encoding='rope' contradicts|normalization='rmsnorm' contradicts"),
    (["--arch_preset=gpt2"], "activation='gelu' contradicts .* activation='gelu_tanh'"),
    (["--vocab_size=300"], "vocab_size=300 contradicts"),
    (["--block_size=33"], "block_size=33 is more than the 32 learned positions"),
    (["--n_kv_head=1"], "n_kv_head=1 contradicts"),
])  # fmt: skip
def test_a_setting_that_contradicts_the_source_is_refused(hf_folder, arguments, message):
    with pytest.raises(UserError, match=message):
        interop.starting_point(interop.configurator.read_settings([*arguments, f"--init_from=hf:{hf_folder}"]))


def test_a_source_that_is_none_is_refused(workshop, hf_folder):
    empty = workshop.folder / "empty"
    empty.mkdir()
    lacking = workshop.folder / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_text((hf_folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    torn = workshop.folder / "torn"
    shutil.copytree(hf_folder, torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500])
    strange = workshop.folder / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "gpt2", "n_layer": "two"}', encoding="utf-8")
    other = workshop.folder / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}', encoding="utf-8")
    refused = {
        "gpt2": "init_from='gpt2' must be one of scratch, resume, hf:NAME, nanogpt:FILE",
        "hf:": "init_from='hf:' must be one of",
        "resume:x": "init_from='resume:x' must be one of",
        "hff:x": "init_from='hff' does not exist; did you mean 'hf'? (known: hf, nanogpt)",
        "hf:nobody/nothing": "hf:nobody/nothing is no folder here, and no model of that name could be fetched",
        f"hf:{empty}": "holds no configuration that can be read",
        f"hf:{lacking}": "cannot be read",
        f"hf:{torn}": "the weights in",
        f"hf:{strange}": "holds no configuration that can be read",
        f"hf:{other}": "T5Model cannot be imported",
        "nanogpt:nowhere.pt": "init_from=nanogpt:nowhere.pt does not exist",
        f"nanogpt:{hf_folder / 'model.safetensors'}": "cannot be read as a checkpoint of nanoGPT",
    }
    for source, message in refused.items():
        assert message in workshop.refused(*going_on(workshop, source)), source
