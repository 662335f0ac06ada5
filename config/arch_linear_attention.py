# Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236) in the place of GPT-2's
# softmax. The same weights to the last one, so that a comparison with arch_gpt2.py is of the mixer alone.
#
# The mixer's own options and their defaults, which are the paper's:
#   --feature_map="elu_plus_one"  positive, so that weights are, and with a gradient below 0, unlike relu
#   --normaliser=True             divide by the sum of the weights, as softmax does (eq. 9)

arch_preset = "linear_attention"

block_pattern = "linear_attention"  # phi(q) . phi(k) for exp(q . k): the past sums to a matrix of one size
position_encoding = "learned_absolute"  # the sum knows no order: without it only the mask tells one
normalization = "layernorm"  # from here on as in GPT-2
norm_position = "pre"
ffn_type = "standard"
activation = "gelu"
bias = True
weight_tying = True
dropout = 0.0
