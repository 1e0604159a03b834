"""The tinylm command from outside: bad input, signals, full disks, pipes, and the way from nothing to a story."""
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from tinylm import cli
from tinylm.data import fables
from tinylm.tokenizer import TokenFile, Tokenizer

SMALL = ("--preset debug --vocab_size 300 --context_length 16 --d_model 16 --num_heads 2 --d_ff 32 --num_layers 1 "
         "--batch_size 4 --max_steps 10 --eval_every 5 --checkpoint_every 5 --log_every 5 --device cpu").split()
SOURCE = ("--lr 8e-4 --batch_size 64 --context_length 256 --vocab_size 10000 --num_layers 4 --num_heads 16 --d_ff 1344 "
          "--rope_theta 10000.0 --d_model 512 --beta1 0.9 --beta2 0.999 --weight_decay 0.0001 --warmup_iters 2000 "
          "--cosine_cycle_iters 20000 --max_l2_norm 1").split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
TINYLM = [sys.executable, "-m", "tinylm.cli"]


def process(*argv, cwd, **kw):
    command = [*TINYLM, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120, **kw)


def leftovers(folder):
    return [p for p in Path(folder).rglob("*") if ".tmp" in p.name]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A folder with a small corpus, its token files and one finished run, run/."
    folder = tmp_path_factory.mktemp("shop")
    text = "".join(f"{story}\n<|endoftext|>\n" for story in islice(fables(120, seed=0), 120))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
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
    "Run in this process; return the one line of complaint."
    capfd.readouterr()
    assert cli.main(list(map(str, argv))) == code
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("tinylm: ")]
    assert len(lines) == 1 and "Traceback" not in err and err.rstrip().endswith(lines[0]), err
    return lines[0]


FLAGS = [
    (["train", "--batchsize", "8"], ["--batchsize", "--batch_size", "tinylm train --help"]),
    (["train", "--zzz"], ["--zzz", "tinylm train --help"]),
    (["train", "--lr", "fast"], ["--lr", "'fast'", "a number"]),
    (["train", "--num_layers", "2.5"], ["--num_layers", "whole number"]),
    (["train", "--norm", "before"], ["--norm", "'before'", "pre, post, none"]),
    (["train", "--preset", "huge"], ["--preset", "debug, laptop, reference"]),
    (["train", "--lr"], ["--lr", "needs a number"]),
    (["train", "--lr", "--seed", "3"], ["--lr", "needs a number"]),
    (["train", "story.txt"], ["'story.txt'"]),
    (["train", "--use_rope=false"], ["--use_rope takes no value", "--no_use_rope"]),
    (["train", "--no-watch=1"], ["--no_watch takes no value", "--watch or --no_watch"]),
    (["train", "--weight_decay", "-1"], ["weight_decay must not be negative, and is -1"]),
    (["train", "--d_model", "130", "--num_heads", "4"], ["d_model 130", "num_heads 4"]),
    (["train", "--d_model", "12", "--num_heads", "4"], ["head size", "3"]),
    (["train", "--batch_size", "0"], ["batch_size", "0"]),
    (["train", "--max_steps", "0"], ["max_steps"]),
    (["train", "--corpus", "missing.txt"], ["missing.txt"]),
    (["train", "--device", "gpu9"], ["gpu9"]),
    (["train", "--resume", "missing"], ["missing"]),
    (["train", "--resume", "x", "--lr", "1"], ["x", "not a run folder"]),
    (["train", "--batch_size", "8", "--grad_accum_steps", "3"], ["8", "grad_accum_steps 3"]),
    (["train", "--max_minutes", "0"], ["max_minutes"]),
    (["train", "--dtype", "float16"], ["--dtype", "float32, bfloat16"]),
    (["data", "tinystorys"], ["tinystorys"]),
    (["data", "a", "b"], ["'b'"]),
    (["tokenize", "--vocab_siz", "300"], ["--vocab_size"]),
    (["tokenize", "--corpus", "missing.txt.gz"], ["missing.txt.gz"]),
    (["generate"], ["tinylm train"]),
    (["generate", "no/run"], ["no/run"]),
    (["generate", "--temprature", "1"], ["--temperature"]),
    (["generate", "a", "b", "c"], ["'c'", "quotes"]),
    (["trian"], ["'trian'", "train"]),
]


