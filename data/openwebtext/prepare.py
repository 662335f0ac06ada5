"""OpenWebText: the open copy of the web pages that GPT-2 was trained on.

    python data/openwebtext/prepare.py                          # 40 GB of text become 18 GB of tokens: hours
    python data/openwebtext/prepare.py --input=pages/           # .jsonl or .parquet with a field "text", or .txt

Streamed by `datasets` (pip install datasets): only the tokens stay on disk, in files of --shard_tokens (100 million).
Interrupted by Ctrl-C, a kill or a lost network, the same command goes on behind the last whole file.

    8,013,769 pages, about 9.0 billion GPT-2 tokens; about one page in 2,000, chosen by its text, validates: about
    4,000 pages, 4.4 million tokens
    Source: huggingface.co/datasets/Skylion007/openwebtext.  License: CC0-1.0 for the packaging
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("openwebtext", __doc__)
