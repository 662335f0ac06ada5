# OLMo 2 (OLMo team 2024, arXiv:2501.00656): LLaMA made to train without spikes.

arch_preset = "olmo2"

norm_position = "output"  # x + norm(f(x)): each branch's output is normed and not its input (section 3.2)
qk_norm = True  # keeps the scores from growing
qk_norm_scope = "projection"  # over all heads together
rope_theta = 5e5  # section 2

normalization = "rmsnorm"
norm_eps = 1e-6  # 1e-5 in the first OLMo (section 3.3)
position_encoding = "rope"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0

z_loss = 1e-5  # of the training recipe: log(Z)^2 keeps the logits from drifting (section 3.3)
