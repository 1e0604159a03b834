"""The engine of `tinylm start` and of the score: a folder to fill in, marked for a student or a class. A plain module.

Each part of `tinylm.exercises` has a file. Those on the way from text to a first story are numbered; the rest, the
exercises of the chapters, lie in extra/."""
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tinylm.check import Mark, events, mark_files, stub, train_small
from tinylm.core import END_OF_TEXT, InputError, atomic_write
from tinylm.exercises import PARTS
from tinylm.fables import fables

WAY = {  # chapter -> its parts on the way, hours, what they unlock
    "00_data": ("get_batch", 0.5, "batches"),
    "00_tokenizer": ("train_bpe Tokenizer", 2.0, "**the tokens of your tokenizer**"),
    "01_layers": ("Linear Embedding RMSNorm SwiGLU softmax", 1.0, "the layers of every model"),
    "02_rope": ("RoPE", 0.5, "a model that knows where tokens stand"),
    "03_model": ("attention MultiHeadSelfAttention TransformerBlock TransformerLM", 1.5, "a whole model"),
    "04_optim": ("cross_entropy cosine_lr clip_grad_norm AdamW", 1.0, "**the first loss, then your own training run**"),
    "05_train": ("Checkpoint", 0.25, "a run that can stop and go on"),
    "07_generate": ("KVCache temper keep_top_p generate", 1.0, "**your first story**"),
    "12_recipe": ("Muon", 0.5, "the optimizer of today's recipes"),
}
ON_THE_WAY = [name for names, *_ in WAY.values() for name in names.split()]
SENTENCE = "There once lived a quiet mouse named Maya. Her home was on a green island."

PLACES = {name: f"p{i:02}_{name.lower()}.py" for i, name in enumerate(ON_THE_WAY, 1)}  # part -> its file in a course
PLACES |= {name: f"extra/{name.lower()}.py" for name in PARTS if name not in PLACES}

README = """# My language model

You write every part of a language model, and in the end it tells its first story: with your tokenizer, your layers, your
optimizer, and nothing of the book's. Work through the files in their order. Each has the task with all that is checked,
and a hint at its end, folded away. The chapter named in its first line explains the idea. The files in extra/ are exercises
of the chapters: they count, but no other part needs them.

    tinylm check          the score: a line for each part, the next step, and what your parts can do already
    pytest                the same as tests; one part alone: pytest -k RMSNorm

{table}
"""
AGENTS = """# For an assistant

The person who works in this folder wants to learn how a language model is made. Teach; do not solve: write no bodies of
parts, and show no answers of `tinylm.exercises`. Ask what they expect and what `tinylm check` says. Explain the idea, do an
example by hand with small numbers, give the smallest hint that helps, then wait. Explain error messages, Python and
PyTorch freely.
"""
TESTS = '''"""`pytest` says here what `tinylm check` says; one part alone: `pytest -k RMSNorm`."""
from pathlib import Path

import pytest
from tinylm.course import PLACES, mark_folder


@pytest.fixture(scope="session")
def marks(request):
    names = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_part[")]
    return {mark.part: mark for mark in mark_folder(Path(__file__).parent, names)}


@pytest.mark.parametrize("name", PLACES)
def test_part(name, marks):
    if not marks[name].right:
        pytest.fail(marks[name].text, pytrace=False)
'''


def start(folder: str) -> Path:
    """Make the folder of a course. Raises InputError if something is there already."""
    home = {name: Path(place).stem for name, place in PLACES.items() if name in ON_THE_WAY}
    rows = ["| chapter | files | hours | what it unlocks |", "|---|---|---|---|"]
    for chapter, (names, hours, what) in WAY.items():
        files = ", ".join(f"`{PLACES[name]}`" for name in names.split())
        rows.append(f"| {chapter} | {files} | {hours:g} | {what} |")
    rows.append(f"| | | **{sum(hours for _, hours, _ in WAY.values()):g}** | |")
    if Path(folder).exists():
        raise InputError(f"{folder} is there already; give the name of a new folder")
    with atomic_write(folder, "dir") as made:
        (made / "extra").mkdir()
        texts = {"README.md": README.format(table="\n".join(rows)), "AGENTS.md": AGENTS, "test_parts.py": TESTS}
        for name, place in PLACES.items():
            hint = " ".join(re.findall(r"(?m)^    # (?:Hint: )?(.*)", PARTS[name].source))
            hint = hint or "The equation in the task can be written down line by line."
            texts[place] = (f"# {name}: chapter {PARTS[name].chapter}\n{stub(name, home=home)}\n\n"
                            f"# region Hint: unfold it when you are stuck\n# {hint}\n# endregion\n")
        for place, text in texts.items():
            (made / place).write_text(text, encoding="utf-8")
    return Path(folder)


