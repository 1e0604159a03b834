"""Training: the same run every time, one rule for its folder, options, learning. See also test_checkpoint.py."""
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from tiny import checkpoints, metrics, one_thread, result, tell, write_fables  # noqa: F401

import tinylm.train
from tinylm.core import InputError
from tinylm.model import TransformerLM
from tinylm.train import (
    PRESETS,
    TrainConfig,
    evaluate,
    forecast,
    load_run,
    prepare,
    read_config,
    record_run,
    train,
)

# --- the one rule: train makes the folder whole


def test_a_finished_run_is_left_as_it_is_and_can_be_extended(config, capsys):
    run = train(replace(config, max_steps=30), tell)
    before = result(run)
    for last in (30, 20):
        assert train(replace(config, max_steps=last), tell) == run and result(run) == before
        assert f"step 30 is done, and the last is {last}; more with --max_steps\n" in capsys.readouterr().err
    train(replace(read_config(run), max_steps=60), tell)
    assert metrics(run)[-1]["step"] == 60 and "is done" not in capsys.readouterr().err


FREE = {"resume": None, "preset": "debug", "watch": True, "device": "cpu", "log_every": 3, "eval_every": 11,
        "checkpoint_every": 5, "max_minutes": 9.0, "max_steps": 12}
FIXED = {"vocab_size": 401, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 1, "d_ff": 48,
         "rope_theta": 1.0, "norm": "post", "use_rope": False, "ffn": "silu", "seed": 5, "lr": 0.1, "min_lr": 0.0,
         "batch_size": 8, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1, "warmup_iters": 4,
         "cosine_cycle_iters": 90, "max_l2_norm": 2.0, "grad_accum_steps": 2,
         "optimizer": "muon", "muon_lr": 0.1, "schedule": "linear", "windows": "stories",
         "dtype": "bfloat16", "eval_windows": 4, "num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True}


def test_another_config_is_refused_by_name_and_a_free_field_is_not(config):
    run = train(replace(config, max_steps=7))
    named = {*FREE, *FIXED, "corpus", "val_corpus", "data_dir", "run_dir", "fsdp", "compile", "tracker"}
    assert named == {f.name for f in fields(TrainConfig)}, "say of a new field whether it may change"
    before = result(run)
    for name, value in FIXED.items():
        with pytest.raises(InputError, match=f"made with {name} "):
            train(replace(config, **{name: value}))
    assert result(run) == before
    train(replace(config, **FREE))
    assert metrics(run)[-1]["step"] == 12 and metrics(run)[-1]["activations"]


def test_a_setting_that_the_run_does_not_know_has_its_default(config):
    "As in folders of an earlier edition."
    run = train(replace(config, max_steps=7))
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "dtype"}), encoding="utf-8")
    train(replace(config, max_steps=9))
    with pytest.raises(InputError, match="dtype float32, not bfloat16"):
        train(replace(config, dtype="bfloat16"))


