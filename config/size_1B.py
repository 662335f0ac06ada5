# 18 blocks of 2048: 1.01B parameters with GPT-2's vocabulary and a tied head.

model_size = "1B"
block_size = 2048

batch_size = 4
gradient_accumulation_steps = 256 // batch_size  # 64 micro-batches x 4 x 2048 tokens = 0.52M tokens per step
max_iters = 40_000  # 21B tokens, 20 per parameter (Hoffmann et al. 2022)
learning_rate = 2e-4  # GPT-3's for this size (Brown et al. 2020, table 2.1)
min_lr = 2e-5
warmup_iters = 1000
beta2 = 0.95
