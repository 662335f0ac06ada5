"""What is drawn: names that fit."""

import pytest

from comparison_charts import short_names
from comparison_configurations import Configuration


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
