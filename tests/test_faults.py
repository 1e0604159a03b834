"""The faults that training must survive, with real processes that are really killed."""
import contextlib
import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import one_thread  # noqa: F401
from tiny import checkpoints, metrics, result, tell, write_fables
from torch.testing import assert_close

import tinylm.saving
import tinylm.train
from tinylm import cli
from tinylm.data import InputError
from tinylm.model import TransformerLM
from tinylm.optim import AdamW
from tinylm.train import (
    Diverged,
    Stopped,
    load_checkpoint,
    load_run,
    record_run,
    resume,
    save_checkpoint,
    train,
)

PATIENCE = 60  # seconds until a child that does not do what it shall is called broken


@pytest.fixture(scope="module")
def start():
    "Start a function in a process of its own; a server that has imported torch once makes them in milliseconds."
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork processes")
    context, children = multiprocessing.get_context("forkserver"), []

    def start(function, *args):
        children.append(context.Process(target=function, args=args))
        children[-1].start()
        return children[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        context.set_forkserver_preload(["test_faults", "warm"])
        yield start
    for child in children:
        child.kill()


def wait(condition, child=None):
    "Wait until a condition holds, as long as the child that shall bring it about lives."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert child is None or child.is_alive(), f"the child ended with {child.exitcode}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def newest(run):
    folders = sorted((Path(run) / "checkpoints").glob("step-*"))
    return int(folders[-1].name[5:]) if folders else 0


def unfinished(run):
    "Whether a checkpoint is half-written at this moment."
    return any((Path(run) / "checkpoints").glob(".*.tmp"))


def go_on(config):
    "In a child: begin the run, or go on with it."
    torch.set_num_threads(1)
    with open(os.devnull, "w", encoding="utf-8") as quiet, contextlib.redirect_stderr(quiet):
        resume(config.run_dir, tell) if Path(config.run_dir).exists() else train(config, tell)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# --- 1: killed while saving, and exact resume


def test_killed_30_times_while_saving_equals_never_stopped(config, start, tmp_path, capfd):
    "A run that does little else than save, killed at random instants of its saves: what it left always loads."
    config = replace(config, checkpoint_every=1, max_steps=100_000, cosine_cycle_iters=300, eval_every=10)
    dice, torn = random.Random(0), 0
    for _ in range(30):
        before = newest(config.run_dir)
        child = start(go_on, config)
        wait(lambda before=before: newest(config.run_dir) > before, child)
        wait(lambda: unfinished(config.run_dir), child)
        time.sleep(dice.random() * 0.002)
        child.kill()
        child.join()
        torn += unfinished(config.run_dir)
        capfd.readouterr()
        load_run(config.run_dir)
        assert "before it" not in capfd.readouterr().err, "a torn checkpoint had the name of a whole one"
    assert torn >= 5, f"only {torn} of 30 kills hit a save"
    end = newest(config.run_dir) + 3
    resume(config.run_dir, tell, max_steps=end)
    straight = train(replace(config, run_dir=str(tmp_path / "straight"), max_steps=end), tell)
    assert result(config.run_dir) == result(straight)
    assert not list((Path(config.run_dir) / "checkpoints").glob(".*")), "temporary folders stayed"


def constant(config, value):
    "A model and an optimizer all of whose numbers are one value."
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.data.fill_(value)
        optimizer.state[p] = {"step": value, "m": torch.full_like(p, value), "v": torch.full_like(p, value)}
    return model, optimizer


CALLS = ["fsync", "replace", "mkdir", "open", "unlink", "rmdir"]


def die_at_call(config, out, number):
    "In a child: save as iteration 2, and be killed before the call to the system with this number."
    count = itertools.count(1)
    saved = constant(config, 2)

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    save_checkpoint(*saved, 2, out)


def test_killed_before_every_call_to_the_system(config, start, tmp_path):
    "Even when a checkpoint replaces one of the same name, there is a whole one at every instant."
    seen, number = Counter(), 0
    while 2 * seen["killed"] == 2 * number:
        number += 1
        out = tmp_path / str(number) / "step-00000001"
        save_checkpoint(*constant(config, 1), 1, out)
        child = start(die_at_call, config, out, number)
        child.join(PATIENCE)
        seen["killed"] += child.exitcode == -signal.SIGKILL
        model, optimizer = constant(config, 0)
        iteration = load_checkpoint(out, model, optimizer)
        seen[iteration] += 1
        tensors = [*model.parameters(), *(optimizer.state[p]["m"] for p in model.parameters())]
        assert all((tensor == iteration).all() for tensor in tensors)
    assert child.exitcode == 0 and iteration == 2
    assert seen["killed"] > 10 and seen[1] > 5 and seen[2] > 5


def die_at_step(config, step):
    "In a child: train, and be killed in the middle of a step, before its update."
    real, count = tinylm.train.clip_grad_norm, itertools.count(1)

    def deadly(params, max_l2_norm):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(params, max_l2_norm)

    tinylm.train.clip_grad_norm = deadly
    go_on(config)


@pytest.fixture(scope="module", params=[{}, {"grad_accum_steps": 2, "watch": True, "dtype": "bfloat16"}],
                ids=["plain", "with options"])
def undisturbed(base, request, tmp_path_factory):
    "A config, and the result of its run that was never stopped."
    config = replace(base, **request.param)
    return config, result(train(replace(config, run_dir=str(tmp_path_factory.mktemp("straight") / "run")), tell))


@pytest.mark.parametrize("step", [1, 8, 20, 45, 60])  # 7 is saved, 20 is evaluated, 60 is the last
def test_killed_in_a_step_equals_never_stopped(undisturbed, start, tmp_path, step):
    config, expected = replace(undisturbed[0], run_dir=str(tmp_path / "run")), undisturbed[1]
    child = start(die_at_step, config, step)
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL and newest(config.run_dir) < step
    resume(config.run_dir, tell)
    assert result(config.run_dir) == expected


# --- 2: a full disk, a folder that is read-only


@pytest.fixture
def disk(tmp_path):
    "A disk of 2 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def one_line(capfd, *argv):
    "Run the command in this process; it must fail with code 2 and one line, which is returned."
    capfd.readouterr()
    assert cli.main(list(map(str, argv))) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("tinylm: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_a_full_disk(config, disk, capfd):
    "What is on the disk stays, byte by byte, and the run goes on when there is room again."
    run = train(replace(config, run_dir=str(disk / "run"), max_steps=30))
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    before = contents(run / "checkpoints")
    assert "No space left" in one_line(capfd, "train", "--resume", run, "--max_steps", "40")
    assert contents(run / "checkpoints") == before and not list(disk.rglob("*.tmp"))
    (disk / "filler").unlink()
    resume(run, max_steps=60)
    assert metrics(run)[-1]["step"] == 60


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_log_on_a_full_disk_is_named(config, capfd, monkeypatch, name):
    def fill(model, tokenizer, step):
        path = Path(config.run_dir) / name
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
        return "a story"

    monkeypatch.setattr(cli, "_story", fill)
    run = train(replace(config, max_steps=14))
    line = one_line(capfd, "train", "--resume", run, "--max_steps", "60", "--checkpoint_every", "1000")
    assert f"{run / name}: cannot write (No space left" in line
    assert newest(run) == 14


def test_a_read_only_disk(config, disk, capfd):
    run = train(replace(config, run_dir=str(disk / "run"), max_steps=30))
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "ead-only" in one_line(capfd, "train", "--resume", run, "--max_steps", "40")
    assert "ead-only" in one_line(capfd, "train", "--preset", "debug", "--run_dir", disk / "new", "--corpus",
                                  config.corpus, "--data_dir", config.data_dir, "--vocab_size", 400)
    assert contents(disk) == before


def test_a_read_only_folder(config, tmp_path, capfd):
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        pytest.skip("root may write everywhere; see test_a_read_only_disk")
    run = train(replace(config, max_steps=30))
    folders = [folder for folder in (run, *run.rglob("*")) if folder.is_dir()]
    before = contents(run)
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert "cannot write" in one_line(capfd, "train", "--resume", run, "--max_steps", "40")
        assert contents(run) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_nothing_half_written_stays(config, tmp_path, monkeypatch):
    "A disk that fills up while a checkpoint is written: the old one is untouched, nothing temporary stays."
    save_checkpoint(*constant(config, 1), 1, tmp_path / "checkpoints" / "step-00000001")
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("step-00000001", "step-00000002"):
        with pytest.raises(InputError, match="No space left"):
            save_checkpoint(*constant(config, 2), 2, tmp_path / "checkpoints" / name)
    assert contents(tmp_path) == before


# --- 3: damaged checkpoints


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, capsys, name, damage):
    run = train(config, tell)
    whole = result(run)
    damage(checkpoints(run)[-1] / name)
    load_run(run)
    said = capsys.readouterr().err
    assert f"step-00000060/{name}" in said.replace(os.sep, "/") and "before it" in said
    resume(run, tell)
    assert result(run) == whole


def test_every_flipped_bit_of_the_state_is_noticed(config, tmp_path):
    "The numbers in state.json have a checksum too: 7 steps must not become 3."
    model, optimizer = constant(config, 7)
    save_checkpoint(model, optimizer, 7, tmp_path / "c")
    path = tmp_path / "c" / "state.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"iteration": 7', '"iteration": 3'), encoding="utf-8")
    with pytest.raises(InputError, match="state.json"):
        load_checkpoint(tmp_path / "c", model, optimizer)


def test_all_checkpoints_damaged_is_said(config, capsys):
    run = train(config)
    for folder in checkpoints(run):
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(InputError, match="none of its 3 checkpoints"):
        resume(run)
    assert capsys.readouterr().err.count("; trying the checkpoint before it\n") == 2


def test_a_log_line_cut_off_by_a_crash_is_no_line(config):
    run = train(replace(config, max_steps=30), tell)
    rows = metrics(run)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 31, "tok')
    assert record_run(run, run / "record.json")["curve"] == rows
    resume(run, tell)
    assert metrics(run) == rows


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
@pytest.mark.parametrize("left", [0, 100, None])
def test_a_log_that_lost_lines_is_told(config, capfd, monkeypatch, name, left):
    "Nothing is cut or written before somebody insists; then the gap is on record, and the log is whole lines."
    run = train(replace(config, max_steps=30), tell)
    size = (run / name).stat().st_size
    (run / name).unlink() if left is None else os.truncate(run / name, left)
    before = contents(run)
    line = one_line(capfd, "train", "--resume", run, "--max_steps", "40")
    assert f"{run / name}: {left or 0} bytes, expected at least {size:,}: lines are lost; bring the file back" in line
    assert {path for path, data in contents(run).items() if data != before.get(path)} <= {run / ".lock"}
    monkeypatch.setattr(cli, "_story", tell)
    for steps in ("30", "40"):
        assert cli.main(["train", "--resume", str(run), "--max_steps", steps, "--allow_changes"]) == 0
    lost = {"step": 30, "changes": {name: [size, left or 0]}}
    assert tinylm.train._read_config(run)[1]["history"][:1] == [lost] and metrics(run)[-1]["step"] == 40


@pytest.mark.parametrize("name", ["step-00000099", "step-99", "step-old"])
def test_a_checkpoint_under_a_wrong_name_is_not_used(config, capsys, name):
    run = train(config, tell)
    whole = result(run)
    checkpoints(run)[-1].rename(run / "checkpoints" / name)
    load_run(run)
    assert f"{name}: holds step 60; if it is this run's, name it step-00000060; trying the checkpoint before it" in \
        capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / name)
    resume(run, tell)
    assert result(run) == whole


