"""The engine of `tinylm check`: run a reader's part beside a plain answer and name the likely mistake. A plain module.

Parts, cases and mistakes stand in `tinylm.exercises`. An answer runs on each case, beside the plain answer of its part.
Where it differs, the mistakes of the part run too: those whose results are the reader's are the likely ones. What is in
a file runs in a process of its own, because it may not end, may end the process, or may print."""
import ast
import inspect
import io
import multiprocessing
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm import exercises
from tinylm.core import END_OF_TEXT, InputError
from tinylm.exercises import PARTS, Case
from tinylm.fables import fables
from tinylm.model import ModelConfig, TransformerLM


class Wrong(AssertionError):
    """An answer differs from the book's; the message tells what differs first."""

    def _render_traceback_(self) -> list[str]:  # so that Jupyter shows the message and no traceback
        return str(self).splitlines()


def _find(name: Any) -> str:
    """Find a part's name by it or by the name that its answer has in the book; of NAME:OBJECT, NAME counts."""
    name = str(name).partition(":")[0]
    names = {part.answer.__name__: key for key, part in PARTS.items()} | {key: key for key in PARTS}
    if name not in names:
        lower = {n.lower(): n for n in names}
        hint = "".join(f"did you mean {lower[n]}? " for n in get_close_matches(name.lower(), lower, 1, cutoff=0.4))
        raise InputError(f"unknown part {name!r}; {hint}There are: {', '.join(PARTS)}")
    return names[name]


# Comparing

_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float64: 1e-8}  # relative, by dtype; float32 has 1e-4


def difference(expected: Any, got: Any) -> str | None:
    """Tell in half a sentence how a result differs from the expected one; None if they agree.

    Both are tensors, numbers, texts, or lists or dicts of such things. Numbers agree when they differ by no more than
    rounding explains. Sums that cancel err in proportion to their terms, so the absolute tolerance goes with the largest
    number of the tensor. Errors, noted as results, agree when they are of one kind."""
    if got is None:
        return None if expected is None else "is None: a `return` is missing, or the body is still to be filled in"
    if isinstance(expected, Mapping | list | tuple):
        if not isinstance(got, Mapping | list | tuple):
            return f"is a {type(got).__name__}, expected a {type(expected).__name__}"
        a, b = (dict(x if isinstance(x, Mapping) else enumerate(x)) for x in (expected, got))
        if "error" in a or "error" in b:
            return None if a.get("error") == b.get("error") else b.get("words", "it raises no error")
        for key in [*a, *b]:
            where = key if isinstance(key, str) else f"item {key!r}"
            if key not in b:
                return f"has no {where}" + "".join(f", but {other!r}" for other in b if other not in a)
            if what := difference(a.get(key), b[key]):
                return f"{where} {what}"
        return None
    if isinstance(expected, float):
        expected, got = torch.tensor(expected), got.float() if isinstance(got, Tensor) else got
    if not isinstance(expected, Tensor):
        plain = isinstance(got, int | float | str | bytes) or type(got) is type(expected)
        return None if plain and expected == got else f"is {got!r}, expected {expected!r}"
    if expected.dim() == 0 and isinstance(got, int | float):
        got = torch.tensor(got, dtype=expected.dtype)  # a plain number will do
    if not isinstance(got, Tensor):
        return f"is no tensor but a {type(got).__name__}"
    for kind, want, has in ("shape", tuple(expected.shape), tuple(got.shape)), ("dtype", expected.dtype, got.dtype):
        if want != has:
            return f"has {kind} {has}, expected {want}"
    relative, wide = _TOLERANCE.get(expected.dtype, 1e-4), expected.double()
    largest = max(wide[wide.isfinite()].abs().tolist(), default=0.0)
    off = ~torch.isclose(got.double(), wide, rtol=relative, atol=relative / 10 * largest + 1e-9, equal_nan=True)
    if not off.any():
        return None
    place = off.nonzero()[0].tolist()
    x, y = expected[tuple(place)].item(), got[tuple(place)].item()
    digits = next((n for n in range(6, 18) if f"{x:.{n}g}" != f"{y:.{n}g}"), 6)  # enough to see the difference
    most = (wide - got.double()).abs()[off].max().item()
    more = f" ({int(off.sum())} of its {off.numel()} numbers are off, by up to {most:.3g})" if off.numel() > 1 else ""
    return f"{f'at {place} ' if place else ''}is {y:.{digits}g}, expected {x:.{digits}g}{more}"


