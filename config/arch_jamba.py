# A small Jamba (Lieber et al. 2024, arXiv:2403.19887): one attention layer in eight, Mamba in the others, and a mixture
# of experts in every second layer.

arch_preset = "jamba"

block_pattern = "mamba,mamba/moe,mamba,mamba/moe,attention,mamba/moe,mamba,mamba/moe"  # one Jamba block (section 3.1)
n_layer = 8  # one block; the paper's model has four
n_experts = 16  # of which each token takes 2 (section 3.1)
queries_per_kv_head = 4  # 32 query heads over 8 key-value heads
position_encoding = "none"  # Mamba sees order, and attention does without (section 6.5)

normalization = "rmsnorm"  # the paper has three more inside Mamba, on dt, B and C, which a small model does without
norm_position = "pre"
ffn_type = "swiglu"  # where there is no mixture
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
