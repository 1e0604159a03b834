"""Faults that training must survive: killed processes, damaged checkpoints, data that do not belong together."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tinylm.data import END_OF_TEXT, InputError, fables
from tinylm.model import TransformerLM
from tinylm.optim import AdamW
from tinylm.train import (
    PRESETS,
    Stopped,
    TrainConfig,
    evaluate,
    fables_floor,
    load_checkpoint,
    load_run,
    prepare,
    record_run,
    resume,
    save_checkpoint,
    train,
)

CLOCK = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are faster on one thread, and child processes must compute as their parent does."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_fables(path, num_stories, seed):
    path.write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(num_stories, seed)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny config whose data are prepared."
    folder = tmp_path_factory.mktemp("data")
    config = TrainConfig(
        vocab_size=400, context_length=32, d_model=16, num_layers=1, num_heads=2, d_ff=32,
        corpus=write_fables(folder / "train.txt", 300, 0), val_corpus=write_fables(folder / "valid.txt", 20, 1),
        data_dir=str(folder / "data"), device="cpu", lr=1e-2, batch_size=4, warmup_iters=5, cosine_cycle_iters=60,
        log_every=4, eval_every=20, eval_windows=8, checkpoint_every=7,
    )
    prepare(config)
    return config


@pytest.fixture
def config(base, tmp_path):
    return replace(base, run_dir=str(tmp_path / "run"))


def checkpoints(run):
    return sorted((Path(run) / "checkpoints").iterdir())


def metrics(run):
    with open(Path(run) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def result(run):
    "All that must be equal: weights and moments to the bit, the step, the log but for the clock, the samples."
    newest = checkpoints(run)[-1]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    log = [{key: value for key, value in row.items() if key not in CLOCK} for row in metrics(run)]
    tensors = [(newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    return newest.name, state["optimizer"], log, (Path(run) / "samples.txt").read_bytes(), tensors


def tell(model, tokenizer, step):
    return f"a story after step {step} {model.lm_head.weight.sum().item()}"


# --- exact resume


PROGRAM = """
import sys, json, torch
torch.set_num_threads(1)
from tinylm.train import TrainConfig, train, resume
from test_train import tell
config = TrainConfig(**json.loads(sys.argv[1]))
resume(config.run_dir, tell) if sys.argv[2] == "resume" else train(config, tell)
"""


def start(config, how):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asdict(config)), how]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def wait_for_step(process, run, step):
    "Wait until the log has reached a step."
    log = Path(run) / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and any(json.loads(line)["step"] >= step for line in whole_lines(log)):
            return
        time.sleep(0.001)
    raise AssertionError(process.stderr.read().decode())


def whole_lines(path):
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_killed_at_random_moments_equals_never_stopped(config, tmp_path):
    config = replace(config, cosine_cycle_iters=240, checkpoint_every=25)
    straight = train(replace(config, run_dir=str(tmp_path / "straight")), tell)
    dice = random.Random(0)
    for how, low, high in [("train", 10, 100), ("resume", 110, 200)]:
        with start(config, how) as process:
            wait_for_step(process, config.run_dir, dice.randint(low, high))
            time.sleep(dice.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert metrics_end(config.run_dir) < 240, "killed too late to test anything"
    resume(config.run_dir, tell)
    assert result(config.run_dir) == result(straight)
    assert not list((Path(config.run_dir) / "checkpoints").glob(".*")), "temporary folders stayed"


def metrics_end(run):
    return json.loads(whole_lines(Path(run) / "metrics.jsonl")[-1])["step"]


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


def test_killed_before_the_first_checkpoint_starts_again(config, tmp_path):
    def fail(model, tokenizer, step):
        raise RuntimeError("power cut")

    early = replace(config, checkpoint_every=50)
    straight = train(replace(early, run_dir=str(tmp_path / "straight")), tell)
    with pytest.raises(RuntimeError, match="power cut"):
        train(early, fail)
    resume(config.run_dir, tell)
    assert result(config.run_dir) == result(straight)


def test_a_finished_run_can_be_resumed_and_extended(config):
    run = train(replace(config, max_steps=30), tell)
    before = result(run)
    resume(run)
    assert result(run) == before
    resume(run, max_steps=60)
    assert metrics(run)[-1]["step"] == 60


def test_same_seed_same_run_and_another_seed_another(config, tmp_path):
    seeds = {"a": 3, "b": 3, "c": 4}
    runs = [train(replace(config, seed=seed, run_dir=str(tmp_path / name))) for name, seed in seeds.items()]
    assert result(runs[0]) == result(runs[1])
    assert result(runs[0])[4] != result(runs[2])[4]


# --- damaged checkpoints


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
    assert f"step-00000060/{name}" in said and "before it" in said
    resume(run, tell)
    assert result(run) == whole


def test_every_flipped_bit_of_the_state_is_noticed(config, tmp_path):
    "The numbers in state.json have a checksum too: 7 steps must not become 3."
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters())
    save_checkpoint(model, optimizer, 7, tmp_path / "c")
    path = tmp_path / "c" / "state.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"iteration": 7', '"iteration": 3'), encoding="utf-8")
    with pytest.raises(InputError, match="state.json"):
        load_checkpoint(tmp_path / "c", model, optimizer)


def test_all_checkpoints_damaged_is_said(config):
    run = train(config)
    for folder in checkpoints(run):
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(InputError, match="none of its 3 checkpoints"):
        resume(run)


def test_nothing_half_written_stays(config, tmp_path, monkeypatch):
    "A disk that fills up while a checkpoint is written: the old one is untouched, nothing temporary stays."
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters())
    save_checkpoint(model, optimizer, 1, tmp_path / "checkpoints" / "step-00000001")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("step-00000001", "step-00000002"):
        with pytest.raises(InputError, match="No space left"):
            save_checkpoint(model, optimizer, 2, tmp_path / "checkpoints" / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_shape_is_refused(config, tmp_path):
    model = TransformerLM(config)
    save_checkpoint(model, AdamW(model.parameters()), 1, tmp_path / "c")
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


def test_files_have_the_modes_of_the_umask(config, tmp_path):
    old = os.umask(0o027)
    try:
        model = TransformerLM(config)
        save_checkpoint(model, AdamW(model.parameters()), 1, tmp_path / "c")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o640}
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750


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
    with pytest.raises(InputError, match="tokens are too few"):
        train(replace(config, val_corpus=str(short)))
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


def test_the_debug_preset_learns_and_stays_above_the_floor(tmp_path):
    "Validation loss below the floor would be leakage; a loss that does not fall would be a broken step."
    config = replace(PRESETS["debug"], corpus=write_fables(tmp_path / "t.txt", 1000, 0), data_dir=str(tmp_path))
    run = train(replace(config, val_corpus=write_fables(tmp_path / "v.txt", 50, 1), run_dir=str(tmp_path / "run")))
    rows = metrics(run)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 2
    assert rows[-1]["floor"] - 0.01 < rows[-1]["story_loss"] < rows[0]["val_loss"] - 2
    record = record_run(run, tmp_path / "record.json")
    assert record["curve"] == rows and record["diverged_at_step"] is None


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
