"""Files of nanoGPT, folders of Hugging Face and runs: read, trained on, written, and refused in a sentence."""

# ruff: noqa: F401, F811 - book and workshop are fixtures

import shutil

import pytest
import torch

import model_interop as interop
import sample
import train
from interop_helpers import V, hf_model, text
from model_builder import ConfigurableGPT
from training_helpers import book, read_json, summary, weights, workshop
from training_tokenizers import load_tokenizer
from user_errors import UserError

# ---- nanoGPT's files -------------------------------------------------------------------------------------------------


def nanogpt_file(path, theirs, bias=True, prefix="", **changes):
    """What nanoGPT's train.py saves, with the weights of a GPT2LMHeadModel: nn.Linear holds matrices the other way."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        is_matrix = tensor.dim() == 2 and ".h." in name
        if bias or not name.endswith(".bias"):
            state[prefix + name] = tensor.t().contiguous() if is_matrix else tensor.clone()
    config = theirs.config
    args = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.n_positions,
                vocab_size=config.vocab_size, bias=bias, dropout=0.0)  # fmt: skip
    saved = {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "optimizer": {},
             "config": {"dataset": "x"}}  # fmt: skip
    torch.save({**saved, **changes}, path)
    return f"nanogpt:{path}"


def opened(source, **changes):
    """The model that init_from=source starts with."""
    kind, _, path = source.partition(":")
    found = interop.INIT_REGISTRY[kind](path)
    model = ConfigurableGPT(found.config.replace(**changes))
    found.fill(model)
    return model.eval(), found


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_file_of_nanogpt_is_read(transformers, tmp_path, bias, prefix):
    reference = hf_model(transformers, "gpt2")
    for block in reference.transformer.h:
        block.mlp.act = torch.nn.GELU()  # exact, as nanoGPT has it
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(".bias") and not bias:
                parameter.zero_()
    path = tmp_path / "ckpt.pt"
    source = nanogpt_file(path, reference, bias, prefix)
    saved = torch.load(path, weights_only=True)
    saved["model"][f"{prefix}transformer.h.0.attn.bias"] = torch.ones(
        1, 1, 24, 24
    )  # its mask, on old versions of torch
    torch.save(saved, path)
    model, found = opened(source)
    assert found.config.bias is bias and found.record["iter_num"] == 7
    assert found.record["sha256"].keys() == {"ckpt.pt"} and len(found.record["sha256"]["ckpt.pt"]) == 64
    with torch.no_grad():
        torch.testing.assert_close(model(text())[0], reference(text()).logits, rtol=1e-5, atol=1e-5)
        shorter, _ = opened(source, block_size=9)
        torch.testing.assert_close(shorter(text(9))[0], reference(text(9)).logits, rtol=1e-5, atol=1e-5)


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_of_nanogpt_runs_no_code(transformers, tmp_path):
    source = nanogpt_file(tmp_path / "ckpt.pt", hf_model(transformers, "gpt2"), config=Trap(tmp_path / "written"))
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint of nanoGPT \(UnpicklingError\)"):
        opened(source)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("changes, message", [
    ({"model_args": {"n_layer": 2}}, "its model_args lack bias"),
    ({"model_args": 3}, "TypeError"),
    ({"model_args": dict(n_layer="2", n_head=4, n_embd=16, block_size=24, vocab_size=V, bias=True, dropout=0.0)},
     "n_layer='2' is a str, and must be an int"),
    ({"model": {}}, "the weights lack blocks.0.ffn.down.bias"),
])  # fmt: skip
def test_half_a_file_of_nanogpt_is_refused(transformers, tmp_path, changes, message):
    source = nanogpt_file(tmp_path / "ckpt.pt", hf_model(transformers, "gpt2"), **changes)
    with pytest.raises(UserError, match=message):
        opened(source)


# ---- the command and the folder that it writes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A GPT2LMHeadModel over bytes, as save_pretrained leaves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_dir(run_folder):
    return max(run_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("architecture, tokenizer", [
    (("--arch_preset=llama", "--n_kv_head=1"), "bpe"),
    ((), "byte"),
    (("--arch_preset=mamba", "--d_state=4"), "char"),
    (("--arch_preset=gpt2",), "wordpiece"),
    (("--arch_preset=qwen3",), "unigram"),
], ids=["llama-bpe", "default-byte", "mamba-char", "gpt2-wordpiece", "qwen3-unigram"])  # fmt: skip
def test_an_exported_run_opens_elsewhere(transformers, workshop, architecture, tokenizer):
    size = ("--tokenizer_vocab_size=280",) if tokenizer in ("bpe", "wordpiece", "unigram") else ()
    run = workshop.run("--max_iters=4", f"--tokenizer={tokenizer}", *size, *architecture)
    workshop.printed()
    out = workshop.folder / "exported"
    interop.main([str(save_dir(run)), str(out)])
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert workshop.printed() == f"{out} holds a {type(model).__name__}\n"
    assert (out / "model.safetensors").is_file() and not [*out.parent.glob(".exported*")]

    words = "the quick brown fox\n jumps over"
    own, theirs = load_tokenizer(run), transformers.AutoTokenizer.from_pretrained(out)
    ids = theirs(words)["input_ids"]
    assert ids == own.encode(words).tolist() and theirs.decode(ids) == words
    assert theirs.eos_token_id == own.end_of_document_id == model.config.eos_token_id
    assert len(theirs) == own.vocab_size == model.config.vocab_size

    settings = interop.configurator.load_run(run)
    ours = ConfigurableGPT(settings.model).eval()
    interop.checkpoint.load_model(ours, save_dir(run))
    idx = torch.tensor([ids[:16]])
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, ours(idx)[0], rtol=1e-4, atol=1e-4)
    greedy = model.generate(idx[:, :4], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, ours.generate(idx[:, :4], 6, temperature=0))


def test_a_run_whose_tokenizer_nobody_knows_is_exported_without(transformers, workshop):
    run = workshop.run("--max_iters=4")
    (run / "tokenizer.json").write_text('{"name": null}', encoding="utf-8")
    interop.export_hf(save_dir(run), workshop.folder / "out")
    assert {path.name for path in (workshop.folder / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_a_folder_that_cannot_be_exported_is_refused(workshop):
    run = workshop.run("--max_iters=4", "--position_encoding=alibi")
    checkpoint, out = save_dir(run), workshop.folder / "out"
    refused = [
        ((checkpoint, out), "no Hugging Face class can hold position_encoding='alibi'"),
        ((checkpoint, run), "exists; choose another folder, or empty that one"),
        ((run, out), "is no checkpoint; give a folder such as runs/NAME/checkpoint-500"),
        ((workshop.folder / "nowhere", out), "is no checkpoint"),
        ((checkpoint,), "out_folder"),
    ]
    for arguments, message in refused:
        assert message in workshop.refused(*arguments, main=interop.main)
    assert not out.exists()


# ---- init_from -------------------------------------------------------------------------------------------------------

OTHER_TOKENS = "--tokenizer=byte"


def going_on(workshop, source, *arguments):
    """A command of a tiny run from `source`; the architecture is the source's, so it is not named."""
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    command = [argument for argument in workshop.command() if not argument.startswith(shape)]
    return [*command, OTHER_TOKENS, f"--init_from={source}", *arguments]


