"""ModelArchitectureConfig: presets and sizes, names, refusals, JSON."""

import dataclasses
import json
import re

import pytest

from model_config import PRESETS, SIZES, ModelArchitectureConfig, expand_preset
from registry import Registry
from user_errors import UserError

NINE = ["normalization", "activation", "position_encoding", "attention_backend", "norm_position", "ffn_type", "bias",
        "weight_tying", "dropout"]  # fmt: skip

# ---- presets and sizes ----------------------------------------------------------------------------------------------

PRESET_VALUES = {  # in the order of NINE
    "gpt2": ("layernorm", "gelu", "learned_absolute", "sdpa", "pre", "standard", True, True, 0.0),
    "gpt2_postnorm": ("layernorm", "gelu", "learned_absolute", "sdpa", "post", "standard", True, True, 0.0),
    "llama": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "team": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "hybrid": ("layernorm", "gelu", "rope", "sdpa", "pre", "standard", True, True, 0.0),
    "linear_attention": ("layernorm", "gelu", "learned_absolute", "sdpa", "pre", "standard", True, True, 0.0),
    "retention": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "gla": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, False, 0.0),
    "delta_net": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, False, 0.0),
    "gated_delta_net": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, False, 0.0),
    "rwkv7": ("layernorm", "relu2", "none", "sdpa", "pre", "rwkv7", False, False, 0.0),
    "mamba": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, True, 0.0),
    "mamba2": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, True, 0.0),
    "lstm": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, True, 0.0),
    "gru": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, True, 0.0),
    "bert": ("layernorm", "gelu", "learned_absolute", "sdpa", "post", "standard", True, True, 0.1),
    "gqa": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "mistral": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "qwen3": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, True, 0.0),
    "olmo2": ("rmsnorm", "silu", "rope", "sdpa", "output", "swiglu", False, False, 0.0),
    "moe": ("rmsnorm", "silu", "rope", "sdpa", "pre", "moe", False, False, 0.0),
    "residual_scaling": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, False, 0.0),
    "jamba": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, False, 0.0),
    "mamba_hybrid": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, True, 0.0),
    "mamba_hybrid_parallel": ("rmsnorm", "silu", "rope", "sdpa", "pre", "swiglu", False, True, 0.0),
    "rnn": ("rmsnorm", "silu", "none", "sdpa", "pre", "swiglu", False, True, 0.0),
}


def test_presets_are_these():
    assert {*PRESETS} == {*PRESET_VALUES, "custom"}
    assert PRESETS["custom"] == {}


@pytest.mark.parametrize("preset", PRESET_VALUES)
def test_a_preset_fixes_all_nine_options_and_the_mixer(preset):
    config = ModelArchitectureConfig.from_preset(preset)
    assert {*PRESETS[preset]} >= {*NINE, "block_pattern", "causal"}
    assert config.causal == (preset != "bert")
    assert tuple(getattr(config, name) for name in NINE) == PRESET_VALUES[preset]
    assert config.arch_preset == preset


def test_a_preset_brings_options_of_parts_and_they_leave_with_it():
    import model_builder  # noqa: F401  fills the registries, so that options are known by name

    mistral = ModelArchitectureConfig.from_preset("mistral", n_head=8)
    assert mistral.part_options == {"queries_per_kv_head": 4, "sliding_window": 4096}
    assert mistral.replace(n_layer=2).part_options == mistral.part_options
    assert mistral.replace(arch_preset="qwen3", n_kv_head=2).part_options == {
        "queries_per_kv_head": 2, "qk_norm": True, "rope_theta": 1e6, "n_kv_head": 2,
    }  # fmt: skip
    olmo2 = mistral.replace(arch_preset="olmo2")
    assert (olmo2.norm_eps, olmo2.replace(arch_preset="llama").norm_eps) == (1e-6, 1e-5)
    assert olmo2.replace(arch_preset="llama").part_options == {}
    assert olmo2.replace(arch_preset="custom").part_options == olmo2.part_options  # the values as they stand
    off = ModelArchitectureConfig.from_preset("mistral", sliding_window=0)
    assert off.part_options["sliding_window"] == 0
    assert ModelArchitectureConfig.from_dict(off.to_dict()) == off
    without = {**mistral.to_dict(), "part_options": {}}
    assert ModelArchitectureConfig.from_dict(without).part_options == {}  # a saved config is complete


def test_nothing_of_an_encoder_stays_when_another_preset_replaces_it():
    bert = ModelArchitectureConfig.from_preset("bert")
    assert (bert.causal, bert.embedding_norm, bert.head_transform, bert.norm_eps) == (False, True, True, 1e-12)
    for preset in PRESET_VALUES:
        assert bert.replace(arch_preset=preset) == ModelArchitectureConfig.from_preset(preset)


def test_what_is_given_beside_a_preset_wins():
    config = ModelArchitectureConfig(arch_preset="llama", bias=True, n_layer=7)
    assert (config.bias, config.n_layer, config.ffn_type) == (True, 7, "swiglu")


