# Mamba-2 and local attention side by side in every block, reading the same input, their outputs added: Falcon-H1
# (Zuo et al. 2025, arXiv:2507.22448), after Hymba (Dong et al. 2024, arXiv:2411.13676).

arch_preset = "mamba_hybrid_parallel"

block_pattern = "mamba2+local_attention"  # 'a+b' adds the two; any mixers can be put together so
hybrid_local_window = 256  # as Hymba, which has a window in all but three layers; Falcon-H1 sees everything

position_encoding = "rope"  # inside the window; Mamba needs none
normalization = "rmsnorm"
norm_position = "pre"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = True
dropout = 0.0
