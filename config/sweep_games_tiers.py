# Two known tiers, 1.1M and 5.4M parameters, predict the next event of a game and who wins it (docs/games.md).
#
#   python sweep.py config/sweep_games_tiers.py
#   python compare_architectures.py --runs_dir runs/games_tiers --sort wp_loss
#
# The shapes are equal in size to 4% (docs/matching.md): the order within a tier means something, a narrow one may not.

variants = {
    "transformer": "config/arch_gpt2.py",
    "linear_attention": "config/arch_linear_attention.py",
    "mamba": "config/arch_mamba.py --block_pattern=mamba --ffn_type=standard",  # with a 4x FFN, as the others have
}
sizes = {
    "1.1M": {
        "transformer": "--n_layer=4 --n_head=4 --n_embd=128",
        "linear_attention": "--n_layer=4 --n_head=4 --n_embd=128",
        "mamba": "--n_layer=6 --n_embd=112",
    },
    "5.4M": {
        "transformer": "--n_layer=6 --n_head=4 --n_embd=256",
        "linear_attention": "--n_layer=6 --n_head=4 --n_embd=256",
        "mamba": "--n_layer=7 --n_embd=224",
    },
}
seeds = 3
learning_rates = (5e-4, 1e-3, 2e-3, 4e-3)  # each tries the same ones at a quarter of the length

dataset = "games"
variant = "full"
objective = "lm_plus_win"
lambda_wp = 1.0
block_size = 2560  # a game has about 720 tokens, the longest of these fewer than 2,560
batch_size = 16
max_tokens = 200_000_000  # processed, padding included: about 78,000 games, 56 million tokens supervised
warmup_iters = 100
eval_interval = 500
eval_iters = 160  # 1,024 of the 2,000 games that validate
