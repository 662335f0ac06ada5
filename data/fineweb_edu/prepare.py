"""FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557): web pages that a classifier found educational.

    python data/fineweb_edu/prepare.py                              # sample-10BT: 20 GB of tokens, hours
    python data/fineweb_edu/prepare.py --variant=sample-100BT
    python data/fineweb_edu/prepare.py --input=shards/              # .parquet files that you have

Streamed by `datasets` (pip install datasets): only the tokens stay on disk, in files of --shard_tokens (100 million).
Interrupted by Ctrl-C, a kill or a lost network, the same command goes on behind the last whole file.

    sample-10BT: about 9.7 million pages, 10 billion GPT-2 tokens; about one page in 2,000, chosen by its text,
    validates: about 5 million tokens
    Source: huggingface.co/datasets/HuggingFaceFW/fineweb-edu.  License: ODC-By 1.0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("fineweb_edu", __doc__)
