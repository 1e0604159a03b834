"""Plans and tables; sweeps that are stopped, crash or lose workers; a real Dask cluster; what `compare` says."""
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import tinylm.train
from tinylm.ablations import BASE, Difference, Plan, Result, _Processes, by_group, compare_run, load_plans
from tinylm.ablations import results_table, run_name, run_plan, search_results
from tinylm.data import InputError
from tinylm.train import PRESETS, read_metrics, train

posix = pytest.mark.skipif(os.name != "posix", reason="signals between processes work otherwise on Windows")


def test_one_and_one_point_nought_are_one_run():
    assert run_name(replace(BASE, lr=1)) == run_name(replace(BASE, lr=1.0)) == run_name(replace(BASE, lr=np.float32(1)))


def test_a_variant_is_named_or_made_of_fields():
    plan = Plan(BASE, ("post-norm", "norm=post", "use_rope=False+lr=0.5"), seeds=(1,))
    named, by_field, two = (config for _, config in plan.runs([]))
    assert named == by_field and two.lr == 0.5 and not two.use_rope
    for wrong in ("post-nrom", "nrom=post", "num_heads=two", ""):
        with pytest.raises(InputError, match="there are baseline, post-norm.*num_heads=2"):
            Plan(BASE, (wrong,), seeds=(1,)).runs([])


def test_a_plan_begins_with_the_preset_that_it_names(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": {"base": {"preset": "debug", "lr": 0.5}}, "b": {}}', encoding="utf-8")
    plans = load_plans(tmp_path / "plan.json")
    assert plans["a"].base == replace(PRESETS["debug"], lr=0.5) and plans["b"].base == BASE


def made_up(losses: dict) -> list[Result]:
    "Results of made-up losses by variant, rate and seed."
    return [Result(variant, lr, seed, {"diverged_at_step": 9 if np.isinf(loss) else None,
                                       "curve": [{"val_loss": loss}], "config": {"vocab_size": 1000}})
            for (variant, lr), group in losses.items() for seed, loss in enumerate(group)]


def test_a_lucky_single_run_is_no_baseline():
    results = made_up({("baseline", 0.01): [2.0, 2.1, 2.2], ("baseline", 0.02): [1.9], ("nope", 0.01): [2.5, 2.5, 2.8]})
    losses = by_group(results)
    gap = Difference(losses["nope", 0.01], losses["baseline", 0.01])
    assert gap.values == pytest.approx([0.5, 0.4, 0.6]) and str(gap) in results_table(results).splitlines()[-1]


def test_a_table_counts_the_runs_that_diverged_and_averages_no_others():
    results = made_up({("baseline", 0.01): [2.0, 2.1, 2.2], ("no-norm", 0.01): [np.inf, 2.4, np.inf]})
    assert [cell.strip() for cell in results_table(results).splitlines()[-1].split("|")[3:-1]] == ["3", "2", "", "", ""]


def test_a_best_rate_at_an_end_of_the_range_is_told_and_every_search_may_fail():
    found = search_results(made_up({("a", 0.1): [2], ("a", 0.2): [1], ("b", 0.1): [np.inf], ("b", 0.2): [np.inf]}))
    assert found["a"] == {"best": 0.2, "edge": None, "advice": "try higher rates"}
    assert found["b"] == {"best": None, "edge": 0.1, "advice": "try lower rates"}


def test_what_is_no_plan_is_refused_in_one_line(tmp_path):
    for text in ("[]", '{"a": {"lrs": 5}}', '{"a": {"lrs": "fast"}}', '{"a": {"rates": [1]}}',
                 '{"a": {"base": {"b": 1}}}', '{"a": {"variants": ["nrom=post"], "seeds": [1]}}'):
        (tmp_path / "plan.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"plan.json: no plan \(.*\); expected[^\n]*$"):
            load_plans(tmp_path / "plan.json")


@pytest.mark.parametrize("name, text", [
    ("x.json", "[]"), ("x.json", "once upon a time"), ("x/notes.txt", "a"), ("x/config.json", '{"preset": "debug"}'),
])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, name, text):
    (tmp_path / "x").mkdir()
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"x.*: neither the folder of a run.*nor a record[^\n]*$"):
        compare_run(tmp_path / name.partition("/")[0])


