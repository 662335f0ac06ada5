# FineWeb-Edu in GPT-2's tokens, ten billion by default. Put it after a size file.

dataset = "fineweb_edu"

eval_interval = 1000
eval_iters = 5  # 2.5M tokens of validation at 480 sequences of 1024 a step
weight_decay = 0.1
