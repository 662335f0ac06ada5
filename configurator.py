"""Settings come from config files and `--key=value`, in the order they are typed; what comes later wins.

    python train.py config/arch_llama.py config/size_124M.py --max_iters=500

A config file is Python, executed with every setting's current value in sight, so it can compute
(`gradient_accumulation_steps = 480 // batch_size`). Every public name that it leaves behind must be a setting of the
right type; imports, functions, classes and `_names` are its own business. It may define a part
(`@FFN_REGISTRY('mine') class Mine(nn.Module): ...`) and choose it by name in the same file.
"""

import ast
import builtins
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path

from model_config import ModelArchitectureConfig, brought_only_by, expand_preset
from registry import ALL_REGISTRIES, CONFIG_FILE_MODULE, options_from_json, options_of, registered_options
from training_config import TrainConfig
from user_errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one command asks for."""

    model: ModelArchitectureConfig
    train: TrainConfig
    sources: list  # [(file name, text)] of the config files, verbatim, in order
    given: dict  # the settings that the command or its files set, with their values
    named: frozenset = frozenset()  # those of them that it named itself, not through a preset or a size


# ---- the one flat namespace ------------------------------------------------------------------------------------------

MODEL_TYPES = typing.get_type_hints(ModelArchitectureConfig)
TRAIN_TYPES = typing.get_type_hints(TrainConfig)
FIELD_TYPES = {name: type_ for name, type_ in {**MODEL_TYPES, **TRAIN_TYPES}.items() if name != "part_options"}


def setting_types():
    """{setting: type} for every field and every option that a registered part declares."""
    options = {name: declared[0].type for name, declared in registered_options().items()}
    return {**options, **FIELD_TYPES}


def current_values(values):
    """`values` over the defaults; an option that parts give different defaults has no current value until set."""
    current = {name: declared[0].default for name, declared in registered_options().items()
               if all(option.default == declared[0].default for option in declared)}  # fmt: skip
    for config in (ModelArchitectureConfig, TrainConfig):
        current.update({f.name: f.default for f in dataclasses.fields(config) if f.name != "part_options"})
    return {**current, **values}


def build_configs(values):
    """(ModelArchitectureConfig, TrainConfig) from flat settings; options at their default everywhere are dropped."""
    declared = registered_options()
    model_values, train_values = {}, {}
    model_options, train_options = {}, {}
    for name, value in values.items():
        if name in MODEL_TYPES:
            model_values[name] = value
        elif name in TRAIN_TYPES:
            train_values[name] = value
        elif any(option.default != value for option in declared[name]):
            (model_options if declared[name][0].of == "model" else train_options)[name] = value
    model = ModelArchitectureConfig(**model_values, part_options=model_options)
    return model, TrainConfig(**train_values, part_options=train_options)


def flatten(model_values, train_values):
    """The flat settings that two `to_dict` results stand for."""
    flat = {**model_values, **train_values}
    flat.pop("part_options", None)
    options = {**model_values.get("part_options", {}), **train_values.get("part_options", {})}
    return {**flat, **options_from_json(options)}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_settings(arguments, base=None):
    """Settings from a command line; of a run that is resumed, its own under what the command line says.

    Args:
        arguments: as in sys.argv[1:]: config files, `--key=value`, `--key value`, `--flag`.
        base: flat settings to start from instead of the defaults (a resumed run's own).

    Raises:
        UserError: an unknown name, a wrong type, a file that is missing or fails, a contradiction.
    """
    values, given, named, sources = _read_values(arguments, base or {})
    if base is None and values.get("auto_resume") and has_checkpoint(values):
        return resume([*arguments, "--init_from=resume"])
    if base is None and values.get("init_from") == "resume":
        return resume(arguments)
    model, train = build_configs(values)
    return Settings(model, train, sources, given, frozenset(named))


def _read_values(arguments, base):
    """(all settings given or in `base`, those that the arguments give, the names of those that they name themselves,
    config file sources), not yet validated.
    """
    values, given, named, sources = dict(base), {}, set(), []
    for kind, item in split_arguments(arguments):
        if kind == "file":
            assigned = exec_config_file(item, values)
            sources.append((Path(item).name, Path(item).read_text(encoding="utf-8")))
        else:
            name, text = item
            assigned = {name: parse_value(name, text)}
        typed = {*assigned}
        assigned = expand_preset(assigned)
        named = named - {*assigned} | typed
        for name in brought_only_by(values.get("arch_preset"), assigned):
            values.pop(name, None)
            given.pop(name, None)
        values.update(assigned)
        given.update(assigned)
    return values, given, named, sources


def split_arguments(arguments, types=None):
    """Yield ('file', path) and ('setting', (name, text)) in order.

    Args:
        types: {setting: type} of a script with settings of its own; None takes `setting_types()`.
    """
    arguments, types = list(arguments), setting_types() if types is None else types
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            yield "file", argument
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            follows = arguments[0] if arguments else None
            is_flag = _admits(bool, types.get(name))
            if is_flag and (follows is None or follows.lower() not in ("true", "false", "none", "auto")):
                text = "True"
            elif follows is None or follows.startswith("--"):
                _require_setting(name, "the command line", types)
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            else:
                text = arguments.pop(0)
        yield "setting", (name, text)


def exec_config_file(path, values, types=None):
    """{setting: value} that one config file assigns, `values` being what it sees.

    Args:
        types: {setting: type} of a script with settings of its own; None takes `setting_types()`.

    The current values stand where builtins are looked up, so what is left in the file's own namespace is exactly what
    the file assigned.
    """
    path = Path(path)
    if not path.is_file():
        known = [str(p) for p in sorted(Path("config").glob("*.py"))]
        hint = did_you_mean(path.as_posix(), [Path(p).as_posix() for p in known])
        raise UserError(f"config file {path} does not exist{hint}; settings are given as --name=value")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    namespace = {
        "__builtins__": {**vars(builtins), **current_values(values)},
        "__name__": CONFIG_FILE_MODULE,
        "__file__": str(path),
    }
    try:
        exec(compile(text, str(path), "exec"), namespace)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}, line {line}: {kind}{error}") from None
    types = setting_types() if types is None else types
    own = _own_business(text, namespace, types)
    return {name: check_type(name, value, str(path), types) for name, value in namespace.items() if name not in own}


def _own_business(text, namespace, known):
    """The names in a config file's namespace that are no settings of it: `_names`, imports, functions and classes.

    A setting's name must be defined or imported to be one of them: `activation = F.silu` is a mistake, not a helper.
    """
    imported, defined = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
    helpers = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    own = {name for name in namespace if name.startswith("_")}
    for name in namespace.keys() - own:
        is_helper = isinstance(namespace[name], helpers)
        if name in known:
            is_own = is_helper and name in imported | defined
        else:
            is_own = is_helper or name in imported
        if is_own:
            own.add(name)
    return own


def _line_in(path, error):
    """The line of the config file that an exception came through."""
    lines = []
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return lines[-1] if lines else "?"


def with_vocabulary(settings, vocab_size):
    """The settings with the dataset's vocabulary where none was asked for."""
    if settings.model.vocab_size is not None:
        return settings
    return dataclasses.replace(settings, model=settings.model.replace(vocab_size=vocab_size))


# ---- types -----------------------------------------------------------------------------------------------------------


def _require_setting(name, where, types=None):
    known = setting_types() if types is None else types
    if name not in known:
        raise UserError(f"{where}: '{name}' is not a setting{did_you_mean(name, known)} (--help lists all)")
    return known[name]


def _allowed_types(annotation):
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (typing.get_origin(annotation) or annotation,)


def _admits(type_, annotation):
    return annotation is not None and type_ in _allowed_types(annotation)


def check_type(name, value, where="the command line", types=None):
    """`value` as the setting's type wants it: int widens to float and nothing else changes.

    Raises:
        UserError: an unknown setting, or a value of another type.
    """
    annotation = _require_setting(name, where, types)
    allowed = _allowed_types(annotation)
    if type(value) in allowed or (value is None and type(None) in allowed):
        return value
    if type(value) is int and float in allowed:
        return float(value)
    words = " or ".join("None" if type_ is type(None) else type_.__name__ for type_ in allowed)
    raise UserError(f"{where}: {name}={value!r} is {_article(type(value).__name__)}, and must be {_article(words)}")


def _article(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def parse_value(name, text, types=None):
    """The value that `--name=text` means.

    Text for a string setting is taken as typed (`--run_name=123`); elsewhere it is read as a Python literal.
    """
    annotation = _require_setting(name, "the command line", types)
    literal = _literal(text)
    if _admits(str, annotation) and type(literal) not in _allowed_types(annotation):
        literal = text
    return check_type(name, literal, types=types)


def _literal(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- runs on disk ----------------------------------------------------------------------------------------------------


def save_sources(settings, folder):
    """Write the config files verbatim as `00_name.py`, `01_name.py`, ... into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, text) in enumerate(settings.sources):
        (folder / f"{index:02d}_{name}").write_text(text, encoding="utf-8", newline="")


def load_sources(folder):
    """[(name, text)] that `save_sources` wrote, with the parts that they define registered again."""
    sources = []
    for path in sorted(Path(folder).glob("[0-9][0-9]_*.py")):
        sources.append((path.name[3:], path.read_text(encoding="utf-8")))
        if "REGISTRY" in sources[-1][1]:
            exec_config_file(path, {})
    return sources


def load_run(run_folder):
    """Settings of a run, from its own folder alone; parts that its config files define are registered again.

    Raises:
        UserError: no such run, or a config.json that cannot be read.
    """
    path = Path(run_folder) / "config.json"
    if not path.is_file():
        runs = [folder.name for folder in Path(run_folder).parent.glob("*/")]
        raise UserError(f"there is no run at {run_folder}{did_you_mean(Path(run_folder).name, runs)}")
    sources = load_sources(path.parent / "config")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model_values, train_values = record["model_config"], record["training_config"]
        values = options_from_json(flatten(model_values, train_values))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read; restore it, or start a new run") from None
    for name, value in values.items():
        # Options of optimizers and schedules are unknown to scripts that only sample or evaluate.
        if name not in train_values.get("part_options", {}):
            check_type(name, value, str(path))
    model, train = ModelArchitectureConfig.from_dict(model_values), TrainConfig.from_dict(train_values)
    return Settings(model, train, sources, values)


# What decides the weights and the order of the data: a resumed run keeps it.
FIXED_FOR_A_RUN = (
    "eval_iters",
    "seed",
    "dataset",
    "tokenizer",
    "tokenizer_vocab_size",
    "variant",
    "objective",
    "optimizer",
    "match",
    "match_to",
)
FOR_ONE_COMMAND = (
    "resume_step",
    "auto_resume",
    "eval_only",
)  # what an earlier command of the run said is not meant for the next
LENGTHS = ("max_iters", "max_tokens", "epochs")  # giving one takes the place of the one that the run had


def has_checkpoint(values):
    """Whether the run that the settings name can be taken up again."""
    folder = Path(values.get("runs_dir", TrainConfig.runs_dir)) / (values.get("run_name") or "")
    return values.get("run_name") is not None and any(folder.glob("checkpoint-[0-9]*/metadata.json"))


def resume(arguments):
    """Settings to continue a run with: its own, under what this command line says.

    Raises:
        UserError: the command asks for another architecture, data or batch than the run has.
    """
    given = _read_values(arguments, {})[1]
    runs_dir, run_name = given.get("runs_dir", TrainConfig.runs_dir), given.get("run_name")
    if run_name is None:
        raise UserError("init_from=resume needs run_name=NAME, the run to continue")
    before = load_run(Path(runs_dir) / run_name)
    base = {**before.given, "runs_dir": runs_dir, "run_name": run_name}  # the folder may have been moved or renamed
    replaced = {*FOR_ONE_COMMAND, *(LENGTHS if set(LENGTHS) & set(given) else ())}
    settings = read_settings(arguments, base={name: value for name, value in base.items() if name not in replaced})
    old, new = before.model.to_dict(), settings.model.to_dict()
    changed = [(name, old[name], new[name]) for name in old if old[name] != new[name]]
    changed += [(name, getattr(before.train, name), getattr(settings.train, name)) for name in FIXED_FOR_A_RUN
                if getattr(before.train, name) != getattr(settings.train, name)]  # fmt: skip
    old, new = _options_of_the_objective(before.train), _options_of_the_objective(settings.train)
    changed += [(name, old[name], new.get(name)) for name in old if old[name] != new.get(name)]
    if before.train.sequences_per_step != settings.train.sequences_per_step:
        name = "batch_size x gradient_accumulation_steps"
        changed.append((name, before.train.sequences_per_step, settings.train.sequences_per_step))
    if changed:
        name, was, now = changed[0]
        raise UserError(
            f"run '{run_name}' was made with {name}={was!r} and this command says {now!r}; drop it, or start a new run"
        )
    sources = before.sources + [source for source in settings.sources if source not in before.sources]
    return dataclasses.replace(settings, sources=sources)


def _options_of_the_objective(config):
    """{option: value} of what the loss is: a resumed run keeps it."""
    part = ALL_REGISTRIES.get("objective", {}).get(config.objective)
    return vars(config.options_for(part))


# ---- help ------------------------------------------------------------------------------------------------------------


def help_text(usage, *own):
    """Every setting with its default and its reason, under the headings of the dataclasses, a script's `own` first."""
    lines = [textwrap.dedent(usage).strip(), ""]
    for config in (*own, ModelArchitectureConfig, TrainConfig):
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        for heading, name, reason in _commented_fields(inspect.getsource(config)):
            if heading:
                lines.append(f"\n{heading}")
            elif name in defaults and name != "part_options":
                lines.append(_help_line(name, defaults[name], reason))
    lines.append("\noptions of single parts")
    for name, declared in sorted(registered_options().items()):
        owners = ", ".join(sorted({option.part for option in declared}))
        lines.append(_help_line(name, declared[0].default, f"{_option_reason(name)} [{owners}]".strip()))
    return "\n".join(lines)


def _help_line(name, default, reason):
    setting = f"  --{name}={default}"
    return f"{setting:<38} {reason}"


def _commented_fields(source):
    """Yield (heading, None, None) and (None, field, reason) from a dataclass's source."""
    for line in source.splitlines():
        heading = re.match(r"\s+# -- (.*)", line)
        declared = re.match(r"\s+(\w+)\s*:[^#]*=[^#]*(?:#\s*(.*))?$", line)
        if heading:
            yield heading[1], None, None
        elif declared:
            yield None, declared[1], declared[2] or ""


def _option_reason(option):
    for registry in ALL_REGISTRIES.values():
        for part in registry.values():
            if option in options_of(part):
                reason = _reason_in_source(part, option)
                if reason:
                    return reason
    return ""


def _reason_in_source(part, option):
    for base in getattr(part, "__mro__", ()):
        try:
            source = inspect.getsource(base) if "Options" in vars(base) else ""
        except (OSError, TypeError):
            continue
        for _, name, reason in _commented_fields(source):
            if name == option:
                return reason
    return ""
