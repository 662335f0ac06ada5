"""What the table, the CSV, the Markdown and the plots say."""

import csv
import io

import pytest
from rich.console import Console

from comparison_analysis import analyse
from comparison_helpers import make_run
from comparison_plots import draw_curves, legend_label, loss_limits
from comparison_ranking import COLUMNS, OF_ONE_OBJECTIVE, component_effects, rank
from comparison_report import escape, show, wrapped, write_csv, write_markdown
from comparison_runs import find_runs
from comparison_words import ONE_SEED, rules_section, size_text, verdict_section


def ranked(folder, sort="final_val_loss"):
    return rank(find_runs(folder)[0], sort)


def shown(rankings, width=100, problems=(), **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    show(rankings, [analyse(ranking) for ranking in rankings], list(problems), console, **options)
    return console.file.getvalue()


def two_runs(folder, **changes):
    make_run(folder, "gpt2", {"final_val_loss": 2.012}, normalization="layernorm", **changes)
    make_run(folder, "llama", {"final_val_loss": 2.0}, **changes)


def test_wrapped_breaks_after_separators():
    assert wrapped("4L-4H-128D-RoPE-RMS", 12) == "4L-4H-128D-\n RoPE-RMS"
    assert wrapped("short\n 4L", 12) == "short\n 4L"
    assert wrapped("a" * 20, 12) == "a" * 20  # nowhere to break: rich folds it


# -- ranking


def test_lowest_final_loss_first_and_the_other_columns_by_their_own_direction(tmp_path):
    make_run(tmp_path, "a", {"final_val_loss": 2.0, "tokens_per_second": 100.0})
    make_run(tmp_path, "b", {"final_val_loss": 1.9, "tokens_per_second": 50.0}, n_layer=3)
    assert [each.label for each in ranked(tmp_path)[0].ranked] == ["b", "a"]
    assert [each.label for each in ranked(tmp_path, "tokens_per_second")[0].ranked] == ["a", "b"]


def test_what_may_not_be_ranked_comes_last_without_a_place(tmp_path):
    make_run(tmp_path, "good", {"final_val_loss": 2.0})
    make_run(tmp_path, "diverged", {"final_val_loss": None}, n_layer=3)
    make_run(tmp_path, "stopped", {"final_val_loss": 1.0, "status": "interrupted"}, n_layer=4)
    places = [(place, each.label) for place, each in ranked(tmp_path)[0].places()]
    assert places == [("1", "good"), ("-", "stopped"), ("-", "diverged")]
    text = shown(ranked(tmp_path))
    assert "stopped (interrupted)" in text
    assert "diverged (no finite loss)" in text


def test_one_component_apart_is_named_with_its_effect(tmp_path):
    two_runs(tmp_path)
    (ranking,) = ranked(tmp_path)
    ((name, worse, better, effect),) = component_effects(ranking)
    assert (name, worse.label, better.label) == ("normalization", "gpt2", "llama")
    assert effect.difference.mean == pytest.approx(0.012) and effect.first is better
    assert "normalization: layernorm -> rmsnorm  -0.0120 (one seed)  (#2 -> #1)" in shown([ranking])


def test_labels_and_what_the_data_decides_are_not_components(tmp_path):
    make_run(tmp_path, "a", arch_preset="llama", model_size="1M")
    make_run(tmp_path, "b", arch_preset="team", model_size=None, learning_rate=3e-4)
    text = shown(ranked(tmp_path))
    assert "Components that differ: none" in text
    assert "#1 and #2 are one architecture, trained differently: learning_rate" in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation": "gelu"}, "normalization, activation"),
        ({"learning_rate": 3e-4}, "normalization, learning_rate"),
        ({"resolved__tokens_per_step": 384}, "normalization, tokens per step"),
    ],
    ids=["two components", "a component and a setting", "a component and the batch"],
)
def test_no_single_component_is_credited_with_two_differences(tmp_path, change, words):
    make_run(tmp_path, "gpt2", {"final_val_loss": 2.012}, normalization="layernorm", **change)
    make_run(tmp_path, "llama")
    (ranking,) = ranked(tmp_path)
    assert component_effects(ranking) == []
    assert f"#1 and #2 differ in {words}: none of these can be credited alone" in shown([ranking], width=160)


