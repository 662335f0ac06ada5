"""The audit: every check once, and which claims each difference voids."""

import json

import pytest

from comparison_audit import CHECKS, LOSS, SPEED, Voids, audit, comparable_groups, configuration_key
from comparison_helpers import make_run, write_json
from comparison_ranking import rank
from comparison_runs import find_runs
from comparison_settings import parts_of


def names(runs):
    return [run.name for run in runs]


def findings_of(tmp_path, first=(), second=(), summary=()):
    make_run(tmp_path, "a", **dict(first))
    make_run(tmp_path, "b", dict(summary), **dict(second))
    return {finding.what: finding for finding in audit(find_runs(tmp_path)[0])}


def test_equal_runs_have_no_findings(tmp_path):
    assert findings_of(tmp_path, second={"n_layer": 3, "normalization": "layernorm"}) == {}


AUDIT_CASES = [
    ("dataset", "voids", {"dataset__fingerprint": "other"}),
    ("dataset", "voids", {"dataset__name": "shakespeare_char"}),
    ("tokenizer", "voids", {"dataset__tokenizer": "gpt2"}),
    ("tokenizer", "voids", {"dataset__vocab_size": 512}),
    ("evaluation set", "voids", {"dataset__evaluation_hash": "other"}),
    ("objective", "voids", {"objective": "masked_lm"}),
    ("score", "voids", {"resolved__scoring": {"ranked_by": "pseudo_perplexity", "tokens": 1024}}),
    ("score", "voids", {"resolved__scoring": {"ranked_by": "final_val_loss", "loss": "lm_loss + 0.5 wp_loss"}}),
    ("tokens per step", "warns", {"resolved__tokens_per_step": 1536}),
    ("block_size", "warns", {"block_size": 128}),
    ("initial weights", "warns", {"initial_weights": {"source": "hf:gpt2"}}),
    ("precision", "warns", {"resolved__dtype": "bfloat16"}),
    ("precision", "warns", {"resolved__tf32": True}),
    ("threads", "warns", {"resolved__threads": 4}),
    ("peak", "note", {"resolved__peak_flops_per_second": 1.2e11}),
    ("device", "warns", {"resolved__device_name": "another processor"}),
    ("world size", "warns", {"resolved__world_size": 2}),
    ("compile", "warns", {"resolved__compile": True}),
    ("parallel mode", "warns", {"resolved__parallel": "FSDP2"}),
    ("gradient checkpointing", "warns", {"gradient_checkpointing": "full"}),
    ("attention kernel", "warns", {"resolved__kernels": {"attention": "flex"}}),
    ("torch", "note", {"versions__torch": "2.11.0"}),
    ("python", "note", {"versions__python": "3.13.0"}),
    ("numpy", "note", {"versions__numpy": "2.4.0"}),
    ("git commit", "note", {"git__commit": "badc0de"}),
    ("git", "note", {"git__dirty": True}),
    ("seed", "note", {"seed": 1, "n_layer": 3}),
    ("learning_rate", "note", {"learning_rate": 3e-4}),
]


@pytest.mark.parametrize("what, severity, change", AUDIT_CASES)
def test_each_difference_is_found_and_weighed(tmp_path, what, severity, change):
    findings = findings_of(tmp_path, second=change)
    assert list(findings) == [what]
    assert findings[what].severity == severity
    assert "b" in {name for names in findings[what].runs_by_value.values() for name in names}


def test_every_check_has_a_case():
    tested = {what for what, _, _ in AUDIT_CASES} | {"tokens"}
    assert {check.what for check in CHECKS} <= tested


def test_different_lengths_say_tokens_and_say_nothing_about_the_stream(tmp_path):
    findings = findings_of(tmp_path, summary={"tokens_processed": 153_600, "stream_hash": "later"})
    assert list(findings) == ["tokens"]
    assert findings["tokens"].runs_by_value == {"76,800": ["a"], "153,600": ["b"]}


def test_equal_lengths_with_different_streams_are_not_paired(tmp_path):
    findings = findings_of(tmp_path, summary={"stream_hash": "other"})
    assert list(findings) == ["stream of seed 1337"]
    assert findings["stream of seed 1337"].severity == "warns"


