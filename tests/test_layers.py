"""The faster twins: equal to PyTorch's forms, whatever the layout, size and type of numbers."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinylm.layers import RMSNorm, SwiGLU, _GateByHand, _RMSNormByHand
from tinylm.model import ModelConfig, TransformerLM
from tinylm.optim import cross_entropy

LAYOUTS = {
    "whole": lambda t: t, "turned": lambda t: t.transpose(0, 1), "cut": lambda t: t[..., 2:7],
    "every other": lambda t: t[..., ::2], "expanded": lambda t: t[:1].expand(3, -1, -1),
    "one vector": lambda t: t[0, 0]}  # fmt: skip


def norm_by_hand(x, g):
    return _RMSNormByHand.apply(x, g, 1e-5)


def both(ours, theirs, *inputs, **tolerance):
    "Values and gradients agree, for a gradient that arrives in an odd layout."
    values = ours(*inputs), theirs(*inputs)
    arriving = torch.randn(*values[0].shape[::-1], dtype=values[0].dtype).permute(*range(values[0].dim())[::-1])
    assert_close(*([y, *torch.autograd.grad(y, inputs, arriving)] for y in values), **tolerance)


def both_twins(a, b, **tolerance):
    gains = torch.rand(a.shape[-1], dtype=a.dtype, requires_grad=True)
    both(norm_by_hand, lambda x, g: F.rms_norm(x, x.shape[-1:], g, 1e-5), a, gains, **tolerance)
    both(_GateByHand.apply, lambda a, b: F.silu(a) * b, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_by_hand_are_right_in_every_layout(layout):
    both_twins(*(LAYOUTS[layout](torch.randn(3, 4, 10, dtype=torch.float64)).requires_grad_() for _ in range(2)))


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3, 1e15])
def test_gradients_by_hand_of_small_and_large_numbers(size):
    a, b = ((size * torch.randn(5, 64)).requires_grad_() for _ in range(2))
    both_twins(a, b, rtol=1e-3, atol=1e-6 / min(size, 1))
    zero = torch.zeros(2, 64, requires_grad=True)
    norm_by_hand(zero, torch.ones(64)).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype, gains_dtype", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_norm_by_hand_of_short_numbers(dtype, gains_dtype):
    "Squares of 300 overflow in float16; the sums are taken in 32 bits."
    x, gains = (300 + torch.randn(6, 64)).to(dtype), torch.rand(64, dtype=gains_dtype)
    inputs = x.requires_grad_(), gains.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = norm_by_hand(*inputs), F.rms_norm(exact[0], (64,), exact[1], 1e-5)
    arriving = torch.randn(6, 64).to(dtype)
    ours = [ours, *torch.autograd.grad(ours, inputs, arriving)]
    assert [t.dtype for t in ours] == [dtype, dtype, gains_dtype]
    theirs = [theirs, *torch.autograd.grad(theirs, exact, arriving.double())]
    assert_close([t.double() for t in ours], theirs, rtol=2e-2, atol=1e-2)


def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(2, 8, requires_grad=True)
    for y in (RMSNorm(8)(x), SwiGLU(8, 8)(x)):
        slope, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


MODEL = TransformerLM(ModelConfig(61, 24, d_model=32, num_layers=1, num_heads=4, d_ff=72))
IDS = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(0))


def loss():
    return cross_entropy(MODEL(IDS[:, :-1]), IDS[:, 1:])


def test_a_compiler_takes_model_and_loss_whole_and_sees_the_taught_forms():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    assert_close(torch.compile(loss, backend=backend, fullgraph=True)(), loss(), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "autograd" not in graphs[0] and "view_as_complex" not in graphs[0]


def test_autocast_trains_near_full_precision():
    exact = torch.autograd.grad(loss(), MODEL.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        short = torch.autograd.grad(loss(), MODEL.parameters())
    exact, short = (torch.cat([g.flatten() for g in gradients]) for gradients in (exact, short))
    assert torch.cosine_similarity(exact, short, 0) > 0.99
