# Gated linear attention (Yang et al. 2023, arXiv:2312.06635): each channel of the keys learns when to forget.
#
# The mixer's own options and their defaults, which are the paper's:
#   --expand_k=0.5                keys half as wide as values: with the gate, 4 n_embd^2 weights as attention has
#   --expand_v=1.0
#   --gate_rank=16                the decays come from a low-rank pair, a hundredth of the weights
#   --gate_temperature=16.0       sigmoid(...)^(1/16) starts at 0.958 per token: forgets slowly
#   --output_norm="rmsnorm"       for each head (LayerNorm in the paper, RMSNorm in the released models)
#   --output_gate=True            silu(x W)

arch_preset = "gla"

block_pattern = "gla"
position_encoding = "none"  # decays tell near from far
normalization = "rmsnorm"  # from here on as in LLaMA, the paper's baseline
norm_position = "pre"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