# the text of the chapter: its numbers and verdicts follow from the records

RESULTS = ROOT / "data/results/ablations"
QUOTED = """1.3233 1.1614 1.3347 1.1831 1.3944 1.2588 1.3640 1.2173 1.5351 1.5458 0.011 0.041 0.0053 1.32
    0.041 0.082 0.001 0.015 0.038 0.623 0.10 0.15 1.338 1.585 1.353 0.061 0.057 0.002 1.4885 5.81 1.684 1.349 0.010
    1.390 0.000 0.020 0.008 0.0005 0.70 2.46 1.58 2.78 1.96 327.7 0.05 0.003 0.005 0.01 0.02 0.03 0.1 0.3 0.00375
    0.009 0.5 0.2 22.7 1.1 1.8 6.1 6.2 6.3 0.07 1.6""".split()  # the source's, others', Student's; rates; a few bounds


def read_state() -> tuple[dict, dict]:
    "The results of the plans, by name."
    state = []
    for file, folder, corpus in (("plan.json", "tinystories", "tinystories-sample"),
                                 ("plan-fables.json", "fables", "fables")):
        plans = load_plans(RESULTS / file, corpus=corpus)
        state.append({name: plan.results(RESULTS / folder) for name, plan in plans.items()})
        every = [r for plan in state[-1].values() for part in plan for r in part]
        assert len({r.record["corpus"]["valid_sha256"] for r in every}) == 1, "one text to validate on"
    return state[0], state[1]


