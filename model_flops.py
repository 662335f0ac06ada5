"""What an architecture costs: parameters by group, FLOPs per token by part, state bytes, hardware peaks, MFU.

The convention, printed beside the number wherever it appears (`CONVENTION`):
- A multiply and an add are 2 FLOPs. Each weight of a linear layer, of a norm and each bias costs 2 per token; the tied
  head counts once; reading an embedding table costs nothing. Of experts those count that a token passes through.
- Each mixer adds its own `mixing_flops(T)`: attention's scores without taking off the causal half (PaLM, appendix B), a
  window or a chunk as what it is. A recurrent layer pays nothing quadratic.
- Training is 3 x forward. Recomputation is not counted.

For a GPT-2 this is exactly the count of PaLM and nanoGPT, 6 N + 12 L H Q T.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn as nn

from kernels import cpu_linear
from model_builder import ConfigurableGPT, on_meta, parameter_plan
from model_components import Norm, ResidualScale

CONVENTION = (
    "training = 3 x forward; attention without the causal half (PaLM); embedding lookups and recomputation not counted"
)


# ---- parameters -----------------------------------------------------------------------------------------------------


def parameters_by_group(model):
    """{group: count}, adding up to every parameter once."""
    groups = {}
    for spec in parameter_plan(model):
        count = 1
        for size in spec.shape:
            count *= size
        groups[spec.group] = groups.get(spec.group, 0) + count
    assert sum(groups.values()) == sum(parameter.numel() for parameter in model.parameters())
    return groups


def active_parameters(model):
    """Parameters that one token passes through: all of them, but for experts that are not chosen."""
    return round(sum(p.numel() * _active_fraction(model, name) for name, p in model.named_parameters()))


def _active_fraction(model, parameter_name):
    """The product of the `active_fraction` that modules on the way to a parameter declare (MoE experts)."""
    fraction, module = 1.0, model
    for word in filter(None, parameter_name.split(".")[:-1]):
        module = getattr(module, word)
        fraction *= getattr(module, "active_fraction", 1.0)
    return fraction


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of one token at a context, by part. Forward; `backward` and `training` follow from it."""

    context: int
    linear: dict  # {group: FLOPs of linear weights}
    vectors: float  # biases and norms
    mixing: dict  # {mixer name: FLOPs beyond its linear weights}

    @property
    def forward(self):
        return sum(self.linear.values()) + self.vectors + sum(self.mixing.values())

    @property
    def backward(self):
        return 2 * self.forward

    @property
    def training(self):
        return 3 * self.forward

    def to_dict(self):
        return {"context": self.context, "per_token_forward": self.forward, "per_token_backward": self.backward,
                "per_token_training": self.training, "linear": self.linear, "biases_and_norms": self.vectors,
                "mixing": self.mixing, "convention": CONVENTION}  # fmt: skip


AFTER_THE_BLOCKS = ("final_norm", "head_transform", "head")


def flops_per_token(model, context=None, head_fraction=1.0):
    """FlopsPerToken of a model (on any device, meta included) at `context` tokens; None is its block_size.

    Args:
        head_fraction: the share of tokens that go on to the output head; an objective may need fewer than all.
    """
    context = context or model.config.block_size
    linear, vectors = {}, 0.0
    for path, weights, biases in linear_flops(model):
        fraction = head_fraction if path.split(".")[0] in AFTER_THE_BLOCKS else 1.0
        group = path.split(".")[2] if path.startswith("blocks.") else path
        linear[group] = linear.get(group, 0.0) + weights * fraction
        vectors += biases * fraction
    for path, module in model.named_modules():
        if isinstance(module, (Norm, ResidualScale)):
            fraction = head_fraction if path.split(".")[0] in AFTER_THE_BLOCKS else 1.0
            times = module.times if isinstance(module, Norm) else 1  # a norm of heads is applied to each
            vectors += 2 * times * sum(parameter.numel() for parameter in module.parameters()) * fraction
    mixing = {}
    for (name, _), block in zip(model.config.blocks(), model.blocks, strict=True):
        mixing[name] = mixing.get(name, 0.0) + block.mixer.mixing_flops(context)
    return FlopsPerToken(context, linear, vectors, mixing)


def linear_flops(root):
    """[(path, FLOPs of its weights, FLOPs of its biases)], per token and forward, of every linear layer inside `root`.

    A module that keeps linear weights by itself names them in `linear_weights`; of experts the chosen ones count.
    """
    found = []
    for path, module in root.named_modules():
        is_linear = isinstance(module, nn.Linear)
        weights = [module.weight] if is_linear else map(module.get_parameter, getattr(module, "linear_weights", ()))
        cost = 2 * _active_fraction(root, f"{path}.weight")
        biases = module.bias.numel() if is_linear and module.bias is not None else 0
        found.append((path, cost * sum(weight.numel() for weight in weights), cost * biases))
    return [(path, weights, biases) for path, weights, biases in found if weights]


def count(config):
    """(parameters by group, FlopsPerToken) of a config, built without memory."""
    with on_meta():
        model = ConfigurableGPT(config)
    return parameters_by_group(model), flops_per_token(model)


