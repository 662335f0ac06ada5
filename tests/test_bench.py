"""bench.py: the command line, the arithmetic, the file that results are merged into, peers at our shapes."""

import json
import sys
import types

import pytest
import torch

import bench
import bench_parts
import training_place
from bench_cases import Candidate, Case, Job, Workers, _make, case_key, interleaved, kernel_check, peers_beside, timed
from bench_peers import PEERS, find_peers
from bench_record import aligned, load, merged, number, quantile, ratio, save, slug, spread
from training_place import find_place
from user_errors import UserError

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--vocab_size=31",
        "--device=cpu", "--threads=1", "--compile=False"]  # fmt: skip


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_quartiles_lie_in_a_straight_line_between_neighbours():
    assert quantile([4, 1, 3, 2], 0.5) == 2.5 and quantile([7], 0.25) == 7
    assert spread([5, 1, 2, 3, 4]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}


def test_a_ratio_is_of_medians_and_its_spread_is_round_by_round():
    # The second round was twice as slow for both: the ratios know nothing of it.
    assert ratio([20, 10, 22], [10, 5, 11]) == {"ratio": 2.0, "q1": 2.0, "q3": 2.0, "n": 3}
    assert ratio([30, 10], [10, 10]) == {"ratio": 2.0, "q1": 1.5, "q3": 2.5, "n": 2}


def test_numbers_and_columns():
    assert [number(x) for x in (None, 0.12345, 12.3, 2383.4)] == ["-", "0.123", "12.3", "2,383"]
    assert aligned([["case", "n"], ["ab", "1,000"]]) == ["case      n", "-----------", "ab    1,000"]
    assert slug("AMD EPYC 7B13 (64-Core)") == "amd_epyc_7b13_64_core"


def test_turns_are_taken_and_the_progress_ends_at_one():
    order, done = [], []
    results = interleaved({name: (lambda name=name: order.append(name) or len(order)) for name in "ab"}, 3,
                          progress=done.append)  # fmt: skip
    assert order == [*"ababab"] and results == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert done[-1] == 1.0 and done == sorted(done)


def test_seconds_take_the_place_of_rounds():
    assert len(interleaved({"a": timed(lambda: None)}, repeats=50, seconds=1e-9)["a"]) == 3


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_result_replaces_its_own_section_alone(tmp_path):
    path = tmp_path / "deep" / "cpu.json"
    save(path, "cpu", {"cases": {"a": {"training": 1, "decode": 2}, "b": {"training": 3}}, "parts": {"gelu": {"x": 1}}})
    save(path, "cpu", {"cases": {"a": {"training": 4}, "c": {"training": 5}}, "parts": {"norm": {"x": 2}}})
    assert load(path, "cpu") == {
        "format": 1, "device": "cpu", "parts": {"gelu": {"x": 1}, "norm": {"x": 2}},
        "cases": {"a": {"training": 4, "decode": 2}, "b": {"training": 3}, "c": {"training": 5}},
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]


def test_merging_changes_neither_side():
    old, new = {"cases": {"a": {"x": 1}}, "parts": {}}, {"cases": {"a": {"y": 2}}}
    assert merged(old, new)["cases"] == {"a": {"x": 1, "y": 2}}
    assert old == {"cases": {"a": {"x": 1}}, "parts": {}} and new == {"cases": {"a": {"y": 2}}}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "device": "another"}', '{"format": 9, "device": "cpu"}'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "cpu.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"no record of 'cpu'.*out_dir"):
        save(path, "cpu", {"cases": {}})
    assert path.read_text(encoding="utf-8") == text


# ---- the command line ------------------------------------------------------------------------------------------------


def test_each_file_is_a_case_and_plus_joins():
    config, cases = bench.read_command(
        ["config/arch_llama.py", "--n_layer=2", "config/arch_mamba2.py+d_state=64+n_layer=3", "--repeats", "7",
         "--parts", "--batch_size", "4"]
    )  # fmt: skip
    assert (config.repeats, config.parts) == (7, True)
    assert [case.label for case in cases] == ["llama", "mamba2+d_state=64+n_layer=3"]
    llama, mamba2 = (case.settings() for case in cases)
    assert (llama.model.n_layer, mamba2.model.n_layer) == (2, 3) and mamba2.model.part_options == {"d_state": 64}
    assert {s.train.batch_size for s in (llama, mamba2)} == {4} and llama.model.vocab_size == 512


