"""The engine of `tinylm check`: run a reader's part beside a plain answer and name the likely mistake. A plain module.

Parts, cases and mistakes stand in `tinylm.exercises`. An answer runs on each case, beside the plain answer of its part.
Where it differs, the mistakes of the part run too: those whose results are the reader's are the likely ones. What is in
a file runs in a process of its own, because it may not end, may end the process, or may print."""
import ast
import importlib
import importlib.util
import inspect
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.machinery import SourceFileLoader
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
    number of the tensor. Errors, as `attempt` notes them, agree when they are of one kind."""
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
                other = [k for k in b if k not in a and isinstance(key, str) and difference(a[key], b[k]) is None]
                cut = "; is the output cut off from the graph?" if where.startswith("gradient") else ""
                return f"has {other[0]!r}, which must be called {key!r}" if other else f"has no {where}{cut}"
            if key not in a:
                return f"has {where} = {b[key]!r}, where nothing more was expected"
            if what := difference(a[key], b[key]):
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
    if got.shape != expected.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"has dtype {got.dtype}, expected {expected.dtype}"
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


def attempt(case: Case, answer: Any) -> dict[str, Any]:
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
        return 0 if self.error else sum(what is None for what in self.cases.values())

    @property
    def right(self) -> bool:
        """Whether all cases passed."""
        return self.points == len(self.cases)

    @property
    def text(self) -> str:
        """What is told to the reader: that all is right, or what differs first, and the likely mistakes."""
        if self.error:
            return f"{self.part}: {self.error}"
        text = f"{self.part}: agrees with the book's in all {len(self.cases)} cases"
        for i, (title, what) in enumerate(self.cases.items(), 1):
            if what is not None:
                text = f"{self.part} differs in case {i} of {len(self.cases)}, {title}:\n  {what}"
                text += "".join(f"\n  likely mistake: {words}" for words in self.likely[:2])
                if what.startswith("your code"):
                    text = f"{self.part}, case {title!r}: {what}"
                break
        return "\n  it prints: ".join([text, *self.printed])


def _changed(run: Callable[[], Any]) -> tuple[Any, str]:
    """Run something; give its result, and say which state of the whole process it has changed, which is set back."""
    state: dict[str, tuple[Callable, Callable]] = {
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "the working directory": (os.getcwd, os.chdir)}
    before, said = {name: get() for name, (get, _) in state.items()}, ""
    result = run()
    for name, (get, put) in state.items():
        if get() != before[name]:
            said = f"it changes {name}, on which all other code depends: leave it as it was"
            put(before[name])
    return result, said


def _judge(name: str, answer: Any, on: Callable[..., object] = lambda title, said: None) -> Mark:
    """Run all cases with an answer; before each, `on` hears its title and what was said of the others.

    Likely are the mistakes that give what the answer gave, in the first case that differs and in all before it; where
    several do, the later cases decide."""
    part, got, said = PARTS[name], {}, dict[str, str | None]()
    for title, case in part.cases.items():
        on(title, said)
        mine, state = _changed(partial(attempt, case, answer))
        got[title], what = mine, difference(attempt(case, part.answer), mine) or state or None
        if "error" not in mine and (changed := difference(mine, attempt(case, answer))):
            what = f"two calls with the same input differ: the second time {changed}"
        if what and " after the call " in what:
            what = f"it changes its input: {what}"
        if mine.get("error") == "argument":
            what = f"{what}\n  the book's is called as {part.answer.__name__}{inspect.signature(part.answer)}"
        said[title] = what
    wrong, likely, off = {w: part.wrong(w) for w in part.mistakes}, list(part.mistakes), False
    for title, mine in got.items():
        if not any(said.values()) or off and len(likely) < 2:
            break
        same = [w for w in likely if difference(attempt(part.cases[title], wrong[w]), mine) is None]
        likely, off = (same or likely if off else same), off or said[title] is not None
    return Mark(name, said, likely=likely if off else [])


def check(part: str | Callable, answer: Any = None) -> None:
    """Compare an answer, a function or class called like the book's, with the book's: check("softmax", mine).

    The name may be left out where the answer has it. Raises `Wrong` with the first thing that differs."""
    mark = _judge(_find(getattr(part, "__name__", part)), part if answer is None else answer)
    if not mark.right:
        raise Wrong(mark.text)
    print(mark.text)


# Stubs: the plain answers without their bodies.

def stub(*names: str, home: Mapping[str, str] | None = None) -> str:
    """Write a file to fill in: for each part its signature and task, with the imports that they need.

    Other parts are imported from the modules that `home` names, or from the book."""
    wanted = list(dict.fromkeys(map(_find, names)))
    sources = [PARTS[name].source for name in wanted]
    nodes = list(ast.walk(ast.parse("\n".join(sources))))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    others = {other: PARTS[other].answer.__name__ for name in wanted for other in PARTS[name].needs if other not in wanted}
    lines = {f"from {(home or {}).get(key, PARTS[key].book.__module__)} import {name}" for key, name in others.items()}
    for node in [*ast.parse(inspect.getsource(exercises)).body, *nodes]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) in used:
                    node.names = [alias]  # each on a line of its own
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

def _load(path: str, name: str) -> Any:
    """Import a file, once, and take a part from it: NAME, or NAME:OBJECT. Raises InputError."""
    stem, folder = Path(path).stem, str(Path(path).resolve().parent)
    if not os.path.exists(path):
        raise InputError(f"{path} is not there")
    if folder not in sys.path:
        sys.path.append(folder)  # for what it imports, in its processes too
    known = sys.modules.get(stem)
    if known is None or getattr(known, "__file__", None) != path:
        stem = stem if known is None else f"answer_{stem}"
        spec: Any = importlib.util.spec_from_file_location(stem, path, loader=SourceFileLoader(stem, path))
        known = sys.modules[stem] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(known)
        except (Exception, SystemExit) as error:
            del sys.modules[stem]
            why = _explain(error).replace("\n  ", "; ")
            raise InputError(f"{path}: cannot be imported: {why}") from error
    key = _find(name)
    wanted = name.split(":")[1:] or [key, PARTS[key].answer.__name__]
    for n in wanted:
        if n in vars(known):
            return vars(known)[n]
    raise InputError(f"{path}: defines no {' or '.join(dict.fromkeys(wanted))}")


class _Printed(io.StringIO):
    """Keep the beginning of what is printed."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, 2_000 - self.tell())])
        return len(text)


