"""eval_probes.py: answers follow from the prompt, chance is exact, examples are a pure function of their number."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import csv
import doctest
import json
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch

import compare_architectures
import configurator
import eval_probes
import eval_probing
import evaluate
import train
from comparison_runs import find_runs
from eval_probes import Draws, composition_table, make_probe
from eval_probing import answers_of, ask_probe, read_probe
from model_builder import ConfigurableGPT
from model_config import IGNORE_INDEX
from training_config import TrainConfig
from training_corpora import PROBE_REGISTRY
from training_data import BatchStream, ValidationSet, load_dataset
from training_helpers import Workshop, a_peak, book, read_json, rows, steps_of_checkpoints, summary, workshop
from training_objectives import OBJECTIVE_REGISTRY, validation_scores
from training_place import find_place
from user_errors import UserError

# Small enough to read by eye; each probe's own options and a window that leaves it room.
SMALL = {
    "mqar": ({"n_pairs": 3, "n_keys": 5, "n_values": 4}, 14),
    "induction": ({"n_symbols": 4}, 9),
    "copying": ({"n_copied": 3, "n_symbols": 4}, 9),
    "selective_copying": ({"n_copied": 3, "n_symbols": 4}, 9),
    "needle": ({"n_needles": 2, "n_keys": 3, "n_values": 4}, 10),
    "parity": ({}, 7),
    "permutations": ({"n_objects": 3}, 7),
    "modular_addition": ({"modulus": 5, "n_terms": 3}, 11),
}


def examples(name, n=2000, split="train", block_size=None, **options):
    """(probe, inputs, targets) of n small examples."""
    small, T = SMALL[name]
    probe = make_probe(name, **{**small, **options})
    inputs, targets = probe.examples(Draws(split, np.arange(n)), block_size or T)
    return probe, inputs, targets


def test_every_probe_is_tried():
    assert SMALL.keys() == PROBE_REGISTRY.keys()


def test_the_examples_in_the_docstrings_are_what_is_printed():
    assert doctest.testmod(eval_probes).failed == 0
    assert all(">>> show(" in part.__doc__ for part in PROBE_REGISTRY.values())


# ---- the answers follow from the prompt ------------------------------------------------------------------------------
# Each solver reads the prompt up to and with token t alone, and knows the rules as a person would be told them.


def recall(prompt, keys, values):
    """The value that first stood behind the last token, a key."""
    found = [b for a, b in pairwise(prompt) if a == prompt[-1] and b in values]
    assert prompt[-1] in keys and len(set(found)) == 1
    return found[0]


def solve_mqar(prompt, o):
    if len(prompt) <= 2 * o.n_pairs or prompt[-1] == 0:
        return None
    return recall(prompt, range(1, 1 + o.n_keys), range(1 + o.n_keys, 1 + o.n_keys + o.n_values))


def solve_needle(prompt, o):
    if prompt.count(prompt[-1]) < 2 or prompt[-1] >= o.n_keys:
        return None
    return recall(prompt, range(o.n_keys), range(o.n_keys, o.n_keys + o.n_values))


def solve_induction(prompt, o):
    return prompt[prompt.index(0) + 1] if prompt[-1] == 0 and prompt.count(0) == 2 else None


def solve_copying(prompt, o):
    return [token for token in prompt if token > 1][prompt.count(1) - 1] if prompt[-1] == 1 else None


def solve_permutations(prompt, o):
    """Move things about, one token after the other, and look up how they stand."""
    every, things = list(permutations(range(o.n_objects))), list(range(o.n_objects))
    for token in prompt:
        things = [every[token][place] for place in things]
    return every.index(tuple(things))


def solve_modular_addition(prompt, o):
    if len(prompt) % (o.n_terms + 1) or prompt[-1] != o.modulus:
        return None
    return sum(prompt[-1 - o.n_terms : -1]) % o.modulus


SOLVERS = {
    "mqar": solve_mqar,
    "needle": solve_needle,
    "induction": solve_induction,
    "copying": solve_copying,
    "selective_copying": solve_copying,
    "parity": lambda prompt, o: sum(prompt) % 2,
    "permutations": solve_permutations,
    "modular_addition": solve_modular_addition,
}


@pytest.mark.parametrize("name", SMALL)
def test_the_answer_follows_from_what_was_read_and_is_due_nowhere_else(name):
    probe, inputs, targets = examples(name, n=100)
    assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (100, SMALL[name][1])
    for row, due in zip(inputs.tolist(), targets.tolist(), strict=True):
        solved = [SOLVERS[name](row[: t + 1], probe.options) for t in range(len(row))]
        assert [IGNORE_INDEX if answer is None else answer for answer in solved] == due
    assert inputs.min() >= 0 and inputs.max() < probe.vocab_size
    assert set(np.unique(targets)) - {IGNORE_INDEX} == set(probe.answers)


@pytest.mark.parametrize("name", ["mqar", "needle"])
def test_keys_of_an_example_are_distinct(name):
    probe, inputs, _ = examples(name, n=200)
    o = probe.options
    keys = range(1, 1 + o.n_keys) if name == "mqar" else range(o.n_keys)
    for row in inputs.tolist():
        said = [token for token in row if token in keys]
        n = len(said) - len(set(said))
        assert n == (o.n_pairs if name == "mqar" else 1)  # those that are asked


@pytest.mark.parametrize("name, every, due", [("parity", 3, [2, 5]), ("permutations", 7, [6])])
def test_a_state_may_be_asked_for_now_and_then(name, every, due):
    _, _, dense = examples(name, n=5)
    _, _, targets = examples(name, n=5, answer_every=every)
    assert np.flatnonzero((targets != IGNORE_INDEX).all(0)).tolist() == due
    assert (targets == IGNORE_INDEX).sum() == 5 * (7 - len(due)) and (targets[:, due] == dense[:, due]).all()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_permutations_form_the_group(n):
    table, order = composition_table(n), range(len(composition_table(n)))
    assert all(table[0, a] == a == table[a, 0] for a in order)
    assert all(sorted(table[a]) == list(order) for a in order)
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in product(order, repeat=3))
    assert (table != table.T).any() == (n > 2)  # whether the order of two moves matters


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_chance_by_enumeration_of_every_prompt():
    """Of a uniform prompt, each answer is right equally often: no fixed guess beats 1 in as many as there are."""
    for name, prompts, probe in (
        ("parity", product(range(2), repeat=5), make_probe("parity")),
        ("permutations", product(range(6), repeat=3), make_probe("permutations", n_objects=3)),
        ("modular_addition", ((*terms, 5) for terms in product(range(5), repeat=2)),
         make_probe("modular_addition", modulus=5)),
        ("copying", ((*symbols, 1) for symbols in product(range(2, 5), repeat=3)), make_probe("copying", n_symbols=3)),
        ("induction", ((a, 0, b, c, 0) for a, b, c in product(range(1, 5), repeat=3)),
         make_probe("induction", n_symbols=4)),
    ):  # fmt: skip
        answers = [SOLVERS[name](list(prompt), probe.options) for prompt in prompts]
        counts = [answers.count(answer) for answer in probe.answers]
        assert sum(counts) == len(answers) and max(counts) / len(answers) == probe.chance


@pytest.mark.parametrize("name", SMALL)
def test_no_fixed_guess_at_any_place_beats_chance(name):
    n = 20_000
    probe, _, targets = examples(name, n=n)
    assert probe.chance == 1 / len(probe.answers)
    for t in range(targets.shape[1]):
        due = targets[:, t][targets[:, t] != IGNORE_INDEX]
        if len(due):
            shares = np.array([(due == answer).mean() for answer in probe.answers])
            spread = np.sqrt(probe.chance * (1 - probe.chance) / len(due))
            assert np.abs(shares - probe.chance).max() < 5 * spread


def test_chances_are_those_of_the_sizes():
    sizes = {"mqar": 64, "induction": 16, "copying": 16, "needle": 64, "parity": 2, "permutations": 120,
             "modular_addition": 97}  # fmt: skip
    assert all(make_probe(name).chance == 1 / size for name, size in sizes.items())


def test_who_knows_the_values_but_not_whose_is_right_once_in_n_pairs():
    probe, inputs, targets = examples("mqar", n=20_000)
    first = inputs[:, 1:2]  # the value of the first pair
    due = targets != IGNORE_INDEX
    assert (np.broadcast_to(first, due.shape)[due] == targets[due]).mean() == 1 / probe.options.n_pairs


def test_questions_may_be_more_than_pairs_and_repeat():
    probe, inputs, targets = examples("mqar", n=500, n_questions=8)
    assert ((targets != IGNORE_INDEX).sum(1) == 8).all() and probe.least_length == 14
    for row, due in zip(inputs.tolist(), targets.tolist(), strict=True):
        solved = [solve_mqar(row[: t + 1], probe.options) for t in range(len(row))]
        assert [IGNORE_INDEX if answer is None else answer for answer in solved] == due


# ---- a pure function of (seed, step) ---------------------------------------------------------------------------------


def stream_of(name, seed=1, sequences=6, **options):
    dataset = make_probe(name, **{**SMALL[name][0], **options})
    return BatchStream(dataset, SMALL[name][1], sequences, seed)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_is_a_pure_function_of_the_seed_and_its_number(name):
    stream, again = stream_of(name), stream_of(name)
    later = again.batches(5)[0]
    for step in (0, 5):
        whole = stream.batches(step)[0]
        parts = [stream.batches(step, rank, 2, 3)[0] for rank in range(2)]
        for key in ("inputs", "targets", "window"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert all(torch.equal(whole[key], later[key]) for key in whole)
    other = stream_of(name, seed=2)
    assert not torch.equal(other.batches(5)[0]["inputs"], whole["inputs"])
    assert stream.hash_after(0) == again.hash_after(0) != other.hash_after(0)


@pytest.mark.parametrize("name", SMALL)
def test_splits_and_examples_differ(name):
    (_, train_inputs, _), (_, val_inputs, _) = examples(name, n=50), examples(name, n=50, split="val")
    assert (train_inputs != val_inputs).any() and len(np.unique(train_inputs, axis=0)) > 25


def test_the_numbers_are_fixed_for_good():
    """Another machine, another numpy: the same examples. These were printed when the probe was written."""
    draws = Draws("train", [0, 1])
    assert draws.noise("a", 2).tolist() == [
        [11894090684062299942, 5017988766686980605], [13677851139321548405, 13560004418655459841],
    ]  # fmt: skip


def test_draws_are_uniform_and_independent():
    draws = Draws("val", np.arange(30_000))
    a, b = (draws.below(what, 3, 1)[:, 0] for what in "ab")
    joint = np.bincount(3 * a + b, minlength=9) / len(a)
    assert np.abs(joint - 1 / 9).max() < 5 * np.sqrt(8 / 81 / len(a))
    order = draws.distinct("c", 3, 3)
    assert (np.sort(order, axis=1) == np.arange(3)).all()
    shares = np.bincount(order @ [9, 3, 1])
    assert np.abs(shares[shares > 0] / len(a) - 1 / 6).max() < 5 * np.sqrt(5 / 36 / len(a)) and (shares > 0).sum() == 6


def test_the_fingerprint_is_the_difficulty_and_not_where_a_run_ends():
    one = make_probe("mqar", n_pairs=8)
    assert one.fingerprint == make_probe("mqar", n_pairs=8, solved_at=1.0).fingerprint
    assert len({one.fingerprint, make_probe("mqar").fingerprint, make_probe("needle").fingerprint}) == 3
    assert (one.name, make_probe("mqar").name) == ("mqar+n_pairs=8", "mqar")
    assert one.summary() == "mqar+n_pairs=8: answers are right by chance in 1.56%"


def test_validation_is_a_fixed_set_of_whole_examples():
    dataset = make_probe("induction")
    validation = ValidationSet(dataset, 16, 8)
    first, second = (list(validation.batches(3)) for _ in range(2))
    assert all(torch.equal(a["targets"], b["targets"]) for a, b in zip(first, second, strict=True))
    due = torch.cat([batch["targets"] for batch in first]) != IGNORE_INDEX
    assert due.sum() == 8 and due[:, -1].sum() == 8  # the row that fills the last batch up has none


# ---- as a dataset of train.py ----------------------------------------------------------------------------------------


def probe_run(workshop, *arguments, name):
    """A run of train.py on a probe; its folder."""
    command = [argument for argument in workshop.command(*arguments, name=name) if "--input" not in argument]
    train.main([argument for argument in command if argument != "--dataset=text"])
    return workshop.runs / name


ECHO = ("--dataset=modular_addition", "--modulus=2", "--n_terms=1", "--position_encoding=rope", "--batch_size=64",
        "--learning_rate=0.01", "--eval_interval=20", "--eval_iters=1")  # fmt: skip


def test_a_run_ends_when_the_probe_is_solved_and_a_table_shows_it(workshop, monkeypatch):
    folder = probe_run(workshop, *ECHO, "--max_iters=300", name="solved")
    done, evaluations = summary(folder), rows(folder, "eval")
    assert done["status"] == "finished" and done["steps"] < 300 and done["answer_accuracy"] >= 0.99
    assert all(row["answer_accuracy"] < 0.99 for row in evaluations[:-1]) and len(evaluations) > 1
    assert steps_of_checkpoints(folder)[-1] == done["steps"]
    printed = workshop.printed()
    assert f"solved at step {done['steps']} of 300" in printed and "answer_accuracy" in printed
    workshop.resume(folder)
    assert summary(folder)["steps"] == done["steps"]  # there is still no more to learn
    record = read_json(folder / "config.json")["dataset"]
    assert (record["name"], record["chance"]) == ("modular_addition+modulus=2+n_terms=1", 0.5)
    assert record["probe"] == {"modulus": 2, "n_terms": 1}
    (run,), _ = find_runs(str(workshop.runs), ["solved"])
    assert run.values["answer_accuracy"] == done["answer_accuracy"]
    monkeypatch.setenv("COLUMNS", "200")
    compare_architectures.main(
        ["--runs_dir", str(workshop.runs), "--no_plots", "--out_dir", str(workshop.folder / "c")]
    )
    shown = workshop.printed()
    assert f"{100 * done['answer_accuracy']:.1f}%" in shown and "chance 50%" in shown


def test_above_one_a_run_goes_on_to_its_end():
    scores = {"answer_accuracy": 0.995}
    assert make_probe("parity").is_solved(scores) and not make_probe("parity", solved_at=0.999).is_solved(scores)
    assert not make_probe("parity", solved_at=1.1).is_solved({"answer_accuracy": 1.0})


MINE = """
from eval_probes import PROBE_REGISTRY, Probe


