"""Write the chapters without their answers into student/: a stub where a cell is marked `#| solution`, all else kept.

`--nbgrader` writes into source/tinylm-NAME/ what `nbgrader generate_assignment tinylm-NAME` wants: the answers between
its markers, and each `check(...)` in a locked cell that gives the points.
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDED = re.compile(r"(?s)<details><summary>(?:An answer|The answer to [^<]*)</summary>.*?</details>\n*")
REGION = re.compile(r"(?ms)^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$")


def marked(source: str) -> tuple[str, str]:
    "An answer between nbgrader's markers, and the checks that it has to pass, if there are any."
    source = re.sub(r"(?m)^#\|.*\n", "", source)
    lines, body = source.splitlines(), ast.parse(source).body
    checks = [text for node in body if (text := ast.unparse(node)).startswith("check(")]
    parts = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if not checks or not parts:
        aims = [f"#     {line}" for node in body if isinstance(node, ast.Assert) or ast.unparse(node) in checks
                for line in lines[node.lineno - 1 : node.end_lineno]]
        aims = ["# Your answer. It is right when this holds:", *aims] if aims else ["# Your answer."]
        return "\n".join([*aims, "### BEGIN SOLUTION", source, "### END SOLUTION"]), ""
    told = []
    for part in parts:
        begin = min([part.lineno, *(node.lineno for node in part.decorator_list)]) - 1
        for function in part.body if isinstance(part, ast.ClassDef) else [part]:
            if isinstance(function, ast.FunctionDef):
                first = function.body[bool(ast.get_docstring(function)) and len(function.body) > 1].lineno - 1
                indent, end = " " * function.body[0].col_offset, function.end_lineno or 0
                told += [*lines[begin:first], f"{indent}### BEGIN SOLUTION", *lines[first:end]]
                told += [f"{indent}### END SOLUTION"]
                begin = end
        told += [*lines[begin : part.end_lineno], "", ""]
    return "\n".join(told).strip("\n"), "\n".join(checks)


def stub(source: str) -> str:
    "What a student gets for an answer's cell; run as it is, it says that it is still a stub."
    answer, checks = marked(source)
    answer = REGION.sub(r'\1raise NotImplementedError("still a stub")', answer)
    return "\n\n\n".join(filter(None, [answer, checks]))


def cell(name: str, source: str, **nbgrader: object) -> dict:
    "A code cell; a stub's error does not keep Jupyter from running the cells after it."
    metadata: dict = {"tags": ["raises-exception"]}
    if nbgrader:
        metadata = {"nbgrader": {"schema_version": 3, "cell_type": "code", "grade_id": name, "task": False} | nbgrader}
    return {"cell_type": "code", "id": name, "metadata": metadata, "execution_count": None, "outputs": [],
            "source": source.splitlines(keepends=True)}


def student(notebook: dict, nbgrader: bool = False) -> dict:
    "A chapter as students get it, or as nbgrader gets it from a teacher."
    cells = []
    for given in notebook["cells"]:
        source, name = "".join(given["source"]), given["id"]
        if given["cell_type"] == "code" and re.search(r"(?m)^#\| *solution", source):
            answer, checks = marked(source)
            if not nbgrader:
                cells.append(cell(name, stub(source)))
                continue
            cells.append(cell(name, answer, solution=True, grade=not checks, locked=False))
            if checks:
                cells.append(cell(f"{name}-check", checks, solution=False, grade=True, locked=True))
            cells[-1]["metadata"]["nbgrader"]["points"] = 1
        else:
            source = FOLDED.sub("", source)
            source = re.sub(r"(?m)^#(\| ?(export\w*|default_exp|hide)\b.*| NBVAL.*)\n?", "", source)
            if not nbgrader:  # which gets a copy of the pictures
                source = re.sub(r'(\]\(|src=")images/', r"\1../nbs/images/", source)
            if source.strip():
                cells.append(given | {"source": source.splitlines(keepends=True)})
    return notebook | {"cells": cells}


def write(nbgrader: bool) -> list[Path]:
    "Write all chapters that have exercises; returns their paths."
    written = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if "#| solution" in text:
            folder = ROOT / (f"source/tinylm-{path.stem}" if nbgrader else "student")
            folder.mkdir(parents=True, exist_ok=True)
            made = student(json.loads(text), nbgrader)
            written.append(folder / path.name)
            written[-1].write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            if nbgrader:
                shutil.copytree(ROOT / "nbs/images", folder / "images", dirs_exist_ok=True)
    return written


if __name__ == "__main__":
    print(*write("--nbgrader" in sys.argv), sep="\n")
