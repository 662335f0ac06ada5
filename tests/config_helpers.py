"""Config files to write, and options of every type."""

import textwrap
from pathlib import Path

import pytest

from registry import Registry

ROOT = Path(__file__).resolve().parents[1]

PART = """
    import torch
    import torch.nn as nn
    from model_components import FFN_REGISTRY, FFN

    @FFN_REGISTRY("two_powers")
    class TwoPowers(FFN):
        class Options(FFN.Options):
            power: int = 2  # of the hidden units

        def __init__(self, config, layer_index):
            super().__init__(config, layer_index)
            self.power = config.options_for(type(self)).power
            self.up = nn.Linear(config.n_embd, self.hidden, bias=False)
            self.down = nn.Linear(self.hidden, config.n_embd, bias=False)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)) ** self.power)

    ffn_type = "two_powers"
    power = 3
"""
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=8", "--block_size=8", "--vocab_size=11"]


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path as one types it."""

    def file(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return file


@pytest.fixture
def options():
    """Options of every type, declared by a registered part."""
    registry = Registry("hat")

    @registry("bowler")
    class Bowler:
        class Options:
            sizes: tuple = (1, 2)
            brim: float = 1.5
            band: str | None = "red"
            count: int | None = None
            lined: bool = False
