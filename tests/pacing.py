"""Check that the chapters keep the pace of a lesson; run as a command, print a table with a line for each chapter.

A limit that makes a page worse is the limit to change: they all stand here, with their reasons.
"""
import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

INTRODUCTION_WORDS = 25  # two sentences: what we build, what it needs, what you will know
MEDIAN_LINES = 6  # most cells hold one thought; the compiled kernels need a line more
LESSON_LINES = 15  # a longer one does several things at once, or wants a function
FUNCTION_LINES = 30  # a function of this size wants to be two
CLASS_LINES = 50  # a class is shown whole, so its cell may be long
TABLE_ROWS = 4  # from here on a dictionary with names is data to look up, not steps to follow
WORDS_PER_LINE = 3  # under it, code is shown and not taught
NOTEBOOK_KB = 400  # loads at once on a phone, and a review of it stays readable
PICTURE_KB = 60  # enough for a sharp plot of the book's width
OUTPUT_LINES = 40  # a screenful; more is a dump
EXERCISES = (2, 4)  # enough to practise, few enough to be done
CALLS_BESIDE_IMPORTS = {"plt.style.use", "torch.manual_seed", "torch.set_num_threads"}  # settings of what was imported


def is_table(node: ast.AST) -> bool:
    "Whether a dictionary is read like a table: four rows or more, each under a name."
    names = [isinstance(key, ast.Constant) and isinstance(key.value, str) for key in getattr(node, "keys", [])]
    return isinstance(node, ast.Dict) and len(names) >= TABLE_ROWS and all(names)


def code_lines(source: str) -> int:
    """Lines to think about: no blank line, comment, docstring or directive; a signature, a long text or a table whose
    rows have names counts as one."""
    tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE))
    skip = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            skip |= set(range(node.lineno + 1, node.body[0].lineno))
            if ast.get_docstring(node):
                skip.add(node.body[0].lineno)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) or is_table(node):
            skip |= set(range(node.lineno + 1, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(n not in skip and bool(line.strip()) and not line.strip().startswith("#") for n, line in lines)


def words(source: str) -> int:
    "Words of prose: no code block, formula, table or address."
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"^\|.*$", r"\]\([^)]*\)", r"<[^>]*>"):
        source = re.sub(pattern, " ", source, flags=re.DOTALL | re.MULTILINE)
    return len(re.findall(r"\w[\w'-]*", source))


def mixes_imports(tree: ast.Module) -> bool:
    "Whether imports share the cell with something else than the settings of what they import."
    imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body]
    settings = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func) in CALLS_BESIDE_IMPORTS for node in tree.body]
    return any(imports) and not all(i or s for i, s in zip(imports, settings, strict=True))


def unexplained(node: ast.stmt, source: str, prose: str) -> list[str]:
    "What an exported statement defines for others without a word: a docstring, or for a constant a comment or prose."
    def public(name: str) -> bool:
        return not name.startswith("_")

    if isinstance(node, ast.FunctionDef | ast.ClassDef) and public(node.name):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and public(n.name)]
        named = [(node.name, node), *((f"{node.name}.{n.name}", n) for n in methods * isinstance(node, ast.ClassDef))]
        return [f"{name} has no docstring" for name, n in named if not ast.get_docstring(n)]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        comments = "#" in "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno]).replace("# fmt:", "")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for n in targets if isinstance(n, ast.Name) and public(n.id)]
        return [f"{name} is explained by no comment and no prose" for name in names
                if not comments and f"`{name}`" not in prose]
    return []


def wants_output(source: str, tree: ast.Module) -> bool:
    "Whether a cell draws, prints or ends with a value; calls that may give nothing are not told from others."
    run = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = {ast.unparse(n.func) for node in run for n in ast.walk(node) if isinstance(n, ast.Call)}
    last = tree.body[-1] if tree.body and not source.rstrip().endswith(";") else None
    value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call | ast.Constant)
    return value or source.startswith("#| fig-alt") or bool(calls & {"print", "display", "Markdown"})


def lesson_faults(name: str, later: list[tuple[ast.Module, bool]]) -> list[str]:
    "Whether the cells after a public name's definition show and assert something that comes of it."
    known, shown, asserted = {name}, False, False
    for tree, has_output in later:
        for node in tree.body:
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            loaded = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            if loaded & known:  # what is made of it carries it on
                known |= stored | ({node.name} if isinstance(node, ast.FunctionDef) else set())
                asserted |= bool(re.search(r"\bassert|\braises\b", ast.unparse(node)))
                shown |= has_output
            elif isinstance(node, ast.Assign):
                known -= stored - {name}  # made anew, of other things
    return [f"{name} is never {what} after its definition" for what, seen in
            [("shown", shown), ("asserted", asserted)] if not seen]


