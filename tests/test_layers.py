"""The faster twins: equal to the taught forms and to PyTorch, whatever the layout, size and type of numbers."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinylm.layers import Embedding, RMSNorm, SwiGLU, _GateByHand, _RMSNormByHand, rms_norm, silu
from tinylm.model import ModelConfig, TransformerLM
from tinylm.optim import cross_entropy

LAYOUTS = {
    "whole": lambda t: t, "turned": lambda t: t.transpose(0, 1), "cut": lambda t: t[..., 2:7],
    "every other": lambda t: t[..., ::2], "expanded": lambda t: t[:1].expand(3, -1, -1),
    "one vector": lambda t: t[0, 0],
}  # fmt: skip


def norm_by_hand(x, g):
    return _RMSNormByHand.apply(x, g, 1e-5)


def gate(a, b):
    return silu(a) * b


def both(ours, theirs, *inputs, **tolerance):
    "Values and gradients agree, for a gradient that arrives in an odd layout."
    arriving = torch.randn(*ours(*inputs).shape[::-1], dtype=inputs[0].dtype).permute(*range(ours(*inputs).dim())[::-1])
    for function_pair in zip(*((y, *torch.autograd.grad(y, inputs, arriving)) for y in
                               (ours(*inputs), theirs(*inputs))), strict=True):
        assert_close(*function_pair, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_by_hand_are_right_in_every_layout(layout):
    a, b = (LAYOUTS[layout](torch.randn(3, 4, 10, dtype=torch.float64)).requires_grad_() for _ in range(2))
    gains = torch.rand(a.shape[-1], dtype=torch.float64, requires_grad=True)
    both(norm_by_hand, rms_norm, a, gains)
    both(_GateByHand.apply, gate, a, b)
    assert torch.autograd.gradcheck(norm_by_hand, (a.detach().contiguous().requires_grad_(), gains))


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3, 1e15])
def test_gradients_by_hand_of_small_and_large_numbers(size):
    a, b = ((size * torch.randn(5, 64)).requires_grad_() for _ in range(2))
    both(norm_by_hand, rms_norm, a, torch.rand(64, requires_grad=True), rtol=1e-3, atol=1e-6 / min(size, 1))
    both(_GateByHand.apply, gate, a, b)
    zero = torch.zeros(2, 64, requires_grad=True)
    norm_by_hand(zero, torch.ones(64)).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_gains", [True, False])
def test_norm_by_hand_of_short_numbers(dtype, wide_gains):
    "Squares of 300 overflow in float16; the sums are taken in 32 bits."
    x = (300 + torch.randn(6, 64)).to(dtype).requires_grad_()
    gains = torch.rand(64, dtype=torch.float32 if wide_gains else dtype, requires_grad=True)
    y = norm_by_hand(x, gains)
    assert y.dtype == dtype
    exact = x.detach().double().requires_grad_(), gains.detach().double().requires_grad_()
    arriving = torch.randn(6, 64).to(dtype)
    expected = F.rms_norm(exact[0], (64,), exact[1], 1e-5)
    assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    ours = torch.autograd.grad(y, (x, gains), arriving)
    theirs = torch.autograd.grad(expected, exact, arriving.double())
    assert [t.dtype for t in ours] == [dtype, gains.dtype]
    assert_close([t.double() for t in ours], list(theirs), rtol=2e-2, atol=1e-2)


def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(2, 8, requires_grad=True)
    for y in (RMSNorm(8)(x), SwiGLU(8, 8)(x)):
        slope, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


CONFIG = ModelConfig(vocab_size=61, context_length=24, d_model=32, num_layers=2, num_heads=4, d_ff=72)


def loss_and_gradients(model, context=None):
    ids = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with context or torch.enable_grad():
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_compiler_takes_model_and_loss_whole_and_sees_the_taught_forms():
    model, graphs, ids = TransformerLM(CONFIG), [], torch.arange(25)[None]

    def backend(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda: cross_entropy(model(ids[:, :-1]), ids[:, 1:]), backend=backend, fullgraph=True)
    assert_close(compiled(), cross_entropy(model(ids[:, :-1]), ids[:, 1:]), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "autograd" not in graphs[0] and "view_as_complex" not in graphs[0]


def test_autocast_trains_near_full_precision():
    model = TransformerLM(CONFIG)
    loss, gradient = loss_and_gradients(model)
    short_loss, short_gradient = loss_and_gradients(model, torch.autocast("cpu", torch.bfloat16))
    assert abs(short_loss - loss) < 0.02
    assert torch.cosine_similarity(gradient, short_gradient, 0) > 0.99


def test_embeddings_begin_with_a_spread_of_one_cut_at_three():
    weight = Embedding(2000, 64).weight
    assert abs(weight.std() - 0.987) < 0.01 and 2.9 < weight.abs().max() <= 3
