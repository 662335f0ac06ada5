"""A run on paper: what it would take on other machines than this one. `python train.py ... --dry_run=True`.

    print(dry_run(settings))        # no data is read but meta.json, no weight is made

Everything follows from the settings, from counts of the model (`model_flops.py`) and of its memory
(`training_memory.py`), and from the assumptions below, which stand under every plan.
"""

from dataclasses import dataclass

import torch

import model_matching as matching
from configurator import with_vocabulary
from model_builder import ConfigurableGPT, on_meta
from model_checks import notes
from model_config import GPT2_VOCAB_SIZE
from model_flops import CONVENTION, active_parameters, flops_per_token, published_peak
from training_corpora import CORPUS_REGISTRY, PROBE_REGISTRY
from training_data import Dataset, check_split, load_dataset, tokens_in_epoch
from training_memory import NOT_COUNTED, step_memory
from training_mesh import check_model, parts_with, split_share
from training_objectives import OBJECTIVE_REGISTRY
from training_parallel import is_sharded, mode
from training_place import DTYPES, Place, check_world
from training_prepare import check_absent, check_meets, recipe_of
from training_recompute import recomputed
from training_report import architecture_tree, first_line, human_bytes, human_count, human_seconds
from training_token_files import read_meta
from training_tokenizers import TOKENIZER_REGISTRY
from user_errors import UserError, did_you_mean

# ---- machines --------------------------------------------------------------------------------------------------------

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Target:
    """A device as its maker describes it.

    Attributes:
        name: what `published_peak` knows it by.  memory: bytes.
        link, network: bytes per second that one device sends to others of its node, and to other nodes.
    """

    name: str
    memory: float
    link: float
    network: float


# NVLink and Infinity Fabric in one direction, PCIe where there is neither; the network of the maker's own 8-GPU server
# (DGX: 400 Gb/s for each H100, 200 for each A100), or 100 Gb/s for a node where it sells none.
TARGETS = {
    "b200": Target("B200", 180e9, 900e9, 50e9),
    "h200": Target("H200", 141e9, 450e9, 50e9),
    "h100": Target("H100", 80e9, 450e9, 50e9),
    "a100": Target("A100", 80e9, 300e9, 25e9),
    "v100": Target("V100", 32e9, 150e9, 6.25e9),
    "mi300x": Target("MI300X", 192e9, 448e9, 50e9),
    "l40s": Target("L40S", 48e9, 32e9, 1.5e9),
    "rtx4090": Target("RTX 4090", 24e9, 32e9, 1.5e9),
    "rtx3090": Target("RTX 3090", 24e9, 32e9, 1.5e9),
}


def target_of(config):
    """The Target that target_gpu names.

    Raises:
        UserError: there is none of that name.
    """
    name = config.target_gpu.lower()
    if name not in TARGETS:
        raise UserError(
            f"target_gpu={config.target_gpu!r} is not known{did_you_mean(name, TARGETS)} (known: {', '.join(TARGETS)})"
        )
    return TARGETS[name]


