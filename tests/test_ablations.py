"""Sweeps that are interrupted, lose workers or crash; a real Dask cluster; and bugs that `compare` must find."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import tinylm.model
import tinylm.optim
import tinylm.rope
import tinylm.train
from tinylm.ablations import (
    BASE,
    Plan,
    Result,
    compare_run,
    differences,
    load_plans,
    local_executor,
    lr_sensitivity,
    paired_difference,
    plot_forest,
    results_table,
    run_here,
    run_name,
    run_on_dask,
    t_quantile,
)
from tinylm.cli import main
from tinylm.data import END_OF_TEXT, InputError, fables
from tinylm.train import PRESETS, prepare, train

posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes work otherwise on Windows")


def test_a_lucky_single_run_is_no_baseline():
    losses = {("baseline", 0.01): [2.0, 2.1, 2.2], ("baseline", 0.02): [1.9], ("nope", 0.01): [2.5, 2.5, 2.8]}
    results = [Result(variant, lr, seed, {"diverged_at_step": None, "curve": [{"val_loss": loss}]})
               for (variant, lr), group in losses.items() for seed, loss in enumerate(group)]
    assert differences(results)["nope", 0.01].values == pytest.approx([0.5, 0.4, 0.6])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A config whose runs take a second or two, with its data prepared."
    folder = tmp_path_factory.mktemp("tiny")
    text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(300, seed=0))
    (folder / "tales.txt").write_text(text, encoding="utf-8")
    config = replace(
        PRESETS["debug"], data_dir=str(folder / "data"), corpus=str(folder / "tales.txt"), vocab_size=300,
        context_length=32, d_model=16, d_ff=48, cosine_cycle_iters=200, checkpoint_every=20, eval_every=100,
        eval_windows=4,
    )  # fmt: skip
    prepare(config)
    return config


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, f"ended early: {process.communicate()}"
        time.sleep(0.02)


def curves(folder: Path) -> dict[str, list]:
    "What the records of a folder say, without the clock."
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    clock = ("seconds", "tokens_per_second")
    return {name: [{k: v for k, v in row.items() if k not in clock} for row in r["curve"]] for name, r in read.items()}


FIELDS = ("data_dir", "corpus", "vocab_size", "context_length", "d_model", "d_ff", "cosine_cycle_iters",
          "checkpoint_every", "eval_every", "eval_windows")  # what the config of `tiny` changes


def flags(config, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", str(getattr(config, name)))]


@posix
def test_a_search_stopped_by_ctrl_c_goes_on_exactly_where_it_was(tiny, tmp_path):
    command = [sys.executable, "-m", "tinylm.cli", "search", "--preset", "debug", *flags(tiny, *FIELDS),
               "--lrs", "0.01,0.02", "--seeds", "0", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command goes on" in said, said
    assert list(tmp_path.glob("runs/*/checkpoints/step-*")) and len(curves(tmp_path)) < 2

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "| baseline | 0.02 | 1    | 0 " in again.stdout and "best lr" in again.stdout
    assert not list((tmp_path / "runs").iterdir())
    undisturbed = train(replace(tiny, lr=0.01, seed=0, run_dir=str(tmp_path / "undisturbed")))
    lines = (undisturbed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    name = run_name(replace(tiny, lr=0.01, seed=0))
    assert [row["train_loss"] for row in curves(tmp_path)[name]] == losses


def test_one_and_one_point_nought_are_one_run():
    assert run_name(replace(BASE, lr=1)) == run_name(replace(BASE, lr=1.0)) == run_name(replace(BASE, lr=np.float32(1)))


def test_a_plan_begins_with_the_preset_that_it_names(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": {"base": {"preset": "debug", "lr": 0.5}}, "b": {}}', encoding="utf-8")
    plans = load_plans(tmp_path / "plan.json")
    assert plans["a"].base == replace(PRESETS["debug"], lr=0.5) and plans["b"].base == BASE
    (tmp_path / "plan.json").write_text('{"a": {"base": {"max_steps": 2.5}}}', encoding="utf-8")
    with pytest.raises(InputError, match="max_steps is 2.5; expected a whole number"):
        load_plans(tmp_path / "plan.json")


def test_nothing_to_run_is_a_plain_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    for argv, words in ((["ablate", "--plan", "plan.json"], "plan.json: holds no plan"),
                        (["ablate", "--seeds", ""], "--seeds is empty"),
                        (["search", "--lrs", "0.1", "--seeds", ""], "--seeds is empty")):
        assert main(argv) == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_workers_are_as_many_as_the_cores_that_we_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with local_executor() as pool:
            assert pool._max_workers == 1
    finally:
        os.sched_setaffinity(0, allowed)


@posix
def test_the_death_of_a_worker_costs_no_other_run(tiny, tmp_path, monkeypatch):
    import multiprocessing
    import threading

    def kill_one():
        wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    plan = Plan(tiny, ("baseline",), lrs=(0.01, 0.02, 0.03))
    failures = run_here([run.config for run in plan.search()], tmp_path, jobs=2)
    killer.join()
    assert not failures and len(curves(tmp_path)) == 3


def test_a_run_that_kills_its_worker_every_time_is_given_up_after_the_others(tiny, tmp_path):
    poison = replace(tiny, corpus=str(tmp_path / "poison.txt"))
    (tmp_path / "poison.txt").write_text("", encoding="utf-8")
    code = ("import os, tinylm.ablations as a; old = a._train_or_resume\n"
            "def die(config, run_dir):\n    run_dir.mkdir(parents=True, exist_ok=True)\n"
            "    os._exit(9) if 'poison' in config.corpus else old(config, run_dir)\n"
            "a._train_or_resume = die\n")
    (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    script = ("import sys, json, tinylm.ablations as a; from tinylm.train import TrainConfig\n"
              "if __name__ == '__main__':\n"
              "    configs = [TrainConfig(**c) for c in json.loads(sys.argv[1])]\n"
              "    print(*a.run_here(configs, sys.argv[2], jobs=1))\n")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    configs = json.dumps([vars(config) for config in (poison, replace(tiny, max_steps=20))])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), configs, str(tmp_path / "records")],
                          capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.splitlines()[-1] == run_name(poison), done.stdout + done.stderr
    assert list(curves(tmp_path / "records")) == [run_name(replace(tiny, max_steps=20))]


@posix
def test_dask_keeps_every_run_when_a_worker_is_killed(tiny, tmp_path):
    pytest.importorskip("distributed", reason="Dask is optional: pip install distributed")
    processes = []

    def start(*words):
        processes.append(subprocess.Popen([sys.executable, "-m", *words], cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          env=os.environ | {"OMP_NUM_THREADS": "2"}))
        return processes[-1]

    try:
        start("distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", "scheduler.json")
        wait_for((tmp_path / "scheduler.json").exists, processes[0])
        address = json.loads((tmp_path / "scheduler.json").read_text(encoding="utf-8"))["address"]
        workers = [start("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
                         "--local-directory", str(tmp_path / f"worker{i}")) for i in range(2)]
        import threading

        def kill_one():
            wait_for(lambda: list(tmp_path.glob("records/runs/*/checkpoints/step-*")))
            workers[0].kill()

        killer = threading.Thread(target=kill_one)
        killer.start()
        command = ["ablate", "--preset", "debug", *flags(tiny, *FIELDS), "--variants", "baseline,nope",
                   "--lrs", "0.01,0.02", "--seeds", "", "--out", str(tmp_path / "records"), "--dask", address]
        assert main(command) == 0
        killer.join()
        made = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "records").glob("*.json")]
        assert len(made) == 4 and {record["environment"]["threads"] for record in made} == {1}
        (tmp_path / "gone.txt").write_text("gone", encoding="utf-8")
        lost = main([*command, "--corpus", str(tmp_path / "gone.txt")])
        assert lost == 1  # runs without a record
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_no_scheduler_is_a_plain_mistake(tiny, tmp_path):
    pytest.importorskip("distributed", reason="Dask is optional: pip install distributed")
    for address in ("tcp://127.0.0.1:9", "nowhere"):
        with pytest.raises(InputError, match="no Dask scheduler"):
            run_on_dask([tiny], tmp_path, address)


def test_t_quantile_inverts_the_integral_of_the_density():
    for df in (1, 2, 3, 4, 9, 30):
        t = t_quantile(0.95, df)
        x = np.linspace(-t, t, 200_001)
        density = (1 + x**2 / df) ** (-(df + 1) / 2)
        wide = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 400_001)[1:-1])
        whole = np.trapezoid((1 + wide**2 / df) ** (-(df + 1) / 2), wide) if df > 1 else np.pi
        assert np.trapezoid(density, x) / whole == pytest.approx(0.95, abs=1e-6)


def test_one_seed_has_no_interval_and_a_divergence_no_mean():
    assert paired_difference({0: 2.0}, {0: 1.0}).half_width == np.inf
    lost = paired_difference({0: np.inf, 1: 2.0, 2: 2.1}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert lost.diverged == 1 and lost.values == (1.0, 1.1) and np.isnan(lost.mean) and lost.half_width == np.inf


def test_a_forest_plot_counts_the_runs_that_diverged_and_averages_no_others():
    losses = {"baseline": [2.0, 2.1, 2.2], "nope": [2.5, 2.5, 2.8], "no-norm": [np.inf, 2.4, np.inf]}
    results = [Result(variant, 0.01, seed, {"diverged_at_step": 9 if np.isinf(loss) else None,
                                            "curve": [{"val_loss": loss}]})
               for variant, group in losses.items() for seed, loss in enumerate(group)]
    axis = plot_forest(results, Figure().add_subplot())
    assert len(axis.containers) == 1  # one mean with its interval, that of nope
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [len(line.get_xdata()) for line in crosses] == [2]
    assert [text.get_text() for text in axis.texts] == ["2 of 3 diverged"]
    table = results_table(results).splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[3:-1]] == ["3", "2", "", "", ""]


def test_sensitivity_needs_no_even_rates():
    even = {10.0**-k: abs(k - 3.0) for k in (1, 2, 3, 4, 5)}
    finer = {10.0**-k: abs(k - 3.0) for k in (1, 1.5, 2, 3, 3.25, 4, 5)}
    assert lr_sensitivity(even, 9) == pytest.approx(1) == pytest.approx(lr_sensitivity(finer, 9))


# `compare`: bugs that a model can live with


@pytest.fixture(scope="module")
def debug(tmp_path_factory):
    "The debug preset, cut at half its length, with its data prepared once."
    config = replace(PRESETS["debug"], data_dir=str(tmp_path_factory.mktemp("fables")), max_steps=20)
    prepare(config)
    with pytest.MonkeyPatch.context() as patch:  # the loss on whole stories takes seconds, and nobody reads it here
        patch.setattr(tinylm.train, "evaluate_stories", lambda *_: (1.0, 1, 1))
        yield config


def no_mask(monkeypatch):
    monkeypatch.setattr(tinylm.model, "_causal_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v))


def half_split_pairs(monkeypatch):
    def forward(self, x, token_positions=None):
        cos, sin = self._rows(x, token_positions)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    monkeypatch.setattr(tinylm.rope.RotaryPositionalEmbedding, "forward", forward)


def no_bias_correction(monkeypatch):
    right = tinylm.optim.AdamW._remember
    late = {"step": 10**9}  # so late in training there is nothing left to correct
    monkeypatch.setattr(tinylm.optim.AdamW, "_remember", lambda self, p: right(self, p) | late)


def unshuffled(monkeypatch):
    def in_order(tokens, config, step, device):
        starts = ((step - 1) * config.batch_size + np.arange(config.batch_size)) * config.context_length
        return tinylm.train._windows(tokens, starts, config.context_length, device)

    monkeypatch.setattr(tinylm.train, "_batch_of_step", in_order)


@pytest.mark.parametrize("seed", [0, 11])  # with and without a reference
@pytest.mark.parametrize("bug, where", [
    (no_mask, "at step 0"), (half_split_pairs, "at step 5"), (no_bias_correction, "at step 5"),
    (unshuffled, "at step 5"),
])
def test_compare_finds_a_planted_bug(debug, tmp_path, monkeypatch, bug, where, seed):
    bug(monkeypatch)
    verdict = compare_run(train(replace(debug, seed=seed, max_steps=1 if seed else 20, run_dir=str(tmp_path / "run"))))
    assert not verdict.right and where in verdict.text and ("no reference run" in verdict.text) == (seed == 11)


def test_compare_finds_a_bug_of_another_machine(debug, tmp_path):
    "The code installed here is right, and the run was made elsewhere, with wrong pairs."
    with pytest.MonkeyPatch.context() as elsewhere:
        half_split_pairs(elsewhere)
        run = train(replace(debug, seed=11, max_steps=1, run_dir=str(tmp_path / "run")))
    verdict = compare_run(run)
    assert not verdict.right and "no reference run, but when" in verdict.text, verdict.text


def test_compare_finds_a_planted_bug_in_the_preset_that_readers_run(debug, tmp_path, monkeypatch):
    no_bias_correction(monkeypatch)
    laptop = replace(PRESETS["laptop"], data_dir=debug.data_dir, max_steps=10, run_dir=str(tmp_path / "run"))
    verdict = compare_run(train(laptop))
    assert not verdict.right and "at step 10" in verdict.text, verdict.text


def test_compare_finds_what_goes_wrong_after_the_first_steps(debug, tmp_path):
    rows = [{"step": step, "train_loss": train_loss, "val_loss": val_loss and val_loss * (0.8 if step > 20 else 1)}
            for step, train_loss, val_loss in reference(debug)["curves"]["0"]]
    record = {"config": vars(debug), "corpus": {"name": "fables", "sha256": reference(debug)["sha256"]}, "curve": rows}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    verdict = compare_run(tmp_path / "record.json")
    assert not verdict.right and "at step 40 lies below the band" in verdict.text, verdict.text


def reference(config) -> dict:
    "The reference curves of a preset that ship with the package."
    path = Path(tinylm.train.__file__).with_name("bands.json")
    return json.loads(path.read_text(encoding="utf-8"))[f"{config.corpus}/{config.preset}"]


@pytest.mark.parametrize("seed, says", [
    (0, "equal to the reference run of seed 0"), (11, "repeats the reference run of seed 0"),
])
def test_compare_lets_good_runs_pass(debug, tmp_path, monkeypatch, capsys, seed, says):
    run = train(replace(debug, seed=seed, max_steps=None, run_dir=str(tmp_path / "run")))
    assert main(["compare", str(run)]) == 0
    assert says in capsys.readouterr().out


def test_compare_bears_what_another_machine_would_round_otherwise(debug, tmp_path, monkeypatch):
    right = tinylm.train.TransformerLM

    def rounded(config, seed):
        model = right(config, seed=seed)
        for p in model.parameters():
            p.data *= 1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return model

    monkeypatch.setattr(tinylm.train, "TransformerLM", rounded)
    assert compare_run(train(replace(debug, run_dir=str(tmp_path / "run")))).right


def test_compare_refuses_what_it_cannot_compare(debug, tiny, tmp_path, capsys):
    other = train(replace(debug, lr=0.01, max_steps=1, run_dir=str(tmp_path / "other")))
    assert main(["compare", str(other)]) == 2 and "lr 0.01, the reference" in capsys.readouterr().err
    own = train(replace(tiny, max_steps=1, run_dir=str(tmp_path / "own")))
    assert main(["compare", str(own)]) == 2 and "no reference curves for tales/debug" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nothing")]) == 2
