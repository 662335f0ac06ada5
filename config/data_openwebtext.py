# OpenWebText in GPT-2's tokens: 9B of them, 17 GB on disk. Put it after a size file.

dataset = "openwebtext"

eval_interval = 1000
eval_iters = 150  # 2.5M tokens of validation
log_interval = 10
weight_decay = 0.1
