# Dense, Mamba-2, a mixture of experts and a Mamba + local attention hybrid, each with as many active parameters as
# LLaMA at 10M: what one token passes through is equal, what is kept in memory is not.
#
#   python sweep.py config/sweep_dense_mamba_moe_hybrid.py --seeds=3

variants = {
    "dense": "config/arch_llama.py",
    "mamba": "config/arch_mamba2.py",
    "moe": "config/arch_moe.py",
    "hybrid": "config/arch_mamba_hybrid.py",
}
sizes = {"10M": "--match=active_params --match_to=llama@10M"}
seeds = 3
learning_rates = (3e-4, 6e-4, 1.2e-3, 2.4e-3)

dataset = "tinystories"
variant = "small"
tokenizer = "bpe"
tokenizer_vocab_size = 4096
block_size = 512
batch_size = 16
max_tokens = 200_000_000
warmup_iters = 200
eval_interval = 500
