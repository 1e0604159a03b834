"""Checkpoints and the faults that a run must survive, with real processes that are really killed."""
import contextlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import checkpoints, metrics, one_thread, result, tell  # noqa: F401
from torch.testing import assert_close

import tinylm.train
from tinylm.core import InputError
from tinylm.model import TransformerLM
from tinylm.optim import AdamW
from tinylm.train import Diverged, Stopped, load_checkpoint, load_run, save_checkpoint, train

PATIENCE = 60  # seconds until a child that does not do what it should is called broken


@pytest.fixture(scope="module")
def start():
    "Start a function in a process of its own; a server that has imported torch once makes them quickly."
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork processes")
    context, children = multiprocessing.get_context("forkserver"), []

    def start(function, *args):
        children.append(context.Process(target=function, args=args))
        children[-1].start()
        return children[-1]

    context.set_forkserver_preload(["tinylm.train"])
    yield start
    for child in children:
        child.kill()


def wait(condition, child):
    "Wait until a condition holds, as long as the child that brings it about lives."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert child.is_alive(), f"the child ended with {child.exitcode}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def newest(run):
    folders = sorted((Path(run) / "checkpoints").glob("step-*"))
    return int(folders[-1].name[5:]) if folders else 0


def quietly(config):
    "In a child: make the run whole."
    torch.set_num_threads(1)
    with open(os.devnull, "w", encoding="utf-8") as quiet, contextlib.redirect_stderr(quiet):
        train(config, tell)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"}


# --- killed


def constant(config, value):
    "A model and an optimizer all of whose numbers are one value."
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.data.fill_(value)
        optimizer.state[p] = {"step": value, "m": torch.full_like(p, value), "v": torch.full_like(p, value)}
    return model, optimizer


def die_at_call(config, out, number):
    "In a child: save as iteration 2, and be killed before the call to the system with this number."
    count, saved = itertools.count(1), constant(config, 2)

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "mkdir", "open", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    save_checkpoint(*saved, 2, out)


def test_killed_before_every_call_to_the_system(config, start, tmp_path):
    "Even when a checkpoint replaces one of the same name, there is a whole one at every instant."
    found = []
    for number in itertools.count(1):
        out = tmp_path / str(number) / "step-00000001"
        save_checkpoint(*constant(config, 1), 1, out)
        child = start(die_at_call, config, out, number)
        child.join(PATIENCE)
        model, optimizer = constant(config, 0)
        found.append(load_checkpoint(out, model, optimizer))
        tensors = [*model.parameters(), *(optimizer.state[p]["m"] for p in model.parameters())]
        assert all((tensor == found[-1]).all() for tensor in tensors)
        if child.exitcode != -signal.SIGKILL:
            break
    assert child.exitcode == 0 and found[-1] == 2 and len(found) > 8 and found.count(1) > 4


def die_at_step(config, step):
    "In a child: train, and be killed in the middle of a step, before its update."
    real, count = tinylm.train.clip_grad_norm, itertools.count(1)

    def deadly(params, max_l2_norm):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(params, max_l2_norm)

    tinylm.train.clip_grad_norm = deadly
    quietly(config)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    "A config with options, and the result of its run that was never stopped."
    config = replace(base, grad_accum_steps=2, watch=True, dtype="bfloat16")
    return config, result(train(replace(config, run_dir=str(tmp_path_factory.mktemp("straight") / "run")), tell))


@pytest.mark.parametrize("step", [8, 20, 60])  # 7 is saved, 20 is evaluated, 60 is the last
def test_killed_in_a_step_equals_never_stopped(undisturbed, start, tmp_path, step):
    config, expected = replace(undisturbed[0], run_dir=str(tmp_path / "run")), undisturbed[1]
    child = start(die_at_step, config, step)
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL and newest(config.run_dir) < step
    assert result(train(config, tell)) == expected


# --- no room


@pytest.fixture
def disk(tmp_path):
    "A disk of 2 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(config, disk):
    "What is on the disk stays, byte by byte, and the run goes on when there is room again."
    config = replace(config, run_dir=str(disk / "run"))
    run = train(replace(config, max_steps=30))
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    before = contents(run / "checkpoints")
    with pytest.raises(InputError, match="cannot write"):
        train(replace(config, max_steps=40))
    assert contents(run / "checkpoints") == before and not list(disk.rglob("*.tmp"))
    (disk / "filler").unlink()
    train(config)
    assert metrics(run)[-1]["step"] == 60