def test_an_option_of_a_part_is_a_component(tmp_path):
    make_run(tmp_path, "a", model_config__part_options={})
    make_run(tmp_path, "b", {"final_val_loss": 1.5})
    assert "rope_theta: default -> 10000.0  -0.5000" in shown(ranked(tmp_path))


def test_sorting_by_speed_when_no_loss_is_a_number(tmp_path):
    make_run(tmp_path, "a", {"final_val_loss": None})
    make_run(tmp_path, "b", {"final_val_loss": None}, seed=2)
    make_run(tmp_path, "c", {"final_val_loss": None}, n_layer=3)
    assert "not paired" in shown(ranked(tmp_path, "tokens_per_second"))


# -- claims


def test_one_seed_each_means_no_claim(tmp_path):
    two_runs(tmp_path)
    text = shown(ranked(tmp_path), width=160)
    assert ONE_SEED in text
    assert "separable" not in text
    assert "±" not in text


def test_seeds_give_a_mean_an_interval_and_a_paired_verdict(tmp_path):
    for seed, extra in ((1, 0.010), (2, 0.011), (3, 0.012)):
        loss = 2.0 + seed / 100
        make_run(tmp_path, f"llama-s{seed}", {"final_val_loss": loss}, seed=seed)
        make_run(tmp_path, f"gpt2-s{seed}", {"final_val_loss": loss + extra}, seed=seed, normalization="layernorm")
        make_run(tmp_path, f"wide-s{seed}", {"final_val_loss": 2.03 + (-1) ** seed / 50}, seed=seed, n_embd=64)
    text = shown(ranked(tmp_path), width=160)
    assert "llama (3 seeds)" in text
    assert "2.0200 ±0.0248" in text  # 4.303 x 0.01 / sqrt(3)
    assert "#3 gpt2  +0.0110 ± 0.0025 over 3 seeds: separable" in text
    assert "over 3 seeds: not separable" in text
    assert ONE_SEED not in text


def test_a_seed_that_diverged_is_not_dropped_in_silence(tmp_path):
    make_run(tmp_path, "a-1", seed=1)
    make_run(tmp_path, "a-2", {"final_val_loss": None}, seed=2)
    assert "a (1 of 2 seeds finite)" in shown(ranked(tmp_path))


# -- the audit, out loud


def test_incomparable_runs_are_ranked_apart_and_it_says_why(tmp_path):
    two_runs(tmp_path)
    make_run(tmp_path, "other", {"final_val_loss": 1.0}, dataset__name="shakespeare", dataset__fingerprint="ffff")
    text = shown(ranked(tmp_path), width=160)
    assert text.startswith("NOT COMPARABLE: 2 separate rankings")
    assert "dataset: different text" in text
    assert "shakespeare (ffff): other" in text
    assert "Ranking 1 of 2" in text
    assert text.index("llama ") < text.index("Ranking 2 of 2")


def test_what_was_equal_stands_before_the_table(tmp_path):
    two_runs(tmp_path)
    text = shown(ranked(tmp_path), width=220)
    assert text.index("dataset, tokenizer, evaluation set, objective, score, tokens") < text.index("1  llama")
    assert "batch stream of each seed" in " ".join(text.split())
    assert "Careful" not in text


def test_what_nobody_recorded_is_not_called_equal(tmp_path):
    two_runs(tmp_path, git__commit=None)
    text = shown(ranked(tmp_path), width=220)
    assert "torch" in text
    assert "git commit" not in text


@pytest.mark.parametrize(
    "parameters, words", [(1_009_000, "matched (0.9% apart)"), (1_011_000, "not matched (1.1% apart)")]
)
def test_matched_is_a_measured_word(tmp_path, parameters, words):
    two_runs(tmp_path)
    make_run(tmp_path, "third", n_layer=3, parameters__total=parameters)
    assert f"parameters {words}" in shown(ranked(tmp_path), width=160)


