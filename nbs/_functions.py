"""Write functions.md, the index of functions: a line for each public name of a chapter, before Quarto renders."""
import ast
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent
HEAD = """# Index of functions

Each public name of the package, in alphabetical order, with the chapter that builds it. `tinylm VERB --help` describes
the commands; the modules that are no chapter (`core`, `kernels`, `check`, `cli` and others) say so in their first line.

| name | what it does | import from |
|-----|-----------|-----|
"""


def exports(path: Path) -> list[str]:
    "The modules that a notebook exports to."
    return list(dict.fromkeys(re.findall(r'"#\| *(?:default_exp|export_to) +(\w+)', path.read_text(encoding="utf-8"))))


def rows(path: Path) -> list[str]:
    "A row for each public function and class that a notebook exports."
    found = []
    for module in exports(path):
        tree = ast.parse((NBS.parent / f"tinylm/{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                does = (ast.get_docstring(node) or "").partition("\n")[0].replace("|", "&#124;").replace("<", "&lt;")
                found.append(f"| [`{node.name}`]({path.name}#def-{node.name.lower()}) | {does} | `tinylm.{module}` |")
    return found


def write() -> None:
    table = sorted((row for path in NBS.glob("*.ipynb") for row in rows(path)), key=str.lower)
    (NBS / "functions.md").write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
