# A first comparison in minutes on a laptop: a Transformer, linear attention and Mamba at 1.1M parameters each.
#
#   python sweep.py config/sweep_tiny_tier.py
#   python compare_architectures.py --runs_dir runs/tiny_tier

variants = {
    "transformer": "config/arch_gpt2.py",
    "linear_attention": "config/arch_linear_attention.py",
    "mamba": "config/arch_mamba.py --block_pattern=mamba --ffn_type=standard",  # with a 4x FFN, as the others have
}
sizes = {"1.1M": "--match=params --match_to=1.1M"}  # three shapes with as many parameters, within 1%
seeds = 3
learning_rates = (5e-4, 1e-3, 2e-3, 4e-3)  # each tries the same ones at a quarter of the length

dataset = "python_stdlib"
block_size = 256
batch_size = 12
max_iters = 1000  # 3.1M tokens
warmup_iters = 50
eval_interval = 100
