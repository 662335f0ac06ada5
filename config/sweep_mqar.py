# Recall as pairs grow, at width 64 and length 64: attention looks back, delta rules correct what they hold, a plain sum
# of outer products and an LSTM have one state of a fixed size for everything (Arora et al. 2023, arXiv:2312.04927).
#
#   python sweep.py config/sweep_mqar.py
#   python compare_architectures.py --runs_dir runs/mqar
#
# A ranking for each number of pairs; docs/probes.md has the table. A run ends when 99% of the answers are right.

variants = {
    "attention": "config/arch_llama.py",
    "linear_attention": "config/arch_linear_attention.py",
    "lstm": "config/arch_lstm.py",
    "delta_net": "config/arch_delta_net.py",
    "gated_delta_net": "config/arch_gated_delta_net.py",
}
sizes = {"4pairs": "--n_pairs=4", "8pairs": "--n_pairs=8", "16pairs": "--n_pairs=16"}
seeds = 3

dataset = "mqar"
n_questions = 32  # of a window's 64 tokens; asking each key once, as the paper does, takes longer (docs/decisions.md)
n_layer, n_head, n_embd = 2, 1, 64
block_size = 64
batch_size = 32  # 2,048 tokens per step
max_iters = 1500  # 3.1M tokens, which attention needs half of at 4 and 8 pairs; more at 16 (docs/probes.md)
learning_rate = 1e-3  # for all; --learning_rates=5e-4,1e-3,2e-3 tries three for each
warmup_iters = 100
eval_interval = 100
eval_iters = 1  # 256 windows, 8,192 answers
checkpoint_interval = 0
sample_tokens = 0
