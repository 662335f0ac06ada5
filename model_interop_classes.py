"""The classes of transformers that nanoArch's models can be imported from and exported to, one table each.

Adding one: `rules` for every key of its configuration that decides a logit, `ignored` for the others, `weights` and
`block_weights` for its parameters. `tests/test_model_interop_classes.py` finds it, and fails on a key or parameter left
out. Where several can hold a model, it is exported to the first.
"""

import math
from dataclasses import replace

import torch

from model_interop_rules import (
    CROPPED,
    HF_CLASS_REGISTRY,
    JOINED,
    SPLIT,
    TRANSPOSED,
    Both,
    Choice,
    HFClass,
    Must,
    Same,
    Transform,
    attention_scale,
    heads,
    layer_types,
    layered_window,
    optional_rope,
    product,
    rope,
    rows,
    spelt_ffn,
    whole_expand,
    window,
)

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu",
    "relu": "relu", "leaky_relu": "leaky_relu", "relu2": "relu2",
}  # fmt: skip
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}

EVERY_MODEL = [
    Same("vocab_size", "vocab_size"),
    Same("tie_word_embeddings", "weight_tying"),
    Same("initializer_range", "init_std"),
    Must("is_encoder_decoder", False),
]


# ---- GPT-2 (Radford et al. 2019), and nanoGPT's own file of it -------------------------------------------------------

GPT2 = HF_CLASS_REGISTRY["GPT2LMHeadModel"] = HFClass(
    config="GPT2Config",
    always={"normalization": "layernorm", "bias": True, "position_encoding": "learned_absolute"},
    stands_for={"normalization": {"layernorm_nobias": "layernorm"}, "bias": {False: True}},
    rules=[
        *EVERY_MODEL,
        Same("n_embd", "n_embd"),
        Same("n_layer", "n_layer"),
        Same("n_head", "n_head"),
        Same("n_positions", "block_size"),
        Same("layer_norm_epsilon", "norm_eps"),
        Same(("resid_pdrop", "embd_pdrop", "attn_pdrop"), "dropout"),
        Choice("activation_function", "activation", ACTIVATIONS),
        Both(
            ("n_inner",),
            lambda values: {"ffn_hidden": values["n_inner"] or 4 * values["n_embd"]},
            lambda own: {"n_inner": own["ffn_hidden"]},
        ),
        Must("scale_attn_weights", True),
        Must("scale_attn_by_inverse_layer_idx", False),
        Must("add_cross_attention", False),
    ],
    ignored=(
        "reorder_and_upcast_attn",  # a matter of precision
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    ),
    weights=rows(
        ("transformer.wte", "token_embedding"),
        ("transformer.wpe", "position_embedding.table", CROPPED),
        ("transformer.ln_f", "final_norm"),
        ("lm_head", "head"),
    ),
    layers="transformer.h",
    block_weights={
        "block": rows(("ln_1", "mixer_norm"), ("ln_2", "ffn_norm")),
        "attention": rows(("attn.c_attn", "mixer.qkv", TRANSPOSED), ("attn.c_proj", "mixer.out", TRANSPOSED)),
        "standard": rows(("mlp.c_fc", "ffn.up", TRANSPOSED), ("mlp.c_proj", "ffn.down", TRANSPOSED)),
    },
)  # fmt: skip