def test_a_run_from_a_folder_is_trained_resumed_sampled_and_exported(transformers, workshop, hf_folder, capsys):
    source = workshop.folder / "gpt2"
    shutil.copytree(hf_folder, source)
    train.main(going_on(workshop, f"hf:{source}", "--run_name=tuned", "--block_size=16", "--max_iters=4"))
    run, theirs = workshop.runs / "tuned", transformers.AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    record = read_json(run / "config.json")
    assert record["initial_weights"] == {
        "source": f"hf:{source}", "class": "GPT2LMHeadModel", "transformers_version": transformers.__version__,
        "sha256": {"model.safetensors": interop.checkpoint.sha256(hf_folder / "model.safetensors")},
    }  # fmt: skip
    config = record["model_config"]
    assert (config["n_layer"], config["activation"], config["block_size"], config["bias"]) == (2, "gelu_tanh", 16, True)
    assert config["dropout"] == 0.1  # as its own configuration says

    shutil.rmtree(source)  # from here on the run stands alone
    train.main([f"--runs_dir={workshop.runs}", "--run_name=tuned", "--init_from=resume", "--max_iters=6"])
    again = read_json(run / "config.json")
    assert again["initial_weights"] == record["initial_weights"] and again["model_config"] == config
    assert summary(run)["steps"] == 6
    moved = weights(run, 6)["token_embedding.weight"] - theirs.transformer.wte.weight.detach()
    assert 0 < moved.abs().max() < 0.1, "trained, and from these weights"

    capsys.readouterr()
    sample.main(
        [f"--runs_dir={workshop.runs}", "--run_name=tuned", "--device=cpu", "--max_new_tokens=5", "--start=the"]
    )
    assert capsys.readouterr().out.startswith("the")
    assert interop.export_hf(run / "checkpoint-6", workshop.folder / "back") == "GPT2LMHeadModel"


