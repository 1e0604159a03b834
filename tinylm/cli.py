"""The `tinylm` command: flags read by tyro, one line for every mistake. A plain module, not from a chapter.

usage: tinylm VERB [OPTIONS]

  data      make or fetch a corpus, and look at it
  tokenize  train a tokenizer and encode a corpus
  train     train a model; without flags, from nothing to a told story in under 3 minutes
  generate  tell stories with a trained model
  search    find the best learning rate, and the one at which training diverges
  ablate    take parts out of the model and measure what is lost, with error bars
  compare   check a run against reference runs: is it right?
  export    write a trained model in the format of another tool
  check     compare your own part with the book's: RMSNorm=my.py:MyNorm; in a course, the score
  start     begin a course: a folder with every part to write yourself

Begin with `tinylm train`, then `tinylm generate`.
`tinylm VERB --help` shows the options of a verb; `tinylm --version` the version."""
import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from tinylm import __version__
from tinylm.core import END_OF_TEXT, InputError, say

# A verb is a function, and its flags are what the function takes. torch takes seconds to load, so whatever needs it is
# imported inside the verbs.


def _read(verb: str, function: Callable, argv: list[str], some: bool = False) -> dict[str, Any]:
    """Let tyro read the flags of a function, by name; with `some`, those that it does not know are left alone.

    Raises InputError for what tyro or a config refuses; SystemExit after the help."""

    @functools.wraps(function)
    def flags(**values: Any) -> dict[str, Any]:
        return values

    prog, words = f"tinylm {verb}", io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            got: Any = tyro.cli(flags, args=argv, prog=prog, return_unknown_args=some,  # type: ignore[call-overload]
                                add_help=not some, use_underscores=True, config=[tyro.conf.PositionalMetavarFromFieldName])
    except SystemExit as end:
        if not end.code:
            print(words.getvalue().rstrip())
            raise
        said = " ".join(re.split("(?m)^ +-{9,} *$", words.getvalue())[1].split()).rstrip(".")
        if known := re.findall("(?m)^ {6}(--.*?) *$", words.getvalue()):
            said += f"; expected {' or '.join(dict.fromkeys(known))}"
        if re.match("Unrecognized options: [^-]", said):
            said += "; text with spaces needs quotes, and a switch such as --plan takes no value"
        raise InputError(f"{said}; see `{prog} --help`") from None
    return got[0] if some else got


def _newest_run(shipped: bool = False) -> Path:
    """Find the run under runs/ whose checkpoint is the newest; without any, the model that the package ships will do."""
    checkpoints = list(Path("runs").glob("*/checkpoints/step-*/state.json"))
    if not checkpoints and shipped:
        say("no run under runs/ yet, so the small model that comes with tinylm tells")
        return Path("tinylm")
    if not checkpoints:
        raise InputError(f"no run under {Path('runs').resolve()}; make one with `tinylm train`, or name one")
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns).parents[2]


_FIELDS = tyro.conf.arg(name="")  # the fields of a config are flags like any other


# Data, tokenizer, training


def _data(name: Positional[str] = "fables", corpus: str | None = None, val_corpus: str | None = None,
          data_dir: str = "data") -> None:
    """Make or fetch a corpus, then show its sizes and its first story.

    Next: `tinylm tokenize --corpus NAME`, or `tinylm train --corpus NAME` at once.

    Args:
        name: fables, tinystories, owt, or a .txt[.gz] file
        corpus: the same as NAME
        val_corpus: validation text for a corpus given by path; None holds out its last documents
        data_dir: folder that keeps the corpora"""
    from tinylm.data import fetch_corpus, read_documents

    paths = fetch_corpus(corpus or name, folder=data_dir, val_corpus=val_corpus)
    for split, path in paths.items():
        print(f"{split:5}  {path.stat().st_size / 1e6:10,.1f} MB  {path}")
    first = next(iter(read_documents(paths["train"])), "")
    print(f"\nThe first document:\n\n{first[:1000]}{' ...' * (len(first) > 1000)}")


