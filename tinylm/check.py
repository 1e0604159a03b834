"""The engine of `tinylm check`: run a reader's part beside a plain answer and name the likely mistake. A plain module.

Parts, cases and mistakes stand in `tinylm.exercises`. An answer runs on each case, beside the plain answer of its part.
At the first difference, the mistakes of the part run too: those whose results are the reader's are the likely ones. What
is in a file runs in a process of its own, because it may not end, may end the process, or may print."""
import ast
import inspect
import io
import json
import linecache
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
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm import exercises
from tinylm.core import END_OF_TEXT, InputError
from tinylm.exercises import PARTS, Case, Part


class Wrong(AssertionError):
    """An answer differs from the book's; the message tells what differs first."""

    def _render_traceback_(self) -> list[str]:  # so that Jupyter shows the message and no traceback
        return str(self).splitlines()


def part_names() -> list[str]:
    """List the parts that can be checked, in the order of the chapters."""
    return list(PARTS)


def find(name: str) -> tuple[str, Part]:
    """Find a part by its name, or by the name that its answer has in the book; of NAME:OBJECT, NAME counts.

    Raises InputError."""
    name = str(name).partition(":")[0]
    names = {part.answer.__name__: key for key, part in PARTS.items()} | {key: key for key in PARTS}
    if name not in names:
        near = get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.4)
        hint = next((f"did you mean {n}? " for n in names if near and n.lower() == near[0]), "")
        raise InputError(f"unknown part {name!r}; {hint}There are: {', '.join(PARTS)}")
    return names[name], PARTS[names[name]]


# Comparing

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float64: 1e-8}  # relative, by dtype; float32 has 1e-4


def difference(expected: Any, got: Any) -> str | None:
    """Tell in half a sentence how a result differs from the expected one; None if they agree.

    Numbers agree when they differ by no more than rounding explains. Sums that cancel err in proportion to their terms,
    so the absolute tolerance goes with the largest number of the tensor."""
    if got is None:
        return None if expected is None else "is None: a `return` is missing, or the body is still to be filled in"
    if isinstance(expected, float):
        expected, got = torch.tensor(expected), got.float() if isinstance(got, Tensor) else got
    if not isinstance(expected, Tensor):
        return _item_difference(expected, got)
    if expected.dim() == 0 and isinstance(got, int | float):
        got = torch.tensor(got, dtype=expected.dtype)  # a plain number will do
    if not isinstance(got, Tensor):
        return f"is no tensor but a {type(got).__name__}"
    if got.shape != expected.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"has dtype {got.dtype}, expected {expected.dtype}"
    relative, wide = TOLERANCE.get(expected.dtype, 1e-4), expected.double()
    largest = wide[wide.isfinite()].abs().max().item() if wide.isfinite().any() else 0.0
    off = ~torch.isclose(got.double(), wide, rtol=relative, atol=relative / 10 * largest + 1e-9, equal_nan=True)
    if not off.any():
        return None
    where = tuple(off.nonzero()[0].tolist())
    a, b = expected[where].item(), got[where].item()
    digits = next((n for n in range(6, 18) if f"{a:.{n}g}" != f"{b:.{n}g}"), 6)  # enough to see the difference
    most = (wide - got.double()).abs()[off].max().item()
    more = f" ({int(off.sum())} of its {off.numel()} numbers are off, by up to {most:.3g})" if off.numel() > 1 else ""
    return f"{f'at {list(where)} ' if where else ''}is {b:.{digits}g}, expected {a:.{digits}g}{more}"


