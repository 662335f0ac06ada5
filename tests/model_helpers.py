"""Models whose weights are large and random, so that nothing hides behind a small initialisation."""

import torch

from mixer_attention import ATTENTION_BACKEND_REGISTRY, Attention
from model_components import Norm
from model_config import ModelArchitectureConfig
from user_errors import UserError


def scrambled(module, std=0.4):
    """The module with every parameter drawn anew, gains around 1."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            is_gain = leaf == "weight" and isinstance(module.get_submodule(owner), Norm)
            parameter.normal_(mean=float(is_gain), std=std)
    return module


def backends_that_train_on_cpu():
    return [name for name in ATTENTION_BACKEND_REGISTRY if _trains_on_cpu(name)]


def _trains_on_cpu(backend):
    try:
        Attention(ModelArchitectureConfig(attention_backend=backend), 0).check_device(torch.device("cpu"))
    except UserError:
        return False
    return True
