"""eval_prompts.py: the two scores, and every prompt file that ships."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval_matching
from eval_prompts import (
    Decoding,
    Prompt,
    PromptResult,
    breakdown,
    load_prompts,
    run_prompts,
    totals,
    wilson,
)
from model_builder import ConfigurableGPT
from training_tokenizers import TOKENIZER_REGISTRY
from user_errors import UserError

FILES = sorted((Path(__file__).resolve().parents[1] / "eval").glob("prompts_*.json"))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_comes_after_the_stop_does_not_count():
    prompt = Prompt("a", "b", ("cat",), stop=".")
    assert prompt.passes("a cat. A dog") and not prompt.passes("a dog. A cat")


def test_there_are_enough_prompts():
    counts = {path.stem: len(load_prompts(path).prompts) for path in FILES}
    assert counts["prompts_tinystories"] >= 120 and counts["prompts_code"] >= 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_prompt_file_that_ships(path):
    prompts = load_prompts(path).prompts  # ids, regexes, answers that pass and wrong ones that do not
    assert {prompt.difficulty for prompt in prompts} == {"easy", "medium", "hard"}
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        text = prompt.prompt
        assert text == text.rstrip() or text.rstrip(" ").endswith("\n"), f"{prompt.id} ends with a space"
        candidates = prompt.candidates + prompt.wrong_answers
        assert len(set(candidates)) == len(candidates) and prompt.wrong_answers, prompt.id
        ends = (text + prompt.join)[-1:] + " "
        for answer in candidates:  # words are not glued together by the join, nor torn apart
            glued = ends[0].isalnum() and answer[:1].isalnum()
            assert not glued, f"{prompt.id}: {text[-20:] + prompt.join + answer}"


def test_no_two_shipped_prompts_are_alike_but_for_a_name():
    """Words that begin in lower case decide: two prompts share at most four fifths of them."""
    for path in FILES:
        bags = [(p.id, Counter(w for w in p.prompt.split() if not w[:1].isupper())) for p in load_prompts(path).prompts]
        for index, (name, bag) in enumerate(bags):
            for other, other_bag in bags[:index]:
                shared, most = sum((bag & other_bag).values()), max(sum(bag.values()), sum(other_bag.values()))
                assert most < 6 or shared <= 0.8 * most, (name, other)


def write(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


GOOD = {"id": "p1", "prompt": "one, two,", "answers": ["three"]}


@pytest.mark.parametrize("content, words", [
    ("{", ["is not JSON"]),
    ([], ["holds no prompts"]),
    ({"prompts": []}, ["holds no prompts"]),
    ({"prompts": ["a"]}, ["entry 1", "must be an object"]),
    ({"prompts": [GOOD, {"prompt": "a"}]}, ["entry 2", "has no id"]),
    ({"prompts": [{**GOOD, "answers": []}]}, ["prompt 'p1' has no answers"]),
    ({"prompts": [{**GOOD, "answers": [" "]}]}, ["prompt 'p1'", '" " among its answers', "not empty"]),
    ({"prompts": [{**GOOD, "answers": "three"}]}, ["prompt 'p1'", "answers=", "must be a list of texts"]),
    ({"prompts": [{**GOOD, "score": True}]}, ["prompt 'p1'", "score=true", "must be a number"]),
    ({"prompts": [{**GOOD, "answers": [3]}]}, ["prompt 'p1'", "3 among its answers", "must be a text"]),
    ({"prompts": [{**GOOD, "case_sensitive": 1}]}, ["case_sensitive=1", "must be true or false"]),
    ({"prompts": [{**GOOD, "score": -1}]}, ["prompt 'p1'", "score=-1"]),
    ({"prompts": [{**GOOD, "match": "contain"}]}, ["prompt 'p1'", "match='contain'", "did you mean 'contains'"]),
    ({"prompts": [{**GOOD, "match": "fuzzy"}]}, ["match='fuzzy'", "contains, prefix, exact, regex"]),
    ({"prompts": [{**GOOD, "match": "regex", "answers": ["(a"]}]}, ["prompt 'p1'", "'(a'", "does not compile"]),
    ({"prompts": [{**GOOD, "match": "regex", "answers": ["a{99999999999}"]}]}, ["prompt 'p1'", "does not compile"]),
    ({"prompts": [{**GOOD, "anwers": ["a"]}]}, ["prompt 'p1'", "'anwers'", "did you mean 'answers'"]),
    ({"prompts": [{**GOOD, "stop": "r"}]}, ["prompt 'p1'", "own answer 'three'"]),
    ({"prompts": [{**GOOD, "wrong_answers": ["three"]}]}, ["prompt 'p1'", "wrong answer 'three'"]),
    ({"prompts": [GOOD, GOOD]}, ["prompt 'p1' is there twice"]),
], ids=str)  # fmt: skip
def test_a_malformed_file_costs_one_sentence(tmp_path, content, words):
    with pytest.raises(UserError) as sentence:
        load_prompts(write(tmp_path, content))
    assert all(word in str(sentence.value) for word in words), sentence.value


def test_a_regex_without_end_is_refused_by_the_name_of_its_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_matching, "SECONDS", 0.5)
    entry = {**GOOD, "id": "slow", "match": "regex", "answers": ["three", r"^(\w+\s?)*$"], "examples": ["three "]}
    with pytest.raises(UserError, match=r"prompt 'slow': the regex '.*' was not done after 0.5 s; let it match"):
        load_prompts(write(tmp_path, {"prompts": [GOOD, entry]}))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "none.json")


def test_defaults_stand_under_what_an_entry_says(tmp_path):
    entries = [GOOD, {**GOOD, "id": "p2", "match": "exact"}]
    content = {"defaults": {"match": "prefix", "stop": "."}, "prompts": entries}
    first, second = load_prompts(write(tmp_path, content)).prompts
    assert (first.match, second.match, first.stop, first.score) == ("prefix", "exact", ".", 1.0)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["attention", "mamba", "lstm"])
def model(request, tiny):
    encoding = "rope" if request.param == "attention" else "none"
    config = tiny(block_pattern=request.param, position_encoding=encoding, vocab_size=256, block_size=64)
    return ConfigurableGPT(config, seed=3)


TOKENIZER = TOKENIZER_REGISTRY["byte"].learn()
PROMPTS = (
    Prompt("a", "The cat sat on", ("the mat", "a mat"), "x", "easy", 2.0, wrong_answers=("the sky", "fish")),
    Prompt("b", "The dog sat on", ("the sofa",), "x", "hard", 1.0, wrong_answers=("soup",)),
    Prompt("c", "One two", ("three",), "y", "hard", 3.0),
)


def naive_log_probability(model, prompt, answer):
    """The sum over the answer's bytes of log p(byte | all before), one forward for each."""
    context, total = list((prompt.prompt).encode()), 0.0
    for byte in (prompt.join + answer).encode():
        logits = model(torch.tensor([context]))[0][0, -1].double()
        total += (logits[byte] - logits.logsumexp(0)).item()
        context.append(byte)
    return total / len((prompt.join + answer).encode())


