"""Check that the chapters keep the pace of a lesson; run as a command, print a table with a line for each chapter.

It counts what a reader feels: silence, length, width. A limit that makes a page worse is the limit to change.
"""
import ast
import json
import re
import sys
from pathlib import Path

INTRODUCTION_WORDS = 25  # two sentences: what we build, what it needs, what you will know
EXPORTED_RUN = 60  # lines of code of the package in a row with nothing shown
SILENCE = 15  # cells in a row without an output or a picture
WIDTH = 88  # columns of code that a page shows without cutting them off
NOTEBOOK_KB = 360  # loads at once on a phone, with a widget's script and data; a review of it stays readable
OUTPUT_LINES = 40  # a screenful; more is a dump
PICTURE = re.compile(r"!\[|<svg|<img|```\{mermaid")


def code_lines(source: str) -> int:
    "Lines of code: no blank line, comment, docstring or directive."
    tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE))
    documented = (ast.FunctionDef, ast.ClassDef, ast.Module)
    texts = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    skip = {n for node in texts for n in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(n not in skip and bool(line.strip()) and not line.strip().startswith("#") for n, line in lines)


def undocumented(source: str) -> list[str]:
    "Public functions, classes and methods without a docstring."
    found = []
    for node in ast.parse(source).body:
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        named = [node, *methods] if is_public else []
        found += [n.name for n in named if not n.name.startswith("_") and not ast.get_docstring(n)]
    return found


def lesson_faults(name: str, lessons: list[tuple[ast.Module, bool]]) -> list[str]:
    "Whether cells that are not exported show and assert something that comes of a public name."
    known, shown, asserted = {name}, False, False
    for tree, has_output in lessons:
        for node in tree.body:
            loaded = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            loaded |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            if loaded & known:  # what is made of it carries it on
                known |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                known |= {node.name} if isinstance(node, ast.FunctionDef) else set()
                asserted |= bool(re.search(r"\bassert|\braises\b|\bcheck\(", ast.unparse(node)))
                shown |= has_output
    return [f"{name} is never {what}" for what, seen in [("shown", shown), ("asserted", asserted)] if not seen]


def check(path: Path) -> tuple[dict[str, float], list[str]]:
    "The figures of a chapter, and what breaks its pace."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    faults, lessons, public = [], [], []
    run = longest = silence = quiet = width = pictures = 0
    title, _, introduction = "".join(cells[0]["source"]).partition("\n> ")
    if not title.startswith("# ") or len(introduction.partition("\n\n")[2].split()) < INTRODUCTION_WORDS:
        faults.append("opens without title, promise (>) and introduction in its first cell")
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    if "## What we learned" not in text:
        faults.append("does not close with `## What we learned`")
    for number, cell in enumerate(cells):
        source, where = "".join(cell["source"]), f"cell {number}"
        if cell["cell_type"] != "code":
            silence = 0 if PICTURE.search(source) else silence + 1
            quiet = max(quiet, silence)
            continue
        wide = [len(line) for line in source.splitlines() if not line.startswith("#|")]
        width = max([width, *wide])
        outputs = cell["outputs"]
        tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE))
        run, silence = (0, 0) if outputs else (run, silence + 1)
        if re.search(r"^#\| *export(s|_to \w+)?$", source, re.MULTILINE):
            only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
            run += 0 if only_imports else code_lines(source)
            faults += [f"{where}: {name} has no docstring" for name in undocumented(source)]
            public += [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
        else:
            lessons.append((tree, bool(outputs)))
        longest, quiet = max(longest, run), max(quiet, silence)
        for output in outputs:
            data = output.get("data", {})
            said = "".join(output.get("text", data.get("text/plain", "")))
            drawn = "image/png" in data or "image/svg+xml" in data
            pictures += drawn
            for wrong, what in [(said.count("\n") > OUTPUT_LINES, f"an output of {said.count(chr(10))} lines"),
                                ("\r" in said or re.search(r"\d(it/s|s/it)\b", said), "a progress bar in the output"),
                                (output["output_type"] == "error", "an error in the output"),
                                (drawn and "#| fig-alt:" not in source, "a picture without `#| fig-alt:`")]:
                if wrong:
                    faults.append(f"{where}: {what}")
    for name in public:
        faults += lesson_faults(name, lessons)
    pace = {"cells": len(cells), "exported run": longest, "silence": quiet, "width": width, "pictures": pictures,
            "kB": path.stat().st_size / 1000}
    limits = {"exported run": EXPORTED_RUN, "silence": SILENCE, "width": WIDTH, "kB": NOTEBOOK_KB}
    faults += [f"{name} {pace[name]:.0f}, not {most}" for name, most in limits.items() if pace[name] > most]
    return pace, faults


def main() -> int:
    reports = {path.stem: check(path) for path in map(Path, sys.argv[1:] or sorted(Path("nbs").glob("*.ipynb")))}
    for i, (stem, (pace, _)) in enumerate(reports.items()):
        if i == 0:
            print(f"{'chapter':15}" + "".join(f"{key:>14}" for key in pace))
        print(f"{stem:15}" + "".join(f"{value:14.4g}" for value in pace.values()))
    for stem, (_, faults) in reports.items():
        for fault in faults:
            print(f"{stem}: {fault}")
    return int(any(faults for _, faults in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
