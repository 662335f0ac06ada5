# FineWeb-Edu in GPT-2's tokens, ten billion by default. Put it after a size file.

dataset = "fineweb_edu"

eval_interval = 1000
eval_iters = 150  # 2.5M tokens of validation
weight_decay = 0.1