def _tokenize(corpus: str = "fables", val_corpus: str | None = None, vocab_size: int = 1024,
              data_dir: str = "data") -> None:
    """Train a tokenizer on a corpus and encode it, or reuse what fits; tell how well it compresses.

    Next: `tinylm train` with the same flags.

    Args:
        corpus: fables, tinystories, owt, or the path of a .txt or .txt.gz file
        val_corpus: validation text for a corpus given by path; None holds out its last documents
        vocab_size: number of token ids: 256 bytes, merges, and <|endoftext|>
        data_dir: folder that keeps corpora, tokenizers and token files"""
    from tinylm.train import TrainConfig, prepare

    tokenizer, *files = prepare(TrainConfig(corpus=corpus, val_corpus=val_corpus, vocab_size=vocab_size,
                                            data_dir=data_dir, context_length=1))
    for file in files:
        sample = file.tokens()[:2**20]
        ratio = len(tokenizer.decode(sample).encode()) / len(sample)
        print(f"{file.path}: {file.count:,} tokens, {ratio:.2f} bytes per token")
    words = sorted((token for token in tokenizer.vocab.values() if token != END_OF_TEXT.encode()), key=len)
    print("longest tokens:", ", ".join(repr(token.decode("utf-8", "replace")) for token in words[:-9:-1]))
    print(f"{tokenizer.vocab_size:,} token ids; fingerprint {tokenizer.fingerprint[:12]}")


def _tell(model: Any, tokenizer: Any, step: int) -> str:
    """Let a model tell the beginning of a story; always the same draws, so that stories compare over time."""
    from tinylm.generate import start_ids, stream, stream_text

    ids = stream(model, start_ids(tokenizer), 200, temperature=0.8, top_p=0.9)
    stories = "".join(stream_text(tokenizer, ids)).split(END_OF_TEXT)
    return next((story.strip() for story in stories if story.strip()), "")


def _defaults(verb: str, argv: list[str], usual: Any) -> Any:
    """Find the config whose fields are the defaults of the flags: that of a run, of a preset, or the usual one."""
    from tinylm.train import PRESETS, read_config

    def chosen(preset: str = "", resume: str = "") -> None: ...

    by = _read(verb, chosen, argv, some=True)
    return read_config(Path(by["resume"])) if by["resume"] else PRESETS.get(by["preset"], usual)


def _train(verb: str, argv: list[str]) -> Callable:
    """Make the verb `train`, whose defaults come from a preset or a run."""
    from tinylm import train as book

    default = _defaults(verb, argv, book.PRESETS["laptop"])

    def train(config: Annotated[book.TrainConfig, _FIELDS] = default, plan: bool = False) -> int:
        """Train a model, making corpus, tokenizer and token files first where they are missing.

        A preset gives the defaults, and each flag overrides one. With --resume RUN the run's own settings are the
        defaults. Several processes train together as
        `torchrun --standalone --nproc_per_node 2 -m tinylm.cli train`. If the loss stops being finite, the exit code
        is 3.

        Next: `tinylm generate` tells more stories, `tinylm compare` says whether the run is as it should be.

        Args:
            plan: only forecast size, memory and time on this machine; train nothing"""
        if plan:
            print(book.forecast(config))
            return 0
        size = f"{book.num_parameters(config):,} parameters on {config.corpus}"
        print(f"training {size} for {config.last_step:,} steps", flush=True)
        try:
            run = book.train(config, on_eval=_tell)
        except book.Diverged as err:
            say(f"tinylm: {err}")
            return 3
        print(f"The run lies in {run}. To hear more:\n\n    tinylm generate {run} --num 3\n")
        return 0

    return train


def _sweep(verb: str, argv: list[str]) -> Callable:
    """Make the verb `search` or `ablate`: the same but for what is varied without flags."""
    from tinylm.ablations import BASE, ROWS, load_plans, run_sweep
    from tinylm.train import TrainConfig

    default, search = _defaults(verb, argv, BASE), verb == "search"
    usual = ("0.001,0.003,0.01,0.03,0.1", "0", "baseline") if search else ("", "1,2,3", ",".join(ROWS))

    def sweep(config: Annotated[TrainConfig, _FIELDS] = default, lrs: str = usual[0], seeds: str = usual[1],
              variants: str = usual[2], plan: str | None = None, jobs: int | None = None,
              out: str = "runs/ablations") -> int:
        """Train variants of a model at several learning rates and seeds; print tables of what was found.

        What has a record is not run again, so the same command goes on with what was stopped. If a run left no
        record, the exit code is 1.

        Args:
            lrs: learning rates to search, separated by commas; none: --lr
            seeds: seeds, separated by commas
            variants: names, or fields like num_heads=2, separated by commas
            plan: a JSON file of plans instead of the three; other flags change all of its plans
            jobs: runs at a time; None means one for each core
            out: folder for the records"""
        if jobs is not None and jobs < 1 or config.seed or config.run_dir:
            raise InputError("--jobs is at least 1; instead of --seed and --run_dir a sweep has --seeds and --out")
        if plan and (lrs, seeds, variants) != usual:
            raise InputError(f"--lrs, --seeds and --variants do not go with --plan; edit {plan} instead")
        texts = {"lrs": lrs, "variants": variants, "search_seeds" if search else "seeds": seeds}
        lists = {name: list(filter(None, text.split(","))) for name, text in texts.items()}
        changed = {name: value for name, value in vars(config).items() if not plan or value != getattr(default, name)}
        return run_sweep(load_plans(plan or {verb: lists}, **changed), out, jobs)

    return sweep


