"""Records: what a line may say, what is written, and how a batch of whole records is padded, ordered and counted."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

import training_corpora
import training_games
from model_config import IGNORE_INDEX
from test_training_games import SMALL
from training_config import TrainConfig
from training_data import BatchStream, Dataset, Prefetcher, ValidationSet, load_dataset
from training_helpers import write_games
from training_prepare import prepare, prepare_from_command_line, summary_of
from training_records import write_records
from user_errors import UserError


def config(tmp_path, **changes):
    return TrainConfig(dataset="games", data_dir=str(tmp_path / "data"), **changes)


@pytest.fixture
def lines(tmp_path):
    return write_games(tmp_path / "mine.jsonl", 60)


@pytest.fixture
def dataset(tmp_path, lines):
    return load_dataset(config(tmp_path, input=str(tmp_path / "mine.jsonl")), quiet=True)


# ---- from lines to a folder ------------------------------------------------------------------------------------------


def test_a_folder_holds_what_the_lines_say(tmp_path, lines, dataset):
    assert dataset.folder == tmp_path / "data" / "games-mine" and dataset.has_outcomes
    assert dataset.vocab_size == 69 and dataset.tokenizer_name == "unknown tokenizer"
    for split, kept in (("train", lambda i: i % 10 != 9), ("val", lambda i: i % 10 == 9)):
        records, chosen = getattr(dataset, split), [line for i, line in enumerate(lines) if kept(i)]
        assert len(records) == sum(len(line["tokens"]) for line in chosen) == dataset.n_tokens(split)
        for number, line in enumerate(chosen):
            first, end = records.span(number)
            assert records[first:end].tolist() == line["tokens"]
            assert records.chances[first:end] == pytest.approx(line["chances"])
            assert records.index["outcome"][number] == line["outcome"]
            assert lines[records.index["line"][number] - 1] == line
    assert sorted(path.name for path in dataset.folder.iterdir()) == sorted(
        ["meta.json", *(f"{split}{what}.bin" for split in ("train", "val") for what in ("", "_records", "_chances"))]
    )
    train = [line["chances"][:-1] for i, line in enumerate(lines) if i % 10 != 9]
    bits = [-sum(x * np.log(x) for x in (p, 1 - p)) for each in train for p in each]
    assert f"wp_loss {np.mean(bits):.4f} at best" in summary_of(dataset.folder)
    assert "54 documents" in summary_of(dataset.folder) and "outcome 1 in" in summary_of(dataset.folder)


def test_empty_lines_are_passed_over_and_chances_may_be_missing(tmp_path):
    texts = [json.dumps({"tokens": [1, 2, i % 5], "outcome": i % 2}) for i in range(20)]
    (tmp_path / "plain.jsonl").write_text("\n\n".join(texts) + "\n\n", encoding="utf-8")
    dataset = load_dataset(config(tmp_path, input=str(tmp_path / "plain.jsonl")), quiet=True)
    assert dataset.train.chances is None and dataset.train.index["line"].tolist()[:3] == [1, 3, 5]
    stream = BatchStream(dataset, 4, 18, seed=0)
    batch, numbers = stream.batches(0)[0], [i for i in range(20) if i % 10 != 9]
    assert "chances" not in batch
    assert batch["outcomes"].tolist() == [numbers[start] % 2 for start in stream.window_starts(0)]


LINE = {"tokens": [1, 5, 2], "outcome": 1}
MISTAKES = {
    "json": ("{'tokens': [1, 2]}", "is not JSON"),
    "list": ("[1, 2]", 'must be {"tokens": [...], "outcome": 0 or 1}'),
    "no outcome": ('{"tokens": [1, 2]}', 'must be {"tokens": [...], "outcome": 0 or 1}'),
    "one token": (json.dumps({**LINE, "tokens": [1]}), "list of two or more whole numbers"),
    "fraction": (json.dumps({**LINE, "tokens": [1, 2.5]}), "list of two or more whole numbers"),
    "truth": (json.dumps({**LINE, "tokens": [1, True]}), "list of two or more whole numbers"),
    "negative": (json.dumps({**LINE, "tokens": [1, -1]}), "has token -1; tokens count from 0"),
    "overflow": (json.dumps({**LINE, "tokens": [1, 69]}), "has token 69, beyond a vocabulary of 69; mend it, or set "
                                                          "--tokenizer_vocab_size=70 or more"),
    "outcome": (json.dumps({**LINE, "outcome": 2}), '"outcome" must be 0 or 1, not 2'),
    "word": (json.dumps({**LINE, "outcome": "gold"}), '"outcome" must be 0 or 1, not "gold"'),
    "few chances": (json.dumps({**LINE, "chances": [0.5]}), '"chances" must be 3 numbers in [0, 1]'),
    "no chance": (json.dumps({**LINE, "chances": [0.5, 1.5, 1]}), '"chances" must be 3 numbers in [0, 1]'),
    "some chances": (json.dumps({**LINE, "chances": [0.5, 0.5, 1]}), 'all records have them, or none'),
}  # fmt: skip


@pytest.mark.parametrize("text, words", MISTAKES.values(), ids=MISTAKES)
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path, text, words):
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(LINE)] * 2 + [text]), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path, input=str(tmp_path / "mine.jsonl")), quiet=True)
    where = ("mine.jsonl, line 3: ", "line 3 of local file mine.jsonl is the first")
    assert str(caught.value).startswith(where) and words in str(caught.value)
    assert not (tmp_path / "data" / "games-mine").exists()


def test_a_larger_vocabulary_has_a_folder_of_its_own(tmp_path):
    rows = [{**LINE, "tokens": [1, 69, i]} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset = load_dataset(config(tmp_path, input=str(tmp_path / "mine.jsonl"), tokenizer_vocab_size=70), quiet=True)
    assert dataset.folder.name == "games-mine-vocab70" and dataset.vocab_size == 70
    with pytest.raises(UserError, match="vocab_size=69 is too small"):
        dataset.check_vocab(69)


@pytest.mark.parametrize("changes, words", [
    ({"tokenizer": "bpe"}, "dataset=games has tokens of its own; leave out tokenizer=bpe"),
    ({"tokenizer_vocab_size": 80}, "tokenizer_vocab_size=80 is for games of your own"),
    ({"variant": "tiny"}, "variant='tiny' of games does not exist"),
    ({"variant": "small", "input": "mine.jsonl"}, "variant=small is of simulated games"),
    ({"input": "nothing.jsonl"}, "input='nothing.jsonl' does not exist"),
])  # fmt: skip
def test_choices_without_a_meaning_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path, **changes), quiet=True)
    assert words in str(caught.value)


def test_a_file_too_short_to_divide_is_refused(tmp_path):
    write_games(tmp_path / "few.jsonl", 9)
    with pytest.raises(UserError, match=r"few\.jsonl gives no records for the val split"):
        prepare(config(tmp_path, input=str(tmp_path / "few.jsonl")), quiet=True)


@pytest.mark.parametrize("name", ["train.bin", "train_records.bin", "val_chances.bin"])
def test_a_changed_file_is_refused(tmp_path, dataset, name):
    folder = shutil.copytree(dataset.folder, tmp_path / "copy")  # the other's files are mapped
    raw = bytearray((folder / name).read_bytes())
    raw[0] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(UserError, match=f"{name} has a wrong checksum"):
        Dataset(folder)
    (folder / name).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes where meta.json says"):
        Dataset(folder)


def test_outcomes_are_part_of_the_fingerprint(tmp_path, lines, dataset):
    changed = [{**line, "outcome": 1 - line["outcome"]} if i == 3 else line for i, line in enumerate(lines)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, changed)), encoding="utf-8")
    other = load_dataset(config(tmp_path, input=str(tmp_path / "other.jsonl")), quiet=True)
    assert other.fingerprint != dataset.fingerprint
    assert other.meta["splits"]["train"]["sha256"] == dataset.meta["splits"]["train"]["sha256"]


def test_simulated_games_come_with_their_chances(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_games, "simulate", functools.partial(training_games.simulate, rules=SMALL))
    monkeypatch.setattr(training_corpora.Games, "n_games", {"small": {"train": 25, "val": 5}, "full": {}})
    monkeypatch.setattr(training_corpora.Games, "games_at_once", 10)
    prepare_from_command_line("games", "about", [f"--data_dir={tmp_path}", "--check"])
    assert "train" in capsys.readouterr().out
    dataset = Dataset(tmp_path / "games")
    first = training_games.simulate(10, (0, 10))[3]  # the fourteenth, of the second lot
    start, end = dataset.train.span(13)
    assert dataset.train[start:end].tolist() == first.tokens.tolist()
    assert dataset.train.chances[start:end].tolist() == first.chances.tolist()
    assert len(dataset.train.index) == 25 and len(dataset.val.index) == 5
    assert dataset.meta["token_names"][1] == "start" and dataset.meta["variant"] == "small"
    again = load_dataset(TrainConfig(dataset="games", data_dir=str(tmp_path)), quiet=True)
    assert again.fingerprint == dataset.fingerprint


def test_what_ends_early_leaves_no_files(tmp_path):
    def breaking():
        yield training_corpora.Record("train", 1, np.array([1, 2]), 1, None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path, breaking(), 69, {"source": "here"})
    assert list(tmp_path.iterdir()) == []


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_row_is_a_whole_record_and_padding(dataset):
    stream = BatchStream(dataset, 16, 6, seed=3)
    batch = stream.batches(1)[0]
    for row, number in enumerate(stream.window_starts(1)):
        first, end = dataset.train.span(number)
        tokens, n = dataset.train[first:end].tolist(), end - first - 1
        assert batch["inputs"][row].tolist() == tokens[:-1] + [0] * (16 - n)
        assert batch["targets"][row].tolist() == tokens[1:] + [IGNORE_INDEX] * (16 - n)
        assert batch["chances"][row, :n].tolist() == dataset.train.chances[first : end - 1].tolist()
        assert batch["outcomes"][row] == dataset.train.index["outcome"][number]
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
    assert shapes == {
        "inputs": ((6, 16), torch.int64), "targets": ((6, 16), torch.int64), "chances": ((6, 16), torch.float32),
        "outcomes": ((6,), torch.float32), "window": ((6,), torch.int64),
    }  # fmt: skip
    example = stream.example_batch(6)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in example.items()} == shapes


def test_an_epoch_reads_every_record_once(dataset):
    stream = BatchStream(dataset, 16, 9, seed=1)
    assert stream.windows_per_epoch == 54 and stream.steps_per_epoch == 6 and stream.tokens_per_epoch == 54 * 16
    epochs = [np.concatenate([stream.window_starts(step) for step in range(6 * e, 6 * e + 6)]) for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(54))] * 2 and (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 3), (2, 3), (4, 3), (3, 2)])
def test_ranks_and_micro_batches_divide_the_same_records(dataset, world_size, micro_batch_size):
    stream = BatchStream(dataset, 16, 12, seed=5)
    whole, rows = stream.batches(2)[0], [None] * (12 // micro_batch_size)
    for rank in range(world_size):
        for k, batch in enumerate(stream.batches(2, rank, world_size, micro_batch_size)):
            rows[k * world_size + rank] = batch
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([batch[name] for batch in rows]), tensor)


def test_the_hash_names_records_and_their_order(dataset):
    one, same, other = (BatchStream(dataset, 16, 6, seed) for seed in (0, 0, 1))
    assert one.hash_after(3, one.initial_hash) == same.hash_after(3) != other.hash_after(3)
    assert one.initial_hash != BatchStream(dataset, 32, 6, 0).initial_hash
    with Prefetcher(one, 4, 6, depth=2) as loader:
        for step in (4, 5):
            assert torch.equal(loader.next()[0][0]["inputs"], same.batches(step)[0]["inputs"])


def test_the_validation_set_is_fixed_and_counts_no_padding(dataset):
    validation = ValidationSet(dataset, 16, 4)
    assert len(validation) == 4 and validation.starts.tolist() == [0, 1, 3, 4]
    whole = ValidationSet(dataset, 16)
    assert len(whole) == 6
    batches = [batch for rank in range(2) for batch in whole.batches(2, rank, 2)]
    supervised = sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in batches)
    assert supervised == len(dataset.val) - 6 < whole.n_tokens == 96
    assert all("chances" in batch for batch in batches) and np.isnan(whole.n_bytes)


def test_a_record_longer_than_the_block_is_named(tmp_path, lines, dataset):
    longest = max((line for i, line in enumerate(lines) if i % 10 != 9), key=lambda line: len(line["tokens"]))
    T = len(longest["tokens"]) - 1
    BatchStream(dataset, T, 2, 0)
    with pytest.raises(UserError) as caught:
        BatchStream(dataset, T - 1, 2, 0)
    assert f"line {lines.index(longest) + 1} of local file mine.jsonl, has {T + 1} tokens" in str(caught.value)
    assert f"block_size={T - 1} holds {T}; set --block_size={T} or more" in str(caught.value)
