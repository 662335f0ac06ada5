# Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), at whatever size stands beside it. A block has half the weights of a GPT-2
# block of its width (about 6 n_embd^2), so n_layer is usually doubled to compare.

arch_preset = "mamba2"

block_pattern = "mamba2/none"  # no FFN: convolution, SSD and gate in one block (section 7.1)
normalization = "rmsnorm"  # as the authors' released models; another stands inside the mixer, before its output
norm_position = "pre"
position_encoding = "none"  # the recurrence knows the order
bias = False  # none in the projections; the short convolution and dt have one
weight_tying = True  # as the released models
dropout = 0.0

# The mixer's own, at their defaults, which are the released models': expand=2.0, d_state=128, headdim=64, ngroups=1,
# d_conv=4, A from -16 to -1 and dt from 0.001 to 0.1 at first. chunk_size=64 changes the speed alone.
