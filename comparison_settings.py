"""The settings of runs: which of them decide the weights, how two are told apart, how one is written. Standard library.

differing_fields([run.model for run in runs])     # ['normalization', 'n_layer']
defined_parts(folder / 'config')                  # {'my_ffn': '1f0c77ab'}: parts that config files define
"""

import ast
import hashlib
import json
import re
import sys

# Settings that leave the weights alone: two runs that differ only here, or in the seed, are the same configuration.
BOOKKEEPING = {
    "match", "match_to", "eval_schedule", "checkpoint_tokens", "first_epoch_checkpoints", "subsequent_epochs_spacing",
    "min_checkpoints_per_epoch",  # what `match` solved is in the model's own fields
    "run_name", "runs_dir", "seed", "init_from", "resume_step", "data_dir", "input", "shard_tokens",
    "prefetch_batches", "loss_chunk_elements", "kernel_backend", "max_non_finite_steps", "threads", "eval_interval",
    "eval_only", "sample_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval", "layer_stats_interval",
    "tensorboard", "wandb_log", "wandb_project", "wandb_run_name", "plot", "pseudo_perplexity_tokens",
    "pseudo_perplexity_always", "tuning_runs", "tuning_tokens", "use_fsdp", "use_zero1", "fsdp_reshard_after_forward",
    "fsdp_replicas", "fsdp_cpu_offload", "tensor_parallel", "expert_parallel", "collective_timeout",
    "gradient_checkpointing", "dry_run", "target_gpu", "target_n_gpu", "target_mfu", "auto_resume", "checkpoint_format",
}  # fmt: skip
# Settings that the audit compares as what they resolve to: 'auto' and 'cpu' may be the same device.
RESOLVED = {
    "dataset", "tokenizer", "tokenizer_vocab_size", "variant", "objective", "batch_size", "eval_iters",
    "gradient_accumulation_steps", "max_iters", "max_tokens", "epochs", "device", "dtype", "tf32", "compile",
}  # fmt: skip
# Names for sets of other fields: `team` and `llama` are the same architecture.
MODEL_LABELS = {"arch_preset", "model_size"}
# Model fields that the data decides, and how the network is computed rather than what it is.
NOT_COMPONENTS = {"vocab_size", "attention_backend"}


# -- values of config.json


def dig(tree, *path, default=None):
    """tree[path[0]][path[1]]..., or `default` where a step is missing or is not a dict."""
    for step in path:
        if not isinstance(tree, dict):
            return default
        tree = tree.get(step)
    return default if tree is None else tree


def number(value):
    """A finite float or int as it is; None for everything else (null, NaN, text, a truth value)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def short(value, length=10):
    return None if value is None else str(value)[:length]


def key_of(value):
    """A hashable stand-in for a value of config.json; equal values have equal keys, 1 and 1.0 included."""
    if isinstance(value, dict):
        return tuple(sorted((name, key_of(item)) for name, item in value.items()))
    if isinstance(value, list):
        return tuple(key_of(item) for item in value)
    if number(value) is not None:
        return repr(float(value))
    return repr(value)


def flat_settings(settings):
    """Settings with the options of parts among them: {'part_options': {'d_state': 16}} becomes {'d_state': 16}."""
    settings = settings if isinstance(settings, dict) else {}
    options = settings.get("part_options")
    flat = {name: value for name, value in settings.items() if name != "part_options"}
    return flat | options if isinstance(options, dict) else flat


def value_text(value):
    """A setting's value as a person would type it; whole numbers with thousands separated."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)


def setting_text(settings, name):
    """A setting's text; options of parts are only written down where they were set."""
    return value_text(settings[name]) if name in settings else "default"


def differing_fields(tables):
    """Names whose values are not the same in all of the dicts, in the order in which they appear."""
    names = {name: None for table in tables for name in table}
    return [name for name in names if len({key_of(table.get(name)) for table in tables}) > 1]


# -- parts defined in config files


def defined_parts(folder):
    """{name: short hash} of the parts that config files in this folder register with a decorator or by assignment.

    The hash is over everything in the file but its plain settings, comments left out: a helper that a part calls is
    part of it. A file that cannot be parsed counts as its bytes.
    """
    parts = {}
    for path in sorted(folder.glob("*.py")):
        try:
            source = path.read_bytes()
        except OSError:
            continue
        if b"_REGISTRY" in source:
            parts |= parts_of(source)
    return parts


def parts_of(source):
    """{name: short hash} for one file's bytes."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        names, code = re.findall(r"_REGISTRY[(\[]\s*['\"](\w+)", source.decode("utf-8", "replace")), source
    else:
        names = [node.value for node in map(registered_name, ast.walk(tree)) if isinstance(node, ast.Constant)]
        code = "\n".join(ast.unparse(node) for node in tree.body if not is_plain_setting(node)).encode()
    return {str(name): hashlib.sha256(code).hexdigest()[:8] for name in names}


def registered_name(node):
    """The node of 'x' in X_REGISTRY('x') and X_REGISTRY['x'], else None."""
    if isinstance(node, ast.Call) and node.args and is_registry(node.func):
        return node.args[0]
    return node.slice if isinstance(node, ast.Subscript) and is_registry(node.value) else None


def is_registry(node):
    return isinstance(node, ast.Name) and node.id.endswith("_REGISTRY")


def is_plain_setting(node):
    """A docstring, or an assignment of a value written out, such as n_layer = 4."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    is_named = isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
    return is_named and not any(isinstance(part, (ast.Call, ast.Lambda)) for part in ast.walk(node.value))
