# Ten million, nanoGPT's Shakespeare model: 6 blocks of 384. It overfits a megabyte of text in a few thousand steps.

model_size = "10M"

learning_rate = 1e-3  # small models bear high rates
min_lr = 1e-4
beta2 = 0.99  # few tokens per step make the second moment noisy
