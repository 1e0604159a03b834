"""A course walked from start to first story, a class marked, and code that does not behave."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tinylm import cli, course
from tinylm.check import live, mark_files
from tinylm.exercises import PARTS

HEAD = ("from __future__ import annotations\nimport json, math, re, statistics, regex, torch\nimport numpy as np\n"
        "import torch.nn.functional as F\nfrom itertools import pairwise\nfrom torch import Tensor, nn\n")


def answer(folder, name, words=None):
    "Fill in a part: the right answer, or one with a mistake; what it is made of stays imported from the other files."
    path, part = Path(folder, course.PLACES[name]), PARTS[name]
    text = part.source
    for old, new in zip(*[iter(part.mistakes[words] if words else ())] * 2, strict=True):
        text = text.replace(old, new)
    imports = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from ")]
    imports = [line for line in imports if line not in HEAD]
    path.write_text(HEAD + "\n".join([*imports, "", text]), encoding="utf-8")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    "A course with all parts filled in right."
    folder = course.start(str(tmp_path_factory.mktemp("course") / "my-lm"))
    for name in PARTS:
        answer(folder, name)
    return folder


def test_a_new_course_has_a_file_for_each_part_in_the_order_of_the_chapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["start", "my-lm"]) == 0 and "tinylm check" in capsys.readouterr().out
    for name, place in course.PLACES.items():
        text = Path("my-lm", place).read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert "raise NotImplementedError" in text and "# region Hint" in text and PARTS[name].chapter in text
        assert ast.get_docstring(next(n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)))
    own = [name for name in PARTS if name in course.ON_THE_WAY]
    assert own == sorted(course.ON_THE_WAY, key=list(PARTS).index) and set(course.PLACES) == set(PARTS)
    assert "from p06_rmsnorm import RMSNorm" in Path("my-lm/p12_transformerblock.py").read_text(encoding="utf-8")
    readme = Path("my-lm/README.md").read_text(encoding="utf-8")
    assert all(course.PLACES[name] in readme for name in course.ON_THE_WAY) and "hours" in readme
    assert "do not solve" in Path("my-lm/AGENTS.md").read_text(encoding="utf-8")
    assert cli.main(["start", "my-lm"]) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.timeout(900)  # it marks all parts and trains a model
def test_the_whole_course_ends_in_a_first_story(lm, monkeypatch, capsys):
    monkeypatch.setattr(course, "live", lambda files, steps, *how, **more: live(files, steps // 6, *how, **more))
    monkeypatch.chdir(lm)
    assert cli.main(["check", "--time_limit", "250"]) == 0
    out = capsys.readouterr().out
    of = sum(len(part.cases) for part in PARTS.values())
    assert f"score: {of} of {of} points" in out and "All parts are right" in out
    said = [line for line in out.splitlines() if line.startswith("* ")]
    assert [line.split(":")[0] for line in said] == [
        "* your tokens", "* your model's first loss", "* your training run", "* your first story"]
    first, last = map(float, said[2].split(": ")[1].split(" nats")[0].split(" down to "))
    assert abs(first - 6.24) < 0.7 and last < first - 2


def few(lm, folder, slips):
    "A copy of the course with these parts only, some with a mistake."
    folder.mkdir()
    for name, words in slips.items():
        shutil.copy(lm / course.PLACES[name], folder)
        answer(folder, name, words)
    return folder


def test_pytest_tells_the_same(lm, tmp_path):
    mistake = "the sum runs over the last axis, whatever `dim` says"
    folder = few(lm, tmp_path / "few", {"softmax": mistake, "RoPE": None})
    shutil.copy(lm / "test_parts.py", folder)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "RoPE or softmax and not log", str(folder)],
                          cwd=folder, capture_output=True, text=True)
    assert f"likely mistake: {mistake}" in done.stdout and "1 failed, 1 passed" in done.stdout


ODD = {  # part -> a file, and what is said of it
    "get_batch": ("def get_batch(tokens):\n    return tokens", "the book's is called as get_batch(tokens"),
    "Linear": ("def Linear(:", "cannot be imported: it raises SyntaxError"),
    "temper": ("x = 1", "defines no temper"),
    "softmax": ("def softmax(x, dim):\n    x -= x.max()\n    return x.softmax(dim)", "the input is changed in place"),
    "attention": ("def attention(q, k, v, mask=None):\n    while True: pass", "is there an endless loop?"),
    "cosine_lr": ("import torch\ntorch.set_default_dtype(torch.float64)\ndef cosine_lr(*a):\n    return 0.0",
                  "it changes torch's default dtype or"),
    "entropy": ("count = []\ndef entropy(probs):\n    count.append(1)\n    return probs.sum(-1) * len(count)",
                "two calls with the same input differ"),
    "log_softmax": ("def log_softmax(x, dim):\n    print('here')\n    return x.log_softmax(dim)", None),
}


def test_code_that_does_not_behave_gets_a_line_and_the_rest_is_marked(lm, tmp_path):
    for name, (text, _) in ODD.items():
        (tmp_path / course.PLACES[name]).parent.mkdir(exist_ok=True)
        (tmp_path / course.PLACES[name]).write_text(text, encoding="utf-8")
    files = {name: tmp_path / course.PLACES[name] for name in [*ODD, "Muon"]}
    marks = {mark.part: mark for mark in mark_files(files, time_limit=5.0)}
    for name, (_, words) in ODD.items():
        assert words is None or words in marks[name].text, marks[name].text
    assert marks["log_softmax"].right and marks["log_softmax"].printed[0] == "here"
    assert "is not there" in marks["Muon"].error and marks["Muon"].points == 0
    marks["get_batch"].cases |= dict.fromkeys(marks["get_batch"].cases, "it is still a stub")
    score = course._score(tmp_path, marks.values())
    assert "next: p01_get_batch.py, see chapter 00_data" in score and "0 of 3    still a stub" in score
    course._write_report(str(tmp_path / "points.xml"), {"odd": marks.values()}, seed=0)
    [suite] = ElementTree.parse(tmp_path / "points.xml").getroot()
    failures, of = len(suite.findall(".//failure")), sum(len(mark.cases) for mark in marks.values())
    assert [suite.get("tests"), suite.get("failures")] == [str(of), str(failures)]
    assert f"score: {of - failures} of {of} points" in score


def test_a_class_is_marked_by_one_command(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slips = {"RMSNorm": "epsilon is added outside the root", "AdamW": "there is no bias correction"}
    few(lm, Path("right"), {"softmax": None} | dict.fromkeys(slips))
    few(lm, Path("wrong"), {"softmax": None} | slips)
    course.start("stub")
    for name in PARTS.keys() - slips.keys():  # a part that is not there has no points either
        Path("stub", course.PLACES[name]).unlink()
    assert cli.main(["check", "right", "wrong", "stub", "--seed=3", "--report=points.json"]) == 1
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split(":")[0] for row in rows] == ["right", "wrong", "stub"] and "04_optim" in rows[1]
    points = [int(row.split()[1]) for row in rows]
    assert points[0] == sum(len(PARTS[name].cases) for name in ["softmax", *slips]) > points[1] > points[2] == 0
    found = json.loads(Path("points.json").read_text(encoding="utf-8"))
    assert found["seed"] == 3 and [entry["points"] for entry in found["folders"].values()] == points
    for name, words in slips.items():
        assert found["folders"]["wrong"]["parts"][name]["likely"][0] == words


def test_what_is_no_course_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "."]) == 2 and "no folder that `tinylm start` made" in capsys.readouterr().err
