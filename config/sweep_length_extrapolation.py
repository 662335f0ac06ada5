# What is left of a model beyond the context that it was trained at, by position encoding:
#
#   python sweep.py config/sweep_length_extrapolation.py
#   python evaluate.py --runs_dir runs/length_extrapolation --loss      # 1x, 2x, 4x, 8x block_size; by position
#
# Learned positions end at block_size; evaluate.py reads them at 1x and says so.

variants = {
    "learned_absolute": "config/arch_llama.py --position_encoding=learned_absolute",
    "rope": "config/arch_llama.py",
    "alibi": "config/arch_llama.py --position_encoding=alibi",
    "none": "config/arch_llama.py --position_encoding=none",
    "window": "config/arch_llama.py --sliding_window=32",
    "gated_delta_net": "config/arch_gated_delta_net.py",
}
seeds = 3

dataset = "python_stdlib"
n_layer, n_head, n_embd = 4, 4, 128
block_size = 128
batch_size = 32
max_iters = 1000  # 4.1M tokens
learning_rate = 1e-3
warmup_iters = 50
eval_interval = 250
