"""The tinylm command from outside: slips, signals, closed streams, and every command that the pages show."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import write_fables

from tinylm import cli

SMALL = ("--preset debug --vocab_size 300 --context_length 16 --d_model 16 --num_heads 2 --d_ff 32 --num_layers 1 "
         "--batch_size 4 --max_steps 10 --eval_every 5 --checkpoint_every 5 --log_every 5 --device cpu").split()
SOURCE = ("--lr 8e-4 --batch_size 64 --context_length 256 --vocab_size 10000 --num_layers 4 --num_heads 16 --d_ff 1344 "
          "--rope_theta 10000.0 --d_model 512 --beta1 0.9 --beta2 0.999 --weight_decay 0.0001 --warmup_iters 2000 "
          "--cosine_cycle_iters 20000 --max_l2_norm 1").split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
TINYLM = [sys.executable, "-m", "tinylm.cli"]


def process(*argv, cwd, shell="", **kw):
    "Run the command in a process of its own; `shell` may redirect it."
    command = shlex.join([*TINYLM, *map(str, argv)]) + " " + shell
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, shell=True, timeout=120, **kw)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A folder with a small corpus, its token files and one finished run, run/."
    folder = tmp_path_factory.mktemp("shop")
    write_fables(folder / "corpus.txt", 120, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "run"]) == 0
    return folder


@pytest.fixture
def own(shop, tmp_path, monkeypatch):
    "A copy of the shop to spoil; the working directory."
    shutil.copytree(shop, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def complaint(capfd, *argv, code=2):
    "Run in this process; return the one line of complaint, before which nothing is told."
    capfd.readouterr()
    assert cli.main(list(map(str, argv))) == code
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("tinylm: ")]
    assert len(lines) == 1 and "Traceback" not in err and err.rstrip().endswith(lines[0]), err
    return lines[0]


SLIPS = [
    ("train --batchsize 8", "--batchsize --batch_size tinylm|train|--help"),
    ("train --lr fast", "--lr 'fast' FLOAT tinylm|train|--help"),
    ("train --num_layers 2.5", "--num_layers '2.5' INT"),
    ("train --preset huge", "--preset 'huge' 'debug' 'laptop' 'fast' 'reference'"),
    ("train --lr", "--lr tinylm|train|--help"),
    ("train story.txt", "story.txt quotes"),
    ("train --use_rope=false", "false switch"),
    ("train --weight_decay nan", "weight_decay nan"),
    ("train --seed 18446744073709551616", "seed 18446744073709551616"),
    ("train --d_model 130 --num_heads 4", "d_model num_heads 4"),
    ("train --batch_size 0", "batch_size 0"),
    ("train --corpus missing.txt", "missing.txt"),
    ("train --device gpu9", "gpu9"),
    ("train --resume missing --lr 1", "missing run"),
    ("train --dtype float16", "--dtype 'float32' 'bfloat16'"),
    ("data tinystorys", "tinystorys"),
    ("data a b", "b quotes"),
    ("tokenize --vocab_siz 300", "--vocab_size"),
    ("export", "tinylm|train"),
    ("generate no/run Once", "no/run"),
    ("generate --num 0", "--num 0"),
    ("search --jobs 0", "--jobs 0"),
    ("search --lrs quick", "lrs 'quick'"),
    ("ablate --plan x.json --lr 1", "--lr x.json"),
    ("compare", "tinylm|train"),
    ("check", "RMSNorm AdamW"),
    ("check RMSNorm=x.py --time_limit -1", "--time_limit -1"),
    ("check RMSNorm=missing.py", "missing.py"),
    ("trian", "'trian' train"),
]


@pytest.mark.parametrize("argv, words", SLIPS, ids=lambda x: x)
def test_a_slip_gets_one_line_and_leaves_nothing(argv, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    line = complaint(capfd, *argv.split())
    assert all(word.replace("|", " ") in line for word in words.split()), line
    assert list(tmp_path.rglob("*")) == []


def test_too_little_memory_is_told_in_a_line_and_a_bug_keeps_its_traceback(monkeypatch, capfd):
    import torch

    monkeypatch.setitem(cli.VERBS, "data", lambda verb, argv: torch.empty(1 << 50))
    assert "out of memory; try a smaller --batch_size" in complaint(capfd, "data")
    monkeypatch.setitem(cli.VERBS, "data", lambda verb, argv: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main(["data"])


@pytest.mark.parametrize("choice", ["--temperature -1", "--top_p 1.5", "--top_k 0", "--max_new_tokens -2",
                                    "--seed 18446744073709551616", "--temperature nan"])
def test_a_choice_out_of_range_is_told_before_anything_is_written(choice, own, capfd):
    assert choice.split()[0][2:] in complaint(capfd, "generate", "run", "Once", *choice.split())
    cli.main(["generate", "run", "Once", *choice.split()])
    assert capfd.readouterr().out == ""


def told(capfd, *argv):
    capfd.readouterr()
    assert cli.main(["generate", "--seed", "1", "--max_new_tokens", "9", *argv]) == 0
    return capfd.readouterr()


def test_what_is_no_run_is_a_prompt(own, capfd):
    shutil.copytree(own / "run", own / "runs/old")
    shutil.copytree(own / "run", own / "runs/new")
    for state in own.glob("runs/old/checkpoints/*/state.json"):
        os.utime(state, (1, 1))
    (own / "Once").mkdir()
    for prompt in ("A fox", "Yes/No?", "Once", "", "a red ball " * 50):
        said = told(capfd, *[prompt] * bool(prompt))
        assert said.out.startswith(prompt) and "runs/new" in said.err.replace(os.sep, "/")
    assert told(capfd, "runs/old", "Yes/No?").out.startswith("Yes/No?")


def test_without_a_run_the_shipped_model_tells(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("tinylm").mkdir()  # a folder that is no run
    for argv in (["Once upon"], ["tinylm", "Once upon"]):
        said = told(capfd, *argv)
        assert said.out.startswith("Once upon") and "tinylm, seed 1" in said.err
        assert ("no run under runs/ yet" in said.err) == (len(argv) == 1)


def test_arguments_may_stand_anywhere_and_seeds_follow_each_other(own, capfd):
    stories = {told(capfd, *argv.split("|")).out for argv in
               ("run|The fox|--top_k|9", "--top_k|9|run|The fox", "run|--top_k|9|The fox", "run|--top-k=9|The fox")}
    assert len(stories) == 1 and stories.pop().startswith("The fox")
    assert told(capfd, "run", "A", "--num", "2").out == (
        told(capfd, "run", "A").out + "\n" + told(capfd, "run", "A", "--seed", "2").out)


def test_the_prompt_loop_takes_any_bytes_and_closed_streams_get_a_line(own):
    argv = ["generate", "run", "-i", "--max_new_tokens", "5"]
    done = process(*argv, cwd=own, input=b"The fox\nThe " + b"\xff owl\n")
    assert done.returncode == 0 and "The fox" in done.stdout.decode() and "The � owl" in done.stdout.decode()
    for shell in ("<&-", ">&-"):
        done = process(*argv, cwd=own, shell=shell)
        assert done.returncode == 2 and b"closed" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr


def test_the_source_command_is_accepted_unchanged():
    config, plan = cli._train_flags(SOURCE)
    for flag, value in zip(SOURCE[::2], SOURCE[1::2], strict=True):
        assert getattr(config, flag[2:]) == float(value)
    assert config.last_step == 20_000 and config.corpus == "fables" and config.preset == "laptop" and not plan


def test_both_spellings_and_presets():
    a, _ = cli._train_flags(["--batch_size", "3", "--no-use_rope", "--preset", "debug"])
    b, plan = cli._train_flags(["--preset=debug", "--batch-size=3", "--no_use_rope", "--plan"])
    assert a == b and a.batch_size == 3 and not a.use_rope and a.preset == "debug" and plan
    assert cli._train_flags(["--lr", "1", "--lr", "2"])[0].lr == 2


def test_resume_takes_the_settings_of_the_run_and_flags_override_them(own, capfd):
    config, _ = cli._train_flags(["--resume", "run", "--max-steps", "12"])
    assert (config.vocab_size, config.max_steps, config.run_dir) == (300, 12, "run")
    assert cli.main(["train", "--resume", "run", "--max_steps", "12"]) == 0
    lines = [json.loads(line) for line in (own / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["step"] == 12
    assert "lr" in complaint(capfd, "train", "--resume", "run", "--lr", "0.5")


def test_home_is_expanded(own, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(own))
    assert cli.main(["data", "corpus.txt", "--data_dir=~/elsewhere"]) == 0
    assert (own / "elsewhere").is_dir() and not (own / "~").exists()
    out = capfd.readouterr().out
    assert "MB" in out and (own / "corpus.txt").read_text(encoding="utf-8").split("\n")[0] in out


def test_divergence_has_its_own_code(own, capfd):
    hot = "--lr 1e30 --min_lr 1e30 --warmup_iters 0 --norm none --max_l2_norm 1e30 --run_dir new".split()
    assert re.search(r"step \d+", complaint(capfd, "train", *SMALL, *hot, "--corpus", "corpus.txt", code=3))


def test_tokenize_tells(own, capfd):
    assert cli.main(["tokenize", "--corpus", "corpus.txt", "--vocab_size", "320"]) == 0
    out = capfd.readouterr().out
    assert "longest tokens" in out and "320 token ids" in out and out.count("bytes per token") == 2


MADE = {"hf": "hf/model.safetensors", "tiktoken": "vocabulary.tiktoken", "llama2c": "llama2c/model.bin",
        "gguf": "model.gguf", "onnx": "model.onnx"}


@pytest.mark.parametrize("name", cli.READ)
def test_export_writes_each_format_and_says_how_to_read_it(own, capfd, name):
    for package in {"hf": ["transformers"], "tiktoken": ["tiktoken"], "gguf": ["gguf"],
                    "onnx": ["onnxscript", "onnxruntime"]}.get(name, []):
        pytest.importorskip(package)
    assert cli.main(["export", "run", "--format", name]) == 0
    said = capfd.readouterr().out
    assert (own / "run/export" / MADE[name]).is_file() and "To read it" in said
    if name in ("hf", "tiktoken", "onnx"):  # the other two are read by a program
        exec(said.split("To read it:")[1].strip())
    assert "is there already" in complaint(capfd, "export", "run", "--format", name)


@pytest.mark.parametrize("name, package", [("tiktoken", "tiktoken"), ("gguf", "gguf"), ("onnx", "onnxscript")])
def test_a_missing_package_is_named(own, monkeypatch, capfd, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    assert f"pip install {package}" in complaint(capfd, "export", "run", "--format", name)
    assert not [path for path in own.glob("run/export/*") if path.is_file()]


def test_check_prints_a_stub_and_judges_a_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "softmax", "RMSNorm"]) == 0
    Path("my.py").write_text(capfd.readouterr().out, encoding="utf-8")
    assert cli.main(["check", "softmax=my.py"]) == 1  # still a stub
    right = "def mine(x, dim):\n    y = (x - x.amax(dim, True)).exp()\n    return y / y.sum(dim, True)\n"
    Path("my.py").write_text(right, encoding="utf-8")
    assert cli.main(["check", "softmax=my.py:mine"]) == 0


def test_help_and_version_and_what_they_load(capfd):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    out = capfd.readouterr().out
    assert "usage: tinylm VERB" in out and out.rstrip().endswith(f"tinylm {cli.__version__}")
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        assert f"usage: tinylm {verb}" in capfd.readouterr().out
    code = "import sys, tinylm.cli as c; c.main([]); c.main(['data', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL).returncode == 0


def shown_commands():
    "Every command of the pages, of the Makefile and of the help itself."
    pages = [ROOT / "README.md", ROOT / "Makefile", ROOT / "data/README.md", Path(cli.__file__)]
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        verbs = "|".join(cli.VERBS)
        for words in re.findall(rf"(?m)(?:^|[`/]|-m |-sync )tinylm(?:\.cli)? ((?:{verbs})\b[^`\n#|>]*)", text):
            yield pytest.param(words.strip(), id=f"{page.name}: {words.strip()}")


@pytest.mark.parametrize("words", dict.fromkeys(shown_commands()))
def test_every_command_that_is_shown_is_understood(words, own, monkeypatch):
    import tinylm.ablations
    import tinylm.train

    for verb in cli.VERBS.values():
        if isinstance(verb, type):
            monkeypatch.setattr(verb, "run", lambda self: 0)
    monkeypatch.setattr(tinylm.train, "train", lambda config, on_eval: "run")
    monkeypatch.setattr(tinylm.train, "forecast", lambda config: "soon")
    monkeypatch.setattr(tinylm.ablations, "run_sweep", lambda verb, config: 0)
    shutil.copytree("run", "RUN")
    assert cli.main(shlex.split(words)) == 0


def test_a_closed_pipe_is_quiet(own):
    child = subprocess.Popen([*TINYLM, "generate", "run", "--num", "500"], cwd=own, env=ENV, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    child.stdout.read(5)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(60) == 141 and "Traceback" not in err, err


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_ends_training_with_its_own_code_and_says_how_to_go_on(own, signum, code):
    long = ["--max_steps", "100000", "--cosine_cycle_iters", "100000", "--checkpoint_every", "50000"]
    argv = [*TINYLM, "train", *SMALL, *long, "--corpus", "corpus.txt", "--run_dir", "long"]
    child = subprocess.Popen(argv, cwd=own, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = own / "long/metrics.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 3):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and "--resume long" in err and "Traceback" not in err, err


def test_ctrl_c_in_any_verb_is_a_line(monkeypatch, capfd):
    def stop(verb, argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "data", stop)
    assert "interrupted" in complaint(capfd, "data", code=130)


def test_no_room_for_the_corpus(tmp_path):
    resource = pytest.importorskip("resource")
    done = process("data", "fables", cwd=tmp_path,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"tinylm: "), done.stderr
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("*.tmp"))
