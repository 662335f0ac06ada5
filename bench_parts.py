"""Single parts, each with its variants in turn: what the choices in docs/performance.md rest on.

    rows = PARTS['rmsnorm'](case, config, progress)     # {row: {'unit': 'ms', 'variants': {name: spread}}}

A part takes the case of the command line where it needs a model, else shapes of its own.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench_cases import Job, Workers, interleaved, timed
from bench_record import spread
from kernels import cpu_norm
from model_builder import ConfigurableGPT
from model_components import rms_norm
from model_config import ModelArchitectureConfig
from user_errors import UserError

PARTS = {}
CALLS = 3  # each timed function is called so many times per round and has as many rounds as --repeats


def part(name):
    """Register a part: (case, BenchConfig, progress) -> rows. The first line of its docstring heads its table."""

    def register(function):
        PARTS[name] = function
        return function

    return register


def milliseconds(variants, config, progress):
    """A row of {variant: function}."""
    for function in variants.values():
        function()
    seconds = interleaved({name: timed(f) for name, f in variants.items()}, CALLS * config.repeats, progress=progress)
    return {"unit": "ms", "variants": {name: spread([1e3 * s for s in times]) for name, times in seconds.items()}}


def forward_backward(function, *shapes):
    """A function that runs `function` on random leaves of these shapes, forward and backward."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


# ---- the parts -------------------------------------------------------------------------------------------------------


@part("linear")
def linear(case, config, progress):
    """Linear layers of 4,096 rows, by library."""
    rows, table = 4096, {}
    for width, out in ((384, 1152), (128, 512)):
        x, weight, grad = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
        products = {
            "forward": (lambda x=x, w=weight: F.linear(x, w), lambda x=x, w=weight: _onednn(x, w)),
            "gradient of the input": (lambda g=grad, w=weight: g @ w, lambda g=grad, w=weight: _onednn(g, w.t())),
            "gradient of the weight": (lambda g=grad, x=x: g.t() @ x, lambda g=grad, x=x: _onednn(g.t(), x.t())),
        }
        for name, functions in products.items():
            row = milliseconds(dict(zip(("torch", "oneDNN"), functions, strict=True)), config, progress)
            table[f"{width} to {out}, {name}"] = _as_rate(row, 2 * rows * width * out)
    return table


def _onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _as_rate(row, flops):
    """Milliseconds as GFLOP/s; the quartiles change places."""
    variants = {}
    for name, s in row["variants"].items():
        median, q1, q3 = (flops / s[key] / 1e6 for key in ("median", "q3", "q1"))
        variants[name] = {"median": median, "q1": q1, "q3": q3, "n": s["n"]}
    return {"unit": "GFLOP/s", "variants": variants}


@part("rmsnorm")
def rmsnorm(case, config, progress):
    """RMSNorm, forward and backward."""
    table = {}
    for shape in ((8, 256, 256), (16, 256, 384)):
        variants = {"torch": rms_norm, "kernels/cpu_norm": cpu_norm.rms_norm}
        functions = {
            name: forward_backward(lambda x, w, f=f: f(x, w, 1e-5), shape, shape[-1:]) for name, f in variants.items()
        }
        table[" x ".join(map(str, shape))] = milliseconds(functions, config, progress)
    return table


@part("gelu")
def gelu(case, config, progress):
    """GELU, forward and backward."""
    variants = {
        name: forward_backward(lambda x, kind=kind: F.gelu(x, approximate=kind), (4096, 1536))
        for name, kind in (("exact", "none"), ("tanh", "tanh"))
    }
    return {"4096 x 1536": milliseconds(variants, config, progress)}


