"""The exercises can be trusted: a check refuses its stub and planted wrong answers, and passes its solution."""
import inspect
import re
import types
from unittest.mock import patch

import pytest
from conftest import CHAPTERS

import tinylm.answers
from tinylm.check import PARTS, Wrong, check, stub

EXERCISES = {name: part for name, part in PARTS.items() if part.reference.__module__ == "tinylm.answers"}


@pytest.fixture(scope="module")
def reader():
    "The answers, right and wrong, as of a reader: the same text in a file that is none of the book's."
    module = types.ModuleType("reader")
    module.__package__ = "tinylm"  # whose modules it imports
    with patch.dict(PARTS):
        exec(compile(inspect.getsource(tinylm.answers), "reader.py", "exec"), vars(module))
        module.wrong = {name: PARTS[name].mistakes for name in EXERCISES}
    return module


@pytest.mark.parametrize("name", EXERCISES)
def test_check(name, reader):
    check(name, getattr(reader, name))
    space = dict(vars(reader))
    exec(stub(name), space)
    with pytest.raises(Wrong, match="still a stub"):
        check(space[name])
    assert len(reader.wrong[name]) >= 2
    for words, wrong in reader.wrong[name].items():
        with pytest.raises(Wrong, match=f"\n  likely mistake: {re.escape(words)}(\n|$)"):
            check(name, wrong)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_books_answer_is_no_answer(name):
    with pytest.raises(Wrong, match=rf"the answer runs the book's own code \(.*\b{name}\b.*\)"):
        check(name, lambda *inputs: EXERCISES[name].reference(*inputs))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_tells_of_its_checked_exercises(path):
    text = path.read_text(encoding="utf-8").partition("## Exercises")[2]
    names = [name for name, part in PARTS.items() if part.chapter == path.stem]
    assert names or path.stem == "12_answers", "no exercise with stub, solution and check"
    asked = re.findall(r"check\((?:\\?\"\w+\\?\", )?(\w+)\)", text)
    assert set(asked) & set(names) or path.stem == "12_answers", f"the exercises name none of {names}"
    for name, part in EXERCISES.items():
        assert part.chapter != path.stem or name in asked, f"the exercises do not name check({name})"
    told = re.findall(r"`tinylm check (\w+)=", text)
    assert set(told) <= set(PARTS), f"{told} are not all names that the command knows"
    assert set(told) & set(names) or path.stem == "12_answers", f"no `tinylm check NAME=my.py` with one of {names}"