def with_checkpoints(folder, steps, schedule=(), **changes):
    """Give a run of 768 tokens a step a metadata.json at each of these."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["resolved"]["checkpoint_schedule"] = [*schedule]
    write_json(folder / "config.json", config)
    for step in steps:
        tokens = {
            "total_tokens_processed": 768 * step, "total_tokens_supervised": 768 * step, "tokens_per_step": 768,
            "effective_batch_size": 12, "sequence_length": 64, "estimated_tokens_at_step": 768 * step,
        }  # fmt: skip
        path = folder / f"checkpoint-{step}" / "metadata.json"
        path.parent.mkdir()
        names = ("training_config", "model_config")
        write_json(path, {
            "format": 1, "experiment_name": folder.name, "global_step": step, "epoch": 0.5, "checksums": {},
            "token_metrics": tokens | changes, **{name: config[name] for name in names},
        })  # fmt: skip


def of_checkpoints(folder):
    return [finding for finding in audit(find_runs(folder)[0]) if finding.what == "checkpoints"]


def test_checkpoints_that_add_up_are_no_finding(tmp_path):
    for name in ("a", "b"):
        with_checkpoints(make_run(tmp_path, name), (50, 100), schedule=(38_400, 76_800))
    assert of_checkpoints(tmp_path) == []


def test_counts_that_disagree_within_a_file_are_listed(tmp_path):
    make_run(tmp_path, "a")
    with_checkpoints(make_run(tmp_path, "b"), (50, 100), total_tokens_processed=7)
    (finding,) = of_checkpoints(tmp_path)
    ((sentence, names),) = finding.runs_by_value.items()
    assert names == ["b"] and finding.severity == "warns"
    assert sentence.startswith("b/checkpoint-50/metadata.json: total_tokens_processed=7 is not global_step=50 x")
    assert sentence.endswith("more like it)")


def test_counts_that_disagree_between_runs_are_listed(tmp_path):
    with_checkpoints(make_run(tmp_path, "a"), (50, 100), schedule=(38_400, 76_800))
    with_checkpoints(make_run(tmp_path, "b"), (25, 100), schedule=(19_200, 76_800))
    ((sentence, names),) = of_checkpoints(tmp_path)[0].runs_by_value.items()
    assert names == ["a", "b"] and sentence == "a and b have different schedules: 19200 tokens is in one alone"


def test_an_interrupted_run_is_named(tmp_path):
    findings = findings_of(tmp_path, summary={"status": "interrupted"})
    assert findings["status"].runs_by_value == {"interrupted": ["b"]}


def test_kernels_of_different_parts_are_not_compared(tmp_path):
    kernels = {"mamba2": "triton", "attention": "sdpa"}
    assert findings_of(tmp_path, second={"resolved__kernels": kernels}) == {}


def test_the_same_seeds_everywhere_are_not_a_finding(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", seed=seed)
        make_run(tmp_path, f"b{seed}", seed=seed, n_layer=3)
    assert audit(find_runs(tmp_path)[0]) == []


def test_what_no_run_records_cannot_be_checked(tmp_path):
    nothing = {"dataset__evaluation_hash": None}
    findings = findings_of(tmp_path, first=nothing, second=nothing)
    assert findings["evaluation set"].severity == "warns"
    assert findings["evaluation set"].consequence == "cannot be checked"


def test_a_measured_peak_may_wobble(tmp_path):
    assert findings_of(tmp_path, second={"resolved__peak_flops_per_second": 1.05e11}) == {}


def test_the_worst_comes_first(tmp_path):
    change = {"git__dirty": True, "resolved__compile": True, "dataset__fingerprint": "other"}
    severities = [finding.severity for finding in findings_of(tmp_path, second=change).values()]
    assert severities == ["voids", "warns", "note"]


def test_runs_that_answer_different_questions_are_grouped_apart(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", dataset__fingerprint="other")
    make_run(tmp_path, "c", n_layer=3, resolved__dtype="bfloat16")
    make_run(tmp_path, "d", objective="masked_lm")
    assert sorted(map(names, comparable_groups(find_runs(tmp_path)[0]))) == [["a", "c"], ["b"], ["d"]]


# -- what voids a claim


def reasons(tmp_path, claim=LOSS, summary=(), **change):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", dict(summary), n_layer=3, **change)
    runs = find_runs(tmp_path)[0]
    return Voids(runs).between(runs[:1], runs[1:], claim)


@pytest.mark.parametrize(
    "change, loss, speed",
    [
        ({}, [], []),
        ({"resolved__tokens_per_step": 1536}, ["tokens per step differ"], []),
        ({"block_size": 128}, ["block_size differs"], ["block_size differs"]),
        ({"resolved__dtype": "bfloat16"}, ["precision differs"], ["precision differs"]),
        ({"initial_weights": {"source": "hf:gpt2"}}, ["initial weights differ"], ["initial weights differ"]),
        ({"resolved__device_name": "another"}, [], ["device differs"]),
        ({"resolved__threads": 4}, [], ["threads differ"]),
        ({"resolved__compile": True}, [], ["compile differs"]),
        ({"resolved__kernels": {"attention": "flex"}}, [], ["attention kernel differs"]),
        ({"resolved__kernels": {"mamba2": "triton"}}, [], []),
        ({"versions__torch": "2.11.0", "git__commit": "other"}, [], []),
        ({"summary": {"tokens_processed": 153_600}}, ["tokens differ"], []),
    ],
    ids=lambda value: next(iter(value), "same") if isinstance(value, dict) else "",
)
def test_each_difference_voids_the_claims_that_it_should(tmp_path, change, loss, speed):
    assert reasons(tmp_path / "loss", LOSS, **change) == loss
    assert reasons(tmp_path / "speed", SPEED, **change) == speed


def test_an_architecture_tried_at_more_learning_rates_had_more_chances(tmp_path):
    make_run(tmp_path, "a", learning_rate=1e-3)
    make_run(tmp_path, "a2", learning_rate=3e-3)
    make_run(tmp_path, "b", n_layer=3)
    runs = find_runs(tmp_path)[0]
    assert Voids(runs).between(runs[:1], runs[2:]) == ["tuning budget differs"]
    assert Voids(runs).between(runs[:1], runs[1:2]) == []
    (found,) = [finding for finding in audit(runs) if finding.what == "tuning budget"]
    assert list(found.runs_by_value.values()) == [["a", "a2"], ["b"]]


def test_a_recorded_tuning_budget_counts_instead(tmp_path):
    tuned = {"training_config__tuning_runs": 6, "training_config__tuning_tokens": 600_000}
    make_run(tmp_path, "a", learning_rate=1e-3, **tuned)
    make_run(tmp_path, "b", learning_rate=3e-3, n_layer=3, **tuned)
    make_run(tmp_path, "less", n_layer=4, **tuned | {"training_config__tuning_runs": 3})
    make_run(tmp_path, "untuned", n_layer=5)
    a, b, less, untuned = find_runs(tmp_path)[0]
    voids = Voids([a, b, less, untuned])
    assert voids.between([a], [b]) == []
    assert [voids.between([a], [other]) for other in (less, untuned)] == [["tuning budget differs"]] * 2
    (found,) = [finding for finding in audit([a, b, less, untuned]) if finding.what == "tuning budget"]
    assert found.runs_by_value == {
        "6 trials, 600,000 tokens": ["a", "b"], "3 trials, 600,000 tokens": ["less"], "1 tried here": ["untuned"],
    }  # fmt: skip


PART = '''
"""A part."""
from model_components import FFN_REGISTRY

n_layer = 4  # a setting


@FFN_REGISTRY("maxout")
class Maxout:
    width = {width}
'''


def with_part(folder, width, comment=""):
    (folder / "config").mkdir()
    (folder / "config" / "00_my_ffn.py").write_text(PART.format(width=width) + comment, encoding="utf-8")


def test_one_name_for_two_sources_voids_the_claim_and_is_two_configurations(tmp_path):
    for name, width, seed in (("a", 2, 1), ("b", 2, 2), ("c", 3, 3)):
        with_part(make_run(tmp_path, name, ffn_type="maxout", seed=seed), width, f"# {name}")
    a, b, c = find_runs(tmp_path)[0]
    assert a.part_sources == b.part_sources != c.part_sources
    assert configuration_key(a) == configuration_key(b) != configuration_key(c)
    assert Voids([a, b, c]).between([a], [c]) == ["source of maxout differs"]
    (found,) = [finding for finding in audit([a, b, c]) if finding.what == "source of maxout"]
    assert sorted(map(sorted, found.runs_by_value.values())) == [["a", "b"], ["c"]]


def test_a_part_that_is_defined_and_not_used_is_no_difference(tmp_path):
    with_part(make_run(tmp_path, "a", ffn_type="swiglu"), 2)
    make_run(tmp_path, "b", seed=2)
    a, b = find_runs(tmp_path)[0]
    assert configuration_key(a) == configuration_key(b)


@pytest.mark.parametrize(
    "source", ["FFN_REGISTRY['x'] = Y", "@FFN_REGISTRY('x')\nclass Y: pass", "FFN_REGISTRY('x') ("]
)
def test_parts_are_found_however_they_are_registered(source):
    assert list(parts_of(source.encode())) == ["x"]


def resumed(tmp_path, before, **after):
    folder = make_run(tmp_path, "b", n_layer=3, **after)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    session = {name: config[name] for name in ("created", "command", "git", "versions", "resolved", "training_config")}
    for section, changes in before.items():
        session[section] = session[section] | changes
    write_json(folder / "config.json", config | {"earlier_sessions": [session]})
    make_run(tmp_path, "a")
    return find_runs(tmp_path)[0]


@pytest.mark.parametrize(
    "before, loss, speed, severity",
    [
        ({}, False, False, None),
        ({"training_config": {"learning_rate": 3e-4}}, True, True, "warns"),
        ({"training_config": {"log_interval": 1}}, False, False, None),
        ({"resolved": {"max_iters": 50}}, True, True, "warns"),
        ({"resolved": {"device_name": "another"}}, False, True, "warns"),
        ({"git": {"commit": "0ther"}}, False, False, "note"),
    ],
    ids=["nothing", "learning rate", "bookkeeping", "length", "device", "commit"],
)
def test_a_run_that_changed_midway(tmp_path, before, loss, speed, severity):
    runs = resumed(tmp_path, before)
    a, b = sorted(runs, key=lambda run: run.name)
    voids = Voids(runs)
    assert [bool(voids.between([a], [b], claim)) for claim in (LOSS, SPEED)] == [loss, speed]
    assert [finding.severity for finding in audit(runs) if finding.what == "resumed"] == [severity] * (
        severity is not None
    )


def test_logs_that_contradict_each_other_void_the_runs_claims(tmp_path):
    folder = make_run(tmp_path, "b", n_layer=3)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    write_json(folder / "summary.json", summary | {"final_val_loss": 1.0})
    make_run(tmp_path, "a")
    runs = find_runs(tmp_path)[0]
    a, b = sorted(runs, key=lambda run: run.name)
    assert Voids(runs).between([a], [b]) == ["the logs of b contradict each other"]
    (found,) = [finding for finding in audit(runs) if finding.what == "logs"]
    assert found.runs_by_value == {"summary.json says 1 where metrics.jsonl ends on 2": ["b"]}


def test_survivors_of_a_divergence_claim_nothing(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, f"a-s{seed}", {"final_val_loss": 2.0 + 0.001 * seed}, seed=seed)
        lost = {"final_val_loss": None} if seed == 3 else {"final_val_loss": 1.5 + 0.001 * seed}
        make_run(tmp_path, f"b-s{seed}", lost, metrics=seed < 3, seed=seed, normalization="layernorm")
    (ranking,) = rank(find_runs(tmp_path)[0])
    (pair,) = ranking.pairs.values()
    assert pair.verdict == "void" and pair.voids == ("b-s3 ended without a finite loss",)
