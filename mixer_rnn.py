"""Recurrent networks from before attention: `lstm`, `gru` and the plain `rnn`, one layer each per block.

    y = W_out RNN(x)        with the parameters, gates and numbers of torch.nn.LSTM, GRU and RNN

Two forms that the tests hold to each other and to torch.nn, and `step` from a state of constant size:

    recurrence='recurrent'  the equations, one turn of a loop per token
    recurrence='kernel'     torch's kernel (cuDNN, oneDNN); a batch of several documents goes through it in pieces

These networks are sequential by nature: no chunked form exists, because the gates read the state through a matrix and a
nonlinearity. For torch.compile the kernel is one operator, whose backward runs the forward again (unrolled, as it would
unroll torch.nn.LSTM, it compiles for minutes).
"""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY, Mixer
from mixer_short_conv import document_runs
from user_errors import UserError


class RecurrentMixer(Mixer):
    """What the three share. A subclass names its gates and gives one step of its equations and torch's kernel.

    The state is {"h": (B, H)}, and for the LSTM {"c": (B, H)} beside it.
    """

    n_gates = 1
    kernel_keeps = (4, 1)  # B x T x H numbers that torch's kernel on a CPU keeps for backward, and needs there
    state_names = ("h",)
    own_init = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    residual_out = ("out.weight",)

    class Options:
        expand: float = 1.0  # hidden width over n_embd
        recurrence: str = "kernel"  # kernel: torch's, fast; recurrent: the equations, a turn of a loop per token

    def __init__(self, config, layer_index):
        super().__init__()
        self.options = o = config.options_for(type(self))
        if not o.expand > 0:
            raise UserError(f"expand={o.expand} must be above 0")
        if o.recurrence not in ("kernel", "recurrent"):
            raise UserError(f"recurrence={o.recurrence!r} does not exist (known: kernel, recurrent)")
        self.d_input, self.d_hidden = config.n_embd, max(1, round(o.expand * config.n_embd))
        rows = self.n_gates * self.d_hidden
        # Not an nn.LSTM, whose list of weights would go on naming the old tensors after FSDP2 has put its own in place.
        self.weight_ih = nn.Parameter(torch.empty(rows, self.d_input))
        self.weight_hh = nn.Parameter(torch.empty(rows, self.d_hidden))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.out = nn.Linear(self.d_hidden, config.n_embd, bias=config.bias)

    def init_own_parameters(self, generator):
        """Weights evenly within 1 / sqrt(H) of zero, as torch.nn does; biases zero."""
        for weight in (self.weight_ih, self.weight_hh):
            values = torch.empty(weight.shape, device="cpu").uniform_(-1, 1, generator=generator)
            weight.copy_(values * self.d_hidden**-0.5)
        self.bias_ih.zero_()
        self.bias_hh.zero_()

    def forward(self, x, positions=None, document_ids=None):
        starts, runs = None, document_runs(document_ids)
        if runs is not None:
            starts = F.pad(runs[:, 1:] != runs[:, :-1], (1, 0))  # (B, T)
        return self.mix(x, self.init_state(x.size(0), x.device, x.dtype), starts)[0]

    def step(self, x, state):
        return self.mix(x, state, None)

    def mix(self, x, state, starts):
        """x (B, T, C) from `state`, which is forgotten where starts (B, T) is true -> (y, state)."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):  # torch's kernels want one dtype throughout
            dtype = torch.get_autocast_dtype(x.device.type)
        weights = [w.to(dtype) for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        states = [state[name].to(dtype) for name in self.state_names]
        with torch.autocast(x.device.type, enabled=False):
            run = self.loop if self.options.recurrence == "recurrent" else self.pieces
            y, states = run(x.to(dtype), states, weights, starts)
        kept = {name: after.to(state[name].dtype) for name, after in zip(self.state_names, states, strict=True)}
        return self.out(y), kept

    def loop(self, x, states, weights, starts):
        """The equations of the class, token by token."""
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        columns = []
        keep = [None] * x.size(1) if starts is None else (~starts[..., None]).to(x.dtype).unbind(1)
        for from_input, keep_t in zip(F.linear(x, weight_ih, bias_ih).unbind(1), keep, strict=True):
            if keep_t is not None:
                states = [keep_t * state for state in states]
            states = self.cell(from_input, F.linear(states[0], weight_hh, bias_hh), *states)
            columns.append(states[0])
        return torch.stack(columns, dim=1), states

    def pieces(self, x, states, weights, starts):
        """torch's kernel from one document boundary of the batch to the next; without documents, once."""
        if torch.compiler.is_compiling():
            y, *states = recurrent_op(self.kernel_name(), x, states, weights, starts)
        else:
            y, *states = run_in_pieces(self.kernel_name(), x, states, weights, starts, self.training)
        return y, states

    def without_data(self):
        """Take the place that torch's kernel takes, and no time: see `RecurrentMemory`."""
        if self.options.recurrence == "kernel":
            self.pieces = self.pieces_without_data

    def pieces_without_data(self, x, states, weights, starts):
        y = RecurrentMemory.apply(x, self.d_hidden, *self.kernel_keeps, *weights)
        return y, states

    # -- state and cost

    def init_state(self, batch, device=None, dtype=None):
        return {name: torch.zeros(batch, self.d_hidden, device=device, dtype=dtype) for name in self.state_names}

    def mixing_flops(self, T):
        """2 per weight and bias of the gates, input and recurrent; no T. Gate products count nothing, as in FFNs."""
        return 2 * self.n_gates * self.d_hidden * (self.d_input + self.d_hidden + 2)

    def elementwise_flops(self, T):
        return 4 * self.n_gates * self.d_hidden  # the biases

    def state_bytes(self, T, dtype=torch.float32):
        return len(self.state_names) * self.d_hidden * dtype.itemsize


