"""Settings from files and the command line: order, types, parts defined in a file, help."""

# ruff: noqa: F401, F811 - options and write are fixtures

import dataclasses
import re
import sys

import pytest
import torch

from config_helpers import PART, ROOT, TINY, options, write
from configurator import current_values, help_text, read_settings, setting_types, with_vocabulary
from model_builder import ConfigurableGPT
from model_checks import unused_options
from model_components import FFN_REGISTRY
from model_config import ModelArchitectureConfig
from registry import Registry, registered_options
from training_config import TrainConfig
from user_errors import UserError

CONFIG_FILES = sorted(path for path in (ROOT / "config").glob("*.py") if not path.stem.startswith("sweep_"))


def value_of(*arguments):
    """What `arguments` set, the last one's value."""
    return list(read_settings(arguments).given.values())[-1]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    settings = read_settings([])
    assert settings.model == ModelArchitectureConfig()
    assert settings.train == TrainConfig()
    assert settings.sources == [] and settings.given == {}


TYPED = [  # (arguments, the value it means)
    (["--max_iters=7"], 7),
    (["--max_iters", "7"], 7),
    (["--max-iters=7"], 7),
    (["--max_iters=None", "--epochs=1.5"], 1.5),
    (["--learning_rate=1e-3"], 1e-3),
    (["--learning_rate=1"], 1.0),  # int widens to float
    (["--learning_rate", "2"], 2.0),
    (["--weight_decay=0"], 0.0),
    (["--bias"], True),
    (["--bias", "--n_layer=3"], 3),
    (["--bias=False"], False),
    (["--bias", "false"], False),
    (["--wandb_log", "True"], True),
    (["--compile"], True),
    (["--compile=auto"], "auto"),
    (["--compile", "auto"], "auto"),
    (["--compile=False"], False),
    (["--run_name=lr=3e-4"], "lr=3e-4"),  # only the first = divides
    (["--run_name", "a=b"], "a=b"),
    (["--run_name=123"], "123"),  # text stays text
    (["--run_name=True"], "True"),
    (["--run_name=(1, 2)"], "(1, 2)"),
    (["--run_name=None"], None),
    (["--run_name=my run"], "my run"),
    (["--input=C:\\data\\a.txt"], "C:\\data\\a.txt"),
    (["--vocab_size=None"], None),
    (["--vocab_size=300"], 300),
    (["--block_pattern=attention,attention/none"], "attention,attention/none"),
    (["--n_kv_head=2"], 2),
    (["--n_kv_head=None"], None),
    (["--rope_theta=500000"], 500000.0),
    (["--qk_norm"], True),
    (["--sizes=(3, 4)"], (3, 4)),
    (["--sizes=3,4"], (3, 4)),
    (["--sizes", "(5,)"], (5,)),
    (["--brim=3"], 3.0),
    (["--band=None"], None),
    (["--band=a=b"], "a=b"),
    (["--count=-4"], -4),
    (["--count", "-4"], -4),
    (["--lined", "--count=1"], 1),
]


@pytest.mark.parametrize("arguments, value", TYPED, ids=[" ".join(arguments) for arguments, _ in TYPED])
def test_values_mean_what_their_setting_wants(options, arguments, value):
    got = value_of(*arguments)
    assert got == value and type(got) is type(value)


def test_a_flag_takes_no_word_that_is_not_its_own(write):
    assert read_settings(["--bias", write("n_layer = 3\n")]).given == {"bias": True, "n_layer": 3}


