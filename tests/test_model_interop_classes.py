"""Every table against the class it describes: logits, gradients of every weight, settings, export, refusals."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

import model_interop as interop
from interop_helpers import LLAMA, LLAMA3, SHAPES, hf_model, text
from model_builder import ConfigurableGPT
from model_config import PRESETS
from model_helpers import scrambled
from model_interop_rules import COMMON_KEYS, HF_CLASS_REGISTRY, differences, resolved
from user_errors import UserError

by_shape = pytest.mark.parametrize("shape", SHAPES)
EXACT = (
    "GPT2LMHeadModel",
    "BertForMaskedLM",
)  # the others compute norms, angles or scans in float32 whatever they are given


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
