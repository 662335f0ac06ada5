"""Planted laws are found again: exponents, floors, iso-FLOP minima; fronts and orders by hand."""

import numpy as np
import pytest

from comparison_analysis import analyse
from comparison_helpers import make_run, rows_of
from comparison_ranking import rank
from comparison_runs import find_runs
from comparison_scaling import (
    MIN_SIZES,
    families,
    fit_power_law,
    iso_flops,
    loss_by_flops,
    loss_by_size,
    lowest_size,
    order_across_sizes,
    pareto_front,
    resampled_means,
)

LOSS = "final_val_loss"
E, A, B, ALPHA, BETA = 1.5, 60.0, 250.0, 0.33, 0.36  # L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2)


# -- fronts


@pytest.mark.parametrize(
    "costs, losses, front",
    [
        ([3, 1, 2], [1.0, 3.0, 2.0], [1, 2, 0]),
        ([1, 2, 3], [2.0, 2.0, 1.0], [0, 2]),  # the same loss for more is no gain
        ([1, 1], [2.0, 1.0], [1]),
        ([1, None, 2], [2.0, 1.0, None], [0]),
        ([], [], []),
    ],
)
def test_pareto_front(costs, losses, front):
    assert pareto_front(costs, losses) == front


# -- power laws


def test_a_planted_law_with_a_floor_is_found_again():
    sizes = np.array([1e6, 3e6, 1e7, 3e7, 1e8])
    fit = fit_power_law(sizes, 1.7 + 400 * sizes**-0.34)
    assert (fit.exponent, fit.floor) == (pytest.approx(0.34, abs=1e-3), pytest.approx(1.7, abs=1e-3))
    assert fit.coefficient == pytest.approx(400, rel=0.02)
    assert fit(2e7) == pytest.approx(1.7 + 400 * 2e7**-0.34, abs=1e-5)


def test_three_sizes_are_fitted_without_a_floor():
    sizes = np.array([1e6, 1e7, 1e8])
    fit = fit_power_law(sizes, 20 * sizes**-0.15)
    assert (fit.has_floor, fit.floor) == (False, 0)
    assert fit.exponent == pytest.approx(0.15, abs=1e-4)
    assert fit.coefficient == pytest.approx(20, rel=1e-3)


def test_a_law_without_a_floor_gets_none():
    sizes = np.geomspace(1e6, 1e9, 8)
    fit = fit_power_law(sizes, 20 * sizes**-0.15)
    assert fit.has_floor and fit.floor == pytest.approx(0, abs=0.05)


def test_a_loss_that_falls_with_the_logarithm_gets_no_negative_floor():
    sizes = np.geomspace(1e6, 1e9, 8)
    fit = fit_power_law(sizes, 4 - 0.3 * np.log(sizes / 1e6))
    assert fit.has_floor and fit.floor >= 0


def planted(folder, n_seeds=1, noise=0.0, sizes=(1e6, 3e6, 1e7, 3e7, 1e8), alpha=ALPHA, name="llama", **changes):
    """Runs of one architecture whose curves follow the law above, at each size and seed."""
    rng = np.random.default_rng(7)
    for index, size in enumerate(sizes):
        for seed in range(1, n_seeds + 1):
            tokens = np.geomspace(2e6, 3e9, 40).round()
            offset = noise * rng.standard_normal()
            losses = E + A * size**-alpha + B * tokens**-BETA + offset
            final = {"final_val_loss": float(losses[-1]), "tokens_processed": int(tokens[-1])}
            make_run(
                folder, f"{name}-{index}-s{seed}", final | {"flops_per_token": 6 * size},
                metrics=rows_of([(int(count), float(loss)) for count, loss in zip(tokens, losses, strict=True)]),
                seed=seed, n_layer=index + 2, arch_preset=name, parameters__total=int(size),
                flops__per_token_training=6 * size, **changes,
            )  # fmt: skip


def family_of(folder):
    (ranking,) = rank(find_runs(folder)[0])
    (family,) = families(ranking.ranked)
    return family


def test_loss_by_size_with_an_interval_over_seeds(tmp_path):
    planted(tmp_path, n_seeds=3, noise=0.002)
    family = family_of(tmp_path)
    fit = loss_by_size(family, LOSS, np.random.default_rng(0))
    assert fit.low < ALPHA < fit.high
    assert fit.high - fit.low < 0.1
    again = loss_by_size(family, LOSS, np.random.default_rng(0))
    assert (fit.low, fit.high) == (again.low, again.high)