def place_of(config, target):
    """The Place of one rank there: bfloat16 where dtype leaves it open and the device has it."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if published_peak(target.name, "bfloat16") else "float16"
    tf32 = config.tf32 and published_peak(target.name, "tf32") is not None
    return Place(
        torch.device("cuda"), dtype, tf32, 0, 0, config.target_n_gpu,
        config.fsdp_replicas, config.tensor_parallel, config.expert_parallel,
    )  # fmt: skip


# ---- data that need not be there -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    """What is known of the dataset without reading a token: from meta.json, or before it is prepared from settings.

    Attributes:
        folder, has_outcomes: as of a Dataset, which objectives look at.
        n_tokens, n_records: of the training split; None where it is not prepared, or is no records.
    """

    words: str
    folder: str
    vocab_size: int
    has_outcomes: bool = False
    n_tokens: int | None = None
    n_records: int | None = None

    check_vocab = Dataset.check_vocab

    def tokens_in_epoch(self, block_size):
        """Tokens of one pass, or None where that is unknown; a record fills a window."""
        if self.n_records:
            return self.n_records * block_size
        return tokens_in_epoch(self.n_tokens, block_size) if self.n_tokens else None


def data_facts(settings):
    """The DataFacts of the dataset that the settings name; a probe needs no preparing.

    Raises:
        UserError: there is none of that name, its options have no meaning, or a probe's examples do not fit block_size.
    """
    if settings.train.dataset in PROBE_REGISTRY:
        probe = load_dataset(settings.train)
        probe.check_block_size(settings.model.block_size)
        return DataFacts(f"{probe.name}, made as it is read", probe.folder, probe.vocab_size, n_tokens=len(probe.train))
    recipe = recipe_of(settings.train)
    meta = read_meta(recipe.folder)
    if meta is None:
        check_absent(recipe)
        return facts_before(settings, recipe)
    check_meets(meta, recipe)
    split, has_outcomes = meta["splits"]["train"], meta.get("kind") == "records"
    words = f"{recipe.folder.name}: {human_count(split['tokens'])} training tokens"
    n_records = split["documents"] if has_outcomes else None
    return DataFacts(words, recipe.folder, meta["vocab_size"], has_outcomes, split["tokens"], n_records)


def facts_before(settings, recipe):
    """The DataFacts of a corpus that is not prepared."""
    corpus = CORPUS_REGISTRY[recipe.dataset]
    vocab_size, why = corpus.vocab_size(recipe), "of its own tokens"
    if vocab_size is None and settings.model.vocab_size is not None:
        vocab_size, why = settings.model.vocab_size, "of vocab_size"
    elif vocab_size is None and recipe.tokenizer_vocab_size:
        vocab_size, why = recipe.tokenizer_vocab_size, "of tokenizer_vocab_size"
    elif vocab_size is None and recipe.tokenizer == "byte":
        vocab_size, why = TOKENIZER_REGISTRY["byte"].learn().vocab_size, "of bytes"
    elif vocab_size is None:
        vocab_size, why = GPT2_VOCAB_SIZE, "of GPT-2, as nothing says otherwise"
    words = f"{recipe.folder.name}, not prepared; vocabulary {why}"
    return DataFacts(words, recipe.folder, vocab_size, corpus.holds_records)


def length_of(config, block_size, facts):
    """(steps, tokens per step) of the run.

    Raises:
        UserError: the length is in epochs and the dataset's size is unknown.
    """
    tokens_per_step, steps_per_epoch = config.sequences_per_step * block_size, None
    if config.max_tokens is None and config.epochs is not None:
        if facts.n_tokens is None:
            raise UserError(f"epochs={config.epochs} of data that is not prepared is no length; set max_tokens instead")
        steps_per_epoch = facts.tokens_in_epoch(block_size) / tokens_per_step
    return config.total_steps(tokens_per_step, steps_per_epoch), tokens_per_step


# ---- communication and time ------------------------------------------------------------------------------------------


def bytes_sent(weights, config, place, experts=0):
    """{kind: bytes that each rank sends in a step} of weights and gradients, in rings (Patarasuk & Yuan 2009).

    An all-reduce of n bytes over p ranks costs each 2 n (p - 1) / p, a gather or a scatter half of that. DDP sums
    gradients once a step; ZeRO-1 sends updated weights besides; FSDP2 gathers weights before forward, again before
    backward where they were freed, and scatters gradients, in every micro-batch or once (`fsdp_accumulate`). With
    replicas (HSDP) it does so within one of them, and 'replicas' is the sum of the scattered gradients over all, once.

    Args:
        weights: bytes of the model in float32, without what `tensor_parallel` leaves to other ranks.
        experts: bytes of those that `expert_parallel` divides: a rank gathers its own, from the ranks that share them.
    """
    if place.data_size == 1:
        return {}
    if not is_sharded(config, place):
        share = weights * _share_sent(place.data_size)
        return {"gradients": 2 * share} | ({"weights": share} if config.use_zero1 else {})
    n_micro_batches, n_shards = config.gradient_accumulation_steps // place.data_size, place.data_size // place.replicas
    n_gathers = n_micro_batches * (2 if config.fsdp_reshard_after_forward else 1)
    n_scatters = n_micro_batches if config.fsdp_accumulate == "sharded" else 1
    once = (weights - experts) * _share_sent(n_shards)
    once += experts / place.expert_parallel * _share_sent(n_shards // place.expert_parallel)
    sent = {
        "weights": n_gathers * once * DTYPES[config.fsdp_dtype].itemsize / 4, "gradients": n_scatters * once,
        "replicas": 2 * weights / n_shards * _share_sent(place.replicas),
    }  # fmt: skip
    return {kind: size for kind, size in sent.items() if size}


def _share_sent(n):
    """What a rank of n sends of what they gather or scatter."""
    return (n - 1) / n


def activations_sent(model, config, place):
    """{'activations', 'experts': bytes that each rank sends in a step} for what `tensor_parallel` and
    `expert_parallel` split.

    Of a split part the output is summed over the ranks in forward and the gradient of its input in backward (Megatron,
    2019, section 3). A choice of an expert goes to the rank that has it, and back, in forward and in backward; with an
    even load n - 1 of n leave.
    """
    n_tokens = config.batch_size * model.config.block_size * (config.gradient_accumulation_steps // place.data_size)
    width = n_tokens * model.config.n_embd * DTYPES[place.dtype].itemsize
    tensor, expert = (n if n > 1 else 0 for n in (place.tensor_parallel, place.expert_parallel))
    sent = {}
    if tensor:
        sent["activations"] = len(parts_with(model, "split_columns")) * 2 * 2 * width * (tensor - 1) / tensor
    if expert:
        choices = sum(part.options.experts_per_token for part in model.modules() if hasattr(part, "experts"))
        sent["experts"] = choices * 4 * width * (expert - 1) / expert
    return sent


def crosses_nodes(place):
    """{kind of what is sent: whether ranks of several nodes take part}.

    Neighbours split a layer, the next dimensions of the mesh are experts, shards and replicas (`Place.mesh`). So many
    ranks in a row stay within a node where they divide it evenly, and a ring is as slow as its slowest link.
    """
    shards = place.world_size // place.replicas
    in_a_row = {
        "weights": shards, "gradients": shards, "replicas": place.world_size,
        "activations": place.tensor_parallel, "experts": place.expert_parallel * place.tensor_parallel,
    }  # fmt: skip
    is_one_node = place.world_size <= RANKS_PER_NODE
    return {kind: not is_one_node and RANKS_PER_NODE % n != 0 for kind, n in in_a_row.items()}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: of the arithmetic at the assumed share of the peak, and of what is sent."""

    compute: float
    communication: float

    @property
    def seconds(self):
        return max(self.compute, self.communication)


