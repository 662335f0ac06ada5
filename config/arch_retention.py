# RetNet (Sun et al. 2023, arXiv:2307.08621): linear attention that forgets at a constant rate for each head.
# Values twice as wide as keys and a gate make 8 n_embd^2 weights of the mixer, so the FFN is half as wide as LLaMA's.
#
# The mixer's own options and their defaults, which are the paper's:
#   --expand_v=2.0                values twice as wide as keys (section 3.1)
#   --output_norm="rmsnorm"       for each head, since heads decay at different rates (section 2.3)
#   --output_gate=True            silu(x W), which linear attention lacks in non-linearity (eq. 8)

arch_preset = "retention"

block_pattern = "retention"
position_encoding = "rope"  # rotation and decay together are the paper's xPos (eq. 3)
normalization = "rmsnorm"  # as in the released code; LayerNorm in the first version of the paper
norm_position = "pre"
ffn_multiplier = 4 / 3  # 4 n_embd^2 weights: the 12 n_embd^2 of a Transformer's block in all (section 3.1)
ffn_type = "swiglu"  # as in the released code; GELU in the first version
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
