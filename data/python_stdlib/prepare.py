"""The source of the Python standard library that runs this, as bytes: the default dataset, nothing to download.

    python data/python_stdlib/prepare.py
    python data/python_stdlib/prepare.py --tokenizer=bpe --tokenizer_vocab_size=4096

Every .py file but tests and installed packages, in sorted order; one file in sixteen, chosen by its name, validates.
Each version of Python is another text: compare runs only on one fingerprint, which the comparison checks.

    CPython 3.11: train 11.4 million tokens of 688 files, val 0.67 million tokens of 45 files
    License: PSF-2.0, of CPython
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("python_stdlib", __doc__)
