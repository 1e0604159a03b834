"""How well does a model tell fables? python benchmarks/recalls.py [RUN ...] (default: tinylm, the model that ships)

For each run: the loss on 400 fresh stories (seed 12345) above their floor; and in 60 told stories (temperature 0.8,
top-p 0.9, seeds 0 to 59) how many of the places are right where the grammar repeats a name, a treat or a thing.
"""
import sys

import numpy as np

from tinylm.core import END_OF_TEXT
from tinylm.data import fables_floor
from tinylm.fables import FABLES, fables
from tinylm.generate import generate, start_ids
from tinylm.train import evaluate_stories, load_run

KNOWN: dict[str, set[str]] = {}  # what is remembered -> all that it can be
for rule in FABLES.values():
    for _, notes, _ in (word for _, _, option in rule.options for step in option for word in step.words):
        for key, value in notes.items():
            KNOWN.setdefault(key, set()).add(value)


def recalls(story: str) -> tuple[int, int, bool]:
    """Follow the grammar as far as a story lets it; where it repeats a choice, any word of the kind may stand.

    Returns how many such places are right, how many there are, and whether the whole story is a fable."""
    best = (0, 0, 0, False)
    todo: list[tuple] = [(0, {}, option, 0, 0) for _, _, option in FABLES["story"].options]
    while todo:
        at, memory, steps, right, places = todo.pop()
        best = max(best, (at, right, places, not steps and at == len(story)))
        if not steps:
            continue
        (kind, what, _, words), rest = steps[0], steps[1:]
        if kind == "tell":
            todo += [(at, memory, option + rest, right, places) for _, _, option in FABLES[what].options]
            continue
        wanted = {"say": what, "recall": memory.get(what)}.get(kind)
        moves = words or [(word, {}, ()) for word in ({what} if kind == "say" else KNOWN[what])]
        for word, notes, _ in moves:
            if story.startswith(word, at):
                again = kind == "recall"
                todo.append((at + len(word), memory | notes, rest, right + (again and word == wanted), places + again))
    _, right, places, whole = best
    return right, places, whole and right == places


if __name__ == "__main__":
    for run in sys.argv[1:] or ["tinylm"]:
        model, tokenizer, config = load_run(run)
        end = tokenizer.special_tokens[END_OF_TEXT]
        ids = np.array(tokenizer.encode("".join(f"{story}\n{END_OF_TEXT}\n" for story in fables(400, seed=12345))))
        excess = evaluate_stories(model, ids, end)[0] - fables_floor(ids, tokenizer, config.context_length)
        counts = []
        for seed in range(60):
            told = generate(model, start_ids(tokenizer), 255, temperature=0.8, top_p=0.9, seed=seed, stop_id=end)
            counts.append(recalls(tokenizer.decode([i for i in told if i != end]).strip()))
        right, places, whole = map(sum, zip(*counts, strict=True))
        print(f"{run}: excess {excess:.4f}; right {right} of {places} ({right / places:.1%}); {whole} of 60 are fables")
