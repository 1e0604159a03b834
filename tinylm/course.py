"""The engine of `tinylm start` and of the score: a folder to fill in, marked for a student or a class. A plain module.

Each part of `tinylm.exercises` has a file. Those on the way from text to a first story are numbered; the rest, the
exercises of the chapters, lie in extra/."""
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from tinylm.check import Mark, live, mark_files, stub
from tinylm.core import InputError, atomic_write
from tinylm.exercises import PARTS

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

PLACES = {name: f"p{i:02}_{name.lower()}.py" for i, name in enumerate(ON_THE_WAY, 1)}  # part -> its file in a course
PLACES |= {name: f"extra/{name.lower()}.py" for name in PARTS if name not in PLACES}

README = """# My language model

You write every part of a language model, and in the end it tells its first story, with nothing of the book's. Work
through the files in their order. Each has the task with all that is checked, and a hint at its end, folded away; the chapter
in its first line explains the idea. The files in extra/ are exercises: they count, but no other part needs them.

    tinylm check          the score: a line for each part, the next step, and what your parts can do already
    pytest                the same as tests; one part alone: pytest -k RMSNorm

{table}
"""
AGENTS = """# For an assistant

The person who works in this folder wants to learn how a language model is made. Teach; do not solve: write no bodies of
parts, and show no answers of `tinylm.exercises`. Ask what they expect and what `tinylm check` says. Explain the idea, error
messages, Python and PyTorch freely; do an example by hand, give the smallest hint that helps, then wait.
"""
TESTS = '''"""`pytest` says here what `tinylm check` says; one part alone: `pytest -k RMSNorm`."""
from pathlib import Path
import pytest
from tinylm.check import mark_files
from tinylm.course import PLACES

@pytest.fixture(scope="session")
def marks(request):
    names = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_part[")]
    return {mark.part: mark for mark in mark_files({name: Path(__file__).parent / PLACES[name] for name in names})}

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


def _milestones(folder: str, marks: Sequence[Mark]) -> list[str]:
    """Say what a student's parts can do together; kept in the folder until one of them changes."""
    right, ready = {mark.part for mark in marks if mark.right}, list[str]()
    for end in ("Tokenizer", "cross_entropy", "AdamW", "generate"):  # the last part that each milestone needs
        needed = [name for name in ON_THE_WAY[: ON_THE_WAY.index(end) + 1] if name != "Checkpoint"]
        ready = needed if right.issuperset(needed) else ready
    if not ready:
        return []
    files, kept = {name: Path(folder, PLACES[name]) for name in ready}, Path(folder, ".milestones.json")
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if kept.is_file() and (known := json.loads(kept.read_text(encoding="utf-8")))[0] == texts:
        return known[1]
    steps = 300 if "AdamW" in ready else int("cross_entropy" in ready)
    said, why = live(files, steps, True, time_limit=600.0)
    kept.write_text(json.dumps([texts, said + [why] * bool(why)]), encoding="utf-8")
    return said + [why] * bool(why)


def _score(folder: str, marks: Sequence[Mark]) -> str:
    """Write what a student reads: a line for each part, the next step, and the milestones."""
    lines, chapter = list[str](), ""
    for mark in marks:
        place, title = PLACES[mark.part], PARTS[mark.part].chapter if mark.part in ON_THE_WAY else "extra"
        lines += [title] * (title != chapter)
        chapter, said = title, "".join(f"it prints: {text}" for text in mark.printed[:1])
        if not mark.right:
            said = "still a stub" if "it is still a stub" in mark.text else " ".join(mark.text.split())
        lines.append(f"  {place:32} {f'{mark.points} of {len(mark.cases)}':9} {said}".rstrip())
    following = [f"next: {PLACES[m.part]}, see chapter {PARTS[m.part].chapter}" for m in marks if not m.right]
    lines += ["", "score: {} of {} points".format(*_points(marks)), *(following or ["All parts are right."])[:1]]
    return "\n* ".join(["\n".join(lines), *_milestones(folder, marks)])


def _points(marks: Sequence[Mark]) -> tuple[int, int]:
    return sum(mark.points for mark in marks), sum(len(mark.cases) for mark in marks)


def _class_row(folder: str, marks: Sequence[Mark]) -> str:
    """Write what a teacher reads: the points of a folder, and the chapters that some are missing in."""
    missing = ", ".join(dict.fromkeys(PARTS[mark.part].chapter for mark in marks if not mark.right))
    return "{}: {} of {} points".format(folder, *_points(marks)) + (f"; more in {missing}" if missing else "")


def mark_class(folders: Sequence[str], time_limit: float = 30.0, seed: int = 0, report: str | None = None) -> bool:
    """Mark folders of a course; print the score of one, or a line for each of several. Returns whether all parts are right.

    A report has the points of each case, as JUnit XML if its name ends in .xml, else as JSON."""
    for folder in folders:
        if not any(Path(folder, place).is_file() for place in PLACES.values()):
            raise InputError(f"{folder} is no folder that `tinylm start` made")
    marks = {folder: mark_files({name: Path(folder, place) for name, place in PLACES.items()}, time_limit, seed)
             for folder in folders}
    if report:
        _write_report(report, marks, seed)
    tell = _class_row if len(folders) > 1 else _score
    print(*(tell(folder, own) for folder, own in marks.items()), sep="\n")
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
                if what is not None:
                    why = re.sub("[^\n -~]", "?", mark.error or what or "not tried")  # XML allows few signs
                    ElementTree.SubElement(case, "failure", message=why)
        parts = {mark.part: asdict(mark) | {"points": mark.points, "of": len(mark.cases)} for mark in marks}
        table[folder] = {"points": points, "of": of, "parts": parts}
    text = json.dumps({"seed": seed, "folders": table}, indent=1)
    with atomic_write(path, "w") as file:
        file.write(ElementTree.tostring(root, encoding="unicode") if path.endswith(".xml") else text)