def test_files_joined_are_one_case():
    case = bench.read_command(["config/arch_gpt2.py+config/size_10M.py"])[1][0]
    assert case.label == "gpt2+size_10M" and case.settings().model.n_embd == 384 and case.has_files
    assert bench.read_command([])[1] == [Case("default", ())]


def test_the_name_of_a_result_says_what_changes_it():
    def key(*arguments):
        case = bench.read_command(["config/arch_llama.py", *TINY, *arguments])[1][0]
        return case_key(case, case.settings(), Candidate(case.settings(), find_place(case.settings().train)))

    first = key()
    assert first == (
        "llama, 1 x 16, vocabulary 31, batch 2 x 16, float32, compile off, 1 thread(s), n_head=2, nanoArch"
    )
    others = ["--n_layer=2", "--n_kv_head=1", "--batch_size=3", "--normalization=layernorm"]
    assert len({first, *map(key, others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repaets=3"], "'repaets' is not a setting; did you mean 'repeats'"),
        (["--repeats=many"], "repeats='many' is a str, and must be an int"),
        (["--repeats=0"], "repeats=0 must be at least 1"),
        (["--seconds=-1.0"], "seconds=-1.0 must be above 0"),
        (["--contexts=512,long"], "contexts='512,long' must be numbers of tokens"),
        (["--decode_contexts=512,long"], "decode_contexts='512,long' must be numbers of tokens"),
        (["--decode_contexts=512,256"], "the last 256 tokens of a context are decoded (4 x decode_tokens=64), and 256"),
        (["--decode_contexts=512", "--decode_tokens=0"], "decode_contexts='512' needs decode_tokens above 0"),
        (["--parts=rmsnrom"], "'rmsnrom' is no part; did you mean 'rmsnorm'"),
        (["--peers=transformer"], "'transformer' is no peer; did you mean 'transformers'"),
        (["--peers=nanogpt"], "nanogpt:PATH needs the path of a nanoGPT checkout"),
        (["--peers=transformers:here"], "takes no path"),
        (["config/arch_lama.py"], "does not exist; did you mean 'config/arch_llama.py'"),
        (["config/arch_llama.py", "config/arch_llama.py"], "case 'llama' is given twice"),
        (["config/arch_llama.py+n_layer=0"], "n_layer=0 must be at least 1"),
        (["config/arch_llama.py+d_stat=4"], "'d_stat' is not a setting; did you mean 'd_state'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_a_sentence_and_exit_code_2(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bench.main([f"--out_dir={tmp_path}", "--device=cpu", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    with pytest.raises(UserError, match=r"peers=mambapy needs the package.*pip install mambapy"):
        find_peers("mambapy")


def test_help_lists_the_settings_of_both(capsys):
    bench.main(["--help"])
    text = capsys.readouterr().out
    assert "--repeats=10" in text and "--n_layer=4" in text and "in turn" in text


def test_no_setting_of_the_benchmark_has_the_name_of_another():
    import configurator

    assert not set(bench.BenchConfig.__annotations__) & set(configurator.setting_types())


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "program"),
    [("gpt2", "GPT2"), ("llama", "Llama"), ("mamba", "Mamba"), ("mamba2", "Mamba2")],
)
def test_transformers_has_the_parameters_of_ours(file, program, transformers):
    case = bench.read_command([f"config/arch_{file}.py", *TINY])[1][0]
    settings, (peer,) = case.settings(), find_peers("transformers")
    place = find_place(settings.train)
    ours, theirs = Candidate(settings, place), Candidate(settings, place, peer)
    assert (ours.name, theirs.name) == ("nanoArch", f"transformers {program}")
    assert ours.n_parameters == theirs.n_parameters
    for candidate in (ours, theirs):
        before = [parameter.detach().clone() for parameter in candidate.parameters]
        candidate.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, candidate.parameters, strict=True))
        candidate.decode(3)


def test_a_peer_without_the_architecture_is_left_out(transformers):
    peers = find_peers("transformers")
    assert peers_beside(Case("lstm", ("config/arch_lstm.py", *TINY)), peers) == []
    assert peers_beside(Case("mamba2", ("config/arch_mamba2.py", *TINY)), peers) == peers


