"""Several processes under torchrun train as one does, write as one, and end or start again together when one dies."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_train import one_thread  # noqa: F401
from tiny import checkpoints, metrics, tell

import tinylm.train
from tinylm import cli
from tinylm.data import InputError
from tinylm.distributed import joined, rank
from tinylm.train import Diverged, Stopped, TrainConfig, load_run, resume, train

CLOSE = {"rtol": 0, "atol": 1e-5}  # nats per token: sums are made in another order
STEPS = 24


def torchrun(processes, *arguments, restarts=0):
    "Start this file in several processes by torchrun; returns what became of the job."
    launch = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}", __file__, *arguments]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, launch)], capture_output=True,
                          text=True, encoding="utf-8", timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- what runs in each process


def runs_of(base, folder):
    "The runs that two processes make one after the other; the file system and the signals play them tricks."
    run = {name: replace(base, run_dir=str(folder / name)) for name in
           ("ddp", "fsdp", "odd", "signal", "poison", "full")}
    return [
        lambda: train(replace(run["ddp"], watch=True), tell),
        lambda: train(replace(run["fsdp"], fsdp=True, grad_accum_steps=2, max_steps=8), tell),
        lambda: resume(folder / "half", tell, max_steps=STEPS, changes={"fsdp": True}),
        lambda: train(replace(run["odd"], batch_size=3)),
        lambda: train(run["signal"], tell),
        lambda: train(run["poison"]),
        lambda: train(run["full"]),
    ]


def trouble(config, step):
    "In process 1: a signal, or a loss that is no number. In process 0: a disk that is full."
    if "signal" in config.run_dir and rank() == 1 and step == 9:
        signal.raise_signal(signal.SIGTERM)
    if "full" in config.run_dir and rank() == 0 and step == 9:
        def full(descriptor):
            raise OSError(28, "No space left on device")
        os.fsync = full
    return math.nan if "poison" in config.run_dir and rank() == 1 and step == 9 else 1


def several(folder):
    "Make the runs; leave what became of each, and which files were opened to write, as rank-N.json."
    folder, written, ends = Path(folder), set(), []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path, mode, flags = arguments
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR) and Path(path).is_relative_to(folder):
                written.add(str(Path(path).relative_to(folder)))

    sys.addaudithook(note)
    real = tinylm.train._add_gradients

    def add_gradients(model, batch, config):
        step = round(tinylm.train.now)
        return real(model, batch, config) * trouble(config, step)

    def take_step(run, real=tinylm.train._take_step):
        tinylm.train.now = run.step
        real(run)

    tinylm.train._add_gradients, tinylm.train._take_step = add_gradients, take_step
    with joined():
        for run in runs_of(TrainConfig(**json.loads((folder / "base.json").read_text(encoding="utf-8"))), folder):
            try:
                ends.append(["done", run().name])
            except (InputError, Stopped, Diverged, OSError) as error:
                ends.append([type(error).__name__, str(error)])
        me = rank()
    report = {"ends": ends, "written": sorted(written)}
    (folder / f"rank-{me}.json").write_text(json.dumps(report), encoding="utf-8")


def command(mortal, *argv):
    "Run `tinylm`; the process with this number is killed in step 9, the first time."
    real = tinylm.train.train_step

    def deadly(model, optimizer, batch, config, step):
        if step == 9 and os.environ["RANK"] == mortal and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(model, optimizer, batch, config, step)

    tinylm.train.train_step, cli._story = deadly, tell
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))


# --- what must be


@pytest.fixture(scope="module")
def short(base):
    "A config of 24 steps."
    return replace(base, cosine_cycle_iters=STEPS, eval_every=8, num_layers=2)


@pytest.fixture(scope="module")
def alone(short, tmp_path_factory):
    "The run of one process."
    return train(replace(short, run_dir=str(tmp_path_factory.mktemp("alone") / "run")), tell)


@pytest.fixture(scope="module")
def two(short, tmp_path_factory):
    "What two processes left: their folder, and the report of each."
    folder = tmp_path_factory.mktemp("two")
    (folder / "base.json").write_text(json.dumps(asdict(short)), encoding="utf-8")
    train(replace(short, run_dir=str(folder / "half"), max_steps=8), tell)
    job = torchrun(2, "several", folder)
    assert job.returncode == 0, job.stderr
    return folder, [json.loads((folder / f"rank-{i}.json").read_text(encoding="utf-8")) for i in range(2)]


def assert_same(run, alone):
    "The log has the same lines, with the same losses; the weights are the same too."
    rows, expected = metrics(run), metrics(alone)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for key in ("train_loss", "val_loss", "grad_norm", "lr", "tokens"):
        found, wanted = ([row[key] for row in some if row[key] is not None] for some in (rows, expected))
        np.testing.assert_allclose(found, wanted, **CLOSE)
    weights = [load_run(path)[0].state_dict() for path in (run, alone)]
    for name, value in weights[1].items():
        np.testing.assert_allclose(weights[0][name], value, rtol=0, atol=1e-4)


def test_two_processes_give_the_losses_of_one(two, alone):
    assert_same(two[0] / "ddp", alone)
    assert (two[0] / "ddp" / "samples.txt").read_text(encoding="utf-8").count("===") == 2 * 3


def test_two_processes_watch_what_one_does(two, short, tmp_path):
    watched = train(replace(short, watch=True, run_dir=str(tmp_path / "run")))
    last, expected = metrics(two[0] / "ddp")[-1], metrics(watched)[-1]
    for kind in ("activations", "gradients", "updates"):
        for part, value in expected[kind].items():
            assert last[kind][part] == pytest.approx(value, rel=2e-3), (kind, part)


def test_fsdp_stopped_goes_on_with_one_process(two, alone):
    "Also with the batch in pieces."
    assert checkpoints(two[0] / "fsdp")[-1].name == "step-00000008"
    assert_same(resume(two[0] / "fsdp", tell, max_steps=STEPS), alone)


def test_one_process_stopped_goes_on_with_fsdp(two, alone):
    assert_same(two[0] / "half", alone)


def test_a_signal_to_one_process_stops_all_at_the_same_step(two):
    assert checkpoints(two[0] / "signal")[-1].name == "step-00000009"
    for report in two[1]:
        assert [end[0] for end in report["ends"][:3]] == ["done"] * 3
        assert report["ends"][4] == ["Stopped", f"stopped by SIGTERM; go on with --resume {two[0] / 'signal'}"]


def test_divergence_in_one_process_stops_all_before_the_update(two):
    for report in two[1]:
        kind, message = report["ends"][5]
        assert kind == "Diverged" and "at step 9: loss nan" in message
    last = metrics(two[0] / "poison")[-1]
    assert last["diverged"] and len(last["divergence"]["windows"]) == 4


def test_what_fails_in_rank_0_fails_in_all(two):
    for report in two[1]:
        assert "No space left" in report["ends"][6][1]


def test_a_batch_that_cannot_be_shared_is_refused(two):
    for report in two[1]:
        assert report["ends"][3] == ["InputError", "batch_size 3 must be a multiple of 2: processes x grad_accum_steps"]
    assert not (two[0] / "odd").exists()


def test_rank_0_alone_writes(two):
    first, second = (report["written"] for report in two[1])
    assert "ddp/metrics.jsonl" in first and "fsdp/.lock" in first
    assert second == ["rank-1.json"] or second == []


def test_fsdp_alone_is_refused(short, tmp_path):
    with pytest.raises(InputError, match="start them with torchrun"):
        train(replace(short, fsdp=True, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_job_that_starts_again_needs_a_name(short, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="--max-restarts needs --run_dir"):
        train(short)


def flags(config, **changes):
    "Spell a config as flags of the command."
    given = asdict(replace(config, **changes)).items()
    return [part for name, value in given if value != getattr(TrainConfig, name) for part in (f"--{name}", value)]


def test_four_processes_by_the_command(short, alone, tmp_path):
    job = torchrun(4, "command", "none", "train", *flags(short, run_dir=tmp_path / "run"))
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("The run lies in") == job.stdout.count("training ") == 1
    assert_same(tmp_path / "run", alone)


def test_one_killed_ends_the_job_and_the_run_goes_on(short, alone, tmp_path):
    job = torchrun(2, "command", "1", "train", *flags(short, run_dir=tmp_path / "run"))
    assert job.returncode != 0
    assert job.stderr.count("tinylm: another process of this job has died; go on with --resume") == 1
    assert_same(resume(tmp_path / "run"), alone)


def test_one_killed_and_torchrun_starts_the_job_again(short, alone, tmp_path):
    job = torchrun(2, "command", "0", "train", *flags(short, run_dir=tmp_path / "run"), restarts=1)
    assert job.returncode == 0, job.stderr
    assert_same(tmp_path / "run", alone)
