"""Parts are chosen by name; a name has one meaning.

    NORM_REGISTRY = Registry('normalization')

    @NORM_REGISTRY('rmsnorm')
    class RMSNorm(nn.Module): ...

    NORM_REGISTRY['rmsnorm']        # the class; a miss names the nearest and lists what exists

A part may declare options of its own: an inner `class Options:` with typed defaults. Being registered makes them
settings (`--d_state=32`), so that adding a part edits no list anywhere.
"""

import functools
import typing
from dataclasses import dataclass
from typing import Any

from user_errors import UserError, did_you_mean

# A class defined in a config file carries this as its `__module__`. The next config file may define the same name again
# (two runs that are compared often do); nothing may take the name of a part that ships.
CONFIG_FILE_MODULE = "nanoarch_config_file"

ALL_REGISTRIES = {}


class Registry(dict):
    """A dict from name to part that refuses duplicates and answers a miss with the nearest name.

    Args:
        setting: the setting whose value is a name of this registry, e.g. 'normalization'.
        of: 'model' or 'train': the config that the options of these parts belong to.
    """

    def __init__(self, setting, of="model"):
        super().__init__()
        self.setting = setting
        self.of = of
        ALL_REGISTRIES[setting] = self

    def __call__(self, name):
        """Decorator: `@REGISTRY('name')` registers the class or function below it and returns it unchanged."""

        def register(part):
            self[name] = part
            return part

        return register

    def __setitem__(self, name, part):
        taken = name in self and self[name] is not part
        if taken and getattr(self[name], "__module__", None) != CONFIG_FILE_MODULE:
            raise UserError(f"{self.setting} '{name}' is already registered; give the new part another name")
        super().__setitem__(name, part)

    def __missing__(self, name):
        known = ", ".join(sorted(self))
        raise UserError(f"{self.setting}={name!r} does not exist{did_you_mean(name, self)} (known: {known})")


@dataclass(frozen=True)
class PartOption:
    """One option that a part declares: `d_state: int = 16` in its `class Options:`."""

    part: str  # the registered name of the part that declares it
    of: str  # 'model' or 'train': the config that carries it
    default: Any
    type: Any  # the annotation, or the type of the default where there is none


@functools.cache  # asked for with every value on a command line
def type_hints_of(declared):
    """{name: type} of a class; a file may hold them as strings."""
    return typing.get_type_hints(declared)


def options_of(part, part_name="", of="model"):
    """{option: PartOption} that a part declares in its inner `class Options:`, inherited ones included."""
    options = {}
    for base in reversed(getattr(part, "__mro__", ())):
        declared = vars(base).get("Options")
        if declared is None:
            continue
        annotations = type_hints_of(declared)
        for name, default in vars(declared).items():
            if not name.startswith("_"):
                options[name] = PartOption(part_name, of, default, annotations.get(name, type(default)))
    return options


def options_from_json(values):
    """Options as they were before JSON, which has lists for tuples; an option is never a list."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def registered_options():
    """{option: [PartOption, ...]} over every registry; two parts may share a name, each with a default of its own."""
    table = {}
    for registry in ALL_REGISTRIES.values():
        for part_name, part in registry.items():
            for name, option in options_of(part, part_name, registry.of).items():
                table.setdefault(name, []).append(option)
    return table