def test_a_checkout_of_nanogpt_stands_beside_gpt2_alone(tmp_path):
    (tmp_path / "model.py").write_text(A_NANOGPT, encoding="utf-8")
    (peer,) = find_peers(f"nanogpt:{tmp_path}")
    gpt2 = Case("gpt2", ("config/arch_gpt2.py", *TINY))
    assert peers_beside(gpt2, [peer]) == [peer]
    assert peers_beside(Case("llama", ("config/arch_llama.py", *TINY)), [peer]) == []
    candidate = Candidate(gpt2.settings(), find_place(gpt2.settings().train), peer)
    candidate.step()
    assert candidate.name == "nanoGPT" and candidate.n_parameters == 31 * 16
    assert isinstance(candidate.optimizers[0], torch.optim.SGD)  # its own


A_NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.embedding(idx) @ self.embedding.weight.t()
        return logits, nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""


# ---- measuring -------------------------------------------------------------------------------------------------------


class InProcess:
    """Workers without processes: the same candidates, the same answers."""

    def __init__(self, jobs, progress=None):
        self.jobs = jobs

    def __enter__(self):
        return [self.worker(job) for job in self.jobs]

    def __exit__(self, *_):
        pass

    @staticmethod
    def worker(job):
        candidate, about = _make(job)
        return types.SimpleNamespace(
            job=job, about=about, step=timed(candidate.step), forward_backward=timed(candidate.forward_backward_alone),
            decode=lambda n: timed(lambda: candidate.decode(n))(), read_prompt=candidate.read_prompt,
            decode_on=lambda n: timed(lambda: candidate.decode_on(n))(),
        )  # fmt: skip


@pytest.fixture
def bench_here(tmp_path, monkeypatch, capsys):
    """Run bench.py with tiny models in this process: (its record, what it printed)."""
    monkeypatch.setattr(training_place, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench, "measured_peak", lambda device, precision, seconds: 1e9)
    for module in (bench, bench_parts):
        monkeypatch.setattr(module, "Workers", InProcess)

    def run(*arguments):
        bench.main([*arguments, *TINY, "--repeats=2", f"--out_dir={tmp_path}"])
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def test_a_benchmark_leaves_a_table_and_its_whole_story(bench_here, tmp_path, transformers):
    record, printed = bench_here("config/arch_llama.py", "--peers=transformers", "--decode_tokens=2")
    (ours,) = (case for case in record["cases"].values() if case["program"] == "nanoArch")
    (theirs,) = (case for case in record["cases"].values() if case["program"] == "transformers Llama")
    assert ours["training"]["tokens_per_second"]["n"] == 2 and ours["training"]["tokens_per_second"]["median"] > 0
    share = ours["flops_per_token_training"] * ours["training"]["tokens_per_second"]["median"] / 1e9
    assert ours["training"]["share_of_ceiling"] == pytest.approx(share)
    faster = ours["training"]["tokens_per_second"]["median"] / theirs["training"]["tokens_per_second"]["median"]
    assert theirs["training"]["nanoarch_is_times_as_fast"]["ratio"] == pytest.approx(faster)
    assert ours["decode"]["tokens_per_second"]["n"] == 3 and "peak_bytes" in ours["memory"]
    for section in ("training", "decode", "memory"):
        assert {"date", "command", "versions", "git", "threads"} <= ours[section].keys()
    assert "transformers Llama" in printed and f"{ours['parameters']:,}" in printed and "1.00 GFLOP/s" not in printed


def test_contexts_are_added_to_the_same_case(bench_here):
    bench_here("config/arch_gru.py", "--decode_tokens=0")
    record, printed = bench_here("config/arch_gru.py", "--decode_tokens=0", "--contexts=8,32")
    (case,) = record["cases"].values()
    assert {"training", "contexts", "program"} <= case.keys() and "decode" not in case
    assert case["contexts"]["tokens_in_a_batch"] == {"8": 32, "32": 32} and "T = 32" in printed
    cost = case["contexts"]["seconds_per_token"]
    assert case["contexts"]["last_to_first"]["ratio"] == pytest.approx(cost["32"]["median"] / cost["8"]["median"])