# Running

_LIBRARIES = (os.path.join(Path(__file__).parent, ""), "<frozen", *map(sysconfig.get_path, ("stdlib", "purelib")))


def _explain(error: BaseException) -> str:
    """Say what an exception means, and on which of the reader's lines it was raised."""
    first = (str(error).splitlines() or [""])[0]
    what = f"it raises {type(error).__name__}: {first}"
    if isinstance(error, NotImplementedError):
        what = "it is still a stub: fill in the body"
    elif "NoneType" in first:
        what += "; a `return` is missing, or a body is still to be filled in"
    elif re.search("has no attribute '(_|param_groups)", first):
        what += "; does __init__ call super().__init__()?"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES):
            cell = "ipykernel" in frame.filename or frame.filename.startswith("<")
            return f"{what}\n  line {frame.lineno} of {'the cell' if cell else Path(frame.filename).name}: {frame.line}"
    return what


def _attempt(case: Case, answer: Any) -> dict[str, Any]:
    """Run a case with an answer and give the results by name.

    An exception is a result too: its kind is the "error", and "words" explain it."""
    try:
        return case(answer)
    except (Exception, SystemExit) as error:
        sign = re.search("argument|NoneType", str(error))  # called in another way, or still empty
        return {"error": sign[0] if sign else type(error).__name__, "words": _explain(error)}


@dataclass
class Mark:
    """What was found about one part."""

    part: str
    cases: dict[str, str | None]  # case -> None where it passed, else what differs; "" where it was not tried
    error: str = ""  # why no case could be tried
    likely: list[str] = field(default_factory=list)  # mistakes that give the same results
    printed: list[str] = field(default_factory=list)  # first lines that the answer prints

    @property
    def points(self) -> int:
        """The number of cases that passed."""
        return list(self.cases.values()).count(None)

    @property
    def right(self) -> bool:
        """Whether all cases passed."""
        return self.points == len(self.cases)

    @property
    def text(self) -> str:
        """What is told to the reader: that all is right, or what differs first, and the likely mistakes."""
        text = f"{self.part}: " + (self.error or f"agrees with the book's in all {len(self.cases)} cases")
        for i, (title, what) in enumerate(self.cases.items(), 1):
            if what:
                text = f"{self.part} differs in case {i} of {len(self.cases)}, {title}:\n  {what}"
                text += "".join(f"\n  likely mistake: {words}" for words in self.likely[:2])
                break
        return "\n  it prints: ".join([text, *self.printed])


def _judge(mark: Mark, answer: Any) -> Iterator[str]:
    """Run all cases with an answer and note what is found; gives each case's title before it is run.

    Likely are the mistakes whose results are the answer's, up to the first case that differs and for longest after it."""
    part, got = PARTS[mark.part], {}
    for title, case in part.cases.items():
        yield title
        got[title] = mine = _attempt(case, answer)
        what = difference(_attempt(case, part.answer), mine)
        if "error" not in mine and (changed := difference(mine, _attempt(case, answer))):
            what = f"two calls with the same input differ: the second time {changed}"
        if what and " after the call " in what:
            what = f"it changes its input: {what}"
        if what and mine.get("error") == "argument":
            what = f"{what}\n  the book's is called as {part.answer.__name__}{inspect.signature(part.answer)}"
        mark.cases[title] = what

    def alike(other: Any) -> int:
        off = (i for i, (title, mine) in enumerate(got.items()) if difference(_attempt(part.cases[title], other), mine))
        return next(off, len(got))

    if not mark.right:
        right, reach = alike(part.answer), {words: alike(part.wrong(words)) for words in part.mistakes}
        mark.likely = [words for words, cases in reach.items() if cases == max(reach.values()) > right]