def test_careful_lines_name_values_and_runs(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", resolved__device_name="an accelerator", n_layer=3)
    text = shown(ranked(tmp_path))
    assert "Careful: speed, MFU, memory and hours are not comparable" in text
    assert "device  a processor: a · an accelerator: b" in text


# -- the terminal


@pytest.mark.parametrize("width", [80, 100, 160, 220])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    two_runs(tmp_path)
    architecture = "2L-" + "mamba2,attention," * 6
    for index in range(3):
        make_run(tmp_path, f"{index}-" + "many_words-" * 9, architecture=architecture, n_layer=5 + index)
    lines = shown(ranked(tmp_path), width=width).splitlines()
    assert max(map(len, lines)) <= width


def test_a_wide_terminal_has_one_line_for_each_row_and_a_narrow_one_two(tmp_path):
    two_runs(tmp_path)
    (wide,) = [line for line in shown(ranked(tmp_path), 160).splitlines() if line.startswith("1  llama")]
    for text in ("2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm", "1.00M", "6.00M", "76.8k", "2.0000", "1.9000", "2.8850", "2,133",
                 "25.0%", "512MiB", "0.01"):  # fmt: skip
        assert text in wide
    narrow = shown(ranked(tmp_path), 100)
    assert "2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm" in narrow
    assert "2L-2H-32D" not in next(line for line in narrow.splitlines() if line.startswith("1  llama"))


def test_names_are_not_markup_and_long_tables_are_cut(tmp_path):
    for index in range(5):
        make_run(tmp_path, f"[red]run{index}[/]"[:-3], n_layer=index + 1)
    text = shown(ranked(tmp_path), max_rows=2)
    assert "[red]run0" in text
    assert "and 3 more rows in summary_table.csv" in text


def test_problems_come_first_one_line_each(tmp_path):
    make_run(tmp_path, "a")
    assert shown(ranked(tmp_path), problems=["b: left out: it has no config.json"]).startswith(
        "skipped or incomplete: b: left out: it has no config.json\n"
    )


# -- files


def test_csv_has_a_row_for_each_run_in_full_precision(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, f"a-{seed}", {"final_val_loss": 2.0 + seed / 3}, seed=seed)
    make_run(tmp_path, "ünfinished", summary=None, n_layer=3)
    rankings = ranked(tmp_path)
    write_csv(rankings, [analyse(each) for each in rankings], tmp_path / "table.csv")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["name"], row["configuration"], row["seeds"]) for row in rows] == [
        ("1", "a-1", "a", "2"), ("1", "a-2", "a", "2"), ("", "ünfinished", "ünfinished", "1"),
    ]  # fmt: skip
    assert float(rows[0]["final_val_loss"]) == 2.0 + 1 / 3
    assert float(rows[0]["final_val_loss_mean"]) == 2.5
    assert rows[2]["status"] == "unfinished"
    assert rows[2]["peak_memory_bytes"] == ""
    assert {column.name for column in COLUMNS} <= set(rows[0])


def test_markdown_holds_the_table_the_words_and_the_pictures(tmp_path):
    two_runs(tmp_path)
    make_run(tmp_path, "pipe|name", n_layer=3)
    path = tmp_path / "table.md"
    rankings = ranked(tmp_path)
    write_markdown(
        rankings,
        [analyse(each) for each in rankings],
        ["bad_run: left out"],
        [[tmp_path / "validation_loss.png"]],
        path,
    )
    text = path.read_text(encoding="utf-8")
    assert "| 1 | llama | 2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm | 1.00M |" in text
    assert "pipe\\|name" in text
    assert "- bad\\_run: left out" in text
    assert "![validation loss](validation_loss.png)" in text
    assert "normalization: layernorm -> rmsnorm" in text
    table = [line for line in text.replace("\\|", "").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(rankings[0].columns) + 5}


def test_escape():
    assert escape("a_b|c\n`d`") == "a\\_b\\|c \\`d\\`"


# -- models that are judged by another number than the loss


