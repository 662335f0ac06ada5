"""Weights from and to the classes of transformers, and from nanoGPT's files.

    python model_interop.py runs/NAME/checkpoint-500 OUT      # OUT opens with AutoModelForCausalLM.from_pretrained
    python train.py --init_from=hf:gpt2 --dataset=shakespeare # go on from a model of the Hub, or of a folder
    python train.py --init_from=nanogpt:out/ckpt.pt           # or from nanoGPT's

    model = from_hf(transformers.AutoModelForCausalLM.from_pretrained("gpt2"))
    to_hf(model)                                              # a LlamaForCausalLM, or whatever can hold it

The tables of `model_interop_classes.py` say what is what. Reading and exporting a Hugging Face model needs transformers
(`pip install transformers`); nothing else here does.
"""

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import torch

import configurator
import training_checkpoint as checkpoint
from model_builder import ConfigurableGPT
from model_config import FIELDS, ModelArchitectureConfig
from model_interop_classes import NANOGPT
from model_interop_rules import HF_CLASS_REGISTRY, SAME_FUNCTION, differences, resolved
from registry import Registry, registered_options
from training_tokenizers import TOKENIZER_FILE, load_tokenizer
from user_errors import Parser, UserError, did_you_mean, exit_on_user_error

INIT_REGISTRY = Registry("init_from", of="train")  # what stands before the colon of init_from=hf:gpt2


def import_transformers():
    """The library, which is asked for only where it is needed.

    Raises:
        UserError: it is missing or too old.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("Hugging Face models need the transformers library: pip install 'transformers>=5'") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(f"transformers {transformers.__version__} is too old: pip install 'transformers>=5'")
    transformers.utils.logging.disable_progress_bar()  # it would stand between the lines of a run
    return transformers


# ---- weights ---------------------------------------------------------------------------------------------------------


def to_ours(entry, theirs, model):
    """{our name: tensor} for every parameter of a ConfigurableGPT, from {their name: tensor}; gradients map alike.

    The heads of an objective are nobody else's, and start anew.

    Raises:
        UserError: a tensor that is missing, left over or of another shape.
    """
    own, found, used = dict(model.named_parameters()), {}, set()
    own = {name: parameter for name, parameter in own.items() if not name.startswith("heads.")}
    for row in entry.rows(model.config):
        if own.keys() >= {*row.ours} and theirs.keys() >= {*row.theirs}:
            tensors = row.transform.to_ours([theirs[name] for name in row.theirs], [own[name] for name in row.ours])
            found.update(zip(row.ours, tensors, strict=True))
            used.update(row.theirs)
    _require_none(own.keys() - found.keys(), "lack")
    _require_none(theirs.keys() - used, "hold, beside what the model has,")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} in the model")
    return found


def to_theirs(entry, own, theirs, config):
    """{their name: tensor} for every parameter of theirs; a bias that we do not have is zero there.

    Args:
        own: {our name: tensor}.
        theirs: {their name: tensor}, for the shapes.
    """
    found = {}
    for row in entry.rows(config):
        if theirs.keys() >= {*row.theirs}:
            like = [theirs[name] for name in row.theirs]
            if own.keys() >= {*row.ours}:
                tensors = row.transform.to_theirs([own[name] for name in row.ours], like)
            elif all(name.endswith(".bias") for name in row.theirs):
                tensors = [torch.zeros_like(tensor) for tensor in like]
            else:
                continue
            found.update(zip(row.theirs, tensors, strict=True))
    _require_none(theirs.keys() - found.keys(), "of this model lack")
    return found


def _require_none(names, what):
    if names:
        raise UserError(f"the weights {what} {sorted(names)[0]}; they are of another architecture")


def fill(parameters, tensors):
    """Copy {name: tensor} into {name: parameter}."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


# ---- models ----------------------------------------------------------------------------------------------------------


def entry_of(name):
    """The table of a transformers class."""
    if name not in HF_CLASS_REGISTRY:
        known = ", ".join(sorted(HF_CLASS_REGISTRY))
        raise UserError(f"{name} cannot be imported{did_you_mean(name, HF_CLASS_REGISTRY)} (known: {known})")
    return HF_CLASS_REGISTRY[name]


def config_from_hf(hf_config, class_name):
    """ModelArchitectureConfig of a configuration of transformers.

    Raises:
        UserError: a feature that nanoArch does not have, naming it and its value.
    """
    entry = entry_of(class_name)
    known = type(hf_config)().to_dict()
    values = hf_config.to_dict()
    if values.get("quantization_config") is not None:
        method = values["quantization_config"].get("quant_method")
        raise UserError(f"quantization_config with quant_method={method!r} is not supported: use the whole weights")
    return _checked(entry.settings({**known, **values}, known), class_name)


