# LLaMA (Touvron et al. 2023, arXiv:2302.13971), at whatever size stands beside it.

arch_preset = "llama"

normalization = "rmsnorm"  # no mean to subtract, no bias: cheaper, as good (section 2.2)
norm_position = "pre"  # norm each branch's input, which trains deep models stably
position_encoding = "rope"  # turns queries and keys, so that scores depend on distance
ffn_type = "swiglu"  # a gate beside the values, 8/3 n_embd wide to cost what 4x GELU does
activation = "silu"  # the gate's
bias = False  # none anywhere
weight_tying = False  # the head has a matrix of its own
dropout = 0.0  # one pass over the data needs none
