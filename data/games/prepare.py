"""Games of two teams, simulated, each with its outcome and the true chance of it after every event.

    python data/games/prepare.py                               # 4,000 games train, 400 validate
    python data/games/prepare.py --variant=full                # 60,000 and 2,000
    python data/games/prepare.py --input=mine.jsonl            # your own: {"tokens": [1, 17, 4], "outcome": 1} a line
    python data/games/prepare.py --input=mine.jsonl --tokenizer_vocab_size=200

A record is a game, one token an event. `training_games.py` has the rules; row and label of one game:

    start gold:4-takes gold:3-takes blue:2-runs ... blue:3-takes gold:2-brings gold-wins-by-economic        outcome 1

    small: 4,000 games train, 400 validate; 69 tokens, about 720 a game
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training_prepare import prepare_from_command_line

if __name__ == "__main__":
    prepare_from_command_line("games", __doc__)
