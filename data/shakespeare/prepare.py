"""Tiny Shakespeare in GPT-2 tokens, as in nanoGPT: the first 90% train, the rest validates.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=tinyshakespeare.txt        # a copy that you have

tiktoken fetches GPT-2's two files once; offline, set TIKTOKEN_CACHE_DIR to a folder that holds them.

    1,115,394 characters: train 301,966 tokens, val 36,059 tokens
    Source: github.com/karpathy/char-rnn, checksummed.  The plays are in the public domain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("shakespeare", __doc__)
