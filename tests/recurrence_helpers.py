"""What every mixer with a state owes beside the contract: checks that its own test file calls."""

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from mixer_attention import MIXER_REGISTRY
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig

LENGTHS = [1, 2, 15, 16, 17, 63, 65]  # for chunks of 16
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def random(*shape, dtype=torch.float64, seed=0):
    """The same numbers in every dtype; others for another seed or size, so that no two inputs of a test are alike."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def mixer(name, dtype=torch.float64, layer=0, scale=0.4, **options):
    """A mixer 16 wide with 4 heads, its weights random and large."""
    size = {"n_layer": 3, "n_head": 4, "n_embd": 16, "block_size": 64, "vocab_size": 5, "position_encoding": "none"}
    part = MIXER_REGISTRY[name](ModelArchitectureConfig(block_pattern=name, **{**size, **options}), layer).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return part


def mixer_maker(tiny, variants, std):
    """make(variant, dtype, fresh, **changes): the mixer of a tiny model, float64 and random unless told otherwise.

    variants: {'mamba-wide': options of the mixer 'mamba'}.
    """

    def make(variant, dtype=torch.float64, fresh=False, **changes):
        name = variant.partition("-")[0]
        config = tiny(**{"position_encoding": "none", **variants[variant], **changes, "block_pattern": f"{name}/none"})
        layer = ConfigurableGPT(config).blocks[0].mixer.to(dtype)
        torch.manual_seed(1)
        for parameter in () if fresh else layer.parameters():
            nn.init.normal_(parameter, std=std)
        return layer

    return make


def assert_all_close(one, other, dtype=torch.float64):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES[dtype])


def check_steps_leave_the_state_before_alone(layer, T, cuts):
    """Steps over a text cut into pieces of any size equal forward, and a state may be gone on from twice."""
    x = random(2, T, 16)
    wanted = layer(x)
    for pieces in cuts:
        state, columns = layer.init_state(2, dtype=torch.float64), []
        for piece in x.split(pieces, dim=1):
            before = {name: tensor.clone() for name, tensor in state.items()}
            y, after = layer.step(piece, state)
            assert all(torch.equal(before[name], state[name]) for name in state)
            columns.append(y)
            state = after
        torch.testing.assert_close(torch.cat(columns, dim=1), wanted, **TOLERANCES[torch.float64])


def check_state_has_one_size(layer, dtype):
    """Whatever the length, what is held is what is declared; returns the last state."""
    sizes = set()
    for T in (1, 64, 300):
        with torch.no_grad():
            _, state = layer.step(torch.zeros(1, T, 16, dtype=dtype), layer.init_state(1, dtype=dtype))
        held = sum(tensor.untyped_storage().nbytes() for tensor in state.values())  # a view would hold more
        sizes |= {held, layer.state_bytes(T, dtype)}
    assert len(sizes) == 1
    return state


def check_it_trains_compiled(layer, x, ids):
    """One graph forward and one backward, with documents and without, to the same numbers and gradients."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for documents in (None, ids):
        results = []
        for run in (layer, compiled):
            y = run(x, None, documents)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        assert_all_close(*results, torch.float32)


def check_kernels_agree(recurrent, chunked, make_inputs, state_shape):
    """Outputs, last state and the gradients of every input and of the first state, in float64 and float32."""
    for dtype, tolerance in TOLERANCES.items():
        results = []
        for form in (recurrent, chunked):
            x = {name: None if t is None else t.clone().requires_grad_() for name, t in make_inputs(dtype).items()}
            state = random(*state_shape, dtype=dtype, seed=8).requires_grad_()
            y, last = form(**x, state=state, chunk_size=16)
            y_alone, _ = form(**x, chunk_size=16, keep_state=False)  # which may take a shorter way
            runs = torch.tensor([[0, 0, 1] + [2] * 97, [0] * 20 + [1] * 80])[:, : y.size(2)]
            y_cut, last_cut = form(**x, state=state, runs=runs, chunk_size=16)  # the state reaches the first document
            loss = (y * random(*y.shape, dtype=dtype, seed=9)).sum() + y_alone.square().sum() / 2 + last.sin().sum()
            loss = loss + y_cut.cos().sum() + last_cut.sin().sum()
            inputs = [*(t for t in x.values() if t is not None), state]
            results.append((y, y_alone, last, y_cut, last_cut, *torch.autograd.grad(loss, inputs)))
        for one, two in zip(*results, strict=True):
            size = one.abs().max().clamp(min=1.0)  # of the tensor, since gradients sum over a text
            torch.testing.assert_close(two / size, one / size, **tolerance)


