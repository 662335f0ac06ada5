"""What a model costs: the numbers that papers print, the hardware's peaks, MFU."""

from types import SimpleNamespace

import pytest
import torch

import model_flops
from model_builder import ConfigurableGPT, on_meta
from model_config import ModelArchitectureConfig
from model_flops import (
    CONVENTION,
    FlopsPerToken,
    HardwarePeak,
    count,
    flops_per_token,
    hardware_peak,
    measured_peak,
    mfu,
    parameters_by_group,
    published_peak,
)


def gpt2(**changes):
    return ModelArchitectureConfig.from_preset("gpt2", **{"model_size": "124M", "block_size": 1024, **changes})


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def test_gpt2_124m_costs_0_855_gflop_per_token():
    groups, flops = count(gpt2())
    assert flops.training == 855_166_464
    assert sum(groups.values()) == 124_439_808
    # nanoGPT's estimate_mfu: 6 N + 12 L H Q T, N without the position table
    N = sum(groups.values()) - groups["position embedding"]
    assert flops.training == 6 * N + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("size", ["1M", "124M", "1B"])
@pytest.mark.parametrize("T", [128, 1024])
def test_a_gpt2_is_counted_as_palm_and_nanogpt_do(size, T):
    config = gpt2(model_size=size)
    groups, _ = count(config)
    with on_meta():
        flops = flops_per_token(ConfigurableGPT(config), T)
    N = sum(groups.values()) - groups["position embedding"]
    assert flops.training == 6 * N + 12 * config.n_layer * config.n_embd * T
    assert flops.context == T


def test_parameters_by_group_of_gpt2_124m():
    groups, _ = count(gpt2())
    assert groups == {
        "token embedding": 50257 * 768,
        "position embedding": 1024 * 768,
        "mixer": 12 * (4 * 768**2 + 4 * 768),
        "ffn": 12 * (8 * 768**2 + 5 * 768),
        "norm": 25 * 2 * 768,
    }


def test_flops_by_part_of_gpt2_124m():
    _, flops = count(gpt2())
    assert flops.linear == {"mixer": 12 * 8 * 768**2, "ffn": 12 * 16 * 768**2, "head": 2 * 50257 * 768}
    assert flops.vectors == 2 * (12 * 9 * 768 + 25 * 2 * 768)
    assert flops.mixing == {"attention": 12 * 4 * 768 * 1024}
    assert flops.backward == 2 * flops.forward


def test_a_head_at_some_of_the_tokens_costs_that_share(tiny):
    model = ConfigurableGPT(tiny(arch_preset="bert"))
    full, some = flops_per_token(model), flops_per_token(model, head_fraction=0.25)
    after = ("head", "head_transform.dense")
    assert full.linear["head"] == 2 * 29 * 16 and full.linear["head_transform.dense"] == 2 * 16 * 16
    assert some.linear == {group: cost * (0.25 if group in after else 1) for group, cost in full.linear.items()}
    assert full.vectors - some.vectors == 0.75 * 2 * (29 + 16 + 2 * 16)
    assert full.mixing == some.mixing


def test_an_untied_head_costs_the_same_and_weighs_more():
    (tied, tied_flops), (untied, untied_flops) = count(gpt2()), count(gpt2(weight_tying=False))
    assert untied_flops == tied_flops
    assert untied == {**tied, "head": 50257 * 768}


def test_swiglu_at_eight_thirds_costs_what_gelu_at_four_does():
    _, plain = count(gpt2(bias=False))
    _, gated = count(gpt2(bias=False, ffn_type="swiglu"))
    assert gated.training == plain.training


def test_the_record_holds_every_part_and_the_convention():
    record = FlopsPerToken(8, {"ffn": 6.0}, 1.0, {"attention": 3.0}).to_dict()
    assert (record["per_token_forward"], record["per_token_backward"], record["per_token_training"]) == (10, 20, 30)
    assert record["convention"] == CONVENTION and record["context"] == 8
    assert all(word in CONVENTION for word in ("3 x forward", "causal half", "embedding", "recomputation"))


def test_experts_count_by_their_active_fraction(tiny):
    model = ConfigurableGPT(tiny(bias=True))
    before, groups = flops_per_token(model), parameters_by_group(model)
    for block in model.blocks:
        block.ffn.active_fraction = 0.25
    after = flops_per_token(model)
    assert after.linear["ffn"] == before.linear["ffn"] / 4
    assert after.linear["mixer"] == before.linear["mixer"]
    assert before.vectors - after.vectors == 2 * 0.75 * 2 * (64 + 16)
    total = sum(groups.values())
    assert model_flops.active_parameters(model) == total - 0.75 * groups["ffn"]


# ---- hardware -------------------------------------------------------------------------------------------------------

