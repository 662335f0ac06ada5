# Four sizes of three architectures for L(N) and L(C): compare_architectures.py fits a power law to each when there are
# three sizes or more.
#
#   python sweep.py config/sweep_scaling.py
#   python compare_architectures.py --runs_dir runs/scaling

variants = {
    "gpt2": "config/arch_gpt2.py",
    "llama": "config/arch_llama.py",
    "mamba2": "config/arch_mamba2.py",
}


def _at(n_layer, n_embd):
    """Depth grows with width as in published families; a block of Mamba-2 has two thirds of a LLaMA block's weights."""
    attention = f"--n_layer={n_layer} --n_embd={n_embd} --n_head={n_embd // 32}"
    return {"gpt2": attention, "llama": attention, "mamba2": f"--n_layer={3 * n_layer // 2} --n_embd={n_embd}"}


sizes = {"0.13M": _at(2, 64), "0.5M": _at(4, 96), "0.9M": _at(4, 128), "2M": _at(6, 160)}
seeds = 3
learning_rates = (1e-3, 2e-3, 4e-3)

dataset = "python_stdlib"
block_size = 256
batch_size = 16
max_tokens = 16_000_000  # one pass over the text: 8 tokens per parameter at the largest size, 120 at the smallest
warmup_iters = 100
eval_interval = 200
