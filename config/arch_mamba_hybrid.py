# Mamba with local attention, layer by layer, as Samba has them (Ren et al. 2024, arXiv:2406.07522): the recurrence
# keeps what is far away in a state of constant size, the window looks up exactly what is near.

arch_preset = "mamba_hybrid"

block_pattern = "mamba,local_attention"  # taking turns, an FFN after each (section 2.1)
hybrid_local_window = 256  # tokens that attention sees; 2,048 of 4,096 in the paper, so lower it at a short block_size

position_encoding = "rope"  # inside the window; Mamba needs none
normalization = "rmsnorm"
norm_position = "pre"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = True
dropout = 0.0
