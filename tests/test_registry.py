"""Parts by name: a name has one meaning, a miss says what exists, options are settings by being registered."""

import pytest
import torch.nn as nn

from registry import (
    ALL_REGISTRIES,
    CONFIG_FILE_MODULE,
    PartOption,
    Registry,
    options_from_json,
    options_of,
    registered_options,
)
from user_errors import UserError, did_you_mean, exit_on_user_error, nearest


@pytest.fixture
def hats():
    registry = Registry("hat")

    @registry("bowler")
    class Bowler: ...

    @registry("fedora")
    class Fedora: ...

    return registry


def test_the_decorator_returns_the_class_and_registers_it(hats):
    class Beret: ...

    assert hats("beret")(Beret) is Beret
    assert hats["beret"] is Beret
    assert list(hats) == ["bowler", "fedora", "beret"]
    assert ALL_REGISTRIES["hat"] is hats


def test_assignment_registers_too_and_twice_the_same_is_no_duplicate(hats):
    hats["top"] = nn.Identity
    hats["top"] = nn.Identity
    assert hats["top"] is nn.Identity


@pytest.mark.parametrize("again", [lambda r, c: r("bowler")(c), lambda r, c: r.__setitem__("bowler", c)],
                         ids=["decorator", "assignment"])  # fmt: skip
def test_a_duplicate_is_refused_and_changes_nothing(hats, again):
    first = hats["bowler"]
    with pytest.raises(UserError, match="hat 'bowler' is already registered"):
        again(hats, nn.Identity)
    assert hats["bowler"] is first


def test_a_part_of_a_config_file_may_be_defined_anew_by_the_next_one(hats):
    def part():
        return type("Mine", (), {"__module__": CONFIG_FILE_MODULE})

    hats["mine"] = part()
    hats["mine"] = second = part()
    assert hats["mine"] is second
    with pytest.raises(UserError, match="already registered"):
        hats["bowler"] = part()


def test_a_miss_names_the_nearest_and_all_that_exist(hats):
    with pytest.raises(UserError, match=r"^hat='bowlr' does not exist; did you mean 'bowler'\? \(known: bowler, f"):
        hats["bowlr"]
    with pytest.raises(UserError, match=r"hat='xyz' does not exist \(known"):
        hats["xyz"]
    assert "bowlr" not in hats and hats.get("bowlr") is None


def test_options_are_typed_defaults_inherited_and_overridden():
    class Base:
        class Options:
            width: int = 3
            _private: int = 4
            name = "untyped"

    class Derived(Base):
        class Options(Base.Options):
            width: int = 5
            depth: int | None = None

    assert options_of(Base, "base") == {
        "width": PartOption("base", "model", 3, int), "name": PartOption("base", "model", "untyped", str),
    }  # fmt: skip
    derived = options_of(Derived)
    assert list(derived) == ["width", "name", "depth"]
    assert derived["width"].default == 5 and derived["depth"].type == int | None
    assert options_of(len) == {}


def test_two_parts_may_share_an_option_each_with_its_default(hats):
    @hats("tall")
    class Tall:
        class Options:
            height: float = 2.0

    @hats("flat")
    class Flat:
        class Options:
            height: float = 0.1

    assert [(o.part, o.default) for o in registered_options()["height"]] == [("tall", 2.0), ("flat", 0.1)]


def test_options_say_which_config_they_belong_to():
    assert {option.of for option in registered_options()["sliding_window"]} == {"model"}
    assert {option.of for option in registered_options()["muon_momentum"]} == {"train"}


def test_json_lists_come_back_as_tuples():
    assert options_from_json({"a": [1, 2], "b": "x"}) == {"a": (1, 2), "b": "x"}


# ---- a user's mistake -----------------------------------------------------------------------------------------------


def test_nearest_is_close_or_nothing():
    assert nearest("n_layr", ["n_head", "n_layer"]) == "n_layer"
    assert nearest("zzz", ["n_head"]) is None
    assert did_you_mean("zzz", ["n_head"]) == ""


@pytest.mark.parametrize("error, code, said", [
    (UserError("do this"), 2, "error: do this\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
], ids=["mistake", "ctrl-c"])  # fmt: skip
def test_a_users_mistake_costs_one_sentence(capsys, error, code, said):
    @exit_on_user_error
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_traceback():
    @exit_on_user_error
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()
