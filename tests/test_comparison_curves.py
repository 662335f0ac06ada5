"""Curves by hand: held at a token count, the cost of a loss, and when an order settles."""

import pytest

from comparison_analysis import analyse, ratio_to
from comparison_configurations import group_configurations, shared_seeds
from comparison_curves import costs_to_reach, curve, hold_at, order_over_training, worst_final_loss
from comparison_helpers import make_run, rows_of
from comparison_ranking import rank
from comparison_runs import find_runs
from comparison_words import verdict_section

LOSS = "final_val_loss"


def add(folder, name, points, **changes):
    """A finished run whose summary agrees with these (tokens, loss) evaluations."""
    tokens, loss = points[-1]
    summary = {"final_val_loss": loss, "tokens_processed": tokens} | changes.pop("summary", {})
    return make_run(folder, name, summary, metrics=rows_of(points), **changes)


def runs_by_name(folder):
    return {run.name: run for run in find_runs(folder)[0]}


# -- one curve


def test_a_curve_has_every_axis_that_its_rows_record(tmp_path):
    make_run(tmp_path, "a", metrics=rows_of([(0, 5.0), (1000, 3.0)], train_joules=7.0))
    points = curve(runs_by_name(tmp_path)["a"], LOSS)
    assert points == {
        "loss": [5.0, 3.0], "tokens": [0, 1000], "FLOPs": [0, 6e9], "hours": [0, 1.0], "joules": [7.0, 7.0],
    }  # fmt: skip


def test_points_without_a_finite_loss_are_passed_over(tmp_path):
    make_run(tmp_path, "a", metrics=rows_of([(100, 3.0), (200, None), (300, 2.0)]))
    assert curve(runs_by_name(tmp_path)["a"], LOSS)["tokens"] == [100, 300]


# -- held at a token count


def test_the_count_asked_for_where_all_have_it(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.5), (300, 2.0)])
    add(tmp_path, "b", [(100, 3.2), (200, 2.4), (400, 1.9)], n_layer=3)
    held, sentence = hold_at(find_runs(tmp_path)[0], 200)
    assert sentence == "At 200 tokens."
    assert [(run.values[LOSS], run.values["tokens_processed"]) for run in held] == [(2.5, 200), (2.4, 200)]
    assert [run.values["hours"] for run in held] == [pytest.approx(0.2)] * 2
    assert [run.values["total_flops"] for run in held] == [200 * 6e6] * 2
    assert [len(run.evaluations) for run in held] == [2, 2]


def with_hashes(folder, name, hashes, **changes):
    """A run evaluated at 100, 200, ... tokens, with the running hash of the stream in each row."""
    rows = rows_of([(100 * (index + 1), 3.0 - index / 10) for index in range(len(hashes))])
    rows = [row | {"stream_hash": each} for row, each in zip(rows, hashes, strict=True)]
    summary = {"final_val_loss": rows[-1]["val_loss"], "tokens_processed": 100 * len(hashes), "stream_hash": hashes[-1]}
    return make_run(folder, name, summary, metrics=rows, **changes)


def test_runs_of_unequal_length_are_paired_where_their_streams_agree_until_there(tmp_path):
    with_hashes(tmp_path, "a", ["x", "y", "z"])
    with_hashes(tmp_path, "b", ["x", "y"], n_layer=3)
    (ranking,) = rank(find_runs(tmp_path)[0], at_tokens=200)
    first, second = ranking.configurations
    assert shared_seeds(first, second) == {1337}
    assert not [finding for finding in ranking.findings if finding.what.startswith("stream")]


def test_streams_that_part_before_the_cut_are_not_paired(tmp_path):
    with_hashes(tmp_path, "a", ["x", "y", "z"])
    with_hashes(tmp_path, "b", ["x", "other", "z"], n_layer=3)
    for tokens, are_paired in ((100, True), (200, False)):
        (ranking,) = rank(find_runs(tmp_path)[0], at_tokens=tokens)
        assert bool(shared_seeds(*ranking.configurations)) == are_paired
        found = [finding for finding in ranking.findings if finding.what == "stream of seed 1337"]
        assert bool(found) != are_paired


