"""What bench.py times: one architecture of ours, or a peer at its shape, each in a process of its own, taking turns.

    case = Case('mamba2', ('config/arch_mamba2.py', '--block_size=256'))
    with Workers([Job(case), Job(case, 'transformers')]) as (ours, theirs):
        seconds = interleaved({'ours': ours.step, 'theirs': theirs.step}, repeats=10)

A process of its own lets each be as its users have it: its memory is its own, and so are its allocator's settings.
"""

import contextlib
import dataclasses
import multiprocessing
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import kernels
import training_parallel as parallel
import training_place
from bench_peers import find_peers
from model_builder import ConfigurableGPT, on_meta, parameter_plan
from model_flops import flops_per_token, state_bytes, synchronize
from training_objectives import OBJECTIVE_REGISTRY
from training_optim import OPTIMIZER_REGISTRY, clip_gradients
from user_errors import UserError

VOCAB_SIZE = 512  # where no setting says otherwise: tokens are drawn at random, no dataset is read
PROMPT = 16  # tokens that generation goes on from
WARM_UP = 2  # steps before the clock starts: compiling, the allocator, the optimizer's first step


@dataclass(frozen=True)
class Case:
    """An architecture as the command line asks for it."""

    label: str
    arguments: tuple  # for configurator.read_settings: files, then --key=value

    @property
    def has_files(self):
        return any(not word.startswith("--") for word in self.arguments)

    def settings(self, **changes):
        """Settings with a vocabulary; `changes` go to the model, such as block_size=512."""
        settings = configurator.with_vocabulary(configurator.read_settings(list(self.arguments)), VOCAB_SIZE)
        return dataclasses.replace(settings, model=settings.model.replace(**changes))


# ---- a model that can be timed ---------------------------------------------------------------------------------------