def test_resume_wants_a_run_that_is_there(config, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        train(replace(config, resume=str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="it holds files, and no run"):
        train(replace(config, run_dir=str(tmp_path / "full")))
    assert set(os.listdir(tmp_path / "full")) <= {"thesis.txt", ".lock"}


def test_runs_of_one_second_have_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinylm.train.time, "strftime", lambda form: "now")
    names = [train(replace(config, run_dir=None, max_steps=1)).name for _ in range(3)]
    assert names == ["now-train-reference", "now-train-reference-2", "now-train-reference-3"]


def test_when_the_time_is_over_the_run_stops_and_goes_on(config, tmp_path, capsys):
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    run = train(replace(config, max_minutes=1e-9), tell)
    assert "minutes are over at step 1; go on with --resume" in capsys.readouterr().err
    assert [folder.name for folder in checkpoints(run)] == ["step-00000001"]
    assert result(train(config, tell)) == result(straight)


def test_a_moved_run_goes_on(config, tmp_path):
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    run = train(replace(config, max_minutes=1e-9), tell)
    moved = shutil.move(run, tmp_path / "moved")
    assert result(train(replace(read_config(moved), resume=str(moved), max_minutes=None), tell)) == result(straight)


# --- the same run


def test_same_seed_same_run_and_another_seed_another(config, tmp_path):
    seeds = {"a": 3, "b": 3, "c": 4}
    runs = [train(replace(config, seed=seed, run_dir=str(tmp_path / name))) for name, seed in seeds.items()]
    assert result(runs[0]) == result(runs[1])
    assert result(runs[0])[4] != result(runs[2])[4]


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


def test_evaluation_is_deterministic_and_knows_no_seed(base):
    model, tokens = TransformerLM(base), prepare(base)[2].tokens()
    assert evaluate(model, tokens, base) == evaluate(model, tokens, replace(base, seed=9))
    with pytest.raises(InputError, match="too few"):
        evaluate(model, tokens[:20], base)


def test_the_best_loss_of_a_record_counts_what_came_before_a_stop(config, tmp_path):
    config = replace(config, lr=1.0, warmup_iters=59)  # a rate that keeps rising spoils the model again
    run = train(replace(config, max_steps=40))
    best = record_run(train(config), run / "record.json")["best_val_loss"]
    losses = [row["val_loss"] for row in metrics(run) if row["val_loss"] is not None]
    assert best == min(losses) < losses[-1]


# --- options


def test_pieces_give_the_losses_of_the_whole_batch(config, tmp_path):
    configs = [replace(config, grad_accum_steps=n, run_dir=str(tmp_path / str(n))) for n in (1, 2, 4)]
    whole, *others = ([row["train_loss"] for row in metrics(train(config))[1:]] for config in configs)
    for losses in others:
        np.testing.assert_allclose(losses, whole, rtol=1e-4)


def test_bfloat16_learns_and_keeps_its_weights_in_32_bits(config, tmp_path):
    runs = [train(replace(config, dtype=dtype, run_dir=str(tmp_path / dtype))) for dtype in ("float32", "bfloat16")]
    ends = [metrics(run)[-1]["val_loss"] for run in runs]
    assert ends[0] != ends[1] and abs(ends[0] - ends[1]) < 0.1
    assert {p.dtype for p in load_run(runs[1])[0].parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_model_has_the_losses_of_the_eager_one_and_goes_on(config, tmp_path):
    "Writing the code takes half a minute the first time; later torch finds it in its cache."
    if not any(map(shutil.which, tinylm.train.COMPILERS)):
        pytest.skip(f"no C++ compiler on the PATH: {', '.join(tinylm.train.COMPILERS)}")
    losses = []
    for compile in (False, True):
        short = replace(config, compile=compile, log_every=1, run_dir=str(tmp_path / str(compile)))
        torch._dynamo.utils.counters.clear()
        train(replace(short, max_steps=5))
        losses.append([row["train_loss"] for row in metrics(train(replace(short, max_steps=7)))[1:]])
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compile
    assert len(losses[1]) == 7
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


def test_tensorboard_shows_what_the_log_holds(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, rows = replace(config, tracker="tensorboard", watch=True), []
    run = train(replace(config, max_steps=18), on_log=rows.append)
    train(replace(config, max_steps=30), on_log=rows.append)
    assert rows == metrics(run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train_loss")}
    assert shown == pytest.approx({row["step"]: row["train_loss"] for row in rows if row["train_loss"]}, rel=1e-6)
    layers = {event.step: event.value for event in events.Scalars("updates/layers.0")}
    expected = {row["step"]: row["updates"]["layers.0"] for row in rows if "updates" in row}
    assert layers == pytest.approx(expected, rel=1e-6)


def test_wandb_keeps_the_log_without_a_network(config, tmp_path):
    pytest.importorskip("wandb")
    code = ("import sys, json; from tinylm.train import *; c = TrainConfig(**json.loads(sys.argv[1])); train(c)")
    text = json.dumps(asdict(replace(config, tracker="wandb", max_steps=8)))
    subprocess.run([sys.executable, "-c", code, text], check=True, capture_output=True,
                   env={**os.environ, "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)})
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("there, best", [("cuda mps", "cuda"), ("mps", "mps"), ("", "cpu")])
def test_auto_is_the_best_device_there_is(monkeypatch, there, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert tinylm.train._pick_device("auto") == best


@pytest.mark.parametrize("change, match", [
    ({"device": "vulkan"}, "device 'vulkan' cannot be used here"), ({"fsdp": True}, "start them with torchrun"),
    ({"corpus": "nowhere.txt"}, "nowhere.txt"), ({"tracker": "tensorboard"}, "pip install tensorboard"),
    ({"compile": True}, "compile needs a C"), ({"batch_size": 2**36}, "of memory, and cpu has"),
])
def test_what_this_machine_cannot_do_stops_before_the_run_folder_is_made(config, monkeypatch, change, match):
    monkeypatch.setattr(tinylm.train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tinylm.train, "COMPILERS", ["no-such-compiler"])
    with pytest.raises(InputError, match=match):
        train(replace(config, **change))
    assert not os.path.exists(config.run_dir)


@pytest.mark.parametrize("name, value", [
    ("weight_decay", float("nan")), ("muon_lr", 0.0), ("lr", float("inf")), ("lr", 0.0), ("beta1", 1.0),
    ("min_lr", 1.0),
    ("batch_size", 0), ("log_every", 0), ("max_steps", 0), ("seed", -1), ("warmup_iters", 60),
    ("grad_accum_steps", 3), ("max_minutes", 0.0),
])
def test_values_that_nobody_can_mean_are_refused_by_name(base, name, value):
    with pytest.raises(InputError, match="batch_size" if name == "grad_accum_steps" else name):
        replace(base, **{name: value})


# --- learning, and foreseeing


def test_the_debug_preset_learns_and_stays_above_the_floor(tmp_path, capsys):
    run = train(replace(PRESETS["debug"], data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / "run")))
    rows = metrics(run)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 2
    assert rows[-1]["story_loss"] > rows[-1]["floor"] > 0.2
    assert f"their floor is {rows[-1]['floor']:.4f}" in capsys.readouterr().out


def test_validation_stories_in_the_training_text_are_noticed(tmp_path, capsys):
    "A model that has them by heart goes below the floor, which no other can."
    text = write_fables(tmp_path / "few.txt", 16, 0)
    config = replace(PRESETS["debug"], d_model=64, vocab_size=1024, lr=1e-2, warmup_iters=20, cosine_cycle_iters=160,
                     corpus=text, val_corpus=text, data_dir=str(tmp_path / "data"), eval_every=160)
    train(replace(config, run_dir=str(tmp_path / "run")))
    assert "must have come with the training text" in capsys.readouterr().out


def test_a_forecast_tells_size_memory_and_time_and_writes_nothing(config, tmp_path):
    table = forecast(replace(config, run_dir=str(tmp_path / "run")))
    assert f"tokens      {60 * 128:,} in 60 steps of 128" in table and "seconds a step" in table
    assert not (tmp_path / "run").exists()
    assert "parameters  22,696,448\n" in forecast(replace(PRESETS["reference"], batch_size=1))


def test_training_does_not_wait_for_the_compiler_to_load(config):
    "Loading it takes two seconds, for nothing."
    code = ("import sys, json; from tinylm.train import *; c = TrainConfig(**json.loads(sys.argv[1])); train(c)\n"
            "print([m for m in ('torch._dynamo', 'sympy', 'torch._inductor') if m in sys.modules])")
    text = json.dumps(asdict(replace(config, max_steps=2)))
    done = subprocess.run([sys.executable, "-c", code, text], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
