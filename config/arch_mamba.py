# Mamba (Gu & Dao 2023, arXiv:2312.00752), at whatever size stands beside it. A block has half the weights of a GPT-2
# block of its width (6 n_embd^2), so n_layer is usually doubled to compare.

arch_preset = "mamba"

block_pattern = "mamba/none"  # no FFN: convolution, scan and gate in one block (section 3.4)
normalization = "rmsnorm"  # as the authors' released models
norm_position = "pre"
position_encoding = "none"  # the recurrence knows the order
bias = False  # none in the projections; the short convolution and dt have one
weight_tying = True  # as the released models
dropout = 0.0

# The mixer's own, at their defaults, which are the paper's (sections 3.6 and 4): expand=2.0, d_state=16, d_conv=4,
# dt_rank=n_embd / 16, dt from 0.001 to 0.1 at first.
