# Tiny Shakespeare by character, at nanoGPT's setting for a CPU. Put it after an arch file.

dataset = "shakespeare_char"

model_size = "1M"  # 4 blocks of 128
block_size = 64
batch_size = 12
max_iters = 2000

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
eval_iters = 0  # all 111k characters of the validation split
