"""`TrainConfig`: everything about a run that is not the architecture. Standard library only.

The order below is the order of `--help`. Every field has a trailing reason; `configurator.py` reads these comments.
Options of optimizers, schedules and objectives are declared by those parts themselves and travel in `part_options`.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

from model_config import PRESETS, SIZES
from registry import options_from_json, options_of
from user_errors import UserError, did_you_mean

MATCHED_QUANTITIES = ("params", "active_params", "flops", "state")


@dataclass(frozen=True)
class TrainConfig:
    # -- the run
    run_name: str | None = None  # folder under runs_dir; None makes one from the architecture, dataset and seed
    runs_dir: str = "runs"  # where run folders are written
    seed: int = 1337  # decides the initial weights and the order of the data
    init_from: str = "scratch"  # scratch, resume (the run called run_name), hf:NAME or FOLDER, nanogpt:CKPT
    resume_step: int | None = None  # with init_from=resume: which checkpoint; None takes the latest
    auto_resume: bool = False  # go on where run_name has a checkpoint, else begin: for a command that is run again

    # -- a run on paper (docs/scaling.md)
    dry_run: bool = False  # print parameters, FLOPs, memory, communication and hours on the target, and train nothing
    target_gpu: str = "h100"  # b200, h200, h100, a100, v100, mi300x, l40s, rtx4090, rtx3090
    target_n_gpu: int = 8  # devices, one process each; eight to a node
    target_mfu: float = 0.4  # the share of their peak that is reached: an assumption, which bench.py can replace

    # -- a fair size (docs/matching.md)
    match: str | None = None  # solve n_layer, n_embd, n_head for equal params, active_params, flops or state
    match_to: str | int | float | None = None  # the target: 5.4M, or a preset at a size such as llama@5M

    # -- data
    dataset: str = "python_stdlib"  # a folder under data_dir; prepared on first use when it ships a prepare.py
    data_dir: str = "data"  # where datasets live
    tokenizer: str | None = None  # byte, char, gpt2, bpe, unigram, wordpiece, hf:FOLDER; None: the dataset's
    tokenizer_vocab_size: int | None = None  # for tokenizers trained here (bpe, unigram, wordpiece)
    variant: str | None = None  # which size of a dataset, e.g. small or full for tinystories
    input: str | None = None  # a local file or folder to prepare the dataset from, instead of a download
    shard_tokens: int = 100_000_000  # tokens in each file of a dataset that is prepared here and longer than one
    prefetch_batches: int = 2  # steps of data read ahead by a thread; 0 reads in the training loop

    # -- objective
    objective: str = "causal_lm"  # what the loss is
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting; PaLM uses 1e-4
    loss_chunk_elements: int = 2**24  # logits held at once by the loss; past this it works in chunks of rows

    # -- size of a step and length of the run
    batch_size: int = 12  # sequences per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step for the whole job, divided among the ranks
    max_iters: int | None = 2000  # length in steps
    max_tokens: int | None = None  # length in tokens, rounded up to whole steps; takes the place of max_iters
    epochs: float | None = None  # length in passes over the training split; takes the place of max_iters

    # -- optimizer
    optimizer: str = "adamw"  # adamw, or muon for matrices with adamw for the rest
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.1  # on matrices and embeddings; never on norms, biases or what a part exempts
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # of the second; a bit high, because small batches make it noisy
    adam_eps: float = 1e-8  # added to the root of the second moment
    grad_clip: float = 1.0  # the global norm of the gradient is clipped to this; 0 leaves it alone
    max_non_finite_steps: int = 10  # in a row, before the run stops; each one is skipped and counted

    tuning_runs: int = 0  # trials that were spent on finding these settings; sweep.py says it, the audit compares it
    tuning_tokens: int = 0  # tokens that those trials read

    # -- learning rate schedule
    schedule: str = "cosine"  # cosine, linear, wsd or constant
    decay_lr: bool = True  # False keeps learning_rate after the warm-up, as schedule=constant does
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int | None = None  # where the decay ends; None is the end of the run
    min_lr: float | None = None  # where the decay ends; None is a tenth of learning_rate

    # -- place and precision
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto takes the best that is there
    dtype: str = "auto"  # auto, float32, bfloat16, float16 (with a gradient scaler); auto is float32 on CPU
    tf32: bool = True  # let CUDA multiply float32 matrices in TF32
    compile: bool | str = "auto"  # torch.compile; auto is on for CUDA and off elsewhere
    kernel_backend: str = "auto"  # auto: what passes a check; plain; or one of compiled, triton, mamba_ssm, fla, onednn
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    gradient_checkpointing: str = "none"  # products: all but these is computed again; selective: every 2nd block; full

    # -- several processes, started by torchrun
    use_zero1: bool = False  # ZeRO-1: each rank keeps the optimizer's state of a part of the parameters
    use_fsdp: bool = False  # FSDP2: weights, gradients and optimizer are sharded, and gathered a block at a time
    fsdp_reshard_after_forward: bool = True  # free a block's weights until its backward; False gathers them once
    fsdp_dtype: str = "float32"  # of gathered weights; bfloat16 halves the traffic and rounds norms and gates too
    fsdp_replicas: int = 1  # groups of ranks that each shard a whole model (HSDP), such as one per node
    fsdp_accumulate: str = "sharded"  # gradients between micro-batches; whole: sent once a step, 4 bytes a weight more
    fsdp_cpu_offload: bool = False  # keep weights, gradients and optimizer in the CPU's memory between their uses
    tensor_parallel: int = 1  # ranks that share the heads and hidden units of each layer, and read the same data
    expert_parallel: int = 1  # with use_fsdp: ranks that share the experts of each moe layer; tokens go to them
    collective_timeout: int = 600  # seconds that a rank waits for the others before it gives up

    # -- evaluation
    eval_interval: int = 250  # steps between evaluations; a few more come early, at halvings of this
    eval_schedule: str = "interval"  # interval: eval_interval decides; checkpoints: at the scheduled token counts
    eval_iters: int = 4  # size of the validation set, in units of 16,384 tokens; 0 is the whole split
    eval_only: bool = False  # evaluate once and leave
    sample_tokens: int = 200  # length of the sample of text at the end; 0 for none

    # -- checkpoints
    checkpoint_format: str = "unsharded"  # or sharded: each rank writes its part while training goes on
    checkpoint_interval: int | None = None  # steps between; None is eval_interval (0 with a schedule), 0 only the end
    keep_checkpoints: int = 2  # how many of the latest stay, beside the best and the scheduled ones; 0 keeps all
    checkpoint_tokens: str | tuple | None = None  # a schedule in tokens: '1M,5M,20M'; the end is always saved
    first_epoch_checkpoints: int | None = None  # or one made: so many in the first epoch, log-spaced from 1/1000 of it
    subsequent_epochs_spacing: str = "log"  # in each epoch after it: log, or linear
    min_checkpoints_per_epoch: int = 5  # in each epoch after it; log-spacing at the first one's ratio may ask for more

    # -- logging
    log_interval: int = 10  # steps between lines
    layer_stats_interval: int = 0  # steps between per-layer gradient and weight norms; 0 for none
    tensorboard: bool = True  # write event files into the run folder
    wandb_log: bool = False  # log to Weights & Biases (pip install wandb)
    wandb_project: str = "nanoarch"  # project on Weights & Biases
    wandb_run_name: str | None = None  # None is the run's name
    plot: bool = True  # draw the loss at the end

    # what parts declare for themselves
    part_options: dict = field(default_factory=dict)  # options of the optimizer, schedule and objective

    def __post_init__(self):
        validate(self)

    @property
    def sequences_per_step(self):
        """Sequences in one optimizer step of the whole job, over all ranks and micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def save_interval(self):
        """Steps between checkpoints; 0 saves at the end alone, or where a schedule in tokens says."""
        if self.checkpoint_interval is not None:
            return self.checkpoint_interval
        return 0 if self.has_token_schedule else self.eval_interval

    @property
    def has_token_schedule(self):
        """Whether checkpoints are due at counts of tokens."""
        return self.checkpoint_tokens is not None or self.first_epoch_checkpoints is not None

    @property
    def min_learning_rate(self):
        """Where the schedule ends."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    def total_steps(self, tokens_per_step, steps_per_epoch):
        """The run's length in whole steps, from whichever of max_tokens, epochs and max_iters was set."""
        if self.max_tokens is not None:
            return math.ceil(self.max_tokens / tokens_per_step)
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * steps_per_epoch))
        return self.max_iters

    def total_tokens(self, tokens_per_step, tokens_per_epoch):
        """The run's length in tokens as asked for; `total_steps` is the first step at or beyond it."""
        if self.max_tokens is not None:
            return self.max_tokens
        if self.epochs is not None:
            return math.ceil(self.epochs * tokens_per_epoch)
        return self.max_iters * tokens_per_step

    @property
    def length_setting(self):
        """The name of the setting that decides how long the run is."""
        return next((name for name in ("max_tokens", "epochs") if getattr(self, name) is not None), "max_iters")

    def options_for(self, part):
        """Namespace of `part`'s own options: its defaults, under what the user set."""
        options = options_of(part)
        return SimpleNamespace(**{name: self.part_options.get(name, o.default) for name, o in options.items()})

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The config that `to_dict` wrote."""
        options = options_from_json(values.get("part_options", {}))
        return cls(**{**options_from_json(values), "part_options": options})


def read_count(name, value):
    """A count as people write it: 5400000, '5.4M', '1_000k'; k, M, G (or B) and T are powers of a thousand.

    Raises:
        UserError: anything else, and what is not above 0, naming the setting.
    """
    text = str(value).strip().replace("_", "")
    power = "kmgbt".find(text[-1:].lower()) if text[-1:] else -1
    scale = (10**3, 10**6, 10**9, 10**9, 10**12)[power] if power >= 0 else 1
    try:
        number = float(text[: -1 if power >= 0 else None]) * scale
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name}={value!r} is no count; write it as 5400000 or 5.4M")
    return round(number) if number >= 1 else number


def _check_match(config):
    """Refuse half a match, and names that do not exist, before any data is read."""
    match, match_to = config.match, config.match_to
    if (match is None) != (match_to is None):
        given, missing = ("match", "match_to") if match_to is None else ("match_to", "match")
        example = "--match_to=5.4M or --match_to=llama@5M" if missing == "match_to" else "--match=params"
        raise UserError(f"{given}={getattr(config, given)} needs {missing} beside it, such as {example}")
    if match is not None and ":" in config.init_from:
        raise UserError(f"match={match!r} solves a shape, and init_from={config.init_from!r} brings one; drop either")
    if match is None:
        return
    if match not in MATCHED_QUANTITIES:
        hint = did_you_mean(match, MATCHED_QUANTITIES)
        raise UserError(f"match={match!r} must be one of {', '.join(MATCHED_QUANTITIES)}{hint}")
    preset, at, size = str(match_to).partition("@")
    if not at and preset in PRESETS:
        raise UserError(f"match_to={match_to!r} needs a size as well, such as {preset}@5M")
    if not at:
        read_count("match_to", match_to)
    for name, known in ((preset, PRESETS), (size, SIZES)) if at else ():
        if name not in known:
            kind = "preset" if known is PRESETS else "size"
            raise UserError(
                f"match_to={match_to!r} names no {kind}: '{name}' does not exist{did_you_mean(name, known)} "
                f"(known: {', '.join(known)})"
            )


def scheduled_counts(checkpoint_tokens):
    """The ascending token counts that '1M,5M,20M' or a tuple of numbers names.

    Raises:
        UserError: something that is no count of whole tokens.
    """
    parts = checkpoint_tokens.split(",") if isinstance(checkpoint_tokens, str) else checkpoint_tokens
    counts = [read_count("checkpoint_tokens", part) for part in parts]
    if not counts or min(counts) < 1:
        raise UserError(f"checkpoint_tokens={checkpoint_tokens!r} names no tokens; write it as 1M,5M,20M")
    return sorted(set(counts))


def _check_schedule(config):
    explicit, generated = config.checkpoint_tokens, config.first_epoch_checkpoints
    if explicit is not None and generated is not None:
        raise UserError(
            f"checkpoint_tokens={explicit!r} and first_epoch_checkpoints={generated} both set the schedule; keep one"
        )
    if explicit is not None:
        scheduled_counts(explicit)
    if generated is not None and generated < 1:
        raise UserError(f"first_epoch_checkpoints={generated} must be at least 1, or None")
    if config.eval_schedule == "checkpoints" and not config.has_token_schedule:
        raise UserError(
            "eval_schedule=checkpoints needs a schedule: set checkpoint_tokens, such as 1M,5M,20M, or "
            "first_epoch_checkpoints"
        )


def validate(config):
    """Refuse values that cannot be meant, each with a sentence that names the setting and its value."""
    at_least = {
        "batch_size": 1, "gradient_accumulation_steps": 1, "eval_interval": 1, "log_interval": 1,
        "eval_iters": 0, "keep_checkpoints": 0, "prefetch_batches": 0, "warmup_iters": 0, "sample_tokens": 0,
        "layer_stats_interval": 0, "max_non_finite_steps": 1, "threads": 0, "loss_chunk_elements": 1, "seed": 0,
        "min_checkpoints_per_epoch": 1, "target_n_gpu": 1, "fsdp_replicas": 1, "tensor_parallel": 1,
        "expert_parallel": 1, "collective_timeout": 1,
        "weight_decay": 0, "grad_clip": 0, "z_loss": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if not value >= least:
            raise UserError(f"{name}={value} must be at least {least}")
    for name in ("learning_rate", "adam_eps"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name}={getattr(config, name)} must be above 0")
    if not 0 < config.target_mfu <= 1:
        raise UserError(f"target_mfu={config.target_mfu} must lie in (0, 1]")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must lie in [0, 1)")
    for name in ("max_iters", "max_tokens", "epochs", "lr_decay_iters", "tokenizer_vocab_size"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0, or None")
    if config.checkpoint_interval is not None and config.checkpoint_interval < 0:
        raise UserError(f"checkpoint_interval={config.checkpoint_interval} must be 0 or more, or None")
    for name, most in (("seed", 2**63), ("threads", 1024)):
        if getattr(config, name) > most:
            raise UserError(f"{name}={getattr(config, name)} must be at most {most}")
    if config.min_lr is not None and not 0 <= config.min_lr <= config.learning_rate:
        where = "below 0" if config.min_lr < 0 else f"above learning_rate={config.learning_rate}"
        raise UserError(f"min_lr={config.min_lr} is {where}; choose one between, or leave it None")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
    if config.lr_decay_iters is not None and config.lr_decay_iters < config.warmup_iters:
        raise UserError(
            f"lr_decay_iters={config.lr_decay_iters} ends before the warm-up of warmup_iters={config.warmup_iters}; "
            "lower warmup_iters, or leave lr_decay_iters None"
        )
    if config.max_tokens is not None and config.epochs is not None:
        raise UserError(f"max_tokens={config.max_tokens} and epochs={config.epochs} both set the length; keep one")
    if config.max_iters is None and config.max_tokens is None and config.epochs is None:
        raise UserError("the run has no length: set one of max_iters, max_tokens or epochs")
    kind, _, path = config.init_from.partition(":")
    if kind in ("scratch", "resume") if path else kind not in ("scratch", "resume"):
        hint = "" if path else did_you_mean(config.init_from, ("scratch", "resume"))
        raise UserError(f"init_from={config.init_from!r} must be one of scratch, resume, hf:NAME, nanogpt:FILE{hint}")
    choices = {
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "compile": (True, False, "auto"),
        "gradient_checkpointing": ("none", "full", "selective", "products"),
        "fsdp_dtype": ("float32", "bfloat16"),
        "fsdp_accumulate": ("sharded", "whole"),
        "eval_schedule": ("interval", "checkpoints"),
        "checkpoint_format": ("unsharded", "sharded"),
        "subsequent_epochs_spacing": ("log", "linear"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            value, words = getattr(config, name), [str(choice) for choice in allowed]
            raise UserError(f"{name}={value!r} must be one of {', '.join(words)}{did_you_mean(value, words)}")
    if config.use_fsdp and config.use_zero1:
        raise UserError("use_fsdp=True shards the optimizer's state already, as use_zero1=True would; keep one of them")
    for name in ("fsdp_replicas", "fsdp_cpu_offload", "expert_parallel"):
        if getattr(config, name) > 1 - (name == "fsdp_cpu_offload") and not config.use_fsdp:
            raise UserError(f"{name}={getattr(config, name)} is a way to shard; set use_fsdp=True beside it")
    if config.tensor_parallel > 1 and config.use_zero1:
        raise UserError(
            f"tensor_parallel={config.tensor_parallel} does not go with use_zero1=True, which needs whole weights; "
            "set use_fsdp=True in its place"
        )
    _check_match(config)
    _check_schedule(config)
    if config.run_name is not None and (not config.run_name.strip(" .") or set(config.run_name) & set('/\\:*?"<>|')):
        raise UserError(f'run_name={config.run_name!r} must be a plain folder name without / \\ : * ? " < > |')
    if config.auto_resume and config.run_name is None:
        raise UserError("auto_resume=True needs run_name=NAME: the run to go on with, and to make where there is none")
    if config.auto_resume and config.resume_step is not None:
        raise UserError(f"auto_resume=True goes on from the latest checkpoint; drop resume_step={config.resume_step}")
    if config.init_from == "resume" and config.run_name is None:
        raise UserError("init_from=resume needs run_name=NAME, the run to continue")
