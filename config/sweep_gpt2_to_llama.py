# From GPT-2 to LLaMA, one part at a time: what each change is worth by itself, at equal data and almost equal FLOPs.
#
#   python sweep.py config/sweep_gpt2_to_llama.py

variants = {
    "gpt2": "config/arch_gpt2.py",
    "no_bias": "config/arch_gpt2.py --bias=False --normalization=layernorm_nobias",
    "rmsnorm": "config/arch_gpt2.py --bias=False --normalization=rmsnorm",
    "rope": "config/arch_gpt2.py --bias=False --normalization=rmsnorm --position_encoding=rope",
    "swiglu": "config/arch_gpt2.py --bias=False --normalization=rmsnorm --position_encoding=rope --ffn_type=swiglu",
    "llama": "config/arch_llama.py",  # and a head of its own
}
sizes = {"5M": "--model_size=5M"}
seeds = 3
learning_rates = (5e-4, 1e-3, 2e-3, 4e-3)

dataset = "python_stdlib"
block_size = 256
batch_size = 16
max_iters = 4000  # 16.4M tokens
warmup_iters = 100
eval_interval = 250
