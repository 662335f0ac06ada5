"""TinyStories (Eldan & Li 2023, https://arxiv.org/abs/2305.07759): simple stories that small models can learn to tell.

    python data/tinystories/prepare.py                                  # 50,000 stories, 4,096 tokens learned here
    python data/tinystories/prepare.py --variant=full --tokenizer=gpt2
    python data/tinystories/prepare.py --input=TinyStories-train.txt    # stories with <|endoftext|> between them

Streamed by `datasets` (pip install datasets).

    small: the first 50,000 stories train, 5,000 validate; about 45 MB and 4 MB of text
    full:  2,119,719 stories train, 21,990 validate; about 1.9 GB and 19 MB of text
    Source: huggingface.co/datasets/roneneldan/TinyStories.  License: CDLA-Sharing-1.0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("tinystories", __doc__)
