"""Plans and tables; sweeps that are stopped, crash or lose workers; a real Dask cluster; bugs that `compare` finds."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import tinylm.optim
import tinylm.rope
import tinylm.train
from tinylm.ablations import BASE, SWEEPS, Plan, Result, _Processes, by_group, compare_run, load_plans
from tinylm.ablations import paired_difference, plot_forest, results_table, run_name, run_plan, run_sweep
from tinylm.ablations import search_results, variants
from tinylm.data import END_OF_TEXT, InputError, fables
from tinylm.train import PRESETS, prepare, read_metrics, train

posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes work otherwise on Windows")


def test_one_and_one_point_nought_are_one_run():
    assert run_name(replace(BASE, lr=1)) == run_name(replace(BASE, lr=1.0)) == run_name(replace(BASE, lr=np.float32(1)))


def test_a_variant_is_named_or_made_of_fields():
    named, by_field, two = variants(BASE, ["post-norm", "norm=post", "use_rope=False+lr=0.5"]).values()
    assert named == by_field and two.lr == 0.5 and not two.use_rope
    for wrong in ("post-nrom", "nrom=post", ""):
        with pytest.raises(InputError, match="there are baseline, post-norm"):
            Plan(BASE, (wrong,), seeds=(1,)).fresh([])


def test_a_plan_begins_with_the_preset_that_it_names(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": {"base": {"preset": "debug", "lr": 0.5}}, "b": {}}', encoding="utf-8")
    plans = load_plans(tmp_path / "plan.json")
    assert plans["a"].base == replace(PRESETS["debug"], lr=0.5) and plans["b"].base == BASE


def test_a_sweep_refuses_lists_that_are_none_and_a_single_seed(tmp_path):
    for words, changes in (("separate by commas", {"lrs": "0.1;0.2"}), ("--seed makes no sense here", {"seed": 3})):
        with pytest.raises(InputError, match=words):
            run_sweep("search", replace(SWEEPS["search"], out=str(tmp_path), **changes))


def made_up(losses: dict) -> list[Result]:
    "Results of made-up losses by variant, rate and seed."
    return [Result(variant, lr, seed, {"diverged_at_step": 9 if np.isinf(loss) else None,
                                       "curve": [{"val_loss": loss}], "config": {"vocab_size": 1000}})
            for (variant, lr), group in losses.items() for seed, loss in enumerate(group)]


def test_a_lucky_single_run_is_no_baseline():
    results = made_up({("baseline", 0.01): [2.0, 2.1, 2.2], ("baseline", 0.02): [1.9], ("nope", 0.01): [2.5, 2.5, 2.8]})
    losses = by_group(results)
    gap = paired_difference(losses["nope", 0.01], losses["baseline", 0.01])
    assert gap.values == pytest.approx([0.5, 0.4, 0.6]) and str(gap) in results_table(results).splitlines()[-1]


def test_a_forest_plot_counts_the_runs_that_diverged_and_averages_no_others():
    results = made_up({("baseline", 0.01): [2.0, 2.1, 2.2], ("nope", 0.01): [2.5, 2.5, 2.8],
                       ("no-norm", 0.01): [np.inf, 2.4, np.inf]})
    axis = plot_forest(results, Figure().add_subplot())
    assert len(axis.containers) == 1  # one mean with its interval, that of nope
    assert [label.get_text() for label in axis.get_yticklabels()][1] == "no-norm, lr 0.01\n2 of 3 diverged"
    assert [cell.strip() for cell in results_table(results).splitlines()[-1].split("|")[3:-1]] == ["3", "2", "", "", ""]


def test_sensitivity_needs_no_even_rates_and_every_search_may_fail():
    even = made_up({("even", 10.0**-k): [abs(k - 3.0)] for k in (1, 2, 3, 4, 5)})
    finer = made_up({("finer", 10.0**-k): [abs(k - 3.0)] for k in (1, 1.5, 2, 3, 3.25, 4, 5)})
    assert [s["sensitivity"] for s in search_results(even + finer).values()] == pytest.approx([1, 1])
    lost = search_results(made_up({("baseline", lr): [np.inf] for lr in (0.1, 0.2)}))["baseline"]
    assert lost["best"] is None and lost["edge"] == 0.1 and lost["advice"] == "try lower rates"


# real runs, in real processes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A config whose runs take a second or two, with its data prepared."
    folder = tmp_path_factory.mktemp("tiny")
    text = "".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(300, seed=0))
    (folder / "tales.txt").write_text(text, encoding="utf-8")
    config = replace(
        PRESETS["debug"], data_dir=str(folder / "data"), corpus=str(folder / "tales.txt"), vocab_size=300,
        context_length=32, d_model=16, d_ff=48, cosine_cycle_iters=120, checkpoint_every=20, eval_every=60,
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


def losses(folder: Path) -> dict[str, list]:
    "The training losses in the records of a folder, by name."
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    return {name: [row["train_loss"] for row in record["curve"]] for name, record in read.items()}


SWEEP = """import json, sys, tinylm.ablations as a
if __name__ == "__main__":
    try:
        sys.exit(a.run_sweep("search", a.SweepConfig(**json.loads(sys.argv[1]))))
    except KeyboardInterrupt as stop:
        print(stop)
        sys.exit(130)
