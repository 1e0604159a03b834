"""Several processes under torchrun train as one does, write as one, and end or start again together when one dies."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny import checkpoints, metrics, one_thread, tell  # noqa: F401

import tinylm.train
from tinylm import cli
from tinylm.core import InputError
from tinylm.distributed import process_group, rank
from tinylm.train import Diverged, Stopped, TrainConfig, forecast, load_run, train

CLOSE = {"rtol": 0, "atol": 1e-5}  # nats per token: sums are made in another order
STEPS = 24
MUON = {"optimizer": "muon", "schedule": "linear", "min_lr": 0.0, "windows": "stories"}


def torchrun(processes, *arguments, restarts=0, look_every=0.1):
    """Start this file in several processes by torchrun; returns what became of the job.

    When torchrun, which looks every so many seconds, sees that one is dead, it ends the others by SIGTERM."""
    launch = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
              f"--monitor-interval={look_every}", *arguments]
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, launch)], text=True,
                           encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = job.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun ends its processes first
        said = job.communicate()
    return subprocess.CompletedProcess(job.args, job.returncode, *said)


# --- what runs in each process


def runs_of(base, folder):
    "The runs that two processes make one after the other."
    def config(name, **changes):
        return replace(base, run_dir=str(folder / name), **changes)

    return {
        "ddp": lambda: train(config("ddp"), tell),
        "fsdp": lambda: train(config("fsdp", fsdp=True, grad_accum_steps=2, max_steps=8), tell),
        "half": lambda: train(config("half", fsdp=True), tell),
        "muon": lambda: train(config("muon", fsdp=True, max_steps=16, **MUON)),
        "odd": lambda: train(config("odd", batch_size=3)),
        "signal": lambda: train(config("signal")),
        "clock": lambda: train(config("clock", max_minutes=5)),
        "poison": lambda: train(config("poison")),
        "full": lambda: train(config("full")),
        "plan": lambda: print(forecast(config("plan", fsdp=True))),
    }


def full(descriptor):
    raise OSError(28, "No space left on device")


def several(folder):
    "Make the runs; leave what became of each, and what was written, as rank-N.json."
    folder, written, ends, rows = Path(folder), set(), {}, set()
    real = tinylm.train.train_step

    def note(event, arguments):
        writes = event.startswith("os.") or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(arguments[0], (str, os.PathLike)) and event not in ("os.listdir", "os.scandir"):
            written.add(str(arguments[0]))

    def in_trouble(model, optimizer, batch, config, step):
        rows.add(len(batch[0]))
        match step, rank(), Path(str(config.run_dir)).name:  # what befalls one of the two before step 9
            case 9, 1, "signal":
                signal.raise_signal(signal.SIGTERM)
            case 9, 1, "clock":
                patch.setattr("time.monotonic", lambda: math.inf)
            case 9, 1, "poison":
                model.module.layers[0].ffn.w1.weight.data[0, 0] = math.inf
            case 9, 0, "full":
                patch.setattr("os.fsync", full)
        return real(model, optimizer, batch, config, step)

    sys.addaudithook(note)
    with process_group():
        for name, run in runs_of(TrainConfig(**json.loads((folder / "base.json").read_text("utf-8"))), folder).items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tinylm.train, "train_step", in_trouble if name != "plan" else real)
                try:
                    run()
                    ends[name] = f"done {name}"
                except (InputError, Stopped, Diverged, OSError) as error:
                    ends[name] = f"{type(error).__name__}: {error}"
        me = rank()
    report = {"ends": ends, "rows": list(rows), "written": [path for path in written if path.startswith(str(folder))]}
    (folder / f"rank-{me}.json").write_text(json.dumps(report), encoding="utf-8")


def mortal(config):
    "Train; the second process is killed in step 9, the first time."
    real = tinylm.train.train_step

    def deadly(model, optimizer, batch, config, step):
        if step == 9 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(model, optimizer, batch, config, step)

    tinylm.train.train_step = deadly
    try:
        train(TrainConfig(**json.loads(config)), tell)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    from tinylm.distributed import leave

    leave(globals()[sys.argv[1]](*sys.argv[2:]) or 0)


# --- what must be


@pytest.fixture(scope="module")
def short(base):
    "A config of 24 steps."
    return replace(base, cosine_cycle_iters=STEPS, eval_every=8, num_layers=2, watch=True)


@pytest.fixture(scope="module")
def alone(short, tmp_path_factory):
    "The run of one process."
    return train(replace(short, run_dir=str(tmp_path_factory.mktemp("alone") / "run")), tell)


@pytest.fixture(scope="module")
def two(short, tmp_path_factory):
    "What two processes left: their folder, the report of each, and what they said."
    folder = tmp_path_factory.mktemp("two")
    (folder / "base.json").write_text(json.dumps(asdict(short)), encoding="utf-8")
    train(replace(short, run_dir=str(folder / "half"), max_steps=8), tell)
    job = torchrun(2, __file__, "several", folder)
    assert job.returncode == 0, job.stderr
    return folder, [json.loads((folder / f"rank-{i}.json").read_text(encoding="utf-8")) for i in range(2)], job.stdout


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
    assert (two[0] / "ddp" / "samples.txt").read_text(encoding="utf-8").count("=== step") == 3
    for name in ("ddp", "half"):
        for kind in ("activations", "gradients", "updates"):  # what is watched
            expected = pytest.approx(metrics(alone)[-1][kind], rel=2e-3)
            assert metrics(two[0] / name)[-1][kind] == expected, (name, kind)


def test_fsdp_stopped_goes_on_with_one_process(two, short, alone):
    "The batch of its first steps was in pieces, which changes no number but the last digits."
    run = two[0] / "fsdp"
    assert checkpoints(run)[-1].name == "step-00000008"
    assert_same(train(replace(short, run_dir=str(run), grad_accum_steps=2), tell), alone)


def test_one_process_stopped_goes_on_with_fsdp(two, alone):
    "What tells the stories is the whole model."
    assert_same(two[0] / "half", alone)
    said, expected = (re.findall(r"after step .*", (run / "samples.txt").read_text("utf-8"))
                      for run in (two[0] / "half", alone))
    assert [line.split()[2] for line in said] == [line.split()[2] for line in expected]
    for one, other in zip(said, expected, strict=True):
        assert float(one.split()[3]) == pytest.approx(float(other.split()[3]), rel=1e-5)


def test_muon_by_fsdp_stopped_goes_on_with_one_process(two, short, tmp_path):
    config = replace(short, **MUON)
    assert_same(train(replace(config, run_dir=str(two[0] / "muon"))), train(replace(config, run_dir=str(tmp_path))))


@pytest.mark.parametrize("name, end", [
    ("odd", "InputError: batch_size 3 must be a multiple of 2: processes x grad_accum_steps"),
    ("signal", "Stopped: stopped by SIGTERM; go on with --resume"),
    ("clock", "done clock"),
    ("poison", "Diverged: training diverged at step 9: loss nan"),
    ("full", "No space left on device"),
    ("plan", "done plan"),
])
def test_what_befalls_one_stops_all(two, name, end):
    for report in two[1]:
        assert end in report["ends"][name]
    saved = {"signal": 9, "clock": 9, "poison": 7, "full": 7}.get(name)
    assert saved is None or checkpoints(two[0] / name)[-1].name == f"step-{saved:08d}"


def test_rank_0_alone_writes_and_speaks_and_each_takes_its_share(two):
    first, second = (report["written"] for report in two[1])
    assert {str(two[0] / name) for name in ("ddp", "ddp/metrics.jsonl", "fsdp/.lock")} <= set(first)
    assert second == []
    assert two[2].count("--- after step 24:") == 2  # of the runs ddp and half
    assert two[2].count("seconds a step") == 1  # of the forecast
    assert [report["rows"] for report in two[1]] == [[2], [2]]


def test_a_stray_rank_silences_nobody(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["--version"]) == 0 and "tinylm" in capsys.readouterr().out


def test_one_killed_ends_all_and_torchrun_starts_the_job_again(short, alone, tmp_path):
    job = torchrun(2, __file__, "mortal", json.dumps(asdict(replace(short, run_dir=str(tmp_path / "run")))),
                   restarts=1, look_every=5)  # time to speak
    assert job.returncode == 0, job.stderr
    assert "another process of this job has died; go on with --resume" in job.stderr
    assert_same(tmp_path / "run", alone)