def facts() -> list[str]:
    "Sentences that must stand in the chapter as they are, with numbers and verdicts from the records."
    stories, tales = read_state()

    def pm(gap, digits=3):
        return f"{gap.mean:.{digits}f} ± {gap.half_width:.{digits}f}".replace("-0.", "0.")

    rows = by_group(stories["rows"][1] + stories["source's rates"][1])
    fables_rows = by_group([r for _, fresh in tales.values() for r in fresh])
    base, fables_base = rows["baseline", 0.01], fables_rows["baseline", 0.02]
    ours = {group: Difference(losses, base) for group, losses in rows.items()}
    theirs = {group: Difference(losses, fables_base) for group, losses in fables_rows.items()}
    dead = [sum(np.isinf(list(fables_rows["no-norm", lr].values()))) for lr in (0.02, 0.01)]
    assert dead == [5, 2]
    said = [f"| {np.mean(list(base.values())):.3f} | {np.mean(list(fables_base.values())):.3f} | sizes differ"]
    for name, low in (("post-norm", "post-norm"), ("nope", "nope"), ("silu", "silu"), ("no-norm-low-lr", None)):
        one, two = ours[name, 0.01 if low else 0.00375], theirs[name, 0.02 if low else 0.0075]
        said.append(f"| +{pm(one)} | +{pm(two)} |")
    said.append(f"| +{pm(ours['no-norm', 0.01])} | diverges, {dead[0]} of 5 |")

    rates = {r.lr: r.loss for r in stories["rates"][0]}
    counts = json.loads((RESULTS / "token-counts.json").read_text(encoding="utf-8"))
    assert min(rates, key=rates.get) == 0.01 and all(map(np.isfinite, rates.values()))
    at_step = [rates[0.1], rates[0.3], *(r.loss for n in ("batch 8", "batch 32") for r in stories[n][0] if r.lr == 0.1),
               *(r.loss for r in stories["rows"][0] if r.lr == 0.1 and r.variant in ("nope", "silu"))]
    assert len(at_step) == 6 and max(at_step) - min(at_step) < 0.03
    said += [f"The best rate is 0.01 ({rates[0.01]:.3f}), with 0.02 a hair behind ({rates[0.02]:.3f})",
             f"the loss is {rates[0.003] - rates[0.01]:.2f} higher, "
             f"at three times the rate {rates[0.03] - rates[0.01]:.2f}",
             f"Near {counts['unigram']:.2f} is what counting tokens", f"at {rates[1]:.1f} and {rates[3]:.1f}",
             f"lies at {np.mean(at_step):.2f}", f"from the one before it, gives {counts['bigram']:.2f}"]
    by_batch = [{r.lr: r.loss for r in stories[name][0]} for name in ("batch 8", "rates", "batch 32")]
    assert [min(losses, key=losses.get) for losses in by_batch] == [0.01, 0.01, 0.02]
    ahead = [losses[0.01] - losses[0.02] for losses in by_batch]
    said += ["0.02 is ahead of 0.01 by {:.3f}, {:.3f} and {:.3f}".format(*ahead),
             f"scatter by {np.std(list(base.values()), ddof=1):.3f}"]

    five = [ours[name, 0.01].mean for name in ("nope", "no-norm", "post-norm", "silu")]
    assert five == sorted(five, reverse=True) and int(five[0] / five[1]) == 7
    assert all(ours[name, 0.01].mean > ours[name, 0.01].half_width for name in ("nope", "no-norm", "post-norm"))
    assert all(abs(ours["silu", lr].mean) < ours["silu", lr].half_width for lr in (0.01, 0.02))
    late = {seed: np.mean([row["train_loss"] for row in r.record["curve"][-10:]])
            for r in stories["rows"][1] if (r.variant, r.lr) == ("baseline", 0.01) for seed in [r.seed]}
    said += ["**Refuted in part (TinyStories, five paired seeds)", f"{pm(ours['nope', 0.01])} behind without them",
             f"{pm(ours['no-norm', 0.01])} behind without them, {pm(ours['post-norm', 0.01])} with",
             f"**Gate:** {pm(ours['silu', 0.01])}", f"own best rate too ({pm(ours['silu', 0.02])})",
             f"is {pm(ours['no-norm-low-lr', 0.00375])} behind; the baseline itself loses "
             f"{rates[0.003] - rates[0.01]:.2f} at 0.003 and {rates[0.005] - rates[0.01]:.2f} at 0.005",
             f"higher than those by {np.mean(list(late.values())) - np.mean(list(base.values())):.2f}"]

    above = {(r.variant, r.lr, r.seed): r.record["curve"][-1]["story_loss"] - r.record["curve"][-1]["floor"]
             for _, fresh in tales.values() for r in fresh if np.isfinite(r.loss)}

    def times(name, lr, digits):
        def logs(*group):
            return {seed: np.log(above[*group, seed]) for seed in range(1, 6)}

        gap = Difference(logs(name, lr), logs("baseline", 0.02))
        ratio, low, high = (np.exp(gap.mean + k * gap.half_width) for k in (0, -1, 1))
        return f"{ratio:.{digits}f}", f"({low:.{digits}f} to {high:.{digits}f})"

    even = Difference(fables_rows["post-norm", 0.01], fables_rows["baseline", 0.01])
    found = {(r.variant, r.lr): r.loss for r in tales["rows"][0]}
    mean_above = np.mean([above["baseline", 0.02, seed] for seed in range(1, 6)])
    assert abs(even.mean) < even.half_width and abs(theirs["silu", 0.02].mean) < theirs["silu", 0.02].half_width
    said += ["**Confirmed for norms and positions (Fables, five paired seeds).**",
             f"Post-norm is {pm(theirs['post-norm', 0.02])} behind", f"at half that rate ({pm(even)})",
             f"**Positions:** {pm(theirs['nope', 0.02])} behind. The baseline ends {mean_above:.3f} above",
             "{} times as much is left to learn {}".format(*times("nope", 0.02, 1)),
             "{}, or {} times as much left to learn {}".format(pm(theirs["silu", 0.02]), *times("silu", 0.02, 2)),
             "{} behind, or {} times {}".format(pm(theirs["no-norm-low-lr", 0.0075]),
                                                *times("no-norm-low-lr", 0.0075, 2)),
             f"baseline {found['baseline', 0.01] - found['baseline', 0.02]:.4f} better at 0.02",
             f"say 0.02 ({pm(theirs['baseline', 0.01], 4)})"]

    ends = [[r.record["curve"][-1] for r in runs if r.variant == "no-norm" and np.isinf(r.loss)] for runs in
            (stories["ceiling"][0], [r for part in tales["rows"] for r in part])]
    lowest, highest = (bound(end["lr"] for part in ends for end in part) for bound in (min, max))
    steps = [end["step"] for end in ends[0]]
    alive = [r for r in stories["ceiling"][0] if r.variant != "no-norm"]
    assert [len(part) for part in ends] == [9, 9] and all(np.isfinite(r.loss) for r in alive)
    said += [f"passes about {lowest:.3f} to {highest:.3f}", f"after {min(steps)} to {max(steps)} steps",
             f"none of {len(alive)} runs"]
    groups = by_group(stories["warm-up"][0])
    kept, ahead = (Difference(groups[name, lr], groups["baseline", lr])
                   for name, lr in (("warmup_iters=0", 0.01), ("post-norm", 0.003)))
    lost = groups["norm=post+warmup_iters=0", 0.01].values()
    assert max(lost) - min(lost) < 2e-3 and ahead.mean + ahead.half_width < 0 < kept.half_width - abs(kept.mean)
    said += [f"behind itself by {pm(kept)}", f"three runs end at {np.mean(list(lost)):.3f}",
             f"*ahead* of the baseline, by {pm(ahead)}"]

    def price(r):
        return r.record["probes"]["second_half_after_shuffle"] - r.record["probes"]["second_half"]

    assert min(map(price, stories["rows"][1])) > 0.07
    blind = sorted(price(r) for r in stories["rates"][0] if r.lr >= 1)
    far = {name: np.mean([r.record["probes"]["loss_by_position"][11:] for r in stories["rows"][1]
                          if (r.variant, r.lr) == (name, 0.01)]) for name in ("baseline", "nope")}
    said += [f"pay {blind[0]:+.3f} and {blind[1]:+.3f}", f"the baseline is at {far['baseline']:.2f}",
             f"the model without positions is at {far['nope']:.2f}", "at least 0.07 on every seed"]

    length = {n: by_group(stories[f"length {n}"][0]) for n in (250, 500, 1000, 2000, 4000)}
    gaps = {(v, n): Difference(length[n][v, 0.01], length[n]["baseline", 0.01])
            for v in ("nope", "silu") for n in length}
    change = Difference(*(dict(enumerate(gaps["nope", n].values)) for n in (2000, 1000)))
    assert max(change.values) < 0 and gaps["nope", 500].mean > gaps["nope", 250].mean
    said += ["**Half confirmed (three seeds)",
             f"**Gate:** {pm(gaps['silu', 250])} after half a million tokens, {pm(gaps['silu', 1000])} after two",
             f"**Positions:** {pm(gaps['nope', 250])} after half a million, {pm(gaps['nope', 1000])} after two, "
             f"{pm(gaps['nope', 2000])} after four", f"by {pm(change)})", f"{gaps['nope', 4000].mean:.2f} after eight"]
    large = [{r.variant: r.loss for r in stories[f"reference {n}"][0]} for n in (50, 100, 200)]
    grow, shrink = ([f"{run[v] - run['baseline']:.3f}" for run in large] for v in ("nope", "silu"))
    return [*said, f"take the loss to {large[2]['baseline']:.2f}", f"({', '.join(grow)})", f"({', '.join(shrink)})"]


