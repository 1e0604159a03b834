"""The engine of `tinylm check`: run a reader's part beside a plain answer and name the likely mistake. A plain module.

Parts, cases and mistakes stand in `tinylm.exercises`. An answer runs on each case, beside the plain answer of its part.
At the first difference, the mistakes of the part run too: those whose results are the reader's are the likely ones. What
is in a file runs in a process of its own, because it may not end, may end the process, or may print."""
import ast
import inspect
import io
import json
import math
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
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tinylm import exercises
from tinylm.core import END_OF_TEXT, InputError
from tinylm.exercises import PARTS, Case


class Wrong(AssertionError):
    """An answer differs from the book's; the message tells what differs first."""

    def _render_traceback_(self) -> list[str]:  # so that Jupyter shows the message and no traceback
        return str(self).splitlines()


def part_names() -> list[str]:
    """List the parts that can be checked, in the order of the chapters."""
    return list(PARTS)


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


def _judge(name: str, answer: Any, on_case: Callable[[str], object] = lambda place: None) -> tuple[bool, str]:
    """Run the cases; say whether an answer is right, and if not what is wrong first, and which mistakes are likely.

    Likely are the mistakes that give what the answer gave, in the first case that differs and in all before it; where
    several do, the later cases decide."""
    part, got = PARTS[name], {}
    for title, case in part.cases.items():
        on_case(f"{name}, case {title!r}")
        mine = got[title] = attempt(case, answer)
        what = difference(attempt(case, part.answer), mine)
        if "error" not in mine and (changed := difference(mine, attempt(case, answer))):
            what = f"two calls with the same input differ: the second time {changed}"
        if what:
            break
    else:
        return True, f"{name}: agrees with the book's in all {len(got)} cases"
    if mine.get("error") == "argument":
        what += f"\n  the book's is called as {part.answer.__name__}{inspect.signature(part.answer)}"
    wrong = {words: part.wrong(words) for words in part.mistakes}
    likely = [w for w in wrong if all(difference(attempt(part.cases[c], wrong[w]), got[c]) is None for c in got)]
    for later, case in list(part.cases.items())[len(got) :]:
        if len(likely) > 1:
            on_case(f"{name}, case {later!r}")
            mine = attempt(case, answer)
            likely = [w for w in likely if difference(attempt(case, wrong[w]), mine) is None] or likely
    ends = "".join(f"\n  likely mistake: {words}" for words in likely[:2])
    return False, f"{name} differs in case {len(got)} of {len(part.cases)}, {title}:\n  {what}{ends}"


def check(part: str | Callable, answer: Any = None) -> None:
    """Compare an answer, a function or class called like the book's, with the book's: check("softmax", mine).

    The name may be left out where the answer has it. Raises `Wrong` with the first thing that differs."""
    right, text = _judge(_find(getattr(part, "__name__", part)), part if answer is None else answer)
    if not right:
        raise Wrong(text)
    print(text)


# Stubs: the plain answers without their bodies.

def stub(*names: str) -> str:
    """Write a file to fill in: for each part its signature and task, with the imports that they need."""
    sources = [PARTS[_find(name)].source for name in names]
    nodes = list(ast.walk(ast.parse("\n".join(sources))))
    used, lines = {node.id for node in nodes if isinstance(node, ast.Name)}, set()
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
    return "\n".join([*lines[begin:end], " " * first.col_offset + "raise NotImplementedError"])


# Files: each runs in a process of its own.

def _load(path: str, names: Iterable[str]) -> dict[str, Any]:
    """Import a file and take the parts from it: NAME, or NAME:OBJECT where it has another name. Raises InputError."""
    name = Path(path).stem if Path(path).stem not in sys.modules else f"answer_{Path(path).stem}"
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = path
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports, in its processes too
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        why = _explain(error).replace("\n  ", "; ")
        raise InputError(f"{path}: cannot be imported: {why}") from error
    found = {}
    for name in names:
        key = _find(name)
        wanted = name.split(":")[1:] or [key, PARTS[key].answer.__name__]
        there = [vars(module)[n] for n in wanted if n in vars(module)]
        if not there:
            raise InputError(f"{path}: defines no {' or '.join(dict.fromkeys(wanted))}")
        found[key] = there[0]
    return found


class _Printed(io.StringIO):
    """Keep the beginning of what is printed."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, 2_000 - self.tell())])
        return len(text)


def _serve(job: str, path: str, names: list[str]) -> None:
    """Do a job in the child process; each line of its standard output is an event for the parent."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that the answer writes gets among the events

    def send(*event: Any) -> None:
        print(json.dumps(event), file=channel, flush=True)

    try:
        send("at", path)
        answers = _load(path, names)
        if job == "train":
            send("done", True, training_curve(answers, partial(send, "at")))
        for name, answer in answers.items() if job == "check" else ():
            with redirect_stdout(_Printed()) as printed:
                judged = _judge(name, answer, partial(send, "at"))
            send("done", *judged, *printed.getvalue().splitlines()[:4])
    except InputError as error:
        send("input", str(error))
    except Exception as error:
        send("done", False, _explain(error))
    send("at", "")