REFUSED = [  # (arguments, what the sentence says)
    (["--max_iters=1.5"], "max_iters=1.5 is a float, and must be an int or None"),
    (["--max_iters=1e3"], "max_iters=1000.0 is a float"),
    (["--max_iters=ten"], "max_iters='ten' is a str"),
    (["--max_iters=True"], "max_iters=True is a bool"),
    (["--learning_rate=fast"], "learning_rate='fast' is a str, and must be a float"),
    (["--learning_rate=True"], "learning_rate=True is a bool"),
    (["--learning_rate=None"], "learning_rate=None is a NoneType, and must be a float"),
    (["--bias=1"], "bias=1 is an int, and must be a bool"),
    (["--bias=yes"], "bias='yes' is a str"),
    (["--compile=1"], "compile=1|compile='1'"),
    (["--n_layer=(1, 2)"], "n_layer=.*is a tuple, and must be an int"),
    (["--n_layer="], "n_layer='' is a str"),
    (["--sizes=3"], "sizes=3 is an int, and must be a tuple"),
    (["--n_layer"], "--n_layer needs a value: --n_layer=VALUE"),
    (["--run_name", "--n_layer=3"], "--run_name needs a value"),
    (["--n_layr=3"], "'n_layr' is not a setting; did you mean 'n_layer'"),
    (["--n_layr", "3"], "'n_layr' is not a setting; did you mean 'n_layer'"),
    (["--n_layr"], "'n_layr' is not a setting; did you mean 'n_layer'"),
    (["--slidng_window=3"], "did you mean 'sliding_window'"),
    (["--part_options={}"], "'part_options' is not a setting"),
    (["--arch_preset=lama"], "did you mean 'llama'"),
    (["config/arch_lama.py"], "config file config.arch_lama.py does not exist"),
    (["n_layer=3"], "settings are given as --name=value"),
    (["."], "does not exist"),
]