@PROBE_REGISTRY("echo")
class Echo(Probe):
    class Options:
        n_echoes: int = 3

    def set_up(self, o):
        self.vocab_size, self.answers, self.least_length = o.n_echoes, range(o.n_echoes), 1

    def examples(self, draws, T):
        inputs = draws.below("symbols", self.vocab_size, T)
        return inputs, inputs.copy()


dataset = "echo"
"""


def test_a_config_file_may_define_a_probe(tmp_path):
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    settings = configurator.read_settings([str(tmp_path / "mine.py"), "--n_echoes=5"])
    dataset = load_dataset(settings.train)
    assert (dataset.name, dataset.vocab_size, dataset.chance) == ("echo+n_echoes=5", 5, 0.2)
    batch = BatchStream(dataset, 4, 2, seed=1).batches(0)[0]
    assert torch.equal(batch["inputs"], batch["targets"]) and batch["inputs"].shape == (2, 4)


def test_accuracy_is_counted_over_the_answers_alone(tiny):
    config = TrainConfig(dataset="needle", device="cpu", part_options={"n_keys": 3, "n_values": 4, "n_needles": 2})
    dataset = load_dataset(config)
    model = ConfigurableGPT(tiny(vocab_size=dataset.vocab_size, block_size=10), seed=3)
    validation = ValidationSet(dataset, 10, 64)
    objective = OBJECTIVE_REGISTRY["causal_lm"](model, config)
    scores = validation_scores(objective, validation, 24, find_place(config))
    batch = validation.windows_at(np.arange(64))
    said = model.eval()(batch["inputs"])[0].argmax(-1)
    due = batch["targets"] != IGNORE_INDEX
    assert due.sum() == 64 and scores["answer_accuracy"] == ((said == batch["targets"]) & due).sum().item() / 64
    assert scores["bits_per_byte"] is None


def test_text_has_no_answers(tiny):
    model = ConfigurableGPT(tiny(), seed=3)
    objective = OBJECTIVE_REGISTRY["causal_lm"](model, TrainConfig())
    batch = {"inputs": torch.zeros(1, 4, dtype=torch.int64), "targets": torch.zeros(1, 4, dtype=torch.int64)}
    assert "correct" not in objective.eval()(batch)


@pytest.mark.slow
def test_attention_learns_to_recall_in_seconds(workshop):
    folder = probe_run(
        workshop, "--dataset=mqar", "--n_pairs=2", "--n_keys=8", "--n_values=8", "--arch_preset=llama", "--n_layer=2",
        "--n_head=1", "--n_embd=32", "--block_size=12", "--batch_size=64", "--max_iters=3000", "--learning_rate=3e-3",
        "--eval_interval=100", "--log_interval=500", name="recall",
    )  # fmt: skip
    assert summary(folder)["answer_accuracy"] >= 0.99


# ---- asking runs that are there --------------------------------------------------------------------------------------


class Copier(torch.nn.Module):
    """A model that knows one thing: what stood behind the last token when it stood there first."""

    def __init__(self, vocab_size, config, position_embedding=None):
        super().__init__()
        self.head, self.config = torch.nn.Linear(1, vocab_size), config
        self.position_embedding = position_embedding

    def context_limit(self):
        return None

    def hidden_states(self, idx, places):
        T = idx.size(1)
        earlier = (idx[:, :, None] == idx[:, None, :]) & (torch.arange(T)[:, None] > torch.arange(T)[None, :])
        first = earlier.float().argmax(-1)  # (B, T)
        return torch.where(earlier.any(-1), idx.gather(1, (first + 1).clamp(max=T - 1)), 0).gather(1, places)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden, self.head.out_features).float()


@pytest.mark.parametrize("name", [name for name, part in PROBE_REGISTRY.items() if part.is_zero_shot])
def test_who_looks_up_what_stood_behind_solves_recall_without_training(name, tiny):
    probe = make_probe(name)
    for own, vocab_size in ((None, 300), (probe, probe.vocab_size)):
        result = ask_probe(Copier(vocab_size, tiny(block_size=24)), read_probe(name), 50, vocab_size, own)
        assert result.accuracy == 1.0 and result.is_zero_shot == (own is None)
        assert result.answers.sum() == 50 * (4 if name == "mqar" else 1) and len(result.answers) == 24


def test_zero_shot_an_untrained_model_is_at_chance(tiny):
    model = ConfigurableGPT(tiny(vocab_size=64), seed=3)
    result = ask_probe(model, read_probe("induction+n_symbols=4"), 2000, 64)
    assert abs(result.accuracy - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_zero_shot_only_what_may_be_an_answer_counts(tiny):
    """Token 0 is the likeliest everywhere; of the answers' tokens it is the one with the highest logit that is said."""

    class Fixed(Copier):
        def logits(self, hidden):
            return -torch.arange(5.0).expand(*hidden.shape, 5)

    symbols = np.array([[0, 4, 2, 3]])  # symbols 1 to 3 are answers
    said = answers_of(Fixed(5, tiny()), torch.tensor([[0, 4]]), torch.tensor([[True, True]]), symbols, range(1, 4))
    assert said.tolist() == [[2, 2]]