PEAKS = [  # (name as torch reports it, bfloat16, float16, tf32, float32): dense TFLOP/s of the data sheets
    ("Tesla V100-SXM2-16GB", None, 125, None, 15.7),
    ("Tesla V100-PCIE-32GB", None, 112, None, 14),
    ("Tesla T4", None, 65, None, 8.1),
    ("NVIDIA A10", 125, 125, 62.5, 31.2),
    ("NVIDIA A10G", 70, 70, 35, 35),
    ("NVIDIA A100-SXM4-40GB", 312, 312, 156, 19.5),
    ("NVIDIA A100-SXM4-80GB", 312, 312, 156, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 312, 156, 19.5),
    ("NVIDIA A100-PCIE-40GB", 312, 312, 156, 19.5),
    ("NVIDIA A30", 165, 165, 82, 10.3),
    ("NVIDIA A40", 149.7, 149.7, 74.8, 37.4),
    ("NVIDIA RTX A6000", 154.8, 154.8, 77.4, 38.7),
    ("NVIDIA L4", 121, 121, 60, 30.3),
    ("NVIDIA L40", 181, 181, 90.5, 90.5),
    ("NVIDIA L40S", 362, 362, 183, 91.6),
    ("NVIDIA GeForce RTX 3090", 71, 71, 35.6, 35.6),
    ("NVIDIA GeForce RTX 3090 Ti", 80, 80, 40, 40),
    ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8),
    ("NVIDIA RTX 6000 Ada Generation", 364, 364, 182, 91.1),
    ("NVIDIA H100 PCIe", 756, 756, 378, 51),
    ("NVIDIA H100 80GB HBM3", 989, 989, 494, 67),
    ("NVIDIA H100 NVL", 835, 835, 417, 60),
    ("NVIDIA H200", 989, 989, 494, 67),
    ("NVIDIA H200 NVL", 835, 835, 417, 60),
    ("NVIDIA GH200 480GB", 989, 989, 494, 67),
    ("NVIDIA B200", 2250, 2250, 1125, 75),
    ("NVIDIA GB200", 2500, 2500, 1250, 80),
    ("AMD Instinct MI250X", 383, 383, None, 95.7),
    ("AMD Instinct MI300X", 1307, 1307, 654, 163),
]


@pytest.mark.parametrize("row", PEAKS, ids=[row[0] for row in PEAKS])
def test_peaks_by_the_name_that_torch_reports(row):
    for precision, peak in zip(("bfloat16", "float16", "tf32", "float32"), row[1:], strict=True):
        assert published_peak(row[0], precision) == (None if peak is None else pytest.approx(peak * 1e12))


@pytest.mark.parametrize("name", [
    "NVIDIA T400", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A1000",
    "AMD Instinct MI100", "Apple M3", "",
])  # fmt: skip
def test_other_devices_have_no_published_peak(name):
    assert published_peak(name, "float32") is None


def test_a_known_device_is_looked_up_and_an_unknown_one_measured_and_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    known = hardware_peak(torch.device("cuda"), "bfloat16")
    assert known.flops_per_second == 989e12
    assert known.source == "NVIDIA H100 80GB HBM3, bfloat16, data sheet"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Future 9000")
    monkeypatch.setattr(model_flops, "measured_peak", lambda device, precision: 5e12)
    for device in ("cuda", "cpu", "mps"):
        unknown = hardware_peak(torch.device(device), "float32")
        assert unknown == HardwarePeak(5e12, "a float32 matrix product measured at start")


def test_a_measured_peak_is_the_fastest_product(monkeypatch):
    instants = iter([0.0, 0.0, 1.0, 1.25, 2.0, 2.1, 2.2, 3.0])  # two products: a quarter of a second, and a tenth
    monkeypatch.setattr(model_flops, "time", SimpleNamespace(perf_counter=lambda: next(instants)))
    peak = measured_peak(torch.device("cpu"), "float32", n=8, seconds=2.5)
    assert peak == pytest.approx(2 * 8**3 / 0.1)


def test_measuring_needs_one_product_at_least():
    assert measured_peak(torch.device("cpu"), "float32", n=32, seconds=0.0) > 0
    assert measured_peak(torch.device("cpu"), "tf32", n=32, seconds=0.0) > 0


def test_mfu_is_achieved_over_possible():
    peak = HardwarePeak(312e12, "A100")
    # nanoGPT's README: 124M on 8 A100 at about 250 ms per 0.5M tokens
    assert mfu(855_166_464, 491_520 / 0.25, peak, world_size=8) == pytest.approx(0.6736, abs=1e-4)
    assert mfu(6.0, 10.0, HardwarePeak(60.0, "")) == 1.0
    assert mfu(6.0, 10.0, HardwarePeak(60.0, ""), world_size=2) == 0.5