def step_time(flops, n_layers_again, n_layer, tokens_per_step, sent, target, config, place):
    """StepTime, with the forward of blocks that are computed again among the arithmetic.

    Args:
        sent: {kind: bytes}, which each rank sends one after another, each over the link that its ranks have.
    """
    peak = published_peak(target.name, place.precision)
    if peak is None:
        raise UserError(f"dtype={config.dtype!r} is not a unit that a {target.name} has; choose another dtype")
    blocks = flops.forward - flops.linear["head"]
    work = (flops.training + blocks * n_layers_again / n_layer) * tokens_per_step
    crosses = crosses_nodes(place)
    seconds = sum(size / (target.network if crosses[kind] else target.link) for kind, size in sent.items())
    return StepTime(work / (place.world_size * peak * config.target_mfu), seconds)


# ---- the plan --------------------------------------------------------------------------------------------------------


def dry_run(settings):
    """The plan as one string.

    Raises:
        UserError: settings that no run could have, or a device that is not known.
    """
    config, target = settings.train, target_of(settings.train)
    place = place_of(config, target)
    check_world(config, place)
    check_split(config.sequences_per_step, config.batch_size, place.data_size)
    facts, kind = data_facts(settings), OBJECTIVE_REGISTRY[config.objective]
    kind.check_dataset(facts)
    extra_tokens = kind.extra_tokens(config)
    settings = with_vocabulary(settings, facts.vocab_size + extra_tokens)
    facts.check_vocab(settings.model.vocab_size, extra_tokens)
    if config.match:
        settings = matching.with_matched_shape(settings)
    with on_meta():
        model = ConfigurableGPT(settings.model, heads=kind.heads)
        flops = flops_per_token(model, head_fraction=kind(model, config).head_fraction)
    check_model(model, place)
    steps, tokens_per_step = length_of(config, settings.model.block_size, facts)
    kept = 1 - split_share(model) * (1 - 1 / place.tensor_parallel)
    weights = 4 * kept * sum(p.numel() for p in model.parameters())
    parts = parts_with(model, "split_experts") if place.expert_parallel > 1 else []
    experts = 4 * sum(getattr(part, name).numel() for part in parts for name in part.split_experts)
    sent = bytes_sent(weights, config, place, experts) | activations_sent(model, config, place)
    n_again = len(recomputed(model.blocks, config))
    time = step_time(flops, n_again, len(model.blocks), tokens_per_step, sent, target, config, place)
    rows = [
        *run_rows(settings, model, flops, facts, steps, tokens_per_step, place),
        ("devices", f"{place.world_size} x {target.name}, {place.precision}, {mode(config, place)}, "
                    f"gradient_checkpointing={config.gradient_checkpointing}"),
        *memory_rows(settings, place, target),
        *time_rows(time, sent, steps, place),
        *assumption_rows(config, target, place),
        *(("note", note) for note in notes(settings.model)),
    ]  # fmt: skip
    return "\n".join([*architecture_tree(model, flops), "", *(f"{name:<14} {text}" for name, text in rows)])