# --- 4: no pickle


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def sign(folder, without=""):
    "Give a changed checkpoint checksums that fit."
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["sha256"]
    state["extra"].pop(without, None)
    state["sha256"] = tinylm.saving._checksums(folder, state)
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_place_of_a_checkpoint_is_refused(config, name, tmp_path, monkeypatch, capsys):
    "Even one whose checksums fit, as an attacker would make them."
    run = train(replace(config, max_steps=14))
    monkeypatch.chdir(tmp_path)
    (checkpoints(run)[-1] / name).write_bytes(pickle.dumps(Bomb()))
    sign(checkpoints(run)[-1])
    load_run(run)
    assert f"{name}: not a safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_nothing_is_unpickled(config, monkeypatch):
    run = train(replace(config, max_steps=14))

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"),
                         (torch, "load"), (np, "load")]:
        monkeypatch.setattr(module, name, forbidden)
    load_run(run)
    resume(run, max_steps=20)


# --- 5: another config on resume


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    "A run of 14 steps with two heads, to copy."
    return train(replace(base, run_dir=str(tmp_path_factory.mktemp("finished") / "run"), max_steps=14), tell)


@pytest.fixture
def copied(finished, tmp_path):
    "A copy of it, to spoil."
    return shutil.copytree(finished, tmp_path / "run")


