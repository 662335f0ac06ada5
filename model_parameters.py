"""What is to happen to each parameter of a model: one table before wrapping, and the first weights that follow from it.

    for spec in parameter_plan(model): spec.name, spec.group, spec.init, spec.weight_decay
    initialise(model, seed)

Initialisation and the optimizer read the table and nothing else: no suffix of a name decides anything. What a part says
of its own parameters stands on its class (`model_components.py`).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from model_components import Norm, ResidualScale
from user_errors import UserError


class DeclarationError(UserError, TypeError):
    """A part, perhaps of the user's own, says too little or something untrue about its parameters."""


@dataclass(frozen=True)
class ParameterSpec:
    """What is to happen to one parameter; initialisation and the optimizer read nothing else."""

    name: str  # in model.named_parameters()
    shape: tuple
    group: str  # token embedding, position embedding, mixer, ffn, norm, head transform, head or heads: for the ledger
    init: str  # normal, residual, zeros, ones, or own: the part does it
    weight_decay: bool
    is_matrix: bool  # a linear weight inside a block: what Muon takes (stacked ones go to AdamW)


def parameter_plan(model):
    """[ParameterSpec] for every parameter of `model`, from its structure and the declarations on its classes.

    Call it before wrapping: names are those of the bare model.

    Raises:
        DeclarationError: a parameter that no rule covers, so that nothing is ever initialised by accident.
    """
    declared = _declarations(model)
    plan = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        init = _init_rule(owner, leaf, name, declared)
        is_vector = parameter.dim() < 2 or name in declared["no_weight_decay"]
        is_matrix = isinstance(owner, nn.Linear) and leaf == "weight" and "blocks" in path.split(".")
        plan.append(
            ParameterSpec(name, tuple(parameter.shape), _group(model, path, owner), init, not is_vector, is_matrix)
        )
    return plan


def _declarations(model):
    """{kind of declaration: full parameter names that some module declares}."""
    declared = {"no_weight_decay": set(), "own_init": set(), "residual_out": set(), "linear_weights": set()}
    for path, module in model.named_modules():
        for kind, names in declared.items():
            for name in getattr(module, kind, ()):
                _require_parameter(module, name, kind)
                names.add(f"{path}.{name}" if path else name)
    return declared


def _require_parameter(module, name, kind):
    """Refuse a misspelt declaration, which would otherwise do nothing, silently."""
    target = module
    for word in name.split("."):
        if not hasattr(target, word):
            raise DeclarationError(f"{type(module).__name__}.{kind} names '{name}', which it does not have")
        target = getattr(target, word)


def _init_rule(owner, leaf, name, declared):
    if name in declared["own_init"]:
        return "own"
    if name in declared["residual_out"]:
        return "residual"
    if isinstance(owner, Norm):
        return "ones" if leaf == "weight" else "zeros"
    if isinstance(owner, nn.Linear):
        return "normal" if leaf == "weight" else "zeros"
    if isinstance(owner, nn.Embedding) or name in declared["linear_weights"]:
        return "normal"
    raise DeclarationError(f"{type(owner).__name__}.{leaf} ({name}) has no initialisation: declare it in `own_init`")


def _group(model, path, owner):
    """Which line of the ledger a parameter belongs to."""
    if isinstance(owner, (Norm, ResidualScale)):
        return "norm"
    words = path.split(".")
    if words[0] == "blocks":
        return words[2]  # blocks.3.mixer.qkv
    return words[0].replace("_", " ")


def initialise(model, seed):
    """Tie the head and fill every parameter as the plan says. Tensors on the meta device are left alone."""
    if model.config.weight_tying:  # here, because `to_empty` makes two tensors of a shared one
        model.head.weight = model.token_embedding.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in parameter_plan(model):
            parameter = parameters[spec.name]
            if parameter.is_meta or spec.init == "own":
                continue
            parameter.copy_(initial_value(spec, model.config, seed))
        tensors = {**parameters, **dict(model.named_buffers())}
        for path, module in model.named_modules():
            own = [tensors.get(f"{path}.{name}" if path else name) for name in getattr(module, "own_init", ())]
            if any(tensor is not None and not tensor.is_meta for tensor in own):
                module.init_own_parameters(seeded(seed, path))


def initial_value(spec, config, seed):
    """The first value of a parameter that no part fills itself, whole and on the CPU, where its generator is."""
    value = torch.empty(spec.shape, device="cpu")
    if spec.init in ("zeros", "ones"):
        return value.fill_(float(spec.init == "ones"))
    std = config.init_std / (math.sqrt(config.n_branches()) if spec.init == "residual" else 1.0)
    return value.normal_(0.0, std, generator=seeded(seed, spec.name))


def seeded(seed, name):
    """A CPU generator that is a pure function of (seed, name), so that no weight depends on the order of building."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
