# Build your own: every option with its choices. `python train.py --help` has the rest.

arch_preset = "custom"

normalization = "rmsnorm"  # layernorm, layernorm_nobias, rmsnorm
norm_position = "pre"  # pre, post, output, sandwich
position_encoding = "rope"  # learned_absolute, rope, alibi, none
attention_backend = "sdpa"  # sdpa, manual, flex
ffn_type = "standard"  # standard, swiglu, geglu
activation = "relu2"  # gelu, gelu_tanh, silu, relu, leaky_relu, relu2
bias = False
weight_tying = True
dropout = 0.0

n_kv_head = 2  # half as many key-value heads as n_head=4: half the cache
qk_norm = True  # keeps the scores bounded at high learning rates
