"""Training: the same run every time, one rule for its folder, options, foreseeing. See also test_checkpoint.py."""
import json
import os
import random
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tiny import checkpoints, metrics, one_thread, result, tell  # noqa: F401

import tinylm.train
from tinylm.core import InputError
from tinylm.train import TrainConfig, forecast, read_config, train

# --- the one rule: train makes the folder whole


def test_a_finished_run_is_left_as_it_is_and_can_be_extended(config, capsys):
    run = train(replace(config, max_steps=30), tell)
    before = result(run)
    for last in (30, 20):
        capsys.readouterr()
        assert train(replace(config, max_steps=last), tell) == run and result(run) == before
        assert capsys.readouterr().out.startswith(f"step 30 of {last} is done; validation loss")
    train(replace(read_config(run), max_steps=60), tell)
    assert metrics(run)[-1]["step"] == 60


FREE = {"resume": None, "preset": "debug", "watch": True, "device": "cpu", "log_every": 3, "eval_every": 11,
        "checkpoint_every": 5, "max_minutes": 9.0, "max_steps": 12}
FIXED = {"vocab_size": 401, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 1, "d_ff": 48,
         "rope_theta": 1.0, "norm": "post", "use_rope": False, "ffn": "silu", "seed": 5, "lr": 0.1, "min_lr": 0.0,
         "batch_size": 8, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1, "warmup_iters": 4,
         "cosine_cycle_iters": 90, "max_l2_norm": 2.0, "grad_accum_steps": 2,
         "optimizer": "muon", "muon_lr": 0.1, "schedule": "linear", "windows": "stories",
         "dtype": "bfloat16", "eval_windows": 4, "num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True}


def test_another_config_is_refused_by_name_and_a_free_field_is_not(config):
    "A setting that the run does not know, as in folders of an earlier edition, has its default."
    run = train(replace(config, max_steps=7))
    named = {*FREE, *FIXED, "corpus", "val_corpus", "data_dir", "run_dir", "fsdp", "compile", "tracker"}
    assert named == {f.name for f in fields(TrainConfig)}, "say of a new field whether it may change"
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "dtype"}), encoding="utf-8")
    before = result(run)
    for name, value in FIXED.items():
        with pytest.raises(InputError, match=f"made with {name} "):
            train(replace(config, **{name: value}))
    assert result(run) == before
    train(replace(config, **FREE))
    assert metrics(run)[-1]["step"] == 12 and metrics(run)[-1]["activations"]


def test_resume_wants_a_run_that_is_there_and_a_new_run_an_empty_folder(config, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        train(replace(config, resume=str(tmp_path / "nothing")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="it holds files, and no run"):
        train(replace(config, run_dir=str(tmp_path / "full")))
    assert not (tmp_path / "nothing").exists() and set(os.listdir(tmp_path / "full")) <= {"thesis.txt", ".lock"}


def test_runs_of_one_second_have_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinylm.train.time, "strftime", lambda form: "now")
    names = [train(replace(config, run_dir=None, max_steps=1)).name for _ in range(3)]
    assert names == ["now-train-reference", "now-train-reference-2", "now-train-reference-3"]


def test_when_the_time_is_over_the_run_stops_and_goes_on_elsewhere(config, tmp_path, capsys):
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    run = train(replace(config, max_minutes=1e-9), tell)
    assert f"; go on with --resume {run}\n" in capsys.readouterr().out
    assert [folder.name for folder in checkpoints(run)] == ["step-00000001"]
    moved = shutil.move(run, tmp_path / "moved")
    assert result(train(replace(read_config(moved), resume=str(moved), max_minutes=None), tell)) == result(straight)


# --- the same run


def test_a_run_hangs_on_its_seed_and_on_no_global_random_number(config, tmp_path):
    "Whatever others do with the global generators, the run is the same, and it leaves them alone."
    def disturb(model, tokenizer, step):
        random.random(), np.random.rand(), torch.rand(1)

    def states():
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    config, before = replace(config, max_steps=30), states()
    quiet = train(config, lambda *args: None)
    assert states() == before
    torch.manual_seed(77)
    assert result(train(replace(config, run_dir=str(tmp_path / "loud")), disturb)) == result(quiet)
    assert result(train(replace(config, run_dir=str(tmp_path / "other"), seed=4)))[4] != result(quiet)[4]


# --- options


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_model_has_the_losses_of_the_eager_one(config, tmp_path):
    "Writing the code takes half a minute the first time; later torch finds it in its cache."
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler on the PATH")
    losses = []
    for compile in (False, True):
        torch._dynamo.utils.counters.clear()
        run = train(replace(config, compile=compile, log_every=1, max_steps=3, run_dir=str(tmp_path / str(compile))))
        losses.append([row["train_loss"] for row in metrics(run)[1:]])
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compile
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


def test_tensorboard_shows_what_the_log_holds(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, tracker="tensorboard", watch=True)
    train(replace(config, max_steps=18))
    run = train(replace(config, max_steps=30))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag, found in [("train_loss", lambda row: row["train_loss"]),
                       ("updates/layers.0", lambda row: row["updates"].get("layers.0"))]:
        expected = {row["step"]: found(row) for row in metrics(run) if found(row)}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(expected, rel=1e-6)


def test_wandb_takes_the_log(config, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(replace(config, tracker="wandb", max_steps=8))
    assert wandb.run.disabled and wandb.run.config["d_model"] == 16


def test_restarts_need_a_run_folder(config, monkeypatch):
    "Else each start would be a run of its own, and the work before it lost."
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(InputError, match="run_dir"):
        train(replace(config, run_dir=None))


@pytest.mark.parametrize("change, match", [
    ({"device": "vulkan"}, "device 'vulkan' cannot be used here"), ({"corpus": "nowhere.txt"}, "nowhere.txt"),
    ({"batch_size": 2**36}, "GB of memory of"), ({"grad_accum_steps": 3}, "batch_size 4 must be a multiple"),
])
def test_what_this_machine_cannot_do_stops_before_the_run_folder_is_made(config, change, match):
    with pytest.raises(InputError, match=match):
        train(replace(config, **change))
    assert not os.path.exists(config.run_dir)


@pytest.mark.parametrize("name, value", [
    ("weight_decay", float("nan")), ("muon_lr", 0.0), ("lr", float("inf")), ("lr", 0.0), ("beta1", 1.0),
    ("batch_size", 0), ("log_every", 0), ("max_steps", 0), ("seed", -1), ("warmup_iters", 60), ("max_minutes", 0.0),
])
def test_values_that_nobody_can_mean_are_refused_by_name(base, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}; expected"):
        replace(base, **{name: value})


# --- foreseeing, and the end


@pytest.mark.parametrize("loss, words", [(0.5, "0.2500 above their floor 0.2500"),
                                         (0.2, "the training text must hold stories of the validation text")])
def test_the_report_tells_the_excess_and_when_it_cannot_be(base, tmp_path, capsys, loss, words):
    row = {"step": 60, "val_loss": 0.6, "story_loss": loss, "floor": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    tinylm.train._report(base, tmp_path, 60)
    assert words in capsys.readouterr().out


def test_a_forecast_tells_size_memory_and_time_and_writes_nothing(config):
    table = forecast(config)
    assert f"tokens      {60 * 128:,} in 60 steps of 128" in table and "seconds a step" in table
    assert not os.path.exists(config.run_dir)