# ---- torch's kernels, and the operator that torch.compile sees -------------------------------------------------------

KERNELS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


def run_in_pieces(kernel, x, states, weights, starts, training):
    """[y (B, T, H), *the last states (B, H)] of x (B, T, C) from `states`, which are forgotten at `starts` (B, T)."""
    edges = [0, x.size(1)]
    if starts is not None:
        edges = [0, *starts[:, 1:].any(0).nonzero().flatten().add(1).tolist(), x.size(1)]
    columns, states = [], [state[None] for state in states]  # the kernel counts layers first
    has_biases, n_layers, dropout, bidirectional, batch_first = True, 1, 0.0, False, True
    for start, end in itertools.pairwise(edges):
        if start:
            states = [state.masked_fill(starts[None, :, start, None], 0.0) for state in states]
        before = tuple(states) if len(states) > 1 else states[0]
        y, *states = KERNELS[kernel](
            x[:, start:end], before, weights, has_biases, n_layers, dropout, training, bidirectional, batch_first
        )
        columns.append(y)
    y = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    return [y, *(state[0] for state in states)]


@torch.library.custom_op("nanoarch::recurrent", mutates_args=())
def recurrent_op(
    kernel: str, x: torch.Tensor, states: list[torch.Tensor], weights: list[torch.Tensor], starts: torch.Tensor | None
) -> list[torch.Tensor]:
    """`run_in_pieces` as one operator, which a compiler does not look into."""
    return [fresh(y) for y in run_in_pieces(kernel, x, states, weights, starts, training=False)]


@recurrent_op.register_fake
def _(kernel, x, states, weights, starts):
    y = x.new_empty(x.size(0), x.size(1), states[0].size(-1))
    return [y, *(state.new_empty(state.shape) for state in states)]


