# LSTM (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000), stacked as a language model (Zaremba et al.
# 2014, arXiv:1409.2329) in today's frame: norm, LSTM, projection, added to the stream. A block has 9 n_embd^2 weights.

arch_preset = "lstm"

block_pattern = "lstm/none"  # no FFN: the gates are its nonlinearity, as in the stacks of the time
normalization = "rmsnorm"  # the stacks of the time had neither norms nor residuals, and were rarely deeper than four
norm_position = "pre"
position_encoding = "none"  # the recurrence knows the order
bias = False  # none in the projection; the gates have theirs
weight_tying = True  # Press & Wolf 2017 found it on LSTMs
dropout = 0.0  # Zaremba et al. had 0.5 for a million words seen 39 times; one pass over the data needs none

# The mixer's own, at their defaults: expand=1.0 (hidden width n_embd), forget_bias=1.0 (Jozefowicz et al. 2015).
