"""Training: the same run every time, its options, mistakes of the user, and learning. See also test_faults.py."""
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import checkpoints, metrics, result, tell, write_fables

import tinylm.train
from tinylm import cli
from tinylm.data import END_OF_TEXT, InputError
from tinylm.model import TransformerLM
from tinylm.train import (
    PRESETS,
    evaluate,
    fables_floor,
    forecast,
    load_run,
    prepare,
    record_run,
    resume,
    train,
)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are faster on one thread, and child processes must compute as their parent does."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- exact resume


def test_a_finished_run_can_be_resumed_and_extended(config, capsys):
    run = train(replace(config, max_steps=30), tell)
    before = result(run)
    for last in (30, 20):
        resume(run, max_steps=last)
        assert result(run) == before
        assert f"{run}: step 30 is done, and the last is {last}; more with --max_steps\n" in capsys.readouterr().err
    resume(run, max_steps=60)
    assert metrics(run)[-1]["step"] == 60 and "is done" not in capsys.readouterr().err


def test_the_best_loss_is_that_of_the_run_never_stopped(config, tmp_path):
    "Also when the best one was before the stop: a rate that keeps rising spoils the model again."
    config = replace(config, lr=1.0, warmup_iters=59)
    straight = train(replace(config, run_dir=str(tmp_path / "straight")))
    stopped = resume(train(replace(config, max_steps=40)), max_steps=60)
    best, again = (record_run(run, run / "record.json")["best_val_loss"] for run in (straight, stopped))
    losses = [row["val_loss"] for row in metrics(straight) if row["val_loss"] is not None]
    assert again == best == losses[1] < min(losses[2:])


def test_same_seed_same_run_and_another_seed_another(config, tmp_path):
    seeds = {"a": 3, "b": 3, "c": 4}
    runs = [train(replace(config, seed=seed, run_dir=str(tmp_path / name))) for name, seed in seeds.items()]
    assert result(runs[0]) == result(runs[1])
    assert result(runs[0])[4] != result(runs[2])[4]


# --- options


def test_no_global_random_number_is_drawn_or_needed(config, tmp_path):
    "Whatever others do with the global generators, the run is the same, and it leaves them alone."
    def disturb(model, tokenizer, step):
        random.random(), np.random.rand(), torch.rand(1)

    def states():
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = states()
    quiet = train(replace(config, max_steps=30), lambda *args: None)
    assert states() == before
    torch.manual_seed(77)
    loud = train(replace(config, max_steps=30, run_dir=str(tmp_path / "loud")), disturb)
    assert result(quiet) == result(loud)


def test_pieces_give_the_losses_of_the_whole_batch(config, tmp_path):
    configs = [replace(config, grad_accum_steps=n, run_dir=str(tmp_path / str(n))) for n in (1, 2, 4)]
    runs = [train(config) for config in configs]
    whole, *others = ([row["train_loss"] for row in metrics(run)[1:]] for run in runs)
    for losses in others:
        np.testing.assert_allclose(losses, whole, rtol=1e-4)


def test_when_the_time_is_over_the_run_stops_and_goes_on(config, tmp_path, capsys):
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    run = train(replace(config, max_minutes=1e-9), tell)
    assert "minutes are over at step 1; go on with --resume" in capsys.readouterr().err
    assert [folder.name for folder in checkpoints(run)] == ["step-00000001"]
    resume(run, tell, changes={"max_minutes": None})
    assert result(run) == result(straight)


