"""What every test may rely on: the repository on sys.path, one thread, no network, no trace of the test before."""

import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"  # no GPU: Triton's kernels run on the CPU, if it is set before torch comes

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import model_builder  # noqa: E402, F401  (importing these fills the registries)
import training_objectives  # noqa: E402, F401
import training_optim  # noqa: E402, F401
from kernels import compiled  # noqa: E402
from model_config import ModelArchitectureConfig  # noqa: E402
from registry import ALL_REGISTRIES  # noqa: E402

torch.set_num_threads(1)  # at these sizes a second thread costs more than it gives


@pytest.fixture(autouse=True)
def clean_state():
    """Seeds before each test; afterwards registries, default dtype and threads are as they were."""
    names, parts = dict(ALL_REGISTRIES), [(registry, dict(registry)) for registry in ALL_REGISTRIES.values()]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    ALL_REGISTRIES.clear()
    ALL_REGISTRIES.update(names)
    for registry, before in parts:
        registry.clear()
        registry.update(before)  # dict.update: past the refusal of duplicates
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def transformers():
    """The oracle that some parts are held to; requirements-dev.txt brings it."""
    return pytest.importorskip("transformers")


@pytest.fixture
def tiny():
    """Make a config of 2 blocks of 16 with 29 tokens, `changes` on top: milliseconds a model."""

    def make(**changes):
        size = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 16, "vocab_size": 29}
        return ModelArchitectureConfig(**{**size, **changes})

    return make


@pytest.fixture
def nothing_compiled():
    """No kernel in C is there yet, nor one from this test after it."""
    compiled._found.cache_clear()
    yield
    compiled._found.cache_clear()