def test_else_the_nearest_that_all_have_and_it_is_said(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.5), (300, 2.0)])
    add(tmp_path, "b", [(100, 3.2), (210, 2.4), (300, 1.9)], n_layer=3)
    held, sentence = hold_at(find_runs(tmp_path)[0], 220)
    assert sentence == "At 300 tokens, the nearest count to the 220 asked for at which all runs were evaluated."
    assert [run.values[LOSS] for run in held] == [2.0, 1.9]


def test_no_common_count_leaves_the_final_numbers_and_says_so(tmp_path):
    add(tmp_path, "a", [(100, 3.0)])
    add(tmp_path, "b", [(101, 3.2)], n_layer=3)
    runs = find_runs(tmp_path)[0]
    held, sentence = hold_at(runs, 100)
    assert held == runs
    assert sentence.startswith("No evaluation at a token count that all runs share")


def test_a_run_that_is_still_going_counts_where_it_has_come_that_far(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.5)])
    add(tmp_path, "going", [(100, 2.9)], n_layer=3, summary={"status": "running"})
    (at_100,) = rank(find_runs(tmp_path)[0], at_tokens=100)
    assert [each.label for each in at_100.ranked] == ["going", "a"]
    assert at_100.held == "At 100 tokens; not finished yet: going."
    (at_200,) = rank(find_runs(tmp_path)[0], at_tokens=200)
    assert [(place, each.label) for place, each in at_200.places()] == [("1", "a"), ("-", "going")]


def test_encoders_are_held_where_they_have_what_they_are_judged_by(tmp_path):
    scoring = {"ranked_by": "pseudo_perplexity", "tokens": 1024}
    for name, layers, last in (("a", 2, 7.0), ("b", 3, 8.0)):
        rows = rows_of([(100, 3.0), (200, 2.0)])
        rows[-1]["pseudo_perplexity"] = last
        make_run(tmp_path, name, {"pseudo_perplexity": last}, metrics=rows, n_layer=layers, objective="masked_lm",
                 resolved__scoring=scoring)  # fmt: skip
    (ranking,) = rank(find_runs(tmp_path)[0], at_tokens=100)
    assert ranking.held.startswith("At 200 tokens, the nearest count")
    assert [each.label for each in ranking.ranked] == ["a", "b"]
    assert analyse(ranking).costs == []  # one evaluation each does not tell when a score was reached


def test_a_longer_schedule_has_decayed_less_and_voids_the_claim(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.5)])
    add(tmp_path, "b", [(100, 3.0), (400, 2.0)], n_layer=3, resolved__max_iters=400)
    (ranking,) = rank(find_runs(tmp_path)[0], at_tokens=100)
    assert [finding.what for finding in ranking.findings if finding.severity == "warns"] == ["schedule length"]
    assert ranking.claim(ranking.ranked[1]) == "no claim: schedule length differs"


def test_a_constant_schedule_has_no_length(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.5)], training_config__schedule="constant")
    add(
        tmp_path,
        "b",
        [(100, 3.0), (400, 2.0)],
        n_layer=3,
        resolved__max_iters=400,
        training_config__schedule="constant",
    )
    (ranking,) = rank(find_runs(tmp_path)[0], at_tokens=100)
    assert ranking.claim(ranking.ranked[1]) == "no claim: one seed"


# -- what a loss costs


def two_architectures(folder, **changes):
    """b reaches 2.0 at half of a's tokens, for three seeds."""
    for seed in (1, 2, 3):
        add(folder, f"a-s{seed}", [(0, 5.0), (1000, 3.0), (2000, 2.0)], seed=seed)
        add(folder, f"b-s{seed}", [(0, 5.0), (500, 3.0), (1000, 2.0), (2000, 1.8)], seed=seed, n_layer=3, **changes)


def test_costs_are_read_off_the_curves(tmp_path):
    two_architectures(tmp_path)
    configurations = group_configurations(find_runs(tmp_path)[0])
    assert worst_final_loss(configurations, LOSS) == 2.0
    a, b = costs_to_reach(configurations, LOSS, 2.5)
    assert a.by_axis["tokens"] == {1: 1500, 2: 1500, 3: 1500}
    assert b.estimate("tokens").mean == 750
    assert b.estimate("FLOPs").mean == 750 * 6e6
    assert b.estimate("hours").mean == pytest.approx(0.75)
    assert b.estimate("joules").n == 0


