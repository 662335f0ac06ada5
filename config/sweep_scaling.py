# Four sizes of three architectures for L(N) and L(C): compare_architectures.py fits a power law to each when there are
# three sizes or more. About 20 tokens per parameter at the largest (Hoffmann et al. 2022).
#
#   python sweep.py config/sweep_scaling.py
#   python compare_architectures.py --runs_dir runs/scaling

variants = {
    "gpt2": "config/arch_gpt2.py",
    "llama": "config/arch_llama.py",
    "mamba2": "config/arch_mamba2.py",
}
sizes = {  # each variant is solved to the size, so that a point of each stands above the same N
    "0.5M": "--match=params --match_to=0.5M",
    "1M": "--match=params --match_to=1M",
    "2M": "--match=params --match_to=2M",
    "4M": "--match=params --match_to=4M",
}
seeds = 3
learning_rates = (1e-3, 2e-3, 4e-3)

dataset = "python_stdlib"
block_size = 256
batch_size = 16
max_tokens = 16_000_000
warmup_iters = 100
eval_interval = 200