def _events(job: str, path: str, names: list[str], time_limit: float) -> Iterator[list[Any]]:
    """Run a job in a child process and give its results, each after whether it is right: [False, why] for a hang."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from tinylm.check import _serve; _serve(*{(job, path, names)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True)
    events: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        for line in child.stdout or ():
            events.put(json.loads(line))
        events.put(None)

    threading.Thread(target=listen, daemon=True).start()
    place, limit = "the start", 300.0
    try:
        while event := events.get(timeout=limit):
            if event[0] == "input":
                raise InputError(event[1])
            if event[0] == "at":
                place, limit = event[1], time_limit
            else:
                yield event[1:]
        why = f"{place}: your code ended the process"
    except queue.Empty:
        why = f"{place}: your code was stopped after {limit:g} seconds; is there an endless loop?"
    finally:
        with suppress(OSError):  # with all processes that it has started; they may have ended
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
        child.wait()
    if place == path:
        raise InputError(why)
    if place:  # "" when all was done and the process, or one that it has started, has not ended well
        yield [False, why]


def check_file(path: str, names: Iterable[str], time_limit: float = 30.0) -> int:
    """Compare parts in a Python file with the book's, in a process of its own; print what is found.

    Each of the names is NAME, or NAME:OBJECT for what has another name in the file. The time limit is that of a case,
    or of the file's import, in seconds. Returns how many parts are not right. Raises InputError."""
    left, failed = list(names), 0
    while left:
        for right, text, *printed in _events("check", path, left, time_limit):
            print("\n  it prints: ".join([text, *printed]))
            failed, left = failed + (not right), left[1:]
    return failed


# Training with an answer

TRAINABLE = ("train_bpe", "Tokenizer", "Linear", "Embedding", "RMSNorm", "SwiGLU", "softmax", "RoPE", "attention",
             "cross_entropy", "cosine_lr", "clip_grad_norm", "AdamW")


def training_curve(answers: Mapping[str, Any], on_step: Callable[[str], object] = lambda step: None) -> list[float]:
    """Train a small model on Fables, with these parts (name -> answer) and for the rest the book's.

    Returns the loss of each of 40 steps in nats per token; ends early where it is not finite."""
    from tinylm import data, model, train

    config = replace(train.PRESETS["debug"], vocab_size=512, context_length=128)
    use = {name: PARTS[name].book for name in TRAINABLE} | dict(answers)
    on_step("encoding the Fables")
    text = f"\n{END_OF_TEXT}\n".join(data.fables(300, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fables.txt"
        path.write_text(text, encoding="utf-8")
        vocab, merges = use["train_bpe"](str(path), config.vocab_size, [END_OF_TEXT])
    tokens = np.array(use["Tokenizer"](vocab, merges, [END_OF_TEXT]).encode(text))
    positions, losses = torch.arange(config.context_length), []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return use["attention"](q, k, v, model.causal_mask(q.shape[-2]))

    def clip(params: Iterable[Tensor], limit: float) -> Tensor:
        return torch.as_tensor(use["clip_grad_norm"](params, limit))

    with (patch.multiple(model, softmax=use["softmax"], _causal_attention=attend, RotaryPositionalEmbedding=use["RoPE"]),
          patch.multiple(train, cross_entropy=use["cross_entropy"], cosine_lr=use["cosine_lr"], clip_grad_norm=clip),
          suppress(train.Diverged)):
        lm = model.TransformerLM(config, seed=config.seed)
        for name in {"SwiGLU", "Linear", "Embedding", "RMSNorm"} & answers.keys():
            for where, old in list(lm.named_modules()):
                if type(old) is PARTS[name].book:
                    shape = next(old.parameters()).shape
                    new = answers[name](*(shape if name == "Embedding" else shape[::-1]))
                    new.load_state_dict(old.state_dict(), strict=False)
                    lm.set_submodule(where, new)
        lm.register_forward_pre_hook(lambda _, inputs: (*inputs, positions))  # RoPE is to be told them
        optimizer = use["AdamW"](lm.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8,
                                 weight_decay=config.weight_decay)
        for step in range(1, 41):
            on_step(f"training step {step}")
            rng = np.random.default_rng([config.seed, step])
            batch = data.get_batch(tokens, config.batch_size, config.context_length, rng=rng)
            losses.append(train.train_step(lm, optimizer, batch, config, step)[0])
    return losses


def train_with(path: str, names: Iterable[str], time_limit: float = 30.0) -> int:
    """Train a small model with parts in a Python file, and once more with the book's; print some losses of both.

    Names as in `check_file`, but only those of `TRAINABLE`; the time limit is that of a step. Returns 1 if the code in
    the file failed, else 0. Raises InputError."""
    if other := [key for key in map(_find, names) if key not in TRAINABLE]:
        raise InputError(f"{other[0]} has no place in training; there are: {', '.join(TRAINABLE)}")
    ((right, losses),) = _events("train", path, list(names), time_limit)
    if not right:
        print(losses)
        return 1
    print("loss at step   " + "".join(f"{step:9}" for step in (1, 10, 20, 30, 40)))
    for title, curve in {"with yours": losses, "with the book's": training_curve({})}.items():
        print(f"{title:15}" + "".join(f"{x:9.4f}" for x in curve[:1] + curve[9::10]))
    return 0
