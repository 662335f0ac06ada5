"""The Triton scan in Triton's interpreter, on a CPU: against the plain scan and a textbook one. tests/test_kernels.py
has the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_helpers import mamba_inputs, outputs_and_gradients, runs_of
from mixer_mamba_scan import goes_on, selective_scan, selective_scan_recurrent
from model_builder import ConfigurableGPT

pytest.importorskip("triton", "3.7", reason="needs Triton, whose interpreter fails with NumPy 2.4 before 3.7")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here; the gpu tests hold it to the plain scan", allow_module_level=True)

from kernels import selective_scan as kernel

SHAPES = [(1, 3, 1), (3, 4, 2), (4, 5, 3), (5, 9, 2), (9, 3, 5), (13, 2, 2)]  # T, D, N


@pytest.fixture
def small(monkeypatch):
    """Blocks so small that tiny tensors fill several and leave rests; the interpreter takes its time."""
    for name, size in {"CHUNK": 4, "STATES": 3, "STATES_BACKWARD": 2, "CHANNELS": 4}.items():
        monkeypatch.setattr(kernel, name, size)


def textbook(x, dt, A, B, C, state, keep=None):
    """Gu & Dao 2023, algorithm 2, in float64: h <- exp(dt A) h + dt B x, y = C h."""
    x, dt, A, B, C, h = (tensor.double() for tensor in (x, dt, A, B, C, state))
    columns = []
    for t in range(x.size(1)):
        h = h if keep is None else h * keep[:, t, None, None]
        h = torch.exp(torch.einsum("bd,nd->bnd", dt[:, t], A)) * h
        h = h + torch.einsum("bd,bn,bd->bnd", dt[:, t], B[:, t], x[:, t])
        columns.append(torch.einsum("bn,bnd->bd", C[:, t], h))
    return torch.stack(columns, 1), h


@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
@pytest.mark.parametrize("T, D, N", SHAPES)
def test_outputs_state_and_gradients(small, T, D, N, documents):
    inputs = mamba_inputs(T, torch.float32, D=D, N=N)
    keep = goes_on(runs_of(2, T), torch.float32) if documents else None
    got = outputs_and_gradients(lambda *i: kernel.selective_scan(*i, keep), inputs)
    for scan in (selective_scan, textbook):
        wanted = outputs_and_gradients(lambda *i, scan=scan: scan(*i, keep), inputs)
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, two.float(), rtol=1e-4, atol=1e-4)


def test_from_nothing_is_from_zeros():
    *inputs, state = mamba_inputs(3, torch.float32, D=3, N=2)
    for one, two in zip(
        kernel.selective_scan(*inputs), kernel.selective_scan(*inputs, torch.zeros_like(state)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1e-6, 50.0, 1e4])
def test_any_decay_stays_finite_and_right(size):
    x, dt, A, B, C, state = mamba_inputs(9, torch.float32, D=3, N=2)
    inputs = [x, size * dt, A, B, C, state]
    got = outputs_and_gradients(kernel.selective_scan, inputs)
    for one, two in zip(got, outputs_and_gradients(selective_scan_recurrent, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_half_precision_inputs_are_summed_in_float32():
    inputs = [tensor.bfloat16() for tensor in mamba_inputs(9, torch.float32, D=3, N=2)[:5]]
    y, last = kernel.selective_scan(*inputs, torch.zeros(2, 2, 3))
    wanted, wanted_last = textbook(*inputs, torch.zeros(2, 2, 3))
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(y, wanted.bfloat16())  # rounded once, at the end
    torch.testing.assert_close(last, wanted_last.float(), rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_back_across_a_document():
    x, dt, A, B, C, state = (tensor.requires_grad_() for tensor in mamba_inputs(5, torch.float32, D=3, N=2))
    keep = torch.ones(2, 5)
    keep[:, 3] = 0
    y, _ = kernel.selective_scan(x, dt, A, B, C, state, keep)
    grad_x, grad_state = torch.autograd.grad(y[:, 3:].sum(), (x, state))
    assert not grad_x[:, :3].any() and not grad_state.any() and grad_x[:, 3:].all()


def test_it_is_one_node_that_keeps_a_state_per_chunk(small):
    x, dt, A, B, C, state = mamba_inputs(3 * kernel.CHUNK, torch.float32, D=3, N=2)
    args = (*(tensor.requires_grad_() for tensor in (x, dt, B, C, A)), state, None, kernel.CHUNK)
    torch.library.opcheck(torch.ops.nanoarch.triton_selective_scan.default, args)
    assert torch.ops.nanoarch.triton_selective_scan(*args)[2].shape == (3, *state.shape)


def test_a_mixer_with_it_compiles_in_one_piece(small, tiny):
    mixer = ConfigurableGPT(tiny(block_pattern="mamba/none", position_encoding="none", d_state=2)).blocks[0].mixer
    x, ids = torch.randn(1, 5, 16), torch.tensor([[0, 0, 0, 1, 1]])
    wanted = [mixer(x, None, documents) for documents in (None, ids)]
    mixer.forms = {**mixer.forms, "chunk": kernel.selective_scan}
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for documents, y in zip((None, ids), wanted, strict=True):
        torch.testing.assert_close(compiled(x, None, documents), y, rtol=1e-4, atol=1e-5)


COMPILE = """
import subprocess, sys, tempfile, pathlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import selective_scan as s

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for function, states in ((s._forward, s.STATES), (s._backward, s.STATES_BACKWARD)):
    for sizes in ({}, {"D": 1, "N": 1}):  # Triton makes constants of ones
        fixed = {"states": min(states, sizes.get("N", states)), "chunk": s.CHUNK, "channels": s.CHANNELS, **sizes}
        types = {n: "constexpr" if n in fixed else "*fp32" if n.endswith("_ptr") else "i32" for n in function.arg_names}
        source = ASTSource(function, types, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            pathlib.Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        stack = usage.split("STACK:")[1].split()[0]
        print(function.__name__, compiled.metadata.shared, "bar." in compiled.asm["ptx"], stack)
"""


@pytest.mark.slow
def test_it_compiles_for_hopper_with_no_barrier_and_its_states_in_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    lines = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == ["_forward 0 False"] * 2 + ["_backward 0 False"] * 2
    assert max(int(line.rpartition(" ")[2]) for line in lines) <= 64  # bytes of a thread that did not fit
