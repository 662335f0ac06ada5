# Another name of LLaMA's parts; see arch_llama.py for why each value is as it is.

arch_preset = "team"
