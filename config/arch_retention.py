# RetNet (Sun et al. 2023, arXiv:2307.08621): linear attention that forgets at a constant rate for each head.
# At --ffn_multiplier=1.3333 a block has the paper's 12 n_embd^2 weights, of which 8 are here; at 8/3 it has 16.
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
ffn_type = "swiglu"  # as in the released code; GELU in the first version
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