def test_a_read_only_disk(config, disk):
    config = replace(config, run_dir=str(disk / "run"))
    train(replace(config, max_steps=30))
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for run_dir in ("run", "new"):
        with pytest.raises(OSError, match="Read-only"):
            train(replace(config, run_dir=str(disk / run_dir)))
    assert contents(disk) == before


# --- damaged


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def change_a_number(path):
    path.write_text(path.read_text(encoding="utf-8").replace('"iteration": 60', '"iteration": 50'), encoding="utf-8")


@pytest.mark.parametrize("damage, name", [
    (cut_in_half, "model.safetensors"), (flip_a_bit, "optimizer.safetensors"), (os.remove, "optimizer.safetensors"),
    (cut_in_half, "state.json"), (change_a_number, "state.json"), (os.remove, "state.json")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, capsys, name, damage):
    run = train(config, tell)
    whole = result(run)
    damage(checkpoints(run)[-1] / name)
    load_run(run)
    said = capsys.readouterr().err
    assert f"step-00000060/{name}" in said.replace(os.sep, "/") and "before it" in said
    train(config, tell)
    assert result(run) == whole


def test_all_checkpoints_damaged_is_said(config):
    run = train(replace(config, max_steps=14))
    for folder in checkpoints(run):
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(InputError, match="no checkpoint can be used"):
        train(config)


def test_a_pickle_is_refused_and_not_run(config, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    model, optimizer = constant(config, 1)
    save_checkpoint(model, optimizer, 1, tmp_path / "c")
    torch.save({"x": Bomb()}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "c", model, optimizer)
    assert not (tmp_path / "exploded").exists()


def test_only_our_own_checkpoints_are_removed(config):
    "A copy under another name is the user's; what was just loaded or written stays, whatever its number."
    run = train(replace(config, max_steps=21))
    shutil.copytree(run / "checkpoints/step-00000021", run / "checkpoints/step-00000021-best")
    backup = shutil.copytree(run / "checkpoints/step-00000007", run.parent / "backup")
    train(replace(config, max_steps=49))
    for folder in checkpoints(run):
        if folder.name != "step-00000021-best":
            flip_a_bit(folder / "model.safetensors")
    shutil.copytree(backup, run / "checkpoints/step-00000007")
    train(replace(config, max_steps=14))
    names = {folder.name for folder in checkpoints(run)}
    assert {"step-00000021-best", "step-00000007", "step-00000014"} <= names
    assert load_checkpoint(run / "checkpoints/step-00000014", *constant(config, 0)) == 14


# --- what a checkpoint holds


@pytest.mark.parametrize("make", [
    lambda params: AdamW(params, betas=(0.8, 0.9)), lambda params: torch.optim.AdamW(params, betas=(0.8, 0.9)),
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
])
def test_the_state_after_loading_equals_the_one_before(config, tmp_path, make):
    "For any optimizer, types included: tuples stay tuples."
    models = [TransformerLM(config, seed=seed) for seed in (0, 1)]
    ours, theirs = (make(model.parameters()) for model in models)
    for _ in range(3):
        models[0](torch.zeros(1, 4, dtype=torch.long)).square().mean().backward()
        ours.step()
    save_checkpoint(models[0], ours, 3, tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", models[1], theirs) == 3
    before, after = ours.state_dict(), theirs.state_dict()
    assert before["param_groups"] == after["param_groups"] and before["state"].keys() == after["state"].keys()
    for i, entry in before["state"].items():
        assert_close(after["state"][i], entry, rtol=0, atol=0)
    assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_another_shape_is_refused(config, tmp_path):
    save_checkpoint(*constant(config, 1), 1, tmp_path / "c")
    model, optimizer = constant(replace(config, d_ff=48), 0)
    with pytest.raises(InputError, match=r"layers.0.ffn.w1.weight is \(32, 16\), and \(48, 16\) in the model"):
        load_checkpoint(tmp_path / "c", model, optimizer)
    assert all((p == 0).all() for p in model.parameters())


# --- numbers that are none


def poison_a_weight(model):
    model.layers[0].ffn.w1.weight.data[0, 0] = math.inf


def poison_a_gradient(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("poison", [poison_a_weight, poison_a_gradient])
def test_a_number_that_is_none_stops_before_the_update(config, poison):
    "After step 20 it is there; 14 was saved."
    with pytest.raises(Diverged) as stopped:
        train(replace(config, watch=True), lambda model, tokenizer, step: step == 20 and poison(model))
    assert stopped.value.step == 21 and not math.isfinite(stopped.value.grad_norm)
    last = metrics(config.run_dir)[-1]
    assert last["step"] == 21 and last["diverged"]
    assert (last["activations"]["lm_head"] == "nan") == (poison is poison_a_weight)
    assert [folder.name[-2:] for folder in checkpoints(config.run_dir)] == ["07", "14"]


@pytest.mark.parametrize("every, saved", [(20, ["07", "14"]), (7, [])])
def test_an_update_that_reaches_infinity_is_not_saved(config, monkeypatch, every, saved):
    "Where an evaluation is due, and where only a checkpoint is."
    real, count = AdamW.step, itertools.count(1)

    def overflow(optimizer, closure=None):
        real(optimizer, closure)
        if next(count) == (20 if every == 20 else 7):
            optimizer.param_groups[0]["params"][-1].data[0, 0] = math.inf

    monkeypatch.setattr(AdamW, "step", overflow)
    with pytest.raises(Diverged):
        train(replace(config, eval_every=20 if every == 20 else 1000))
    assert metrics(config.run_dir)[-1]["diverged"]
    assert [folder.name[-2:] for folder in checkpoints(config.run_dir)] == saved


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(undisturbed, tmp_path, number, code):
    "Whatever the step, it is finished and saved, and going on gives the run that was never stopped."
    def interrupt(model, tokenizer, step):
        if step == 20:
            signal.raise_signal(number)
        return tell(model, tokenizer, step)

    config = replace(undisturbed[0], run_dir=str(tmp_path / "run"))
    with pytest.raises(Stopped, match="--resume") as stopped:
        train(config, interrupt)
    assert stopped.value.exit_code == code
    assert checkpoints(config.run_dir)[-1].name == "step-00000020"
    assert result(train(config, tell)) == undisturbed[1]


def hang(config, said):
    "In a child: train until the first evaluation, and hang there."
    def wait_for_ever(*args):
        print("hangs", flush=True)
        while True:
            time.sleep(0.01)

    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        train(config, wait_for_ever)
    except KeyboardInterrupt:
        sys.exit(130)


def test_a_second_signal_quits_at_once(config, start, tmp_path):
    said = tmp_path / "said"
    said.touch()
    child = start(hang, config, said)
    wait(lambda: b"hangs" in said.read_bytes(), child)
    os.kill(child.pid, signal.SIGINT)
    wait(lambda: b"once more to quit at once" in said.read_bytes(), child)
    os.kill(child.pid, signal.SIGINT)
    child.join(PATIENCE)
    assert child.exitcode == 130 and newest(config.run_dir) == 14, "it was told to quit, not to save"


# --- two at once


def test_two_writers(config, start, tmp_path):
    "The second is refused, a reader is not; the lock of one that was killed is none."
    said = tmp_path / "said"
    said.touch()
    child = start(hang, config, said)
    wait(lambda: b"hangs" in said.read_bytes(), child)
    before = contents(config.run_dir)
    with pytest.raises(InputError, match="in use by another process"):
        train(config)
    assert contents(config.run_dir) == before
    load_run(config.run_dir)
    child.kill()
    child.join()
    train(config)
    assert metrics(config.run_dir)[-1]["step"] == 60


def test_a_log_line_cut_off_by_a_crash_is_no_line(config):
    run = train(replace(config, max_steps=14))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 15, "tok')
    assert tinylm.train.read_metrics(run)[-1]["step"] == 14
    torn = run / "checkpoints" / ".step-00000021.0a1b2c3d.tmp"  # so does a save
    torn.mkdir()
    train(replace(config, max_steps=21))
    assert not torn.exists()
    steps = [row["step"] for row in metrics(run)]
    assert steps == sorted(set(steps)) and steps[-1] == 21


def test_a_changed_text_is_refused_when_a_run_goes_on(config, tmp_path):
    mine = tmp_path / "mine.txt"
    shutil.copy(config.corpus, mine)
    config = replace(config, corpus=str(mine))
    train(replace(config, max_steps=7))
    with open(mine, "a", encoding="utf-8") as file:
        file.write("One story more.\n<|endoftext|>\n")
    with pytest.raises(InputError, match="made with (fingerprint|sha256) "):
        train(config)