def test_a_model_is_tuned_and_scored_in_its_own_tokens(transformers, workshop, capsys):
    """Exported with a tokenizer learned here, tuned with tokenizer=hf: on the same text: the first run goes on."""
    first = workshop.run("--arch_preset=llama", "--tokenizer=bpe", "--tokenizer_vocab_size=300", name="first")
    folder = workshop.folder / "model"
    interop.export_hf(first / "checkpoint-8", folder)
    tokens = f"--tokenizer=hf:{folder}"
    tune = [argument for argument in going_on(workshop, f"hf:{folder}", tokens) if argument != OTHER_TOKENS]
    train.main([*tune, "--run_name=tuned", "--learning_rate=1e-30", "--data_dir=data"])
    tuned = workshop.runs / "tuned"
    assert sorted(path.name for path in (workshop.folder / "data").iterdir()) == ["text-book-hf-model"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, before = load_tokenizer(tuned), load_tokenizer(first)
    text = (workshop.book / "book.txt").read_text("utf-8")[:3000]
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False) == before.encode(text).tolist()
    assert ours.token_bytes() == before.token_bytes()  # so that bits per byte are the same number
    for name in ("final_val_loss", "bits_per_byte"):
        assert summary(tuned)[name] == pytest.approx(summary(first)[name], abs=1e-5)

    shutil.rmtree(folder)  # from here on the run and its data stand alone
    train.main([f"--runs_dir={workshop.runs}", "--run_name=tuned", "--init_from=resume", "--max_iters=10"])
    capsys.readouterr()
    arguments = [f"--runs_dir={workshop.runs}", "--run_name=tuned", "--device=cpu", "--max_new_tokens=5"]
    sample.main([*arguments, "--start=the quick"])
    assert capsys.readouterr().out.startswith("the quick")
    sentence = workshop.refused(*tune, "--run_name=again", "--data_dir=elsewhere")
    assert "init_from=hf:" in sentence or "tokenizer=hf:" in sentence