def edit_config(run, **changes):
    "Change config.json behind the back of the command."
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("change", [
    {"num_heads": 4}, {"rope_theta": 500.0}, {"norm": "post"}, {"use_rope": False}, {"d_model": 32}, {"seed": 1},
    {"lr": 0.5}, {"min_lr": 0.001}, {"batch_size": 8}, {"grad_accum_steps": 2}, {"dtype": "bfloat16"}, {"beta1": 0.5},
    {"beta2": 0.5}, {"weight_decay": 0.5}, {"max_l2_norm": 9.0}, {"warmup_iters": 6}, {"cosine_cycle_iters": 70},
    {"compile": True}, {"log_every": 5}, {"eval_every": 5}, {"eval_windows": 5}, {"preset": "laptop"},
], ids=lambda change: min(change))
def test_a_config_changed_by_an_editor_is_refused(base, copied, change):
    "Most of these leave all shapes as they were, so that the weights would load."
    edit_config(copied, **change)
    before = contents(copied)
    (name, new), = change.items()
    said = f"step-00000014: made with {name} {getattr(base, name)} (config.json: {new}); put back the one"
    for use in (load_run, lambda run: resume(run, allow_changes=True)):
        with pytest.raises(InputError, match=re.escape(said)):
            use(copied)
    assert {path for path, data in contents(copied).items() if data != before[path]} <= {copied / ".lock"}