def test_every_number_and_verdict_of_the_chapter_follows_from_the_records():
    cells = json.loads((ROOT / "nbs/06_ablations.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    said = facts()
    assert [fact for fact in said if fact not in text] == []
    prose = re.sub(r"\(http[^)]*\)|`[^`]*`|\$[^$]*\$", "", text)
    known = {number for fact in said for number in re.findall(r"\d+\.\d+", fact)} | set(QUOTED)
    assert sorted(set(re.findall(r"\d+\.\d+", prose)) - known) == []


# real runs, in real processes


@pytest.fixture
def tiny(base):
    "Long enough to be stopped before its end."
    return replace(base, cosine_cycle_iters=120)


def wait_for_a_checkpoint(folder: Path, process=None):
    end = time.monotonic() + 120
    while not list(folder.glob("runs/*/checkpoints/step-*")):
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, f"ended early: {process.communicate()}"
        time.sleep(0.02)


@contextmanager
def killed_at_work(folder: Path, victim):
    "Meanwhile, when a run of the folder has a checkpoint, the process of the number that `victim` gives is killed."
    def kill():
        wait_for_a_checkpoint(folder)
        os.kill(victim(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


def losses(folder: Path) -> dict[str, list]:
    "The training losses in the records of a folder, by name."
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    return {name: [row["train_loss"] for row in record["curve"]] for name, record in read.items()}


@posix
def test_a_search_stopped_by_ctrl_c_goes_on_exactly_where_it_was(tiny, tmp_path):
    flags = {name: value for name, value in vars(tiny).items() if value != vars(BASE)[name]}
    flags |= {"lrs": "0.01,0.02", "jobs": 1, "out": tmp_path}
    command = [sys.executable, "-m", "tinylm.cli", "search", *(f"--{name}={value}" for name, value in flags.items())]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    process = subprocess.Popen(command, start_new_session=True, **streams)
    wait_for_a_checkpoint(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all its processes
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "same command goes on" in said and "Traceback" not in said, said
    assert len(list(tmp_path.glob("runs/*"))) == 1 and losses(tmp_path) == {}  # the second has not begun

    again = subprocess.run([*command, "--lrs", "0.01"], timeout=240, **streams)
    assert again.returncode == 0 and "baseline: best 0.01" in again.stdout, again.stdout
    assert "| baseline            | 0.01    |    1 |        0 |" in again.stdout and not list(tmp_path.glob("runs/*"))
    undisturbed = train(replace(tiny, lr=0.01, run_dir=str(tmp_path / "undisturbed")))
    expected = [row["train_loss"] for row in read_metrics(undisturbed)]
    assert losses(tmp_path)[run_name(replace(tiny, lr=0.01))] == expected


@posix
def test_the_death_of_a_process_costs_no_other_run(tiny, tmp_path):
    plan = Plan(tiny, ("baseline",), lrs=(0.01, 0.02), seeds=(1,))
    with _Processes(2) as executor, killed_at_work(tmp_path, lambda: multiprocessing.active_children()[0].pid):
        failures = run_plan(plan, tmp_path, executor)
    assert len(failures) == 1 == len(losses(tmp_path))  # and no fresh seeds at a rate that may be wrong


@posix
def test_dask_keeps_every_run_when_a_worker_is_killed(tiny, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is optional: pip install distributed")
    lost = Plan(replace(tiny, corpus=str(tmp_path / "gone.txt")), ("baseline",), seeds=(1,))
    own = {"threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path / "dask")}
    with (distributed.LocalCluster(2, **own) as cluster, distributed.Client(cluster) as client,
          client.get_executor() as executor):
        pids = list(client.run(os.getpid).values())
        with killed_at_work(tmp_path, lambda: pids[0]):
            assert run_plan(Plan(tiny, ("baseline",), lrs=(0.01, 0.02, 0.03)), tmp_path, executor) == {}
        assert len(losses(tmp_path)) == 3
        assert "gone.txt" in str(run_plan(lost, tmp_path, executor))


# `compare`


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
    (lambda step: 0.8 if step > 20 else 1, "at step 40 lies below the band"),
    (lambda step: 1.2 if step > 20 else 1, "at step 40 lies above the band"),
    (lambda step: np.nan if step > 20 else 1, "at step 40 lies above the band"),
    (lambda step: 1.0001 if step > 0 else 1, "at step 20 is not the"),
])
def test_compare_judges_every_step(tmp_path, factor, says):
    right, text = compare_run(reference_run(tmp_path / "record.json", factor))
    assert says in text and not right, text


def test_compare_bears_what_another_machine_would_round_otherwise(tmp_path, monkeypatch):
    right = tinylm.train.TransformerLM

    def rounded(config, seed):
        model = right(config, seed=seed)
        for p in model.parameters():
            p.data *= 1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return model

    monkeypatch.setattr(tinylm.train, "TransformerLM", rounded)
    own = {"data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    right, text = compare_run(train(replace(PRESETS["debug"], **own)))
    assert right and "equal to the reference run of seed 0 up to step 20" in text, text


def test_compare_tells_a_divergence_and_refuses_what_it_cannot_compare(tmp_path):
    record = json.loads(reference_run(tmp_path / "right.json", lambda step: 1).read_text(encoding="utf-8"))
    other = record | {"config": record["config"] | {"seed": 11}}
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    right, text = compare_run(tmp_path / "other.json")
    assert right and "seed 11 has no reference run" in text, text
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
