"""Muon and the recipe's fields: equal to PyTorch's, exact when it goes on. Several processes: test_distributed.py."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import metrics, one_thread, result, tell  # noqa: F401

from tinylm.core import END_OF_TEXT, InputError
from tinylm.data import fables, fables_floor, prepare
from tinylm.model import TransformerLM
from tinylm.recipe import Muon, orthogonalize, rate_at
from tinylm.train import SHIPPED, evaluate, evaluate_stories, load_run, make_optimizer, train, window_starts

FAST = {"optimizer": "muon", "schedule": "linear", "min_lr": 0.0, "windows": "stories", "cosine_cycle_iters": 24,
        "eval_every": 8, "num_layers": 2}


# --- Muon


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24), (3, 24, 8)])
def test_orthogonalize_keeps_directions_and_evens_lengths(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x)
    inside = u.mT @ y @ vh.mT
    values = torch.diagonal(inside, dim1=-2, dim2=-1)
    assert 0.65 < values.min() and values.max() < 1.15 and s.max() / s.min() > 1.5
    torch.testing.assert_close(inside, torch.diag_embed(values))
    p = s / x.norm(dim=(-2, -1))[..., None]
    for _ in range(5):
        p = 3.4445 * p - 4.7750 * p**3 + 2.0315 * p**5
    torch.testing.assert_close(values, p)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_is_that_of_pytorch(monkeypatch):
    "Its products are made in 16 bits, so they are made in 32 here."
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    rng, ends = torch.Generator().manual_seed(0), []
    starts = [torch.randn(shape, generator=rng) for shape in [(16, 16), (16, 16), (24, 8), (8, 24)]]
    slopes = [[torch.randn(x.shape, generator=rng) for x in starts] for _ in range(5)]
    for kind in (Muon, torch.optim.Muon):
        params = [torch.nn.Parameter(x.clone()) for x in starts]
        optimizer = kind(params, lr=0.02, momentum=0.9, weight_decay=0.1)
        for grads in slopes:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_a_group_without_momentum_is_updated_by_adamw(base):
    models = [TransformerLM(base) for _ in range(2)]
    optimizers = [make_optimizer(model, replace(base, optimizer=kind))
                  for model, kind in zip(models, ("muon", "adamw"), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            for p in model.parameters():
                p.grad.copy_(torch.cos(torch.arange(p.numel()).reshape(p.shape)))
            optimizer.step()
    ours, other = (dict(model.named_parameters()) for model in models)
    equal = {name for name in ours if torch.equal(ours[name], other[name])}
    assert equal == {name for name in ours if not name.startswith("layers") or ".ln" in name}


def test_what_muon_cannot_update_is_refused():
    for params, momentum in [([torch.zeros(3)], 0.9), ([torch.zeros(3, 3)], 1.0)]:
        with pytest.raises(ValueError, match="Muon needs matrices"):
            Muon(params, momentum=momentum)


# --- the fields


def test_schedules_end_where_they_say(base):
    base = replace(base, lr=1.0, min_lr=0.0, warmup_iters=10, cosine_cycle_iters=110)
    rates = {kind: [rate_at(t, replace(base, schedule=kind)) for t in (1, 10, 60, 88, 99, 110, 111)]
             for kind in ("cosine", "linear", "wsd", "constant")}
    assert rates["linear"] == pytest.approx([0.1, 1, 0.5, 0.22, 0.11, 0, 0])
    assert rates["wsd"] == pytest.approx([0.1, 1, 1, 1, 0.5, 0, 0])
    assert rates["constant"] == pytest.approx([0.1, 1, 1, 1, 1, 1, 1])
    assert rates["cosine"][:3] == pytest.approx([0.1, 1, 0.5]) and rates["cosine"][-2:] == [0, 0]


def test_story_windows_begin_where_a_story_ends(base):
    tokenizer, train_file, _ = prepare(base)
    tokens, stories = train_file.tokens(), replace(base, windows="stories")
    places, end = window_starts(tokens, stories), tokenizer.special_tokens[END_OF_TEXT]
    assert set(tokens[places]) == {end}
    assert len(places) == sum(tokens[: len(tokens) - base.context_length] == end) > 250
    assert len(window_starts(tokens, base)) == len(tokens) - base.context_length
    with pytest.raises(InputError, match="too few for a window"):
        window_starts(np.zeros(99), stories)
    model = TransformerLM(base)
    assert evaluate(model, tokens, stories) != evaluate(model, tokens, base)


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_a_run_that_goes_on_is_one_that_never_stopped(config, tmp_path, optimizer):
    config = replace(config, **FAST | {"optimizer": optimizer, "schedule": "wsd"})
    straight = train(config, tell)
    for minutes in (1e-9, 1e-9, None):  # at least one step each
        run = train(replace(config, run_dir=str(tmp_path / "again"), max_minutes=minutes), tell)
    assert result(run) == result(straight)
    rows = metrics(run)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] and rows[-1]["lr"] == 0


def test_the_model_that_ships_is_small_and_knows_fables_that_it_has_not_read():
    assert SHIPPED.stat().st_size < 1_100_000
    model, tokenizer, config = load_run("tinylm")
    assert (config.run_dir, config.data_dir) == (None, "data")  # nothing of the machine that trained it
    text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(60, seed=12345))
    ids = np.array(tokenizer.encode(text))
    loss, _, count = evaluate_stories(model, ids, tokenizer.special_tokens[END_OF_TEXT])
    assert count > 55 and loss - fables_floor(ids, tokenizer, config.context_length) < 0.05
