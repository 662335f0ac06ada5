# About a million parameters with a small vocabulary: 4 blocks of 128. Minutes on a laptop.

model_size = "1M"