def _serve(work: str, *arguments: Any) -> None:
    """Do some work, MODULE:FUNCTION, in a child process; it sends events to the parent, each a line of JSON."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that the answer writes gets among the events

    def send(*event: Any) -> None:
        print(json.dumps(event), file=channel, flush=True)

    module, _, function = work.partition(":")
    try:
        getattr(importlib.import_module(module), function)(send, *arguments)
    except Exception as error:
        send("failed", _explain(error))
    send("at", "")


def events(work: str, *arguments: Any, time_limit: float = 30.0) -> Iterator[list[Any]]:
    """Let a child process work; give its events, at last ["stopped", why] if it has not ended well.

    An event ["at", place] says what is done next, for which it has `time_limit` seconds."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from tinylm.check import _serve; _serve(*{(work, *arguments)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True)
    heard: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        for line in child.stdout or ():
            heard.put(json.loads(line))
        heard.put(None)

    threading.Thread(target=listen, daemon=True).start()
    place, limit, why = "the start", 300.0, "your code ended the process"
    try:
        while event := heard.get(timeout=limit):
            if event[0] == "at":
                place, limit = event[1], time_limit
            yield event
    except queue.Empty:
        why = f"your code was stopped after {limit:g} seconds; is there an endless loop?"
    finally:
        with suppress(OSError):  # with all processes that it has started; they may have ended
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
        child.wait()
    if place:  # "" when all was done and the process, or one that it has started, has not ended well
        yield ["stopped", why]


def _mark_jobs(send: Callable[..., None], jobs: list[tuple[str, str]], seed: int) -> None:
    """Mark parts, each (file, name), in the child process."""
    exercises.SEED = seed
    for path, name in jobs:
        send("at", path, {})
        printed, mark = _Printed(), Mark(_find(name), {})
        try:
            with redirect_stdout(_Printed()):
                answer, state = _changed(partial(_load, path, name))
            if state:
                raise InputError(f"{path}: while it is imported, {state}")
            with redirect_stdout(printed):
                mark = _judge(mark.part, answer, partial(send, "at"))
        except InputError as error:
            mark.error = str(error)
        send("mark", mark.error, mark.cases, mark.likely, printed.getvalue().splitlines()[:4])


def mark_files(jobs: Iterable[tuple[str, str]], time_limit: float = 30.0, seed: int = 0) -> Iterator[Mark]:
    """Compare parts in Python files, each (file, NAME or NAME:OBJECT), with the book's, in a process of its own.

    The time limit is that of a case, or of an import, in seconds; the seed is that of the numbers in the cases."""
    left = list(jobs)
    while left:
        title, said = "", dict[str, str | None]()
        for event, *values in events("tinylm.check:_mark_jobs", left[:], seed, time_limit=time_limit):
            if event == "at":
                title, said = values
                continue
            path, name = left.pop(0)
            mark = Mark(_find(name), {**dict.fromkeys(PARTS[_find(name)].cases, ""), **said})
            if event == "mark":
                mark.error, said, mark.likely, mark.printed = values
                mark.cases |= said
            elif title in mark.cases:
                mark.cases[title] = values[0]
            else:
                mark.error = f"{path}: {values[0]}"
            yield mark
            if event != "mark" or not left:
                break  # with a process that has not ended well; the next one takes what is left