def _checked(settings, where):
    """ModelArchitectureConfig of foreign settings, each of the type that it must have."""
    settings = {name: configurator.check_type(name, value, str(where)) for name, value in settings.items()}
    return configurator.build_configs(settings)[0]


def from_hf(hf_model, **changes):
    """A ConfigurableGPT with the weights of a transformers model.

    Args:
        hf_model: of a class in HF_CLASS_REGISTRY.
        changes: settings that change no logit, such as block_size (a shorter one crops learned positions) or dropout.

    Raises:
        UserError: another class, or a feature that nanoArch does not have.
    """
    name = type(hf_model).__name__
    entry, config = entry_of(name), config_from_hf(hf_model.config, name)
    model = ConfigurableGPT(_with_changes(config, changes, entry, name)).to(hf_model.dtype).train(hf_model.training)
    fill(dict(model.named_parameters()), to_ours(entry, dict(hf_model.named_parameters()), model))
    return model


def to_hf(model, end_of_document_id=None):
    """A transformers model with the weights of a ConfigurableGPT, of the first class that can hold it.

    Args:
        end_of_document_id: the token that begins and ends a text, where there is one.

    Raises:
        UserError: no class can hold it, naming the setting.
    """
    transformers = import_transformers()
    name, hf_config = _config_for(transformers, model.config, end_of_document_id)
    hf_model = getattr(transformers, name)(hf_config).to(model.head.weight.dtype).train(model.training)
    if hf_model.can_generate():  # not in `hf_config`, where it would keep the token's embedding from being trained
        hf_model.generation_config.pad_token_id = end_of_document_id
    own, theirs = dict(model.named_parameters()), dict(hf_model.named_parameters())
    fill(theirs, to_theirs(HF_CLASS_REGISTRY[name], own, theirs, model.config))
    return hf_model


def _config_for(transformers, config, end_of_document_id):
    """(name, configuration) of the first class that can hold a config, and that transformers itself lets be made."""
    tokens = {"bos_token_id": end_of_document_id, "eos_token_id": end_of_document_id, "pad_token_id": None}
    refused = []
    for name, values in classes_for(config).items():
        hf_config, reason = _made(getattr(transformers, HF_CLASS_REGISTRY[name].config), {**values, **tokens})
        if hf_config is not None:
            return name, hf_config
        refused.append(f"a {name}, which wants other shapes: {reason}")
    raise UserError(f"no Hugging Face class can hold this model as {refused[0]}")