def test_likelihoods_are_those_of_one_byte_at_a_time(model):
    model.eval()
    results = run_prompts(model, TOKENIZER, PROMPTS, Decoding(max_new_bytes=3))
    for result in results:
        for text in result.prompt.candidates + result.prompt.wrong_answers:
            expected = naive_log_probability(model, result.prompt, text)
            assert result.nats_per_byte[text] == pytest.approx(expected, abs=1e-5)


def test_what_is_written_is_what_generate_writes(model):
    model.eval()
    results = run_prompts(model, TOKENIZER, PROMPTS, Decoding(max_new_bytes=12))
    for result in results:
        ids = torch.tensor([list(result.prompt.prompt.encode())])
        out = model.generate(ids, 12, temperature=0)[0, ids.size(1) :].tolist()
        out = out[: out.index(0)] if 0 in out else out
        assert result.written == [TOKENIZER.decode(out).encode()[:12].decode(errors="ignore")]


def test_samples_depend_on_the_seed_and_not_on_the_company(model):
    decoding = Decoding(temperature=1.0, num_samples=3, max_new_bytes=8)
    together = run_prompts(model, TOKENIZER, PROMPTS, decoding)
    alone = run_prompts(model, TOKENIZER, PROMPTS[1:2], decoding)
    other = run_prompts(model, TOKENIZER, PROMPTS[1:2], replace(decoding, seed=2))
    assert together[1].written == alone[0].written != other[0].written and len(alone[0].written) == 3


