# LLaMA with branches that shrink with depth, as Depth-muP asks (Yang et al. 2023, arXiv:2310.02244): the stream's
# variance then does not grow with n_layer, and a learning rate found at one depth is a fair guess at another.

arch_preset = "residual_scaling"

residual_scaling = "depth"  # each branch x 1 / sqrt(2 n_layer); "learned" starts there with a gain for each channel

normalization = "rmsnorm"  # the rest is LLaMA's
norm_position = "pre"
position_encoding = "rope"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
