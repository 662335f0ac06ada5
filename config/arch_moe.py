# Mixtral (Jiang et al. 2024, arXiv:2401.04088): LLaMA whose FFN is a mixture of experts.

arch_preset = "moe"

n_experts = 8  # each a whole SwiGLU of 8/3 n_embd (table 1); lower ffn_multiplier for many small ones (DeepSeekMoE)
experts_per_token = 2  # a token pays for 2 and may draw on 8 (section 2.1)
normalize_router_weights = True  # softmax over the chosen two alone (section 2.1)
load_balance_loss = 0.01  # Switch's alpha (arXiv:2101.03961, section 2.2); the paper keeps its own to itself

# DeepSeek-V3 balances without a loss (arXiv:2412.19437, sections 2.1.2 and 4.2): --router_score=sigmoid
# --router_bias_rate=0.001 --load_balance_loss=0

ffn_type = "moe"  # in every layer; block_pattern = "attention/swiglu,attention/moe" has it in every second
normalization = "rmsnorm"  # the rest is LLaMA's (Mistral 7B's, without its window)
norm_position = "pre"
position_encoding = "rope"
activation = "silu"  # the gate's
bias = False
weight_tying = False
dropout = 0.0
