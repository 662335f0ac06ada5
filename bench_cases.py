"""What bench.py times: one architecture of ours, or a peer at its shape, and how.

case = Case('mamba2', ('config/arch_mamba2.py', '--block_size=256'))
candidate = build(case)                       # with a peer: build(case, find_peers('transformers')[0])
times = interleaved({'a': a.step, 'b': b.step}, repeats=10)
"""

import dataclasses
import gc
import multiprocessing
import time
import traceback
from dataclasses import dataclass

import torch

import configurator
import kernels
import training_parallel as parallel
from bench_peers import find_peers
from model_builder import ConfigurableGPT, on_meta, parameter_plan
from model_flops import flops_per_token, synchronize
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

    def settings(self, **changes):
        """Settings with a vocabulary; `changes` go to the model, such as block_size=512."""
        settings = configurator.with_vocabulary(configurator.read_settings(list(self.arguments)), VOCAB_SIZE)
        return dataclasses.replace(settings, model=settings.model.replace(**changes))


# ---- a model that can be timed ---------------------------------------------------------------------------------------


class Candidate:
    """A model of ours or a peer's with all that one training step needs.

    Args:
        settings: configurator.Settings. place: training_parallel.Place.
        peer: None for ours; one of bench_peers.PEERS, whose architecture matches.
        sequences: of a batch; None is batch_size.
    """

    def __init__(self, settings, place, peer=None, sequences=None):
        self.place, self.train = place, settings.train
        torch.manual_seed(settings.train.seed)
        ours = ConfigurableGPT(settings.model, settings.train.seed)
        ours.check_device(place.device)
        self.model, self.flops, plan = ours, flops_per_token(ours), parameter_plan(ours)
        self.kernels, self.beside = {}, None if peer is None else peer.counterpart(ours)
        if peer is None:
            self.name, self.generate = "nanoArch", lambda idx, n: ours.generate(idx, n, temperature=0)
            ours.to(place.device)
            self.kernels = kernels.choose(ours, place.device, self.train.kernel_backend)
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
        self.batch = random_batch(settings.model, sequences or self.train.batch_size, place.device)
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

    def decode(self, n):
        """Generate n tokens of one sequence, the likeliest each time."""
        prompt = self.batch["inputs"][:1, : prompt_length(self.model.config)]
        with torch.no_grad(), self.place.autocast():
            self.generate(prompt, n)


def prompt_length(config):
    return min(PROMPT, max(1, config.block_size // 4))


def random_batch(config, sequences, device):
    """{'inputs', 'targets'} (B, T), the same for every candidate of a shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (sequences, config.block_size + 1), generator=generator)
    return {"inputs": tokens[:, :-1].contiguous().to(device), "targets": tokens[:, 1:].contiguous().to(device)}


def build(case, peer=None):
    """Candidate of a case, or of a peer beside it."""
    settings = case.settings()
    return Candidate(settings, parallel.find_place(settings.train), peer)


def peers_beside(case, peers):
    """Those of `peers` that have the case's architecture."""
    with on_meta():
        model = ConfigurableGPT(case.settings().model)
    return [peer for peer in peers if peer.matches(model)]


# ---- measuring -------------------------------------------------------------------------------------------------------


def interleaved(functions, repeats, seconds=None, device=None, progress=None):
    """{name: [seconds of each call]}: A B C A B C ..., so that what slows the machine down slows all of them.

    Args:
        functions: {name: function without arguments}.
        repeats: rounds; with `seconds`, as many as it takes to fill them, at least 3.
        device: torch.device to wait for before the clock is read.
        progress: called after each round with the part that is done, in [0, 1].
    """
    times, t_start = {name: [] for name in functions}, time.perf_counter()
    while True:
        for name, function in functions.items():
            t0 = time.perf_counter()
            function()
            if device is not None:
                synchronize(device)
            times[name].append(time.perf_counter() - t0)
        n, elapsed = len(next(iter(times.values()))), time.perf_counter() - t_start
        done = n / repeats if seconds is None else min(n / 3, elapsed / seconds)
        if progress is not None:
            progress(min(done, 1.0))
        if done >= 1:
            return times


def peak_memory_bytes(case, peer=None):
    """Peak memory that training steps add: allocated on a CUDA device, else resident in a process of its own."""
    place = parallel.find_place(case.settings().train)
    if place.device.type == "cuda":
        return _peak_memory_cuda(case, peer, place.device)
    return in_its_own_process(_peak_memory_resident, case, "" if peer is None else peer.text)


def in_its_own_process(function, *arguments):
    """function(*arguments) in a fresh interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result, trouble = pool.apply(_result_or_trouble, (function, arguments))
    if trouble is not None:
        raise RuntimeError(f"in a process of its own:\n{trouble}")
    return result


def _result_or_trouble(function, arguments):
    """An exception goes home as text: some cannot be pickled, and the pool would wait for ever."""
    try:
        return function(*arguments), None
    except Exception:
        return None, traceback.format_exc()


def _peak_memory_cuda(case, peer, device):
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _train_a_little(case, peer)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_memory_resident(case, peer_text):
    peer, settings = next(iter(find_peers(peer_text)), None), case.settings()
    place = parallel.find_place(settings.train)
    with on_meta():
        model = ConfigurableGPT(settings.model)
        _ = None if peer is None else peer.counterpart(model)  # for what it imports late
    before = parallel.peak_memory_bytes(place)  # what the imports take is not the model's
    _train_a_little(case, peer)
    return parallel.peak_memory_bytes(place) - before


def _train_a_little(case, peer):
    candidate = build(case, peer)
    for _ in range(WARM_UP):
        candidate.step()
    synchronize(candidate.place.device)


def step_seconds(case, keep_memory, steps):
    """[seconds] of training steps in this process, with freed memory kept for the next step or given back."""
    if not keep_memory:
        parallel.keep_freed_memory = lambda: None  # find_place calls it; this process has no other business
    candidate = build(case)
    for _ in range(WARM_UP):
        candidate.step()
    return interleaved({"step": candidate.step}, steps)["step"]


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
        candidate = Candidate(dataclasses.replace(settings, train=train), parallel.find_place(train),
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
