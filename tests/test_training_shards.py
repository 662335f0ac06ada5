"""Sharded token files: the same tokens however they are cut, and a preparation that any interruption leaves whole."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training_prepare
import training_shards
from corpora_helpers import HubRows, real_rows, tables, write_lines  # noqa: F401 - two are fixtures
from data_helpers import Endless, StubDataset, flip_a_byte, settings
from training_data import BatchStream, Dataset, ValidationSet, load_dataset
from training_prepare import prepare, prepare_from_command_line, summary_of
from training_shards import PROGRESS, open_locked
from training_token_files import ShardedTokens, read_meta
from user_errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1500  # bytes of text encoded together, so that a few kilobytes are many chunks


@pytest.fixture
def pages(tmp_path):
    """Settings of 300 documents of 30 to 170 bytes, in shards of 4,096 tokens: 7 for training."""
    rows = [{"text": f"Page {i}: " + "one fish, two fish, é " * (1 + i % 7)} for i in range(300)]
    path = write_lines(tmp_path / "pages.jsonl", rows)
    return settings(tmp_path, input=str(path), shard_tokens=4096)


def changed(base, folder, **changes):
    return SimpleNamespace(**{**vars(base), "data_dir": str(folder), **changes})


def make(base):
    return prepare(base, workers=1, chunk_bytes=CHUNK, quiet=True)


def sums_of(folder):
    """{name: sha256} of the token files, and what meta.json says but for its date."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}
    return sums, {name: value for name, value in read_meta(folder).items() if name != "made"}


# -- one sequence, whatever the files


@pytest.fixture
def sharded(tmp_path):
    """(ShardedTokens of the numbers to 999, those numbers): shards of 1 to 400 tokens."""
    numbers, shards, first = np.arange(1000, dtype="<u2"), [], 0
    for i, n in enumerate([100, 1, 7, 400, 92, 400]):
        path = tmp_path / f"{i}.bin"
        numbers[first : first + n].tofile(path)
        shards.append((path, n))
        first += n
    return ShardedTokens(shards, "<u2"), numbers


def test_shards_read_as_one_sequence(sharded):
    tokens, numbers = sharded
    rng = np.random.default_rng(0)
    assert len(tokens) == 1000 and np.array_equal(tokens, numbers) and np.asarray(tokens).dtype == numbers.dtype
    for start, stop in rng.integers(-1100, 1100, (500, 2)).tolist():
        assert np.array_equal(tokens[start:stop], numbers[start:stop])
    assert [tokens[i] for i in (0, 99, 100, 101, 107, 108, 999, -1, -1000)] == [0, 99, 100, 101, 107, 108, 999, 999, 0]
    assert tokens[5:].dtype == tokens[3:3].dtype == np.dtype("<u2")
    for wrong in (1000, -1001):
        with pytest.raises(IndexError):
            tokens[wrong]
    with pytest.raises(IndexError, match="without a step"):
        tokens[::2]


