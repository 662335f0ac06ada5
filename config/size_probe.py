# Two blocks of 64, one head: the width and depth at which probes tell architectures apart. Minutes on a laptop.

n_layer, n_head, n_embd = 2, 1, 64
block_size = 64
batch_size = 64
max_iters = 10_000

learning_rate = 1e-3
warmup_iters = 100
weight_decay = 0.1
eval_interval = 250  # a run ends at the evaluation that finds it solved
eval_iters = 2  # 32,768 tokens: 512 examples of 64
checkpoint_interval = 0
sample_tokens = 0
