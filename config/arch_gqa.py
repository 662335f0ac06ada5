# Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) in a LLaMA: query heads share keys and values, so that
# generation keeps and reads a fraction of the cache.

arch_preset = "gqa"

queries_per_kv_head = 2  # half the cache; n_head of them would be multi-query attention (Shazeer 2019)

normalization = "rmsnorm"  # from here on LLaMA's, so that the sharing is the only difference
norm_position = "pre"
position_encoding = "rope"
ffn_type = "swiglu"
activation = "silu"
bias = False
weight_tying = False
dropout = 0.0
