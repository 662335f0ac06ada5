# GPT-2 medium: 24 blocks of 1024, 355M parameters with GPT-2's vocabulary and a tied head.

model_size = "350M"
block_size = 1024

batch_size = 8
gradient_accumulation_steps = 480 // batch_size  # 0.49M tokens per step
max_iters = 20_000
learning_rate = 3e-4  # GPT-3's for this size (Brown et al. 2020, table 2.1)
min_lr = 3e-5
warmup_iters = 700
beta2 = 0.95