def check(part: str | Callable, answer: Any = None) -> None:
    """Compare an answer, a function or class called like the book's, with the book's: check("softmax", mine).

    The name may be left out where the answer has it. Raises `Wrong` with the first thing that differs."""
    mark = Mark(_find(getattr(part, "__name__", part)), {})
    list(_judge(mark, part if answer is None else answer))
    if not mark.right:
        raise Wrong(mark.text)
    print(mark.text)


# Stubs: the plain answers without their bodies.

def stub(*names: str, home: Mapping[str, str] | None = None) -> str:
    """Write a file to fill in: for each part its signature and task, with the imports that they need.

    Other parts are imported from the modules that `home` names, or from the book."""
    wanted, lines = list(dict.fromkeys(map(_find, names))), set()
    sources = [PARTS[name].source for name in wanted]
    nodes = [*ast.parse(inspect.getsource(exercises)).body, *ast.walk(ast.parse("\n".join(sources)))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    for key in {need for name in wanted for need in PARTS[name].needs}.difference(wanted):
        module = (home or {}).get(key, PARTS[key].book.__module__)
        lines.add(f"from {module} import {PARTS[key].answer.__name__}")
    for node in nodes:
        for alias in getattr(node, "names", ()):  # of an import
            if (alias.asname or alias.name) in used:
                node.names = [alias]  # type: ignore[attr-defined]  # each on a line of its own
                lines.add(ast.unparse(node))
    head = sorted(lines, key=lambda line: ("tinylm" in line, line.startswith("from"), line))
    bodies = [_hollow(source.splitlines(), ast.parse(source).body[0]) for source in sources]
    return "\n\n\n".join(["\n".join(head)] * bool(head) + bodies) + "\n"


def _hollow(lines: list[str], tree: Any) -> str:
    """Keep decorators, signatures and docstrings of a function or class."""
    if isinstance(tree, ast.ClassDef):
        methods = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not re.match("_(?!_init__)", n.name)]
        return "\n\n".join(["\n".join(lines[: tree.body[0].end_lineno]), *(_hollow(lines, n) for n in methods)])
    begin, first = min([tree.lineno, *(node.lineno for node in tree.decorator_list)]) - 1, tree.body[0]
    end = first.end_lineno if ast.get_docstring(tree) else first.lineno - 1
    while lines[end - 1].lstrip().startswith("#"):
        end -= 1
    return "\n".join([*lines[begin:end], " " * first.col_offset + "raise NotImplementedError"])


# Files: each runs in a process of its own.

def _load(path: str | Path, name: str) -> Any:
    """Take a part, NAME or NAME:OBJECT, from a file. Raises InputError."""
    folder, stem = os.path.split(os.path.splitext(os.path.abspath(path))[0])
    if not os.path.exists(path):
        raise InputError(f"{path} is not there")
    sys.path.insert(0, folder)  # for what it imports, too
    try:
        module = import_module(stem)
    except (Exception, SystemExit) as error:
        why = _explain(error).replace("\n  ", "; ")
        raise InputError(f"{path}: cannot be imported: {why}") from error
    wanted = name.split(":")[1:] or [_find(name), PARTS[_find(name)].answer.__name__]
    found = [vars(module)[n] for n in wanted if n in vars(module)]
    if not found:
        raise InputError(f"{getattr(module, '__file__', path)}: defines no {' or '.join(dict.fromkeys(wanted))}")
    return found[0]


def _state() -> Any:
    return torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd()


