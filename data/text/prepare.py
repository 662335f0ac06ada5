"""Your own text: a .txt, .jsonl (field "text") or .parquet (column "text") file, or a folder of them.

    python data/text/prepare.py --input=mybook.txt                                    # bytes, into data/text-mybook
    python data/text/prepare.py --input=pages.jsonl --tokenizer=bpe --tokenizer_vocab_size=8192
    python train.py --dataset=text --input=mybook.txt                                 # prepares, then trains

A split of more than --shard_tokens (100 million) tokens lies in several files; interrupted, the same command goes on
behind the last whole one. From 100 documents on, every tenth validates; below that, the last tenth of the text does.

Token files that another program made (nanoGPT's train.bin and val.bin) need only be described:

    python data/text/prepare.py --describe=data/mine --tokenizer=gpt2                 # then train.py --dataset=mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("text", __doc__)