# With a run


def _generate(run: Positional[str] = "", prompt: Positional[str] = "", temperature: float = 0.8, top_k: int | None = None,
              top_p: float | None = 0.9, max_new_tokens: int = 256, num: int = 1, seed: int | None = None,
              device: str = "auto", interactive: Annotated[bool, tyro.conf.arg(aliases=["-i"])] = False) -> None:
    """Tell stories with a trained model, written as they come.

    RUN is the folder of a run, or `tinylm` for the small model that the package ships; without it, the newest run under
    runs/ is taken, or the shipped model if there is none. PROMPT is how the story begins; without it, the model begins
    by itself. A prompt with spaces needs quotes.

    Args:
        run: a run; what is none is the prompt
        prompt: the story's beginning
        temperature: 0 = always the likeliest token, 1 = as the model says, higher = wilder
        top_k: draw among the k likeliest tokens
        top_p: draw among the likeliest tokens that hold this much probability
        max_new_tokens: longest story, in tokens
        num: how many stories
        seed: same seed, same story; None takes a new one and says which
        device: cpu, cuda, mps, or auto for the best one there is
        interactive: ask for one prompt after the other"""
    if sys.stdout is None or interactive and sys.stdin is None:
        raise InputError("standard input or output is closed; stories need a place to go, and -i one to come from")
    is_run = run == "tinylm" or os.path.isfile(os.path.join(run, "config.json"))
    if prompt and not is_run:
        raise InputError(f"no run at {run}; expected a folder that `tinylm train` made, then the prompt")
    folder, prompt = (Path(run), prompt) if is_run else (_newest_run(shipped=True), run)
    from tinylm.generate import start_ids, stream, stream_text
    from tinylm.train import load_run

    model, tokenizer, _ = load_run(folder, device)
    seed = int.from_bytes(os.urandom(2)) if seed is None else seed
    say(f"{folder}, seed {seed}" + ". Begin a story; an empty line lets the model begin; Ctrl-D ends." * interactive)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 become U+FFFD
    with contextlib.suppress(EOFError):
        while True:
            prompt = prompt or (input("> ") if interactive else "")
            for r in range(num):
                ids = stream(model, start_ids(tokenizer, prompt), max_new_tokens, temperature=temperature, top_k=top_k,
                             top_p=top_p, stop_id=tokenizer.special_tokens.get(END_OF_TEXT), seed=seed + r)
                print("\n" * (r > 0) + prompt, end="", flush=True)
                for piece in stream_text(tokenizer, ids):
                    print(piece, end="", flush=True)
                print(flush=True)
            if not interactive:
                return
            prompt, seed = "", seed + num


READ = {  # format -> (default name, how to read it)
    "hf": ("hf", 'from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained("{out}")'),
    "tiktoken": ("vocabulary.tiktoken", 'from tiktoken.load import load_tiktoken_bpe; load_tiktoken_bpe("{out}")'),
    "llama2c": ("llama2c/model.bin", "./run {out} -z {out.parent}/tokenizer.bin"),
    "gguf": ("model.gguf", "llama-cli -m {out} -no-cnv -e -p '\\nOnce upon a time'"),
    "onnx": ("model.onnx", 'import onnxruntime; onnxruntime.InferenceSession("{out}")'),
}


def _export(run: Positional[str] = "", format: Literal["hf", "tiktoken", "llama2c", "gguf", "onnx"] = "hf",
            out: str | None = None) -> None:
    """Write a trained model in the format of another tool, and say how to read it there.

    Args:
        run: folder of a run; without it, the newest one under runs/ is taken
        format: hf is a Hugging Face folder
        out: the file or folder to make; None puts it into RUN/export/"""
    folder = Path(run or _newest_run())
    from tinylm import export
    from tinylm.train import load_run

    name, how = READ[format]
    path = Path(out or folder / "export" / name)
    getattr(export, f"to_{format}")(load_run(folder)[1] if format == "tiktoken" else folder, path)
    print(f"{path}\n\nTo read it:\n\n    {how.format(out=path)}\n")


def _compare(run: Positional[str] = "") -> int:
    """Hold a run of a standard preset against the reference runs: is it right? If not, the exit code is 1.

    Args:
        run: the folder of a run, finished or not, or a record; without it, the newest run under runs/ is taken"""
    from tinylm.ablations import compare_run

    right, text = compare_run(run or _newest_run())
    print(text)
    return int(not right)