def _serve(pipe: Any, work: Callable[..., Iterator], *arguments: Any) -> None:
    """Do some work in a child process; send what it yields, and at last why it ended, or ""."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that all processes that it starts can be ended with it
    multiprocessing.set_start_method(None, force=True)  # for its own processes, the usual one
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    before, why = _state(), ""
    try:
        for event in work(*arguments):
            if _state() != before:
                why = "it changes torch's default dtype or gradient mode, or the working directory: leave them as they were"
                break
            pipe.send(event)
    except Exception as error:
        why = _explain(error)
    pipe.send(why)


def _apart(work: Callable[..., Iterator], *arguments: Any, time_limit: float) -> tuple[str, Any, str]:
    """Let a child process do some work, a generator that yields what it does next and all that it has found.

    Returns what came last, and why it did not go on, "" if all was done. Each step may take `time_limit` seconds."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_serve, args=(theirs, work, *arguments))
    child.start()
    theirs.close()
    place, found, why, limit = "the start", [], None, 300.0
    try:
        while why is None:
            if not ours.poll(limit):
                why = f"your code was stopped after {limit:g} seconds; is there an endless loop?"
            elif isinstance(event := ours.recv(), str):
                why = event
            else:
                (place, found), limit = event, time_limit
    except EOFError:
        why = "your code ended the process"
    finally:
        with suppress(OSError):  # all may have ended; Windows has no groups
            getattr(os, "killpg", os.kill)(child.pid, 9)  # type: ignore[arg-type]
        child.join()
    return place, found, why


def _mark(jobs: list[tuple[str, str | Path]], seed: int) -> Iterator[tuple[str, list[Mark]]]:
    """Mark parts, each (NAME, file), in the child process."""
    exercises.SEED, marks = seed, list[Mark]()
    for name, path in jobs:
        printed, mark = io.StringIO(), Mark(_find(name), dict.fromkeys(PARTS[_find(name)].cases, ""))
        marks.append(mark)
        yield str(path), marks
        try:
            answer = _load(path, name)
            with redirect_stdout(printed):
                for title in _judge(mark, answer):
                    yield title, marks
        except InputError as error:
            mark.error = str(error)
        mark.printed = printed.getvalue().splitlines()[:4]
    yield "", marks


def mark_files(files: Mapping[str, str | Path], time_limit: float = 30.0, seed: int = 0) -> list[Mark]:
    """Compare parts in Python files, NAME or NAME:OBJECT -> file, with the book's, in a process of its own.

    The time limit is that of a case, or of an import, in seconds; the seed is that of the numbers in the cases."""
    jobs, marks = list(files.items()), list[Mark]()
    while len(marks) < len(jobs):  # a process that has not ended well leaves the rest to the next one
        place, found, why = _apart(_mark, jobs[len(marks):], seed, time_limit=time_limit)
        assert found, why
        marks += found
        if place in marks[-1].cases and why:
            marks[-1].cases[place] = why
        elif why:
            marks[-1].error = f"{place}: {why}"
    return marks


def check_file(path: str, names: Iterable[str], time_limit: float = 30.0, seed: int = 0, train: bool = False) -> int:
    """Compare parts in a Python file with the book's and print what is found; returns how many are not right.

    Each of the names is NAME, or NAME:OBJECT for what has another name in the file. With `train`, if all are right,
    also train a small model with them, and one with the book's, and print some losses. Raises InputError."""
    files = dict.fromkeys(names, path)
    if train and (other := [name for name in map(_find, files) if name not in TRAINABLE]):
        raise InputError(f"{other[0]} has no place in training; there are: {', '.join(TRAINABLE)}")
    marks = mark_files(files, time_limit, seed)
    for mark in marks:
        if mark.error:
            raise InputError(mark.error)
        print(mark.text)
    failed = sum(not mark.right for mark in marks)
    if train and not failed:
        for whose, parts in ("yours", files), ("the book's", {}):
            said, why = live(parts, time_limit=10 * time_limit)
            print(f"with {whose}: {why or said[-1]}")
            failed += bool(why)
    return failed