class Candidate:
    """A model of ours or a peer's with all that one training step needs.

    Args:
        settings: configurator.Settings. place: training_place.Place.
        peer: None for ours; one of bench_peers.PEERS, whose architecture matches.
        sequences: of a batch; None is batch_size.
    """

    def __init__(self, settings, place, peer=None, sequences=None):
        self.place, self.train = place, settings.train
        torch.manual_seed(settings.train.seed)
        heads = OBJECTIVE_REGISTRY[settings.train.objective].heads if peer is None else None
        ours = ConfigurableGPT(settings.model, settings.train.seed, heads)
        ours.check_device(place.device)
        self.model, self.flops, plan = ours, flops_per_token(ours), parameter_plan(ours)
        self.kernels, self.beside = {}, None if peer is None else peer.counterpart(ours)
        if peer is None:
            self.name, self.generate = "nanoArch", lambda idx, n: ours.generate(idx, n, temperature=0)
            ours.to(place.device)
            dtype = training_place.DTYPES[place.dtype]
            will_compile = parallel.wants_compile(self.train, place)
            self.kernels = kernels.choose(ours, place.device, self.train.kernel_backend, dtype, will_compile)
            self.module, self.clip = OBJECTIVE_REGISTRY[self.train.objective](ours, self.train), clip_gradients
            make = OPTIMIZER_REGISTRY[self.train.optimizer]
            self.optimizers = make(plan, dict(ours.named_parameters()), self.train, place.device)
        else:
            self.name, self.generate = self.beside.name, self.beside.generate
            self.module, self.clip = self.beside.module.to(place.device), torch.nn.utils.clip_grad_norm_
            self.optimizers = [self._peer_optimizer()]
        self.parameters = list(self.module.parameters())
        self.n_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == "float16")
        batch = random_batch(settings.model, sequences or self.train.batch_size)
        batch = batch if peer is not None else self.module.prepare(batch, self.train.seed)
        self.batch = {name: tensor.to(place.device) for name, tensor in batch.items()}
        self.compiled = "off"
        if parallel.wants_compile(self.train, place):
            self.module, self.compiled = parallel.compile_module(self.module, self.batch, place)

    def _peer_optimizer(self):
        if self.beside.optimizer is not None:
            return self.beside.optimizer(self.train, self.place.device)
        return torch.optim.AdamW(
            self.module.parameters(), lr=self.train.learning_rate, betas=(self.train.beta1, self.train.beta2),
            weight_decay=self.train.weight_decay, fused=True,
        )  # fmt: skip

    @property
    def tokens(self):
        """Of one step."""
        return self.batch["inputs"].numel()

    def step(self):
        """One whole training step on one micro-batch: forward, backward, clip, optimizer."""
        self.forward_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.train.grad_clip:
            self.clip(self.parameters, self.train.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def forward_backward(self):
        with self.place.autocast():
            sums = self.module(self.batch)
        self.scaler.scale(sums["loss"] / sums["tokens"]).backward()

    def forward_backward_alone(self):
        """Without an optimizer: what a token costs in the network."""
        self.forward_backward()
        for parameter in self.parameters:
            parameter.grad = None

    def describe(self):
        """What a result says of a candidate beside its numbers."""
        config = self.model.config
        record = {
            "program": self.name, "architecture": config.architecture_name(), "parameters": self.n_parameters,
            "kernels": dict(self.kernels), "compile": self.compiled, "precision": self.place.precision,
            "flops_per_token_training": self.flops.training,
        }  # fmt: skip
        if self.beside is not None:
            return record | {"program_version": self.beside.version}
        return record | {"state_bytes": {"context": config.block_size,
                                         "bytes": state_bytes(self.model, config.block_size)}}  # fmt: skip

    def decode(self, n):
        """Generate n tokens of one sequence, the likeliest each time."""
        prompt = self.batch["inputs"][:1, : prompt_length(self.model.config)]
        with torch.no_grad(), self.place.autocast():
            self.generate(prompt, n)

    def read_prompt(self, n):
        """Read all but the last n tokens of one sequence; `decode_on` goes on from there."""
        prompt = self.batch["inputs"][:1, :-n]
        self.model.eval()
        self._step(prompt, self.model.init_state(1))

    def decode_on(self, n):
        """Generate n tokens behind what was read, the likeliest each time."""
        for _ in range(n):
            self._step(self.next_token, self.state)

    def _step(self, tokens, state):
        with torch.no_grad(), self.place.autocast():
            logits, self.state = self.model.step(tokens, state)
        self.next_token = logits[:, -1:].argmax(-1)


def prompt_length(config):
    return min(PROMPT, max(1, config.block_size // 4))


def random_batch(config, sequences):
    """{'inputs', 'targets'} (B, T), 'window' and 'outcomes' (B,), the same for every candidate of a shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (sequences, config.block_size + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    windows = torch.arange(sequences)
    return {"inputs": inputs, "targets": targets, "window": windows, "outcomes": (windows % 2).float()}


def peers_beside(case, peers):
    """Those of `peers` that have the case's architecture."""
    with on_meta():
        model = ConfigurableGPT(case.settings().model)
    return [peer for peer in peers if peer.matches(model)]


# ---- measuring -------------------------------------------------------------------------------------------------------


def interleaved(functions, repeats, seconds=None, progress=None):
    """{name: [what each call gave]}: A B C A B C ..., so that what slows the machine down slows all of them.

    Args:
        functions: {name: function without arguments that gives the seconds it took, or another number}.
        repeats: rounds; with `seconds`, as many as it takes to fill them, at least 3.
        progress: called after each round with the part that is done, in [0, 1].
    """
    results, t_start = {name: [] for name in functions}, time.perf_counter()
    while True:
        for name, function in functions.items():
            results[name].append(function())
        n, elapsed = len(next(iter(results.values()))), time.perf_counter() - t_start
        done = n / repeats if seconds is None else min(n / 3, elapsed / seconds)
        if progress is not None:
            progress(min(done, 1.0))
        if done >= 1:
            return results


def timed(function):
    """`function` made to give the seconds that a call takes."""

    def call():
        t0 = time.perf_counter()
        function()
        return time.perf_counter() - t0

    return call


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What one process is for."""

    case: Case
    peer: str = ""  # as in --peers; '' is ours
    context: int | None = None  # takes the place of block_size
    tokens: int | None = None  # of a batch, as near as whole sequences come; None is batch_size sequences
    warm_up: int = WARM_UP  # training steps before the first question
    keep_memory: bool = True  # ours: freed memory is kept for the next step, as train.py does


class Worker:
    """A Candidate in a process of its own, warmed up; every call waits for it and gives the seconds that it took."""

    def __init__(self, job):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, job), daemon=True)
        self.process.start()
        end.close()
        self.job = job

    def wait(self):
        """Until it is built and warm: its description, 'tokens' of a step and 'peak_memory_bytes' among it."""
        self.about = self._answer()
        return self

    def step(self):
        return self._ask("step")

    def forward_backward(self):
        return self._ask("forward_backward_alone")

    def decode(self, n):
        return self._ask("decode", n)

    def read_prompt(self, n):
        return self._ask("read_prompt", n)

    def decode_on(self, n):
        return self._ask("decode_on", n)

    def close(self):
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()

    def _ask(self, *words):
        self.pipe.send(words)
        return self._answer()

    def _answer(self):
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise UserError(f"the process of case '{self.job.case.label}' was killed; is memory short?") from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "trouble":
            raise RuntimeError(f"case '{self.job.case.label}' {self.job.peer}, in its own process:\n{value}")
        return value


class Workers(contextlib.ExitStack):
    """`with Workers(jobs) as workers`: one Worker for each job, all warm; closed at the end."""

    def __init__(self, jobs, progress=None):
        super().__init__()
        self.jobs, self.progress = jobs, progress

    def __enter__(self):
        super().__enter__()
        workers = []
        for job in self.jobs:  # one after the other: a warm-up is heavy
            workers.append(Worker(job))
            self.callback(workers[-1].close)
            workers[-1].wait()
            if self.progress is not None:
                self.progress(len(workers) / len(self.jobs))
        return workers


def _serve(pipe, job):
    """Build what the job asks for, then answer calls until the other end closes."""
    try:
        candidate, about = _make(job)
        pipe.send(("value", about))
        while True:
            name, *arguments = pipe.recv()
            t0 = time.perf_counter()
            getattr(candidate, name)(*arguments)
            synchronize(candidate.place.device)
            pipe.send(("value", time.perf_counter() - t0))
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark is over
    except UserError as error:
        pipe.send(("mistake", str(error)))
    except Exception:
        pipe.send(("trouble", traceback.format_exc()))


def _make(job):
    """(Candidate, its description) of a job, warm."""
    if job.peer or not job.keep_memory:  # a setting of train.py that others do not have
        training_place.keep_freed_memory = lambda: None
    settings = job.case.settings(**({} if job.context is None else {"block_size": job.context}))
    peer, place = next(iter(find_peers(job.peer)), None), training_place.find_place(settings.train)
    with on_meta():
        model = ConfigurableGPT(settings.model)
        _ = None if peer is None else peer.counterpart(model)  # for what it imports late
    before = _memory(place)
    sequences = None if job.tokens is None else max(1, job.tokens // settings.model.block_size)
    candidate = Candidate(settings, place, peer, sequences)
    for _ in range(job.warm_up):
        candidate.step()
    synchronize(place.device)
    about = candidate.describe() | {"tokens": candidate.tokens, "key": case_key(job.case, settings, candidate)}
    return candidate, about | {"peak_memory_bytes": _memory(place) - before}


def _memory(place):
    """Peak of this process: allocated on a CUDA device, else resident."""
    if place.device.type == "cpu" and (status := Path("/proc/self/status")).exists():
        # The peak that getrusage gives includes what the parent had when it started this process.
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    return training_place.peak_memory_bytes(place)


def case_key(case, settings, candidate):
    """The name of a result in the file: what was measured, with everything that changes it."""
    model, place = settings.model, candidate.place
    words = [
        case.label, f"{model.n_layer} x {model.n_embd}, vocabulary {model.vocab_size}",
        f"batch {settings.train.batch_size} x {case.settings().model.block_size}", place.precision,
        f"compile {candidate.compiled.partition(':')[0]}",
    ]  # fmt: skip
    words += [f"{torch.get_num_threads()} thread(s)"] if place.device.type == "cpu" else []
    told = {"n_layer", "n_embd", "vocab_size", "batch_size", "block_size", "dtype", "tf32", "compile", "threads",
            "device"}  # fmt: skip
    more = [word[2:] for word in case.arguments if word.startswith("--") and word[2:] not in case.label]
    words += sorted(word for word in more if word.partition("=")[0] not in told)
    return ", ".join([*words, candidate.name])


# ---- the fast paths against the plain ones ---------------------------------------------------------------------------


def kernel_check(case, tolerance=1e-3):
    """({part: kernel}, largest difference): a step's gradients with the kernels against those without.

    Differences are relative to the largest value of each tensor. In float32 whatever the case trains in, so that a
    kernel's mistake does not hide in rounding.

    Raises:
        UserError: a difference above the tolerance.
    """
    settings = case.settings()
    results = {}
    for backend in ("plain", settings.train.kernel_backend):
        train = settings.train.replace(kernel_backend=backend, dtype="float32", tf32=False, compile=False)
        candidate = Candidate(dataclasses.replace(settings, train=train), training_place.find_place(train),
                              sequences=1)  # fmt: skip
        candidate.forward_backward()
        results[backend] = [p.grad for p in candidate.parameters if p.grad is not None]
        chosen = candidate.kernels
    plain, fast = results["plain"], results[settings.train.kernel_backend]
    largest = max(
        float(b.abs().max()) for b in plain
    )  # beside it some gradients, a key's bias, are zero but for rounding
    difference = max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * largest)
                     for a, b in zip(fast, plain, strict=True))  # fmt: skip
    if not difference <= tolerance:
        raise UserError(
            f"{case.label}: kernels {chosen} give gradients {difference:.1e} away from the plain path's; "
            "use --kernel_backend=plain, and report it"
        )
    return chosen, difference