@pytest.mark.parametrize("size, shape", {
    "1M": (4, 4, 128), "5M": (6, 4, 256), "10M": (6, 6, 384),
    "124M": (12, 12, 768), "350M": (24, 16, 1024), "1B": (18, 16, 2048),
}.items())  # fmt: skip
def test_sizes(size, shape):
    config = ModelArchitectureConfig.from_preset("gpt2", model_size=size)
    assert (config.n_layer, config.n_head, config.n_embd) == shape
    assert {*SIZES} == {"1M", "5M", "10M", "124M", "350M", "1B"}


def test_replacing_the_preset_or_size_brings_its_values_and_keeps_the_rest():
    config = ModelArchitectureConfig.from_preset("llama", model_size="1M", block_size=64, n_kv_head=2)
    changed = config.replace(arch_preset="gpt2", model_size="5M", dropout=0.1)
    assert (changed.normalization, changed.bias, changed.n_layer, changed.dropout) == ("layernorm", True, 6, 0.1)
    assert (changed.block_size, changed.part_options) == (64, {"n_kv_head": 2})
    assert changed.replace(n_kv_head=1).part_options == {"n_kv_head": 1}
    assert (config.normalization, config.part_options) == ("rmsnorm", {"n_kv_head": 2})


def test_expand_preset_lays_values_on_top():
    assert expand_preset({"n_head": 2}) == {"n_head": 2}
    one_million = {"model_size": "1M", "n_layer": 4, "n_head": 2, "n_embd": 128}
    assert expand_preset({"model_size": "1M", "n_head": 2}) == one_million


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelArchitectureConfig().n_layer = 3


# ---- part options ---------------------------------------------------------------------------------------------------


def test_part_options_are_given_like_any_other_setting():
    config = ModelArchitectureConfig(n_kv_head=2, rope_theta=5e5)
    assert config.part_options == {"n_kv_head": 2, "rope_theta": 5e5}


def test_options_for_a_part_are_its_defaults_under_what_was_set():
    class Part:
        class Options:
            n_kv_head: int | None = None
            taps: int = 4

    assert vars(ModelArchitectureConfig(n_kv_head=2).options_for(Part)) == {"n_kv_head": 2, "taps": 4}


def test_an_option_of_an_optimizer_is_none_of_the_model():
    with pytest.raises(UserError, match="'muon_momentum' is not a setting of the model"):
        ModelArchitectureConfig(muon_momentum=0.9)


# ---- what no model can be -------------------------------------------------------------------------------------------

REFUSED = [
    ("n_layer", 0, "must be at least 1"),
    ("n_head", 0, "must be at least 1"),
    ("n_embd", -8, "must be at least 1"),
    ("block_size", 0, "must be at least 1"),
    ("vocab_size", 0, "must be at least 1"),
    ("dropout", 1.0, r"must lie in \[0, 1\)"),
    ("dropout", -0.1, r"must lie in \[0, 1\)"),
    ("norm_eps", 0.0, "must be above 0"),
    ("norm_eps", float("nan"), "must be above 0"),
    ("init_std", -0.02, "must be above 0"),
    ("logit_soft_cap", -1.0, "must be above 0, or 0 for none"),
    ("arch_preset", "lama", "does not exist; did you mean 'llama'"),
    ("model_size", "125M", "does not exist; did you mean '124M'"),
    ("normalization", "rmsnrm", "does not exist; did you mean 'rmsnorm'"),
    ("activation", "gel", "does not exist; did you mean 'gelu'"),
    ("position_encoding", "rop", "does not exist; did you mean 'rope'"),
    ("attention_backend", "manul", "does not exist; did you mean 'manual'"),
    ("norm_position", "sandwch", "does not exist; did you mean 'sandwich'"),
    ("ffn_type", "swiglo", "does not exist; did you mean 'swiglu'"),
    ("residual_scaling", "dept", "does not exist; did you mean 'depth'"),
    ("block_pattern", "attentoin", "does not exist; did you mean 'attention'"),
    ("block_pattern", "attention,,attention", "does not exist"),
]


@pytest.mark.parametrize("name, value, sentence", REFUSED, ids=[f"{name}={value}" for name, value, _ in REFUSED])
def test_values_that_no_model_can_have_are_refused(name, value, sentence):
    with pytest.raises(UserError, match=rf"^{name}=.*{sentence}"):
        ModelArchitectureConfig(**{name: value})


def test_an_ffn_named_in_the_pattern_is_checked_too():
    with pytest.raises(UserError, match="ffn_type='swiglo' does not exist; did you mean 'swiglu'"):
        ModelArchitectureConfig(block_pattern="attention/swiglo")


def test_parallel_post_norm_names_both():
    with pytest.raises(UserError, match=r"parallel_blocks=True.*norm_position='post'"):
        ModelArchitectureConfig(parallel_blocks=True, norm_position="post")


