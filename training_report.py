"""What a run says on one screen before it starts: the architecture as a tree, its cost, the data, the place, memory."""

import model_matching as matching
from model_flops import CONVENTION, active_parameters, linear_flops, state_bytes
from training_memory import step_memory
from training_parallel import mode

# ---- numbers for people ----------------------------------------------------------------------------------------------


def human_count(n):
    """1234567 -> '1.23M'."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:  # what three digits round up to
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def human_bytes(n):
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n / size < 999.5 else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def human_seconds(seconds):
    """Seconds -> '45s', '3m12s', '2h05m', '4d07h'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def printable(text):
    """`text` with control characters replaced, which an untrained byte model writes and a terminal would obey."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


# ---- the report at start ---------------------------------------------------------------------------------------------


def architecture_tree(model, flops):
    """Lines of a tree of the model, like blocks folded, with parameters and forward FLOPs per token at the right."""
    config = model.config
    rows = [("", f"token embedding  {_shape(model.token_embedding.weight)}", _parameters(model.token_embedding), 0)]
    if model.position_embedding is not None:
        rows.append(("", f"position embedding  {config.position_encoding}", _parameters(model.position_embedding), 0))
    if model.embedding_norm is not None:
        norms = _parameters(model.embedding_norm)
        rows.append(("", f"embedding {config.normalization}", norms, 2 * norms))
    kinds = list(dict.fromkeys(config.blocks()))
    for kind in kinds:
        layers = [layer for layer, other in enumerate(config.blocks()) if other == kind]
        block = model.blocks[layers[0]]
        rows.append(("", f"{len(layers)} x block, each", None, None))
        rows.append(
            ("│  ", f"{kind[0]}  {block.mixer.describe()}", _parameters(block.mixer), _flops(block.mixer, config))
        )
        if block.ffn is not None:
            label = kind[1] + (f" ({config.activation})" if kind[1] == "standard" else "")
            label += f"  {block.ffn.describe()}" if hasattr(block.ffn, "describe") else ""
            rows.append(("│  ", label, _parameters(block.ffn), _flops(block.ffn, config)))
        norms = _parameters(block) - _parameters(block.mixer) - (_parameters(block.ffn) if block.ffn is not None else 0)
        rows.append(("│  ", f"{config.normalization}, {config.norm_position}-norm", norms, 2 * norms))
    head, bias = model.head.weight, 0 if model.head.bias is None else model.head.bias.numel()
    fraction = flops.linear["head"] / (2 * head.numel())  # of the tokens
    for label, part in ((f"final {config.normalization}", model.final_norm), ("head transform", model.head_transform)):
        if part is not None:
            rows.append(("", label, _parameters(part), 2 * _parameters(part) * fraction))
    label = "head" + ("  tied to the embedding" if config.weight_tying else f"  {_shape(head)}")
    label += f", at {100 * fraction:.3g}% of the tokens" if fraction < 1 else ""
    own = bias if config.weight_tying else bias + head.numel()
    rows.append(("", label, own, 2 * (head.numel() + bias) * fraction))
    for name, part in model.heads.items():
        rows.append(("", f"head for {name}  {_shape(part.weight)}", _parameters(part), _flops(part, config)))
    lines = [f"{'':<52}{'parameters':>14}{'FLOPs/token':>14}"]
    for index, (indent, label, parameters, cost) in enumerate(rows):
        last = index + 1 == len(rows) or (indent and not rows[index + 1][0])
        line = f"{indent}{'└─ ' if last else '├─ '}{label}"
        numbers = "" if parameters is None else f"{parameters:>14,}{human_count(cost) if cost else '-':>14}"
        lines.append(f"{line:<52}{numbers}")
    total = sum(p.numel() for p in model.parameters())
    lines.append(f"{'in all, forward':<52}{total:>14,}{human_count(flops.forward):>14}")
    if (active := active_parameters(model)) != total:
        lines.append(f"{'of which a token passes through':<52}{active:>14,}")
    return lines


def _shape(tensor):
    return " x ".join(f"{size:,}" for size in tensor.shape)


def _parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module, config):
    linear = sum(weights + biases for _, weights, biases in linear_flops(module))
    return linear + (module.mixing_flops(config.block_size) if hasattr(module, "mixing_flops") else 0)


def kernels_not_taken(resolved):
    """['mamba plain: mamba_ssm is not installed (pip install mamba-ssm)', ...], a line for each part with a reason."""
    lines = []
    for part, refused in resolved.get("kernels_not_taken", {}).items():
        reasons = "; ".join(f"{kernel} {reason}" for kernel, reason in refused.items())
        lines.append(f"{part} {resolved['kernels'][part]}: {reasons}")
    return lines


def first_line(error):
    """Why a step cannot run without data: a part of the user's own may ask a tensor for its values, in many ways."""
    return next((line.strip()[:100] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def memory_text(settings, place):
    """'about 462 MiB in the forward and backward: weights 18.6 MiB, ...', or why that cannot be told."""
    try:
        memory = step_memory(settings, place)
    except Exception as error:
        return f"cannot be counted ahead: {first_line(error)}"
    kinds = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in memory.kinds.items())
    return f"about {human_bytes(memory.peak)} in the {memory.when}: {kinds}, each at its most"


def startup_report(model, flops, peak, place, settings, dataset, resolved, notes=()):
    """The report as one string.

    Args:
        flops: FlopsPerToken. peak: HardwarePeak. dataset: Dataset.
        resolved: what the settings came to here, as config.json keeps it.
        notes: sentences on the model's settings, from `model_builder.notes`.
    """
    config, block_size = settings.train, settings.model.block_size
    steps, tokens_per_step = resolved["max_iters"], resolved["tokens_per_step"]
    tokens, train_tokens, val_tokens = steps * tokens_per_step, len(dataset.train), len(dataset.val)
    per_epoch = resolved["tokens_per_epoch"]
    ranks = f"{mode(config, place)}, " if place.world_size > 1 else ""
    at_half = flops.training * tokens / (peak.flops_per_second * place.world_size / 2)
    kernels = ", ".join(f"{part} {kernel}" for part, kernel in resolved["kernels"].items())
    rows = [
        ("model", model.config.architecture_name()),
        ("FLOPs/token", f"{human_count(flops.training)} for training at {flops.context} tokens"),
        ("", CONVENTION),
        ("state", f"{human_bytes(state_bytes(model, block_size))} to generate at {block_size} tokens"
                  if model.config.causal else "none: causal=False does not generate"),
        ("dataset", f"{dataset.name}: {human_count(train_tokens)} training, {human_count(val_tokens)} validation "
                    f"tokens, {dataset.tokenizer_name}, vocabulary {dataset.vocab_size:,}"),
        ("step", f"{tokens_per_step:,} tokens: {config.batch_size} x {block_size}"
                 f" x {config.gradient_accumulation_steps} micro-batch(es)"),
        ("run", f"{steps:,} steps, {human_count(tokens)} tokens, {tokens / per_epoch:.2f} epochs, "
                f"{human_count(flops.training * tokens)}FLOP"),
        ("device", f"{place.world_size} x {resolved['device_name']}, {place.precision}, "
                   f"{ranks}compile {resolved['compile']}, {kernels}"),
        ("peak", f"{human_count(peak.flops_per_second)}FLOP/s, {peak.source}; "
                 f"at half of it the run takes {human_seconds(at_half)}"),
        ("memory", memory_text(settings, place)),
    ]  # fmt: skip
    rows += [("kernels", line) for line in kernels_not_taken(resolved)]
    if per_epoch > train_tokens:
        rows.append(("padding", f"{100 * (1 - train_tokens / per_epoch):.0f}% of what is processed, never supervised"))
    if resolved["matching"]:
        rows.insert(1, ("matching", matching.sentence(resolved["matching"])))
    if schedule := resolved["checkpoint_schedule"]:
        ends = f"{human_count(schedule[0])} to {human_count(schedule[-1])}"
        rows.append(("checkpoints", f"at {len(schedule)} token counts, {ends}"))
    rows += [("note", note) for note in notes]
    if ":" in config.init_from and dataset.vocab_size != settings.model.vocab_size:
        sizes = f"{settings.model.vocab_size:,} tokens and this dataset has {dataset.vocab_size:,}"
        rows.append(("note", f"the source of the weights knows {sizes}: its embeddings mean other tokens here"))
    alone = [name for name in ("use_fsdp", "use_zero1") if getattr(config, name) and place.world_size == 1]
    rows += [("note", f"{name}=True has one process and nothing to shard over; start it with torchrun "
                      "--nproc_per_node=N") for name in alone]  # fmt: skip
    if config.warmup_iters >= steps:
        rows.append(("note", f"warmup_iters={config.warmup_iters} outlasts the run: learning_rate is never reached"))
    return "\n".join([*architecture_tree(model, flops), "", *(f"{name:<12} {text}" for name, text in rows)])
