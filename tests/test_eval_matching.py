"""eval_matching.py: what counts as an answer, and that no pattern makes it wait."""

import re
from dataclasses import replace

import pytest

import eval_matching
from eval_matching import MATCHES, TooSlowError, is_match, tedious, trouble_with
from eval_prompts import Prompt


@pytest.mark.parametrize("match, answer, text, passes", [
    ("contains", "he", " then the hen ran", False),  # inside longer words
    ("contains", "he", " and HE ran", True),
    ("contains", "ice cream", "cold ice cream!", True),
    ("contains", "(", "f(x)", True),
    ("contains", "4", "14", False),
    ("prefix", "four", "  four legs", True),
    ("prefix", "four", "fourteen legs", False),
    ("prefix", "four", "it has four legs", False),
    ("prefix", "):", "):\n    pass", True),
    ("exact", "four", " four \nlegs", True),
    ("exact", "four", "four legs", False),
    ("regex", r"f\w+r$", "it is four", True),
    ("regex", r"\Af\w+r$", "it is four", False),
])  # fmt: skip
def test_what_passes(match, answer, text, passes):
    assert Prompt("a", "b", (answer,), match=match).passes(text) is passes


def test_any_answer_passes_and_case_counts_where_it_should():
    prompt = Prompt("a", "b", ("None", "True"), case_sensitive=True)
    assert prompt.passes("= True") and prompt.passes("= None") and not prompt.passes("= true")
    assert replace(prompt, case_sensitive=False).passes("= true")


def test_these_are_all_the_kinds():
    assert {*MATCHES} == {"contains", "prefix", "exact", "regex"}


ENDLESS = (r"(a+)+$", r"(a|aa)+$", r"^(\w+\s?)*$", r"(x+x+)+y|(a*)*b")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_without_end_is_stopped_and_the_next_one_is_searched_for(pattern, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(eval_matching, "SECONDS", 0.3)
        with pytest.raises(TooSlowError, match=re.escape(repr(pattern)) + " was not done after 0.3 s"):
            is_match("regex", pattern, tedious("a"))  # 2^64 steps
    assert is_match("regex", "A$", "a\nba", case_sensitive=False)
    assert not is_match("regex", "A$", "a\nba", case_sensitive=True)


@pytest.mark.parametrize(
    "pattern, text", [(r"\Aé+\Z", "éé"), (r"^b", "a\r\nb"), ("(a{1000}){1000}", "a"), ("\ud800", "x"), ("", "")]
)
def test_the_other_process_finds_what_this_one_does(pattern, text):
    assert is_match("regex", pattern, text) is bool(re.search(pattern, text, re.IGNORECASE))


def test_a_process_that_was_stopped_from_outside_is_started_again():
    assert is_match("regex", "a", "a")
    eval_matching.SEARCHER.process.kill()
    eval_matching.SEARCHER.process.wait()
    assert is_match("regex", "a", "a")


def test_what_does_not_compile():
    assert trouble_with("(a") and trouble_with("a{99999999999}") and trouble_with("(" * 5000 + ")" * 5000)
    assert trouble_with("a+") is None