@pytest.mark.parametrize("is_zero_shot", [True, False])
def test_reading_only_the_places_that_are_due_changes_no_answer(tiny, monkeypatch, is_zero_shot):
    """Held to the logits of every place at once, in rows that do not all have as many answers."""
    monkeypatch.setattr(eval_probing, "HEAD_TOKENS", 7)  # does not divide the number of answers
    torch.manual_seed(0)
    model = ConfigurableGPT(tiny(vocab_size=50), seed=3).eval()
    inputs, is_due = torch.randint(50, (5, 16)), torch.rand(5, 16) < 0.3
    is_due[4] = False
    symbols = np.stack([np.random.default_rng(row).permutation(50)[:9] for row in range(5)]) if is_zero_shot else None
    with torch.no_grad():
        logits = model.logits(model.hidden_states(inputs))  # (B, T, V)
    if is_zero_shot:
        of_answers = torch.stack([logits[row][:, symbols[row, 2:8]] for row in range(5)])  # (B, T, A)
        expected = 2 + of_answers.argmax(-1)
    else:
        expected = logits.argmax(-1)
    whole, read = model.logits, []
    monkeypatch.setattr(model, "logits", lambda hidden: read.append(len(hidden)) or whole(hidden))
    said = answers_of(model, inputs, is_due, symbols, range(2, 8))
    assert max(read) <= 7 and sum(read) == 5 * is_due.sum(1).max() < inputs.numel()
    assert is_due.sum(1).unique().numel() > 2 and expected[is_due].unique().numel() > 2
    assert np.array_equal(said, torch.where(is_due, expected, -1).numpy())


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    """A folder of two runs of a step, of text and of parity."""
    shop = Workshop(tmp_path_factory.mktemp("trained"), book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "hardware_peak", a_peak)
        shop.run("--max_iters=1", name="text")
        probe_run(shop, "--dataset=parity", "--position_encoding=rope", "--max_iters=1", name="parity")
    return shop.runs


