"""What Quarto shows of a chapter: the notebook's JSON on standard input, the page's JSON on standard output.

nbdev hides its directives and tells where documentation belongs. Around it, this script writes the documentation of
each public name from the package itself, folds exported code and set-up instead of leaving it out, folds the answers of
exercises, keeps the introduction (nbdev drops what shares a cell with the title), says under the title how long a
chapter takes and what it needs, makes a link of every "chapter 05", takes out nbval's marks, points links between
chapters at their notebooks, as Quarto wants, and hands every source over as a list of lines that keep their newlines:
Quarto glues the lines of a source that is one string together.
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

import yaml
from execnb.nbio import dict2nb, mk_cell
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.processors import FilterDefaults

COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/{name}"
GITHUB = "https://github.com/{user}/{repo}/blob/{branch}/nbs/{name}"
NEEDS = {  # chapter -> those that it builds on most
    "00_data": ["index"], "00_tokenizer": ["00_data"], "01_layers": ["00_tokenizer"], "02_rope": ["01_layers"],
    "03_model": ["01_layers", "02_rope"], "04_optim": ["00_data", "03_model"], "05_train": ["03_model", "04_optim"],
    "06_ablations": ["03_model", "05_train"], "07_generate": ["03_model", "05_train"],
    "08_export": ["03_model", "05_train"], "09_kernels": ["00_tokenizer"], "10_distributed": ["03_model", "05_train"],
    "11_check": ["01_layers", "03_model", "04_optim"], "12_recipe": ["04_optim", "05_train"],
    "appendix_fables": ["00_data"]}


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


def is_setup(source: str) -> bool:
    "Whether a cell only imports and installs, and sets the style of pictures, threads and seeds."
    try:
        nodes = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE)).body
    except SyntaxError:
        return False
    calls = ("plt.style.use(", "torch.manual_seed(", "torch.set_num_threads(", "warnings.")
    return bool(nodes) and all(isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or
                               ast.unparse(node).startswith(calls) for node in nodes)


def fold(source: str) -> str:
    "Show exported code: open if it says `#| exports`, closed if it says `#| export`, where nbdev would drop it."
    source = re.sub(r"^#\|\s*export_to +\w+\n", "#| exports\n", source)  # see _export.py
    found = re.match(r"#\|\s*export([is]?)\b(.*)\n", source)
    if not found:
        closed = is_setup(source) and not source.startswith("#|")
        return f'#| code-fold: true\n#| code-summary: "Set-up"\n{source}' if closed else source
    rest = source[found.end():]
    nodes = ast.parse(rest).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = names or [ast.unparse(node).split(" =")[0].split(":")[0] for node in nodes
                      if isinstance(node, ast.Assign | ast.AnnAssign)]
    what = f"Source of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "Imports"
    shown = "show" if found[1] == "s" else "true"
    return f'#| exports{found[2]}\n#| code-fold: {shown}\n#| code-summary: "{what}"\n{rest}'


def one_line(source: str) -> str:
    "Write options of several lines (`#| fig-alt: >-`) on one line: Quarto gets no alt text from the others."
    def option(found: re.Match) -> str:
        return found[1] + json.dumps(" ".join(re.sub(r"^#\|", "", found[2], flags=re.MULTILINE).split()),
                                     ensure_ascii=False) + "\n"

    return re.sub(r"^(#\| *[\w-]+: )>-?\n((?:#\|  +.*\n)+)", option, source, flags=re.MULTILINE)


SOLUTION = re.compile(r"#\| *solution\b.*\n(#\| *code-(fold|summary):.*\n)*")


def fold_answers(cells: list) -> list:
    "Put the cells of an answer, marked `#| solution`, with what they print, into a box that opens at a click."
    result, inside = [], False
    for cell in cells:
        answer = cell.cell_type == "code" and SOLUTION.match(cell.source)
        if answer and not inside:
            result.append(mk_cell('::: {.callout-tip collapse="true"}\n## Answer', "markdown"))
        if inside and not answer:
            result.append(mk_cell(":::", "markdown"))
        if answer:
            cell.source = cell.source[answer.end():]
        inside = bool(answer)
        result.append(cell)
    return result + [mk_cell(":::", "markdown")] * inside


def labels(root: Path) -> dict[str, str]:
    "What the sidebar calls each chapter, in its order: 01_layers -> 01 Layers."
    def listed(contents: list) -> dict[str, str]:
        found = {}
        for entry in contents:
            found |= {Path(entry["href"]).stem: entry["text"]} if entry.get("href", "").endswith(".ipynb") else {}
            found |= listed(entry.get("contents", []))
        return found

    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    return listed(config["website"]["sidebar"]["contents"])


def facts(cells: list, path: Path) -> str:
    "What stands under the title: how long a chapter takes, what it needs, its exercises; and where to run it."
    config, names = get_config(path=path.parent.parent), labels(path.parent.parent)
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    shown = [cell.source for cell in cells if cell.cell_type == "code" and not is_setup(cell.source) and not re.search(
        r"^#\| *(export|hide|solution|code-fold: *true)", cell.source, re.MULTILINE)]
    exercises = len(re.findall(r"^(?:#{2,4} |\*\*)Exercise \S*\d", prose, re.MULTILINE))
    at_the_end = prose.partition("\n## Exercises\n")[2]
    exercises += len(re.findall(r"^(?:\*\*\d\. |\d\. \*\*)", at_the_end, re.MULTILINE))
    minutes = len(prose.split()) / 200 + sum(source.count("\n") + 1 for source in shown) / 20 + 4 * exercises
    said = [f"About {max(5, 5 * round(minutes / 5))} minutes"]
    needs = [f"[{names[name]}]({name}.ipynb)" for name in NEEDS.get(path.stem, []) if name in names]
    said += ["needs " + " and ".join(needs)] * bool(needs)
    said += [f"{exercises} exercise{'s' * (exercises > 1)}"] * bool(exercises)
    links = {text: url.format(**{k: config[k] for k in ("user", "repo", "branch")}, name=path.name)
             for text, url in [("Open in Colab", COLAB), ("Notebook on GitHub", GITHUB)]}
    buttons = " ".join(f"[{text}]({url})" for text, url in links.items())
    return (f"::: {{.chapter-facts}}\n{' · '.join(said)}\n:::\n\n"
            f"::: {{.chapter-buttons}}\n{buttons} [How to run it](trouble.md#how-to-run-a-chapter)\n:::")


def documentation(module: ModuleType, name: str) -> str:
    "A link to the source of a public name, the call in short, its docstring, its parameters."
    sym, lookup = getattr(module, name), NbdevLookup()
    source = f'[source]({lookup.code(name)}){{style="float:right; font-size:smaller"}}'
    call = f"```python\n{short_call(name, sym)}\n```"
    text = lookup.linkify(literal(inspect.cleandoc(sym.__doc__ or "")))
    parts = ["::: {.function}", source, f"### {name} {{#def-{name.lower()}}}", call, text, parameter_table(sym), ":::"]
    return "\n\n".join(parts)


def short_call(name: str, sym: object) -> str:
    "How to call it, with the defaults, and with the types where no table of parameters has them."
    try:
        whole = inspect.signature(sym)
    except ValueError:
        whole = inspect.Signature()
    typed = not isinstance(sym, type) and not parameter_table(sym)

    class Long:
        def __repr__(self) -> str:
            return "..."  # for a default that is a whole grammar

    given = []
    for p in whole.parameters.values():
        if p.kind is not p.VAR_KEYWORD:
            long = p.default is not p.empty and len(repr(p.default)) > 60
            kind = p.annotation if typed else p.empty
            given.append(p.replace(annotation=kind, default=Long() if long else p.default))
    call = inspect.Signature(given, return_annotation=whole.return_annotation if typed else whole.empty)
    call = re.sub(r"(?<=: )'(\w+)'", r"\1", str(call)) if typed else str(call)
    call = re.sub(r"\b(?:\w+\.)+(?=[A-Z]|ndarray)", "", call)
    return textwrap.fill(f"{name}{call}", 88, subsequent_indent="    ", break_long_words=False)


def parameter_table(sym: object) -> str:
    "What each parameter means, read from the comments beside it."
    rows = []
    for name, d in docments(sym, full=True).items():
        if d.docment:
            kind = d.anno.__name__ if type(d.anno) is type else inspect.formatannotation(d.anno).strip("'")
            kind = "" if d.anno is inspect.Parameter.empty else re.sub(r"\b(?:\w+\.)+", "", kind)
            call = kind if name == "return" else f"{name}: {kind}" if kind else name
            call = f"`{call}`" if call else ""
            cells = [f"returns {call}" if name == "return" else call, literal(" ".join(d.docment.split()))]
            rows.append("| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |")
    return "\n".join(["| Parameter | Meaning |", "|-----|------|", *rows]) if rows else ""


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
        return f"[{label}]({chapters[page]}#def-{anchor.split('.')[0].lower()})"

    return re.sub(rf"\[(`[^`]+`)\]\({re.escape(site)}/(\w+\.html)#([^)]*)\)", link, text)


CHAPTER = re.compile(r"\b([Cc]hapters?) (\d\d)\b((?:(?:,? and |, | to )\d\d\b)*)")
LEAVE = re.compile(r"(```.*?```|`[^`\n]*`|\$[^$]+\$|!?\[[^\]]*\]\([^)]*\)|<[^>]+>|^#[^\n]*)", re.DOTALL | re.MULTILINE)


def link_numbers(text: str, numbers: dict[str, str], here: str) -> str:
    "Make links of `chapter 05` and `chapters 02 and 03` in prose, but for headings, code and this chapter itself."
    def linked(text: str, number: str) -> str:
        target = numbers.get(number, here)
        return text if target == here else f"[{text}]({target})"

    def link(found: re.Match) -> str:
        word, number, more = found.groups()
        more = re.sub(r"\d\d", lambda other: linked(other[0], other[0]), more)
        one = not word.endswith("s")
        return (linked(f"{word} {number}", number) if one else f"{word} {linked(number, number)}") + more

    parts = LEAVE.split(text)
    return "".join(part if i % 2 else CHAPTER.sub(link, part) for i, part in enumerate(parts))


def page(notebook: dict, path: Path) -> dict:
    "Turn the notebook at `path` into what its page shows."
    config = get_config(path=path.parent.parent)
    title, introduction = split_title("".join(notebook["cells"][0]["source"]))
    nb = dict2nb(notebook)
    nb.path_ = path
    exported = modules(nb)
    about = facts(nb.cells, path)
    nb.cells = fold_answers(nb.cells)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = fold(one_line(cell.source))
            for output in cell.get("outputs", []):
                if "text/html" in output.get("data", {}):  # for it, Quarto would fetch jquery and requirejs from a CDN
                    text = "".join(output["data"]["text/html"])
                    output["data"] = {"text/markdown": f"```{{=html}}\n{text}\n```\n"}
    nb.cells[0].source = title
    nb.cells.insert(1, mk_cell(f"{about}\n\n{introduction}", "markdown"))
    for i, cell in enumerate(nb.cells):
        cell.idx_ = i
    Processors()(nb)

    chapters = {_nbpath2html(p).name: p.name for p in path.parent.glob("*.ipynb")}
    site = f"{config.doc_host}{config.doc_baseurl}"
    numbers = {p.name[:2]: p.name for p in sorted(path.parent.glob("[0-9]*.ipynb"), reverse=True)}  # 00 is the data
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
            source = link_chapters(cell.source, site, chapters)
            cell.source = plain_bars(link_numbers(source, numbers, path.name))
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