def mark_folder(folder: str | Path, names: Sequence[str] = (), time_limit: float = 30.0, seed: int = 0) -> list[Mark]:
    """Mark the parts in a course's folder, or only those named, each for itself. Raises InputError for another folder."""
    if not any(Path(folder, place).is_file() for place in PLACES.values()):
        raise InputError(f"{folder} is no folder that `tinylm start` made")
    return list(mark_files([(str(Path(folder, PLACES[name])), name) for name in names or PLACES], time_limit, seed))


def _live(send: Callable[..., None], folder: str, level: int, steps: int = 300) -> None:
    """In a child process, show what a student's parts can do together, up to a level of 1 to 4."""
    use: dict[str, Any] = {}
    with redirect_stdout(StringIO()):
        sys.path.insert(0, folder)
        for name in ON_THE_WAY[:-1]:
            send("at", f"loading {PLACES[name]}")
            if Path(folder, PLACES[name]).is_file():
                title = PARTS[name].answer.__name__
                use[title] = getattr(import_module(Path(PLACES[name]).stem), title)
        send("at", "your tokenizer on 200 fables")
        tokenizer, run = train_small(use, f"\n{END_OF_TEXT}\n".join(fables(200, seed=0)), steps, width=64)
        send("milestone", "your tokens: " + "|".join(tokenizer.decode([i]) for i in tokenizer.encode(SENTENCE)))
        if level < 2:
            return
        send("at", "your model's first loss")
        first, model = next(run)
        send("milestone", f"your model's first loss: {first:.2f} nats per token; guessing alone has ln 512 = 6.24")
        losses = [first]
        for loss, _ in islice(run, steps if level > 2 else 0):
            losses.append(loss)
            send("at", f"step {len(losses)} of your training run")
        if level > 2:
            last = sum(losses[-20:]) / 20
            send("milestone", f"your training run: {first:.2f} down to {last:.2f} nats per token in {steps} steps")
        if level > 3:
            send("at", "your first story")
            prompt = list(tokenizer.encode(f"{END_OF_TEXT}\n"))
            end = tokenizer.encode(END_OF_TEXT)[0]
            story = use["generate"](model, prompt, 120, temperature=0.7, top_p=0.9, stop_id=end, seed=1)
            send("milestone", f"your first story: {tokenizer.decode(story).strip()}")


def _milestones(folder: str | Path, marks: Sequence[Mark]) -> list[str]:
    """Say what a student's parts can do together; kept in the folder until one of them changes."""
    right = {mark.part for mark in marks if mark.right}
    ends = ["Tokenizer", "cross_entropy", "AdamW", "generate"]  # the last part that each level needs, in order
    needed = [set(ON_THE_WAY[1 : ON_THE_WAY.index(end) + 1]) - {"Checkpoint"} for end in ends]
    needed[1] |= {"get_batch"}
    level = 0
    while level < 4 and needed[level] | needed[min(level, 1)] <= right:
        level += 1
    if not level:
        return []
    texts = [Path(folder, PLACES[name]).read_bytes() for name in ON_THE_WAY if name in right]
    digest, kept = hashlib.sha256(b"\0".join(texts)).hexdigest(), Path(folder, ".milestones.json")
    if kept.is_file() and (known := json.loads(kept.read_text(encoding="utf-8")))[0] == digest:
        return known[1]
    said, place = [], ""
    for event, value in events("tinylm.course:_live", str(folder), level, time_limit=600.0):
        place = value if event == "at" else place
        if event != "at":
            said.append(value if event == "milestone" else f"{place}: {value}")
    kept.write_text(json.dumps([digest, said]), encoding="utf-8")
    return said


