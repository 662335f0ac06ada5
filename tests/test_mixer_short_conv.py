"""The short convolution and the token shift against torch's own, across pieces and documents."""

import pytest
import torch
import torch.nn as nn

from mixer_short_conv import ShortConv, document_runs, token_shift

IDS = torch.tensor([[7, 7, 2, 2, 2, 7, 7, 7, 7], [0] * 9])


class Causal(nn.Module):
    """nn.Conv1d on (B, T, C), zeros before the first token."""

    def __init__(self, conv, width):
        super().__init__()
        self.conv, self.width = conv, width

    def forward(self, x):
        return self.conv(nn.functional.pad(x.mT, (self.width - 1, 0))).mT


def made(width, bias):
    torch.manual_seed(0)
    conv = ShortConv(6, width, bias).double()
    oracle = nn.Conv1d(6, 6, width, groups=6, bias=bias).double()
    conv.load_state_dict(oracle.state_dict())  # the same names and shapes
    return conv, Causal(oracle, width)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_a_causal_depthwise_conv1d(width, bias):
    conv, oracle = made(width, bias)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x)[0], oracle(x), rtol=1e-12, atol=1e-12)
    y, state = conv(x[:, :2])
    assert state.shape == (2, width - 1, 6)
    for piece in x[:, 2:].split([1, 4, 2], dim=1):
        more, state = conv(piece, state)
        y = torch.cat((y, more), dim=1)
    torch.testing.assert_close(y, oracle(x), rtol=1e-12, atol=1e-12)
    packed = conv(x, runs=document_runs(IDS))[0]
    alone = torch.cat([oracle(x[:1, a:b]) for a, b in ((0, 2), (2, 5), (5, 9))], dim=1)
    torch.testing.assert_close(packed, torch.cat((alone, oracle(x[1:]))), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv(x, conv.init_state(2, dtype=x.dtype))[0], oracle(x), rtol=1e-12, atol=1e-12)
    assert conv.state_bytes(torch.float64) * 2 == state.nbytes
    assert conv.flops() == 2 * width * 6


@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_its_gradients_are_those_of_conv1d(width, bias, documents):
    conv, oracle = made(width, bias)
    x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    pieces = [2, 3, 4] if documents else [9]
    y = conv(x, runs=document_runs(IDS[:1]) if documents else None)[0]
    wanted = torch.cat([oracle(piece) for piece in x.split(pieces, dim=1)], dim=1)
    weights = torch.randn_like(y)
    grads = torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()])
    for one, two in zip(grads, torch.autograd.grad((wanted * weights).sum(), [x, *oracle.parameters()]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_the_state_holds_what_it_says_and_no_more():
    conv, _ = made(4, bias=False)
    x, state = torch.randn(2, 2, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(conv(x, state)[1], torch.cat((state, x), dim=1)[:, 2:])
    assert torch.equal(conv(x)[1], torch.cat((torch.zeros_like(x[:, :1]), x), dim=1))
    last = conv(torch.randn(2, 500, 6, dtype=torch.float64))[1]
    assert last.untyped_storage().nbytes() == last.nbytes  # a view would hold 500 tokens


def test_a_state_reaches_the_first_run():
    conv, oracle = made(4, bias=True)
    x, state = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    y = conv(x, state, document_runs(IDS))[0]
    torch.testing.assert_close(y[:1, :2], oracle(torch.cat((state, x), dim=1))[:1, 3:5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[:1, 2:5], oracle(x[:1, 2:5]), rtol=1e-12, atol=1e-12)


def test_it_starts_as_conv1d_does():
    conv = ShortConv(500, 4, bias=True)
    with torch.no_grad():
        conv.init_own_parameters(torch.Generator().manual_seed(0))
    for parameter in (conv.weight.detach(), conv.bias.detach()):
        assert 0.49 < parameter.abs().max() <= 0.5 and abs(parameter.mean()) < 0.05
        assert parameter.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_runs_count_the_documents_and_an_interrupted_one_begins_again():
    assert document_runs(None) is None
    assert document_runs(IDS).tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9]


def test_token_shift():
    x = torch.arange(1.0, 10.0).view(1, 9, 1).repeat(2, 1, 1)
    shifted, state = token_shift(x)
    assert shifted[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8] and state.tolist() == [[[9.0]], [[9.0]]]
    assert token_shift(x[:, :2], state)[0][0, :, 0].tolist() == [9, 1]
    assert token_shift(x, runs=document_runs(IDS))[0][0, :, 0].tolist() == [0, 1, 0, 3, 4, 0, 6, 7, 8]
    assert token_shift(x, state, document_runs(IDS))[0][0, :, 0].tolist() == [9, 1, 0, 3, 4, 0, 6, 7, 8]