@pytest.fixture
def asked(trained, workshop):
    """evaluate.py on these runs: a function that gives the folder that it wrote and what it printed."""

    def ask(*arguments):
        evaluate.main(["--runs_dir", str(trained), "--device=cpu", "--out_dir", str(workshop.folder / "asked"),
                       "--probe_examples=20", *arguments])  # fmt: skip
        return workshop.folder / "asked", workshop.printed()

    return ask


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_asks_probes_and_keeps_what_it_found(trained, asked):
    folder, printed = asked(
        "--run_names", "text", "--probes", "induction+n_symbols=4", "mqar+n_pairs=2+n_values=4+n_keys=4"
    )
    assert "induction+n_symbols=4 (25.0%)" in printed and "zero-shot" in printed
    found = [(row["probe"], row["answers"], float(row["chance"])) for row in table(folder / "probes.csv")]
    assert found == [("induction+n_symbols=4", "20", 0.25), ("mqar+n_pairs=2+n_values=4+n_keys=4", "40", 0.25)]
    line = json.loads((trained / "text" / "evals.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert line["kind"] == "probes" and line["examples"] == 20 and line["probes"][0]["zero_shot"] is True
    names = {path.name for path in folder.iterdir()}
    assert names == {"probes.csv", "probe_places.csv", "summary_table.md", "breakdown.png"}


def test_a_trained_run_is_asked_at_another_length(asked):
    folder, _ = asked("--run_names", "parity", "--probes", "parity", "parity+block_size=40", "--no_plots")
    places = [(row["probe"], row["places"], int(row["answers"])) for row in table(folder / "probe_places.csv")]
    shared = [("1", 20), ("2-3", 40), ("4-7", 80)]
    assert places == [("parity", *each) for each in [*shared, ("8-15", 160), ("16", 20)]] + [
        ("parity+block_size=40", *each) for each in [*shared, ("8-15", 160), ("16-31", 320), ("32-40", 180)]
    ]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--dataset=mqarr"], ("dataset='mqarr' does not exist", "mqar")),
    (["--dataset=mqar", "--n_pairs=0"], ("n_pairs=0 must be at least 1 in dataset='mqar'",)),
    (["--dataset=mqar", "--n_questions=0"], ("n_questions=0 must be at least 1",)),
    (["--dataset=mqar", "--n_pairs=70"], ("n_keys=64 is too few", "n_pairs=70")),
    (["--dataset=mqar", "--n_pairs=8"], ("block_size=16 is too short", "24 tokens", "n_pairs=8")),
    (["--dataset=needle", "--n_needles=70"], ("n_keys=64 is too few", "n_needles=70")),
    (["--dataset=permutations", "--n_objects=9"], ("n_objects=9 would make 362,880 tokens",)),
    (["--dataset=modular_addition", "--modulus=1000000"], ("1,000,001 symbols", "modulus=1000000")),
    (["--dataset=parity", "--answer_every=17"], ("block_size=16 is too short", "answer_every=17")),
    (["--dataset=parity", "--solved_at=0"], ("solved_at=0.0 must be above 0",)),
    (["--dataset=parity", "--tokenizer=gpt2"], ("tokenizer='gpt2' is for text", "dataset='parity' is a probe")),
    (["--dataset=parity", "--arch_preset=bert", "--objective=masked_lm"], ("objective='masked_lm'", "is a probe")),
    (["--dataset=parity", "--vocab_size=1"], ("vocab_size=1 is too small",)),
], ids=lambda value: " ".join(map(str, value)))  # fmt: skip
def test_a_mistake_in_a_probe_costs_a_sentence(workshop, arguments, words):
    command = [a for a in workshop.command() if not a.startswith(("--input", "--dataset"))]
    sentence = workshop.refused(*command, *arguments)
    assert all(word in sentence for word in words), sentence
    assert not workshop.runs.exists() or not list(workshop.runs.iterdir())