def encoder(folder, name, pseudo_perplexity, loss, **changes):
    """A run of masked_lm, as train.py leaves it."""
    scoring = changes.pop("scoring", {"ranked_by": "pseudo_perplexity", "tokens": 1024})
    scores = {"final_val_loss": loss, "bits_per_byte": None, "masked_accuracy": 0.5}
    scores |= {} if pseudo_perplexity is None else {"pseudo_perplexity": pseudo_perplexity}
    make_run(folder, name, scores, objective="masked_lm", resolved__scoring=scoring, **changes)


def test_encoders_are_ranked_by_pseudo_perplexity_whatever_their_loss(tmp_path):
    encoder(tmp_path, "low-loss", 9.0, 1.0, n_layer=3)
    encoder(tmp_path, "good", 7.5, 1.5)
    encoder(tmp_path, "unmeasured", None, 0.5, n_layer=4)
    two_runs(tmp_path)
    for sort in (None, "final_val_loss", "best_val_loss", "bits_per_byte", "pseudo_perplexity"):
        ranking, causal = rank(find_runs(tmp_path)[0], sort)
        assert [place for place, _ in ranking.places()] == ["1", "2", "-"]
        assert [each.label for each in ranking.ranked] == ["good", "low-loss"] and ranking.sort == "pseudo_perplexity"
        assert [each.label for each in causal.ranked] == ["llama", "gpt2"] or sort in ("best_val_loss", "bits_per_byte")
        assert causal.sort != "pseudo_perplexity"
    shown = {column.name for column in ranking.columns}
    assert ranking.columns[-1].name == "hours" and {"pseudo_perplexity", "masked_accuracy"} <= shown
    assert "answer_accuracy" not in shown  # which a probe has
    assert not {*OF_ONE_OBJECTIVE} & {column.name for column in causal.columns}
    _, problems = find_runs(tmp_path)
    assert problems == ["unmeasured: its pseudo_perplexity is not a finite number; it is not ranked"]


@pytest.mark.parametrize("width", [80, 100, 220])
def test_encoders_are_listed_apart_with_the_reason(tmp_path, width):
    encoder(tmp_path, "good", 7.5, 1.5)
    encoder(tmp_path, "unmeasured", None, 0.5, n_layer=4)
    two_runs(tmp_path)
    text = shown(rank(find_runs(tmp_path)[0]), width=width)
    flat = " ".join(text.split())
    assert "NOT COMPARABLE: 2 separate rankings" in flat
    assert width < 100 or "objective: the losses measure different tasks" in flat
    assert "masked_lm: good, unmeasured · causal_lm: gpt2, llama" in flat or width < 100
    assert "masked_lm, by pseudo perplexity" in flat and "causal_lm, by final loss" in flat
    assert "7.5000" in text and "50.0%" in text


def test_scores_of_other_tokens_are_not_ranked_together(tmp_path):
    encoder(tmp_path, "few", 7.5, 1.5, scoring={"ranked_by": "pseudo_perplexity", "tokens": 64})
    encoder(tmp_path, "many", 9.0, 1.0)
    assert len(rank(find_runs(tmp_path)[0])) == 2


def test_differences_of_encoders_are_stated_in_pseudo_perplexity(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.01), (3, 0.02)):
        encoder(tmp_path, f"a{seed}", 8 + shift, 1.5, seed=seed)
        encoder(tmp_path, f"b{seed}", 9 + 2 * shift, 1.0, seed=seed, normalization="layernorm")
    text = shown(rank(find_runs(tmp_path)[0]), width=220)
    assert "paired by seed, pseudo-perplexity" in text
    assert "+1.0100 ± 0.0248 over 3 seeds: separable" in text


# -- plots