@pytest.mark.parametrize("arguments, sentence", REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_mistakes_are_one_sentence(options, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        read_settings(arguments)
    assert "\n" not in str(refusal.value)


def test_a_misspelt_config_file_names_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"did you mean 'config/arch_llama\.py'"):
        read_settings(["config/arch_lama.py"])


# ---- files, stacked -------------------------------------------------------------------------------------------------


def test_what_comes_later_wins(write):
    first, second = write("n_layer = 3\nn_head = 2\n", "a.py"), write("n_layer = 5\n", "b.py")
    assert read_settings([first, second]).model.n_layer == 5
    assert read_settings([second, first]).model.n_layer == 3
    assert read_settings([first, second, "--n_layer=7"]).model.n_layer == 7
    assert read_settings([first, "--n_layer=7", second]).model.n_layer == 5
    assert read_settings([first, second]).model.n_head == 2


def test_a_file_sees_the_current_values(write):
    size = write("batch_size = 6\nlearning_rate = 2e-3\n", "a.py")
    computed = write("""
        gradient_accumulation_steps = 480 // batch_size
        min_lr = learning_rate / 10
        batch_size *= 2
        n_embd = 16 * n_head
        sliding_window = block_size // 4
    """, "b.py")  # fmt: skip
    settings = read_settings([size, "--n_head=8", computed])
    assert settings.train.gradient_accumulation_steps == 80
    assert settings.train.min_lr == pytest.approx(2e-4)
    assert settings.train.batch_size == 12
    assert settings.model.n_embd == 128
    assert settings.model.part_options == {"sliding_window": 64}
    assert read_settings([computed]).train.gradient_accumulation_steps == 40  # the default batch_size is 12


def test_given_holds_what_was_asked_for_and_nothing_else(write):
    given = read_settings([write("n_layer = 3\n"), "--dropout=0"]).given
    assert given == {"n_layer": 3, "dropout": 0.0}


def test_a_later_preset_replaces_an_earlier_one_entirely(write):
    llama, gpt2 = write('arch_preset = "llama"\n', "a.py"), write('arch_preset = "gpt2"\n', "b.py")
    assert read_settings([llama, gpt2]).model == ModelArchitectureConfig.from_preset("gpt2")
    assert read_settings([gpt2, llama]).model == ModelArchitectureConfig.from_preset("llama")
    assert read_settings([llama, "--arch_preset=gpt2"]).model == ModelArchitectureConfig.from_preset("gpt2")


def test_a_preset_replaces_what_came_before_and_not_what_comes_beside_or_after(write):
    assert read_settings(["--bias=True", "--arch_preset=llama"]).model.bias is False
    assert read_settings(["--arch_preset=llama", "--bias=True"]).model.bias is True
    assert read_settings([write('arch_preset = "llama"\nbias = True\n')]).model.bias is True
    assert read_settings(["--n_layer=9", "--arch_preset=llama"]).model.n_layer == 9  # not one of the nine options
    assert read_settings(["--n_layer=9", "--model_size=124M"]).model.n_layer == 12


def test_options_at_their_default_are_dropped_and_shared_ones_kept():
    assert read_settings(["--sliding_window=0", "--rope_theta=10000"]).model.part_options == {}
    # 4.0 is the default of a plain FFN and not of a gated one, so it is a choice.
    assert read_settings(["--ffn_multiplier=4"]).model.part_options == {"ffn_multiplier": 4.0}
    assert read_settings(["--optimizer=muon", "--muon_momentum=0.9"]).train.part_options == {"muon_momentum": 0.9}
    assert read_settings(["--muon_momentum=0.9"]).model.part_options == {}


def test_imports_functions_classes_and_underscored_names_are_the_files_own_business(write):
    path = write("""
        import math
        import os.path
        import torch.nn as nn
        from math import floor, pi
        from model_components import FFN_REGISTRY
        from pathlib import Path

        def half(x):
            return x // 2

        class Helper:
            pass

        _hidden = "not a setting"
        square = lambda x: x * x
        n_layer = half(10)
        n_head = floor(pi)
        n_embd = square(6)
    """)
    model = read_settings([path]).model
    assert (model.n_layer, model.n_head, model.n_embd) == (5, 3, 36)


def test_a_setting_that_a_file_imports_from_another_counts(write, monkeypatch, tmp_path):
    write("learning_rate = 0.5\n", "shared_rates.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_settings([write("from shared_rates import learning_rate\n")]).train.learning_rate == 0.5
    sys.modules.pop("shared_rates")


@pytest.mark.parametrize("text, sentence", [
    ("n_layr = 3", r"mine\.py: 'n_layr' is not a setting; did you mean 'n_layer'"),
    ("n_layer = 3.0", r"mine\.py: n_layer=3\.0 is a float, and must be an int"),
    ("max_iters = 480 / 12", r"mine\.py: max_iters=40\.0 is a float"),
    ("n_layer = True", r"mine\.py: n_layer=True is a bool"),
    ("bias = 1", r"mine\.py: bias=1 is an int"),
    ("import torch\nactivation = torch.relu", r"mine\.py: activation=.* must be a str"),
    ("activation = lambda x: x", r"mine\.py: activation=.* must be a str"),
    ("normalization = float", r"mine\.py: normalization=.* must be a str"),
    ("n_layer = 3\nn_head = 1 / 0\n", r"mine\.py, line 2: ZeroDivisionError: division by zero"),
    ("n_layer = 3\n\nn_head = = 2\n", r"mine\.py, line 3: SyntaxError"),
    ("n_layer = n_layrs", r"mine\.py, line 1: NameError: name 'n_layrs' is not defined"),
    ("import no_such_module_anywhere", r"mine\.py, line 1: ModuleNotFoundError"),
    ("\n\ndef f():\n    return [][0]\nn_layer = f()", r"mine\.py, line 4: IndexError"),
    ("import model_components as m\n\nm.NORM_REGISTRY('rmsnorm')(int)", r"mine\.py, line 3: .*'rmsnorm' is already"),
    ("for i in range(3):\n    n_layer = i + 1", r"mine\.py: 'i' is not a setting"),
    ("n_layer = 0", "n_layer=0 must be at least 1"),
], ids=lambda value: value.strip().splitlines()[-1] if "\\" not in value else "")  # fmt: skip
def test_mistakes_in_a_file_say_where(write, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_settings([write(text)])


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "a.py").write_bytes(b"n_layer = 3 # \xff\xfe")
    with pytest.raises(UserError, match=r"a\.py cannot be read"):
        read_settings([str(tmp_path / "a.py")])


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_shipped_config_file_loads(path):
    settings = read_settings([str(path)])
    assert settings.given, "a config file that sets nothing"
    assert settings.sources == [(path.name, path.read_text(encoding="utf-8"))]
    assert unused_options(settings.model) == {}
    again = read_settings([str(path), str(path)])
    assert (again.model, again.train) == (settings.model, settings.train)


def test_there_is_a_config_file_for_each_preset_and_size():
    from model_config import PRESETS, SIZES

    names = {path.stem for path in CONFIG_FILES}
    assert {f"arch_{preset}" for preset in PRESETS} | {f"size_{size}" for size in SIZES} <= names
    for preset in PRESETS:
        model = read_settings([str(ROOT / "config" / f"arch_{preset}.py")]).model
        assert model.arch_preset == preset
        if preset != "custom":
            assert model == ModelArchitectureConfig.from_preset(preset)
    for size in SIZES:
        assert read_settings([str(ROOT / "config" / f"size_{size}.py")]).model.model_size == size


@pytest.mark.parametrize("size, tokens", {"124M": 480 * 1024, "350M": 480 * 1024, "1B": 256 * 2048}.items())
def test_sizes_come_with_half_a_million_tokens_per_step(size, tokens):
    settings = read_settings([str(ROOT / "config" / "arch_gpt2.py"), str(ROOT / "config" / f"size_{size}.py")])
    assert settings.train.sequences_per_step * settings.model.block_size == tokens


# ---- a part defined in a config file --------------------------------------------------------------------------------


def test_a_file_defines_a_part_with_options_and_uses_it(write):
    settings = read_settings([write(PART), *TINY])
    assert settings.model.part_options == {"power": 3}
    model = ConfigurableGPT(settings.model)
    assert model.blocks[0].ffn.power == 3
    _, loss = model(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))
    loss.backward()
    assert model.blocks[0].ffn.up.weight.grad.isfinite().all()
    assert read_settings([write(PART), "--power=4"]).model.part_options == {"power": 4}


def test_a_file_may_register_by_assignment(write):
    path = write("""
        from model_components import POSITION_ENCODING_REGISTRY, ALiBi

        class Steeper(ALiBi):
            def slopes(self):
                return [2 * slope for slope in super().slopes()]

        POSITION_ENCODING_REGISTRY["steeper"] = Steeper
        position_encoding = "steeper"
    """)
    model = ConfigurableGPT(read_settings([path, *TINY]).model)
    assert model.blocks[0].mixer.position_encoding.slopes() == [2 * 2**-4, 2 * 2**-8]


def test_the_same_file_may_be_read_again_and_shipped_parts_are_safe(write):
    path = write(PART)
    read_settings([path])
    first = FFN_REGISTRY["two_powers"]
    read_settings([path])
    assert FFN_REGISTRY["two_powers"] is not first
    with pytest.raises(UserError, match="ffn_type 'swiglu' is already registered"):
        read_settings([write("from model_components import FFN_REGISTRY as F\nF['swiglu'] = int\n")])


def test_a_part_of_one_test_is_gone_in_the_next():
    assert "two_powers" not in FFN_REGISTRY and "power" not in setting_types()


# ---- one flat namespace, and help -----------------------------------------------------------------------------------


def test_the_two_configs_share_no_name():
    model, train = ({f.name for f in dataclasses.fields(config)} for config in (ModelArchitectureConfig, TrainConfig))
    assert model & train == {"part_options"}
    assert not (model | train) & {*registered_options()}, "an option has the name of a field"


def test_help_lists_every_setting_once_with_its_default_and_reason():
    lines = re.findall(r"^  --(\w+)=(\S*) *(.*?)(?: *\[.*\])?$", help_text("usage"), flags=re.MULTILINE)
    assert sorted(name for name, _, _ in lines) == sorted(setting_types())
    assert [name for name, _, reason in lines if len(reason) < 4] == []
    defaults = {name: default for name, default, _ in lines}
    assert (defaults["n_layer"], defaults["bias"], defaults["learning_rate"]) == ("4", "False", "0.001")


def test_help_starts_with_the_usage_and_keeps_the_headings():
    text = help_text("""
        python train.py   # one command
    """)
    assert text.startswith("python train.py   # one command")
    assert "\nthe nine options\n" in text and "\ndata\n" in text and "\noptions of single parts\n" in text
    assert text.index("--n_layer") < text.index("--learning_rate")
    assert "--rope_theta=10000.0" in text and "[rope]" in text
    assert re.search(r"--ffn_multiplier=.*\[geglu, moe, rwkv7, standard, swiglu\]", text)


def test_the_datasets_vocabulary_fills_in_where_none_was_asked_for():
    assert with_vocabulary(read_settings([]), 65).model.vocab_size == 65
    assert with_vocabulary(read_settings(["--vocab_size=128"]), 65).model.vocab_size == 128


def test_settings_see_options_registered_late():
    assert "late_option" not in setting_types()
    hats = Registry("hat", of="train")

    @hats("late")
    class Late:
        class Options:
            late_option: int = 1  # declared after everything was imported

    assert read_settings(["--late_option=2"]).train.part_options == {"late_option": 2}
    assert current_values({})["late_option"] == 1
