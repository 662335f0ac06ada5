# TinyStories (Eldan & Li 2023): stories that a model of a few million parameters learns to tell.

dataset = "tinystories"
variant = "small"  # the first 50,000 stories; full has 2.1 million

block_size = 256
eval_iters = 10  # 164k tokens of validation
