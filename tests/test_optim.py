"""What chapter 04 has no room for: odd inputs, groups, saved state, gradients of gradients' formulas."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinylm.optim import AdamW, clip_grad_norm, cosine_lr, cross_entropy


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(3, 5), (7,), (1,)]]


def give_gradients(params, step, skip=None):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator) * 10.0 ** (i - 1)
        p.grad = None if i == skip else gradient


def test_cross_entropy_gradient_in_float64():
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 3))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (logits,))


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
def test_cross_entropy_of_extreme_logits_is_finite_and_right(scale):
    logits = torch.tensor([[scale, 0.0, 1.0], [3.0, scale, 2.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 2]))
    loss.backward()
    assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 2])))
    assert logits.grad.isfinite().all()


def test_cross_entropy_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="fit"):
        cross_entropy(torch.zeros(4, 7, 5), torch.zeros(4, 1, dtype=torch.long))


@pytest.mark.parametrize("settings", [
    {}, {"weight_decay": 0.5}, {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.9999)}, {"eps": 0.1}, {"lr": 0.0},
])
def test_adamw_equals_torch_whatever_the_settings(settings):
    settings = {"lr": 1e-2, "weight_decay": 0.01, **settings}
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(100):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_adamw_counts_steps_of_each_parameter_apart():
    "A parameter that gets no gradient for a while keeps its own count, and with it its own bias correction."
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(20):
        skip = 1 if step % 3 else None
        give_gradients(ours, step, skip)
        give_gradients(theirs, step, skip)
        a.step()
        b.step()
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_adamw_groups_have_settings_of_their_own():
    def groups(params):
        return [{"params": params[:1], "lr": 0.3, "weight_decay": 0.2}, {"params": params[1:]}]

    ours, theirs = parameters(), parameters()
    a, b = AdamW(groups(ours), lr=0.01), torch.optim.AdamW(groups(theirs), lr=0.01)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_adamw_goes_on_from_its_state_dict():
    params = parameters()
    optimizer = AdamW(params, lr=0.05)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW(copies)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for optimizer_, params_ in ((optimizer, params), (other, copies)):
        give_gradients(params_, 5)
        optimizer_.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_adamw_closure_computes_gradients():
    w = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([w], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert_close(w.detach(), torch.tensor([1.9]))


def test_clipping_knows_of_parameters_without_gradient():
    p = torch.nn.Parameter(torch.zeros(2))
    assert clip_grad_norm([p], 1.0) == 0.0
    assert p.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_reports_a_gradient_that_is_no_number(bad):
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    p.grad, q.grad = torch.tensor([1.0, bad]), torch.ones(2)
    assert not clip_grad_norm(iter([p, q]), 1.0).isfinite()


def test_schedule_edges():
    assert cosine_lr(1, 1.0, 0.0, 0, 1) == 0.0  # a cycle of one step ends at once
    assert cosine_lr(5, 1.0, 0.1, 5, 10) == 1.0
    assert cosine_lr(10, 1.0, 0.1, 5, 10) == 0.1
    assert cosine_lr(10**9, 1.0, 0.1, 5, 10) == 0.1
    assert all(cosine_lr(s, 1.0, 0.1, 5, 10) > 0 for s in range(1, 20))
