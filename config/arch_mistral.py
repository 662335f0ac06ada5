# Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): LLaMA with shared key-value heads and a sliding window.

arch_preset = "mistral"

sliding_window = 4096  # a layer sees 4,096 tokens, n_layer of them reach further (section 2); lower it below block_size
queries_per_kv_head = 4  # 32 query heads over 8 key-value heads (table 1)

normalization = "rmsnorm"  # the rest is LLaMA's
norm_position = "pre"
position_encoding = "rope"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