def run_rows(settings, model, flops, facts, steps, tokens_per_step, place):
    """[(name, text)]: the model, the data, a step and the run."""
    config, tokens = settings.train, steps * tokens_per_step
    accumulation = config.gradient_accumulation_steps
    per_epoch = facts.tokens_in_epoch(flops.context)
    epochs = f", {tokens / per_epoch:.2f} epochs" if per_epoch else ""
    return [
        ("model", f"{model.config.architecture_name()}, {active_parameters(model):,} parameters active"),
        ("FLOPs/token", f"{human_count(flops.training)} for training at {flops.context} tokens"),
        ("", CONVENTION),
        ("dataset", f"{facts.words}; no token was read"),
        ("step", f"{human_count(tokens_per_step)} tokens: {config.batch_size} x {flops.context} x {accumulation} "
                 f"micro-batch(es), {accumulation // place.data_size} on each device"),
        ("run", f"{steps:,} steps, {human_count(tokens)} tokens{epochs}, {human_count(flops.training * tokens)}FLOP"),
    ]  # fmt: skip


def assumption_rows(config, target, place):
    peak = human_count(published_peak(target.name, place.precision))
    split = [("", "activations as without tensor_parallel, which splits some")] if place.tensor_parallel > 1 else []
    return [
        ("assumed", f"{100 * config.target_mfu:.3g}% of {peak}FLOP/s on each device (target_mfu), recomputed blocks "
                    "included"),
        ("", f"{target.link / 1e9:g} GB/s to devices of the same {RANKS_PER_NODE}, {target.network / 1e9:g} GB/s to "
             "others; sending overlaps with computing: the longer counts"),
        *split,
        ("not counted", f"{NOT_COUNTED};"),
        ("", "evaluation, saving, starting, compiling (which lowers activations), waiting for data, failures"),
    ]  # fmt: skip


def memory_rows(settings, place, target):
    """[(name, text)]: the peak, its kinds, and what would help where it does not fit."""
    try:
        memory = step_memory(settings, place)
    except Exception as error:
        return [("memory", f"cannot be counted ahead: {first_line(error)}")]
    kinds = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in memory.kinds.items())
    rows = [
        ("memory", f"{human_bytes(memory.peak)} of {human_bytes(target.memory)} on each device at most, in the "
                   f"{memory.when}"),
        ("", f"{kinds}, each at its most"),
    ]  # fmt: skip
    if memory.peak > target.memory:
        rows.append(("", f"DOES NOT FIT a {target.name}: {advice(settings.train, memory.kinds)}"))
    return rows


def advice(config, kinds):
    """What to change, the largest kind first."""
    if kinds["activations"] == max(kinds.values()):
        less = {"full": (), "products": ("full",)}.get(config.gradient_checkpointing, ("products", "full"))
        ways = [f"gradient_checkpointing={way}" for way in less]
        if config.use_fsdp and config.fsdp_dtype == "float32":
            ways.append("fsdp_dtype=bfloat16")  # autocast keeps a copy of every weight in half precision
        if config.batch_size > 1:
            ways.append("lower batch_size and raise gradient_accumulation_steps by as much")
        return f"activations are most of it: {', or '.join(ways) or 'lower block_size'}"
    if config.use_fsdp:
        return "raise target_n_gpu"
    return "use_fsdp=True shards weights, gradients and optimizer"


def time_rows(time, sent, steps, place):
    crosses = crosses_nodes(place)
    where = {kind: "between nodes" if crosses[kind] else "within a node" for kind in sent}
    kinds = ", ".join(f"{kind} {human_bytes(size)} {where[kind]}" for kind, size in sent.items())
    bound = "computing" if time.compute >= time.communication else "sending"
    hours = steps * time.seconds / 3600
    return [
        ("communication", f"{human_bytes(sum(sent.values()))} sent by each device in a step: {kinds}"
                          if sent else "none: one device"),
        ("step time", f"{time.seconds:.3g} s: computing {time.compute:.3g} s, sending {time.communication:.3g} s; "
                      f"{bound} decides"),
        ("estimated", f"{hours:.3g} hours ({human_seconds(3600 * hours)}), {hours * place.world_size:,.0f} GPU-hours"),
    ]  # fmt: skip
