"""The exercises can be trusted: a check refuses its stub and planted wrong answers, and passes its solution."""
import re
import sys

import pytest
from conftest import CHAPTERS, ROOT

sys.path.insert(0, str(ROOT / "nbs"))
import exercises  # noqa: E402


def answer_from(source: str, name: str):
    space = dict(vars(exercises))
    exec(source, space)
    return space[name]


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_check(name):
    exercise = exercises.EXERCISES[name]
    exercises.check(exercise.solution)
    with pytest.raises(NotImplementedError):
        exercises.check(answer_from(exercises.stub(name), name))
    assert len(exercise.wrong) >= 2
    for wrong in exercise.wrong:
        with pytest.raises(AssertionError):
            exercises.check(wrong, name)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_tells_of_its_checked_exercises(path):
    text = path.read_text(encoding="utf-8").partition("## Exercises")[2]
    names = [name for name, exercise in exercises.EXERCISES.items() if exercise.chapter == path.stem]
    assert names, "no exercise with stub, solution and check"
    for name in names:
        assert re.search(rf"check\({name}\)", text), f"the exercises do not name check({name})"
