# GPT-2's parts with the norms where the first Transformer had them (Vaswani et al. 2017): after each addition.
# Some comparison tables call this GPT-2. It needs a lower learning rate or a longer warm-up than pre-norm does.

arch_preset = "gpt2_postnorm"

norm_position = "post"  # norm(x + f(x)); each block ends in a norm, so there is none at the end
