"""Several processes under torchrun train as one does, write as one, and end or start again together when one dies."""
import json
import math
import os
import re
import shutil
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
from tinylm.model import num_parameters
from tinylm.train import Diverged, Stopped, TrainConfig, forecast, load_run, resume, train

CLOSE = {"rtol": 0, "atol": 1e-5}  # nats per token: sums are made in another order
STEPS = 24


def torchrun(processes, *arguments, restarts=0, look_every=0.1):
    """Start this file in several processes by torchrun; returns what became of the job.

    When torchrun, which looks every so many seconds, sees that one is dead, it ends the others by SIGTERM."""
    launch = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
              f"--monitor-interval={look_every}", __file__, *arguments]
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, launch)], text=True,
                           encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = job.communicate(timeout=90)
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
        "ddp": lambda: train(config("ddp", watch=True), tell),
        "fsdp": lambda: train(config("fsdp", fsdp=True, grad_accum_steps=2, max_steps=8), tell),
        "half": lambda: resume(folder / "half", tell, max_steps=STEPS, changes={"fsdp": True, "watch": True}),
        "odd": lambda: train(config("odd", batch_size=3)),
        "signal": lambda: train(config("signal")),
        "clock": lambda: train(config("clock", max_minutes=5)),
        "poison": lambda: train(config("poison")),
        "full": lambda: train(config("full")),
        "plan": lambda: plan(config("plan", fsdp=True), config("plan")),
    }