def check_forms_agree(name, **options):
    """Outputs and the gradients of all parameters and of the input, through the whole layer."""
    for T in (1, 2, 63, 65):
        results = []
        for form in ("recurrent", "chunk"):
            layer = mixer(name, **{"chunk_size": 16, "recurrence": form, **options})
            x = random(2, T, 16, seed=5).requires_grad_()
            y = layer(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
        for one, two in zip(*results, strict=True):
            size = one.abs().max().clamp(min=1.0)
            torch.testing.assert_close(two / size, one / size, rtol=1e-10, atol=1e-10)


def check_documents(name, **options):
    """Packed documents read as each would alone, and so do the gradients, wherever they are cut."""
    lengths = [1, 1, 14, 16, 3, 1, 33, 2]
    ids = torch.repeat_interleave(torch.tensor([4, 2, 4, 4 + 1, 1, 9, 0, 9]), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    x = random(1, sum(lengths), 16, seed=5)
    for form in ("chunk", "recurrent"):
        layer = mixer(name, **{"chunk_size": 16, "recurrence": form, **options})
        parameters = [*layer.parameters()]
        alone = torch.cat([layer(piece) for piece in x.split(lengths, dim=1)], dim=1)
        packed = layer(x, positions=positions, document_ids=ids[None])
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
        gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (alone, packed))
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


def check_prefill_then_steps(name, **options):
    """A prompt in one piece, more pieces, then token by token, in both forms: one text."""
    x = random(2, 45, 16, seed=5)
    for form in ("chunk", "recurrent"):
        layer = mixer(name, **{"chunk_size": 16, "recurrence": form, **options})
        with torch.no_grad():
            state, columns = layer.init_state(2, dtype=torch.float64), []
            for piece in x.split([35, 2, 1, 3, 1, 1, 1, 1], dim=1):
                y, state = layer.step(piece, state)
                columns.append(y)
            torch.testing.assert_close(torch.cat(columns, dim=1), layer(x), rtol=1e-10, atol=1e-10)


def check_state_is_constant(name):
    """One size for ever, as declared; no view that holds more than it says; the memory in float32 at least."""
    layer = mixer(name, torch.float32)
    with torch.no_grad():
        state = layer.init_state(2)
        for length in (40, 1, 1):
            _, state = layer.step(random(2, length, 16, dtype=torch.float32), state)
            tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
            held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            assert held == 2 * layer.state_bytes(40) == 2 * layer.state_bytes(10**9)
        low = mixer(name, torch.bfloat16)
        _, state = low.step(random(2, 5, 16, dtype=torch.bfloat16), low.init_state(2, dtype=torch.bfloat16))
        assert state["memory"].dtype == torch.float32
        held = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
        assert held == 2 * low.state_bytes(5, torch.bfloat16) <= 2 * low.state_bytes(5)


def check_recurrent_flops(name, **options):
    """Both forms declare what torch counts, at one chunk, several, and a rest; what is beyond it is elementwise."""
    more = {torch.ops.aten.linalg_solve_triangular: solve}
    for form in ("chunk", "recurrent"):
        layer = mixer(name, torch.float32, chunk_size=16, recurrence=form, d_conv=4)
        linear = sum(2 * m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
        for T in (1, 7, 16, 17, 64, 100):
            with FlopCounterMode(display=False, custom_mapping=more) as counter:
                layer(random(2, T, 16, dtype=torch.float32))
            products = layer.mixing_flops(T) - layer.elementwise_flops(T) + linear
            assert abs(counter.get_total_flops() / (2 * T) - products) < 1e-9 * products, (form, T)
        if form == "recurrent":
            assert layer.elementwise_flops(9) > 0


def solve(a_shape, b_shape, **_):
    """A triangular solve as the product it replaces, its empty half included."""
    n = 1
    for size in b_shape:
        n *= size
    return 2 * a_shape[-1] * n


def check_cost_per_token(name):
    """Declared: nothing quadratic. What it takes on a clock is measured by bench.py, not here."""
    layer = mixer(name)
    assert layer.mixing_flops(8192) <= layer.mixing_flops(512) == layer.mixing_flops(10**6 // 64 * 64)


def check_compiles(name, **options):
    """One graph, with documents and without, to the same numbers."""
    layer, x = mixer(name, torch.float32, chunk_size=16, **options), random(1, 40, 16, dtype=torch.float32)
    ids = (torch.arange(40) // 13)[None]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x, document_ids=ids), layer(x, document_ids=ids))


def check_autocast(name):
    """bfloat16 products around a float32 recurrence: forward, backward, and close to float32."""
    layer, x = mixer(name, torch.float32, scale=0.2), random(2, 20, 16, dtype=torch.float32, seed=1)
    wanted, inside = layer(x), []

    def watched(form):
        def run(**inputs):
            inside.append((torch.is_autocast_enabled("cpu"), {inputs[name].dtype for name in ("k", "v")}))
            return form(**inputs)

        return run

    layer.forms = {form: watched(function) for form, function in layer.forms.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        _, state = layer.step(x, layer.init_state(2))
    y.float().sum().backward()
    assert state["memory"].dtype == torch.float32
    assert inside == [(False, {torch.float32})] * 2
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()