@pytest.mark.parametrize("change, name", [({"seed": 5}, "seed 5"), ({"corpus": "train.txt"}, "tokenizer "),
                                          ({"val_corpus": "valid.txt"}, "validation text ")])
def test_checkpoints_of_another_run_are_refused(base, copied, tmp_path, change, name):
    "Even if all shapes are equal, and if only the texts were others."
    texts = {key: write_fables(tmp_path / file, 300, 9) for key, file in change.items() if key != "seed"}
    other = train(replace(base, **change | texts, run_dir=str(tmp_path / "other"), max_steps=14))
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(other / "checkpoints", copied / "checkpoints")
    for use in (load_run, resume):
        with pytest.raises(InputError, match=f"step-00000014: made with .*{name}"):
            use(copied)


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_loaded(copied):
    "As those of older versions do not."
    for folder in checkpoints(copied):
        sign(folder, without="made_with")
    load_run(copied)
    resume(copied, max_steps=20)


def test_changes_that_were_recorded_are_none_for_the_checkpoints_before_them(copied, tmp_path):
    "Also if a run is killed after the change was noted and before the next checkpoint, and is changed once more."
    older = shutil.copytree(checkpoints(copied)[-1], tmp_path / "older")
    for lr in (0.02, 0.03):
        resume(copied, changes={"lr": lr, "max_steps": 21}, allow_changes=True)
        for folder in checkpoints(copied)[1:]:
            shutil.rmtree(folder)
        shutil.copytree(older, copied / "checkpoints" / "step-00000014", dirs_exist_ok=True)
        load_run(copied)
    assert [event["changes"]["lr"] for event in tinylm.train._read_config(copied)[1]["history"]] == \
        [[0.01, 0.02], [0.02, 0.03]]
    edit_config(copied, lr=0.04)
    with pytest.raises(InputError, match="made with lr 0.01 "):
        load_run(copied)


@pytest.mark.parametrize("change", [{"d_model": 32}, {"num_layers": 2}, {"norm": "post"}, {"vocab_size": 500},
                                    {"context_length": 16}, {"seed": 1}])
