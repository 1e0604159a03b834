"""The tinylm command from outside: slips, closed streams, and every command that the pages show."""
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import write_fables

import tinylm.export
import tinylm.train
from tinylm import cli

SMALL = ("--preset debug --vocab_size 300 --context_length 16 --d_model 16 --num_heads 2 --d_ff 32 --num_layers 1 "
         "--batch_size 4 --max_steps 10 --eval_every 5 --checkpoint_every 5 --log_every 5 --device cpu").split()
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
    ("train --preset huge", "--preset 'huge' 'debug' 'laptop' 'fast' 'reference'"),
    ("train --lr", "--lr tinylm|train|--help"),
    ("train story.txt", "story.txt quotes"),
    ("train --use_rope=false", "false switch"),
    ("train --weight_decay nan", "weight_decay nan"),
    ("train --d_model 130 --num_heads 4", "d_model num_heads 4"),
    ("train --corpus missing.txt", "missing.txt"),
    ("train --device gpu9", "gpu9"),
    ("train --resume missing --lr 1", "missing run"),
    ("data tinystorys", "tinystorys"),
    ("export", "tinylm|train"),
    ("generate no/run Once", "no/run"),
    ("search --jobs 0", "--jobs"),
    ("search --seed 3", "--seeds"),
    ("search --lrs quick", "lrs 'quick'"),
    ("ablate --plan x.json", "x.json"), ("search --plan x.json --lrs 0.1", "do not go with --plan"),
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


def test_a_signal_and_too_little_memory_get_a_line_and_a_bug_keeps_its_traceback(monkeypatch, capfd):
    import torch

    def stop():
        raise tinylm.train.Stopped(15, Path("RUN"))

    monkeypatch.setitem(cli.VERBS, "data", stop)
    assert "go on with --resume RUN" in complaint(capfd, "data", code=143)
    monkeypatch.setitem(cli.VERBS, "data", lambda: torch.empty(1 << 50))
    assert "out of memory; try a smaller --batch_size" in complaint(capfd, "data")
    monkeypatch.setitem(cli.VERBS, "data", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main(["data"])


def test_a_choice_out_of_range_is_told_before_anything_is_written(own, capfd):
    for choice in ("--temperature -1", "--seed 18446744073709551616"):
        assert cli.main(["generate", "run", "Once", *choice.split()]) == 2
        said = capfd.readouterr()
        assert choice.split()[0][2:] in said.err and said.out == ""


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


@pytest.fixture
def asked(monkeypatch):
    "A function of flags: the config that `tinylm train` wants to train."
    configs = []
    monkeypatch.setattr(tinylm.train, "train", lambda config, on_eval: configs.append(config))
    return lambda *argv: cli.main(["train", *argv]) or configs[-1]


def test_both_spellings_and_presets(asked):
    config = asked("--batch_size", "3", "--no-use_rope", "--preset", "debug", "--lr", "1", "--lr", "2")
    assert config == asked("--preset=debug", "--batch-size=3", "--no_use_rope", "--lr=2")
    assert config == replace(tinylm.train.PRESETS["debug"], batch_size=3, use_rope=False, lr=2)


def test_resume_takes_the_settings_of_the_run_and_flags_override_them(own, capfd):
    assert cli.main(["train", "--resume", "run", "--max-steps", "12"]) == 0
    assert json.loads((own / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 12
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


def test_export_says_how_to_read_each_format(own, monkeypatch, capfd):
    pytest.importorskip("tiktoken")
    for name, (place, _) in cli.READ.items():
        if name != "tiktoken":  # the formats have tests of their own
            monkeypatch.setattr(tinylm.export, f"to_{name}", lambda run, path: None)
        assert cli.main(["export", "run", "--format", name]) == 0
        path, how = capfd.readouterr().out.split("\n\nTo read it:")
        assert Path(path) == Path("run/export", place) and path in how
        if name == "tiktoken":
            exec(how.strip())
    assert "is there already" in complaint(capfd, "export", "run", "--format", "tiktoken")


def test_a_missing_package_is_named(own, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gguf", None)  # so that importing it fails
    assert "pip install gguf" in complaint(capfd, "export", "run", "--format", "gguf")
    assert not [path for path in own.glob("run/export/*") if path.is_file()]


def test_check_prints_a_stub_and_judges_a_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "softmax", "RMSNorm"]) == 0
    assert {"softmax", "RMSNorm"} <= {*re.findall(r"(?m)^(?:class|def) (\w+)", capfd.readouterr().out)}
    right = "def mine(x, dim):\n    y = (x - x.amax(dim, True)).exp()\n    return y / y.sum(dim, True)\n"
    Path("my.py").write_text(right, encoding="utf-8")
    assert cli.main(["check", "softmax=my.py:mine"]) == 0


def test_help_and_version_and_what_they_load(capfd):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    out = capfd.readouterr().out
    assert "usage: tinylm VERB" in out and out.rstrip().endswith(f"tinylm {cli.__version__}")
    for verb in cli.VERBS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([verb, "--help"])
        assert f"usage: tinylm {verb}" in capfd.readouterr().out
    code = ("import atexit, sys, tinylm.cli as c; atexit.register(lambda: print('torch' in sys.modules)); "
            "c.main([]); c.main(['data', '--help'])")
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n"), done.stderr


def shown_commands():
    "Every command of the pages, of the Makefile and of the help itself."
    pages = [ROOT / "README.md", ROOT / "Makefile", ROOT / "data/README.md", Path(cli.__file__)]
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        verbs = "|".join(cli.VERBS)
        for words in re.findall(rf"(?m)(?:^|[`/]|-m |-sync )tinylm(?:\.cli)? ((?:{verbs})\b[^`\n#|>]*)", text):
            yield words.strip()


def test_every_command_that_is_shown_is_understood(own, monkeypatch):
    import tinylm.ablations

    for name, verb in cli.VERBS.items():
        if verb not in (cli._train, cli._sweep):
            monkeypatch.setitem(cli.VERBS, name, functools.wraps(verb)(lambda **flags: 0))
    monkeypatch.setattr(tinylm.train, "train", lambda config, on_eval: "run")
    monkeypatch.setattr(tinylm.train, "forecast", lambda config: "soon")
    monkeypatch.setattr(tinylm.ablations, "run_sweep", lambda plans, out, jobs: 0)
    monkeypatch.setattr(tinylm.ablations, "load_plans", lambda source, **changes: {})
    shutil.copytree("run", "RUN")
    commands = {*shown_commands()}
    assert len(commands) > 20 and [words for words in commands if cli.main(shlex.split(words)) != 0] == []


def test_a_closed_pipe_is_quiet(own):
    child = subprocess.Popen([*TINYLM, "generate", "run", "--num", "500"], cwd=own, env=ENV, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    child.stdout.read(5)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(60) == 141 and "Traceback" not in err, err