def plan(*configs):
    "Foresee runs of two processes; the path that is returned tells the sizes of gradients in them."
    foreseen = [forecast(config, budget=0) for config in configs]
    assert all("shared by 2 processes" in str(it) for it in foreseen) and "gathered to save" in str(foreseen[0])
    return Path("-".join(str(it.memory["gradients"] // num_parameters(it.config)) for it in foreseen))


def trouble(run, patch):
    "What befalls one of two processes before step 9: a signal, the end of its time, a spoiled weight, a full disk."
    def full(descriptor):
        raise OSError(28, "No space left on device")

    match run.folder.name, rank():
        case "signal", 1:
            signal.raise_signal(signal.SIGTERM)
        case "clock", 1:
            patch.setattr("time.monotonic", lambda: math.inf)
        case "poison", 1:
            run.model.layers[0].ffn.w1.weight.data[0, 0] = math.inf
        case "full", 0:
            patch.setattr("os.fsync", full)


def several(folder):
    "Make the runs; leave what became of each, and what was written, as rank-N.json."
    folder, written, ends, rows = Path(folder), set(), {}, set()
    batch_of_step, take_step = tinylm.train._batch_of_step, tinylm.train._take_step

    def note(event, arguments):
        writes = event.startswith("os.") or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(arguments[0], (str, os.PathLike)) and event not in ("os.listdir", "os.scandir"):
            written.add(str(arguments[0]))

    def batch_counted(*arguments):
        batch = batch_of_step(*arguments)
        rows.add(len(batch[0]))
        return batch

    def take_step_in_trouble(run):
        if run.step == 9:
            trouble(run, patch)
        take_step(run)

    sys.addaudithook(note)
    with joined():
        for name, run in runs_of(TrainConfig(**json.loads((folder / "base.json").read_text("utf-8"))), folder).items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tinylm.optim._adamw_update", None)  # the compiled loop takes the parts, too
                patch.setattr(tinylm.train, "_batch_of_step", batch_counted)
                patch.setattr(tinylm.train, "_take_step", take_step_in_trouble)
                try:
                    ends[name] = f"done {run().name}"
                except (InputError, Stopped, Diverged, OSError) as error:
                    ends[name] = f"{type(error).__name__}: {error}"
        me = rank()
    report = {"ends": ends, "rows": list(rows), "written": [path for path in written if path.startswith(str(folder))]}
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
    from tinylm.distributed import leave

    leave(globals()[sys.argv[1]](*sys.argv[2:]) or 0)


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
    "What two processes left: their folder, the report of each, and what they said."
    folder = tmp_path_factory.mktemp("two")
    (folder / "base.json").write_text(json.dumps(asdict(short)), encoding="utf-8")
    train(replace(short, run_dir=str(folder / "half"), max_steps=8), tell)
    job = torchrun(2, "several", folder)
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


def test_two_processes_watch_what_one_does(two, short, tmp_path):
    expected = metrics(train(replace(short, watch=True, run_dir=str(tmp_path / "run"))))[-1]
    for name in ("ddp", "half"):
        last = metrics(two[0] / name)[-1]
        for kind in ("activations", "gradients", "updates"):
            assert last[kind] == pytest.approx(expected[kind], rel=2e-3), (name, kind)


def test_fsdp_stopped_goes_on_with_one_process(two, alone):
    "Also with the batch in pieces."
    assert checkpoints(two[0] / "fsdp")[-1].name == "step-00000008"
    assert_same(resume(two[0] / "fsdp", tell, max_steps=STEPS), alone)


def test_one_process_stopped_goes_on_with_fsdp(two, alone):
    "What tells the stories is the whole model."
    assert_same(two[0] / "half", alone)
    said, expected = (re.findall(r"after step .*", (run / "samples.txt").read_text("utf-8"))
                      for run in (two[0] / "half", alone))
    assert [line.split()[2] for line in said] == [line.split()[2] for line in expected]
    for one, other in zip(said, expected, strict=True):
        assert float(one.split()[3]) == pytest.approx(float(other.split()[3]), rel=1e-5)


@pytest.mark.parametrize("name, end", [
    ("odd", "InputError: batch_size 3 must be a multiple of 2: processes x grad_accum_steps"),
    ("signal", "Stopped: stopped by SIGTERM; go on with --resume"),
    ("clock", "done clock"),
    ("poison", "Diverged: training diverged at step 9: loss nan"),
    ("full", "No space left on device"),
    ("plan", "done 2-8"),
])
def test_what_befalls_one_stops_all(two, name, end):
    for report in two[1]:
        assert end in report["ends"][name]
    saved = {"signal": 9, "clock": 9, "poison": 7, "full": 7}.get(name)
    assert saved is None or checkpoints(two[0] / name)[-1].name == f"step-{saved:08d}"


def test_rank_0_alone_writes(two):
    first, second = (report["written"] for report in two[1])
    assert {str(two[0] / name) for name in ("ddp", "ddp/metrics.jsonl", "fsdp/.lock")} <= set(first)
    assert second == []


def test_rank_0_alone_speaks(two):
    assert two[2].count("--- after step 24:") == 2  # of the runs ddp and half


def test_each_takes_its_share_of_the_batch(two):
    assert [report["rows"] for report in two[1]] == [[2], [2]]


def test_rank_0_alone_opens_a_tracker(short, tmp_path, monkeypatch):
    monkeypatch.setattr(tinylm.train, "rank", lambda: 1)
    tinylm.train._tracker(replace(short, tracker="wandb"), tmp_path, 0)({"step": 1})


def test_fsdp_alone_is_refused(short, tmp_path):
    with pytest.raises(InputError, match="start them with torchrun"):
        train(replace(short, fsdp=True, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_job_that_starts_again_needs_a_name(short, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="--max-restarts needs --run_dir"):
        train(short)


def test_a_stray_rank_silences_nobody(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["--version"]) == 0 and "tinylm" in capsys.readouterr().out


def flags(config, **changes):
    "Spell a config as flags of the command."
    given = asdict(replace(config, **changes)).items()
    return [part for name, value in given if value != getattr(TrainConfig, name) for part in (f"--{name}", value)]


def test_four_processes_by_the_command(short, alone, tmp_path):
    job = torchrun(4, "command", "none", "train", *flags(short, run_dir=tmp_path / "run"))
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("The run lies in") == job.stdout.count("training ") == 1
    assert_same(tmp_path / "run", alone)


def test_two_processes_stopped_go_on_with_four_by_the_command(two, alone, tmp_path):
    "And with FSDP instead of DDP."
    run = shutil.copytree(two[0] / "signal", tmp_path / "run")
    assert [path.name for path in checkpoints(run)] == ["step-00000007", "step-00000009"]
    job = torchrun(4, "command", "none", "train", "--resume", run, "--fsdp")
    assert job.returncode == 0, job.stderr
    assert_same(run, alone)


def test_one_killed_ends_the_job_and_the_run_goes_on(short, alone, tmp_path):
    job = torchrun(2, "command", "1", "train", *flags(short, run_dir=tmp_path / "run"), look_every=10)  # time to speak
    assert job.returncode != 0
    assert job.stderr.count("tinylm: another process of this job has died; go on with --resume") == 1
    assert_same(resume(tmp_path / "run"), alone)


def test_one_killed_and_torchrun_starts_the_job_again(short, alone, tmp_path):
    job = torchrun(2, "command", "0", "train", *flags(short, run_dir=tmp_path / "run"), restarts=1)
    assert job.returncode == 0, job.stderr
    assert_same(tmp_path / "run", alone)
