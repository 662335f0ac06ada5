# The simple recurrent network (Elman 1990; as a language model Mikolov et al. 2010) in the frame of arch_lstm.py: the
# floor of a comparison. Its gradient fades within some tens of tokens. A block has 3 n_embd^2 weights.

arch_preset = "rnn"

block_pattern = "rnn/none"  # no FFN: tanh is its nonlinearity
normalization = "rmsnorm"  # keeps tanh away from its flat ends
norm_position = "pre"
position_encoding = "none"  # the recurrence knows the order
bias = False  # none in the projection; the recurrence has its two
weight_tying = True
dropout = 0.0

# The mixer's own, at their defaults: expand=1.0 (hidden width n_embd), rnn_activation="tanh".
