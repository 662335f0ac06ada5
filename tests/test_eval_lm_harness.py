"""eval_lm_harness.py: what a run answers the harness, and the harness itself on small tasks of our own.

The last part needs lm_eval (`pip install lm_eval`, no network); what is before it needs nothing.
"""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import json
import sys

import pytest
import torch

import compare_architectures
import evaluate
import model_interop
from eval_lm_harness import HarnessRun, ask_harness, main_metric, tables_of, task_manager, value_text, writing_of
from model_builder import ConfigurableGPT
from training_helpers import book, workshop
from training_tokenizers import TOKENIZER_REGISTRY, load_tokenizer
from user_errors import UserError

TEXT = "One day a little fish swam in the sea. The fish saw a boat, and the boat saw the fish."


@pytest.fixture(params=["attention", "mamba2", "gru"])
def run(request, tiny):
    """A HarnessRun of a model with large random weights, so that likelihoods differ, over a learned vocabulary."""
    tokenizer = TOKENIZER_REGISTRY["bpe"].learn([TEXT * 4], vocab_size=290)
    encoding = "rope" if request.param == "attention" else "none"
    config = tiny(block_pattern=request.param, position_encoding=encoding, vocab_size=290, block_size=24, init_std=0.5)
    return HarnessRun(ConfigurableGPT(config, seed=3).eval(), tokenizer)


def naive(run, ids, n):
    """(nats of the last n ids, is_greedy), one forward pass for each, over at most block_size tokens."""
    total, is_greedy = 0.0, True
    start = max(0, len(ids) - 1 - run.longest)
    for place in range(len(ids) - n, len(ids)):
        with torch.no_grad():
            logits = run.model(torch.tensor([ids[start:place]]))[0][0, -1].double()
        total += (logits[ids[place]] - logits.logsumexp(0)).item()
        is_greedy = is_greedy and int(logits.argmax()) == ids[place]
    return total, is_greedy


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_a_continuation_is_scored_token_by_token(run):
    pairs = [("One day a", " little fish"), ("The boat", " saw"), ("The boat", " swam in the sea"), ("a", "b")]
    for (context, continuation), (nats, is_greedy) in zip(pairs, run.log_probabilities(pairs), strict=True):
        ids, n = run.encode(context + continuation), len(run.encode(continuation))
        assert run.encode(context) + run.encode(continuation) == ids  # these cut cleanly
        expected, greedy = naive(run, ids, n)
        assert nats == pytest.approx(expected, abs=1e-4) and is_greedy is greedy


def test_what_is_greedy(run):
    """The model's own continuation is; another is not, and neither is one that is so only at its last token."""
    start = run.encode("One day")
    best = run.model.generate(torch.tensor([start]), 3, temperature=0)[0].tolist()
    other = [*best[:-3], (best[-3] + 1) % 256, *best[-2:]]
    (_, yes), (_, no) = run.score([(best, 3), (other, 3)])
    assert yes is True and no is False


def test_where_prompt_and_continuation_are_cut(run):
    whole = run.encode("One day a little fish")
    before = run.encode("One day a")
    assert run.encode_pair("One day a", " little fish") == (before, whole[len(before) :])
    assert run.encode_pair("One day a ", "little fish") == (before, whole[len(before) :])
    end = run.tokenizer.end_of_document_id
    assert run.encode_pair("", "fish") == ([end], run.encode("fish"))
    assert run.encode_pair("  ", "fish") == ([end], run.encode("  fish"))
    joined = run.encode_pair("The f", "ish")  # one token of both: it counts as the continuation's
    assert [len(part) > 0 for part in joined] == [True, True]


def test_no_text_before_needs_a_token_that_ends_documents(tiny):
    tokenizer = TOKENIZER_REGISTRY["char"].learn(["abc"], ends_documents=False)
    run = HarnessRun(ConfigurableGPT(tiny(vocab_size=3)).eval(), tokenizer)
    assert run.log_probabilities([("a", "bc")])
    with pytest.raises(UserError, match="tokenizer='char' has no token that ends a document"):
        run.log_probabilities([("", "bc")])
    with pytest.raises(UserError, match="the character 'z'"):
        run.log_probabilities([("a", "z")])


