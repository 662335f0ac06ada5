"""Every table against the class it describes: logits, gradients of every weight, settings, export, refusals."""

import pytest
import torch
import torch.nn.functional as F

import model_interop as interop
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from model_helpers import scrambled
from model_interop_classes import NANOGPT
from model_interop_rules import HF_CLASS_REGISTRY
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
    assert again.config.replace(block_size=1) == ours.config.replace(block_size=1)
    for (name, one), (_, other) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
