"""What chapter 04 has no room for: odd inputs, groups, saved state, and the twins beside what is taught."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinylm import core
from tinylm.model import ModelConfig, TransformerLM
from tinylm.optim import AdamW, clip_grad_norm, cosine_lr, cross_entropy


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(3, 5), (7,), (1,)]]


def give_gradients(params, step, skip=None):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (i - 1)
        p.grad = None if i == skip else gradient


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
def test_cross_entropy_of_extreme_logits_is_finite_and_right(scale):
    logits = torch.tensor([[scale, 0.0, 1.0], [3.0, scale, 2.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 2]))
    loss.backward()
    assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 2])))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("view", [
    lambda t: t[:, 3:], lambda t: t.transpose(0, 1), lambda t: t[..., ::2], lambda t: t[0, 0], lambda t: t,
], ids=["later", "turned", "every other", "one row", "whole"])
def test_cross_entropy_takes_any_layout_and_many_blocks(monkeypatch, view):
    "3 x 100 x 2000 numbers are several blocks; gradients are compared where the view puts them."
    leaf = torch.randn(3, 100, 2000, requires_grad=True)
    targets = torch.randint(1000, view(leaf).shape[:-1])
    ours = cross_entropy(view(leaf), targets)
    monkeypatch.setattr(core, "FAST", False)
    theirs = cross_entropy(view(leaf), targets)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(3 * loss, leaf)[0] for loss in (ours, theirs)), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_short_numbers_is_computed_in_long_ones(dtype):
    logits = (5 * torch.randn(40, 3000)).to(dtype).requires_grad_()
    targets = torch.randint(3000, (40,))
    wide = logits.detach().float().requires_grad_()
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(wide, targets)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs)
    for loss in (ours, theirs):
        loss.backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad.float(), wide.grad, atol=1e-4, rtol=2e-2)


def test_cross_entropy_refuses_a_second_backward_instead_of_giving_nonsense():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError, match="4, 7, 5"):
        cross_entropy(torch.zeros(4, 7, 5), torch.zeros(4, 1, dtype=torch.long))


@pytest.mark.parametrize("settings", [
    {}, {"weight_decay": 0.5}, {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.9999)}, {"eps": 0.1}, {"lr": 0.0},
])
def test_adamw_equals_torch_whatever_the_settings(settings):
    "With a group of other settings, and a parameter that gets no gradient at times: it counts its own steps."
    def trained(make):
        first, *others = params = parameters()
        groups = [{"params": [first], "lr": 0.03, "weight_decay": 0.2}, {"params": others}]
        optimizer = make(groups, **{"lr": 1e-2, "weight_decay": 0.01, **settings})
        for step in range(30):
            give_gradients(params, step, skip=1 if step % 3 else None)
            optimizer.step()
        return params

    assert_close(trained(AdamW), trained(torch.optim.AdamW), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["turned", "turned gradient", "bfloat16"])
def test_adamw_takes_what_its_loop_cannot(kind):
    found = []
    for make in (AdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(3)
        p, g = torch.randn(2, 6, 4, generator=generator).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
        p = torch.nn.Parameter(p.T.contiguous().T if kind == "turned" else p.clone())
        found.append(p)
        optimizer = make([p], lr=0.1)
        for _ in range(3):
            p.grad = g.T.contiguous().T if kind == "turned gradient" else g
            optimizer.step()
    assert_close(*found, atol=1e-6 if kind != "bfloat16" else 2e-2, rtol=1e-6)


def train_a_little(monkeypatch, is_fast, steps=5):
    "Losses and parameters of a few steps, with the twins or as it is taught."
    monkeypatch.setattr(core, "FAST", is_fast)
    config = ModelConfig(vocab_size=61, context_length=24, d_model=32, num_layers=2, num_heads=4, d_ff=72)
    model, losses = TransformerLM(config).double(), []
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(step))
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


def test_training_as_taught_equals_training_by_the_twins(monkeypatch):
    ours, taught = train_a_little(monkeypatch, True), train_a_little(monkeypatch, False)
    assert_close(ours, taught, rtol=1e-8, atol=1e-9)
    assert ours[0] != taught[0]  # other roundings: they are two programs


def test_adamw_tells_autograd_that_the_weights_have_changed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adamw_closure_computes_gradients():
    w = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([w], lr=0.1, weight_decay=0.0)

    def closure():
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and w.item() == pytest.approx(1.9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_reports_a_gradient_that_is_no_number(bad):
    p, *others = parameters()  # the others have none, which is no mistake
    p.grad = torch.full_like(p, bad)
    assert not clip_grad_norm(iter([p, *others]), 1.0).isfinite()


def test_schedule_edges():
    assert cosine_lr(1, 1.0, 0.0, 0, 1) == 0.0  # a cycle of one step ends at once
    assert [cosine_lr(step, 1.0, 0.1, 5, 10) for step in (5, 10, 10**9)] == [1.0, 0.1, 0.1]
