"""The exercises can be trusted: a check refuses its stub and planted wrong answers, and passes its solution."""
import inspect
import re
import types

import pytest
from conftest import CHAPTERS

import tinylm.answers
from tinylm.check import PARTS, Wrong, check, stub

EXERCISES = {name: part for name, part in PARTS.items() if part.reference.__module__ == "tinylm.answers"}


def answer_from(source: str, name: str):
    "What a reader's notebook defines that has the answers' imports and helpers."
    reader = types.ModuleType("reader")
    vars(reader).update({k: v for k, v in vars(tinylm.answers).items() if not k.startswith("__")})
    exec(source, vars(reader))
    return getattr(reader, name)


@pytest.mark.parametrize("name", EXERCISES)
def test_check(name):
    part = EXERCISES[name]
    check(answer_from(inspect.getsource(part.reference), name))
    with pytest.raises(Wrong, match="still a stub"):
        check(answer_from(stub(name), name))
    assert len(part.mistakes) >= 2
    for words, wrong in part.mistakes.items():
        def answer(*inputs, wrong=wrong):
            return wrong(*inputs)
        with pytest.raises(Wrong) as refused:
            check(name, answer)
        borrowed = "the book's own code" in str(refused.value)  # some mistakes are made from the right answer
        assert borrowed or f"likely mistake: {words}" in str(refused.value), refused.value


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