def test_a_dataset_of_another_models_tokens_is_refused(workshop):
    for size in (290, 300):
        run = workshop.run("--tokenizer=bpe", f"--tokenizer_vocab_size={size}", "--max_iters=1", name=f"run{size}")
        library = load_tokenizer(run).to_library()
        (workshop.folder / "model").mkdir(exist_ok=True)
        (workshop.folder / "model" / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
        command = workshop.command("--tokenizer=hf:model", "--max_iters=1", "--data_dir=data", name=f"tuned{size}")
        if size == 290:
            train.main(command)
    assert "was prepared with tokenizer=hf-" in workshop.refused(*command)
    assert "has no meaning for tokenizer=hf:model" in workshop.refused(*command, "--tokenizer_vocab_size=300")
    assert "needs none/tokenizer.json" in workshop.refused(*command, "--tokenizer=hf:none").replace("\\", "/")


def test_the_first_loss_is_that_of_the_imported_model(transformers, workshop, hf_folder):
    train.main(going_on(workshop, f"hf:{hf_folder}", "--run_name=first", "--learning_rate=1e-30", "--dropout=0.0"))
    run = workshop.runs / "first"
    tensors = weights(run, 8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    torch.testing.assert_close(tensors["blocks.1.ffn.up.weight"], theirs.transformer.h[1].mlp.c_fc.weight.t())
    assert read_json(run / "config.json")["model_config"]["block_size"] == 32


def test_a_run_from_a_file_of_nanogpt(transformers, workshop, hf_folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    source = nanogpt_file(workshop.folder / "ckpt.pt", theirs)
    train.main(going_on(workshop, source, "--run_name=nano", "--max_iters=2"))
    record = read_json(workshop.runs / "nano" / "config.json")
    assert record["initial_weights"]["source"] == source and record["model_config"]["activation"] == "gelu"


def test_a_source_without_a_longest_text_takes_the_setting(transformers, workshop):
    hf_model(transformers, "mamba").save_pretrained(workshop.folder / "mamba")
    sentence = workshop.refused(*going_on(workshop, f"hf:{workshop.folder / 'mamba'}", "--block_size=24"))
    assert "vocab_size=29 is too small" in sentence and "whose tokens go up to 255" in sentence
    source = interop.starting_point(interop.configurator.read_settings([f"--init_from=hf:{workshop.folder / 'mamba'}"]))
    assert source[0].model.block_size == 256 and source[0].model.n_layer == 2


def test_the_preset_of_the_same_architecture_may_be_named(transformers, tmp_path, hf_folder):
    for name in ("llama", "mamba"):
        hf_model(transformers, name).save_pretrained(tmp_path / name)
        arguments = [f"--arch_preset={name}", f"--init_from=hf:{tmp_path / name}", f"--weight_tying={name == 'mamba'}"]
        settings, _ = interop.starting_point(interop.configurator.read_settings(arguments))
        assert settings.model.vocab_size == V
    arguments = ["--arch_preset=gpt2", "--activation=gelu_tanh", f"--init_from=hf:{hf_folder}"]
    settings, _ = interop.starting_point(interop.configurator.read_settings(arguments))
    assert settings.model.n_embd == 16 and settings.model.dropout == 0.0  # the preset's


@pytest.mark.parametrize("arguments, message", [
    (["--n_layer=3"], "n_layer=3 contradicts init_from=hf:.*, whose model has n_layer=2; drop it"),
    (["--arch_preset=llama"], "position_encoding='rope' contradicts|normalization='rmsnorm' contradicts"),
    (["--arch_preset=gpt2"], "activation='gelu' contradicts .* activation='gelu_tanh'"),
    (["--vocab_size=300"], "vocab_size=300 contradicts"),
    (["--block_size=33"], "block_size=33 is more than the 32 learned positions"),
    (["--n_kv_head=1"], "n_kv_head=1 contradicts"),
])  # fmt: skip
def test_a_setting_that_contradicts_the_source_is_refused(hf_folder, arguments, message):
    with pytest.raises(UserError, match=message):
        interop.starting_point(interop.configurator.read_settings([*arguments, f"--init_from=hf:{hf_folder}"]))


def test_a_source_that_is_none_is_refused(workshop, hf_folder):
    empty = workshop.folder / "empty"
    empty.mkdir()
    lacking = workshop.folder / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_text((hf_folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    torn = workshop.folder / "torn"
    shutil.copytree(hf_folder, torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500])
    strange = workshop.folder / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "gpt2", "n_layer": "two"}', encoding="utf-8")
    other = workshop.folder / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}', encoding="utf-8")
    refused = {
        "gpt2": "init_from='gpt2' must be one of scratch, resume, hf:NAME, nanogpt:FILE",
        "hf:": "init_from='hf:' must be one of",
        "resume:x": "init_from='resume:x' must be one of",
        "hff:x": "init_from='hff' does not exist; did you mean 'hf'? (known: hf, nanogpt)",
        "hf:nobody/nothing": "hf:nobody/nothing is no folder here, and no model of that name could be fetched",
        f"hf:{empty}": "holds no configuration that can be read",
        f"hf:{lacking}": "cannot be read",
        f"hf:{torn}": "the weights in",
        f"hf:{strange}": "holds no configuration that can be read",
        f"hf:{other}": "T5Model cannot be imported",
        "nanogpt:nowhere.pt": "init_from=nanogpt:nowhere.pt does not exist",
        f"nanogpt:{hf_folder / 'model.safetensors'}": "cannot be read as a checkpoint of nanoGPT",
    }
    for source, message in refused.items():
        assert message in workshop.refused(*going_on(workshop, source)), source
