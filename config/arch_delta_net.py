# DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in parallel form Yang et al. 2024, arXiv:2406.06484): what a key held
# is taken out before the new value is written, so that the state is corrected instead of added to.
#
# The mixer's own options and their defaults, which are the paper's:
#   --d_conv=4                    over queries, keys and values; the paper's ablation loses without it (table 2)
#   --expand_k=1.0                keys of length 1 after silu
#   --expand_v=1.0
#   --output_norm="rmsnorm"       for each head
#   --output_gate=False           the paper has none
#   --negative_eigenvalues=False  True lets a key reverse what it held (Grazzi et al. 2024, arXiv:2411.12537)

arch_preset = "delta_net"

block_pattern = "delta_net"
position_encoding = "none"  # the convolution sees order
normalization = "rmsnorm"  # from here on as in LLaMA, the paper's baseline
norm_position = "pre"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