def _made(config_class, values):
    """(configuration of transformers, None), or (None, why it refuses the values)."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**values), None
    except (StrictDataclassError, ValueError) as error:
        return None, str(error).strip().splitlines()[-1].strip()


def classes_for(config):
    """{name of a class that can hold a config: keyword arguments of its configuration}, in the order of preference.

    A class can when our settings, written to its configuration and read back, are the same.

    Raises:
        UserError: none can; the setting named is one that no class has, or that the nearest class has otherwise.
    """
    own, fitting, lacking, reason = resolved(config), {}, {}, None
    for name, entry in HF_CLASS_REGISTRY.items():
        if entry.can_hold_parts(config):
            values = entry.values(own)
            back, why = _read_back(entry, values)
            if back is None:
                reason = f"this model as a {name}: {why}"
            elif found := differences({**own, **entry.held(own)}, back, entry.unread):
                lacking[name] = found
            else:
                fitting[name] = values
    if not fitting:
        raise UserError(f"no Hugging Face class can hold {_what_is_lacking(lacking) or reason or _parts_of(config)}")
    return fitting


def _read_back(entry, values):
    """(the `resolved` settings of a configuration's values, None), or (None, why they are a model of no kind)."""
    try:
        return resolved(configurator.build_configs(entry.settings(values))[0]), None
    except UserError as error:
        return None, error


def _what_is_lacking(lacking):
    """The setting that no class has or, where each lacks another, what the nearest ones have; '' for no classes."""
    if not lacking:
        return ""
    least = min(map(len, lacking.values()))
    nearest = {name: found for name, found in lacking.items() if len(found) == least}
    everywhere = set.intersection(*({setting for setting, *_ in found} for found in lacking.values()))
    for name, found in nearest.items():
        for setting, value, there in found:
            if setting in everywhere:
                return f"{setting}={value!r}: the nearest, {name}, has {there!r}"
    first = [(name, *found[0]) for name, found in nearest.items()]
    return "; ".join(f"{setting}={value!r} as a {name}, which has {there!r}" for name, setting, value, there in first)


def _parts_of(config):
    ffns = ", ".join(dict.fromkeys(ffn for _, ffn in config.blocks()))
    return f"block_pattern={config.block_pattern!r} with ffn_type={ffns}"


# ---- export ----------------------------------------------------------------------------------------------------------


def export_hf(checkpoint_folder, out_folder):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open, and return the name of the model's class.

    Args:
        checkpoint_folder: runs/NAME/checkpoint-N; the settings and the tokenizer are those of runs/NAME.
        out_folder: must not exist, or be empty.

    Raises:
        UserError: no such checkpoint, a folder that is taken, or a model that no class can hold.
    """
    source, out = Path(checkpoint_folder), Path(out_folder)
    transformers = import_transformers()
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source} is no checkpoint; give a folder such as runs/NAME/checkpoint-500")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; choose another folder, or empty that one")
    settings = configurator.load_run(source.resolve().parent)
    checkpoint.read_metadata(source)
    model = ConfigurableGPT(settings.model)
    checkpoint.load_model(model, source)
    tokenizer = run_tokenizer(source.resolve().parent)
    hf_model = to_hf(model, None if tokenizer is None else tokenizer.end_of_document_id)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        hf_model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(transformers, tokenizer, temporary, settings.model.block_size)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{out} could not be written: {error}") from None
    return type(hf_model).__name__


def run_tokenizer(run_folder):
    """The tokenizer of a run, or None where nobody knows it: the dataset was made elsewhere."""
    meta = json.loads((run_folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    return None if meta["name"] is None else load_tokenizer(meta)


def save_tokenizer(transformers, tokenizer, folder, longest):
    """tokenizer.json and tokenizer_config.json, where the tokenizer has a form in the library."""
    library, end = tokenizer.to_library(), tokenizer.end_of_document_text
    if library is not None:
        special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=library, model_max_length=longest, clean_up_tokenization_spaces=False, **special
        ).save_pretrained(folder)


# ---- init_from -------------------------------------------------------------------------------------------------------


class NoSource:
    """init_from=scratch and resume: the settings as they are, no weights, nothing to record."""

    record = None

    def fill(self, model):
        """Leave the model as it is."""

    def tensors_for(self, model):
        """None."""
        return {}


@dataclasses.dataclass
class Source:
    """Where a run's first weights come from."""

    config: ModelArchitectureConfig  # of the model as it was saved
    entry: object  # its HFClass
    tensors: object  # function without arguments -> {their name: tensor}
    record: dict  # for config.json: source, class, sha256 of each file of weights

    def fill(self, model):
        """Copy the weights into a ConfigurableGPT."""
        fill(dict(model.named_parameters()), self.tensors_for(model))

    def tensors_for(self, model):
        """{our name: tensor} for the parameters of a ConfigurableGPT, whose own tensors need no data."""
        return to_ours(self.entry, self.tensors(), model)


def starting_point(settings):
    """(settings, source of the first weights) that init_from asks for.

    The architecture is the source's; what the user set beside it may change the context, the dropout and how things are
    computed, and nothing that the weights depend on.

    Raises:
        UserError: a source that cannot be read or held, or a setting that contradicts it.
    """
    kind, colon, path = settings.train.init_from.partition(":")
    if not colon:
        return settings, NoSource()
    source = INIT_REGISTRY[kind](path)
    options = {name for name, declared in registered_options().items() if declared[0].of == "model"}
    given = {name: value for name, value in settings.given.items() if name in FIELDS or name in options}
    if "block_size" in source.entry.unread:
        given.setdefault("block_size", settings.model.block_size)
    config = _with_changes(source.config, given, source.entry, f"init_from={settings.train.init_from}")
    return dataclasses.replace(settings, model=config), source


def _with_changes(config, changes, entry, where):
    """`config` with the changes that leave its weights what they are; others are refused."""
    asked = config.replace(**changes)
    if found := differences(resolved(asked), resolved(config), aside=("block_size", *entry.unread)):
        setting, value, there = found[0]
        raise UserError(f"{setting}={value!r} contradicts {where}, whose model has {setting}={there!r}; drop it")
    kept = {name: value for name, value in changes.items() if name in ("block_size", *SAME_FUNCTION)}
    kept = {name: value for name, value in kept.items() if name not in ("arch_preset", "model_size")}
    if kept.get("block_size", 0) > config.block_size and config.position_encoding == "learned_absolute":
        raise UserError(
            f"block_size={kept['block_size']} is more than the {config.block_size} learned positions of {where}"
        )
    return config.replace(**kept)


@INIT_REGISTRY("hf")
def open_hf(name):
    """The Source of a folder that `save_pretrained` wrote, or of a model of the Hub by name."""
    transformers = import_transformers()
    folder = Path(name) if Path(name).is_dir() else download(name)
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # a library that reads a stranger's file fails in many ways
        raise UserError(f"{folder} holds no configuration that can be read: {_first_line(error)}") from None
    class_name = (hf_config.architectures or [_class_by_type(hf_config)])[0]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    record = {
        "source": f"hf:{name}", "class": class_name, "transformers_version": transformers.__version__,
        "sha256": {path.name: checkpoint.sha256(path) for path in files},
    }  # fmt: skip
    config = config_from_hf(hf_config, class_name)
    return Source(config, entry_of(class_name), lambda: _hf_tensors(getattr(transformers, class_name), folder), record)


def _class_by_type(hf_config):
    """The class for a config.json that does not name one."""
    config_name = type(hf_config).__name__
    fitting = [name for name, entry in HF_CLASS_REGISTRY.items() if entry.config == config_name]
    return fitting[0] if fitting else config_name


def _hf_tensors(hf_class, folder):
    """{name: tensor} of a saved model, every parameter of which must be in its files."""
    try:
        hf_model, info = hf_class.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # see open_hf
        raise UserError(f"the weights in {folder} cannot be read: {_first_line(error)}") from None
    if info["missing_keys"]:
        raise UserError(f"the weights in {folder} lack {sorted(info['missing_keys'])[0]} of {hf_class.__name__}")
    return dict(hf_model.named_parameters())


def download(name):
    """The folder of a model of the Hub in the local cache, fetched where it is missing and the network may be used."""
    import huggingface_hub

    files = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=["config.json", "*.bin", "*.bin.index.json"])
            )
    except Exception as error:  # no such folder or model, no network, HF_HUB_OFFLINE=1, a name that cannot be one
        raise UserError(
            f"init_from=hf:{name} is no folder here, and no model of that name could be fetched "
            f"({type(error).__name__}); check the name, the network and HF_HUB_OFFLINE"
        ) from None
    return folder