@part("conv")
def conv(case, config, progress):
    """Short causal convolution of 4 tokens, forward and backward."""
    model = ConfigurableGPT(ModelArchitectureConfig.from_preset("mamba", n_layer=1, n_embd=256, vocab_size=2))
    conv = model.blocks[0].mixer.conv1d

    def conv1d(x, weight):
        return F.conv1d(F.pad(x.transpose(1, 2), (conv.width - 1, 0)), weight, conv.bias, groups=conv.channels)

    def ours(x, weight):
        return torch.func.functional_call(conv, {"weight": weight}, x)[0]

    shape = (8, 256, conv.channels)
    variants = {name: forward_backward(function, shape, conv.weight.shape)
                for name, function in (("conv1d", conv1d), ("ShortConv", ours))}  # fmt: skip
    return {" x ".join(map(str, shape)): milliseconds(variants, config, progress)}


@part("adamw")
def adamw(case, config, progress):
    """AdamW on ten million parameters in 60 tensors."""
    variants = {}
    for name, settings in (("one by one", {"foreach": False}), ("fused", {"fused": True})):
        parameters = [torch.nn.Parameter(torch.randn(166_667)) for _ in range(60)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        variants[name] = torch.optim.AdamW(parameters, lr=1e-3, **settings).step
    return {"a step": milliseconds(variants, config, progress)}


@part("allocator")
def allocator(case, config, progress):
    """A training step of the first case, with freed memory kept or given back."""
    jobs = {"kept": Job(case), "given back": Job(case, keep_memory=False)}
    with Workers(list(jobs.values())) as workers:
        functions = {name: worker.step for name, worker in zip(jobs, workers, strict=True)}
        seconds = interleaved(functions, config.repeats, progress=progress)
    variants = {name: spread([1e3 * s for s in times]) for name, times in seconds.items()}
    return {case.label: {"unit": "ms", "variants": variants}}


@part("kernels")
def with_kernels(case, config, progress):
    """A training step of the first case, with the kernels and without."""
    plain = type(case)(case.label, (*case.arguments, "--kernel_backend=plain"))
    with Workers([Job(case), Job(plain)]) as workers:
        functions = {name: worker.step for name, worker in zip(("auto", "plain"), workers, strict=True)}
        seconds = interleaved(functions, config.repeats, progress=progress)
    variants = {name: spread([1e3 * s for s in times]) for name, times in seconds.items()}
    return {case.label: {"unit": "ms", "variants": variants}}


@part("compare")
def compare(case, config, progress, n_runs=1000):
    """compare_architectures.py, from start to end."""
    home, script = Path(__file__).parent, "compare_architectures.py"
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        _train_one(home, runs)
        for seed in range(1, n_runs):
            _copy_with_seed(runs / "run", runs / f"run-{seed}", seed)
        commands = {
            "--help": [script, "--help"],
            f"{n_runs:,} runs without plots": [script, "--no_plots", f"--runs_dir={runs}", f"--out_dir={scratch}/out"],
        }
        table = {}
        for name, command in commands.items():
            seconds = []
            for index in range(3):
                t0 = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=home, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - t0)
                progress((index + 1) / 3)
            table[name] = {"unit": "s", "variants": {"seconds": spread(seconds)}}
    return table


def _train_one(home, runs):
    """runs/run, of a few steps of a model that is no size at all."""
    settings = {
        "run_name": "run", "runs_dir": runs, "device": "cpu", "compile": False, "tensorboard": False, "plot": False,
        "max_iters": 20, "eval_interval": 10, "log_interval": 1, "sample_tokens": 0, "n_layer": 1, "n_head": 1,
        "n_embd": 8, "batch_size": 2, "block_size": 32,
    }  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"parts=compare could not train a run to copy: {done.stderr.strip()[-300:]}")


def _copy_with_seed(source, target, seed):
    """A run folder as another seed would have left it, without checkpoints."""
    target.mkdir()
    for name in ("summary.json", "metrics.jsonl"):
        shutil.copy(source / name, target / name)
    record = json.loads((source / "config.json").read_text(encoding="utf-8"))
    record["run_name"] = record["training_config"]["run_name"] = target.name
    record["training_config"]["seed"] = seed
    (target / "config.json").write_text(json.dumps(record), encoding="utf-8")
