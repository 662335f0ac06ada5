# The tiny tier at 5.4M parameters and more text: hours on a laptop, minutes on a GPU.
#
#   python sweep.py config/sweep_small_tier.py

variants = {
    "transformer": "config/arch_gpt2.py",
    "linear_attention": "config/arch_linear_attention.py",
    "mamba": "config/arch_mamba.py --block_pattern=mamba --ffn_type=standard",  # with a 4x FFN, as the others have
}
sizes = {"5.4M": "--match=params --match_to=5.4M"}  # 6 x 256 for the first two, and as many parameters for Mamba
seeds = 3
learning_rates = (3e-4, 6e-4, 1.2e-3, 2.4e-3)  # each tries the same ones at a quarter of the length

dataset = "tinystories"
variant = "small"
tokenizer = "bpe"
tokenizer_vocab_size = 2048
block_size = 512
batch_size = 16
max_tokens = 100_000_000
warmup_iters = 200
eval_interval = 500
