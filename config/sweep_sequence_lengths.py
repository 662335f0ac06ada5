# What context is worth, and what it costs: 512, 1,024 and 4,096 tokens at equal tokens per step. Loss per token falls
# with context for all; a Transformer's FLOPs per token rise, those of a recurrent mixer do not.
#
#   python sweep.py config/sweep_sequence_lengths.py

variants = {
    "transformer": "config/arch_llama.py",
    "local": "config/arch_llama.py --sliding_window=256",
    "mamba2": "config/arch_mamba2.py",
    "gated_delta_net": "config/arch_gated_delta_net.py",
}
_equal = "--match=params --match_to=llama@5M"  # 6 x 256 for LLaMA
sizes = {
    "T512": f"--block_size=512 --batch_size=32 {_equal}",
    "T1024": f"--block_size=1024 --batch_size=16 {_equal}",
    "T4096": f"--block_size=4096 --batch_size=4 {_equal}",  # 16,384 tokens per step each
}
seeds = 3
learning_rates = (5e-4, 1e-3, 2e-3)

dataset = "python_stdlib"
max_tokens = 16_000_000  # one pass over the text
warmup_iters = 50
eval_interval = 100
