"""What Quarto shows of a chapter: the notebook's JSON on standard input, the page's JSON on standard output.

nbdev hides its directives and tells where documentation belongs. Around it, this script writes the documentation of
each public name from the package itself, folds exported code instead of leaving it out, keeps the introduction (nbdev
drops what shares a cell with the title), adds the line that opens the chapter in Colab, takes out nbval's marks, points
links between chapters at their notebooks, as Quarto wants, and hands every source over as a list of lines that keep
their newlines: Quarto glues the lines of a source that is one string together.
"""
import ast
import html
import importlib
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

from execnb.nbio import dict2nb, mk_cell
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.processors import FilterDefaults

COLAB = ("[Open in Colab](https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/{name}); there, run "
         "`!git clone --depth 1 {git_url} && pip install ./{repo}` and `%cd {repo}/nbs` first, which brings the "
         "exercises and the records of long runs too.")


class Processors(FilterDefaults):
    def base_procs(self) -> list:
        "What nbdev does, but for running the notebook's code."
        return [proc for proc in super().base_procs() if proc.__name__ not in ("exec_show_docs", "add_fold")]


def modules(notebook: dict) -> list[ModuleType]:
    "The modules that a notebook exports to: its own (`#| default_exp`), then others (`#| export NAME`); maybe none."
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = re.findall(r"^#\|\s*default_exp +(\w+)", code, re.MULTILINE)
    names += re.findall(r"^#\|\s*export(?:s|_to)? +(\w+)", code, re.MULTILINE)
    return [importlib.import_module(f"{get_config().lib_name}.{name}") for name in dict.fromkeys(names)]


def fold(source: str) -> str:
    "Show exported code: open if it says `#| exports`, closed if it says `#| export`, where nbdev would drop it."
    source = re.sub(r"^#\|\s*export_to +\w+\n", "#| exports\n", source)  # see _export.py
    found = re.match(r"#\|\s*export([is]?)\b(.*)\n", source)
    if not found:
        return source
    rest = source[found.end():]
    nodes = ast.parse(rest).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = names or [ast.unparse(node).split(" =")[0].split(":")[0] for node in nodes
                      if isinstance(node, ast.Assign | ast.AnnAssign)]
    what = f"Source of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "Imports"
    shown = "show" if found[1] == "s" else "true"
    return f'#| exports{found[2]}\n#| code-fold: {shown}\n#| code-summary: "{what}"\n{rest}'


def documentation(module: ModuleType, name: str) -> str:
    "A link to the source of a public name, the call in short, its docstring, its parameters."
    sym, lookup = getattr(module, name), NbdevLookup()
    source = f'[source]({lookup.code(name)}){{style="float:right; font-size:smaller"}}'
    call = f"```python\n{short_call(name, sym)}\n```"
    text = lookup.linkify(literal(inspect.cleandoc(sym.__doc__ or "")))
    return "\n\n".join(["---", source, f"### {name}", call, text, parameter_table(sym)])


def short_call(name: str, sym: object) -> str:
    "How to call it, with the defaults; the types are in the table."
    try:
        parameters = inspect.signature(sym).parameters.values()
    except ValueError:
        parameters = []
    call = inspect.Signature([p.replace(annotation=p.empty) for p in parameters if p.kind is not p.VAR_KEYWORD])
    return textwrap.fill(f"{name}{call}", 88, subsequent_indent="    ", break_long_words=False)


def parameter_table(sym: object) -> str:
    "What each parameter means, read from the comments beside it."
    rows = []
    for name, d in docments(sym, full=True).items():
        if d.docment:
            kind = d.anno.__name__ if type(d.anno) is type else inspect.formatannotation(d.anno).strip("'")
            kind = "" if d.anno is inspect.Parameter.empty else "`" + re.sub(r"\b(?:\w+\.)+", "", kind) + "`"
            name = "**returns**" if name == "return" else f"`{name}`"
            cells = [name, kind, literal(" ".join(d.docment.split()))]
            rows.append("| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |")
    return "\n".join(["| | Type | Meaning |", "|---|---|---------|", *rows]) if rows else ""


