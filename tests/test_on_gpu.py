"""What only a CUDA device can show: precisions, compiled steps, pinned prefetching, flex attention. `pytest -m gpu`."""

import pytest
import torch

from kernels import grouped
from mixer_attention import Attention
from model_builder import ConfigurableGPT
from model_components import FFN_REGISTRY
from model_config import PRESETS
from model_helpers import scrambled
from training_data import BatchStream, Prefetcher, load_dataset
from training_helpers import book, rows, summary, workshop  # noqa: F401  fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "--device=cuda"
PRECISE = ("--dtype=float32", "--tf32=False", "--compile=False", "--kernel_backend=plain")
OBJECTIVES = {name: values.get("causal", True) for name, values in PRESETS.items()}


def losses(folder):
    return [row["loss"] for row in rows(folder, "train")]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(workshop, preset):  # noqa: F811
    objective = "causal_lm" if OBJECTIVES[preset] else "masked_lm"
    what = (f"--arch_preset={preset}", f"--objective={objective}", "--n_layer=2", *PRECISE)
    here, there = workshop.run(*what), workshop.run(*what, CUDA)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert summary(there)["stream_hash"] == summary(here)["stream_hash"]
    assert summary(there)["peak_memory_bytes"] > 0


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["gpt2", "llama", "mamba", "mamba2", "gated_delta_net", "lstm", "moe"])
def test_it_learns_in_every_precision(workshop, preset, dtype, compiled):  # noqa: F811
    folder = workshop.run(
        f"--arch_preset={preset}", f"--dtype={dtype}", f"--compile={compiled}", CUDA, "--max_iters=30"
    )
    plain = workshop.run(f"--arch_preset={preset}", *PRECISE, CUDA, "--max_iters=30")
    assert summary(folder)["final_val_loss"] == pytest.approx(summary(plain)["final_val_loss"], rel=0.05)
    assert losses(folder)[-1] < losses(folder)[0] - 0.2


@pytest.mark.parametrize("form", ["unsharded", "sharded"])
def test_a_resumed_run_goes_on_where_it_was(workshop, form):  # noqa: F811
    whole = workshop.run(CUDA, *PRECISE, "--dropout=0.1")
    saved = f"--checkpoint_format={form}"
    half = workshop.run(CUDA, *PRECISE, "--dropout=0.1", "--max_iters=4", "--lr_decay_iters=8", saved)
    workshop.resume(half, "--max_iters=8")
    assert losses(half)[4:] == pytest.approx(losses(whole)[4:], rel=1e-4)


def test_float16_counts_the_steps_that_its_scale_was_too_large_for(workshop):  # noqa: F811
    folder = workshop.run(CUDA, "--dtype=float16", "--max_iters=30")
    assert summary(folder)["status"] == "finished"
    assert 0 <= summary(folder)["non_finite_steps"] < 30


@pytest.mark.parametrize("changes", [
    {}, {"sliding_window": 40}, {"position_encoding": "alibi"}, {"attention_soft_cap": 2.0}, {"n_kv_head": 1},
    {"position_encoding": "alibi", "sliding_window": 40, "attention_soft_cap": 2.0, "n_kv_head": 2},
], ids=["plain", "window", "alibi", "cap", "mqa", "all"])  # fmt: skip
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_flex_equals_manual_with_all_gradients(tiny, changes, documents):
    T, results = 128, []
    x = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(1)).cuda()
    ids = (torch.arange(T, device="cuda") // 50).expand(2, T) if documents else None
    for backend in ("manual", "flex"):
        layer = scrambled(Attention(tiny(n_embd=64, attention_backend=backend, **changes), 0), std=0.2).cuda()
        leaf = x.clone().requires_grad_()
        y = layer(leaf, None, ids)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *layer.parameters()])])
    for fast, plain in zip(*reversed(results), strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-3, atol=2e-3 * plain.abs().max().item())


def test_prefetched_batches_are_the_streams_own(workshop):  # noqa: F811
    from configurator import read_settings

    dataset = load_dataset(read_settings(workshop.command()).train, may_prepare=True, quiet=True)
    stream = BatchStream(dataset, 16, 8, seed=3)
    with Prefetcher(stream, 0, 5, 4, 2, 0, 1, torch.device("cuda")) as loader:
        for step in range(5):
            batches, _ = loader.next()
            for got, wanted in zip(batches, stream.batches(step, 0, 1, 4), strict=True):
                assert all(tensor.is_cuda for tensor in got.values())
                assert all(torch.equal(got[name].cpu(), wanted[name]) for name in wanted)


@pytest.mark.parametrize("preset", [name for name, causal in OBJECTIVES.items() if causal])
def test_generation_with_a_state_equals_generation_without(tiny, preset):
    model = scrambled(ConfigurableGPT(tiny(arch_preset=preset)), std=0.2).cuda().double()
    idx = torch.randint(29, (2, 5), device="cuda")
    with_state = model.generate(idx, 20, temperature=0)
    assert torch.equal(with_state, model.generate(idx, 20, temperature=0, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_experts_as_grouped_products_equal_plain(tiny, dtype):
    part = scrambled(FFN_REGISTRY["moe"](tiny(n_embd=64, expert_hidden=32), 0)).cuda().to(dtype)
    assert grouped.equals_plain(part.experts, dtype, grouped.SORTED)
    if dtype == torch.bfloat16:  # the others are checked at start too, and used where they pass
        assert grouped.equals_plain(part.experts, dtype, grouped.GROUPED)
        assert grouped.install(part, torch.device("cuda")) == "grouped_mm"


def test_too_large_a_batch_is_refused_in_a_sentence(workshop):  # noqa: F811
    sentence = workshop.refused(*workshop.command(CUDA, "--n_embd=16384", "--n_head=2", "--n_layer=64"))
    assert "memory" in sentence and "batch_size" in sentence
