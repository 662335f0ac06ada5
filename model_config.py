"""`ModelArchitectureConfig`: what the network is. Presets, sizes, validation, names, JSON. Standard library only.

config = ModelArchitectureConfig.from_preset('llama', model_size='124M', n_kv_head=4)
config.architecture_name()          # '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'
config.save('llama.json'); ModelArchitectureConfig.load('llama.json') == config
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from registry import ALL_REGISTRIES, options_from_json, options_of, registered_options
from user_errors import UserError, did_you_mean

# A preset fixes the nine options, the mixer and causal, and may bring other settings and options of parts along. A
# later preset replaces an earlier one entirely: what only the earlier one brought goes back to its default.
_GPT2 = dict(
    block_pattern="attention",
    normalization="layernorm", activation="gelu", position_encoding="learned_absolute", attention_backend="sdpa",
    norm_position="pre", ffn_type="standard", bias=True, weight_tying=True, dropout=0.0,
    causal=True,
)  # fmt: skip
_LLAMA = dict(
    block_pattern="attention",
    normalization="rmsnorm", activation="silu", position_encoding="rope", attention_backend="sdpa",
    norm_position="pre", ffn_type="swiglu", bias=False, weight_tying=False, dropout=0.0,
    causal=True,
)  # fmt: skip
_BERT = {
    **_GPT2, "causal": False, "norm_position": "post", "embedding_norm": True, "head_transform": True, "dropout": 0.1,
    "norm_eps": 1e-12,
}  # fmt: skip
# No FFN: the mixer has the gate. LLaMA's are there for a block_pattern that wants some.
_MAMBA = {**_LLAMA, "block_pattern": "mamba/none", "position_encoding": "none", "weight_tying": True}
PRESETS = {
    "custom": {},
    "gpt2": _GPT2,  # Radford et al. 2019: pre-norm, and so is this
    "gpt2_postnorm": {**_GPT2, "norm_position": "post"},  # what some comparison tables call GPT-2
    "llama": _LLAMA,  # Touvron et al. 2023
    "team": _LLAMA,  # another name of the same
    "hybrid": {**_GPT2, "position_encoding": "rope"},  # RoPE + LayerNorm + GELU + pre-norm
    "gqa": {**_LLAMA, "queries_per_kv_head": 2},  # Ainslie et al. 2023
    "mistral": {**_LLAMA, "queries_per_kv_head": 4, "sliding_window": 4096},  # Jiang et al. 2023
    "qwen3": {
        **_LLAMA,
        "queries_per_kv_head": 2,
        "qk_norm": True,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "weight_tying": True,
    },  # Yang et al. 2025, the sizes below 8B
    "olmo2": {
        **_LLAMA,
        "norm_position": "output",
        "qk_norm": True,
        "qk_norm_scope": "projection",
        "rope_theta": 5e5,
        "norm_eps": 1e-6,
    },  # OLMo team 2024
    "moe": {**_LLAMA, "ffn_type": "moe"},  # Jiang et al. 2024, Mixtral: 8 experts, 2 for each token
    "residual_scaling": {**_LLAMA, "residual_scaling": "depth"},  # Yang et al. 2023: branches shrink with depth
    "bert": _BERT,  # Devlin et al. 2018: an encoder, for objective=masked_lm
    # -- linear attention and its kin
    "linear_attention": {**_GPT2, "block_pattern": "linear_attention"},  # Katharopoulos et al. 2020, in a GPT-2
    "retention": {**_LLAMA, "block_pattern": "retention", "ffn_multiplier": 4 / 3},  # Sun et al. 2023: xPos
    "gla": {**_LLAMA, "block_pattern": "gla", "position_encoding": "none"},  # Yang et al. 2023
    "delta_net": {**_LLAMA, "block_pattern": "delta_net", "position_encoding": "none"},  # Yang et al. 2024
    "gated_delta_net": {**_LLAMA, "block_pattern": "gated_delta_net", "position_encoding": "none"},  # Yang et al. 2025
    "rwkv7": {
        **_GPT2,
        "block_pattern": "rwkv7",
        "ffn_type": "rwkv7",
        "activation": "relu2",
        "embedding_norm": True,
        "position_encoding": "none",
        "bias": False,
        "weight_tying": False,
    },  # Peng et al. 2025
    # -- state space models: the order of tokens is in the recurrence, so there is no encoding
    "mamba": _MAMBA,  # Gu & Dao 2023
    "mamba2": {**_MAMBA, "block_pattern": "mamba2/none"},  # Dao & Gu 2024
    # -- mixtures of Mamba and attention
    "mamba_hybrid": {**_LLAMA, "block_pattern": "mamba,local_attention", "weight_tying": True},  # Ren et al. 2024
    "mamba_hybrid_parallel": {
        **_LLAMA,
        "block_pattern": "mamba2+local_attention",
        "weight_tying": True,
    },  # Dong et al. 2024, Zuo et al. 2025: both in one block
    "jamba": {
        **_LLAMA,
        "block_pattern": "mamba,mamba/moe,mamba,mamba/moe,attention,mamba/moe,mamba,mamba/moe",
        "n_layer": 8,
        "n_experts": 16,
        "queries_per_kv_head": 4,
        "position_encoding": "none",
    },  # Lieber et al. 2024
    # -- recurrent networks
    "lstm": {**_MAMBA, "block_pattern": "lstm/none"},  # Hochreiter & Schmidhuber 1997, stacked with residuals
    "gru": {**_MAMBA, "block_pattern": "gru/none"},  # Cho et al. 2014
    "rnn": {**_MAMBA, "block_pattern": "rnn/none"},  # Elman 1990
}

# Named by what they are with a GELU block of 12 n_embd^2 weights, and from 124M on with GPT-2's 50,257 tokens.
SIZES = {
    "1M": dict(n_layer=4, n_head=4, n_embd=128),
    "5M": dict(n_layer=6, n_head=4, n_embd=256),
    "10M": dict(n_layer=6, n_head=6, n_embd=384),  # nanoGPT's Shakespeare model
    "124M": dict(n_layer=12, n_head=12, n_embd=768),  # GPT-2 small
    "350M": dict(n_layer=24, n_head=16, n_embd=1024),  # GPT-2 medium
    "1B": dict(n_layer=18, n_head=16, n_embd=2048),  # 18 x 50.3M, and 103M of embedding
}

GPT2_VOCAB_SIZE = 50257  # where no dataset says otherwise
IGNORE_INDEX = -100  # a target that is not supervised, such as padding's


@dataclass(frozen=True)
class ModelArchitectureConfig:
    # -- what to start from
    arch_preset: str = "custom"  # gpt2, llama, mamba2, ... (config/arch_*.py), or custom: the values as they stand
    model_size: str | None = None  # 1M, 5M, 10M, 124M, 350M, 1B: sets n_layer, n_head and n_embd

    # -- shape
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads (of the queries; n_kv_head may be fewer)
    n_embd: int = 128  # width of the residual stream
    block_size: int = 256  # context in tokens
    vocab_size: int | None = None  # None takes the dataset's; GPT-2's 50257 where there is no dataset

    # -- the nine options
    normalization: str = "layernorm_nobias"  # layernorm, layernorm_nobias, rmsnorm
    activation: str = "gelu"  # gelu, gelu_tanh, silu, relu, leaky_relu, relu2; used by ffn_type=standard
    position_encoding: str = "learned_absolute"  # learned_absolute, rope, alibi, none
    attention_backend: str = "sdpa"  # sdpa, flex, or manual: the equation written out
    norm_position: str = "pre"  # of each branch: pre, post (after the sum), output (before it), sandwich (pre + output)
    ffn_type: str = "standard"  # standard, swiglu, geglu, moe
    bias: bool = False  # biases in the linear layers
    weight_tying: bool = True  # the output head shares the token embedding
    dropout: float = 0.0  # on the embedding, attention weights and both branches

    # -- blocks
    block_pattern: str = "attention"  # mixers tiled over the depth: 'a,b/none', FFN after the slash; 'a+b' adds two
    parallel_blocks: bool = False  # mixer and FFN read the same norm and are added together (PaLM)
    residual_scaling: str = "none"  # none, depth: branches / sqrt(how many), learned: a gain per channel (LayerScale)
    causal: bool = True  # a token sees only the tokens before it
    embedding_norm: bool = False  # a norm after the embeddings (BERT, BLOOM)
    head_transform: bool = False  # BERT's head: dense, activation and norm before it, and a bias on its output

    # -- numbers
    norm_eps: float = 1e-5  # added to the variance
    init_std: float = 0.02  # of weights; what writes to the residual stream gets / sqrt(branches) (GPT-2)
    logit_soft_cap: float = 0.0  # cap * tanh(logits / cap), as in Gemma 2; 0 is off

    # what parts declare for themselves
    part_options: dict = field(default_factory=dict)  # options set away from their defaults

    def __post_init__(self):
        validate(self)

    @classmethod
    def from_preset(cls, name, **changes):
        """A preset by name with `changes` on top; part options (n_kv_head=2) are given like any other setting."""
        return cls(arch_preset=name, **changes)

    def replace(self, **changes):
        """A copy with `changes`; a new preset or size brings its values along."""
        changes = expand_preset(changes)
        brought = brought_only_by(self.arch_preset, changes)
        options = {name: value for name, value in self.part_options.items() if name not in brought}
        defaults = {name: FIELDS[name].default for name in brought if name in FIELDS}
        options.update(changes.pop("part_options", {}))
        return dataclasses.replace(self, part_options=options, **{**defaults, **changes})

    def options_for(self, part):
        """Namespace of `part`'s own options: its defaults, under what the user set."""
        options = options_of(part)
        return SimpleNamespace(**{name: self.part_options.get(name, o.default) for name, o in options.items()})

    def pattern(self):
        """[(mixer name, FFN name or 'none')] of block_pattern, once; mixers side by side are 'a+b'."""
        entries = [entry.strip().partition("/") for entry in self.block_pattern.split(",")]
        return [(mixer.replace(" ", ""), ffn or self.ffn_type) for mixer, _, ffn in entries]

    def blocks(self):
        """[(mixer name, FFN name or 'none')] for each layer: block_pattern tiled over n_layer."""
        pattern = self.pattern()
        return [pattern[layer % len(pattern)] for layer in range(self.n_layer)]

    def n_branches(self):
        """How often something is added to the residual stream: two for a block with an FFN, one without."""
        return sum(1 if ffn == "none" else 2 for _, ffn in self.blocks())

    def mixers(self):
        """The names of all mixers in the model, each once, those that stand side by side singly."""
        return list(dict.fromkeys(name for mixers, _ in self.blocks() for name in mixers.split("+")))

    def architecture_name(self):
        """Such as '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'."""
        ffns = list(dict.fromkeys(ffn for _, ffn in self.blocks()))
        words = [f"{self.n_layer}L"]
        if any("attention" in mixer for mixer in self.mixers()):
            words.append(f"{self.n_head}H")
        words.append(f"{self.n_embd}D")
        if self.mixers() != ["attention"]:
            words.append("+".join(_LABELS.get(mixer, mixer) for mixer in self.mixers()))
        words += [_LABELS.get(self.position_encoding, self.position_encoding)]
        words += [_LABELS.get(self.normalization, self.normalization)]
        words += ["+".join(map(self._ffn_label, ffns))]
        words += [_LABELS.get(self.norm_position, self.norm_position)]
        words += [] if self.causal else ["Bidirectional"]
        return "-".join(words)

    def _ffn_label(self, name):
        """'NoFFN', the activation of a standard FFN, or what the part says of itself, such as 'MoE8x2'."""
        part = ALL_REGISTRIES.get("ffn_type", {}).get(name)
        if hasattr(part, "label"):
            return part.label(self)
        name = self.activation if name == "standard" else name
        return "NoFFN" if name == "none" else _LABELS.get(name, name)

    def summary(self):
        """The settings as lines 'name = value', for people."""
        values = {**self.to_dict(), **self.part_options}
        values.pop("part_options")
        return "\n".join(f"{name} = {value}" for name, value in values.items())

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The config that `to_dict` wrote.

        Raises:
            UserError: a key that no version of this config has had.
        """
        return cls(**{**values, "part_options": options_from_json(values.get("part_options", {}))})

    def save(self, path):
        """Write JSON; an existing file is refused rather than overwritten."""
        path = Path(path)
        if path.exists():
            raise UserError(f"{path} exists; choose another name or move it away")
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a model config: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} cannot be read as a model config: it holds no JSON object")
        try:
            return cls.from_dict(values)
        except (TypeError, AttributeError) as error:  # a value of another type
            raise UserError(f"{path} cannot be read as a model config: {error}") from None


_LABELS = {
    "learned_absolute": "Learned", "rope": "RoPE", "alibi": "ALiBi", "none": "NoPos",
    "layernorm": "LN", "layernorm_nobias": "LNnb", "rmsnorm": "RMS",
    "gelu": "GELU", "gelu_tanh": "GELUtanh", "silu": "SiLU",
    "relu": "ReLU", "leaky_relu": "LeakyReLU", "relu2": "ReLU2",
    "swiglu": "SwiGLU", "geglu": "GEGLU",
    "mamba": "Mamba", "mamba2": "Mamba2", "lstm": "LSTM", "gru": "GRU", "rnn": "RNN",
    "attention": "Attn", "local_attention": "Local",
    "pre": "PreNorm", "post": "PostNorm", "output": "OutputNorm", "sandwich": "SandwichNorm",
}  # fmt: skip


def expand_preset(values):
    """`values` with what their arch_preset and model_size stand for laid beneath them.

    Raises:
        UserError: an unknown preset or size.
    """
    preset, size = values.get("arch_preset"), values.get("model_size")
    if preset is not None and preset not in PRESETS:
        raise UserError(
            f"arch_preset={preset!r} does not exist{did_you_mean(preset, PRESETS)} (known: {', '.join(PRESETS)})"
        )
    if size is not None and size not in SIZES:
        raise UserError(f"model_size={size!r} does not exist{did_you_mean(size, SIZES)} (known: {', '.join(SIZES)})")
    return {**PRESETS.get(preset, {}), **SIZES.get(size, {}), **values}


def brought_only_by(preset, assigned):
    """Names that `preset` set and that go back to their default when `assigned` chooses another preset."""
    if assigned.get("arch_preset", "custom") in ("custom", preset):
        return set()
    return {*PRESETS.get(preset, ())} - {*assigned}


FIELDS = {field_.name: field_ for field_ in dataclasses.fields(ModelArchitectureConfig)}
_dataclass_init = ModelArchitectureConfig.__init__


def _init(self, **values):
    """Presets and sizes mean what they say however a config is made, and part options are given by name."""
    given, values = values, expand_preset(values)
    options = dict(values.pop("part_options", {}))
    for name in [name for name in values if name not in FIELDS]:
        known = {name for name, declared in registered_options().items() if declared[0].of == "model"}
        if name in given and name not in known:
            raise UserError(f"'{name}' is not a setting of the model{did_you_mean(name, [*FIELDS, *known])}")
        value = values.pop(name)
        if name in given or "part_options" not in given:  # part_options are all that there are
            options[name] = value
    _dataclass_init(self, **values, part_options=options)


ModelArchitectureConfig.__init__ = _init


def validate(config):
    """Refuse what no model can be; names are checked once registries are filled (by model_builder)."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must lie in [0, 1)")
    for name in ("norm_eps", "init_std"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name}={getattr(config, name)} must be above 0")
    if config.logit_soft_cap < 0:
        raise UserError(f"logit_soft_cap={config.logit_soft_cap} must be above 0, or 0 for none")
    _check_choice("norm_position", config.norm_position, ("pre", "post", "output", "sandwich"))
    _check_choice("residual_scaling", config.residual_scaling, ("none", "depth", "learned"))
    if config.parallel_blocks and config.norm_position in ("post", "output"):
        position = config.norm_position
        raise UserError(
            f"parallel_blocks=True needs one norm before both branches; norm_position='{position}' has none there"
        )
    for setting in ("normalization", "activation", "position_encoding", "attention_backend"):
        _check_registered(setting, getattr(config, setting))
    for mixers, ffn in config.pattern():
        for mixer in mixers.split("+"):
            _check_registered("mixer", mixer, "block_pattern")
        if ffn != "none":
            _check_registered("ffn_type", ffn)


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise UserError(f"{name}={value!r} does not exist{did_you_mean(value, allowed)} (known: {', '.join(allowed)})")


def _check_registered(registry_name, value, setting=None):
    registry = ALL_REGISTRIES.get(registry_name)
    if registry and value not in registry:
        known = ", ".join(sorted(registry))
        raise UserError(
            f"{setting or registry_name}={value!r} does not exist{did_you_mean(value, registry)} (known: {known})"
        )
