"""What Quarto shows of a chapter: the notebook's JSON on standard input, the page's JSON on standard output.

nbdev hides its directives and tells where documentation belongs. Around it, this script writes the documentation of
each public name from the package itself, keeps the introduction (nbdev drops what shares a cell with the title), adds
the line that opens the chapter in Colab, takes out nbval's marks, and points links between chapters at their notebooks,
as Quarto wants.
"""
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
        return [proc for proc in super().base_procs() if proc.__name__ != "exec_show_docs"]


def documentation(module: ModuleType, name: str) -> str:
    "A link to the source of a public name, the call in short, its docstring, its parameters."
    sym, lookup = getattr(module, name), NbdevLookup()
    source = f'[source]({lookup.code(name)}){{style="float:right; font-size:smaller"}}'
    call = f"```python\n{short_call(name, sym)}\n```"
    text = lookup.linkify(inspect.cleandoc(sym.__doc__ or ""))
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
            cells = [name, kind, " ".join(d.docment.split())]
            rows.append("| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |")
    return "\n".join(["| | Type | Meaning |", "|---|---|---|", *rows]) if rows else ""


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
            module = importlib.import_module(f"{config.lib_name}.{path.stem.split('_', 1)[1]}")
            cell.source = documentation(module, found[1])
            cell.cell_type = "markdown"
            cell.pop("outputs", None)
        cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if cell.cell_type != "code":
            cell.source = link_chapters(cell.source, site, chapters)
    nb.cells[0].source = re.sub(r"^output-file:.*\n", "", nb.cells[0].source, flags=re.MULTILINE)
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