@torch.library.custom_op("nanoarch::recurrent_backward", mutates_args=())
def recurrent_backward(
    kernel: str, grads: list[torch.Tensor], x: torch.Tensor, states: list[torch.Tensor], weights: list[torch.Tensor],
    starts: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of x, states and weights: forward once more, this time with what its backward needs."""

    def forward(x, *rest):
        states_, weights_ = list(rest[: len(states)]), list(rest[len(states) :])
        return tuple(run_in_pieces(kernel, x, states_, weights_, starts, training=True))

    with torch.backends.mkldnn.flags(enabled=False):  # torch.func cannot look into oneDNN's LSTM
        pull_back = torch.func.vjp(forward, x, *states, *weights)[1]
        return [fresh(grad) for grad in pull_back(tuple(grads))]


@recurrent_backward.register_fake
def _(kernel, grads, x, states, weights, starts):
    return [tensor.new_empty(tensor.shape) for tensor in (x, *states, *weights)]


def fresh(tensor):
    """A copy of its own, laid out as its shape says: what an operator may return."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.kernel, x, states, weights, starts = inputs
    ctx.n_states = len(states)
    ctx.save_for_backward(x, starts, *states, *weights)


def _backward(ctx, grads):
    x, starts, *rest = ctx.saved_tensors
    states, weights = rest[: ctx.n_states], rest[ctx.n_states :]
    grad_x, *others = recurrent_backward(ctx.kernel, [grad.contiguous() for grad in grads], x, states, weights, starts)
    return None, grad_x, others[: ctx.n_states], others[ctx.n_states :], None


recurrent_op.register_autograd(_backward, setup_context=_save)


class RecurrentMemory(torch.autograd.Function):
    """What torch's kernel keeps for backward, on tensors that have no data: a kernel's workspace has no shape rule.

    x (B, T, C) -> y (B, T, H). `kept` and `scratch` count B x T x H numbers, as resident memory showed them on a CPU
    (docs/decisions.md).
    """

    @staticmethod
    def forward(ctx, x, width, kept, scratch, *weights):
        y = x.new_empty(*x.shape[:2], width)
        ctx.scratch = scratch
        ctx.save_for_backward(x, y, y.new_empty(kept, *y.shape), *weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, _, _, *weights = ctx.saved_tensors
        scratch = grad.new_empty(ctx.scratch, *grad.shape)
        gradients = [torch.empty_like(tensor) for tensor in (x, *weights)]
        del scratch
        return gradients[0], None, None, None, *gradients[1:]


# ---- the networks ----------------------------------------------------------------------------------------------------


@MIXER_REGISTRY("lstm")
class LSTM(RecurrentMixer):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000), as in torch.nn.LSTM.

    i, f, o = sigmoid(W_i x + b_i + U_i h + c_i), ...    g = tanh(W_g x + b_g + U_g h + c_g)
    c <- f c + i g        h <- o tanh(c)
    """

    n_gates = 4  # rows of the weights: i, f, g, o
    kernel_keeps = (7, 9)
    state_names = ("h", "c")

    class Options(RecurrentMixer.Options):
        forget_bias: float = 1.0  # initial bias of the forget gate: remember at first (Jozefowicz et al. 2015)

    def init_own_parameters(self, generator):
        super().init_own_parameters(generator)
        self.bias_ih[self.d_hidden : 2 * self.d_hidden] = self.options.forget_bias

    @staticmethod
    def cell(from_input, from_state, h, c):
        i, f, g, o = (from_input + from_state).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def kernel_name(self):
        return "lstm"


@MIXER_REGISTRY("gru")
class GRU(RecurrentMixer):
    """Gated recurrent unit (Cho et al. 2014), the reset gate after the product, as in torch.nn.GRU and cuDNN.

    r, z = sigmoid(W_r x + b_r + U_r h + c_r), ...    n = tanh(W_n x + b_n + r (U_n h + c_n))
    h <- (1 - z) n + z h
    """

    n_gates = 3  # rows of the weights: r, z, n
    kernel_keeps = (11, 2)

    @staticmethod
    def cell(from_input, from_state, h):
        r, z, n = from_input.chunk(3, dim=-1)
        r_state, z_state, n_state = from_state.chunk(3, dim=-1)
        r, z = (r + r_state).sigmoid(), (z + z_state).sigmoid()
        return ((1 - z) * (n + r * n_state).tanh() + z * h,)

    def kernel_name(self):
        return "gru"


@MIXER_REGISTRY("rnn")
class RNN(RecurrentMixer):
    """The simple recurrent network (Elman 1990), as in torch.nn.RNN: h <- tanh(W x + b + U h + c)."""

    class Options(RecurrentMixer.Options):
        rnn_activation: str = "tanh"  # tanh, or relu (Le et al. 2015)

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        if self.options.rnn_activation not in ("tanh", "relu"):
            raise UserError(f"rnn_activation={self.options.rnn_activation!r} must be tanh or relu")

    def cell(self, from_input, from_state, h):
        activation = torch.tanh if self.options.rnn_activation == "tanh" else torch.relu
        return (activation(from_input + from_state),)

    def kernel_name(self):
        return f"rnn_{self.options.rnn_activation}"