def test_another_architecture_is_refused(config, change):
    run = train(replace(config, max_steps=14))
    before = contents(run)
    (name, new), = change.items()
    for allow in (False, True):
        with pytest.raises(InputError, match=f"{name} {getattr(config, name)} -> {new}; start a new run"):
            resume(run, changes={**change, "lr": 1e-3}, allow_changes=allow)
    assert {k: v for k, v in contents(run).items() if k.name != ".lock"} == \
        {k: v for k, v in before.items() if k.name != ".lock"}


def test_another_schedule_only_by_a_flag_and_recorded(config, capfd, monkeypatch):
    monkeypatch.setattr(cli, "_story", tell)
    run = train(replace(config, max_steps=14))
    line = one_line(capfd, "train", "--resume", run, "--lr", "0.001", "--batch_size", "8")
    assert "batch_size 4 -> 8, lr 0.01 -> 0.001" in line and "--allow_changes" in line
    changes = ["--lr", "0.001", "--batch_size", "8", "--beta1", "0.8", "--max_steps", "20"]
    assert cli.main(["train", "--resume", str(run), *changes, "--allow_changes"]) == 0
    assert cli.main(["train", "--resume", str(run), "--max_steps", "60"]) == 0  # stays changed
    changes = {"lr": [0.01, 0.001], "batch_size": [4, 8], "beta1": [0.9, 0.8]}
    assert record_run(run, run / "record.json")["history"] == [{"step": 14, "changes": changes}]
    saved = load_run(run)[2]
    assert (saved.lr, saved.batch_size, saved.beta1, saved.max_steps) == (0.001, 8, 0.8, 14)
    rows = {row["step"]: row for row in metrics(run)}
    assert rows[60]["lr"] == pytest.approx(1e-4) and rows[12]["lr"] > 5e-3
    state = json.loads((checkpoints(run)[-1] / "state.json").read_text(encoding="utf-8"))
    assert state["optimizer"]["param_groups"][0]["betas"] == [0.8, 0.999]


def test_what_is_the_same_is_no_change(config):
    run = train(replace(config, max_steps=14))
    resume(run, changes={"lr": config.lr, "d_model": config.d_model, "max_minutes": 5, "device": "auto"})


# --- 6: what does not belong together


def test_a_tokenizer_of_another_run_is_refused(config, tmp_path):
    run = train(replace(config, max_steps=14))
    other = train(replace(config, max_steps=1, vocab_size=300, run_dir=str(tmp_path / "other")))
    shutil.copy(other / "tokenizer" / "tokenizer.json", run / "tokenizer" / "tokenizer.json")
    for use in (load_run, resume):
        with pytest.raises(InputError, match="tokenizer [0-9a-f]{12} is not the one of this run, [0-9a-f]{12}"):
            use(run)


def test_a_checkpoint_of_another_shape_is_refused(config, tmp_path):
    model, optimizer = constant(config, 1)
    save_checkpoint(model, optimizer, 1, tmp_path / "c")
    wider = TransformerLM(replace(config, d_ff=64))
    with pytest.raises(InputError, match=r"layers\.0\.ffn\.w1\.weight is \(32, 16\) there and \(64, 16\)"):
        load_checkpoint(tmp_path / "c", wider)


def test_a_checkpoint_holds_any_optimizer(config, tmp_path):
    model = TransformerLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "c")
    other = TransformerLM(config, seed=1)
    loaded = torch.optim.AdamW(other.parameters())
    assert load_checkpoint(tmp_path / "c", other, loaded) == 1
    saved, wanted = loaded.state_dict(), optimizer.state_dict()
    for i, entry in wanted["state"].items():
        assert_close(saved["state"][i], entry, atol=0, rtol=0)
    assert saved["param_groups"] == json.loads(json.dumps(wanted["param_groups"]))


# --- 7: damaged token files; see also test_train.py and test_cli.py