def test_curves_are_drawn_for_both_losses(tmp_path):
    two_runs(tmp_path / "runs")
    make_run(tmp_path / "runs", "_$odd$_名", {"final_val_loss": None}, n_layer=3)
    paths, problems = draw_curves(ranked(tmp_path / "runs")[0], tmp_path, prefix="x_")
    assert [path.name for path in paths] == ["x_validation_loss.png", "x_training_loss.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert problems == []


def test_runs_without_metrics_leave_no_picture(tmp_path):
    make_run(tmp_path, "a", metrics=False)
    assert draw_curves(ranked(tmp_path)[0], tmp_path) == ([], [])


def test_damaged_metrics_of_a_finished_run_are_reported_when_drawn(tmp_path):
    folder = make_run(tmp_path, "a", metrics=False)
    (folder / "metrics.jsonl").write_text('{"kind": "eval"', encoding="utf-8")
    paths, problems = draw_curves(ranked(tmp_path)[0], tmp_path)
    assert paths == []
    assert problems == ["a: metrics.jsonl: line 1 cannot be read (cut off at the end); the rest is used"]


def test_loss_limits_leave_the_first_steps_out():
    import numpy as np

    tokens = np.linspace(0, 100, 101)
    low, high = loss_limits([{"loss": 2 + 3 * np.exp(-tokens / 10), "tokens": tokens}])
    assert low == pytest.approx(2 - 0.05 * 3 * np.exp(-10 / 7), abs=0.01)
    assert high == pytest.approx(2 + 1.05 * 3 * np.exp(-10 / 7), abs=0.01)
    assert loss_limits([]) == (None, None)


def test_legend_labels_are_cut_in_the_middle_and_are_no_mathematics(tmp_path):
    make_run(tmp_path, "$start$-" + "x" * 80 + "-end")
    (ranking,) = ranked(tmp_path)
    label = legend_label(ranking, *ranking.places()[0])
    assert label.startswith("1  \\$start\\$-xx")
    assert label.endswith("x-end  2.0000")
    assert "..." in label


def test_a_size_apart_has_a_sentence_and_matched_is_said_of_each_size(tmp_path):
    for size in (1_000_000, 4_000_000):
        for name, loss in (("a", 2.0), ("b", 2.1)):
            for seed in (1, 2, 3):
                make_run(
                    tmp_path, f"{name}-{size}-s{seed}", {"final_val_loss": loss - size / 1e7 + 0.001 * seed},
                    seed=seed, n_embd=size // 1000, normalization=name, parameters__total=size + (name == "b") * 8000,
                )  # fmt: skip
    (ranking,) = ranked(tmp_path)
    ((_, _, rules),) = rules_section(ranking)
    assert "parameters matched (0.8% apart within each of 2 sizes)" in dict(rules)["Size"]
    ((_, _, rows),) = verdict_section(ranking, analyse(ranking))
    lowest = "At about 1.00M parameters a-1000000 is lowest, separable from b-1000000."
    assert lowest in [sentence for sentence, _ in rows]


def test_a_small_and_a_large_model_are_not_matched_by_being_alone_at_their_sizes(tmp_path):
    for name, total in (("a", 1_000_000), ("b", 1_001_000), ("c", 5_000_000)):
        make_run(tmp_path, name, n_layer=ord(name), parameters__total=total)
    assert size_text(find_runs(tmp_path)[0], "parameters") == "parameters not matched (400.0% apart)"


def test_matched_is_not_said_where_a_size_is_unknown(tmp_path):
    for name, total in (("a", 1000), ("b", 1001), ("c", None)):
        make_run(tmp_path, name, {"n_params": total}, n_layer=ord(name), parameters__total=total)
    runs = find_runs(tmp_path)[0]
    assert size_text(runs, "parameters") == "parameters not matched (0.1% apart, 1 of 3 runs not recorded)"


def test_a_tuned_sweep_is_equal_in_its_budget_and_its_rates_are_no_blame(tmp_path):
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        make_run(tmp_path, name, {}, normalization=name, learning_rate=rate, tuning_runs=4, tuning_tokens=1000)
    (ranking,) = ranked(tmp_path)
    ((_, _, rules),) = rules_section(ranking)
    assert "tuning budget (4 trials, 1,000 tokens)" in dict(rules)["Equal"]
    (rate,) = [finding for finding in ranking.findings if finding.what == "learning_rate"]
    assert rate.consequence == "each at what it did best with in its trials"
