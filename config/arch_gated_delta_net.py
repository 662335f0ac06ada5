# Gated DeltaNet (Yang et al. 2025, arXiv:2412.06464): DeltaNet that can forget everything at once, by Mamba-2's decay.
#
# The mixer's own options and their defaults, which are the paper's:
#   --d_conv=4                    over queries, keys and values
#   --expand_k=0.75               with the gate 2 x 0.75 + 3 x 1.5 = 6 n_embd^2 weights, as the released models have
#   --expand_v=1.5
#   --output_norm="rmsnorm"       for each head
#   --output_gate=True            silu(x W)
#   --negative_eigenvalues=False

arch_preset = "gated_delta_net"

block_pattern = "gated_delta_net"
position_encoding = "none"  # convolution and decay see order
normalization = "rmsnorm"  # from here on as in LLaMA, the paper's baseline
norm_position = "pre"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