def _first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:160] or type(error).__name__


NANOGPT_PREFIX = "_orig_mod."  # of a model that was compiled when it was saved
NANOGPT_BUFFER = ".attn.bias"  # its causal mask, where torch had no flash attention


@INIT_REGISTRY("nanogpt")
def open_nanogpt(name):
    """The Source of a ckpt.pt that nanoGPT's train.py wrote, read without running any code that it might hold."""
    path = Path(name)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        values, tensors = dict(saved["model_args"]), dict(saved["model"])
    except FileNotFoundError:
        raise UserError(f"init_from=nanogpt:{name} does not exist; give the ckpt.pt that nanoGPT wrote") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint of nanoGPT ({type(error).__name__})") from None
    if not all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()):
        raise UserError(f"{path} cannot be read as a checkpoint of nanoGPT (its weights are no tensors by name)")
    tensors = {key.removeprefix(NANOGPT_PREFIX): tensor for key, tensor in tensors.items()}
    for key in [key for key in tensors if key.endswith(NANOGPT_BUFFER) and tensors[key].dim() == 4]:
        del tensors[key]
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{path} has a head of its own, and nanoGPT ties it to the embedding: it was written by a fork")
    missing = NANOGPT.read_keys() - values.keys()
    if missing:
        raise UserError(f"{path} is no checkpoint of nanoGPT: its model_args lack {sorted(missing)[0]}")
    record = {
        "source": f"nanogpt:{name}",
        "iter_num": saved.get("iter_num"),
        "sha256": {path.name: checkpoint.sha256(path)},
    }
    config = _checked(NANOGPT.settings(values, dict.fromkeys(values)), path)
    return Source(config, NANOGPT, lambda: tensors, record)


# ---- the command -----------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint_folder", help="runs/NAME/checkpoint-N")
    parser.add_argument("out_folder", help="folder to write; it must not exist, or be empty")
    args = parser.parse_args(arguments)
    name = export_hf(args.checkpoint_folder, args.out_folder)
    print(f"{args.out_folder} holds a {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