"""


@posix
def test_a_search_stopped_by_ctrl_c_goes_on_exactly_where_it_was(tiny, tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP, encoding="utf-8")
    options = json.dumps(vars(tiny) | {"lrs": "0.01,0.02", "jobs": 2, "out": str(tmp_path)})
    command = [sys.executable, str(tmp_path / "sweep.py"), options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all its processes
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command goes on" in said, said
    assert list(tmp_path.glob("runs/*/checkpoints/step-*")) and len(losses(tmp_path)) < 2

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "| baseline            | 0.02    |    1 |        0 |" in again.stdout
    assert "baseline: best 0.0" in again.stdout
    assert not list((tmp_path / "runs").iterdir())
    undisturbed = train(replace(tiny, lr=0.01, run_dir=str(tmp_path / "undisturbed")))
    expected = [row["train_loss"] for row in read_metrics(undisturbed)]
    assert losses(tmp_path)[run_name(replace(tiny, lr=0.01))] == expected


@posix
def test_the_death_of_a_process_costs_no_other_run_and_the_same_call_goes_on(tiny, tmp_path):
    def kill_one():
        wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    plan = Plan(tiny, ("baseline",), lrs=(0.01, 0.02, 0.03), seeds=(1,))
    with _Processes(jobs=2) as executor:
        failures = run_plan(plan, tmp_path, executor)
        killer.join()
        assert len(failures) == 1 and len(losses(tmp_path)) == 2  # and no fresh seeds at a rate that may be wrong
        assert run_plan(plan, tmp_path, executor) == {} and len(losses(tmp_path)) == 4


@posix
def test_dask_keeps_every_run_when_a_worker_is_killed(tiny, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is optional: pip install distributed")
    processes = []

    def start(*words):
        processes.append(subprocess.Popen([sys.executable, "-m", *words], cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return processes[-1]

    try:
        start("distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", "scheduler.json")
        wait_for((tmp_path / "scheduler.json").exists, processes[0])
        address = json.loads((tmp_path / "scheduler.json").read_text(encoding="utf-8"))["address"]
        workers = [start("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
                         "--local-directory", str(tmp_path / f"worker{i}")) for i in range(2)]

        def kill_one():
            wait_for(lambda: list(tmp_path.glob("records/runs/*/checkpoints/step-*")))
            workers[0].kill()

        killer = threading.Thread(target=kill_one)
        killer.start()
        lost = Plan(replace(tiny, corpus=str(tmp_path / "gone.txt")), ("baseline",), seeds=(1,))
        with distributed.Client(address) as client, client.get_executor() as executor:
            plan = Plan(tiny, ("baseline", "nope"), lrs=(0.01, 0.02))
            assert run_plan(plan, tmp_path / "records", executor) == {}
            killer.join()
            assert len(losses(tmp_path / "records")) == 4
            assert "gone.txt" in str(run_plan(lost, tmp_path / "records", executor))
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# `compare`: bugs that a model can live with


@pytest.fixture(scope="module")
def debug(tmp_path_factory):
    "The debug preset, cut at half its length, with its data prepared once."
    config = replace(PRESETS["debug"], data_dir=str(tmp_path_factory.mktemp("fables")), max_steps=20)
    prepare(config)
    return config


def no_mask(patch):
    right = F.scaled_dot_product_attention
    patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **mask: right(q, k, v))


def half_split_pairs(patch):
    right = tinylm.rope.RotaryPositionalEmbedding.forward

    def forward(self, x, token_positions=None):
        order = torch.arange(x.shape[-1]).view(2, -1).T.flatten()  # 0, d/2, 1, d/2 + 1, ...
        return right(self, x[..., order], token_positions)

    patch.setattr(tinylm.rope.RotaryPositionalEmbedding, "forward", forward)


def no_bias_correction(patch):
    right = tinylm.optim.AdamW.step

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p] or {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            self.state[p] = state | {"step": 10**9}  # so late in training there is nothing left to correct
        return right(self, closure)

    patch.setattr(tinylm.optim.AdamW, "step", step)


def unshuffled(patch):
    def in_order(tokens, batch_size, context_length, rng):
        return np.arange(batch_size) * context_length

    patch.setattr(tinylm.train, "draw_starts", in_order)


@pytest.mark.parametrize("bug, where", [
    (no_mask, "at step 0"), (half_split_pairs, "at step 5"), (no_bias_correction, "at step 5"),
    (unshuffled, "at step 5"),
])
def test_compare_finds_a_planted_bug(debug, tmp_path, monkeypatch, bug, where):
    bug(monkeypatch)
    right, text = compare_run(train(replace(debug, run_dir=str(tmp_path / "run"))))
    assert not right and where in text, text


def test_compare_finds_a_planted_bug_in_the_preset_that_readers_run(debug, tmp_path, monkeypatch):
    no_bias_correction(monkeypatch)
    laptop = replace(PRESETS["laptop"], data_dir=debug.data_dir, max_steps=10, run_dir=str(tmp_path / "run"))
    right, text = compare_run(train(laptop))
    assert not right and "at step 10" in text, text


def reference_run(path: Path, factor) -> Path:
    "A record with the losses of the debug reference of seed 0, some of them times a factor that depends on the step."
    bands = Path(tinylm.train.__file__).with_name("bands.json")
    reference = json.loads(bands.read_text(encoding="utf-8"))["fables/debug"]
    rows = [{"step": step, "train_loss": ours, "val_loss": val_loss and val_loss * factor(step)}
            for step, ours, val_loss in reference["curves"]["0"]]
    corpus = {"name": "fables", "sha256": reference["sha256"]}
    path.write_text(json.dumps({"config": vars(PRESETS["debug"]), "corpus": corpus, "curve": rows}), encoding="utf-8")
    return path


@pytest.mark.parametrize("factor, says", [
    (lambda step: 1, "equal to the reference run of seed 0 up to step 20"),
    (lambda step: 0.8 if step > 20 else 1, "at step 40 lies below the band"),
    (lambda step: 1.2 if step > 20 else 1, "at step 40 lies above the band"),
    (lambda step: np.nan if step > 20 else 1, "at step 40 lies above the band"),
    (lambda step: 1.0001 if step > 0 else 1, "at step 20 is not the"),
])
def test_compare_judges_every_step(tmp_path, factor, says):
    right, text = compare_run(reference_run(tmp_path / "record.json", factor))
    assert says in text and right == ("equal" in says), text


def test_compare_lets_good_runs_pass_and_says_what_it_could_not_see(debug, tmp_path):
    for seed, says in ((0, "equal to the reference run of seed 0 up to step 20"), (11, "seed 11 has no reference run")):
        right, text = compare_run(train(replace(debug, seed=seed, max_steps=None, run_dir=str(tmp_path / f"{seed}"))))
        assert right and says in text, text


def test_compare_bears_what_another_machine_would_round_otherwise(debug, tmp_path, monkeypatch):
    right = tinylm.train.TransformerLM

    def rounded(config, seed):
        model = right(config, seed=seed)
        for p in model.parameters():
            p.data *= 1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return model

    monkeypatch.setattr(tinylm.train, "TransformerLM", rounded)
    assert compare_run(train(replace(debug, run_dir=str(tmp_path / "run"))))[0]


def test_compare_tells_a_divergence_and_refuses_what_it_cannot_compare(tmp_path):
    record = json.loads(reference_run(tmp_path / "right.json", lambda step: 1).read_text(encoding="utf-8"))
    record["curve"].append({"step": 39, "train_loss": None, "val_loss": None, "diverged": True})
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert compare_run(tmp_path / "record.json")[1].endswith("diverged at step 39; try a lower lr")
    for wrong, says in (
        (record | {"config": record["config"] | {"lr": 0.01}}, "lr 0.01, the reference"),
        (record | {"config": record["config"] | {"preset": "reference"}}, "no reference curves for fables/reference"),
        (record | {"corpus": {"name": "fables", "sha256": "0"}}, "the run has corpus 0"),
    ):
        (tmp_path / "record.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(InputError, match=says):
            compare_run(tmp_path / "record.json")
    with pytest.raises(InputError, match="cannot read"):
        compare_run(tmp_path / "nothing")