@pytest.mark.parametrize("spoil, said", [
    (lambda raw: raw[:-6], "{} bytes, expected {}"),
    (lambda raw: b"\xff\xff" + raw[2:], "holds id 65535, expected ids below 400"),
], ids=["too short", "an id too large"])
def test_a_damaged_token_file_is_refused_on_resume(config, tmp_path, capfd, spoil, said):
    "In one line, which tells what was found and what should be; the run stays as it was."
    config = replace(config, data_dir=str(shutil.copytree(config.data_dir, tmp_path / "data")))
    run, file = train(replace(config, max_steps=14)), tinylm.train.prepare(config)[1].path
    before, size = contents(run / "checkpoints"), file.stat().st_size
    file.write_bytes(spoil(file.read_bytes()))
    assert f"{file}: {said.format(size - 6, size)}" in one_line(capfd, "train", "--resume", run, "--max_steps", "20")
    assert contents(run / "checkpoints") == before and metrics(run)[-1]["step"] == 14


# --- 8: not a number


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_number_that_is_none_stops_before_the_update(config, poison):
    def spoil(model, tokenizer, step):
        if step == 20:
            model.layers[0].ffn.w1.weight.data[0, 0] = poison
            weights.append([p.detach().clone() for p in model.parameters()])
            models.append(model)

    models, weights = [], []
    with pytest.raises(Diverged) as stopped:
        train(replace(config, watch=True), spoil)
    assert stopped.value.step == 21
    assert all(torch.equal(a, b) for a, b in zip(weights[0], models[0].parameters(), strict=True) if a.isfinite().all())
    last = metrics(config.run_dir)[-1]
    tokens = tinylm.train.prepare(config)[1].tokens()
    assert (last["step"], last["diverged"]) == (21, True)
    assert last["divergence"]["windows"] == tinylm.train._starts_of_step(tokens, config, 21).tolist()
    assert math.isfinite(last["activations"]["token_embeddings"]) and last["activations"]["lm_head"] == "nan"
    assert [folder.name[-2:] for folder in checkpoints(config.run_dir)] == ["07", "14"]
    assert all(p.isfinite().all() for p in load_run(config.run_dir)[0].parameters())
    assert record_run(config.run_dir, Path(config.run_dir) / "r.json")["diverged_at_step"] == 21
    json.loads((Path(config.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1],
               parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_gradient_alone_that_is_no_number_stops_before_the_update(config):
    "The loss is finite, so that only the gradient's own length tells."
    def spoil(model, tokenizer, step):
        if step == 20:
            model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
            models.append(model)
            weights.extend(p.detach().clone() for p in model.parameters())

    models, weights = [], []
    with pytest.raises(Diverged) as stopped:
        train(config, spoil)
    assert stopped.value.step == 21 and math.isfinite(stopped.value.loss) and math.isnan(stopped.value.grad_norm)
    assert all(map(torch.equal, weights, models[0].parameters()))
    last = metrics(config.run_dir)[-1]
    tokens = tinylm.train.prepare(config)[1].tokens()
    windows = tinylm.train._starts_of_step(tokens, config, 21).tolist()
    assert (last["step"], last["diverged"]) == (21, True)
    assert last["divergence"] == {"loss": pytest.approx(stopped.value.loss, rel=1e-3), "grad_norm": "nan",
                                  "windows": windows}
    assert [folder.name[-2:] for folder in checkpoints(config.run_dir)] == ["07", "14"]
    assert all(p.isfinite().all() for p in load_run(config.run_dir)[0].parameters())


def test_a_validation_loss_that_is_no_number_stops_the_run(config, monkeypatch):
    "An update of finite gradients that reaches infinity exactly where an evaluation is due."
    def overflow(optimizer, closure=None):
        real(optimizer, closure)
        if next(count) == 20:
            optimizer.param_groups[0]["params"][-1].data[0, 0] = math.inf

    real, count = AdamW.step, itertools.count(1)
    monkeypatch.setattr(AdamW, "step", overflow)
    with pytest.raises(Diverged) as stopped:
        train(config)
    last = metrics(config.run_dir)[-1]
    assert stopped.value.step == last["step"] == 20 and last["diverged"] and last["val_loss"] is None
    assert last["divergence"]["loss"] in ("inf", "nan") and checkpoints(config.run_dir)[-1].name == "step-00000014"


def test_spoiled_weights_are_not_saved(config):
    "An update that reaches infinity exactly where a checkpoint is due."
    def spoil(model, tokenizer, step):
        model.lm_head.weight.data[0, 0] = math.inf

    with pytest.raises(Diverged):
        train(replace(config, eval_every=7), spoil)
    assert not (Path(config.run_dir) / "checkpoints").exists()


# --- 9: signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(config, tmp_path, number, code):
    "Whatever the step, it is finished and saved, and going on gives the run that was never stopped."
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)

    def interrupt(model, tokenizer, step):
        if step == 20:
            signal.raise_signal(number)
        return tell(model, tokenizer, step)

    with pytest.raises(Stopped, match="--resume") as stopped:
        train(config, interrupt)
    assert stopped.value.exit_code == code
    assert checkpoints(config.run_dir)[-1].name == "step-00000020"
    resume(config.run_dir, tell)
    assert result(config.run_dir) == result(straight)


def test_a_signal_at_any_moment_leaves_the_step_saved(config, monkeypatch):
    "The signal comes at each place where the loop looks at itself; the run never stops unsaved."
    real = tinylm.train._Stop.is_due

    def raise_after(self):
        due = real(self)
        if not due:
            signal.raise_signal(signal.SIGTERM)
        return due

    monkeypatch.setattr(tinylm.train._Stop, "is_due", raise_after)
    with pytest.raises(Stopped):
        train(replace(config, checkpoint_every=50))
    assert checkpoints(config.run_dir)[-1].name == "step-00000002"


def hang(*args):
    print("hangs", flush=True)
    while True:
        time.sleep(0.01)


def command(said, *argv):
    "In a child: run the command, which writes into a file and hangs at its first story."
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    cli._story = hang
    sys.exit(cli.main(argv))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_quits_at_once(config, start, tmp_path, number, code):
    run, said = train(replace(config, max_steps=14)), tmp_path / "said"
    said.touch()
    child = start(command, str(said), "train", "--resume", str(run), "--max_steps", "60")
    wait(lambda: b"hangs" in said.read_bytes(), child)
    os.kill(child.pid, number)
    wait(lambda: b"once more to quit at once" in said.read_bytes(), child)
    os.kill(child.pid, number)
    child.join(PATIENCE)
    assert child.exitcode == code and "Traceback" not in said.read_text(encoding="utf-8")
    assert newest(run) == 14, "it was told to quit, not to save"


# --- 10: two writers


def hold(config, path):
    "In a child: train until the first evaluation, then leave a mark and hang."
    def mark(model, tokenizer, step):
        Path(path).write_text("", encoding="utf-8")
        hang()

    torch.set_num_threads(1)
    train(config, mark)


def test_two_writers(config, start, tmp_path):
    "The second is told who holds the run; the lock of one that was killed is none."
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    mark = tmp_path / "mark"
    child = start(hold, config, mark)
    wait(mark.exists, child)
    before = contents(config.run_dir)
    for second in (lambda: resume(config.run_dir), lambda: train(config)):
        with pytest.raises(InputError, match=re.escape(f"in use by process {child.pid} on ")):
            second()
    assert contents(config.run_dir) == before
    child.kill()
    child.join()
    resume(config.run_dir, tell)
    assert result(config.run_dir) == result(straight)


def test_a_file_system_without_locks_is_told(config, monkeypatch, capfd):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = train(replace(config, max_steps=14))
    assert f"{run}: no locks on this file system (No locks available); see that no other" in capfd.readouterr().err


def test_a_run_is_read_while_it_is_written(config, start, tmp_path):
    mark = tmp_path / "mark"
    child = start(hold, config, mark)
    wait(mark.exists, child)
    load_run(config.run_dir)
    child.kill()


# --- 11: file modes


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_modes_of_the_umask(config):
    old = os.umask(0o027)
    try:
        run = train(replace(config, max_steps=14), tell)
    finally:
        os.umask(old)
    modes = {path.is_dir(): set() for path in run.rglob("*")}
    for path in (run, *run.rglob("*")):
        modes[path.is_dir()].add(path.stat().st_mode & 0o777)
    assert modes == {True: {0o750}, False: {0o640}}
