"""Imports go one way (docs: DESIGN, section 1), and train.py knows no part by name."""

import ast
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from eval_probes import PROBE_REGISTRY
from mixer_attention import MIXER_REGISTRY
from model_components import FFN_REGISTRY, NORM_REGISTRY, POSITION_ENCODING_REGISTRY
from model_config import PRESETS
from model_interop import INIT_REGISTRY
from model_interop_rules import HF_CLASS_REGISTRY
from training_objectives import OBJECTIVE_REGISTRY
from training_optim import OPTIMIZER_REGISTRY

ROOT = Path(__file__).resolve().parents[1]

SCRIPTS = ["train", "sample", "evaluate", "compare_architectures", "sweep", "bench"]
LAYERS = {  # a file imports from its own layer and the ones before it; the first pattern that fits decides
    "settings": ["registry", "user_errors", "*_config"],
    "configurator": ["configurator"],
    "components": ["model_components", "model_moe", "model_checks", "model_parameters"],
    "mixers": ["mixer_*"],
    "builder": ["model_builder"],
    "whole models": ["model_*"],
    "place": [
        "training_mesh", "training_ranks", "training_place", "training_weights", "training_recompute",
        "training_parallel",
    ],
    "training": ["training_*"],
    "saving and judging": [
        "training_checkpoint", "training_schedules", "training_logger", "training_report", "training_plan", "eval_*",
        "model_interop",
    ],
    "comparison": ["comparison_*"],
    "sweeps": ["sweep_*"],
    "benchmarks": ["bench_*"],
    "scripts": SCRIPTS,
}  # fmt: skip
ORDER = [*LAYERS]


def imports_of(path):
    """Every module that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            names.add(node.module.partition(".")[0])
    return names


GRAPH = {path.stem: imports_of(path) for path in sorted(ROOT.glob("*.py"))}


def layer_of(name):
    """The layer that names the file, or else the first whose pattern fits."""
    exact = [layer for layer in ORDER if name in LAYERS[layer]]
    fitting = [layer for layer in ORDER if any(fnmatch(name, pattern) for pattern in LAYERS[layer])]
    return (exact + fitting + [None])[0]


def test_the_walk_sees_imports():
    assert {"torch", "mixer_attention", "importlib"} <= GRAPH["model_builder"]
    assert "resource" in GRAPH["training_place"]  # inside a function
    assert (layer_of("model_config"), layer_of("model_flops")) == ("settings", "whole models")
    assert (layer_of("training_data"), layer_of("training_config")) == ("training", "settings")
    assert layer_of("training_logger") == "saving and judging" and layer_of("stray") is None


@pytest.mark.parametrize("name", GRAPH)
def test_every_file_has_a_layer(name):
    assert layer_of(name), f"{name}.py has no layer: name it after a folder of DESIGN 1, or list it here"


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_one_way(name):
    allowed = ORDER[: ORDER.index(layer_of(name)) + 1]
    wrong = [other for other in GRAPH[name] & {*GRAPH} if layer_of(other) not in allowed]
    assert not wrong, f"{name}.py ({layer_of(name)}) imports {wrong}"


def test_no_circle():
    seen, done = [], set()

    def visit(name):
        assert name not in seen, f"a circle: {' -> '.join([*seen, name])}"
        if name in done:
            return
        seen.append(name)
        for other in GRAPH[name] & {*GRAPH}:
            visit(other)
        done.add(seen.pop())

    for name in GRAPH:
        visit(name)


@pytest.mark.parametrize("name", [name for name in GRAPH if layer_of(name) in ("settings", "configurator")])
def test_settings_need_the_standard_library_only(name):
    assert GRAPH[name] - {*GRAPH} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in GRAPH if name.startswith("compar")])
def test_comparison_reads_files_and_knows_settings_only(name):
    layers = {layer_of(other) for other in GRAPH[name] & {*GRAPH}}
    assert layers <= {"settings", "configurator", "comparison"} and "torch" not in GRAPH[name]


def test_scripts_never_import_scripts():
    assert {(name, other) for name in GRAPH for other in GRAPH[name] & {*SCRIPTS}} == set()


def test_only_the_builder_imports_mixers():
    importers = {name for name in GRAPH for other in GRAPH[name] if other.startswith("mixer_")}
    assert {name for name in importers if not name.startswith("mixer_")} == {"model_builder"}


# ---- train.py knows no part by name ---------------------------------------------------------------------------------

WRAPPERS = ["DistributedDataParallel", "DDP", "ddp", "fsdp", "fully_shard", "zero1", "ZeroRedundancyOptimizer", "Muon"]


def words_of_code(source):
    """Identifiers and the words inside strings, without docstrings and comments."""
    tree = ast.parse(source)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef))
                  and ast.get_docstring(node) is not None}  # fmt: skip
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.alias):
            words |= {node.name, node.asname}
        elif isinstance(node, ast.keyword):
            words.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words |= {node.value, *re.findall(r"\w+", node.value)}
    return words


def test_the_search_would_find_a_name():
    found = words_of_code('"""llama"""\nif objective == "causal_lm": x = torch.muon(gpt2=f"a {y} swiglu-b")  # rope')
    assert {"causal_lm", "muon", "gpt2", "swiglu"} <= found
    assert not {"llama", "rope"} & found


def test_train_py_names_no_architecture_objective_optimizer_or_wrapper():
    names = {*PRESETS, *WRAPPERS, *OBJECTIVE_REGISTRY, *OPTIMIZER_REGISTRY, *HF_CLASS_REGISTRY, *INIT_REGISTRY}
    names |= {*MIXER_REGISTRY, *FFN_REGISTRY, *NORM_REGISTRY, *POSITION_ENCODING_REGISTRY, *PROBE_REGISTRY}
    names -= {"none"}  # a word
    names -= {"attention"}  # the row of the record that says which attention kernel ran
    assert {"llama", "causal_lm", "adamw", "rope", "fsdp", "LlamaForCausalLM", "hf", "mqar"} <= names
    assert not words_of_code((ROOT / "train.py").read_text(encoding="utf-8")) & names