def _check(parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME[=FILE.py[:OBJECT]]|FOLDER")] = (),
           train: bool = False, time_limit: float = 30.0, seed: int = 0, report: str | None = None) -> int:
    """Compare your own part with the book's and hear the first thing that differs; then the exit code is 1.

    `tinylm check RMSNorm > my.py` writes a stub to fill in, and `tinylm check RMSNorm=my.py` checks it;
    `RMSNorm=my.py:MyNorm` if it has another name there. In a folder that `tinylm start` made, `tinylm check` alone
    prints the score; a teacher marks a class with `tinylm check FOLDER FOLDER ...`.

    Args:
        parts: NAME for a stub, NAME=FILE.py, or a folder
        train: if they pass, also train a small model with your parts, and one with the book's
        time_limit: seconds that one case, or one training step, may take
        seed: of the numbers in the cases; others for a class than for practice
        report: of folders; also write the points of each case to FILE.xml (JUnit) or FILE.json"""
    from tinylm.check import check_file, stub
    from tinylm.course import PLACES, mark_class

    if not time_limit > 0:
        raise InputError(f"--time_limit is {time_limit}; expected more than 0 seconds")
    folders = parts or ["."] * any(map(os.path.isfile, PLACES.values()))
    if folders and all(map(os.path.isdir, folders)):
        return int(not mark_class(folders, time_limit, seed, report))
    if not parts:
        raise InputError("which part? NAME=FILE.py, or NAME alone for a stub; `tinylm start FOLDER` begins a course; "
                         f"there are {', '.join(PLACES)}")
    if stubs := [part for part in parts if "=" not in part]:
        print(stub(*stubs), end="")
    files: dict[str, list[str]] = {}
    for name, path, thing in re.findall(r"(?m)^(.*?)=(.*?)(:\w+)?$", "\n".join(parts)):
        files.setdefault(path, []).append(name + thing)
    return min(1, sum(check_file(path, names, time_limit, seed, train) for path, names in files.items()))


def _start(folder: Positional[str] = "my-lm") -> None:
    """Begin a course: make a folder with a file for every part of a language model, to write yourself.

    Next: read its README.md, fill in the first file, and run `tinylm check` in the folder.

    Args:
        folder: the folder to make"""
    from tinylm.course import start

    print(f"{start(folder)} is ready. To see the score:\n\n    cd {folder}\n    tinylm check\n")


VERBS: dict[str, Callable] = {  # a function of flags, or what makes one from the verb and its arguments
    "data": _data, "tokenize": _tokenize, "train": _train, "generate": _generate, "search": _sweep, "ablate": _sweep,
    "compare": _compare, "export": _export, "check": _check, "start": _start,
}


def _dispatch(argv: list[str]) -> int:
    """Do what the arguments say; a verb that returns nothing has ended well."""
    verb, *rest = argv or ["--help"]
    rest = ["=".join(map(os.path.expanduser, word.split("=", 1))) for word in rest]  # the shell leaves ~ after =
    if verb in ("-h", "--help", "help", "--version"):
        about = "" if verb == "--version" else f": a language model from scratch\n{(__doc__ or '').partition(chr(10))[2]}"
        print(f"tinylm {__version__}{about}")
        return 0
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}; there are {', '.join(VERBS)}; see `tinylm --help`")
    function = VERBS[verb](verb, rest) if VERBS[verb] in (_train, _sweep) else VERBS[verb]
    return function(**_read(verb, function, rest)) or 0


def main(argv: list[str] | None = None) -> int:
    """Run the `tinylm` command with these arguments, or with those of the process; returns the exit code.

    0 is well, 1 a run that differs, 2 a mistake to mend, 3 diverged, 130, 141 and 143 a signal. Each failure that is
    expected becomes a line and a code. Raises SystemExit(0) after the help of a verb."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letter shows a question mark
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)  # a closed pipe shows here, not when Python ends
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush finds a place
        return 141
    except ModuleNotFoundError as err:
        message, code = f"this needs the package {err.name}; install it with `pip install {err.name}`", 2
    except (InputError, OSError) as err:
        message, code = " ".join(str(err).split()), 2
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and not re.search("out of memory|allocate memory", str(err)):
            raise
        message, code = "out of memory; try a smaller --batch_size, or see what `tinylm train --plan` foresees", 2
    except KeyboardInterrupt as err:
        message, code = str(err) or "interrupted", getattr(err, "exit_code", 130)
    say(f"tinylm: {message}")
    return code


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(main())
    from tinylm.distributed import leave, only_rank0_speaks  # one of the processes that torchrun started

    with only_rank0_speaks():
        code = main()
    leave(code)