@pytest.mark.parametrize("argv, words", FLAGS, ids=lambda x: " ".join(x))
def test_a_slip_gets_one_line_and_leaves_nothing(argv, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    line = complaint(capfd, *argv)
    assert all(word in line for word in words), line
    assert list(tmp_path.rglob("*")) == []


def test_too_little_memory_is_told_in_a_line(monkeypatch, capfd):
    import numpy as np
    import torch

    for ask in (lambda argv: torch.empty(1 << 50), lambda argv: np.ones(1 << 50)):
        monkeypatch.setitem(cli._VERBS, "data", ("", ask))
        assert "out of memory; try a smaller --batch_size" in complaint(capfd, "data")
    monkeypatch.setitem(cli._VERBS, "data", ("", lambda argv: torch.zeros(2) @ torch.zeros(3)))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # a bug keeps its traceback
        cli.main(["data"])


@pytest.mark.parametrize("choice, word", [(["--temperature", "-1"], "temperature"), (["--top_p", "1.5"], "top_p"),
                                          (["--top_k", "0"], "top_k"), (["--num", "0"], "num"),
                                          (["--max_new_tokens", "-2"], "max_new_tokens")])
def test_a_choice_out_of_range(choice, word, own, capfd):
    assert word in complaint(capfd, "generate", "run", *choice)


def test_a_prompt_beyond_the_context_is_told(own, capfd):
    assert cli.main(["generate", "run", "a red ball " * 50, "--max_new_tokens", "2", "--seed", "0"]) == 0
    said = capfd.readouterr()
    assert re.search(r"tinylm: the prompt has \d+ tokens; the model reads the last 16 of them\n", said.err)
    assert said.out.startswith("a red ball a red")
    assert cli.main(["generate", "run", "a", "--max_new_tokens", "0", "--seed", "0"]) == 0
    said = capfd.readouterr()
    assert said.out == "a\n" and "tinylm:" not in said.err


def test_empty_corpus(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    assert "empty.txt" in complaint(capfd, "train", *SMALL, "--corpus", "empty.txt", "--run_dir", "new")
    assert not (tmp_path / "new").exists() and not leftovers(tmp_path)


def test_corpus_shorter_than_a_batch(own, capfd):
    line = complaint(capfd, "train", *SMALL, "--batch_size", "9000", "--corpus", "corpus.txt", "--run_dir", "new")
    assert re.search(r"\d", line) and "batch" in line
    assert not (own / "new").exists() and not leftovers(own)


def test_vocabulary_smaller_than_the_bytes(own, capfd):
    line = complaint(capfd, "train", *SMALL, "--vocab_size", "200", "--corpus", "corpus.txt", "--run_dir", "new")
    assert "200" in line and "257" in line
    assert not (own / "new").exists() and not leftovers(own)


def test_a_run_folder_that_exists(own, capfd):
    before = (own / "run/metrics.jsonl").read_bytes()
    assert "run" in complaint(capfd, "train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "run")
    assert (own / "run/metrics.jsonl").read_bytes() == before


def token_file(own):
    return next(own.glob("data/*/vocab-300/train.bin"))


def test_a_token_file_of_the_wrong_size_is_refused(own, capfd):
    file = token_file(own)
    whole = file.read_bytes()
    for damage in (whole[:-7], whole + b"12", b""):  # an odd length, too long, nothing at all
        file.write_bytes(damage)
        line = complaint(capfd, "train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "new")
        assert all(word in line for word in ("train.bin", f"{len(damage)} bytes", f"{len(whole)}", "delete it")), line
        assert file.read_bytes() == damage and not (own / "new").exists()
    file.unlink()
    assert cli.main(["train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "new"]) == 0
    assert file.read_bytes() == whole


def test_a_token_file_of_another_tokenizer_is_refused(own, capfd):
    file = token_file(own).with_suffix(".json")
    about = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**about, "fingerprint": "0" * 64}), encoding="utf-8")
    line = complaint(capfd, "train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "new")
    assert all(word in line for word in ("train.bin", "0" * 12, about["fingerprint"][:12], "delete it")), line
    assert not (own / "new").exists()


def test_ids_outside_the_vocabulary(own, capfd):
    file = token_file(own)
    raw = bytearray(file.read_bytes())
    raw[100:102] = b"\xff\xff"
    file.write_bytes(raw)
    line = complaint(capfd, "train", *SMALL, "--corpus", "corpus.txt", "--run_dir", "new")
    assert "65535" in line.replace(",", "") and not (own / "new").exists()


def test_a_run_does_not_go_on_with_other_data(own, capfd):
    with open(own / "corpus.txt", "a", encoding="utf-8") as file:
        file.write("Another story.\n<|endoftext|>\n" * 50)
    assert "run" in complaint(capfd, "train", "--resume", "run", "--max_steps", "20")


def test_divergence_has_its_own_code(own, capfd):
    hot = ["--lr", "1e30", "--min_lr", "1e30", "--warmup_iters", "0", "--norm", "none", "--max_l2_norm", "1e30"]
    line = complaint(capfd, "train", *SMALL, *hot, "--corpus", "corpus.txt", "--run_dir", "new", code=3)
    assert re.search(r"step \d+", line)


def test_the_source_command_is_accepted_unchanged():
    config, _ = cli._train_options(SOURCE)
    for flag, value in zip(SOURCE[::2], SOURCE[1::2], strict=True):
        assert getattr(config, flag[2:]) == float(value)
    assert config.last_step == 20_000 and config.corpus == "fables"


def test_the_source_model_takes_a_step(own):
    "At its full size; of batch and validation a little."
    little = "--batch_size 1 --max_steps 1 --eval_windows 1 --corpus corpus.txt --run_dir source --device cpu".split()
    done = process("train", *SOURCE, *little, cwd=own)
    assert done.returncode == 0 and "22,696,448 parameters" in done.stdout, done.stderr
    saved = json.loads((own / "source/config.json").read_text(encoding="utf-8"))
    assert saved["d_ff"] == 1344 and saved["cosine_cycle_iters"] == 20000


def test_a_preset_is_named_with_what_the_flags_changed():
    def said(*argv):
        return cli._intent(cli._train_options(argv)[0].config()).partition(" tokens ")[2]

    assert said() == said("--corpus", "owt", "--run_dir", "x", "--lr", str(cli._train_options([])[0].lr))
    assert said() == "(preset laptop)" and said("--preset", "reference") == "(preset reference)"
    assert said("--preset", "debug", "--lr", "1", "--no_use_rope") == "(preset debug, 2 of its settings changed)"
    assert re.fullmatch(r"\(preset laptop, \d+ of its settings changed\)", said(*SOURCE))


def test_both_spellings_and_presets():
    a, _ = cli._train_options(["--batch_size", "3", "--no-use_rope", "--preset", "debug"])
    b, _ = cli._train_options(["--preset=debug", "--batch-size=3", "--no_use_rope"])
    c, _ = cli._train_options(["--preset", "debug", "--batch-size", "3", "--no-use-rope"])
    assert a == b == c and a.batch_size == 3 and not a.use_rope and a.preset == "debug"
    assert cli._train_options([])[0].preset == "laptop"
    assert cli._train_options(["--lr", "1", "--lr", "2"])[0].lr == 2
    assert cli._train_options(["--max_steps", "None"])[0].max_steps is None


def test_arguments_without_flags_may_stand_anywhere(own, capfd):
    stories = set()
    for argv in ("run|The fox|--seed|1", "--seed|1|run|The fox", "run|--seed|1|The fox"):
        capfd.readouterr()
        assert cli.main(["generate", *argv.split("|"), "--max_new_tokens", "20"]) == 0
        stories.add(capfd.readouterr().out)
    assert len(stories) == 1 and stories.pop().startswith("The fox")


def test_the_newest_run_is_the_default(own, capfd):
    shutil.copytree(own / "run", own / "runs/old")
    shutil.copytree(own / "run", own / "runs/new")
    for state in own.glob("runs/old/checkpoints/*/state.json"):
        os.utime(state, (1, 1))
    assert cli.main(["generate", "A fox", "--max_new_tokens", "5"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("A fox") and "runs/new" in err.replace(os.sep, "/")


def test_num_and_seed(own, capfd):
    def tell(*argv):
        capfd.readouterr()
        assert cli.main(["generate", "run", "A", "--max_new_tokens", "30", *argv]) == 0
        return capfd.readouterr().out

    assert tell("--seed", "5", "--num", "2") == tell("--seed", "5") + "\n" + tell("--seed", "6")
    assert tell("--temperature", "0", "--seed", "1") == tell("--temperature", "0", "--seed", "2")


def test_prompt_loop_ends_at_end_of_input(own):
    done = process("generate", "run", "-i", "--max_new_tokens", "5", cwd=own, input="The fox\nThe owl\n")
    assert done.returncode == 0 and "The fox" in done.stdout and "The owl" in done.stdout, done.stderr


def until(terminal, words, times, patience=60):
    "Read from a pseudo terminal until it has shown these words so often; return what it has shown."
    shown, end = "", time.monotonic() + patience
    while shown.count(words) < times:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"waited in vain after {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_prompt_loop_remembers_what_was_typed(own):
    pty, _ = pytest.importorskip("pty"), pytest.importorskip("readline")
    terminal, end = pty.openpty()
    argv = [*TINYLM, "generate", "run", "-i", "--max_new_tokens", "0"]  # tells the prompt alone
    env = {**ENV, "TERM": "xterm", "INPUTRC": os.devnull}
    child = subprocess.Popen(argv, cwd=own, env=env, stdin=end, stdout=end, stderr=end)
    os.close(end)
    try:
        until(terminal, "> ", 1)
        for keys in ("The fox\r", "\x1b[A\r"):  # the second is the up arrow
            os.write(terminal, keys.encode())
            shown = until(terminal, "> ", 1)
            assert shown.count("The fox") == 2, shown  # in the line, and told
        os.write(terminal, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def test_tokenize_tells_and_reuses(own, capfd):
    argv = ["tokenize", "--corpus", "corpus.txt", "--vocab_size", "320"]
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert "longest tokens" in out and "training a tokenizer" in err and "already" not in out
    made = {p: p.stat().st_mtime_ns for p in own.glob("data/*/vocab-320/*")}
    told = re.findall(r"^(\S+\.bin): (.*)$", out, re.MULTILINE)
    assert len(told) == 2
    for name, words in told:
        tokenizer, ids = Tokenizer.load(own / Path(name).parent), TokenFile.load(own / name).tokens()
        num_bytes = len(tokenizer.decode(ids).encode())
        assert words == f"{len(ids):,} tokens, {num_bytes / len(ids):.2f} bytes per token"
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert "training a tokenizer" not in err and out.count("bytes per token (was there already)") == 2
    assert made and made == {p: p.stat().st_mtime_ns for p in own.glob("data/*/vocab-320/*")}


def test_data_shows_sizes_and_a_story(own, capfd):
    assert cli.main(["data", "corpus.txt"]) == 0
    out = capfd.readouterr().out
    assert "train" in out and "documents" in out and next(fables(1, seed=0)).split("\n")[0] in out


def test_help_and_version(capfd):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    out = capfd.readouterr().out
    assert "usage: tinylm VERB" in out and out.rstrip().endswith(f"tinylm {cli.__version__}")
    for verb in ("data", "tokenize", "train", "generate"):
        assert cli.main([verb, "--help"]) == 0
        assert "usage: tinylm " + verb in capfd.readouterr().out


def test_light_verbs_do_not_load_torch():
    code = "import sys, tinylm.cli as c; c.main([]); c.main(['data', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL).returncode == 0


def test_a_closed_pipe_is_quiet(own):
    argv = [*TINYLM, "generate", "run", "--num", "500"]
    child = subprocess.Popen(argv, cwd=own, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.read(5)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(60) == 141 and len(err.splitlines()) == 1 and "seed" in err, err


def wait_for_step(child, run, step):
    for _ in range(600):
        log = run / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run does not move")


def test_interrupt_terminate_and_resume(own):
    long = ["--max_steps", "100000", "--cosine_cycle_iters", "100000", "--checkpoint_every", "50000"]
    argv = ["train", *SMALL, *long, "--corpus", "corpus.txt", "--run_dir", "long"]
    step = 0
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = subprocess.Popen([*TINYLM, *argv], cwd=own, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True)
        wait_for_step(child, own / "long", step + 20)
        child.send_signal(signum)
        _, err = child.communicate(timeout=60)
        assert child.returncode == code, err
        assert "--resume long" in err and "Traceback" not in err
        states = sorted((own / "long/checkpoints").glob("step-*/state.json"))
        assert int(states[-1].parent.name[5:]) >= step + 20 and not leftovers(own)
        step = int(states[-1].parent.name[5:])
        argv = ["train", "--resume", "long"]
    assert cli.main(["train", "--resume", "long", "--max_steps", str(step + 10)]) == 0
    steps = [json.loads(line)["step"] for line in (own / "long/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps[-1] == step + 10 and steps == sorted(set(steps))


def limit_file_size(num_bytes):
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_no_room_for_the_corpus(tmp_path):
    done = process("data", "fables", cwd=tmp_path, preexec_fn=limit_file_size(100_000))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("tinylm: "), done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_room_for_a_checkpoint(own):
    saved = {p: p.read_bytes() for p in own.rglob("*.safetensors")}
    size = max(map(len, saved.values()))
    done = process("train", "--resume", "run", "--max_steps", "20", cwd=own, preexec_fn=limit_file_size(size - 100))
    lines = [line for line in done.stderr.splitlines() if line.startswith("tinylm: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not leftovers(own) and {p: p.read_bytes() for p in own.rglob("*.safetensors")} == saved


def test_a_really_full_disk(shop, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        argv = ["train", *SMALL, "--d_model", "64", "--corpus", shop / "corpus.txt", "--data_dir", shop / "data"]
        done = process(*argv, "--run_dir", disk / "run", cwd=tmp_path)
        lines = [line for line in done.stderr.splitlines() if line.startswith("tinylm: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert not leftovers(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
