# RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a delta rule with a decay and a learning rate for each channel.
# Two details of the paper are not here, since they reach beyond a mixer: values mixed with those of the first layer,
# and the FFN's token shift.

arch_preset = "rwkv7"

block_pattern = "rwkv7"
position_encoding = "none"  # the token shift and the decays see order
normalization = "layernorm"  # with bias, as in RWKV-LM
norm_position = "pre"
ffn_type = "standard"  # 4 n_embd wide
activation = "relu2"  # relu(x)^2, since RWKV-4
bias = False
weight_tying = False
dropout = 0.0
