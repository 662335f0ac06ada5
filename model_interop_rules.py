"""What a table of `model_interop_classes.py` is made of: rules for settings, rows for weights, and their frame HFClass.

    Same("hidden_size", "n_embd")                           a setting under another name
    Row(("q_proj", "k_proj", "v_proj"), "mixer.qkv", JOINED)   three matrices of theirs that are one here

`resolved` makes two configs comparable, which decides whether a class can hold a model: its settings are written to the
class's configuration and read back, and what comes back different is what the class has no place for.
"""

import math
from dataclasses import dataclass, field

import torch

from model_builder import ConfigurableGPT, on_meta
from model_checks import chosen_parts
from model_config import FIELDS
from registry import Registry, registered_options
from user_errors import UserError

HF_CLASS_REGISTRY = Registry("hf_class")

# Keys of every configuration that change no logit: names, tokens, what a call returns.
COMMON_KEYS = (
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "transformers_version", "use_cache",
)  # fmt: skip

# Settings that change no logit of a given set of weights: how it is computed, trained, or was first filled.
SAME_FUNCTION = (
    "arch_preset", "model_size", "dropout", "attention_backend", "init_std", "recurrence", "chunk_size", "dt_min",
    "dt_max", "dt_init_floor", "dt_init", "dt_scale", "a_init_min", "a_init_max",
    "load_balance_loss", "router_z_loss", "capacity_factor",
)  # fmt: skip


def refuse(key, value, remedy):
    """Stop at a feature of theirs that has no place here."""
    raise UserError(f"{key}={value!r} of the imported config is not supported: {remedy}")


# ---- settings: one rule per key of theirs ----------------------------------------------------------------------------
#
# `read(values)` gives our settings for their values; `write(own)` their values for `resolved` settings of ours.


@dataclass(frozen=True)
class Same:
    """A setting under another name; several keys of theirs must agree, because it is one setting here."""

    theirs: tuple | str
    ours: str

    @property
    def keys(self):
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def read(self, values):
        first = values[self.keys[0]]
        for key in self.keys[1:]:
            if values[key] != first:
                refuse(key, values[key], f"{self.keys[0]}={first!r} differs, and both are {self.ours} here")
        return {self.ours: first}

    def write(self, own):
        return dict.fromkeys(self.keys, own[self.ours])


@dataclass(frozen=True)
class Choice:
    """A name that is spelt differently: `spelling` maps theirs to ours; on the way out the first that fits is taken."""

    theirs: str
    ours: str
    spelling: dict

    @property
    def keys(self):
        return (self.theirs,)

    def read(self, values):
        if values[self.theirs] not in self.spelling:
            refuse(self.theirs, values[self.theirs], f"use one of {', '.join(map(str, self.spelling))}")
        return {self.ours: self.spelling[values[self.theirs]]}

    def write(self, own):
        spelt = [theirs for theirs, ours in self.spelling.items() if ours == own[self.ours]]
        return {self.theirs: (spelt or list(self.spelling))[0]}  # what does not fit differs when it is read back


@dataclass(frozen=True)
class Must:
    """A feature that nanoArch has in one way only; where theirs does not say, it is that one."""

    theirs: str
    value: object

    @property
    def keys(self):
        return (self.theirs,)

    def read(self, values):
        theirs = values.get(self.theirs, self.value)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if theirs != self.value:
            refuse(self.theirs, values[self.theirs], f"it must be {self.value!r}")
        return {}

    def write(self, own):
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Both:
    """Keys that need a function each way."""

    keys: tuple
    read: object
    write: object


