# BERT (Devlin et al. 2018, arXiv:1810.04805), at whatever size stands beside it: an encoder that sees both sides of a
# token, trained to fill gaps. It is scored by pseudo-perplexity, and its loss is never ranked beside that of models
# that predict the next token. Sections are the paper's.

arch_preset = "bert"
objective = "masked_lm"  # 15% of the tokens, of which 80% are masked, 10% random and 10% as they were (section 3.1)

causal = False  # every token sees every other
normalization = "layernorm"  # with gain and bias
norm_position = "post"  # after each branch, as in the Transformer that it is built on (section 3)
embedding_norm = True  # the sum of the embeddings is normalised, as the released code does
position_encoding = "learned_absolute"  # a vector per position (figure 2); every token is of segment A
ffn_type = "standard"  # 4 n_embd wide
activation = "gelu"  # rather than relu (appendix A.2)
bias = True  # in every linear layer
head_transform = True  # dense, gelu, norm, then the head with a bias: the released code's
weight_tying = True  # the head is the token embedding
dropout = 0.1  # on all layers (appendix A.2), for 40 passes over the data; one pass wants 0.0
norm_eps = 1e-12  # the released code's