@pytest.mark.parametrize("arguments, words", [
    (["--probes", "indction"], ("'indction' does not exist", "induction")),
    (["--probes", "mqar+n_symbols=3"], ("'n_symbols=3' is no option of mqar", "n_pairs")),
    (["--probes", "mqar+n_pairs=two"], ("n_pairs", "int")),
    (["--probes", "mqar+block_size=0"], ("block_size=0 must be at least 1",)),
    (["--probes", "mqar", "--loss"], ("--loss and --probes",)),
    (["--probes", "mqar", "--probe_examples=0"], ("--probe_examples=0 must be at least 1",)),
    (["--probes", "parity", "--run_names", "text"], ("trained on it", "--dataset=parity")),
    (["--probes", "induction", "--run_names", "parity"], ("other symbols than dataset 'parity'",)),
    (["--probes", "mqar+n_values=400", "--run_names", "text"], ("has 465 symbols", "vocabulary")),
    (["--probes", "induction+block_size=64", "--run_names", "text"], ("block_size=64", "no positions beyond 16")),
    (["--loss", "--run_names", "parity"], ("was trained on the probe 'parity'",)),
], ids=lambda value: " ".join(map(str, value)))  # fmt: skip
def test_a_mistake_in_asking_costs_a_sentence(trained, workshop, arguments, words):
    sentence = workshop.refused("--runs_dir", trained, "--device=cpu", "--out_dir", workshop.folder / "o",
                                *arguments, main=evaluate.main)  # fmt: skip
    assert all(word in sentence for word in words), sentence
