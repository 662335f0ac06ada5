# About five million: 6 blocks of 256. An hour on a laptop.

model_size = "5M"