def check_file(path: str, names: Iterable[str], time_limit: float = 30.0, seed: int = 0, train: bool = False) -> int:
    """Compare parts in a Python file with the book's and print what is found; returns how many are not right.

    Each of the names is NAME, or NAME:OBJECT for what has another name in the file. With `train`, if all are right,
    also train a small model with them, and one with the book's, and print some losses. Raises InputError."""
    names, failed = list(names), 0
    if train and (other := [key for key in map(_find, names) if key not in TRAINABLE]):
        raise InputError(f"{other[0]} has no place in training; there are: {', '.join(TRAINABLE)}")
    for mark in mark_files([(path, name) for name in names], time_limit, seed):
        if mark.error:
            raise InputError(mark.error)
        print(mark.text)
        failed += not mark.right
    place = ""
    for event, value in events("tinylm.check:_train", path, names, time_limit=time_limit) if train and not failed else ():
        if event == "losses":
            print("loss at step   " + "".join(f"{step:9}" for step in (1, 10, 20, 30, 40)))
            for title, curve in {"with yours": value, "with the book's": training_curve({})}.items():
                print(f"{title:15}" + "".join(f"{x:9.4f}" for x in curve[:1] + curve[9::10]))
        elif event != "at":
            print(f"{place}: {value}")
            failed = 1
        place = value
    return failed


# Training with an answer

TRAINABLE = ("get_batch", "train_bpe", "Tokenizer", "Linear", "Embedding", "RMSNorm", "SwiGLU", "softmax", "RoPE",
             "attention", "MultiHeadSelfAttention", "TransformerBlock", "TransformerLM", "cross_entropy", "cosine_lr",
             "clip_grad_norm", "AdamW")


def train_small(use: Mapping[str, Any], text: str, steps: int, width: int = 32,
                weights: bool = False) -> tuple[Any, Iterator[tuple[float, Any]]]:
    """Make a tokenizer for a text, then train a model of 2 layers, with the parts in `use`, by the names of the book.

    Gives the tokenizer, and an iterator over the loss of each batch, before its step, and the model; with `weights`, it
    begins with the book's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fables.txt"
        path.write_text(text, encoding="utf-8")
        tokenizer = use["Tokenizer"](*use["train_bpe"](str(path), 512, [END_OF_TEXT]), [END_OF_TEXT])

    def losses() -> Iterator[tuple[float, Any]]:
        tokens, config = np.array(tokenizer.encode(text)), ModelConfig(512, 128, width, 2, width // 16, 3 * width)
        model, optimizer = use["TransformerLM"](config), None
        if weights:
            model.load_state_dict(TransformerLM(config).state_dict(), strict=False)
        for step in range(1, steps + 1):
            x, y = use["get_batch"](tokens, 8, config.context_length, rng=np.random.default_rng([0, step]))
            loss = use["cross_entropy"](model(x), y)
            yield loss.item(), model
            optimizer = optimizer or use["AdamW"](model.parameters(), lr=2e-2, weight_decay=1e-4)
            optimizer.zero_grad()
            loss.backward()
            use["clip_grad_norm"](model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = use["cosine_lr"](step, 2e-2, 2e-3, 5, steps)
            optimizer.step()

    return tokenizer, losses()


def training_curve(answers: Mapping[str, Any], on_step: Callable[[str], object] = lambda step: None) -> list[float]:
    """Train a small model on Fables with these parts (name -> answer), and for the rest with the book's.

    Parts that are made of others are built from the plain answers' text, in which these names mean these parts. Returns
    the loss of each of 40 steps in nats per token; ends early where it is not finite."""
    use: dict[str, Any] = {}
    for name in TRAINABLE:
        part = PARTS[name]
        use[part.answer.__name__] = answers.get(name) or (part.build(use) if part.needs else part.book)
    on_step("encoding the Fables")
    losses: list[float] = []
    for loss, _ in train_small(use, f"\n{END_OF_TEXT}\n".join(fables(300, seed=0)), 40, weights=True)[1]:
        losses.append(loss)
        if not np.isfinite(loss):
            break
        on_step(f"training step {len(losses)}")
    return losses


def _train(send: Callable[..., None], path: str, names: list[str]) -> None:
    """Train with the parts in a file, in the child process."""
    answers = {_find(name): _load(path, name) for name in names}
    with redirect_stdout(_Printed()):
        send("losses", training_curve(answers, partial(send, "at")))