def _score(folder: str | Path, marks: Sequence[Mark]) -> str:
    """Write what a student reads: a line for each part, the next step, and the milestones."""
    lines, chapter, following = [], "", ""
    for mark in marks:
        place, title = PLACES[mark.part], PARTS[mark.part].chapter if mark.part in ON_THE_WAY else "extra"
        lines += [title] * (title != chapter)
        chapter = title
        words = f"{mark.points} of {len(mark.cases)}"
        if not mark.right:
            what = mark.error or next(f"{title}: {what}" for title, what in mark.cases.items() if what is not None)
            stubbed = "it is still a stub" in what
            likely = f"; likely mistake: {mark.likely[0]}" if mark.likely else ""
            words = f"{words:9} " + ("still a stub" if stubbed else " ".join(what.split()) + likely)
            following = following or f"next: {place}, see chapter {PARTS[mark.part].chapter}"
        lines.append(f"  {place:32} {words}")
        lines += [f"{'':35}it prints: {text}" for text in mark.printed[:1]]
    lines += ["", "score: {} of {} points".format(*_points(marks)), following or "All parts are right."]
    return "\n* ".join(["\n".join(lines), *_milestones(folder, marks)])


def _points(marks: Sequence[Mark]) -> tuple[int, int]:
    return sum(mark.points for mark in marks), sum(len(mark.cases) for mark in marks)


def _class_table(folders: dict[str, list[Mark]]) -> str:
    """Write what a teacher reads: the points of each folder, chapter by chapter."""
    chapters = list(dict.fromkeys(part.chapter for part in PARTS.values()))
    width = max(map(len, folders))
    lines = ["".join([f"{'':{width}}", *(f"{chapter[:10]:>12}" for chapter in chapters), f"{'points':>12}"])]
    for folder, marks in folders.items():
        lines.append(f"{folder:{width}}")
        for chapter in [*chapters, ""]:
            points, of = _points([mark for mark in marks if PARTS[mark.part].chapter.startswith(chapter)])
            lines[-1] += f"{points:>{11 - len(str(of))}}/{of}"
    return "\n".join(lines)


def mark_class(folders: Sequence[str], time_limit: float = 30.0, seed: int = 0, report: str | None = None) -> bool:
    """Mark folders of a course; print the score of one, or a table of several. Returns whether all parts are right.

    A report has the points of each case, as JUnit XML (a name that ends in .xml) or as JSON (.json)."""
    if report and not report.endswith((".xml", ".json")):
        raise InputError(f"--report is {report}; expected a name that ends in .xml or .json")
    marks = {folder: mark_folder(folder, (), time_limit, seed) for folder in folders}
    if report:
        _write_report(report, marks, seed)
    print(_class_table(marks) if len(folders) > 1 else _score(folders[0], marks[folders[0]]))
    return all(mark.right for own in marks.values() for mark in own)


def _write_report(path: str, folders: dict[str, list[Mark]], seed: int) -> None:
    """Write the points of each case as JUnit XML or as JSON."""
    root, table = ElementTree.Element("testsuites"), {}
    for folder, marks in folders.items():
        points, of = _points(marks)
        suite = ElementTree.SubElement(root, "testsuite", name=folder, tests=str(of), failures=str(of - points))
        for mark in marks:
            for title, what in mark.cases.items():
                case = ElementTree.SubElement(suite, "testcase", classname=mark.part, name=title)
                if why := mark.error or what or ("not tried" if what is not None else ""):
                    ElementTree.SubElement(case, "failure", message=re.sub("[^\n -~]", "?", why))
        table[folder] = {"points": points, "of": of, "parts": {
            m.part: {"points": m.points, "of": len(m.cases), "error": m.error, "cases": m.cases, "likely": m.likely}
            for m in marks}}
    text = json.dumps({"seed": seed, "folders": table}, indent=1)
    with atomic_write(path, "w") as file:
        file.write(ElementTree.tostring(root, encoding="unicode") if path.endswith(".xml") else text)
