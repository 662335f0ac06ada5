"""One schedule in several config files: the same counts, nothing of theirs lost, contradictions refused."""

import pytest

import training_schedules as schedules
from training_helpers import book, workshop  # noqa: F401
from user_errors import UserError

COMMON = "block_size = 16\nmax_tokens = 4000\n"


@pytest.fixture
def sync(workshop):  # noqa: F811
    """Write files, synchronise them, return (counts, names that changed, {name: bytes})."""

    def run(files, *arguments):
        paths = [workshop.folder / name for name in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.write_bytes(text if isinstance(text, bytes) else (COMMON + text).encode())
        counts, changed = schedules.synchronise(paths, [*workshop.data, *arguments])
        return counts, [path.name for path in changed], {path.name: path.read_bytes() for path in paths}

    return run


def test_files_take_the_schedule_of_the_one_that_has_it(sync, workshop):  # noqa: F811
    counts, changed, files = sync({"a.py": "batch_size = 2\ncheckpoint_tokens = '1k,2k'\n", "b.py": "batch_size = 8\n"})
    assert counts == [1000, 2000, 4000] and changed == ["a.py", "b.py"]
    plans = [schedules.plan([str(workshop.folder / name), *workshop.data]) for name in files]
    assert plans[0].counts == plans[1].counts == counts
    assert plans[0].steps == {32: 1000, 63: 2000, 125: 4000} and plans[1].steps == {8: 1000, 16: 2000, 32: 4000}
    again = schedules.synchronise([workshop.folder / name for name in files], workshop.data)
    assert again == (counts, [])


def test_nothing_else_of_a_file_changes(sync):
    a = "# top\r\nfirst_epoch_checkpoints = 3  # why, é\r\nblock_size = 16\r\nmax_tokens = 4000\r\nseed = 3  # last"
    b = COMMON + "checkpoint_tokens = (  # mine\n    4, 40,\n    400)  # after\nseed = 5\n"
    _, _, files = sync({"a.py": a.encode(), "c.py": COMMON.encode()})
    kept = a.replace("first_epoch", "# first_epoch").encode()
    assert files["a.py"] == kept + b"\r\n\r\ncheckpoint_tokens = (\r\n    4, 126, 4_000,\r\n)\r\n"
    _, _, files = sync({"b.py": b.encode(), "c.py": COMMON.encode()})
    assert files["b.py"] == (COMMON + "checkpoint_tokens = (\n    4, 40, 400, 4_000,\n)  # after\nseed = 5\n").encode()
    assert files["c.py"] == (COMMON + "\ncheckpoint_tokens = (\n    4, 40, 400, 4_000,\n)\n").encode()


def test_the_command_may_give_the_schedule(sync):
    counts, _, files = sync({"a.py": "checkpoint_tokens = '1k'\n", "b.py": ""}, "--checkpoint_tokens=2k")
    assert counts == [2000, 4000] and all(b"2_000, 4_000" in data for data in files.values())


@pytest.mark.parametrize("a, b, words", [
    ("checkpoint_tokens = '1k'\n", "checkpoint_tokens = '2k'\n", ["a.py and", "different schedules", "1,000 tokens"]),
    ("checkpoint_tokens = '1k'\n", "max_tokens = 5000\n", ["4,000", "5,000", "the same max_tokens"]),
    ("", "", ["none of the configs has a schedule", "first_epoch_checkpoints"]),
    ("if True:\n    checkpoint_tokens = '1k'\n", "", ["a.py, line 3", "checkpoint_tokens", "plain"]),
    ("seed = 3; checkpoint_tokens = '1k'\n", "", ["a.py, line 3", "on a line of its own"]),
    ("checkpoint_tokens = '1k,2k'\nseed = len(checkpoint_tokens)\n", "", ["a.py would not mean the same"]),
    ("first_epoch_checkpoints = 3\nseed = first_epoch_checkpoints\n", "", ["a.py", "seed"]),
])  # fmt: skip
def test_contradictions_are_refused_and_leave_the_files_alone(sync, workshop, a, b, words):  # noqa: F811
    with pytest.raises(UserError) as refusal:
        sync({"a.py": a, "b.py": b})
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert (workshop.folder / "a.py").read_text() == COMMON + a
    assert (workshop.folder / "b.py").read_text() == COMMON + b