def test_a_seed_that_never_gets_there_is_counted_out(tmp_path):
    two_architectures(tmp_path)
    a, b = costs_to_reach(group_configurations(find_runs(tmp_path)[0]), LOSS, 1.9)
    assert (a.n_reached, b.n_reached) == (0, 3)


def test_ratios_are_paired_and_hours_need_one_machine(tmp_path):
    two_architectures(tmp_path, resolved__device_name="another")
    (ranking,) = rank(find_runs(tmp_path)[0])
    analysis = analyse(ranking)
    b, a = analysis.costs
    assert analysis.reference is b and analysis.target == 2.0
    ratio, why = ratio_to(ranking, a, b, "tokens")
    assert (ratio.n, pytest.approx(ratio.mean), why) == (3, 0.6931471805599453, "")  # twice as many
    assert ratio_to(ranking, a, b, "hours") == (None, "no ratio: device differs")


def test_what_voids_the_loss_voids_every_ratio(tmp_path):
    two_architectures(tmp_path, resolved__dtype="bfloat16")
    (ranking,) = rank(find_runs(tmp_path)[0])
    b, a = analyse(ranking).costs
    assert [ratio_to(ranking, a, b, axis) for axis in ("tokens", "hours")] == [
        (None, "no ratio: precision differs")
    ] * 2


def test_axes_that_nobody_records_are_left_out(tmp_path):
    two_architectures(tmp_path)
    (ranking,) = rank(find_runs(tmp_path)[0])
    assert analyse(ranking).axes == ["tokens", "FLOPs", "hours"]


# -- does an early order hold


def test_an_order_settles_where_it_last_changed(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.8), (300, 2.6), (400, 2.5)])
    add(tmp_path, "b", [(100, 3.1), (200, 2.9), (300, 2.5), (400, 2.4)], n_layer=3)
    add(tmp_path, "c", [(100, 3.2), (200, 3.0), (300, 2.9), (400, 2.8)], n_layer=4)
    order = order_over_training(group_configurations(find_runs(tmp_path)[0]), LOSS)
    assert order.tokens == [100, 200, 300, 400]
    assert order.taus == [pytest.approx(1 / 3)] * 2 + [1.0] * 2  # one of three pairs is the other way round
    assert order.settled_at == 300
    assert order.tau_after(0.5) == (200, pytest.approx(1 / 3))
    assert order.tau_after(0.01) == (100, pytest.approx(1 / 3))


def test_there_is_no_order_without_two_rows_and_two_common_counts(tmp_path):
    add(tmp_path, "a", [(100, 3.0), (200, 2.8)])
    assert order_over_training(group_configurations(find_runs(tmp_path)[0]), LOSS) is None
    add(tmp_path, "b", [(150, 3.0), (200, 2.8)], n_layer=3)
    assert order_over_training(group_configurations(find_runs(tmp_path)[0]), LOSS) is None


def test_no_ratio_where_a_seed_never_got_there_and_the_verdict_says_who_did_not(tmp_path):
    for seed in (1, 2):
        add(tmp_path, f"a-s{seed}", [(100, 3.0), (300, 2.0)], seed=seed)
        add(tmp_path, f"b-s{seed}", [(100, 3.0), (300, 2.2 + 0.2 * seed)], seed=seed, n_layer=3)
        add(tmp_path, f"c-s{seed}", [(100, 3.0), (300, 2.9)], seed=seed, n_layer=4)
    (ranking,) = rank(find_runs(tmp_path)[0])
    analysis = analyse(ranking, to_loss=2.5)
    a, b, c = analysis.costs
    assert (a.n_reached, b.n_reached, c.n_reached) == (2, 1, 0)
    assert ratio_to(ranking, b, a, "tokens") == (None, "no ratio: not every seed reached it")
    ((_, _, rows),) = verdict_section(ranking, analysis)
    sentences = [sentence for sentence, _ in rows]
    assert "c did not reach 2.5." in sentences and not any("x the tokens" in each for each in sentences)