def test_bfloat16_learns_and_keeps_its_weights_in_32_bits(config, tmp_path):
    runs = [train(replace(config, dtype=dtype, run_dir=str(tmp_path / dtype))) for dtype in ("float32", "bfloat16")]
    ends = [metrics(run)[-1]["val_loss"] for run in runs]
    assert ends[0] != ends[1] and abs(ends[0] - ends[1]) < 0.1
    assert {p.dtype for p in load_run(runs[1])[0].parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_model_has_the_losses_of_the_eager_one_and_goes_on(config, tmp_path):
    "Writing the code takes half a minute the first time; later torch finds it in its cache."
    if not any(map(shutil.which, tinylm.train._COMPILERS)):
        pytest.skip(f"no C++ compiler on the PATH: {', '.join(tinylm.train._COMPILERS[1:])}")
    runs = []
    for compile in (False, True):
        short = replace(config, compile=compile, max_steps=5, log_every=1, run_dir=str(tmp_path / str(compile)))
        torch._dynamo.utils.counters.clear()
        runs.append(resume(train(short), max_steps=7))
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compile
    losses = [[row["train_loss"] for row in metrics(run)[1:]] for run in runs]
    assert len(losses[1]) == 7
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


def test_tensorboard_shows_what_the_log_holds(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(replace(config, tracker="tensorboard", watch=True, max_steps=18))
    resume(run, max_steps=30)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    rows = [row for row in metrics(run) if row["train_loss"] is not None]
    assert [event.step for event in events.Scalars("train_loss")] == [row["step"] for row in rows]
    np.testing.assert_allclose([event.value for event in events.Scalars("train_loss")],
                               [row["train_loss"] for row in rows], rtol=1e-6)
    assert "gradients/layers.0" in events.Tags()["scalars"]


def wandb_lines(path):
    "Read a file of wandb: 7 bytes, then blocks of 32 kB with pieces of records, 7 bytes about each before it."
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            history, record = Record.FromString(record).history, b""
            if history.item:
                yield {"/".join([*item.nested_key] or [item.key]): json.loads(item.value_json) for item in history.item}


def test_wandb_keeps_what_the_log_holds_without_a_network(config, tmp_path):
    wandb = pytest.importorskip("wandb")
    runs = [train(replace(config, tracker="wandb", watch=True, max_steps=18, run_dir=str(tmp_path / name)))
            for name in ("first", "second")]
    wandb.teardown()  # waits until the files are written
    for run in runs:
        (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
        kept, rows = list(wandb_lines(file)), metrics(run)
        assert [line["_step"] for line in kept] == [row["step"] for row in rows]
        for key in ("train_loss", "val_loss", "lr"):
            assert [line.get(key) for line in kept] == [row[key] for row in rows]
        layer = [row.get("gradients", {}).get("layers.0") for row in rows]
        assert any(layer) and [line.get("gradients/layers.0") for line in kept] == layer


def test_a_tracker_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        train(replace(config, tracker="wandb"))
    assert not Path(config.run_dir).exists()


def test_no_compiler(config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="C\\+\\+ compiler"):
        train(replace(config, compile=True))
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("there, best", [("cuda mps", "cuda"), ("cuda", "cuda"), ("mps", "mps"), ("", "cpu")])
def test_auto_is_the_best_device_there_is(monkeypatch, there, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert tinylm.train._pick_device("auto") == best
    assert tinylm.train._pick_device("cpu") == "cpu"


@pytest.mark.parametrize("dtype, ratio, warned", [("bfloat16", 3.0, True), ("bfloat16", 0.5, False),
                                                  ("float32", 3.0, False)])
def test_a_slow_bfloat16_is_told(base, monkeypatch, capsys, dtype, ratio, warned):
    monkeypatch.setattr(tinylm.train, "_product_seconds", lambda dtype, device: {torch.bfloat16: ratio}.get(dtype, 1))
    assert tinylm.train._check_machine(replace(base, dtype=dtype)) == "cpu"
    said = "bfloat16 products take 3.0 times as long as float32 on this cpu; leave --dtype out\n"
    assert capsys.readouterr().err == (said if warned else "")


# --- mistakes of the user: one clear line, nothing half-written


def test_a_run_folder_that_exists_is_left_alone(config):
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        train(config)
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("change, match", [
    ({"batch_size": 10_000}, "one batch needs 320,001"),
    ({"eval_windows": 0}, "eval_windows"),
    ({"device": "warp"}, "device 'warp'"),
    ({"vocab_size": 256}, "257"),
])
def test_mistakes_stop_before_the_run_folder_is_made(config, change, match):
    with pytest.raises(InputError, match=match):
        train(replace(config, **change))
    assert not Path(config.run_dir).exists()


def test_a_corpus_shorter_than_a_window(config, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(f"Hello.\n{END_OF_TEXT}\n", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        train(replace(config, val_corpus=str(short)))
    file = prepare(replace(config, val_corpus=str(short)))[2]
    assert str(refused.value) == \
        f"{file.path}: {file.count} tokens are too few; one window needs {config.context_length + 1}: use more text"
    assert 0 < file.count <= config.context_length
    assert not Path(config.run_dir).exists()


@pytest.fixture
def own_data(config, tmp_path):
    "The config with a data folder of its own, to spoil."
    shutil.copytree(config.data_dir, tmp_path / "data")
    return replace(config, data_dir=str(tmp_path / "data"))


@pytest.mark.parametrize("which", [1, 2])
def test_token_files_of_another_tokenizer_are_refused(own_data, which):
    tokenizer, *_ = prepared = prepare(own_data)
    path = prepared[which].path.with_suffix(".json")
    path.write_text(path.read_text(encoding="utf-8").replace(tokenizer.fingerprint, "0" * 64), encoding="utf-8")
    with pytest.raises(InputError, match=f"made by tokenizer 000000000000, expected {tokenizer.fingerprint[:12]}"):
        prepare(own_data)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("change", [-1, -2, 6])
def test_a_token_file_of_another_size_is_refused(own_data, which, change):
    file = prepare(own_data)[which]
    size = file.path.stat().st_size
    os.truncate(file.path, size + change)
    with pytest.raises(InputError, match=f"{size + change} bytes, expected {size} .*delete it"):
        prepare(own_data)
    file.path.unlink()
    assert prepare(own_data)[which] == file and file.path.stat().st_size == size


def test_an_unfinished_token_file_is_made_again(own_data):
    "The description is written last, so without it the encoding was killed."
    for file in prepare(own_data)[1:]:
        file.path.write_bytes(file.path.read_bytes()[:100])
        file.path.with_suffix(".json").unlink()
        assert file in prepare(own_data)


@pytest.mark.parametrize("note", [None, "", "[7]", '{"sha256": "of another text"}'])
@pytest.mark.parametrize("encoded", [True, False])
def test_a_tokenizer_without_a_good_note_is_kept_for_its_token_file_alone(own_data, capsys, note, encoded):
    tokenizer, file, _ = prepare(own_data)
    made_from = file.path.with_name("made_from.json")
    assert json.loads(made_from.read_text(encoding="utf-8"))["fingerprint"] == tokenizer.fingerprint
    made_from.unlink() if note is None else made_from.write_text(note, encoding="utf-8")
    if not encoded:
        file.path.with_suffix(".json").unlink()
    capsys.readouterr()
    assert prepare(own_data)[0].fingerprint == tokenizer.fingerprint
    assert ("training a tokenizer" in capsys.readouterr().err) == (not encoded)


def test_killed_after_the_tokenizer_of_a_changed_text_was_saved(own_data, tmp_path, monkeypatch):
    "The old token files belong to the old tokenizer; the next command sees that and is not stuck."
    changed = replace(own_data, corpus=write_fables(tmp_path / "train.txt", 301, 6))
    shutil.move(str(Path(own_data.data_dir) / "train"), tmp_path / "was")
    shutil.copytree(tmp_path / "was", Path(changed.data_dir) / "train")
    monkeypatch.setattr("tinylm.train._token_file", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(changed)
    monkeypatch.undo()
    tokenizer, *files = prepare(changed)
    for file in files:
        file.check(tokenizer)


def test_a_changed_corpus_is_encoded_again_and_not_resumed(config, tmp_path):
    text = tmp_path / "mine.txt"
    write_fables(text, 300, 5)
    config = replace(config, corpus=str(text))
    run = train(replace(config, max_steps=10))
    first = prepare(config)[1]
    write_fables(text, 301, 6)
    assert prepare(config)[1].sha256 != first.sha256
    with pytest.raises(InputError, match="the tokenizer .* is not the one that the run began with"):
        resume(run)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(config):
    from tinylm.train import _check_data

    with pytest.raises(InputError, match="vocab_size 300 is less than the tokenizer's 400"):
        _check_data(replace(config, vocab_size=300), *prepare(config))


# --- learning


def test_the_debug_preset_learns_and_stays_above_the_floor(tmp_path, capsys):
    "Validation loss below the floor would be leakage; a loss that does not fall would be a broken step."
    config = replace(PRESETS["debug"], corpus=write_fables(tmp_path / "t.txt", 1000, 0), data_dir=str(tmp_path))
    run = train(replace(config, val_corpus=write_fables(tmp_path / "v.txt", 50, 1), run_dir=str(tmp_path / "run")))
    rows = metrics(run)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 2
    assert rows[-1]["floor"] - 0.01 < rows[-1]["story_loss"] < rows[0]["val_loss"] - 2
    assert "must have come" not in capsys.readouterr().out
    record = record_run(run, tmp_path / "record.json")
    assert record["curve"] == rows and record["diverged_at_step"] is None


def test_validation_stories_in_the_training_text_are_noticed(tmp_path, capsys):
    "A model that has them by heart goes below the floor, which no other can."
    config = replace(PRESETS["debug"], d_model=64, vocab_size=1024, lr=1e-2, warmup_iters=20, cosine_cycle_iters=160,
                     corpus=write_fables(tmp_path / "t.txt", 16, 0), data_dir=str(tmp_path), eval_every=160)
    run = train(replace(config, val_corpus=config.corpus, run_dir=str(tmp_path / "run")))
    last = metrics(run)[-1]
    assert last["story_loss"] < last["floor"] - 0.01 and last["stories"] == 9  # of 16
    assert "must have come with the training text" in capsys.readouterr().out


def test_a_context_too_short_for_any_fable_is_told(tmp_path, capsys):
    folder = tmp_path / "data/fables"
    folder.mkdir(parents=True)
    config = replace(PRESETS["debug"], context_length=32, data_dir=str(tmp_path / "data"), max_steps=1)
    run = train(replace(config, run_dir=str(tmp_path / "run")))
    assert "floor" not in metrics(run)[-1]
    assert "the floor stays unknown: no story fits into context_length 32" in capsys.readouterr().err


def test_evaluation_is_deterministic_and_knows_no_seed(base):
    _, _, file = prepare(base)
    model = TransformerLM(base)
    configs = [replace(base, seed=seed, batch_size=size) for seed, size in [(0, 4), (0, 4), (1, 9)]]
    assert len({evaluate(model, file.tokens(), config) for config in configs}) == 1


def test_the_floor_is_only_for_fables(base):
    tokenizer, _, _ = prepare(base)
    tokens = np.array(tokenizer.encode(f"This is no fable.{END_OF_TEXT}"))
    with pytest.raises(InputError):
        fables_floor(tokens, tokenizer, 1000)


def test_a_forecast_times_the_compiled_model_and_not_the_compiler(config, monkeypatch):
    def compile(model):
        def write_code(*args):
            handle.remove()
            time.sleep(1)

        handle = model.register_forward_pre_hook(write_code)
        compiled.append(model)
        return model

    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", compile)
    eager, foreseen = (forecast(replace(config, compile=compile), budget=0.9) for compile in (False, True))
    assert [model.config.d_model for model in compiled] == [config.d_model]
    assert foreseen.step_seconds < 0.5 and foreseen.measured == eager.measured == config.batch_size


def test_a_plan_by_the_command_makes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tinylm.cli", "train", "--plan", "--preset", "debug"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == \
        ["parameters", "tokens", "operations", "memory", "time", "speed", "left out"]
    assert "40 steps of 2,048" in done.stdout and "it fits" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_far_too_large_is_told(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinylm.train, "forecast", lambda config: forecast(config, budget=0))
    if tinylm.train._memory_there("cpu") is None:
        pytest.skip("this system does not tell how much memory there is")
    sizes = "--context_length 32 --d_model 16 --num_layers 1 --num_heads 2 --d_ff 32 --batch_size 1000000000".split()
    assert cli.main(["train", "--plan", "--device", "cpu", *sizes]) == 0
    assert "GB there are: too much; raise --grad_accum_steps\n" in capsys.readouterr().out
    monkeypatch.setattr(tinylm.train, "_time_steps", lambda *args: pytest.fail("it builds a model"))
    assert cli.main(["train", "--plan", "--device", "cpu", "--d_model", "100000", "--num_heads", "10"]) == 2
    assert re.fullmatch(r"tinylm: even a step with one sequence needs [\d,.]+ GB, and cpu has [\d,.]+ GB: "
                        r"choose a smaller model\n", capsys.readouterr().err)
    size = str(tinylm.train._memory_there("cpu") // 1000)  # the weights alone would fit, the logits do not
    assert cli.main(["train", "--plan", "--device", "cpu", "--vocab_size", size, "--d_model", "1",
                     "--num_heads", "1", "--no-use_rope"]) == 2
    assert "even a step with one sequence" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps, words", [
    (80, "steps 61 to 80 come after the cosine, at learning rate 0.001; --cosine_cycle_iters 80 would stretch it"),
    (5, "all 5 steps are warm-up, since warmup_iters is 5"), (6, ""), (60, ""),
])
def test_steps_that_miss_the_cosine_are_told(base, capsys, steps, words):
    tinylm.train._note_schedule(replace(base, max_steps=steps))
    assert capsys.readouterr().err.strip() == words


def test_a_moved_run_goes_on(base, tmp_path):
    run = train(replace(base, max_steps=7, run_dir=str(tmp_path / "here")))
    moved = run.rename(tmp_path / "there")
    with pytest.raises(InputError, match="there: the run cannot go on with d_model"):
        resume(moved, changes={"d_model": 64})
    assert resume(moved, changes={"run_dir": str(moved), "max_steps": 14}) == moved and not run.exists()
    assert checkpoints(moved)[-1].name == "step-00000014"


def test_a_run_tells_which_of_its_texts_is_not_to_be_found(base, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(base.corpus).parent)
    run = train(replace(base, corpus="train.txt", max_steps=7, run_dir=str(tmp_path / "run")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run: its corpus train.txt is not to be found from here.*--corpus"):
        resume(run, max_steps=14)
    resume(run, changes={"corpus": base.corpus, "max_steps": 14})
    assert checkpoints(run)[-1].name == "step-00000014"


def test_too_few_tokens_to_evaluate_are_told(base):
    with pytest.raises(InputError, match="32 tokens are too few: context_length 32 needs 33"):
        evaluate(TransformerLM(base), np.arange(32), base)


FORESEE = """
import json, sys, time
from dataclasses import replace
import torch
from tinylm.data import peak_memory
from tinylm.train import PRESETS, forecast, train
torch.set_num_threads(1)
time.perf_counter = time.process_time  # what others do on this machine shall not count
config = replace(PRESETS["laptop"], corpus=sys.argv[1], val_corpus=sys.argv[1], data_dir=sys.argv[2] + "/data",
                 run_dir=sys.argv[2] + "/run", vocab_size=1024, **json.loads(sys.argv[3]))
foreseen = forecast(config, budget=float(sys.argv[4]))
began = time.perf_counter()
train(config)
print(foreseen.seconds, time.perf_counter() - began)
print(foreseen.peak, peak_memory())
"""


def foresee(base, folder, budget=0, **changes):
    "Forecast and measure a run; gives pairs of seconds and of bytes."
    argv = [base.corpus, str(folder), json.dumps(changes), str(budget)]
    done = subprocess.run([sys.executable, "-c", FORESEE, *argv], capture_output=True, text=True, timeout=120)
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()[-2:]]


def test_a_forecast_is_near_what_happens(base, tmp_path):
    "Memory and time of a run of seconds, within a quarter; others may use the caches, so time has three tries."
    for attempt in range(3):
        seconds, memory = foresee(base, tmp_path / str(attempt), 3, batch_size=64, max_steps=4, eval_windows=16)
        assert memory[0] == pytest.approx(memory[1], rel=0.25)
        if seconds[0] == pytest.approx(seconds[1], rel=0.25):
            return
    pytest.fail(f"forecast {seconds[0]:.2f} seconds, and it took {seconds[1]:.2f}")


@pytest.mark.parametrize("changes", [
    {"d_model": 1024, "d_ff": 2816, "context_length": 32, "batch_size": 1},
    {"batch_size": 48, "grad_accum_steps": 4},
    {"batch_size": 24, "dtype": "bfloat16"},
], ids=["weights", "pieces", "bfloat16"])
def test_the_memory_is_foreseen(base, tmp_path, changes):
    "Whatever takes most of it; saving takes no more than a step."
    memory = foresee(base, tmp_path, **changes, max_steps=2, eval_windows=4)[1]
    assert memory[0] == pytest.approx(memory[1], rel=0.25)


def test_a_plan_for_a_run_that_goes_on_foresees_the_rest(config, capsys):
    run = train(replace(config, max_steps=30))
    command = ["train", "--resume", str(run), "--plan", "--max_steps"]
    for last, left in ((50, "2,560 in 20 steps of 128, after the 30 that are done"), (30, "0 in 0 steps")):
        assert cli.main([*command, str(last)]) == 0
        assert f"tokens      {left}" in capsys.readouterr().out
    assert cli.main([*command, "50", "--lr", "0.5"]) == 2
    assert "lr 0.01 -> 0.5; say --allow_changes" in capsys.readouterr().err
    assert checkpoints(run)[-1].name == "step-00000030" and metrics(run)[-1]["step"] == 30


def test_training_does_not_wait_for_the_compiler_to_load(config):
    "PyTorch's compiler takes a second or two to import, in every process that trains."
    program = ("import json, sys\nfrom tinylm.train import TrainConfig, resume, train\n"
               "run = train(TrainConfig(**json.loads(sys.argv[1])))\nresume(run, max_steps=4)\n"
               "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(vars(replace(config, max_steps=2)))],
                          capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "torch.optim" in loaded, done.stderr
    assert not loaded & {"torch._dynamo", "sympy"}
