"""Mamba-1's selective scan on a CPU, compiled from cpu_scan.c at start; the twin of mixer_mamba_scan.selective_scan.

A thread walks through time with the states of 64 channels of one sequence in its cache: one pass over the inputs each
way, where tensors of a chunk's decays and states go through memory many times. Float32; anything else takes the plain
form. The bits do not depend on the number of threads.
"""

import functools

import torch

from kernels import compiled
from kernels.libraries import AbsentError
from mixer_mamba_scan import scan_operator

CHUNK = 16  # tokens between two states that are kept
BLOCK = 64  # channels that a thread takes at once: BLOCK in vectors.h
ROWS = 4  # of BLOCK floats for each state, beside two for each token of a chunk: what cpu_scan.c keeps at hand


def find(plain, device, dtype):
    """A form with the plain one's signature.

    Raises:
        AbsentError: this is no CPU, or nothing here compiles C.
    """
    if device.type != "cpu":
        raise AbsentError("is for CPUs")
    compiled.library("cpu_scan")
    return functools.partial(_form, plain)


def _form(plain, x, dt, A, B, C, state=None, keep=None, chunk_size=8):
    tensors = [tensor for tensor in (x, dt, A, B, C, state, keep) if tensor is not None]
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return plain(x, dt, A, B, C, state, keep, chunk_size)
    return _scan(x, dt, A, B, C, state, keep)


def _forward(x, dt, B, C, A, state, keep, chunk_size):
    inputs = [_contiguous(tensor) for tensor in (x, dt, B, C, A, state, keep)]
    (batch, T, D), N, threads = x.shape, A.size(0), torch.get_num_threads()
    y, last = x.new_empty(x.shape), x.new_empty(state.shape)
    before, scratch = x.new_empty(-(-T // chunk_size), *state.shape), _scratch(x, N, chunk_size, threads)
    run = compiled.library("cpu_scan")
    run("scan_forward", *inputs, y, last, before, scratch, batch, T, D, N, chunk_size, threads)
    return y, last, before


def _backward(grad_y, grad_state, x, dt, B, C, A, before, keep, chunk_size):
    inputs = [_contiguous(tensor) for tensor in (grad_y, grad_state, x, dt, B, C, A, before, keep)]
    (batch, T, D), N, threads = x.shape, A.size(0), torch.get_num_threads()
    grad_x, grad_dt, grad_state = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(batch, N, D)
    grad_B, grad_C = (x.new_empty(-(-D // BLOCK), batch, T, N) for _ in range(2))
    grad_A, scratch = x.new_empty(batch, N, D), _scratch(x, N, chunk_size, threads)
    run = compiled.library("cpu_scan")
    run("scan_backward", *inputs, grad_x, grad_dt, grad_B, grad_C, grad_A, grad_state, scratch,
        batch, T, D, N, chunk_size, threads)  # fmt: skip
    return grad_x, grad_dt, grad_B.sum(0), grad_C.sum(0), grad_A.sum(0), grad_state


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


def _scratch(x, N, chunk_size, threads):
    return x.new_empty(threads, BLOCK * N * (2 * chunk_size + ROWS))


_scan = scan_operator("compiled_selective_scan", _forward, _backward, CHUNK)