def literal(text: str) -> str:
    "Keep from comments and docstrings what Quarto would change: --flag is no dash, <name> is no HTML."
    def code(found: re.Match) -> str:
        return found[1] or {"<": "&lt;"}.get(found[0], f"`{found[0]}`")

    return re.sub(r"(`[^`]*`)|(?<![\w-])--[a-z][\w-]*|<", code, text)


def plain_bars(text: str) -> str:
    r"Spell `a \| b` in a row of a table so that no backslash is shown: Quarto keeps the backslash in code."
    def code(found: re.Match) -> str:
        inside = html.escape(found[1].replace(r"\|", "|"), quote=False)
        return "<code>" + re.sub(r"[]|[*_~^$!`-]", lambda special: f"&#{ord(special[0])};", inside) + "</code>"

    rows = (re.sub(r"`([^`]*\\\|[^`]*)`", code, row) if row.startswith("|") else row for row in text.split("\n"))
    return "\n".join(rows)


def split_title(source: str) -> tuple[str, str]:
    "Part the first cell into its title with the promise (on one line each) and its introduction."
    found = re.match(r"\s*(# .*)\n+((?:>.*\n?)*)", source)
    if not found:
        return source, ""
    title, promise = found.groups()
    promise = " ".join(line.lstrip("> ") for line in promise.splitlines())
    return f"{title}\n\n> {promise}" if promise else title, source[found.end():].strip()


def link_chapters(text: str, site: str, chapters: dict[str, str]) -> str:
    "Point nbdev's links to this site at the notebooks; a method is documented with its class, a helper nowhere."
    def link(found: re.Match) -> str:
        label, page, anchor = found.groups()
        if page not in chapters or anchor.startswith("_"):
            return label
        return f"[{label}]({chapters[page]}#{anchor.split('.')[0]})"

    return re.sub(rf"\[(`[^`]+`)\]\({re.escape(site)}/(\w+\.html)#([^)]*)\)", link, text)


def page(notebook: dict, path: Path) -> dict:
    "Turn the notebook at `path` into what its page shows."
    config = get_config(path=path.parent.parent)
    title, introduction = split_title("".join(notebook["cells"][0]["source"]))
    nb = dict2nb(notebook)
    nb.path_ = path
    exported = modules(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = fold(cell.source)
    nb.cells[0].source = title
    colab = COLAB.format(**{k: config[k] for k in ("user", "repo", "branch", "git_url")}, name=path.name)
    nb.cells.insert(1, mk_cell(f"{introduction}\n\n{colab}", "markdown"))
    for i, cell in enumerate(nb.cells):
        cell.idx_ = i
    Processors()(nb)

    chapters = {_nbpath2html(p).name: p.name for p in path.parent.glob("*.ipynb")}
    site = f"{config.doc_host}{config.doc_baseurl}"
    for cell in nb.cells:
        for k in [k for k in cell if k.endswith("_")]:
            del cell[k]
        if found := re.search(r"^show_doc\((\w+)\)$", cell.source, re.MULTILINE):
            module = next(module for module in exported if hasattr(module, found[1]))
            cell.source = documentation(module, found[1])
            cell.cell_type = "markdown"
            cell.pop("outputs", None)
        cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if cell.cell_type != "code":
            cell.source = plain_bars(link_chapters(cell.source, site, chapters))
    nb.cells[0].source = re.sub(r"^output-file:.*\n", "", nb.cells[0].source, flags=re.MULTILINE)
    for cell in nb.cells:
        cell.source = re.findall(r".*\n|.+", cell.source)
    return {k: nb[k] for k in ("cells", "metadata", "nbformat", "nbformat_minor")}


def main() -> None:
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    notebook = json.load(sys.stdin)
    sources = [c["source"] for c in notebook["cells"]]
    for path in Path.cwd().glob("*.ipynb"):
        if [c["source"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"]] == sources:
            break
    else:
        sys.exit("this notebook is in no file of the folder")
    json.dump(page(notebook, path), sys.stdout, ensure_ascii=False)


if __name__ == "__main__":
    main()