# The same parameters in ckpt.pt, as nn.Linear has them, with its model_args as settings.
NANOGPT = replace(
    GPT2,
    config=None,
    always={"position_encoding": "learned_absolute", "activation": "gelu", "weight_tying": True},
    rules=[
        *(Same(name, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")),
        Both(
            ("bias", "n_embd"),
            lambda values: {
                "normalization": "layernorm" if values["bias"] else "layernorm_nobias",
                "ffn_hidden": 4 * values["n_embd"],
            },
            None,  # nothing is written for nanoGPT
        ),
    ],
    ignored=(),
    block_weights={
        "block": GPT2.block_weights["block"],
        "attention": rows(("attn.c_attn", "mixer.qkv"), ("attn.c_proj", "mixer.out")),
        "standard": rows(("mlp.c_fc", "ffn.up"), ("mlp.c_proj", "ffn.down")),
    },
)


# ---- BERT (Devlin et al. 2018) ---------------------------------------------------------------------------------------

# One vector for the segment that every token is of, at each position: the sum is what positions are here.
WITH_FIRST_SEGMENT = Transform(
    lambda theirs, like: [(theirs[0] + theirs[1][0])[: like[0].size(0)]],
    lambda ours, like: [ours[0], torch.zeros_like(like[1])],
)

HF_CLASS_REGISTRY["BertForMaskedLM"] = HFClass(
    config="BertConfig",
    always={
        "normalization": "layernorm", "bias": True, "position_encoding": "learned_absolute", "causal": False,
        "norm_position": "post", "embedding_norm": True, "head_transform": True,
    },
    rules=[
        *EVERY_MODEL,
        Same("hidden_size", "n_embd"),
        Same("num_hidden_layers", "n_layer"),
        Same("num_attention_heads", "n_head"),
        Same("intermediate_size", "ffn_hidden"),
        Same("max_position_embeddings", "block_size"),
        Same("layer_norm_eps", "norm_eps"),
        Same(("hidden_dropout_prob", "attention_probs_dropout_prob"), "dropout"),
        Choice("hidden_act", "activation", ACTIVATIONS),
        Must("position_embedding_type", "absolute"),
        Must("is_decoder", False),
        Must("add_cross_attention", False),
    ],
    ignored=("type_vocab_size", "classifier_dropout"),  # text is of the first segment; the head is another
    weights=rows(
        ("bert.embeddings.word_embeddings", "token_embedding"),
        (
            ("bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"),
            "position_embedding.table",
            WITH_FIRST_SEGMENT,
        ),
        ("bert.embeddings.LayerNorm", "embedding_norm"),
        ("cls.predictions.transform.dense", "head_transform.dense"),
        ("cls.predictions.transform.LayerNorm", "head_transform.norm"),
        ("cls.predictions.bias", "head.bias"),  # the decoder's, but where nothing is tied; then nothing reads it
        ("cls.predictions.decoder", "head"),
    ),
    layers="bert.encoder.layer",
    block_weights={
        "block": rows(("attention.output.LayerNorm", "mixer_norm"), ("output.LayerNorm", "ffn_norm")),
        "attention": rows(
            (("attention.self.query", "attention.self.key", "attention.self.value"), "mixer.qkv", JOINED),
            ("attention.output.dense", "mixer.out"),
        ),
        "standard": rows(("intermediate.dense", "ffn.up"), ("output.dense", "ffn.down")),
    },
)  # fmt: skip


# ---- LLaMA and its kin -----------------------------------------------------------------------------------------------

LLAMA_SETTINGS = {"normalization": "rmsnorm", "position_encoding": "rope", "bias": False}
LLAMA_SHAPE = [
    *EVERY_MODEL,
    Same("hidden_size", "n_embd"),
    Same("num_hidden_layers", "n_layer"),
    Same("num_attention_heads", "n_head"),
    Same("num_key_value_heads", "n_kv_head"),
    Same("max_position_embeddings", "block_size"),
    Same("rms_norm_eps", "norm_eps"),
    Must("attention_dropout", 0.0),
]
LLAMA_RULES = [*LLAMA_SHAPE, rope()]
HEAD_DIM = Same("head_dim", "head_dim")
GATED_FFN = [Same("intermediate_size", "ffn_hidden"), spelt_ffn("hidden_act", GATES)]

LLAMA_ATTENTION = rows(
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mixer.qkv", JOINED),
    ("self_attn.o_proj", "mixer.out"),
)
QK_NORMS = rows(("self_attn.q_norm", "mixer.query_norm"), ("self_attn.k_norm", "mixer.key_norm"))
LLAMA_FFN = rows(("mlp.gate_proj", "ffn.gate"), ("mlp.up_proj", "ffn.up"), ("mlp.down_proj", "ffn.down"))

# Touvron et al. 2023, and Llama 3's longer waves. One `bias` here is attention's and the FFN's there.
LLAMA = HF_CLASS_REGISTRY["LlamaForCausalLM"] = HFClass(
    config="LlamaConfig",
    always=LLAMA_SETTINGS,
    rules=[*LLAMA_RULES, HEAD_DIM, *GATED_FFN, Same(("attention_bias", "mlp_bias"), "bias")],
    ignored=("pretraining_tp",),  # how the matrices were once split
    unread=("activation",),
    weights=rows(("model.embed_tokens", "token_embedding"), ("model.norm", "final_norm"), ("lm_head", "head")),
    layers="model.layers",
    block_weights={
        "block": rows(("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "ffn_norm")),
        "attention": LLAMA_ATTENTION,
        "swiglu": LLAMA_FFN,
        "geglu": LLAMA_FFN,
    },
)

# Jiang et al. 2023: LLaMA with a sliding window.
HF_CLASS_REGISTRY["MistralForCausalLM"] = replace(
    LLAMA,
    config="MistralConfig",
    rules=[*LLAMA_RULES, HEAD_DIM, *GATED_FFN, window()],
    ignored=(),
)

# Yang et al. 2025: queries and keys normalised per head. There is no bias in the FFN, so none is taken elsewhere.
HF_CLASS_REGISTRY["Qwen3ForCausalLM"] = replace(
    LLAMA,
    config="Qwen3Config",
    always={**LLAMA_SETTINGS, "qk_norm": True},
    rules=[*LLAMA_RULES, HEAD_DIM, *GATED_FFN, Must("attention_bias", False), layered_window()],
    ignored=(),
    block_weights={**LLAMA.block_weights, "attention": [*LLAMA_ATTENTION, *QK_NORMS]},
)

# OLMo team 2024: norms after the branches, queries and keys normalised before they are split into heads.
HF_CLASS_REGISTRY["Olmo2ForCausalLM"] = replace(
    LLAMA,
    config="Olmo2Config",
    always={**LLAMA_SETTINGS, "norm_position": "output", "qk_norm": True, "qk_norm_scope": "projection"},
    rules=[*LLAMA_RULES, *GATED_FFN, Must("attention_bias", False)],
    ignored=(),
    block_weights={
        **LLAMA.block_weights,
        "block": rows(("post_attention_layernorm", "mixer_norm"), ("post_feedforward_layernorm", "ffn_norm")),
        "attention": [*LLAMA_ATTENTION, *QK_NORMS],
    },
)

# Jiang et al. 2024: LLaMA's block with experts for FFNs. How their load is evened out is the objective's business here.
HF_CLASS_REGISTRY["MixtralForCausalLM"] = replace(
    LLAMA,
    config="MixtralConfig",
    always={**LLAMA_SETTINGS, "ffn_type": "moe"},
    rules=[
        *LLAMA_RULES,
        HEAD_DIM,
        window(),
        Same("intermediate_size", "ffn_hidden"),
        Choice("hidden_act", "expert_type", GATES),
        Same("num_local_experts", "n_experts"),
        Same("num_experts_per_tok", "experts_per_token"),
        Must("router_jitter_noise", 0.0),
    ],
    ignored=("output_router_logits", "router_aux_loss_coef"),
    block_weights={
        **LLAMA.block_weights,
        "moe": rows(
            ("mlp.gate", "ffn.router"),
            ("mlp.experts.gate_up_proj", "ffn.experts.up"),
            ("mlp.experts.down_proj", "ffn.experts.down"),
        ),
    },
    needs=("moe",),
)


# ---- state space models: a mixer in each block, no FFN, no order to encode, no longest text --------------------------

MAMBA_RULES = [
    *EVERY_MODEL,
    Same("hidden_size", "n_embd"),
    Same("num_hidden_layers", "n_layer"),
    Same("layer_norm_epsilon", "norm_eps"),
    Same("state_size", "d_state"),
    Same("conv_kernel", "d_conv"),
    Same("use_bias", "bias"),
    Same("use_conv_bias", "conv_bias"),
    Same("time_step_min", "dt_min"),
    Same("time_step_max", "dt_max"),
    Same("time_step_floor", "dt_init_floor"),
    whole_expand("expand"),
    Must("hidden_act", "silu"),
]
# Parameters have the same names inside the mixer.
MAMBA_WEIGHTS = [(name, name) for name in ("mixer.A_log", "mixer.D", "mixer.conv1d", "mixer.in_proj", "mixer.out_proj")]

# Gu & Dao 2023
MAMBA = HF_CLASS_REGISTRY["MambaForCausalLM"] = HFClass(
    config="MambaConfig",
    always={"normalization": "rmsnorm", "position_encoding": "none", "block_pattern": "mamba/none"},
    rules=[
        *MAMBA_RULES,
        Same("time_step_rank", "dt_rank"),
        Same("time_step_scale", "dt_scale"),
        Same("time_step_init_scheme", "dt_init"),
        product("intermediate_size", "expand", "hidden_size"),
    ],
    ignored=(
        "residual_in_fp32",  # a matter of precision
        "rescale_prenorm_residual",  # of first values
        "use_mambapy", "use_associative_scan",  # of speed
    ),
    unread=("activation", "n_head", "block_size"),
    weights=rows(("backbone.embeddings", "token_embedding"), ("backbone.norm_f", "final_norm"), ("lm_head", "head")),
    layers="backbone.layers",
    block_weights={
        "block": rows(("norm", "mixer_norm")),
        "none": [],
        "mamba": rows(*MAMBA_WEIGHTS, ("mixer.x_proj", "mixer.x_proj"), ("mixer.dt_proj", "mixer.dt_proj")),
    },
)  # fmt: skip

# Dao & Gu 2024
HF_CLASS_REGISTRY["Mamba2ForCausalLM"] = replace(
    MAMBA,
    config="Mamba2Config",
    always={**MAMBA.always, "block_pattern": "mamba2/none"},
    rules=[
        *MAMBA_RULES,
        Same("head_dim", "headdim"),
        Same("n_groups", "ngroups"),
        Same("chunk_size", "chunk_size"),
        heads("num_heads", "head_dim", "expand"),
        Must("time_step_limit", (0.0, math.inf)),
    ],
    ignored=(
        "residual_in_fp32",
        "rescale_prenorm_residual",
        "time_step_rank",
    ),  # the last is Mamba-1's: nothing reads it
    block_weights={
        "block": rows(("norm", "mixer_norm")),
        "none": [],
        "mamba2": rows(*MAMBA_WEIGHTS, ("mixer.dt_bias", "mixer.dt_bias"), ("mixer.norm", "mixer.norm")),
    },
)


# ---- hybrids ---------------------------------------------------------------------------------------------------------

# IBM 2025, Granite 4 without experts: Mamba-2 and attention in any order, a SwiGLU in each block.
HF_CLASS_REGISTRY["GraniteMoeHybridForCausalLM"] = HFClass(
    config="GraniteMoeHybridConfig",
    always={"normalization": "rmsnorm", "bias": False, "ffn_type": "swiglu"},
    rules=[
        *LLAMA_SHAPE,
        optional_rope("position_embedding_type"),
        layer_types("layer_types", {"linear_attention": "mamba2", "full_attention": "attention"}),
        attention_scale("attention_multiplier", "hidden_size", "num_attention_heads"),
        Same("shared_intermediate_size", "ffn_hidden"),
        Must("hidden_act", "silu"),
        Must("attention_bias", False),
        *(Must(what, 1.0) for what in ("embedding_multiplier", "logits_scaling", "residual_multiplier")),
        Must("num_local_experts", 0),
        Same("mamba_d_state", "d_state"),
        Same("mamba_d_conv", "d_conv"),
        Same("mamba_d_head", "headdim"),
        Same("mamba_n_groups", "ngroups"),
        Same("mamba_chunk_size", "chunk_size"),
        Same("mamba_conv_bias", "conv_bias"),
        Must("mamba_proj_bias", False),
        whole_expand("mamba_expand"),
        heads("mamba_n_heads", "mamba_d_head", "mamba_expand"),
        Must("time_step_limit", (0.0, math.inf)),
    ],
    ignored=(
        "intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",  # of experts
    ),
    needs=("mamba2",),
    unread=("activation",),
    weights=LLAMA.weights,
    layers="model.layers",
    block_weights={
        "block": LLAMA.block_weights["block"],
        "attention": LLAMA_ATTENTION,
        "mamba2": rows(
            *((f"mamba.{name}", f"mixer.{name}")
              for name in ("A_log", "D", "conv1d", "in_proj", "out_proj", "dt_bias", "norm"))
        ),
        "swiglu": rows(
            ("shared_mlp.input_linear", ("ffn.gate", "ffn.up"), SPLIT), ("shared_mlp.output_linear", "ffn.down")
        ),
    },
)  # fmt: skip
