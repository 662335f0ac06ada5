"""What is drawn: names that fit."""

import pytest

from comparison_analysis import analyse
from comparison_charts import curve_charts, drawn_column, short_names
from comparison_configurations import Configuration
from comparison_helpers import make_run, metrics_rows
from comparison_ranking import rank
from comparison_runs import find_runs


@pytest.mark.parametrize("labels, short", [
    (["gpt2-1.1M", "mamba-1.1M"], ["gpt2", "mamba"]),
    (["sweep-a-1M", "sweep-a-2M"], ["1M", "2M"]),
    (["llama-5M", "llama-1M", "mamba-5M"], ["llama-5M", "llama-1M", "mamba-5M"]),
    (["linear_attention-1M", "attention-1M"], ["linear_attention", "attention"]),
    (["a", "a-b"], ["a", "a-b"]),
    (["a-b", "a-b-c"], ["b", "b-c"]),
    (["alone-1M"], ["alone-1M"]),
    ([], []),
])  # fmt: skip
def test_what_all_labels_share_is_left_out_of_charts(labels, short):
    assert list(short_names([Configuration(label, []) for label in labels]).values()) == short


def test_a_score_of_the_end_alone_leaves_the_curves_to_the_validation_loss(tmp_path):
    for name, score in (("a", 20.0), ("b", 30.0)):
        rows = metrics_rows({"final_val_loss": 2.0, "steps": 100, "tokens_processed": 1000, "train_seconds": 1.0})
        rows[-1]["pseudo_perplexity"] = score
        make_run(tmp_path, name, {"pseudo_perplexity": score}, metrics=rows, normalization=name, objective="masked_lm",
                 resolved__scoring={"ranked_by": "pseudo_perplexity"})  # fmt: skip
    (ranking,) = rank(find_runs(tmp_path)[0])
    assert (ranking.loss_column, drawn_column(ranking)) == ("pseudo_perplexity", "final_val_loss")
    charts, _ = curve_charts(ranking, analyse(ranking))
    assert all(">validation loss<" in svg and 'class="m"' not in svg for svg in charts)