def _item_difference(expected: Any, got: Any) -> str | None:
    if not isinstance(expected, Mapping | list | tuple):
        plain = isinstance(got, int | float | str | bytes) or type(got) is type(expected)
        return None if plain and expected == got else f"is {got!r}, expected {expected!r}"
    if not isinstance(got, Mapping | list | tuple):
        return f"is a {type(got).__name__}, expected a {type(expected).__name__}"
    a, b = (dict(x if isinstance(x, Mapping) else enumerate(x)) for x in (expected, got))
    for key in [*a, *b]:
        if key not in b:
            other = [k for k in b if k not in a and isinstance(key, str) and difference(a[key], b[k]) is None]
            return (f"has {other[0]!r}, which must be called {key!r}" if other
                    else f"has no [{key!r}], expected {a[key]!r} there")
        if key not in a:
            return f"has [{key!r}] = {b[key]!r}, where nothing more was expected"
        if what := difference(a[key], b[key]):
            return f"at [{key!r}] {what}"
    return None


def compare(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """Tell the first of the results of a case that differs; None if all agree."""
    if "error" in expected or "error" in got:
        return None if expected.get("error") == got.get("error") else got.get("words", "it raises no error")
    for name, value in expected.items():
        if name not in got:
            return f"there is no {name}: the result is cut off from the graph, or does not depend on it"
        if what := difference(value, got[name]):
            return f"{name} {what}"
    return None


# Running

_LIBRARIES = (os.path.join(Path(__file__).parent, ""), "<frozen", *map(sysconfig.get_path, ("stdlib", "purelib")))
_SIGNS = {  # what an error says when a body is empty -> what to look at
    r"has no attribute '(_|param_groups)": "; does __init__ call super().__init__()?",
    "NoneType": "; a `return` is missing, or a body is still to be filled in"}


def explain(error: BaseException) -> str:
    """Say what an exception means, and on which of the reader's lines it was raised."""
    first = (str(error).splitlines() or [""])[0]
    hint = next((advice for sign, advice in _SIGNS.items() if re.search(sign, first)), "")
    what = f"it raises {type(error).__name__}: {first}{hint}"
    if isinstance(error, NotImplementedError):
        what = "it is still a stub: fill in the body"
    elif isinstance(error, SystemExit):
        what = "it ends the program (sys.exit)"
    for file, number, *_ in reversed(traceback.extract_tb(error.__traceback__)):
        if not file.startswith(_LIBRARIES):
            place = "the cell" if "ipykernel" in file or file.startswith("<") else Path(file).name
            return f"{what}\n  line {number} of {place}: {linecache.getline(file, number).strip()}"
    return what


def attempt(case: Case, answer: Any) -> dict[str, Any]:
    """Run a case. An exception is a result too; two are equal when they are of one kind."""
    try:
        return case(answer)
    except (Exception, SystemExit) as error:
        kind = "None" if "NoneType" in str(error) else type(error).__name__
        call = isinstance(error, TypeError) and "argument" in str(error)
        return {"error": "call" if call else kind, "words": explain(error)}


@cache
def results_of(name: str, case: str, mistake: str | None = None) -> dict[str, Any]:
    """Compute what the plain answer of a part, or one of its mistakes, gives in a case."""
    return attempt(PARTS[name].cases[case], PARTS[name].wrong(mistake) if mistake else PARTS[name].answer)


def complaint(name: str, answer: Any, on_case: Callable[[str], object] = lambda title: None) -> str | None:
    """Run the cases; tell the first thing that is wrong with an answer and the likely mistakes, None if all is right.

    Likely are the mistakes that give what the answer gave, in the first case that differs and in all before it; where
    several do, the later cases decide."""
    part, got = PARTS[name], {}
    if not callable(answer):
        return f"{name}: expected a function or class, got {answer!r}"
    for title, case in part.cases.items():
        on_case(f"running the case {title!r}")
        mine = got[title] = attempt(case, answer)
        what = compare(results_of(name, title), mine)
        if "error" not in mine and (changed := compare(mine, attempt(case, answer))):
            what = f"two calls with the same input differ: the second time {changed}"
        if what:
            break
    else:
        return None
    if mine.get("error") == "call":
        bare = [p.replace(annotation=p.empty) for p in inspect.signature(part.answer).parameters.values()]
        what += f"\n  the book's is called as {part.answer.__name__}{inspect.Signature(bare)}"
    likely = [words for words in part.mistakes if all(compare(results_of(name, c, words), got[c]) is None for c in got)]
    for later, case in list(part.cases.items())[len(got) :]:
        if len(likely) > 1:
            on_case(f"running the case {later!r}")
            mine = attempt(case, answer)
            likely = [words for words in likely if compare(results_of(name, later, words), mine) is None] or likely
    ends = "".join(f"\n  likely mistake: {words}" for words in likely[:2])
    return f"{name} differs in case {len(got)} of {len(part.cases)}, {title}:\n  {what}{ends}"


def check(part: str | Callable, answer: Any = None) -> None:
    """Compare an answer, a function or class called like the book's, with the book's: check("softmax", mine).

    The name may be left out where the answer has it. Raises `Wrong` with the first thing that differs."""
    if not isinstance(part, str) and not hasattr(part, "__name__"):
        raise InputError(f"which part is {part!r}? Call check(NAME, answer); there are: {', '.join(PARTS)}")
    name, row = find(part if isinstance(part, str) else part.__name__)
    if said := complaint(name, part if answer is None else answer):
        raise Wrong(said)
    print(f"{name}: agrees with the book's in all {len(row.cases)} cases")


# Stubs: the plain answers without their bodies.

def stub(*names: str) -> str:
    """Write a file to fill in: for each part its signature and task, with the imports that they need."""
    if not names:
        raise InputError(f"a stub of which part? There are: {', '.join(PARTS)}")
    offered = _imports(ast.parse(inspect.getsource(exercises)).body)
    lines: list[str] = []
    texts: list[str] = []
    for _, part in map(find, dict.fromkeys(names)):
        tree = ast.parse(part.source).body[0]
        assert isinstance(tree, ast.FunctionDef | ast.ClassDef)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        lines += [line for name, line in offered.items() if name in used] + [*_imports(ast.walk(tree)).values()]
        texts.append(_hollow(part.source.splitlines(), tree))
    head = "\n".join(sorted(set(lines), key=lambda line: ("tinylm" in line, line.startswith("from"), line)))
    return "\n\n\n".join([head] * bool(head) + texts) + "\n"


def _imports(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """List what is imported: each name, and the line that imports it alone."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                alone = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
                found[alias.asname or alias.name] = ast.unparse(alone)
    return found


def _hollow(lines: list[str], tree: ast.FunctionDef | ast.ClassDef) -> str:
    """Keep decorators, signatures and docstrings."""
    if isinstance(tree, ast.ClassDef):
        methods = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not re.match("_(?!_init__)", n.name)]
        return "\n\n".join(["\n".join(lines[: tree.body[0].end_lineno]), *(_hollow(lines, n) for n in methods)])
    begin, first = min([tree.lineno, *(node.lineno for node in tree.decorator_list)]) - 1, tree.body[0]
    end = first.end_lineno if ast.get_docstring(tree) else first.lineno - 1
    return "\n".join([*lines[begin:end], " " * first.col_offset + "raise NotImplementedError"])


# Files: each runs in a process of its own.

def load(path: str, names: Iterable[str]) -> dict[str, Any]:
    """Import a file and take the parts from it: NAME, or NAME:OBJECT where it has another name. Raises InputError."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise InputError(f"{path}: no such file; expected NAME=file.py:Object")
    name = place.stem if place.stem.isidentifier() and place.stem not in sys.modules else f"answer_{place.stem}"
    spec = spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file; its name should end in .py")
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.append(str(place.resolve().parent))  # for what it imports, in its processes too
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        why = explain(error).replace("\n  ", "; ")
        raise InputError(f"{path}: cannot be imported: {why}") from error
    found = {}
    for name in names:
        key, part = find(name)
        other = name.partition(":")[2]
        wanted = [other] if other else list(dict.fromkeys([key, part.answer.__name__]))
        there = [n for n in wanted if hasattr(module, n)]
        if not there:
            hint = "".join(f"; did you mean {near}?" for near in get_close_matches(wanted[0], vars(module), n=1))
            raise InputError(f"{path}: defines no {' or '.join(wanted)}{hint}")
        found[key] = getattr(module, there[0])
    return found


class _Printed(io.StringIO):
    """Keep the beginning of what is printed."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, 2_000 - self.tell())])
        return len(text)


def _serve(job: str, path: str, names: list[str]) -> None:
    """Do a job in the child process; each line of its standard output is an event for the parent."""
    channel, printed = os.fdopen(os.dup(1), "w", encoding="utf-8"), _Printed()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that the answer writes gets among the events
    os.dup2(1, 2)

    def send(kind: str, *what: Any) -> None:
        channel.write(json.dumps([kind, *what]) + "\n")
        channel.flush()

    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            send("at", f"importing {path}")
            answers = load(path, names)
            if job == "train":
                for title, use in {"with yours": answers, "with the book's": {}}.items():
                    send("done", title, training_curve(use, lambda step: send("at", step)))
            for name, answer in answers.items() if job == "check" else ():
                said = complaint(name, answer, lambda step: send("at", step))
                send("done", said, printed.getvalue())
                printed.seek(0)
                printed.truncate()
            send("end")
        except InputError as error:
            send("input", str(error))
        except Exception as error:
            send("failed", explain(error))


def _events(job: str, path: str, names: list[str], time_limit: float) -> Iterator[list[Any]]:
    """Run a job in a child process and give its results; ["failed", why] when it hangs or dies."""
    if not isinstance(time_limit, int | float) or not 0 < time_limit <= threading.TIMEOUT_MAX:
        raise InputError(f"time_limit is {time_limit!r}; expected a positive number of seconds")
    code = f"import sys; sys.path[:] = {sys.path!r}; from tinylm.check import _serve; _serve(*{(job, path, names)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             encoding="utf-8", start_new_session=True)
    events: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        for line in child.stdout or ():
            events.put(json.loads(line))
        events.put(["died"])

    threading.Thread(target=listen, daemon=True).start()
    step, limit = "starting", 300.0
    try:
        while (event := events.get(timeout=limit))[0] in ("at", "done", "input"):
            if event[0] == "input":
                raise InputError(event[1])
            if event[0] == "at":
                step, limit = event[1], time_limit
            else:
                yield event
        if event[0] == "end":
            with suppress(subprocess.TimeoutExpired):
                child.wait(5)  # it puts the processes that it has started in order
            return
        why = event[1] if event[0] == "failed" else f"your code ended the process while {step}"
    except queue.Empty:
        why = f"your code was stopped while {step}: it took more than {limit:g} seconds; is there an endless loop?"
    finally:
        with suppress(OSError):  # with all processes that it has started; they may have ended
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
        child.wait()
    if step.startswith("importing"):
        raise InputError(f"{path}: {why}")
    yield ["failed", why]


def check_file(path: str, names: Iterable[str], time_limit: float = 30.0) -> int:
    """Compare parts in a Python file with the book's, in a process of its own; print what is found.

    Each of the names is NAME, or NAME:OBJECT for what has another name in the file. The time limit is that of a case,
    or of the file's import, in seconds. Returns how many parts are not right. Raises InputError."""
    left = [names] if isinstance(names, str) else list(names)
    keys, failed = [find(name)[0] for name in left], 0
    while left:
        for kind, said, *printed in _events("check", path, left, time_limit):
            key = keys[-len(left)]
            said = f"{key}: {said}" if kind == "failed" else said
            print(said or f"{key}: agrees with the book's in all {len(PARTS[key].cases)} cases")
            lines = "".join(printed).splitlines()
            for line in lines[:4] + ["..."] * (len(lines) > 4):
                print(f"  it prints: {line}")
            failed, left = failed + bool(said), left[1:]
    return failed


# Training with an answer

TRAINABLE = ("train_bpe", "Tokenizer", "Linear", "Embedding", "RMSNorm", "SwiGLU", "softmax", "RoPE", "attention",
             "cross_entropy", "cosine_lr", "clip_grad_norm", "AdamW")


def training_curve(answers: Mapping[str, Any], on_step: Callable[[str], object] = lambda step: None) -> list[float]:
    """Train a small model on Fables, with these parts (name -> answer) and for the rest the book's.

    Returns the loss of each of 40 steps in nats per token; ends early where it is not finite."""
    from tinylm.data import fables
    from tinylm.model import TransformerLM, causal_mask
    from tinylm.train import PRESETS, get_batch

    config = replace(PRESETS["debug"], vocab_size=512, context_length=128)
    use = {name: PARTS[name].book for name in TRAINABLE} | dict(answers)
    on_step("encoding the Fables")
    text = f"\n{END_OF_TEXT}\n".join(fables(300, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fables.txt"
        path.write_text(text, encoding="utf-8")
        vocab, merges = use["train_bpe"](str(path), config.vocab_size, [END_OF_TEXT])
    tokens = np.array(list(use["Tokenizer"](vocab, merges, [END_OF_TEXT]).encode(text)))

    model = TransformerLM(config, seed=config.seed)
    sizes: dict[str, Callable[[Any], Iterable]] = {  # how to make another layer like this one
        "SwiGLU": lambda old: old.w1.weight.shape[::-1], "Linear": lambda old: old.weight.shape[::-1],
        "Embedding": lambda old: old.weight.shape, "RMSNorm": lambda old: (len(old.weight), old.eps)}
    for name in sizes.keys() & answers.keys():
        layers = [(where, old) for where, old in model.named_modules() if type(old) is PARTS[name].book]
        for where, old in layers:
            new = answers[name](*sizes[name](old))
            for own, p in new.named_parameters():
                p.data = old.get_parameter(own).detach().clone()
            parent, _, last = where.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    attend = use["attention"]
    if "softmax" in answers and "attention" not in answers:
        attend = lambda q, k, v, mask: use["softmax"](  # noqa: E731
            (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf), -1) @ v
    rope = use["RoPE"](config.rope_theta, config.d_model // config.num_heads, config.context_length)

    def attention(layer: Any, x: Tensor, *_: Any) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (layer.num_heads, -1)).transpose(-3, -2)
                   for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        positions = torch.arange(x.shape[-2])
        heads = attend(rope(q, positions), rope(k, positions), v, causal_mask(len(positions)))
        return layer.output_proj(heads.transpose(-3, -2).flatten(-2))

    block: Any
    for block in model.layers:
        block.attn.forward = partial(attention, block.attn)
    optimizer = use["AdamW"](model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8,
                             weight_decay=config.weight_decay)
    losses: list[float] = []
    for step in range(1, 41):
        on_step(f"taking training step {step}")
        rng = np.random.default_rng([config.seed, step])
        x, y = get_batch(tokens, config.batch_size, config.context_length, rng=rng)
        for group in optimizer.param_groups:
            group["lr"] = use["cosine_lr"](step, config.lr, config.lr / 10, config.warmup_iters, 40)
        optimizer.zero_grad()
        loss = use["cross_entropy"](model(x), y)
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        use["clip_grad_norm"](model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_with(path: str, names: Iterable[str], time_limit: float = 30.0) -> int:
    """Train a small model with parts in a Python file, and once more with the book's; print some losses of both.

    Names as in `check_file`, but only those of `TRAINABLE`; the time limit is that of a step. Returns 1 if the code in
    the file failed, else 0. Raises InputError."""
    names = [names] if isinstance(names, str) else list(names)
    if other := [key for key, _ in map(find, names) if key not in TRAINABLE]:
        raise InputError(f"{other[0]} has no place in training; there are: {', '.join(TRAINABLE)}")
    steps = (1, 10, 20, 30, 40)
    print("loss at step   " + "".join(f"{step:9}" for step in steps))
    for kind, title, *losses in _events("train", path, names, time_limit):
        if kind == "failed":
            print(title)
            return 1
        print(f"{title:15}" + "".join(f"{x:9.4f}" for x in losses[0][:1] + losses[0][9::10]))
    return 0
