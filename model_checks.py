"""What goes together in a model, and what a config says that no part of it does.

    check_parts(config)         # a UserError that names both settings, or nothing
    notes(config)               # sentences for the startup report

Mixers are looked up in `ALL_REGISTRIES`, because only `model_builder.py` imports `mixer_*.py`.
"""

from model_components import FFN_REGISTRY, NORM_REGISTRY, POSITION_ENCODING_REGISTRY
from registry import ALL_REGISTRIES, options_of
from user_errors import UserError


def check_parts(config):
    """Refuse parts that cannot honour each other, naming both settings; registry misses name the nearest."""
    NORM_REGISTRY[config.normalization]
    known_mixers = ALL_REGISTRIES["mixer"]
    encoding = POSITION_ENCODING_REGISTRY[config.position_encoding]
    mixers = {name: known_mixers[name] for name in config.mixers()}
    for ffn in {ffn for _, ffn in config.blocks()} - {"none"}:
        FFN_REGISTRY[ffn]
    for name, mixer in mixers.items():
        if not config.causal and not mixer.bidirectional:
            raise UserError(
                f"causal=False cannot be honoured by '{name}' in block_pattern='{config.block_pattern}', which reads "
                "from left to right; use causal=True, or block_pattern='attention'"
            )
    if encoding.acts_in_attention and not any(config.position_encoding in m.positions for m in mixers.values()):
        raise UserError(
            f"position_encoding='{config.position_encoding}' acts inside attention and "
            f"block_pattern='{config.block_pattern}' has none in n_layer={config.n_layer}; "
            "use 'none' or 'learned_absolute'"
        )

    for name, value in unused_options(config).items():
        readers = [mixer for mixer, part in known_mixers.items() if name in part.needed_options]
        if readers and value:
            raise UserError(
                f"{name}={value} is read by '{readers[0]}' and block_pattern='{config.block_pattern}' has none in "
                f"n_layer={config.n_layer}; drop it, or put '{readers[0]}' into the pattern"
            )


def chosen_parts(config):
    """The classes whose options a model of this config reads: position encoding, mixers, FFNs."""
    ffns = dict.fromkeys(ffn for _, ffn in config.blocks() if ffn != "none")
    parts = [ALL_REGISTRIES["mixer"][mixer] for mixer in config.mixers()] + [FFN_REGISTRY[ffn] for ffn in ffns]
    return [POSITION_ENCODING_REGISTRY[config.position_encoding], *parts]


def notes(config):
    """Sentences on what a config says and a model of it does not do, for the startup report."""
    found = [f"{name}={value!r} is read by no chosen part" for name, value in unused_options(config).items()]
    left_out = [entry for entry in dict.fromkeys(config.pattern()) if entry not in config.blocks()]
    if left_out:
        names = ", ".join(mixer if ffn == config.ffn_type else f"{mixer}/{ffn}" for mixer, ffn in left_out)
        found.append(f"n_layer={config.n_layer} is shorter than block_pattern, and leaves out {names}")
    options = config.part_options
    for window, mixer in (("sliding_window", "attention"), ("hybrid_local_window", "local_attention")):
        if mixer in config.mixers():
            width = getattr(config.options_for(ALL_REGISTRIES["mixer"][mixer]), window)
            if width >= config.block_size:
                found.append(
                    f"{window}={width} is no shorter than block_size={config.block_size}: nothing is out of sight"
                )
    for name, switch, idle in (("rope_scaling_factor", "rope_scaling", "none"), ("qk_norm_scope", "qk_norm", False)):
        if name in options and options.get(switch, idle) == idle:
            found.append(f"{name}={options[name]!r} does nothing at {switch}={idle!r}")
    for name, stronger in (("queries_per_kv_head", "n_kv_head"), ("ffn_hidden", "expert_hidden")):
        if options.get(name) is not None and options.get(stronger) is not None:
            found.append(f"{stronger}={options[stronger]} takes the place of {name}={options[name]}")
    return found


def unused_options(config):
    """{option: value} that the user set and no chosen part reads, for the startup report to mention."""
    read = {name for part in chosen_parts(config) for name in options_of(part)}
    return {name: value for name, value in config.part_options.items() if name not in read}
