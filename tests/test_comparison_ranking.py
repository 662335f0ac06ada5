"""Units as a person reads them, and what may be claimed about every pair of rows."""

import pytest

from comparison_helpers import make_run, rows_of
from comparison_ranking import count, hours, kibibytes, mebibytes, p_text, rank, si
from comparison_runs import find_runs


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (5, "5"), (999, "999"), (1000, "1.00k"), (1_536_000, "1.54M"), (124_439_808, "124M"),
     (999_950, "1.00M"), (8.55e8, "855M"), (1e18, "1.00E"), (12_345, "12.3k"), (None, "-")],
)  # fmt: skip
def test_si(value, text):
    assert si(value) == text


def test_units():
    assert count(1.3e9) == "1.30B"
    assert mebibytes(512 * 2**20) == "512MiB"
    assert mebibytes(3 * 2**29) == "1.50GiB"
    assert [hours(value) for value in (None, 0.0123, 0.5, 12)] == ["-", "0.012", "0.50", "12.00"]


def test_small_numbers():
    assert [kibibytes(value) for value in (None, 2048, 2**21)] == ["-", "2KiB", "2MiB"]
    assert [p_text(value) for value in (1e-6, 0.00123, 0.0496, 0.5)] == ["< 0.0001", "0.0012", "0.0496", "0.50"]


# -- pairs


def seeds_of(folder, name, losses, **changes):
    for seed, loss in enumerate(losses, 1):
        make_run(folder, f"{name}-s{seed}", {"final_val_loss": loss}, seed=seed, **changes)


def ranking_of(folder, **options):
    (ranking,) = rank(find_runs(folder)[0], **options)
    return ranking


def test_holm_runs_over_the_pairs_and_ties_are_called_ties(tmp_path):
    seeds_of(tmp_path, "a", (2.00, 2.01, 2.02))
    seeds_of(tmp_path, "b", (2.10, 2.111, 2.119), n_layer=3)
    seeds_of(tmp_path, "c", (2.10, 2.112, 2.120), n_layer=4)
    ranking = ranking_of(tmp_path)
    verdicts = {(pair.first.label, pair.second.label): pair.verdict for pair in ranking.pairs.values()}
    assert verdicts == {("a", "b"): "separable", ("a", "c"): "separable", ("b", "c"): "not separable"}
    assert ranking.n_tested == 3
    a_b = ranking.pair(*ranking.ranked[:2])
    assert a_b.p_holm == pytest.approx(3 * a_b.difference.p_value)  # the smallest of three
    assert [ranking.claim(each) for each in ranking.ranked] == ["best", "separable from #1", "separable from #1"]


def test_an_interval_without_zero_is_no_claim_after_holm(tmp_path):
    for index in range(5):
        seeds_of(
            tmp_path,
            f"run{index}",
            (2.0 + 0.01 * index, 2.001 + 0.013 * index, 2.002 + 0.009 * index),
            n_layer=index + 1,
        )
    ranking = ranking_of(tmp_path)
    pair = ranking.pair(*ranking.ranked[:2])
    assert pair.difference.verdict == "separable" and pair.verdict == "not separable"
    assert "not separable" in pair.text


def test_void_pairs_are_not_tested_and_say_why(tmp_path):
    seeds_of(tmp_path, "a", (2.00, 2.01, 2.02))
    seeds_of(tmp_path, "b", (2.10, 2.11, 2.12), n_layer=3)
    seeds_of(tmp_path, "bf16", (1.90, 1.91, 1.92), resolved__dtype="bfloat16")
    ranking = ranking_of(tmp_path)
    assert ranking.n_tested == 1
    assert [ranking.claim(each) for each in ranking.ranked] == ["best", *["no claim: precision differs"] * 2]
    assert ranking.pair(*ranking.ranked[:2]).text.endswith("no claim: precision differs")


def test_one_seed_is_no_claim(tmp_path):
    seeds_of(tmp_path, "a", (2.0,))
    seeds_of(tmp_path, "b", (2.1,), n_layer=3)
    ranking = ranking_of(tmp_path)
    assert ranking.claim(ranking.ranked[1]) == "no claim: one seed"
    assert ranking.n_tested == 0


def test_a_pair_turned_round_changes_its_sign_alone(tmp_path):
    seeds_of(tmp_path, "a", (2.0, 2.01))
    seeds_of(tmp_path, "b", (2.1, 2.12), n_layer=3)
    (pair,) = ranking_of(tmp_path).pairs.values()
    turned = pair.reversed()
    assert turned.difference.mean == -pair.difference.mean and turned.verdict == pair.verdict
    assert (turned.first, turned.second) == (pair.second, pair.first)


def test_many_rows_are_paired_with_the_best_and_not_all_with_each_other(tmp_path):
    for index in range(70):
        make_run(tmp_path, f"run{index}", {"final_val_loss": 2.0 + index / 100}, metrics=False, n_layer=index + 1)
    ranking = ranking_of(tmp_path)
    assert len(ranking.pairs) == 60 * 59 // 2 + 10
    assert all(ranking.claim(each) for each in ranking.ranked)


def test_held_at_a_token_count_the_order_is_of_that_count(tmp_path):
    make_run(tmp_path, "early", {"final_val_loss": 2.2}, metrics=rows_of([(100, 3.0), (200, 2.2)]))
    make_run(tmp_path, "late", {"final_val_loss": 2.0}, metrics=rows_of([(100, 3.5), (200, 2.0)]), n_layer=3)
    assert [each.label for each in ranking_of(tmp_path).ranked] == ["late", "early"]
    held = ranking_of(tmp_path, at_tokens=100)
    assert [each.label for each in held.ranked] == ["early", "late"]
    assert held.held == "At 100 tokens."
    assert [finding for finding in held.findings if finding.severity == "warns"] == []