def test_a_model_that_knows_the_answer_gets_the_points(tiny):
    """A constant model that always writes 'm': the head's bias decides, since its weights are 0."""
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=64, weight_tying=False))
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.head.weight.zero_()
    model.head.bias = torch.nn.Parameter(torch.zeros(256))
    model.head.bias.data[ord("m")] = 9.0
    right = Prompt("a", "x", ("mmmm",), "x", "easy", 2.0, "exact", wrong_answers=("nn",))
    wrong = Prompt("b", "x", ("nn",), "x", "hard", 3.0, "exact", wrong_answers=("mmmm",))
    results = run_prompts(model, TOKENIZER, [right, wrong], Decoding(max_new_bytes=4))
    assert [result.written for result in results] == [["mmmm"], ["mmmm"]]
    assert [result.points for result in results] == [2.0, 0.0]
    assert [result.is_chosen for result in results] == [True, False]
    numbers = totals(results)
    assert (numbers["score"], numbers["passed"], numbers["chosen"]) == (0.4, 0.5, 0.5)
    assert numbers["chosen_by_chance"] == 0.5
    assert {key: value["points"] for key, value in breakdown(results, "difficulty").items()} == {"easy": 2, "hard": 0}


def test_a_prompt_longer_than_the_context_loses_its_start(tiny):
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=16)).eval()
    long = Prompt("long", "far away and " + "x" * 30, ("mat",), wrong_answers=("sky",))
    short = replace(long, prompt=long.prompt[-12:])
    a, b = run_prompts(model, TOKENIZER, [long, short], Decoding(max_new_bytes=2))
    assert "longer than the context of 16 tokens" in a.note and not b.note
    assert a.nats_per_byte == pytest.approx(b.nats_per_byte)
    with pytest.raises(UserError, match="prompt 'long' has an answer of 21 tokens and the context is 16"):
        run_prompts(model, TOKENIZER, [replace(long, answers=("y" * 20,))], Decoding())


def test_a_character_that_the_tokenizer_lacks_fails_the_prompt(tiny):
    tokenizer = TOKENIZER_REGISTRY["char"].learn(["abc mat"])
    model = ConfigurableGPT(tiny(vocab_size=tokenizer.vocab_size))
    lacks, has = Prompt("a", "a z", ("mat",)), Prompt("b", "a b", ("mat",))
    results = run_prompts(model, tokenizer, [lacks, has], Decoding(max_new_bytes=3))
    assert "'z'" in results[0].note and not results[0].points and results[1].written
    assert (totals(results)["not_asked"], totals(results)["prompts"]) == (1, 2)


def test_the_likelihood_of_a_regex_is_of_its_examples(tiny):
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=64))
    prompt = Prompt("a", "one", (r"t\w+e",), match="regex", examples=("three",), wrong_answers=("four",))
    plain = replace(prompt, examples=(), wrong_answers=())
    results = run_prompts(model, TOKENIZER, [prompt, plain], Decoding(max_new_bytes=2))
    assert set(results[0].nats_per_byte) == {"three", "four"} and results[0].is_chosen in (True, False)
    assert results[1].is_chosen is None and results[1].best_right is None


def test_a_regex_without_end_fails_its_prompt_alone(tiny, monkeypatch):
    monkeypatch.setattr(eval_matching, "SECONDS", 2.0)
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=64, weight_tying=False))
    with torch.no_grad():
        model.final_norm.weight.zero_()
    model.head.bias = torch.nn.Parameter(torch.zeros(256))
    model.head.bias.data[ord("m")] = 9.0  # it writes m on and on
    slow, sound = (
        Prompt(name, "x", (regex,), match="regex") for name, regex in (("slow", "(m|mm)+n"), ("sound", "m+"))
    )
    a, b = run_prompts(model, TOKENIZER, [slow, sound], Decoding(max_new_bytes=60))
    assert a.passed == 0 and "failed, for the regex '(m|mm)+n' was not done" in a.note and "(prompt 'slow')" in a.note
    assert b.passed == 1 and not b.note and totals([a, b])["cut"] == 0


def test_a_diverged_model_fails_with_a_word(tiny):
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=64))
    torch.nn.init.constant_(model.head.weight, math.nan)
    results = run_prompts(model, TOKENIZER, PROMPTS, Decoding(temperature=1.0, max_new_bytes=2))
    assert {result.note for result in results} == {"failed, for the weights are not finite"}
    numbers = totals(results)
    assert numbers["score"] == 0 and numbers["chosen"] == 0 and numbers["answer_nats_per_byte"] is None
    json.dumps(numbers, allow_nan=False)


def test_training_mode_is_as_before(model):
    model.train()
    run_prompts(model, TOKENIZER, PROMPTS[:1], Decoding(max_new_bytes=1))
    assert model.training


def test_wilson_against_published_values():
    """Newcombe (1998), table I: 81 of 263 has (0.2553, 0.3662), 0 of 20 has (0, 0.1611)."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_ties_are_not_choices():
    result = PromptResult(PROMPTS[1], nats_per_byte={"the sofa": -1.0, "soup": -1.0})
    assert result.is_chosen is False