def test_files_are_mapped_when_they_are_touched_and_views_copy_nothing(sharded):
    tokens, _ = sharded
    assert tokens.maps == [None] * 6
    window = tokens[120:140]
    assert [i for i, file in enumerate(tokens.maps) if file is not None] == [3]
    assert np.shares_memory(window, tokens.maps[3])
    assert len(tokens[90:130]) == 40 and tokens.maps[4] is None


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_one_shard_or_seven_give_the_same_stream(tokenizer, pages, tmp_path):
    choice = {"tokenizer": tokenizer, "tokenizer_vocab_size": 300 if tokenizer == "bpe" else None}
    n_tokens = Dataset(make(changed(pages, tmp_path / "count", **choice, shard_tokens=10**6))).n_tokens("train")
    one = Dataset(make(changed(pages, tmp_path / "one", **choice, shard_tokens=n_tokens)))
    seven = Dataset(make(changed(pages, tmp_path / "seven", **choice, shard_tokens=-(-n_tokens // 7))))
    files = [[path.name for path in sorted(dataset.folder.iterdir())] for dataset in (one, seven)]
    assert files[0] == ["meta.json", "train.bin", "val.bin"]
    assert files[1] == ["meta.json", *[f"train_{i:05d}.bin" for i in range(7)], "val.bin"]
    assert isinstance(one.train, np.ndarray) and isinstance(seven.train, ShardedTokens)
    assert one.fingerprint == seven.fingerprint and one.meta["splits"]["train"]["sha256"] == sha_of(seven)
    assert seven.meta["splits"]["train"]["tokens"] == sum(s["tokens"] for s in seven.meta["splits"]["train"]["shards"])

    streams = [BatchStream(dataset, 33, 6, seed=1) for dataset in (one, seven)]
    hashes, crossing = [None, None], 0
    for step in range(-(-2 * streams[0].windows_per_epoch // 6)):  # two epochs, so that windows cross every border
        hashes = [stream.hash_after(step, before) for stream, before in zip(streams, hashes, strict=True)]
        batches = [stream.batches(step)[0] for stream in streams]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("inputs", "targets"))
        starts = streams[1].window_starts(step)
        crossing += int((starts // seven.train.ends[0] != (starts + 33) // seven.train.ends[0]).sum())
    assert hashes[0] == hashes[1] and crossing >= 6
    validations = [ValidationSet(dataset, 33) for dataset in (one, seven)]
    assert validations[0].hash == validations[1].hash and validations[0].n_bytes == validations[1].n_bytes


def sha_of(dataset):
    raw = b"".join((dataset.folder / f"train_{i:05d}.bin").read_bytes() for i in range(len(dataset.train.maps)))
    return hashlib.sha256(raw).hexdigest()


def test_a_validation_split_may_be_sharded_too(pages, tmp_path):
    few = Dataset(make(changed(pages, tmp_path / "few", shard_tokens=1024)))
    assert len(few.meta["splits"]["val"]["shards"]) == 4
    whole = Dataset(make(changed(pages, tmp_path / "whole", shard_tokens=10**6)))
    for one, other in zip(ValidationSet(few, 50).batches(7), ValidationSet(whole, 50).batches(7), strict=True):
        assert torch.equal(one["targets"], other["targets"])
    assert "4 files" in summary_of(few.folder) and "files" not in summary_of(whole.folder)


def test_an_epoch_of_a_trillion_windows_takes_no_memory():
    stream = BatchStream(StubDataset(Endless()), 1, 64, seed=0)  # 2^40 tokens, each a window
    tracemalloc.start()
    try:
        starts = np.concatenate([stream.window_starts(step) for step in range(10**9, 10**9 + 200)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(starts)) == len(starts) and starts.dtype == np.int64 and starts.max() > 2**39
    assert peak < 2**20


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 100), "truncated"),
        (lambda path: os.truncate(path, 0), "is empty"),
        (flip_a_byte, "wrong checksum"),
    ],
)
def test_a_damaged_shard_is_named(damage, sentence, pages):
    folder = make(pages)
    damage(folder / "train_00003.bin")
    with pytest.raises(UserError, match=rf"train_00003\.bin .*{sentence}") as caught:
        load_dataset(pages)
    assert "\n" not in str(caught.value)


def test_large_shards_are_checked_when_asked(pages, monkeypatch, capsys):
    folder = make(pages)
    flip_a_byte(folder / "train_00002.bin")
    monkeypatch.setattr("training_data.CHECKSUMMED_BYTES", 1000)  # as if they were large: the start does not read them
    load_dataset(pages)
    arguments = [f"--input={pages.input}", f"--data_dir={pages.data_dir}", "--shard_tokens=4096"]
    prepare_from_command_line("text", "about", arguments)
    with pytest.raises(SystemExit):
        prepare_from_command_line("text", "about", [*arguments, "--check"])
    assert "train_00002.bin has a wrong checksum" in capsys.readouterr().err


def test_a_meta_whose_shards_do_not_add_up_is_damaged(pages):
    folder = make(pages)
    meta = read_meta(folder)
    del meta["splits"]["train"]["shards"][2]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match=r"is damaged .*train shards do not add up"):
        load_dataset(pages)


def test_folders_without_a_list_of_shards_are_read(pages, tmp_path):
    """As they were written before there were shards."""
    folder = make(changed(pages, tmp_path / "old", shard_tokens=10**6))
    meta, expected = read_meta(folder), np.array(Dataset(folder).train)
    for split in ("train", "val"):
        del meta["splits"][split]["shards"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert np.array_equal(Dataset(folder).train, expected)
    flip_a_byte(folder / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin has a wrong checksum"):
        Dataset(folder)


# -- interruptions

KILLED = """
import os, pathlib, random, signal, sys
from types import SimpleNamespace

import training_prepare, training_shards

input, folder, tokenizer, step = sys.argv[1:]
calls, last = 0, 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for owner, name in [(os, "fsync"), (os, "replace"), (pathlib.Path, "unlink"), (training_shards.TokenFile, "append"),
                    (training_shards.Preparation, "write"), (training_shards.TokenFile, "__init__")]:
    setattr(owner, name, counted(getattr(owner, name)))

def prepare_in_child(data_dir, last_call):
    global calls, last
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls, last = 0, last_call
    choice = dict(tokenizer=tokenizer, tokenizer_vocab_size=300 if tokenizer == "bpe" else None, variant=None)
    settings = SimpleNamespace(dataset="text", data_dir=data_dir, input=input, shard_tokens=8192, **choice)
    training_prepare.prepare(settings, workers=1, chunk_bytes=4000, quiet=True)
    os._exit(0)

rng, n, n_kills = random.Random(0), 1, 0
while True:  # killed before its n-th call, again at a random one, then left alone
    data_dir = f"{folder}/{n}"
    if prepare_in_child(data_dir, n) == 0:
        break
    n, n_kills = n + int(step), n_kills + 1
    if prepare_in_child(data_dir, rng.randrange(1, 50)) != 0:
        assert prepare_in_child(data_dir, 0) == 0
print(n_kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork and no SIGKILL")
@pytest.mark.parametrize("tokenizer, step", [("byte", 2), ("bpe", 3)])
def test_killed_anywhere_it_goes_on_to_the_same_files(tokenizer, step, pages, tmp_path):
    """SIGKILL before every second or third write, fsync and rename, and again at a random one of what follows."""
    choice = {"tokenizer": tokenizer, "tokenizer_vocab_size": 300 if tokenizer == "bpe" else None}
    undisturbed = sums_of(make(changed(pages, tmp_path / "whole", **choice, shard_tokens=8192)))
    command = [sys.executable, "-c", KILLED, pages.input, str(tmp_path / "killed"), tokenizer, str(step)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert child.returncode == 0, child.stderr
    n_kills = int(child.stdout)
    assert n_kills > 10
    for data_dir in (tmp_path / "killed").iterdir():
        n, (folder,) = data_dir.name, data_dir.iterdir()
        assert sums_of(folder) == undisturbed, f"killed before call {n}"
        names = {path.name for path in folder.iterdir()}
        assert names - {PROGRESS} == {"meta.json", *undisturbed[0]}, f"killed before call {n}"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_command_killed_at_random_moments_goes_on(pages, tmp_path):
    """The command itself with its threads, killed -9 by the clock."""
    rows = [{"text": f"Page {i}: " + "one fish, two fish, é " * (50 + i * 7 % 5)} for i in range(4000)]
    big = str(write_lines(tmp_path / "big.jsonl", rows))
    choice = {"input": big, "tokenizer": "char", "shard_tokens": 100_000}
    undisturbed = sums_of(prepare(changed(pages, tmp_path / "whole", **choice), quiet=True))
    command = [sys.executable, "data/text/prepare.py", f"--input={big}", "--tokenizer=char", "--shard_tokens=100000"]
    command.append(f"--data_dir={tmp_path / 'killed'}")
    folder, n_kills, rng = tmp_path / "killed" / "text-big-char", 0, np.random.default_rng(int(time.time()))
    while n_kills < 4:
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and not (folder / PROGRESS).exists():
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.2)))
        child.kill()
        error = child.communicate()[1]
        assert child.returncode in (0, -9), error
        if child.returncode == 0:
            break
        n_kills += 1
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert n_kills > 0 and sums_of(folder) == undisturbed


def interrupted(base, monkeypatch, n_chunks, error=KeyboardInterrupt):
    """Prepare until n_chunks are encoded; the folder of what is left."""
    encode, count = training_prepare.encode_chunk, [0]

    def encode_some(*args):
        count[0] += 1
        if count[0] > n_chunks:
            raise error
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training_prepare, "encode_chunk", encode_some)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            make(base)
    return training_prepare.recipe_of(base).folder


def test_what_is_whole_stays_after_an_interruption_and_the_rest_is_not_read_again(pages, monkeypatch):
    folder = interrupted(pages, monkeypatch, 10)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [PROGRESS, "train_00000.bin", "train_00001.bin", "train_00002.bin", "train_00003.bin.tmp",
                     "val_00000.bin.tmp"]  # fmt: skip
    before = {name: (folder / name).stat().st_mtime_ns for name in names if name.endswith(".bin")}
    encode, texts = training_prepare.encode_chunk, []

    def recorded(tokenizer, end_id, documents):
        texts.extend(text for _, text, _ in documents)
        return encode(tokenizer, end_id, documents)

    monkeypatch.setattr(training_prepare, "encode_chunk", recorded)
    advances = []
    monkeypatch.setattr(training_prepare, "progress_bar", lambda quiet: Advances(advances))
    make(pages)
    assert 100 < len(texts) < 200 and texts[-1].startswith("Page 299")
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    checked = [told for told in advances if told[0] == "checking what is kept"]
    assert checked == advances[:3] == [("checking what is kept", 2 * 4096, 6 * 4096)] * 3
    (what, n_bytes, expected, already), *later = advances[3:]
    assert (what, n_bytes) == ("encoding", 0) and already > 3 * 4096 * 0.9
    total = sum(facts["bytes"] for facts in read_meta(folder)["splits"].values())
    assert already + sum(n for _, n, *_ in later) == total <= expected


class Advances(list):
    """A progress bar that keeps what it was told."""

    def __init__(self, told):
        self.told = told

    def __enter__(self):
        return lambda *args: self.told.append(args)

    def __exit__(self, *exception):
        pass


def test_the_bar_goes_on_where_it_was(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    with training_prepare.progress_bar() as advance:
        advance("encoding", 0, 10**9, 5 * 10**8)
        advance("encoding", 10**8, 10**9)
    assert "600.0/" in capsys.readouterr().err.replace("\n", "")


def test_an_early_interruption_leaves_nothing(pages, monkeypatch):
    folder = interrupted(pages, monkeypatch, 1)
    assert not folder.exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"shard_tokens": 2048}, "shard_tokens=4096, not shard_tokens=2048"),
        ({"tokenizer": "char"}, None),  # another folder
        ({"more": True}, "unfinished preparation with input="),
    ],
)
def test_other_settings_do_not_go_on(changes, sentence, pages, monkeypatch):
    folder = interrupted(pages, monkeypatch, 10)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if changes.pop("more", False):
        with open(pages.input, "a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
    other = changed(pages, pages.data_dir, **changes)
    if sentence is None:
        assert make(other) != folder
    else:
        with pytest.raises(UserError, match=sentence) as caught:
            make(other)
        assert PROGRESS in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["train_00001.bin", "train_00003.bin.tmp"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10), flip_a_byte])
def test_what_was_kept_is_checked_before_it_goes_on(name, damage, pages, monkeypatch):
    folder = interrupted(changed(pages, pages.data_dir, shard_tokens=4096), monkeypatch, 11)
    if name.endswith(".tmp"):  # only what a line promised: here the validation split's open file
        name = "val_00000.bin.tmp"
    damage(folder / name)
    with pytest.raises(UserError, match=rf"{name} .*(missing|changed).*{PROGRESS}") as caught:
        make(pages)
    assert "\n" not in str(caught.value)


def test_a_line_cut_off_by_a_crash_is_dropped(pages, monkeypatch):
    folder = interrupted(pages, monkeypatch, 10)
    undisturbed = sums_of(make(changed(pages, folder.parent.parent / "whole")))
    with open(folder / PROGRESS, "ab") as file:
        file.write(b'{"place": {"file": 0, "wit')
    n_lines = len((folder / PROGRESS).read_bytes().splitlines()) - 1
    interrupted(pages, monkeypatch, 4)  # the lines that follow are whole again
    lines = (folder / PROGRESS).read_text(encoding="utf-8").splitlines()
    assert len(lines) > n_lines and all(json.loads(line) for line in lines)
    assert sums_of(make(pages)) == undisturbed


def test_a_file_of_the_users_is_never_overwritten(pages, monkeypatch):
    folder = interrupted(pages, monkeypatch, 10)
    (folder / "train_00005.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train_00005\.bin is there already.*files are kept"):
        make(pages)
    assert (folder / "train_00005.bin").read_bytes() == b"mine"
    (folder / "train_00005.bin").unlink()
    assert sums_of(make(pages)) == sums_of(make(changed(pages, folder.parent.parent / "whole")))


def test_files_that_nothing_describes_are_refused_and_left(pages):
    folder = Path(pages.data_dir) / "text-pages"
    folder.mkdir(parents=True)
    (folder / "train_00000.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"no meta\.json .*remove train_00000\.bin"):
        make(pages)
    (folder / PROGRESS).touch()  # of a process killed at its very start
    with pytest.raises(UserError, match=r"no meta\.json"):
        make(pages)
    assert [path.name for path in folder.iterdir()] == ["train_00000.bin"]


def test_shards_must_not_be_tiny(pages):
    pages.shard_tokens = 100
    with pytest.raises(UserError, match="shard_tokens=100 must be at least 1024"):
        make(pages)


def test_ctrl_c_says_what_is_kept(pages, monkeypatch, capsys):
    monkeypatch.setattr(training_prepare.prepare, "__defaults__", (1, CHUNK, True))
    arguments = [f"--input={pages.input}", f"--data_dir={pages.data_dir}", "--shard_tokens=4096"]
    encode, count = training_prepare.encode_chunk, [0]

    def encode_some(*args):
        count[0] += 1
        if count[0] == 11:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(training_prepare, "encode_chunk", encode_some)
    with pytest.raises(SystemExit) as caught:
        prepare_from_command_line("text", "about", arguments)
    assert caught.value.code == 2 and "error: interrupted; 3 whole files are kept" in capsys.readouterr().err
    prepare_from_command_line("text", "about", arguments)
    assert "7 files" in capsys.readouterr().out


# -- two processes


def test_a_second_process_waits_and_finds_it_made(pages, monkeypatch, capsys):
    make(changed(pages, pages.data_dir + "-other"))
    encode, entered, go = training_prepare.encode_chunk, threading.Event(), threading.Event()

    def slow(*args):
        entered.set()
        assert go.wait(30)
        return encode(*args)

    monkeypatch.setattr(training_prepare, "encode_chunk", slow)
    made = []
    processes = [threading.Thread(target=lambda: made.append(make(pages)), daemon=True) for _ in range(2)]
    processes[0].start()
    assert entered.wait(30)
    entered.clear()
    processes[1].start()  # flock and locking hold between two opened files as between processes
    while "waiting for it" not in capsys.readouterr().err:
        time.sleep(0.01)
    assert not entered.is_set()  # it has not begun
    go.set()
    for process in processes:
        process.join(30)
    assert made == [Path(pages.data_dir) / "text-pages"] * 2
    assert PROGRESS not in [path.name for path in made[0].iterdir()] and Dataset(made[0])


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(tmp_path):
    first = open_locked(tmp_path / PROGRESS)
    opened = []
    waiting = threading.Thread(target=lambda: opened.append(open_locked(tmp_path / PROGRESS)), daemon=True)
    waiting.start()
    time.sleep(0.05)
    training_shards.remove_locked(tmp_path / PROGRESS, first)
    waiting.join(10)
    assert opened and training_shards.is_still(tmp_path / PROGRESS, opened[0])
    opened[0].close()


# -- streamed from the Hub


@pytest.fixture
def hub_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("training_corpora_hub.latest_revision", lambda path, revision: "f3808c3")
    monkeypatch.setattr("training_corpora_hub.HubCorpus.val_one_in", 10)
    return settings(tmp_path, dataset="openwebtext", tokenizer="byte", shard_tokens=1024)


def test_a_stream_of_real_rows_goes_on_behind_the_last_whole_file(hub_settings, real_rows, tables, tmp_path):  # noqa: F811
    undisturbed = sums_of(prepare(changed(hub_settings, tmp_path / "whole"), 1, 100, quiet=True))
    tables.fail += [("0002", 1)] * 9
    with pytest.raises(UserError, match=r"Server Disconnected.*files are kept.*same command"):
        prepare(hub_settings, 1, 100, quiet=True)
    tables.fail.clear()
    tables.read.clear()
    folder = prepare(hub_settings, 1, 100, quiet=True)
    assert sums_of(folder) == undisturbed and len(undisturbed[0]) > 5 and undisturbed[1]["revision"] == "f3808c3"
    assert {file for file, _ in tables.read} <= {"0001", "0002"}


def test_the_revision_it_was_begun_with_holds(hub_settings, monkeypatch):
    asked = []

    class Hub:
        __version__ = "5.2.0"
        breaks = [100] * 5

        @staticmethod
        def load_dataset(path, config, split, streaming, revision):
            asked.append(revision)
            return HubRows([f"page {i} of some length" for i in range(200)], Hub.breaks)

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    monkeypatch.setattr("training_corpora_hub.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="Server Disconnected"):
        prepare(hub_settings, 1, 100, quiet=True)
    monkeypatch.setattr("training_corpora_hub.latest_revision", lambda path, revision: "a later one")
    folder = prepare(hub_settings, 1, 100, quiet=True)
    assert set(asked) == {"f3808c3"} and read_meta(folder)["revision"] == "f3808c3"
