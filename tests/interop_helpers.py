"""Models of transformers with random weights: shapes of every class that can be imported."""

import pytest
import torch

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
