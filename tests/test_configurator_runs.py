"""Settings of a run on disk: what its folder keeps, and what a resumed run takes from it."""

# ruff: noqa: F401, F811 - options and write are fixtures

import json
import re
import shutil
from pathlib import Path

import pytest

import configurator
from config_helpers import PART, ROOT, TINY, options, write
from configurator import (
    load_run,
    load_sources,
    read_settings,
    resume,
    save_sources,
    setting_types,
    with_vocabulary,
)
from model_builder import ConfigurableGPT
from model_components import FFN_REGISTRY, NORM_REGISTRY
from registry import Registry
from user_errors import UserError

# ---- a run on disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Leave a run folder behind as train.py does, and return it."""

    def make(arguments, name="first"):
        settings = read_settings([f"--runs_dir={tmp_path}", f"--run_name={name}", *arguments])
        settings = with_vocabulary(settings, 256)
        folder = tmp_path / name
        save_sources(settings, folder / "config")
        record = {"model_config": settings.model.to_dict(), "training_config": settings.train.to_dict()}
        (folder / "config.json").write_text(json.dumps(record))
        return folder, settings

    return make


def test_sources_are_kept_verbatim_and_in_order(write, tmp_path):
    texts = {"b.py": "n_layer = 3  # ünïcode\r\n", "a.py": "n_head = 2\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    settings = read_settings([str(tmp_path / name) for name in texts])
    save_sources(settings, tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["00_b.py", "01_a.py"]
    assert [name for name, _ in load_sources(tmp_path / "kept")] == ["b.py", "a.py"]
    assert [text for _, text in load_sources(tmp_path / "kept")] == [text for _, text in settings.sources]


@pytest.mark.parametrize("arguments", [
    [],
    ["--arch_preset=llama", "--n_kv_head=2", "--model_size=5M", "--learning_rate=1"],
    ["--optimizer=muon", "--muon_momentum=0.9", "--compile", "--max_tokens=100"],
], ids=["defaults", "llama", "muon"])  # fmt: skip
def test_a_run_is_rebuilt_from_its_folder(run, arguments):
    folder, settings = run(arguments)
    loaded = load_run(folder)
    assert (loaded.model, loaded.train) == (settings.model, settings.train)
    assert loaded.model.vocab_size == 256


def test_a_run_with_a_part_of_its_own_is_rebuilt_from_its_folder_alone(run, write, tmp_path):
    path = write(PART)
    folder, settings = run([path, *TINY])
    Path(path).unlink()
    folder = shutil.move(folder, tmp_path / "elsewhere")
    del FFN_REGISTRY["two_powers"]
    loaded = load_run(folder)
    assert loaded.model == settings.model
    assert loaded.sources == settings.sources
    assert ConfigurableGPT(loaded.model).blocks[0].ffn.power == 3


@pytest.mark.parametrize("registering", [
    "from model_components import NORM_REGISTRY, RMSNorm\nclass Mine(RMSNorm): pass\nNORM_REGISTRY['mine'] = Mine",
    "import model_components as m\n@m.NORM_REGISTRY('mine')\nclass Mine(m.RMSNorm): pass",
    "import model_components as m\nif True:\n    @m.NORM_REGISTRY('mine')\n    class Mine(m.RMSNorm): pass",
    "from model_components import NORM_REGISTRY as N, RMSNorm\n@N('mine')\nclass Mine(RMSNorm): pass",
], ids=["assignment", "attribute", "indented", "renamed"])  # fmt: skip
def test_however_a_file_registers_its_run_is_rebuilt(run, write, registering):
    folder, settings = run([write(registering + "\nnormalization = 'mine'\n"), *TINY])
    del NORM_REGISTRY["mine"]
    assert load_run(folder).model == settings.model
    assert "mine" in NORM_REGISTRY


def test_a_run_with_options_of_a_part_that_is_not_imported_loads(run, monkeypatch):
    # sample.py imports no optimizer, so nobody has declared muon_momentum there.
    from training_optim import OPTIMIZER_REGISTRY

    folder, settings = run(["--optimizer=muon", "--muon_momentum=0.9"])
    OPTIMIZER_REGISTRY.clear()
    assert "muon_momentum" not in setting_types()
    assert load_run(folder).train == settings.train


def test_a_tuple_option_survives_the_folder(run, options):
    folder, settings = run(["--sizes=3,4"])
    assert load_run(folder).model == settings.model
    assert resume([f"--runs_dir={folder.parent}", "--run_name=first", "--init_from=resume"]).model == settings.model


@pytest.mark.parametrize("damage, sentence", [
    (lambda text: text[: len(text) // 2], r"config\.json cannot be read; restore it"),
    (lambda text: "[]", r"config\.json cannot be read"),
    (lambda text: "{}", r"config\.json cannot be read"),
    (lambda text: text.replace("n_layer", "n_layr"), "'n_layr' is not a setting; did you mean 'n_layer'"),
    (lambda text: text.replace('"n_layer": 4', '"n_layer": "4"'), "n_layer='4' is a str, and must be an int"),
    (lambda text: text.replace('"batch_size": 12', '"batch_size": 0'), "batch_size=0 must be at least 1"),
], ids=["half", "list", "empty", "unknown", "type", "value"])  # fmt: skip
def test_a_damaged_record_is_one_sentence(run, damage, sentence):
    folder, _ = run([])
    path = folder / "config.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=sentence):
        load_run(folder)


def test_a_missing_run_names_the_nearest(run, tmp_path):
    run([], name="llama-1M")
    with pytest.raises(UserError, match=r"there is no run at .*llama-1m; did you mean 'llama-1M'"):
        load_run(tmp_path / "llama-1m")


# -- going on


def going_on(folder, *arguments):
    return resume([f"--runs_dir={folder.parent}", f"--run_name={folder.name}", "--init_from=resume", *arguments])


def test_resuming_takes_the_runs_own_settings_under_the_command_line(run, write):
    folder, before = run([write("learning_rate = 5e-4\n"), "--arch_preset=llama", "--n_kv_head=2", "--max_iters=10"])
    settings = going_on(folder, "--max_iters=20", "--eval_interval=5")
    assert settings.model == before.model
    assert settings.train == before.train.replace(init_from="resume", max_iters=20, eval_interval=5)
    assert settings.train.learning_rate == 5e-4
    assert settings.sources == before.sources


def test_resuming_with_the_files_of_the_run_changes_nothing(run, write):
    files = [str(ROOT / "config" / "arch_llama.py"), str(ROOT / "config" / "size_124M.py")]
    folder, before = run(files)
    assert going_on(folder, *files).model == before.model
    assert going_on(folder, *files).train == before.train.replace(init_from="resume")


@pytest.mark.parametrize("argument, name", [
    ("--n_layer=5", "n_layer=4"),
    ("--arch_preset=llama", "arch_preset='custom'"),
    ("--n_kv_head=2", "part_options={}"),
    ("--vocab_size=300", "vocab_size=256"),
    ("--block_size=64", "block_size=256"),
    ("--seed=1", "seed=1337"),
    ("--dataset=shakespeare_char", "dataset='python_stdlib'"),
    ("--tokenizer=char", "tokenizer=None"),
    ("--tokenizer_vocab_size=300", "tokenizer_vocab_size=None"),
    ("--variant=small", "variant=None"),
    ("--optimizer=muon", "optimizer='adamw'"),
    ("--batch_size=6", "batch_size x gradient_accumulation_steps=12"),
])  # fmt: skip
def test_resuming_another_model_or_data_is_refused_by_name(run, argument, name):
    folder, _ = run([])
    with pytest.raises(UserError, match=rf"run 'first' was made with {re.escape(name)} and this command says"):
        going_on(folder, argument)


def test_another_length_takes_the_place_of_the_runs_own(run):
    folder, _ = run(["--max_tokens=1000"])
    train = going_on(folder, "--max_iters=7").train
    assert (train.max_iters, train.max_tokens) == (7, None)
    assert going_on(folder).train.max_tokens == 1000


def test_what_was_meant_for_one_command_is_not_for_the_next(run):
    folder, _ = run(["--eval_only=True", "--resume_step=3"])
    assert not going_on(folder).train.eval_only and going_on(folder).train.resume_step is None


def test_a_run_that_was_moved_goes_on_where_it_is(run, tmp_path):
    folder, before = run([])
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    train = going_on(moved).train
    assert (train.run_name, train.runs_dir) == ("elsewhere", str(tmp_path))
    assert train.learning_rate == before.train.learning_rate


def test_resuming_may_split_the_same_batch_otherwise(run):
    folder, _ = run(["--batch_size=12", "--gradient_accumulation_steps=2"])
    train = going_on(folder, "--batch_size=6", "--gradient_accumulation_steps=4").train
    assert (train.batch_size, train.gradient_accumulation_steps) == (6, 4)


def test_resuming_a_missing_run_or_none_at_all(run, tmp_path):
    run([])
    with pytest.raises(UserError, match=r"there is no run at .*firts; did you mean 'first'"):
        resume([f"--runs_dir={tmp_path}", "--run_name=firts", "--init_from=resume"])
    with pytest.raises(UserError, match="init_from=resume needs run_name"):
        resume(["--init_from=resume"])