def state_bytes(model, context, dtype=torch.float32):
    """Bytes that generating one sequence keeps at `context` tokens."""
    return sum(block.state_bytes(context, dtype) for block in model.blocks)


# ---- hardware -------------------------------------------------------------------------------------------------------

# Dense peaks in TFLOP/s from the makers' data sheets, without sparsity, at boost clock: (name, bf16, fp16, tf32, fp32).
# Where a name is part of another the longer stands first. None: the device has no such unit.
PEAK_TFLOPS = [
    ("GB200", 2500, 2500, 1250, 80),
    ("GB300", 2500, 2500, 1250, 80),
    ("B200", 2250, 2250, 1125, 75),
    ("B300", 2250, 2250, 1125, 75),
    ("H200 NVL", 835, 835, 417, 60),
    ("H200", 989, 989, 494, 67),
    ("GH200", 989, 989, 494, 67),
    ("H100 NVL", 835, 835, 417, 60),
    ("H100 PCIe", 756, 756, 378, 51),
    ("H100", 989, 989, 494, 67),
    ("H800", 989, 989, 494, 67),
    ("H20", 148, 148, 74, 44),
    ("A100", 312, 312, 156, 19.5),
    ("A800", 312, 312, 156, 19.5),
    ("A40", 149.7, 149.7, 74.8, 37.4),
    ("A30", 165, 165, 82, 10.3),
    ("A10G", 70, 70, 35, 35),
    ("A10", 125, 125, 62.5, 31.2),
    ("A6000", 154.8, 154.8, 77.4, 38.7),
    ("L40S", 362, 362, 183, 91.6),
    ("L40", 181, 181, 90.5, 90.5),
    ("L4", 121, 121, 60, 30.3),
    ("RTX 6000 Ada", 364, 364, 182, 91.1),
    ("RTX 5090", 209.5, 209.5, 104.8, 104.8),
    ("RTX 5080", 112.6, 112.6, 56.3, 56.3),
    ("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("RTX 4080", 97.5, 97.5, 48.7, 48.7),
    ("RTX 3090 Ti", 80, 80, 40, 40),
    ("RTX 3090", 71, 71, 35.6, 35.6),
    ("RTX 3080", 59.5, 59.5, 29.8, 29.8),
    ("V100 PCIe", None, 112, None, 14),
    ("V100", None, 125, None, 15.7),
    ("Tesla T4", None, 65, None, 8.1),
    ("P100", None, 21.2, None, 10.6),
    ("MI355X", 2516, 2516, None, 157),
    ("MI350X", 2307, 2307, None, 144),
    ("MI300A", 981, 981, 490, 122.6),
    ("MI325X", 1307, 1307, 654, 163),
    ("MI300X", 1307, 1307, 654, 163),
    ("MI250X", 383, 383, None, 95.7),
    ("MI250", 362, 362, None, 90.5),
    ("MI210", 181, 181, None, 45.3),
]
_OTHER_DEVICE = {"laptop", "max", "mig", "ti", "super", "d"}  # an RTX 4090 Laptop is no RTX 4090, a MIG slice no H100
_COLUMNS = {"bfloat16": 1, "float16": 2, "tf32": 3, "float32": 4}


@dataclass(frozen=True)
class HardwarePeak:
    """FLOP/s that one device can reach, and whether the number is the maker's or a matrix product measured here."""

    flops_per_second: float
    source: str


def published_peak(device_name, precision):
    """FLOP/s of a device at 'bfloat16', 'float16', 'tf32' or 'float32', or None when the table has none.

    Words are compared whole, so that an L4 is not an L40 and a T4 not a T400.
    """
    words = set(device_name.lower().replace("-", " ").split())
    for row in PEAK_TFLOPS:
        wanted = set(row[0].lower().split())
        if wanted <= words and not _OTHER_DEVICE & words - wanted:
            peak = row[_COLUMNS[precision]]
            return None if peak is None else peak * 1e12
    return None


def hardware_peak(device, precision):
    """HardwarePeak of a torch.device at a precision; unknown hardware is measured with a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = published_peak(name, precision)
        if peak is not None:
            return HardwarePeak(peak, f"{name}, {precision}, data sheet")
    return HardwarePeak(measured_peak(device, precision), f"a {precision} matrix product measured at start")


def measured_peak(device, precision, n=1024, seconds=0.4):
    """FLOP/s of the fastest of the n x n matrix products that fit into about `seconds`, by the fastest library here."""
    dtype = getattr(torch, {"tf32": "float32"}.get(precision, precision))
    n = n if device.type == "cpu" else 4 * n
    multiply = cpu_linear.linear if cpu_linear.is_faster_here(device) and cpu_linear.equals_plain() else torch.matmul
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, t_end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < t_end or best == float("inf"):
        t0 = time.perf_counter()
        multiply(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best


def synchronize(device):
    """Wait for the device, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def mfu(flops_per_token_training, tokens_per_second, peak, world_size=1):
    """Model FLOPs utilisation (PaLM, appendix B): achieved over possible, as a fraction."""
    return flops_per_token_training * tokens_per_second / (peak.flops_per_second * world_size)