# Training with an answer

SENTENCE = "There once lived a quiet mouse named Maya. Her home was on a green island."
TRAINABLE = [name for name, part in PARTS.items() if part.chapter < "05" and part.book is not part.answer]


class Training:
    """A tokenizer, then a small model, trained on Fables with these parts (name -> answer), for the rest with the book's.

    Parts that are made of others are built from the plain answers' text, in which these names mean these parts."""

    def __init__(self, answers: Mapping[str, Any]):
        self.parts: dict[str, Any] = {}  # by their names in the book
        for name in TRAINABLE:
            part = PARTS[name]
            book = part.build(self.parts) if part.needs else part.book
            self.parts[part.answer.__name__] = answers.get(name, book)
        self.text = f"\n{END_OF_TEXT}\n".join(fables(300, seed=0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "fables.txt")
            path.write_text(self.text, encoding="utf-8")
            tokens = self.parts["train_bpe"](str(path), 512, [END_OF_TEXT])
        self.tokenizer = self.parts["Tokenizer"](*tokens, [END_OF_TEXT])

    def losses(self, steps: int = 40, own: bool = False) -> Iterator[float]:
        """Give the loss of each batch, in nats per token, before its step.

        The model begins with the book's weights, or is twice as wide and begins with its own."""
        use, config = self.parts, ModelConfig(512, 128, 64, 2, 4, 192) if own else ModelConfig(512, 128, 32, 2, 2, 96)
        tokens, self.model = np.array(self.tokenizer.encode(self.text)), use["TransformerLM"](config)
        if not own:
            self.model.load_state_dict(TransformerLM(config).state_dict(), strict=False)
        optimizer = use["AdamW"](self.model.parameters(), lr=2e-2, weight_decay=1e-4)
        for step in range(1, steps + 1):
            x, y = use["get_batch"](tokens, 8, config.context_length, rng=np.random.default_rng([0, step]))
            loss = use["cross_entropy"](self.model(x), y)
            yield loss.item()
            optimizer.zero_grad()
            loss.backward()
            use["clip_grad_norm"](self.model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = use["cosine_lr"](step, 2e-2, 2e-3, 5, steps)
            optimizer.step()


def _live(files: Mapping[str, str | Path], steps: int = 40, own: bool = False) -> Iterator[tuple[str, list[str]]]:
    said = list[str]()
    yield "loading your parts", said
    answers = {_find(name): _load(path, name) for name, path in files.items()}
    yield "your tokenizer on 300 fables", said
    run = Training(answers)
    encode, decode = run.tokenizer.encode, run.tokenizer.decode
    said.append("your tokens: " + "|".join(decode([i]) for i in encode(SENTENCE)))
    yield "your model and its training run", said
    losses = list(run.losses(steps, own))
    if steps:
        said.append(f"your model's first loss: {losses[0]:.2f} nats per token; guessing alone has ln 512 = 6.24")
    if steps > 1:
        last = sum(losses[-20:]) / 20
        said.append(f"your training run: {losses[0]:.3f} down to {last:.3f} nats per token in {steps} steps")
    if "generate" in answers:
        yield "your first story", said
        prompt, end = encode(f"{END_OF_TEXT}\n"), encode(END_OF_TEXT)[0]
        story = answers["generate"](run.model, prompt, 120, temperature=0.7, top_p=0.9, stop_id=end, seed=1)
        said.append(f"your first story: {decode(story).strip()}")
    yield "", said


def live(files: Mapping[str, str | Path], *how: Any, time_limit: float = 30.0) -> tuple[list[str], str]:
    """Say what parts in Python files can do together, with the book's where one is missing, in a process of its own.

    Gives a line each on the tokens, the training (`how` is for `Training.losses`) and a story, if there is `generate`;
    and why not, or ""."""
    place, said, why = _apart(_live, files, *how, time_limit=time_limit)
    return said, why and f"{place}: {why}"
