# GRU (Cho et al. 2014, arXiv:1406.1078) in the frame of arch_lstm.py: norm, GRU, projection, added to the stream.
# A block has 7 n_embd^2 weights.

arch_preset = "gru"

block_pattern = "gru/none"  # no FFN: the gates are its nonlinearity
normalization = "rmsnorm"  # with a residual it lets the stack go deeper than the few layers of its time
norm_position = "pre"
position_encoding = "none"  # the recurrence knows the order
bias = False  # none in the projection; the gates have theirs
weight_tying = True
dropout = 0.0

# The mixer's own, at its default: expand=1.0 (hidden width n_embd). The reset gate acts after the product, as in cuDNN.