def test_decoding_at_contexts_keeps_the_state_of_each(bench_here):
    arguments = ("--decode_tokens=1", "--decode_contexts=8,32", "--repeats=1")
    record, printed = bench_here("config/arch_gpt2.py", *arguments)
    (case,) = record["cases"].values()
    decoded = case["decode_contexts"]
    assert decoded["state_bytes"] == {"8": 2 * 8 * 16 * 4, "32": 2 * 32 * 16 * 4}  # keys and values, float32
    assert decoded["tokens_per_second"]["32"]["n"] == 3 and "T = 32" in printed and "(4 KiB)" in printed


def test_decoding_goes_on_from_what_was_read():
    """The tokens decoded at a context are those that generate writes behind the same prompt."""
    for arch in ("gpt2", "gru"):
        case = bench.read_command([f"config/arch_{arch}.py", *TINY])[1][0]
        candidate = Candidate(case.settings(), find_place(case.settings().train), sequences=1)
        candidate.read_prompt(4)
        said = [candidate.next_token]
        for _ in range(3):
            candidate.decode_on(1)
            said.append(candidate.next_token)
        prompt = candidate.batch["inputs"][:1, :-4]
        assert torch.equal(torch.cat([prompt, *said], dim=1), candidate.model.generate(prompt, 4, temperature=0))


def test_contexts_with_as_many_sequences(bench_here):
    record, _ = bench_here("config/arch_gru.py", "--decode_tokens=0", "--contexts=8,32", "--equal_tokens=False")
    (case,) = record["cases"].values()
    assert case["contexts"]["tokens_in_a_batch"] == {"8": 16, "32": 64}


def test_parts_alone_measure_no_model(bench_here):
    record, printed = bench_here("--parts=rmsnorm,allocator")
    assert record["cases"] == {} and record["parts"].keys() == {"rmsnorm", "allocator"}
    variants = record["parts"]["rmsnorm"]["rows"]["8 x 256 x 256"]["variants"]
    assert variants.keys() == {"torch", "kernels/cpu_norm"} and all(v["median"] > 0 for v in variants.values())
    assert "given back" in printed


@pytest.mark.parametrize("name", ["linear", "gelu", "conv", "adamw", "kernels"])
def test_every_part_has_rows(bench_here, name, monkeypatch):
    monkeypatch.setattr(bench_parts, "CALLS", 1)
    if name == "linear" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    record, _ = bench_here(f"--parts={name}")
    for row in record["parts"][name]["rows"].values():
        assert len(row["variants"]) == 2 and row["unit"] in ("ms", "GFLOP/s")
        assert all(v["q1"] <= v["median"] <= v["q3"] for v in row["variants"].values())


def test_kernels_are_held_to_the_plain_path(monkeypatch):
    case = Case("llama", ("config/arch_llama.py", *TINY))
    chosen, difference = kernel_check(case)
    assert difference < 1e-4 and "linear" in chosen
    from kernels import cpu_norm

    monkeypatch.setattr(cpu_norm, "equals_plain", lambda: True)
    monkeypatch.setattr(cpu_norm, "rms_norm", lambda x, weight, eps: cpu_norm.plain(x, weight, eps) * 1.1)
    with pytest.raises(UserError, match=r"gradients .* away from the plain path's; use --kernel_backend=plain"):
        kernel_check(case)


def test_a_process_of_its_own_steps_decodes_and_tells_its_troubles():
    case = Case("gru", ("config/arch_gru.py", *TINY))
    with Workers([Job(case)]) as (worker,):
        assert worker.about["tokens"] == 32 and worker.about["program"] == "nanoArch"
        assert worker.step() > 0 and worker.decode(2) > 0
        with pytest.raises(RuntimeError, match=r"in its own process(.|\n)*AttributeError"):
            worker._ask("stpe")
    assert not worker.process.is_alive()


def test_every_peer_answers_the_same_questions():
    for peer in PEERS.values():
        assert peer.name in PEERS and callable(peer.matches) and callable(peer.counterpart)


def test_the_record_keeps_no_path_of_a_machine():
    words = ["config/arch_gpt2.py", "--peers=transformers,nanogpt:/home/someone/src/nanoGPT,mambapy"]
    assert bench.command_of(words).endswith("config/arch_gpt2.py --peers=transformers,nanogpt:nanoGPT,mambapy")