def test_a_long_prompt_loses_its_start_and_a_long_answer_is_refused(run):
    context, answer = TEXT, " and the end"
    ids, n = run.encode(context + answer), len(run.encode(answer))
    assert len(ids) > run.longest + 1
    (nats, _) = run.log_probabilities([(context, answer)])[0]
    assert nats == pytest.approx(naive(run, ids, n)[0], abs=1e-4)
    with pytest.raises(UserError, match=r"the answer .* of \d+ tokens, and the context is block_size=24"):
        run.log_probabilities([("a", TEXT * 2)])


def test_windows_cover_a_text_once_and_the_last_reaches_back(run):
    run.longest = 4
    windows = list(run.windows_of([*range(10)]))
    end = run.tokenizer.end_of_document_id
    assert windows == [([end, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]  # as the harness's own docs
    assert list(run.windows_of([7, 8])) == [([end, 7, 8], 2)] and list(run.windows_of([])) == []


def test_a_whole_text_is_the_sum_over_its_windows(run):
    ids, T = [run.prefix, *run.encode(TEXT)], run.longest
    assert len(ids) > T + 1
    expected = naive(run, ids[: T + 1], T)[0] + naive(run, ids, len(ids) - 1 - T)[0]
    texts = ["", TEXT, "fish"]
    nothing, long, short = run.rolling_log_probabilities(texts)
    assert nothing == 0.0 and long == pytest.approx(expected, abs=1e-3)
    assert short == pytest.approx(run.log_probabilities([("", "fish")])[0][0], abs=1e-5)


# ---- writing ---------------------------------------------------------------------------------------------------------


def greedy_text(run, context, n):
    ids = torch.tensor([run.encode(context)])
    row = run.model.generate(ids, n, temperature=0)[0, ids.size(1) :].tolist()
    end = run.tokenizer.end_of_document_id
    return run.tokenizer.decode(row[: row.index(end)] if end in row else row)


def test_what_is_written_is_what_generate_writes(run):
    contexts = ["One day", "The fish saw", "a boat", "the sea"]
    written = run.write_until([(context, {"until": [], "max_gen_toks": 6}) for context in contexts])
    assert written == [greedy_text(run, context, 6) for context in contexts]


def test_a_stop_ends_the_text_before_it(run):
    whole = greedy_text(run, "One day", 8)
    stop = whole[len(whole) // 2]
    (text,) = run.write_until([("One day", {"until": stop, "max_new_tokens": 8, "do_sample": False})])
    assert text == whole.partition(stop)[0]


def test_samples_depend_on_the_seed_and_not_on_the_company(run):
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    together = run.write_until([("One day", settings), ("The boat", settings)])
    alone = run.write_until([("One day", settings)])
    run.seed += 1
    assert alone == together[:1] != run.write_until([("One day", settings)])


def test_a_prompt_leaves_room_for_what_is_written(run):
    assert (run.room_for(4), run.room_for(24), run.room_for(1000)) == (20, 12, 12)
    (text,) = run.write_until([(TEXT, {"max_gen_toks": 20})])
    kept = run.tokenizer.decode(run.encode(TEXT)[-4:])
    assert text == greedy_text(run, kept, 20)


def test_settings_of_a_task():
    plain = {"until": [], "temperature": 0.0, "top_k": None, "top_p": None}
    assert writing_of({}) == {"n": 256, **plain}
    assert writing_of({"until": "\n", "max_new_tokens": 9})["until"] == ["\n"]
    assert writing_of({"max_gen_toks": 3, "max_tokens": 9})["n"] == 3
    assert writing_of({"do_sample": False, "temperature": 0.7}) == {"n": 256, **plain}
    assert writing_of({"do_sample": True})["temperature"] == 1.0
    assert writing_of({"num_beams": 1}) == {"n": 256, **plain}
    with pytest.raises(UserError, match="num_beams=4"):
        writing_of({"num_beams": 4})


# ---- what the harness returns ----------------------------------------------------------------------------------------


RESULTS = {
    "results": {
        "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "part": {"alias": "- part", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc_norm,none": 0.75},
        "sums": {"alias": "sums", "exact_match,strict": 0.0, "exact_match_stderr,strict": 0.0},
        "text": {"alias": "text", "word_perplexity,none": float("inf"), "word_perplexity_stderr,none": "N/A"},
    },
    "group_subtasks": {"whole": ["part"], "part": []},
    "versions": {"part": 2.0},
    "n-shot": {"part": 5},
    "n-samples": {"part": {"original": 9, "effective": 4}},
    "higher_is_better": {"part": {"acc": True, "acc_norm": True}, "text": {"word_perplexity": False}},
}


def test_the_results_as_a_table():
    tables = tables_of(RESULTS)
    assert tables["part"] == {
        "group": "whole", "version": 2.0, "n_shot": 5, "questions": 4, "main": "acc_norm",
        "metrics": {"acc": {"value": 0.25, "stderr": None, "better": "higher"},
                    "acc_norm": {"value": 0.75, "stderr": None, "better": "higher"}},
    }  # fmt: skip
    assert tables["text"]["metrics"]["word_perplexity"] == {"value": None, "stderr": None, "better": "lower"}
    assert list(tables["sums"]["metrics"]) == ["exact_match,strict"]
    assert [main_metric(tables[name]["metrics"]) for name in ("whole", "sums")] == ["acc", "exact_match,strict"]
    json.dumps(tables, allow_nan=False)


def test_numbers_as_text():
    assert value_text({"value": 0.314, "stderr": 0.005, "better": "higher"}) == "31.4% ± 0.5%"
    assert value_text({"value": 18.2, "stderr": None, "better": "lower"}) == "18.20"
    assert value_text({"value": None, "stderr": None, "better": "lower"}) == "-"


def test_without_the_package_it_costs_one_sentence(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sentence = workshop.refused("--lm_eval=piqa", main=evaluate.main)
    assert "pip install lm_eval" in sentence


@pytest.mark.parametrize("arguments, words", [
    (["--lm_eval=,"], ["--lm_eval=, names no task"]),
    (["--lm_eval=piqa", "--loss"], ["--loss and --lm_eval are different evaluations"]),
    (["--lm_eval_limit=5"], ["--lm_eval_limit=5 does nothing without --lm_eval"]),
    (["--lm_eval=piqa", "--lm_eval_shots=-1"], ["--lm_eval_shots=-1 must be at least 0"]),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_a_mistake_costs_one_sentence(workshop, arguments, words):
    sentence = workshop.refused(*arguments, main=evaluate.main)
    assert all(word in sentence for word in words), sentence


# ---- the harness itself ----------------------------------------------------------------------------------------------

TASKS = {
    "boats": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
             "doc_to_target: '{{answer}}'\nmetric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
             "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
    "books": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}} {{choices[0]}}'\n"
             "metric_list:\n- {metric: word_perplexity}\n- {metric: bits_per_byte}\n",
    "writes": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
              "generation_kwargs: {until: ['.'], max_gen_toks: 5}\n"
              "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
}  # fmt: skip
ROWS = [
    {"question": "the quick brown", "choices": ["fox jumps over", "dog"], "answer": 0},
    {"question": "seven wizards ", "choices": ["lazy", "brew", "potions in old kettles while"], "answer": 1},
    {"question": "a lazy dog while seven wizards brew potions in old", "choices": ["kettles", "the"], "answer": 0},
    {"question": "over", "choices": ["a", "jumps"], "answer": 1},
]


@pytest.fixture
def lm_eval():
    """The package, offline; the rest of the project needs none of it."""
    return pytest.importorskip("lm_eval", reason="the harness is not installed (pip install lm_eval)")


@pytest.fixture
def tasks(tmp_path, lm_eval):
    """A folder with three tasks over one small file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    where = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(where)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text + "metadata: {version: 1.0}\n", encoding="utf-8")
    return folder


def test_a_run_scores_as_its_export_does(workshop, tasks, lm_eval):
    """Every likelihood and every written text, against the harness's own class on the exported folder."""
    pytest.importorskip("accelerate", reason="the harness's class for Hugging Face models needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = workshop.run("--arch_preset=gpt2", "--tokenizer=bpe", "--tokenizer_vocab_size=300", "--block_size=24",
                          "--init_std=0.3", name="exported")  # fmt: skip
    model_interop.export_hf(folder / "checkpoint-8", workshop.folder / "hf")
    theirs = HFLM(pretrained=str(workshop.folder / "hf"), device="cpu", batch_size=3, dtype="float32")
    settings = evaluate.configurator.load_run(folder)
    model = ConfigurableGPT(settings.model)
    evaluate.checkpoint.load_model(model, folder / "checkpoint-8")
    ours = HarnessRun(model.eval(), load_tokenizer(folder))

    pairs = [(row["question"], f" {choice}") for row in ROWS for choice in row["choices"]]
    pairs += [("seven wizards ", "brew"), ("", "fox"), ("the quick brown fox " * 9, " jumps")]
    found = ours.log_probabilities(pairs)
    expected = theirs.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({nats for nats, _ in found}) > 5 and min(nats for nats, _ in found) < -2

    # No sentence twice: the harness takes two windows of the same tokens for one, whatever they are to score.
    texts = ["fox", "".join(f"the quick brown fox jumps over {n} lazy dogs " for n in range(6))]
    expected = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts],
                                            disable_tqdm=True)  # fmt: skip
    assert ours.rolling_log_probabilities(texts) == pytest.approx(expected, abs=1e-4, rel=1e-6)

    requests = [(row["question"], {"until": ["z"], "max_gen_toks": 9}) for row in ROWS]
    expected = theirs.generate_until([Instance("generate_until", {}, each, 0) for each in requests], disable_tqdm=True)
    assert ours.write_until(requests) == expected and any(expected)


def test_tasks_on_any_run_end_beside_the_loss(workshop, tasks, lm_eval, monkeypatch):
    for preset in ("llama", "gated_delta_net"):
        workshop.run(f"--arch_preset={preset}", "--tokenizer=byte", "--block_size=64", name=preset)
    names = f"--lm_eval={','.join(TASKS)}"
    workshop.printed()
    evaluate.main([f"--runs_dir={workshop.runs}", names, f"--lm_eval_tasks={tasks}", "--device=cpu",
                   f"--out_dir={workshop.folder / 'out'}"])  # fmt: skip
    printed = workshop.printed()
    assert "boats acc_norm" in printed and "writes exact_match" in printed and "books bits_per_byte" in printed
    assert sorted(path.name for path in (workshop.folder / "out").iterdir()) == [
        "breakdown.png", "lm_eval_results.csv", "summary_table.md"]  # fmt: skip
    with open(workshop.folder / "out" / "lm_eval_results.csv", encoding="utf-8", newline="") as file:
        rows = {(row["run"], row["task"], row["metric"]): row for row in csv.DictReader(file)}
    (record,) = [json.loads(line) for line in (workshop.runs / "llama" / "evals.jsonl").read_text("utf-8").splitlines()]
    assert record["kind"] == "lm_eval" and record["tasks"]["boats"]["questions"] == len(ROWS)
    acc = record["tasks"]["boats"]["metrics"]["acc"]
    assert acc["value"] == float(rows["llama", "boats", "acc"]["value"]) and acc["value"] * 4 == int(acc["value"] * 4)
    assert record["tasks"]["books"]["metrics"]["bits_per_byte"]["value"] > 1


def test_a_task_that_is_not_there_or_has_no_data(tasks, lm_eval):
    with pytest.raises(UserError, match="--lm_eval=boots is no task of the harness; did you mean 'bo"):
        task_manager(["boots"], tasks)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"--lm_eval=boats could not be loaded \("):
        task_manager(["boats"], tasks)
    with pytest.raises(UserError, match=r"--lm_eval_tasks=.* is not a folder"):
        task_manager(["boats"], tasks / "none")


def test_weights_that_are_not_finite_are_told(workshop, tasks, lm_eval, tiny):
    task = evaluate.HarnessTask(["boats"], tasks)
    model = ConfigurableGPT(tiny(vocab_size=256, block_size=64))
    torch.nn.init.constant_(model.head.weight, float("nan"))
    tables = task.ask(model, TOKENIZER_REGISTRY["byte"].learn(), lambda done: None)
    assert (
        tables == {} and task.notes(tables) and task.cells(tables) == ["-"] and task.write([({}, tables)], tasks) == []
    )
