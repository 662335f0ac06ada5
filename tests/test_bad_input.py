"""What careless users type: a mistake costs one sentence of what and what to do, and nothing is lost or half made."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import json
import shutil

import pytest

import train
from training_helpers import Workshop, a_peak, book, files_in, workshop


@pytest.fixture(scope="module")
def taken(book, tmp_path_factory):
    """A Workshop with one finished run, 'taken'; nothing in this file may change it."""
    shop = Workshop(tmp_path_factory.mktemp("taken"), book)
    shop.run("--keep_checkpoints=0", name="taken")
    return shop


# ---- settings -------------------------------------------------------------------------------------------------------

SETTINGS = [
    # names and types
    ("--n_layr=2", ["'n_layr' is not a setting", "did you mean 'n_layer'", "--help"]),
    ("--learning-rat=1", ["'learning_rat' is not a setting", "did you mean 'learning_rate'"]),
    ("--hello", ["'hello' is not a setting"]),
    ("--part_options={}", ["'part_options' is not a setting"]),
    ("--n_layer", ["--n_layer needs a value", "--n_layer=VALUE"]),
    ("--n_layer=two", ["n_layer='two' is a str, and must be an int"]),
    ("--n_layer=2.0", ["n_layer=2.0 is a float, and must be an int"]),
    ("--max_iters=1e3", ["max_iters=1000.0 is a float, and must be an int or None"]),
    ("--bias=maybe", ["bias='maybe' is a str, and must be a bool"]),
    ("--bias=1", ["bias=1 is an int, and must be a bool"]),
    ("--learning_rate=fast", ["learning_rate='fast' is a str, and must be a float"]),
    ("--seed=1.5", ["seed=1.5 is a float"]),
    ("--dropout=None", ["dropout=None", "must be a float"]),
    # names of parts
    ("--arch_preset=lama", ["arch_preset='lama' does not exist", "did you mean 'llama'"]),
    ("--model_size=7B", ["model_size='7B' does not exist", "1M, 5M, 10M, 124M"]),
    ("--normalization=rms", ["normalization='rms' does not exist", "did you mean 'rmsnorm'"]),
    ("--activation=gelo", ["activation='gelo' does not exist", "did you mean 'gelu'"]),
    ("--position_encoding=ropes", ["position_encoding='ropes' does not exist", "did you mean 'rope'"]),
    ("--attention_backend=flash", ["attention_backend='flash' does not exist", "sdpa"]),
    ("--norm_position=middle", ["norm_position='middle' does not exist", "pre, post, output, sandwich"]),
    ("--ffn_type=swigl", ["ffn_type='swigl' does not exist", "did you mean 'swiglu'"]),
    ("--block_pattern=", ["block_pattern='' does not exist"]),
    ("--block_pattern=atention", ["block_pattern='atention' does not exist", "did you mean 'attention'"]),
    ("--block_pattern=attention/foo", ["ffn_type='foo' does not exist"]),
    ("--objective=causal", ["objective='causal' does not exist", "did you mean 'causal_lm'"]),
    ("--optimizer=adam", ["optimizer='adam' does not exist", "did you mean 'adamw'"]),
    ("--schedule=cosin", ["schedule='cosin' does not exist", "did you mean 'cosine'"]),
    ("--init_from=hello", ["init_from='hello' must be one of scratch, resume"]),
    ("--init_from=resme", ["init_from='resme' must be one of", "did you mean 'resume'"]),
    ("--dtype=fp16", ["dtype='fp16' must be one of auto, float32, bfloat16, float16"]),
    ("--dtype=bfloat", ["did you mean 'bfloat16'"]),
    ("--gradient_checkpointing=all", ["gradient_checkpointing='all' must be one of none, full, selective"]),
    ("--fsdp_dtype=float16", ["fsdp_dtype='float16' must be one of float32, bfloat16"]),
    ("--compile=yes", ["compile='yes' must be one of True, False, auto"]),
    ("--fsdp_replicas=2", ["fsdp_replicas=2 is a way to shard; set use_fsdp=True beside it"]),
    ("--fsdp_cpu_offload=True", ["fsdp_cpu_offload=True is a way to shard; set use_fsdp=True beside it"]),
    ("--expert_parallel=2", ["expert_parallel=2 is a way to shard; set use_fsdp=True beside it"]),
    ("--tensor_parallel=0", ["tensor_parallel=0 must be at least 1"]),
    ("--collective_timeout=0", ["collective_timeout=0 must be at least 1"]),
    # numbers
    ("--n_layer=0", ["n_layer=0 must be at least 1"]),
    ("--n_embd=-16", ["n_embd=-16 must be at least 1"]),
    ("--block_size=0", ["block_size=0 must be at least 1"]),
    ("--dropout=1.0", ["dropout=1.0 must lie in [0, 1)"]),
    ("--dropout=-0.1", ["dropout=-0.1"]),
    ("--batch_size=0", ["batch_size=0 must be at least 1"]),
    ("--gradient_accumulation_steps=0", ["gradient_accumulation_steps=0 must be at least 1"]),
    ("--max_iters=0", ["max_iters=0 must be above 0"]),
    ("--max_iters=-5", ["max_iters=-5 must be above 0"]),
    ("--max_tokens=0", ["max_tokens=0 must be above 0"]),
    ("--epochs=-1", ["epochs=-1.0 must be above 0"]),
    ("--epochs=1e999", ["epochs=inf must be a finite number"]),
    ("--learning_rate=0", ["learning_rate=0.0 must be above 0"]),
    ("--learning_rate=1e999", ["learning_rate=inf must be a finite number"]),
    ("--min_lr=-1.0", ["min_lr=-1.0 is below 0"]),
    ("--warmup_iters=-1", ["warmup_iters=-1 must be at least 0"]),
    ("--beta1=1.0", ["beta1=1.0 must lie in [0, 1)"]),
    ("--weight_decay=-1.0", ["weight_decay=-1.0 must be at least 0"]),
    ("--grad_clip=-1.0", ["grad_clip=-1.0 must be at least 0"]),
    ("--seed=-1", ["seed=-1 must be at least 0"]),
    ("--seed=99999999999999999999", ["seed=99999999999999999999 must be at most"]),
    ("--threads=1000000", ["threads=1000000 must be at most 1024"]),
    ("--eval_interval=0", ["eval_interval=0 must be at least 1"]),
    ("--eval_iters=-1", ["eval_iters=-1 must be at least 0"]),
    ("--log_interval=0", ["log_interval=0 must be at least 1"]),
    ("--checkpoint_interval=-1", ["checkpoint_interval=-1 must be 0 or more"]),
    ("--keep_checkpoints=-1", ["keep_checkpoints=-1 must be at least 0"]),
    ("--sample_tokens=-1", ["sample_tokens=-1 must be at least 0"]),
    ("--prefetch_batches=-1", ["prefetch_batches=-1 must be at least 0"]),
    ("--max_non_finite_steps=0", ["max_non_finite_steps=0 must be at least 1"]),
    ("--logit_soft_cap=-1.0", ["logit_soft_cap=-1.0"]),
    # contradictions
    ("--n_head=3", ["n_embd=16", "n_head=3"]),
    ("--n_kv_head=3", ["n_head=2", "n_kv_head=3"]),
    ("--position_encoding=rope --n_embd=6", ["position_encoding='rope'", "3 is odd"]),
    ("--parallel_blocks=True --norm_position=post", ["parallel_blocks=True", "norm_position='post'"]),
    ("--causal=False", ["objective='causal_lm'", "causal=False"]),
    ("--arch_preset=bert", ["objective='causal_lm'", "causal=False", "use objective='masked_lm'"]),
    ("--objective=masked_lm", ["objective='masked_lm'", "causal=True", "config/arch_bert.py"]),
    ("--arch_preset=bert --block_pattern=mamba", ["causal=False", "'mamba' in block_pattern='mamba'", "left to right"]),
    ("--arch_preset=bert --objective=masked_lm --vocab_size=256", ["objective needs 1 more", "set vocab_size=257"]),
    ("--arch_preset=bert --objective=masked_lm --mask_fraction=2.0", ["mask_fraction=2.0 must lie in (0, 1]"]),
    ("--objective=lm_plus_win", ["objective='lm_plus_win' predicts an outcome", "has none; use --dataset=games"]),
    ("--lambda_wp=most", ["lambda_wp='most' is a str, and must be a float"]),
    ("--mask_fraction=most", ["mask_fraction='most' is a str, and must be a float"]),
    ("--attention_soft_cap=5.0", ["attention_soft_cap=5.0", "attention_backend='sdpa'"]),
    ("--attention_backend=flex", ["attention_backend='flex'", "cpu", "'sdpa' or 'manual'"]),
    ("--max_iters=None", ["no length", "max_iters, max_tokens or epochs"]),
    ("--max_tokens=1000 --epochs=1", ["max_tokens=1000 and epochs=1.0", "keep one"]),
    ("--min_lr=1.0", ["min_lr=1.0 is above learning_rate=0.01"]),
    ("--warmup_iters=50 --lr_decay_iters=10", ["lr_decay_iters=10", "warmup_iters=50"]),
    ("--schedule=wsd --wsd_decay_fraction=2.0", ["wsd_decay_fraction=2.0 must lie in (0, 1]"]),
    ("--optimizer=muon --muon_momentum=-1.0", ["muon_momentum=-1.0 must lie in [0, 1)"]),
    ("--optimizer=muon --muon_learning_rate=-1.0", ["muon_learning_rate=-1.0 must be above 0"]),
    # place
    ("--device=gpu", ["device='gpu' is not a device", "auto, cpu, cuda"]),
    ("--device=meta", ["device='meta' is not supported"]),
    # names of runs
    ("--run_name=taken", ["run_name='taken' exists", "--init_from=resume", "another name"]),
    ("--run_name=", ["run_name='' must be a plain folder name"]),
    ("--run_name=a/b", ["run_name='a/b' must be a plain folder name"]),
    ("--run_name=..", ["run_name='..' must be a plain folder name"]),
    # data
    ("--dataset=shakespear", ["dataset='shakespear' does not exist", "did you mean 'shakespeare'", "--input=FILE"]),
    ("--input=nothere.txt", ["input='nothere.txt' does not exist"]),
    ("--tokenizer=bite", ["tokenizer='bite' does not exist", "did you mean 'byte'"]),
    ("--tokenizer=bpe --tokenizer_vocab_size=10", ["tokenizer_vocab_size=10 is too small"]),
    ("--tokenizer=byte --tokenizer_vocab_size=400", ["tokenizer_vocab_size=400 has no meaning"]),
    ("--variant=small", ["dataset text has no variants"]),
    ("--vocab_size=10", ["vocab_size=10 is too small", "set vocab_size=256"]),
    ("--block_size=100000", ["the training split has", "100001", "lower --block_size"]),
    ("--block_size=2000", ["the validation split has", "2001", "lower --block_size"]),
    # config files
    ("nofile.py", ["config file nofile.py does not exist", "--name=value"]),
    ("n_layer=2", ["config file n_layer=2 does not exist", "--name=value"]),
]


def left_behind(shop):
    """Every file but for the data, and the folders too."""
    return files_in(shop.folder), sorted(str(path) for path in shop.folder.rglob("*"))


@pytest.mark.parametrize("arguments, words", SETTINGS, ids=[arguments for arguments, _ in SETTINGS])
def test_a_setting_that_cannot_be_meant(taken, workshop, arguments, words):
    before = left_behind(taken)
    command = [argument for argument in taken.command(*arguments.split(" "))]
    sentence = workshop.refused(*command)
    assert all(word in sentence for word in words), sentence
    assert left_behind(taken) == before
    assert list(workshop.folder.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_this_machine_lacks(taken, workshop, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    sentence = workshop.refused(*taken.command(f"--device={device}"))
    assert f"device='{device}' needs" in sentence and "device=cpu" in sentence


@pytest.mark.parametrize("text, words", [
    ("n_layer = ", ["mine.py, line 1", "SyntaxError"]),
    ("import nothing_of_this_name", ["mine.py, line 1", "ModuleNotFoundError", "nothing_of_this_name"]),
    ("x = 1\nn_layer = 1 // 0", ["mine.py, line 2", "ZeroDivisionError"]),
    ("n_layer = 'two'", ["mine.py", "n_layer='two' is a str"]),
    ("n_layr = 2", ["mine.py", "'n_layr' is not a setting", "did you mean 'n_layer'"]),
    ("dropout = 2.0", ["dropout=2.0 must lie in [0, 1)"]),
    ("import model_components as m\n@m.NORM_REGISTRY('rmsnorm')\nclass A: pass", ["line", "'rmsnorm' is already"]),
], ids=["syntax", "import", "crash", "type", "name", "value", "duplicate"])  # fmt: skip
def test_a_config_file_that_is_wrong(taken, workshop, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    before = left_behind(taken)
    sentence = workshop.refused(*taken.command(tmp_path / "mine.py"))
    assert all(word in sentence for word in words), sentence
    assert left_behind(taken) == before


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, words", [
    ("--runs_dir={}", ["runs_dir=", "cannot hold runs", "choose another"]),
    ("--data_dir={}", ["cannot be written", "choose another --data_dir"]),
])  # fmt: skip
def test_a_folder_that_is_a_file(workshop, tmp_path, setting, words):
    (tmp_path / "file").write_text("mine")
    sentence = workshop.refused(*workshop.command(setting.format(tmp_path / "file")))
    assert all(word in sentence for word in words), sentence
    assert files_in(tmp_path) == {"file": b"mine"}


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, words", [
    (b"", ["mine.txt gives no tokens", "it is empty"]),
    (b"ab", ["fewer than the 17 of one window"]),
    (b"abc def. " * 10, ["the validation split has 9 tokens", "fewer than the 17", "use more text"]),
    (bytes(range(256)), ["mine.txt is not UTF-8 text", "convert it first"]),
], ids=["empty", "two-letters", "short", "binary"])  # fmt: skip
def test_a_text_that_is_no_use(workshop, tmp_path, content, words):
    (tmp_path / "mine.txt").write_bytes(content)
    sentence = workshop.refused(
        *workshop.command(f"--input={tmp_path / 'mine.txt'}", f"--data_dir={tmp_path / 'data'}")
    )
    assert all(word in sentence for word in words), sentence
    assert (tmp_path / "mine.txt").read_bytes() == content
    assert not workshop.runs.exists()
    for folder in (tmp_path / "data").glob("*"):  # what was prepared is whole, or was not prepared at all
        assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def edit_meta(**changes):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return edit


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "train.bin").unlink(), ["train.bin is missing"]),
    (lambda folder: halve(folder / "train.bin"), ["train.bin has", "truncated"]),
    (lambda folder: (folder / "val.bin").write_bytes(b""), ["val.bin is empty"]),
    (lambda folder: change_a_byte(folder / "val.bin"), ["val.bin has a wrong checksum"]),
    (lambda folder: halve(folder / "meta.json"), ["meta.json is damaged"]),
    (lambda folder: (folder / "meta.json").unlink(), ["no meta.json that says what they are"]),
    (edit_meta(format=99), ["meta.json has format 99"]),
    (edit_meta(tokenizer_vocab_size=7, tokenizer={"name": "bpe"}), ["was prepared with tokenizer=bpe"]),
], ids=["missing", "truncated", "empty", "changed", "half-meta", "no-meta", "format", "tokenizer"])  # fmt: skip
def test_prepared_data_that_is_damaged(workshop, tmp_path, damage, words):
    shutil.copytree(workshop.book / "data", tmp_path / "data")
    damage(tmp_path / "data" / "text-book")
    before = files_in(tmp_path)
    sentence = workshop.refused(*workshop.command(f"--data_dir={tmp_path / 'data'}"))
    assert all(word in sentence for word in words), sentence
    assert files_in(tmp_path) == before
    assert not workshop.runs.exists()


@pytest.fixture(autouse=True)
def prepared(taken):
    """The book is prepared before any test of this file copies it."""


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    ("", ["is at step 8 of 8", "raise --max_iters"]),
    ("--max_iters=4", ["is at step 8 of 4", "raise --max_iters"]),
    ("--max_tokens=64", ["is at step 8 of 1", "raise --max_tokens"]),
    ("--epochs=0.02", ["is at step 8 of 2", "raise --epochs"]),
    ("--max_iters=12 --resume_step=5", ["no checkpoint at step 5", "it has 4, 8"]),
    ("--max_iters=12 --n_layer=2", ["made with n_layer=1", "says 2", "start a new run"]),
    ("--max_iters=12 --arch_preset=llama", ["made with arch_preset='custom'"]),
    ("--max_iters=12 --n_kv_head=1", ["made with part_options="]),
    ("--max_iters=12 --block_size=32", ["made with block_size=16"]),
    ("--max_iters=12 --vocab_size=300", ["made with vocab_size=256"]),
    ("--max_iters=12 --optimizer=muon", ["made with optimizer='adamw'"]),
    ("--max_iters=12 --seed=2", ["made with seed=1337"]),
    ("--max_iters=12 --batch_size=3", ["made with batch_size x gradient_accumulation_steps=4"]),
    ("--max_iters=12 --learning_rate=-1.0", ["learning_rate=-1.0 must be above 0"]),
], ids=str)  # fmt: skip
def test_a_resume_that_makes_no_sense(taken, workshop, arguments, words):
    before = left_behind(taken)
    sentence = workshop.refused(
        f"--runs_dir={taken.runs}", "--run_name=taken", "--init_from=resume", *arguments.split()
    )
    assert all(word in sentence for word in words), sentence
    assert left_behind(taken) == before


@pytest.mark.parametrize("arguments, words", [
    (["--run_name=tken"], ["there is no run at", "did you mean 'taken'"]),
    (["--run_name=zzz"], ["there is no run at"]),
    ([], ["init_from=resume needs run_name=NAME"]),
], ids=["nearly", "nobody", "nothing"])  # fmt: skip
def test_resuming_a_run_that_is_not_there(taken, workshop, arguments, words):
    sentence = workshop.refused(f"--runs_dir={taken.runs}", "--init_from=resume", *arguments)
    assert all(word in sentence for word in words), sentence


def of_another_width(folder):
    """Weights of a model of another width, with the checksum that belongs to them."""
    import hashlib

    from safetensors.torch import load_file, save_file

    path, metadata = folder / "checkpoint-8" / "model.safetensors", folder / "checkpoint-8" / "metadata.json"
    save_file({name: tensor[..., :8].contiguous() for name, tensor in load_file(path).items()}, path)
    record = json.loads(metadata.read_text())
    record["checksums"]["model.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    metadata.write_text(json.dumps(record))


@pytest.mark.parametrize("damage, words", [
    (lambda run: change_a_byte(run / "checkpoint-8/model.safetensors"), ["checkpoint-8 is damaged", "--resume_step=4"]),
    (lambda run: halve(run / "checkpoint-8/training_state.pt"), ["checkpoint-8 is damaged", "--resume_step=4"]),
    (lambda run: (run / "checkpoint-8/metadata.json").unlink(), ["metadata.json cannot be read", "--resume_step=4"]),
    (of_another_width, ["of another architecture"]),
    (lambda run: [shutil.rmtree(path) for path in run.glob("checkpoint-*")], ["has no checkpoint yet"]),
    (lambda run: halve(run / "config.json"), ["config.json cannot be read", "start a new run"]),
    (lambda run: (run / "config.json").unlink(), ["there is no run at"]),
], ids=["flipped", "truncated", "no-metadata", "other-width", "none", "half-config", "no-config"])  # fmt: skip
def test_a_run_that_is_damaged(taken, workshop, damage, words):
    shutil.copytree(taken.runs, workshop.runs)
    damage(workshop.runs / "taken")
    before = left_behind(workshop)
    sentence = workshop.refused(
        f"--runs_dir={workshop.runs}", "--run_name=taken", "--init_from=resume", "--max_iters=12"
    )
    assert all(word in sentence for word in words), sentence
    assert left_behind(workshop) == before


def test_the_advice_of_a_damaged_checkpoint_works(taken, workshop):
    shutil.copytree(taken.runs, workshop.runs)
    change_a_byte(workshop.runs / "taken" / "checkpoint-8" / "model.safetensors")
    workshop.resume(workshop.runs / "taken", "--resume_step=4")
    assert "step 8/8  loss" in workshop.printed()