def test_with_single_seeds_the_sizes_are_drawn_again(tmp_path):
    planted(tmp_path)
    fit = loss_by_size(family_of(tmp_path), LOSS, np.random.default_rng(0))
    assert fit.exponent == pytest.approx(ALPHA, abs=5e-3)
    assert fit.low <= fit.exponent + 0.02 and fit.high >= fit.exponent - 0.02


def test_the_envelope_falls_with_the_exponent_that_theory_gives(tmp_path):
    """Minimised over N at 6 N D = C, the law falls as E + const C^-(alpha beta / (alpha + beta)) (their eq. 4)."""
    planted(tmp_path, sizes=np.geomspace(1e6, 1e8, 9))
    fit, flops, envelope, n_lowest = loss_by_flops(family_of(tmp_path), LOSS, np.random.default_rng(0))
    assert len(flops) == len(envelope) == 24 and n_lowest >= 4
    assert fit.exponent == pytest.approx(ALPHA * BETA / (ALPHA + BETA), rel=0.15)
    assert fit.floor == pytest.approx(E, abs=0.15)


def test_iso_flop_minima_are_where_theory_puts_them(tmp_path):
    """N_opt = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)) (their eq. 4)."""
    planted(tmp_path, sizes=np.geomspace(1e6, 1e8, 9))
    found = [iso for iso in iso_flops(family_of(tmp_path), LOSS) if iso.best_size is not None]
    assert len(found) >= 2
    scale = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    for iso in found:
        assert iso.best_size == pytest.approx(scale * (iso.flops / 6) ** (BETA / (ALPHA + BETA)), rel=0.35)


def test_a_minimum_outside_the_sizes_is_not_claimed():
    assert lowest_size([1e6, 1e7, 1e8], [3.0, 2.0, 1.5]) is None
    assert lowest_size([1e6, 1e7, 1e8], [2.0, 1.0, 2.0]) == pytest.approx(1e7)
    assert lowest_size([1e6, 1e7, 1e8], [1.0, 2.0, 1.0]) is None


def test_laws_need_three_sizes(tmp_path):
    planted(tmp_path, sizes=(1e6, 1e7))
    (ranking,) = rank(find_runs(tmp_path)[0])
    assert MIN_SIZES == 3 and analyse(ranking).laws == []


def test_curves_that_do_not_overlap_give_no_envelope(tmp_path):
    planted(tmp_path, sizes=(1e4, 1e7, 1e10))
    (laws,) = analyse(rank(find_runs(tmp_path)[0])[0]).laws
    assert laws.by_flops is None and laws.iso_flops == []


# -- orders across sizes


def test_architectures_are_told_apart_and_sizes_put_together(tmp_path):
    planted(tmp_path, sizes=(1e6, 1e7))
    planted(tmp_path, sizes=(1.1e6, 1.05e7), name="gpt2", alpha=0.31, normalization="layernorm")
    planted(tmp_path, sizes=(1e6,), name="mamba", alpha=0.4, block_pattern="mamba2")
    (ranking,) = rank(find_runs(tmp_path)[0])
    assert sorted((family.label, len(family.members)) for family in families(ranking.ranked)) == [
        ("gpt2", 2), ("llama", 2), ("mamba", 1),
    ]  # fmt: skip
    ((small, large, shared, tau),) = order_across_sizes(ranking.ranked, LOSS)
    assert (len(small), len(large)) == (3, 2)
    assert sorted(family.label for family in shared) == ["gpt2", "llama"] and tau == 1


def test_an_order_that_turns_round_with_size(tmp_path):
    for name, small, large in (("a", 3.0, 2.5), ("b", 3.1, 2.4)):
        for size, loss in ((1_000_000, small), (8_000_000, large)):
            make_run(tmp_path, f"{name}{size}", {"final_val_loss": loss}, normalization=name, parameters__total=size,
                     n_layer=size // 1_000_000)  # fmt: skip
    (ranking,) = rank(find_runs(tmp_path)[0])
    ((_, _, _, tau),) = order_across_sizes(ranking.ranked, LOSS)
    assert tau == -1


def test_resampled_means_spread_as_means_of_new_seeds_do():
    values, rng = [1.0, 2.0, 6.0], np.random.default_rng(0)
    drawn = np.concatenate([resampled_means(values, rng) for _ in range(50)])
    assert drawn.mean() == pytest.approx(3, abs=0.05)
    assert drawn.std() == pytest.approx(np.std(values, ddof=1) / np.sqrt(3), rel=0.02)