def output_faults(cell: dict, where: str) -> list[str]:
    "Outputs too heavy to read, progress bars, errors, pictures that a blind reader misses."
    faults = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/plain", "")))
        if text.count("\n") > OUTPUT_LINES:
            faults.append(f"{where}: an output of {text.count(chr(10))} lines")
        if "\r" in text or re.search(r"\d(it/s|s/it)\b", text):
            faults.append(f"{where}: a progress bar in the output")
        if output["output_type"] == "error":
            faults.append(f"{where}: an error in the output")
        if picture := "".join(data.get("image/png", "")) or "".join(data.get("image/svg+xml", "")):
            if len(picture) * 3 / 4 > PICTURE_KB * 1000:  # base64
                faults.append(f"{where}: a picture of {len(picture) * 3 // 4000} kB, not {PICTURE_KB}")
            if not re.match(r"#\| *fig-alt: *\S", "".join(cell["source"])):
                faults.append(f"{where}: a picture without `#| fig-alt:` on the first line")
    return faults


def check(path: Path) -> tuple[dict[str, float], list[str]]:
    "The figures of a chapter, and what breaks its pace."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    faults, prose, sizes, pictures, defined, lessons = [], 0, [], 0, [], []

    title, _, introduction = "".join(cells[0]["source"]).partition("\n> ")
    introduction = introduction.partition("\n\n")[2]
    if not title.startswith("# ") or words(introduction) < INTRODUCTION_WORDS:
        faults.append("opens without title, promise (>) and introduction in its first cell")
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    if re.findall(r"^## (.*)", text, re.MULTILINE)[-2:] != ["What we learned", "Exercises"]:
        faults.append("does not close with `## What we learned` and `## Exercises`")
    exercises = len(re.findall(r"^(?:\d+\.|\*\*\d+\.|- \*\*|### )", text.partition("\n## Exercises")[2], re.MULTILINE))
    if not EXERCISES[0] <= exercises <= EXERCISES[1]:
        faults.append(f"{exercises} exercises, not {EXERCISES[0]} to {EXERCISES[1]}")

    for number, cell in enumerate(cells):
        source, where = "".join(cell["source"]), f"cell {number}"
        if cell["cell_type"] != "code":
            prose += words(source)
            continue
        try:
            tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE))
        except SyntaxError as error:
            faults.append(f"{where}: {error}")
            continue
        exported = bool(re.search(r"^#\| *exports?$", source, re.MULTILINE))
        lines = code_lines(source)
        only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
        if not only_imports:
            sizes.append(lines)
        has_class = any(isinstance(node, ast.ClassDef) for node in tree.body)
        limit = LESSON_LINES if not exported else CLASS_LINES if has_class else FUNCTION_LINES
        if lines > limit and not only_imports:
            faults.append(f"{where}: {lines} lines of code, not {limit}: {source.splitlines()[min(1, lines)][:50]}")
        if mixes_imports(tree):
            faults.append(f"{where}: imports mixed with other code")
        for node in tree.body if exported else []:
            faults += [f"{where}: {fault}" for fault in unexplained(node, source, text)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                defined.append((node.name, len(lessons)))
        if not exported:
            lessons.append((tree, bool(cell["outputs"])))
            if wants_output(source, tree) and not cell["outputs"]:
                faults.append(f"{where}: shows something, and no output is stored: {source.splitlines()[-1][:50]}")
        faults += output_faults(cell, where)
        pictures += sum("image/png" in o.get("data", {}) for o in cell["outputs"])
    for name, after in defined:
        faults += lesson_faults(name, lessons[after:])

    pace = {"cells": len(cells), "median": median(sizes), "longest": max(sizes), "words per line": prose / sum(sizes),
            "pictures": pictures, "exercises": exercises, "kB": path.stat().st_size / 1000}
    if pace["median"] > MEDIAN_LINES:
        faults.append(f"half of the cells have more than {pace['median']:.0f} lines, not {MEDIAN_LINES}")
    if pace["words per line"] < WORDS_PER_LINE:
        faults.append(f"{pace['words per line']:.1f} words for a line of code, not {WORDS_PER_LINE}")
    if pace["kB"] > NOTEBOOK_KB:
        faults.append(f"{pace['kB']:.0f} kB, not {NOTEBOOK_KB}")
    return pace, faults


def main() -> int:
    reports = {path.stem: check(path) for path in map(Path, sys.argv[1:] or sorted(Path("nbs").glob("*.ipynb")))}
    for i, (stem, (pace, _)) in enumerate(reports.items()):
        if i == 0:
            print(f"{'chapter':15}" + "".join(f"{key:>16}" for key in pace))
        print(f"{stem:15}" + "".join(f"{value:16.4g}" for value in pace.values()))
    for stem, (_, faults) in reports.items():
        for fault in faults:
            print(f"{stem}: {fault}")
    return int(any(faults for _, faults in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
