"""Values of config.json."""

from comparison_settings import differing_fields, key_of, number, parts_of


def test_number_takes_finite_numbers_only():
    assert [number(value) for value in (1, 2.5, True, None, "3", float("nan"), float("-inf"), 10**400)] == [
        1, 2.5, None, None, None, None, None, None,
    ]  # fmt: skip


def test_equal_values_have_equal_keys():
    assert key_of({"a": [1, 2.0], "b": None}) == key_of({"b": None, "a": [1.0, 2]})
    assert key_of(1) != key_of("1") and key_of(True) != key_of(1)


def test_fields_that_differ_keep_their_order_and_absence_is_a_value():
    assert differing_fields([{"a": 1, "b": 2, "c": 3}, {"a": 1.0, "b": 3}]) == ["b", "c"]


def test_parts_of_a_file_are_told_apart_by_their_code_and_not_by_comments_or_settings():
    source = b"@FFN_REGISTRY('mine')\nclass Mine:\n    width = 4\n"
    (digest,) = parts_of(source).values()
    assert parts_of(b"n_layer = 3\n# a comment\n" + source) == {"mine": digest}
    assert parts_of(source.replace(b"4", b"5"))["mine"] != digest
    assert parts_of(b"def (\nFFN_REGISTRY['broken'] = 1").keys() == {"broken"}
