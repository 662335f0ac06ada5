"""Tiny Shakespeare by characters, as in nanoGPT: the first 90% train, the rest validates.

python data/shakespeare_char/prepare.py
python data/shakespeare_char/prepare.py --input=tinyshakespeare.txt        # a copy that you have

1,115,394 characters of 65 kinds: train 1,003,854 tokens, val 111,540 tokens
Source: github.com/karpathy/char-rnn, checksummed.  The plays are in the public domain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("shakespeare_char", __doc__)
