# Qwen3 (Yang et al. 2025, arXiv:2505.09388), its dense models below 8B.

arch_preset = "qwen3"

qk_norm = True  # in the place of Qwen2's bias on queries, keys and values: training stays stable (section 2)
qk_norm_scope = "head"  # each head by itself
queries_per_kv_head = 2  # 16 over 8 in the 0.6B model (table 1)
rope_theta = 1e6  # slow enough waves for 32,768 tokens

normalization = "rmsnorm"
norm_eps = 1e-6
norm_position = "pre"
position_encoding = "rope"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = True  # the models up to 4B (table 1)
dropout = 0.0
