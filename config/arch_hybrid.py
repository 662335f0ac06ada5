# GPT-2 with rotary positions: RoPE + LayerNorm + GELU + pre-norm, as in GPT-NeoX (Black et al. 2022, arXiv:2204.06745).

arch_preset = "hybrid"

position_encoding = "rope"  # the one change: distances instead of places
