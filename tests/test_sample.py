"""sample.py: the same text every time it is asked the same, and a sentence where it is asked what cannot be."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import os

import pytest
import torch

import sample
import train
from training_config import TrainConfig
from training_helpers import Workshop, a_peak, book, files_in, poison, workshop
from training_place import Place, place_of_reader
from user_errors import UserError


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    """A Workshop with the run 'writer', trained until it spells some words."""
    shop = Workshop(tmp_path_factory.mktemp("trained"), book)
    shop.run(
        "--max_iters=120", "--n_embd=32", "--batch_size=8", "--eval_interval=60", "--keep_checkpoints=0", name="writer"
    )
    return shop


def write(trained, capsys, *arguments, name="writer"):
    capsys.readouterr()
    sample.main([f"--runs_dir={trained.runs}", f"--run_name={name}", "--device=cpu", "--max_new_tokens=40", *arguments])
    return capsys.readouterr().out


def test_it_writes_on_from_the_prompt_and_leaves_nothing_behind(trained, capsys):
    before = files_in(trained.runs)
    text = write(trained, capsys, "--start=the quick")
    assert text.startswith("the quick") and len(text) == len("the quick") + 40 + 1
    assert files_in(trained.runs) == before


def test_at_temperature_0_it_is_the_likeliest_text_whatever_the_seed(trained, capsys):
    texts = {write(trained, capsys, "--start=the ", "--temperature=0", f"--seed={seed}") for seed in (1, 2, 3)}
    assert len(texts) == 1
    assert texts == {write(trained, capsys, "--start=the ", "--top_k=1")}


def test_a_seed_gives_one_text_and_another_seed_another(trained, capsys):
    first, again, other = (write(trained, capsys, "--start=a", f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_several_samples_are_told_apart(trained, capsys):
    parts = write(trained, capsys, "--start=a", "--num_samples=3").split("-" * 15 + "\n")
    assert len(parts) == 3 and len(set(parts)) == 3 and all(part.startswith("a") for part in parts)


def test_a_checkpoint_is_chosen_by_its_step(trained, capsys):
    latest, last, earlier = (
        write(trained, capsys, "--start=the ", *step) for step in ((), ("--step=120",), ("--step=60",))
    )
    assert latest == last != earlier


def test_a_prompt_from_a_file(trained, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog\n", encoding="utf-8")
    text = write(trained, capsys, f"--start=FILE:{tmp_path / 'prompt.txt'}", "--temperature=0")
    assert text == write(trained, capsys, "--start=the lazy dog\n", "--temperature=0")
    assert text.startswith("the lazy dog\n")


def test_a_prompt_longer_than_the_context(trained, capsys):
    start = "the quick brown fox jumps over a lazy dog while seven wizards "
    assert write(trained, capsys, f"--start={start}").startswith(start)


def test_the_data_need_not_be_there(trained, capsys, book):
    text = write(trained, capsys, "--temperature=0")
    os.rename(book / "data", book / "away")
    os.rename(book / "book.txt", book / "gone.txt")
    try:
        assert write(trained, capsys, "--temperature=0") == text
    finally:
        os.rename(book / "away", book / "data")
        os.rename(book / "gone.txt", book / "book.txt")


def test_a_run_trained_in_half_precision_is_sampled_in_what_suits_the_device(workshop, capsys, monkeypatch):
    workshop.run("--dtype=float16", "--max_iters=2", name="half")
    places = []
    monkeypatch.setattr(sample, "place_of_reader", lambda *given: places.append(place_of_reader(*given)) or places[0])
    assert len(write(workshop, capsys, name="half")) > 10
    assert places[0].dtype == "float32"  # on a CPU, where half precision is emulated


def test_a_reader_is_one_process_however_many_trained_the_run():
    split = {"use_fsdp": True, "tensor_parallel": 2, "expert_parallel": 2, "fsdp_replicas": 2}
    place = place_of_reader(TrainConfig(gradient_accumulation_steps=8, **split), "cpu")
    assert place == Place(torch.device("cpu"), "float32", tf32=False)


# ---- what it is asked in vain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--run_name=writter"], ["there is no run at", "did you mean 'writer'"]),
    (["--run_name=nobody"], ["there is no run at"]),
    (["--run_name=runs/writer/"], ["--run_name=runs/writer/ must be the name of a folder", "such as writer"]),
    (["--run_name="], ["--run_name= must be the name of a folder"]),
    (["--run_name=writer", "--step=61"], ["no checkpoint at step 61", "60, 120"]),
    (["--run_name=writer", "--start="], ["--start is empty"]),
    (["--run_name=writer", "--start=FILE:missing.txt"], ["--start=FILE:missing.txt cannot be read", "No such file"]),
    (["--run_name=writer", "--start=FILE:"], ["--start=FILE: cannot be read"]),
    (["--run_name=writer", "--num_samples=0"], ["--num_samples=0 must be at least 1"]),
    (["--run_name=writer", "--max_new_tokens=0"], ["--max_new_tokens=0 must be at least 1"]),
    (["--run_name=writer", "--temperature=-1"], ["--temperature=-1.0 must be at least 0"]),
    (["--run_name=writer", "--temperature=nan"], ["--temperature=nan must be at least 0"]),
    (["--run_name=writer", "--top_k=0"], ["--top_k=0 must be at least 1"]),
    (["--run_name=writer", "--top_p=1.5"], ["--top_p=1.5 must lie in (0, 1]"]),
    (["--run_name=writer", "--seed=-1"], ["--seed=-1 must be at least 0"]),
    (["--run_name=writer", "--device=gpu"], ["device='gpu' is not a device"]),
    (["--run_name=writer", "--max_tokens=5"], ["--max_tokens=5", "did you mean '--max_new_tokens'"]),
    (["--run_name=writer", "--num_samples=two"], ["--num_samples", "'two'", "--help"]),
    ([], ["--run_name", "--help"]),
], ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--run") else "")  # fmt: skip
def test_a_mistake_costs_one_sentence(trained, workshop, arguments, words):
    sentence = workshop.refused(f"--runs_dir={trained.runs}", "--max_new_tokens=3", *arguments, main=sample.main)
    assert all(word in sentence for word in words), sentence


def test_a_file_that_is_no_text_is_refused(trained, workshop, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot be read"):
        sample.prompt_of(f"FILE:{tmp_path / 'binary'}")


def test_a_character_that_the_run_does_not_know_is_named(workshop):
    workshop.run("--tokenizer=char", "--max_iters=1", name="letters")
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", "--run_name=letters", "--start=naïve", main=sample.main)
    assert "'ï'" in sentence


def test_a_run_that_fills_gaps_is_refused_with_what_can_be_done_instead(workshop, capsys):
    workshop.run("--arch_preset=bert", "--objective=masked_lm", "--max_iters=2", "--sample_tokens=20", name="filler")
    assert "no sample: with causal=False a model fills gaps" in capsys.readouterr().out
    assert not (workshop.runs / "filler" / "sample.txt").exists()
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", "--run_name=filler", main=sample.main)
    assert "run 'filler' has causal=False and objective='masked_lm'" in sentence
    advice = sentence.partition("train.py ")[2].split()
    assert advice == ["--init_from=resume", "--run_name=filler", "--eval_only"]
    train.main([*advice, f"--runs_dir={workshop.runs}"])
    assert "pseudo_perplexity" in capsys.readouterr().out


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json does not describe a tokenizer"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
    (lambda folder: (folder / "checkpoint-2" / "model.safetensors").write_bytes(b""), ["is damaged", "--step=1"]),
    (lambda folder: flip(folder / "checkpoint-2" / "model.safetensors"), ["does not match its checksum", "--step=1"]),
], ids=["no-tokenizer", "half-a-tokenizer", "half-a-config", "empty-weights", "flipped-weights"])  # fmt: skip
def test_a_damaged_run_costs_one_sentence(workshop, damage, words):
    folder = workshop.run("--max_iters=2", "--checkpoint_interval=1", name="damaged")
    damage(folder)
    sentence = workshop.refused(f"--runs_dir={workshop.runs}", "--run_name=damaged", main=sample.main)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "how", [("--temperature=0",), ("--temperature=1", "--top_k=3"), ("--top_p=0.5",)], ids=" ".join
)
@pytest.mark.parametrize("value", [float("nan"), 3e38])  # the second makes infinite logits of finite weights
def test_a_model_that_diverged_costs_one_sentence(workshop, how, value):
    folder = workshop.run("--max_iters=2", name="diverged")
    poison(folder, 2, value=value)
    arguments = [f"--runs_dir={workshop.runs}", "--run_name=diverged", "--device=cpu", "--max_new_tokens=9", *how]
    sentence = workshop.refused(*arguments, main=sample.main)
    assert "logits are not finite" in sentence and "earlier checkpoint" in sentence