def test_an_unknown_name_stops_with_the_nearest():
    with pytest.raises(UserError, match="'n_layr' is not a setting of the model; did you mean 'n_layer'"):
        ModelArchitectureConfig(n_layr=3)
    with pytest.raises(UserError, match="did you mean 'sliding_window'"):
        ModelArchitectureConfig(slidng_window=3)


# ---- the pattern and the name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, blocks", [
    ("attention", [("attention", "standard")] * 5),
    ("attention/none", [("attention", "none")] * 5),
    ("attention, attention/swiglu ,attention/none",
     [("attention", ffn) for ffn in ("standard", "swiglu", "none", "standard", "swiglu")]),
])  # fmt: skip
def test_the_pattern_is_tiled_over_the_depth(pattern, blocks):
    assert ModelArchitectureConfig(n_layer=5, block_pattern=pattern).blocks() == blocks


@pytest.mark.parametrize("changes, name", [
    ({"arch_preset": "llama", "model_size": "124M"}, "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"),
    ({"arch_preset": "gpt2", "model_size": "124M"}, "12L-12H-768D-Learned-LN-GELU-PreNorm"),
    ({"arch_preset": "gpt2_postnorm"}, "4L-4H-128D-Learned-LN-GELU-PostNorm"),
    ({"arch_preset": "hybrid"}, "4L-4H-128D-RoPE-LN-GELU-PreNorm"),
    ({"arch_preset": "bert"}, "4L-4H-128D-Learned-LN-GELU-PostNorm-Bidirectional"),
    ({}, "4L-4H-128D-Learned-LNnb-GELU-PreNorm"),
    ({"activation": "relu2", "position_encoding": "alibi"}, "4L-4H-128D-ALiBi-LNnb-ReLU2-PreNorm"),
    ({"norm_position": "sandwich", "normalization": "rmsnorm"}, "4L-4H-128D-Learned-RMS-GELU-SandwichNorm"),
    ({"position_encoding": "none", "ffn_type": "geglu"}, "4L-4H-128D-NoPos-LNnb-GEGLU-PreNorm"),
    ({"arch_preset": "mamba_hybrid"}, "4L-4H-128D-Mamba+Local-RoPE-RMS-SwiGLU-PreNorm"),
    ({"arch_preset": "olmo2"}, "4L-4H-128D-RoPE-RMS-SwiGLU-OutputNorm"),
    ({"block_pattern": "attention/swiglu,attention"}, "4L-4H-128D-Learned-LNnb-SwiGLU+GELU-PreNorm"),
])  # fmt: skip
def test_architecture_name(changes, name):
    assert ModelArchitectureConfig(**changes).architecture_name() == name


def test_the_name_tells_registered_parts_apart(tiny):
    # A mixer of its own is named, and heads are not claimed where there are none.
    from mixer_attention import MIXER_REGISTRY, Mixer

    MIXER_REGISTRY["shift"] = type("Shift", (Mixer,), {})
    assert tiny(block_pattern="shift").architecture_name() == "2L-16D-shift-Learned-LNnb-GELU-PreNorm"
    assert tiny(block_pattern="shift,attention").architecture_name().startswith("2L-4H-16D-shift+Attn-")


def test_summary_lists_every_setting():
    lines = ModelArchitectureConfig.from_preset("llama", n_kv_head=2).summary().splitlines()
    names = [line.split(" = ")[0] for line in lines]
    assert {*names} == {f.name for f in dataclasses.fields(ModelArchitectureConfig)} - {"part_options"} | {"n_kv_head"}
    assert "ffn_type = swiglu" in lines and "n_kv_head = 2" in lines


# ---- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(tmp_path, preset):
    config = ModelArchitectureConfig.from_preset(preset, n_layer=3, n_kv_head=2, norm_eps=1e-6, bias=True)
    config.save(tmp_path / "a.json")
    assert ModelArchitectureConfig.load(tmp_path / "a.json") == config
    assert json.loads((tmp_path / "a.json").read_text())["n_layer"] == 3


def test_a_tuple_survives_json(tmp_path):
    hats = Registry("hat")

    @hats("bowler")
    class Bowler:
        class Options:
            sizes: tuple = (1, 2)

    config = ModelArchitectureConfig(sizes=(3, 4))
    config.save(tmp_path / "a.json")
    assert ModelArchitectureConfig.load(tmp_path / "a.json") == config


def test_saving_overwrites_nothing(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("precious")
    with pytest.raises(UserError, match=re.escape(str(path))):
        ModelArchitectureConfig().save(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("text", ["{", "[1]", "", '"llama"', '{"n_layer": "4"}', '{"part_options": 3}'])
def test_a_damaged_file_is_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json cannot be read as a model config"):
        ModelArchitectureConfig.load(tmp_path / "a.json")


def test_a_missing_file_and_a_foreign_key_are_sentences(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        ModelArchitectureConfig.load(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="'n_layers' is not a setting of the model; did you mean 'n_layer'"):
        ModelArchitectureConfig.from_dict({"n_layers": 3})
