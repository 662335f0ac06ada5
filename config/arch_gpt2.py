# GPT-2 (Radford et al. 2019), at whatever size stands beside it.

arch_preset = "gpt2"

normalization = "layernorm"  # with gain and bias
norm_position = "pre"  # moved to the input of each branch, and one more at the end (section 2.3)
position_encoding = "learned_absolute"  # a vector per position, up to block_size
ffn_type = "standard"  # 4 n_embd wide
activation = "gelu"
bias = True  # in every linear layer
weight_tying = True  # the head is the token embedding
dropout = 0.0  # GPT-2 had 0.1; nanoGPT's runs, which this is compared with, have none
