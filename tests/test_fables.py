"""The proof that the grammar of the Fables is unambiguous; test_golden.py holds what they say."""
import itertools
import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.core import InputError
from tinylm.fables import FABLES, compile_grammar, entropy, fable_logprob, fables, parse, tell

STORIES = list(fables(50, 21))


def test_no_two_series_of_choices_tell_the_same_words():
    assert list(clashes(FABLES)) == []


@pytest.mark.parametrize("text", [
    "story:\n<a:x>b\n<a:y>\nx: a, c\ny: ab, d",  # the same words
    "story:\n<x>.\nx: Go, Go on",  # one begins the other
    "story:\n<a:x> <end>\nx: so, he\nend:\n{a} ends\nhe ends",  # hidden in a recalled word
])
def test_the_search_for_clashes_finds_them(text):
    assert list(clashes(compile_grammar(text)))


def clashes(grammar):
    """Pairs of options of one rule such that a text of one can begin a text of the other.

    Two options are told side by side; the one that is behind must catch up with what the other has said. Where a
    word comes from before the rule, every word that this name can stand for is tried, the same for both.
    """
    names = {}
    for step in (step for rule in grammar.values() for _, _, option in rule.options for step in option):
        for _, notes, _ in step.words:
            for key, word in notes.items():
                names.setdefault(key, set()).add(word)
    for name, rule in grammar.items():
        for (_, _, one), (_, _, two) in itertools.combinations(rule.options, 2):
            if clash(grammar, names, one, two):
                yield name, one, two


def clash(grammar, names, one, two):
    agenda = [((one, {}), (two, {}), "")]  # the second value is ahead of the first by the third
    while agenda:
        (todo, memory), ahead, lead = agenda.pop()
        if not todo or (not lead and not ahead[0]):
            return True
        step, rest = todo[0], todo[1:]
        if step.kind == "say":
            moves = [(step.what, (rest, memory), ahead)]
        elif step.kind == "tell":
            moves = [("", (option + rest, memory), ahead) for _, _, option in grammar[step.what].options]
        elif step.kind == "choose":
            moves = [(word, (rest, memory | notes), ahead) for word, notes, _ in step.words]
        elif step.what in memory:
            moves = [(memory[step.what], (rest, memory), ahead)]
        else:
            said = [(word, {step.what: word}) for word in names[step.what]]
            moves = [(word, (rest, memory | note), (ahead[0], note | ahead[1])) for word, note in said]
        for said, behind, other in moves:
            if lead.startswith(said):
                agenda.append((behind, other, lead[len(said):]))
            elif said.startswith(lead):
                agenda.append((other, behind, said[len(lead):]))
    return False


def test_the_entropy_formula_agrees_with_3000_stories():
    random = Random(6).random
    nats = [-tell(FABLES, random)[1] for _ in range(3_000)]
    mean = sum(nats) / len(nats)
    error = (sum((x - mean) ** 2 for x in nats) / len(nats) ** 2) ** 0.5
    assert abs(mean - entropy()) < 4 * error < 0.5


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(STORIES), st.data())
def test_a_changed_word_is_refused_or_makes_another_story(story, draw):
    words = re.findall(r"\w+|\W+", story)
    at = draw.draw(st.integers(0, len(words) - 1))
    new = draw.draw(st.sampled_from(words) | st.text(max_size=5))
    changed = "".join([*words[:at], new, *words[at + 1:]])
    parses = list(parse(changed))
    assert len(parses) <= 1
    if not parses:
        with pytest.raises(InputError, match="not a Fables story"):
            fable_logprob(changed)


def test_a_contradicted_reference_is_refused():
    refused = 0
    for story in STORIES:
        treat = next(c for c in next(parse(story)) if c.name == "treat")
        word = story[treat.start:treat.end]
        other = "berry pie" if word != "berry pie" else "apple tart"
        if (last := story.rfind(word)) > treat.start:
            refused += 1
            assert not list(parse(story[:last] + other + story[last + len(word):]))
        assert fable_logprob(story.replace(word, other)) < 0  # changed everywhere, it is another good story
    assert refused > 25


def test_the_english_is_right():
    for story in fables(800, 31):
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiou]|[{}<>|¶]|  |\n \w|\.\.|\b(\w+) \1\b", story), story
        assert story.count('"') % 2 == 0 and all(part[-1] in '.!?"' for part in story.split("\n\n")), story
        assert all(re.match(r'["A-Z]', part) for part in story.split("\n\n"))
        assert 120 <= len(story.split()) <= 230
