# GPT-2 small: 12 blocks of 768, 124M parameters with GPT-2's vocabulary and a tied head.

model_size = "124M"
block_size = 1024

batch_size = 12
gradient_accumulation_steps = 480 // batch_size  # 40 micro-batches x 12 x 1024 tokens = 0.49M tokens per step
max_iters = 20_000  # 9.8B tokens
learning_rate = 6e-4  # GPT-3's for this size (Brown et al. 2020, table 2.1)
min_lr = 6e-5
warmup_iters = 700
beta2 = 0.95