ROPE_KEYS = {  # by rope_type: the keys that each has, with what they must be where nanoArch has no setting
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "original_max_position_embeddings": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
ROPE_SETTINGS = {"factor": "rope_scaling_factor", "original_max_position_embeddings": "rope_original_context"}


def read_rope(values):
    rope = dict(values["rope_parameters"])
    kind = rope.pop("rope_type", "default")
    if kind not in ROPE_KEYS:
        refuse("rope_type", kind, f"use one of {', '.join(ROPE_KEYS)}")
    settings = {"rope_theta": float(rope.pop("rope_theta")), "rope_scaling": "none" if kind == "default" else kind}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        part = values["rope_parameters"]["partial_rotary_factor"]
        refuse("partial_rotary_factor", part, "position_encoding='rope' turns whole heads")
    for key, value in rope.items():
        if value is None:
            continue
        if key not in ROPE_KEYS[kind] or ROPE_KEYS[kind][key] not in (None, value):
            refuse(
                f"rope_parameters[{key!r}]", value, f"rope_type={kind!r} has {ROPE_KEYS[kind] or 'no such key'} here"
            )
        if key in ROPE_SETTINGS:
            settings[ROPE_SETTINGS[key]] = value if key.startswith("original") else float(value)
    return settings


def write_rope(own):
    kind = own["rope_scaling"]
    kind = kind if kind in ROPE_KEYS else "default"
    extra = {key: own[ROPE_SETTINGS[key]] if must is None else must for key, must in ROPE_KEYS[kind].items()}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": own["rope_theta"], **extra}}


def rope():
    return Both(("rope_parameters",), read_rope, write_rope)


def window():
    return Both(
        ("sliding_window",),
        lambda values: {"sliding_window": values["sliding_window"] or 0},
        lambda own: {"sliding_window": own["sliding_window"] or None},
    )


def read_layered_window(values):
    kinds = set(values["layer_types"])
    if len(kinds) > 1:
        refuse("layer_types", values["layer_types"], "sliding_window is one setting for all layers")
    is_sliding = values["use_sliding_window"] and kinds == {"sliding_attention"}
    return {"sliding_window": values["sliding_window"] if is_sliding else 0}


def write_layered_window(own):
    size = own["sliding_window"] or None
    kind = "full_attention" if size is None else "sliding_attention"
    return {
        "use_sliding_window": size is not None, "sliding_window": size,
        "max_window_layers": 0 if size else own["n_layer"], "layer_types": [kind] * own["n_layer"],
    }  # fmt: skip


def layered_window():
    keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return Both(keys, read_layered_window, write_layered_window)


def blocks_of(own):
    """[(mixer, FFN)] of `resolved` settings."""
    return [tuple(block.split("/")) for block in own["block_pattern"].split(",")]


def spelt_ffn(key, spelling):
    """The activation inside a gated FFN, which is the FFN's own name here."""
    choice = Choice(key, "ffn_type", spelling)
    return Both((key,), choice.read, lambda own: choice.write({"ffn_type": blocks_of(own)[0][1]}))


def layer_types(key, mixers):
    """A name per layer; `mixers` maps theirs to ours."""

    def read(values):
        for kind in values[key]:
            if kind not in mixers:
                refuse(key, values[key], f"a layer is one of {', '.join(mixers)}")
        return {"block_pattern": ",".join(mixers[kind] for kind in values[key])}

    def write(own):
        kinds = {ours: theirs for theirs, ours in mixers.items()}
        return {key: [kinds[mixer] for mixer, _ in blocks_of(own)]}

    return Both((key,), read, write)


def optional_rope(key):
    """RoPE where `key` says "rope", and no position encoding where it is None."""

    def read(values):
        if values[key] not in (None, "rope"):
            refuse(key, values[key], "it must be None or 'rope'")
        return (
            {"position_encoding": "none"} if values[key] is None else {"position_encoding": "rope", **read_rope(values)}
        )

    def write(own):
        if own["position_encoding"] == "none":
            return {key: None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # nothing reads it
        return {key: "rope", **write_rope(own)}

    return Both((key, "rope_parameters"), read, write)


def attention_scale(key, width, n_heads):
    """What scores are multiplied by, where it is a setting: 1 / sqrt(head width)."""

    def read(values):
        wanted = (values[width] / values[n_heads]) ** -0.5
        if not math.isclose(values[key], wanted, rel_tol=1e-6):
            refuse(key, values[key], f"scores are divided by the root of the head width, which is {wanted}")
        return {}

    return Both((key,), read, lambda own: {key: (own["n_embd"] / own["n_head"]) ** -0.5})


def whole_expand(key):
    """The inner width over n_embd, a whole number there; another is rounded, which shows when it is read back."""
    return Both((key,), lambda values: {"expand": float(values[key])}, lambda own: {key: max(1, int(own["expand"]))})


def product(key, *factors):
    """A key of theirs that must be the product of others, and is computed from those when it is left out."""

    def read(values):
        wanted = math.prod(values[factor] for factor in factors)
        if values.get(key, wanted) != wanted:
            refuse(key, values[key], f"{' x '.join(factors)} is {wanted}")
        return {}

    return Both((key,), read, lambda own: {})


def heads(key, width, expand):
    """How many heads of `width` fill the inner width; here that follows."""

    def read(values):
        wanted = values[expand] * values["hidden_size"]
        if values[key] * values[width] != wanted:
            refuse(key, values[key], f"times {width}={values[width]} it must be {expand} x hidden_size = {wanted}")
        return {}

    return Both((key,), read, lambda own: {key: _whole(max(1, int(own["expand"])) * own["n_embd"] / own["headdim"])})


def _whole(number):
    return int(number) if number == int(number) else number


# ---- weights: one row per parameter or module ------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """How tensors of theirs become ours and back; `like` is what is to be filled, and has the shapes."""

    to_ours: object  # (theirs: list, like: list) -> list
    to_theirs: object  # (ours: list, like: list) -> list


def _join(tensors, like):
    return [torch.cat(tensors)]


def _split(tensors, like):
    return tensors[0].split([tensor.size(0) for tensor in like])


def _transpose(tensors, like):
    return [tensor.t() for tensor in tensors]  # which leaves a bias as it is


def _keep(tensors, like):
    return tensors


SAME = Transform(_keep, _keep)
TRANSPOSED = Transform(_transpose, _transpose)
JOINED = Transform(_join, _split)  # several of theirs are one of ours, row below row
SPLIT = Transform(_split, _join)  # and the other way round
CROPPED = Transform(lambda theirs, like: [theirs[0][: like[0].size(0)]], _keep)  # positions of a shorter context


@dataclass(frozen=True)
class Row:
    """`theirs` are `ours`: names of parameters, or of modules whose weight and bias are meant."""

    theirs: tuple
    ours: tuple
    transform: Transform = SAME

    def renamed(self, theirs, ours):
        """The row with each name put into a format such as 'blocks.0.{}'."""
        return Row(tuple(map(theirs.format, self.theirs)), tuple(map(ours.format, self.ours)), self.transform)


def rows(*table):
    """Rows from (theirs, ours[, transform]) tuples, where a lone name may stand for a tuple of one."""
    return [Row(_names(theirs), _names(ours), *rest) for theirs, ours, *rest in table]


def _names(names):
    return (names,) if isinstance(names, str) else names


# ---- a class ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFClass:
    """What is registered under the name of a transformers class."""

    config: str | None  # name of the configuration class in transformers
    always: dict  # settings of ours that the class stands for, whatever its configuration says
    rules: list  # for the keys of its configuration
    weights: list  # rows of the model
    layers: str  # where its blocks are: 'model.layers'
    block_weights: dict  # {'block' or the name of a mixer or FFN: rows}
    ignored: tuple = ()  # keys of theirs that change no logit
    needs: tuple = ()  # parts without which its configuration cannot be written
    unread: tuple = ()  # settings of ours that its parts never read
    stands_for: dict = field(default_factory=dict)  # {setting: {value of ours: the value it is held as}}; see `held`

    def settings(self, values, known=None):
        """Keyword arguments of ModelArchitectureConfig for the values of a Hugging Face configuration.

        Args:
            values: what its `to_dict` gives.
            known: the defaults of the installed configuration class; a key that it has and this entry does not must be
                at its default.

        Raises:
            UserError: a feature that nanoArch does not have, naming it and its value.
        """
        settings = dict(self.always)
        for rule in self.rules:
            settings.update(rule.read(values))
        for key in sorted(set(known or ()) - self.keys()):
            if values.get(key) != known[key]:
                refuse(key, values.get(key), "nanoArch does not know this setting")
        return settings

    def values(self, own):
        """Keyword arguments of the Hugging Face configuration for `resolved` settings."""
        defaults = {name: declared[0].default for name, declared in registered_options().items()}
        own, values = {**defaults, **own, **self.held(own)}, {}
        for rule in self.rules:
            values.update(rule.write(own))
        return values

    def held(self, own):
        """{setting: value} that differ from ours but compute the same with biases of zero."""
        spelling = {name: table.get(own.get(name)) for name, table in self.stands_for.items()}
        return {name: value for name, value in spelling.items() if value is not None}

    def keys(self):
        """Every key of theirs that this entry knows."""
        return {*self.read_keys(), *self.ignored, *COMMON_KEYS}

    def read_keys(self):
        """The keys that decide something here."""
        return {key for rule in self.rules for key in rule.keys}

    def rows(self, config):
        """Every Row of a model of this ModelArchitectureConfig, of single parameters."""
        found = list(self.weights)
        for i, (mixer, ffn) in enumerate(config.blocks()):
            for part in ("block", mixer, ffn):
                inside = (f"{self.layers}.{i}.{{}}", f"blocks.{i}.{{}}")
                found += [row.renamed(*inside) for row in self.block_weights.get(part, ())]
        return [row.renamed(f"{{}}{leaf}", f"{{}}{leaf}") for row in found for leaf in ("", ".weight", ".bias")]

    def can_hold_parts(self, config):
        """Whether every mixer and FFN of a config is in the table, and those that it needs are in the config."""
        parts = {part for block in config.blocks() for part in block}
        return {*self.needs} <= parts <= self.block_weights.keys()


# ---- our settings, comparable ----------------------------------------------------------------------------------------

IN_PARTS = {  # {setting that may be None or a ratio: (slot, attribute) that says what it came to}
    "n_kv_head": ("mixer", "n_kv_head"), "head_dim": ("mixer", "head_dim"), "dt_rank": ("mixer", "dt_rank"),
    "headdim": ("mixer", "headdim"), "ffn_hidden": ("ffn", "hidden"),
}  # fmt: skip
SAID_OTHERWISE = (
    "part_options", "ffn_type", "ffn_multiplier", "ffn_multiple_of", "queries_per_kv_head",
    "expert_hidden",
)  # fmt: skip
IDLE = {  # {option: (setting, its values that leave the option without effect)}
    "qk_norm_scope": ("qk_norm", (False,)),
    "rope_scaling_factor": ("rope_scaling", ("none",)),
    "rope_original_context": ("rope_scaling", ("none", "linear", "ntk")),
}


def resolved(config):
    """{setting: value} that decide the function of a config, with None and ratios replaced by what they come to.

    block_pattern is every block's mixer and FFN, such as 'mamba2/none,attention/swiglu'; options that no chosen part
    reads are left out.
    """
    with on_meta():
        model = ConfigurableGPT(config)
    own = {name: getattr(config, name) for name in FIELDS}
    for part in chosen_parts(config):
        own.update(vars(config.options_for(part)))
    for name, (slot, attribute) in IN_PARTS.items():
        found = {getattr(getattr(block, slot), attribute, None) for block in model.blocks} - {None}
        if found:
            own[name] = found.pop()
    own["vocab_size"], own["block_pattern"] = model.head.out_features, ",".join(map("/".join, config.blocks()))
    idle = {name for name, (setting, values) in IDLE.items() if own.get(setting) in values}
    return {name: value for name, value in own.items() if name not in (*SAID_OTHERWISE, *idle)}


def differences(own, other, aside=()):
    """[(setting, value, other value)] of two `resolved` dicts, but for settings that change no logit and `aside`.

    An option that only one of them reads is left out: they differ in the part that reads it.
    """
    names = [name for name in own if name in other and name not in (*SAME_FUNCTION, *aside)]
    return [(name, own[name], other[name]) for name in names if own[name] != other[name]]
