# RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a delta rule with a decay and a learning rate for each channel.
# From the second layer on, values are mixed with the first layer's.

arch_preset = "rwkv7"

block_pattern = "rwkv7"
position_encoding = "none"  # the token shift and the decays see order
normalization = "layernorm"  # with bias, as in RWKV-LM
norm_position = "pre"
embedding_norm = True  # since RWKV-2
ffn_type = "rwkv7"  # 4 n_embd wide, with a token shift
activation = "relu2"  # relu(x)^2, since RWKV-4
bias = False
weight_tying = False
dropout = 0.0
