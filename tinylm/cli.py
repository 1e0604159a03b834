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
import io
import math
import os
import re
import secrets
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from tinylm import __version__
from tinylm.core import END_OF_TEXT, InputError, say

# torch takes seconds to load, so whatever needs it is imported inside the verbs


def _read(kind: Any, verb: str, argv: list[str], default: Any = None, some: bool = False) -> Any:
    """Let tyro fill a dataclass with arguments; with `some`, those that are no flags of it are left alone.

    Raises InputError for what tyro or the dataclass refuses, and for values that no one can mean; SystemExit(0) after
    the help."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            got: Any = tyro.cli(kind, args=argv, prog=f"tinylm {verb}", default=default or kind(), use_underscores=True,
                                return_unknown_args=some, add_help=not some)  # type: ignore[call-overload]
    except SystemExit as end:
        if isinstance(end.__context__, InputError):  # the dataclass says it better
            raise end.__context__ from None
        if not end.code:
            print(words.getvalue().rstrip())
            raise
        title, *parts = (" ".join(part.split()) for part in re.split("(?m)^ +-{9,} *$", words.getvalue()))
        said = [re.sub("^Argument helptext:", "expected", part).rstrip(".") for part in parts if "full helptext" not in part]
        if said[1:] and said[1].startswith("Perhaps you meant"):
            said[1] = f"did you mean {' or '.join(dict.fromkeys(re.findall('--[a-z_0-9]+', said[1])))}"
        if re.match("Unrecognized options: [^-]", said[0]):
            said.append("text with spaces needs quotes, and a switch such as --plan takes no value")
        raise InputError("; ".join([*said, f"see `tinylm {verb} --help`"])) from None
    flags = got[0] if some else got
    for name, value in vars(flags).items():
        if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) >= 1 << 63:
            raise InputError(f"--{name} is {value}; expected an ordinary number; see `tinylm {verb} --help`")
    return flags


def _newest_run(shipped: bool = False) -> Path:
    """Find the run under runs/ whose checkpoint is the newest; without any, the model that the package ships will do."""
    checkpoints = list(Path("runs").glob("*/checkpoints/step-*/state.json"))
    if not checkpoints and shipped:
        say("no run under runs/ yet, so the small model that comes with tinylm tells")
        return Path("tinylm")
    if not checkpoints:
        raise InputError(f"no run under {Path('runs').resolve()}; make one with `tinylm train`, or name one")
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns).parents[2]


# Data, tokenizer, training


@dataclass(frozen=True)
class _Data:
    """Make or fetch a corpus, then show its sizes and its first story.

    Next: `tinylm tokenize --corpus NAME`, or `tinylm train --corpus NAME` at once."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="[NAME]")] = "fables"  # fables, tinystories, owt, or a .txt[.gz] file
    corpus: str | None = None  # the same as NAME
    val_corpus: str | None = None  # validation text for a corpus given by path; None holds out its last documents
    data_dir: str = "data"  # folder that keeps the corpora

    def run(self) -> None:
        from tinylm.data import fetch_corpus, read_documents

        paths = fetch_corpus(self.corpus or self.name, folder=self.data_dir, val_corpus=self.val_corpus)
        for split, path in paths.items():
            print(f"{split:5}  {path.stat().st_size / 1e6:10,.1f} MB  {path}")
        first = next(iter(read_documents(paths["train"])), "")
        print(f"\nThe first document:\n\n{first[:1000]}{' ...' * (len(first) > 1000)}")


@dataclass(frozen=True)
class _Tokenize:
    """Train a tokenizer on a corpus and encode it, or reuse what fits; tell how well it compresses.

    Next: `tinylm train` with the same flags."""

    corpus: str = "fables"  # fables, tinystories, owt, or the path of a .txt or .txt.gz file
    val_corpus: str | None = None  # validation text for a corpus given by path; None holds out its last documents
    vocab_size: int = 1024  # number of token ids: 256 bytes, merges, and <|endoftext|>
    data_dir: str = "data"  # folder that keeps corpora, tokenizers and token files

    def run(self) -> None:
        from tinylm.train import PRESETS, prepare

        tokenizer, *files = prepare(replace(PRESETS["laptop"], context_length=1, **vars(self)))
        for file in files:
            sample = file.tokens()[:2**20]
            ratio = len(tokenizer.decode(sample).encode()) / len(sample)
            print(f"{file.path}: {file.count:,} tokens, {ratio:.2f} bytes per token")
        words = sorted((token for token in tokenizer.vocab.values() if token != END_OF_TEXT.encode()), key=len)
        print("longest tokens:", ", ".join(repr(token.decode("utf-8", "replace")) for token in words[:-9:-1]))
        print(f"{tokenizer.vocab_size:,} token ids; fingerprint {tokenizer.fingerprint[:12]}")


@dataclass(frozen=True)
class _Base:
    """What decides the defaults of the other flags."""

    preset: str = ""
    resume: str = ""


def _tell(model: Any, tokenizer: Any, step: int) -> str:
    """Let a model tell the beginning of a story; always the same draws, so that stories compare over time."""
    from tinylm.generate import start_ids, stream, stream_text

    ids = stream(model, start_ids(tokenizer), 200, temperature=0.8, top_p=0.9)
    stories = "".join(stream_text(tokenizer, ids)).split(END_OF_TEXT)
    return next((story.strip() for story in stories if story.strip()), "")


def _train_flags(argv: list[str]) -> tuple[Any, bool]:
    """Read the flags of `train`: the config that they make, and whether only a forecast is wanted."""
    from tinylm.train import PRESETS, TrainConfig, read_config

    @dataclass(frozen=True)
    class Train(TrainConfig):
        """Train a model, making corpus, tokenizer and token files first where they are missing.

        A preset gives the defaults, and each flag overrides one. With --resume RUN the run's own settings are the
        defaults. Several processes train together as
        `torchrun --standalone --nproc_per_node 2 -m tinylm.cli train`.

        Next: `tinylm generate` tells more stories, `tinylm compare` says whether the run is as it should be."""

        resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None  # go on with this run
        plan: bool = False  # only forecast size, memory and time on this machine; train nothing

    base = _read(_Base, "train", argv, some=True)
    default = read_config(Path(base.resume)) if base.resume else PRESETS.get(base.preset, PRESETS["laptop"])
    flags = vars(_read(Train, "train", argv, Train(**vars(default))))
    if base.resume:
        flags |= {"run_dir": base.resume, "resume": base.resume}
    return TrainConfig(**{field.name: flags[field.name] for field in fields(TrainConfig)}), flags["plan"]


def _train(verb: str, argv: list[str]) -> int:
    """Run `train`; exit code 3 says that the loss stopped being finite."""
    config, plan = _train_flags(argv)
    from tinylm import train as book
    from tinylm.model import num_parameters

    if plan:
        print(book.forecast(config))
        return 0
    tokens = config.last_step * config.batch_size * config.context_length
    size = f"{num_parameters(config):,} parameters on {config.corpus}"
    print(f"training {size}: {config.last_step:,} steps, {tokens:,} tokens", flush=True)
    try:
        run = book.train(config, on_eval=_tell)
    except book.Diverged as err:
        say(f"tinylm: {err}")
        return 3
    print(f"The run lies in {run}. To hear more:\n\n    tinylm generate {run} --num 3\n")
    return 0


def _sweep(verb: str, argv: list[str]) -> int:
    """Run `search` or `ablate`; exit code 1 says that a run left no record."""
    from tinylm.ablations import SWEEPS, SweepConfig, run_sweep
    from tinylm.train import PRESETS

    base = _read(_Base, verb, argv, some=True)
    default = replace(SWEEPS[verb], **vars(PRESETS.get(base.preset, SWEEPS[verb])))
    flags = _read(SweepConfig, verb, argv, default)
    changed = {name for name, _ in vars(flags).items() - vars(default).items()}
    changed -= {"plan", "corpus", "val_corpus", "data_dir", "device", "jobs", "out"}
    if flags.plan is not None and changed:
        raise InputError(f"--{min(changed)} cannot change a plan; edit {flags.plan} instead")
    if flags.jobs is not None and flags.jobs < 1:
        raise InputError(f"--jobs is {flags.jobs}; expected at least 1")
    return run_sweep(verb, flags)


# With a run


@dataclass(frozen=True)
class _Generate:
    """Tell stories with a trained model, written as they come.

    RUN is the folder of a run, or `tinylm` for the small model that the package ships; without it, the newest run under
    runs/ is taken, or the shipped model if there is none. PROMPT is how the story begins; without it, the model begins
    by itself. A prompt with spaces needs quotes."""

    run_dir: Annotated[Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""  # a run; what is none is the prompt
    prompt: Annotated[Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""  # the story's beginning
    temperature: float = 0.8  # 0 = always the likeliest token, 1 = as the model says, higher = wilder
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = 0.9  # draw among the likeliest tokens that hold this much probability
    max_new_tokens: int = 256  # longest story, in tokens
    num: int = 1  # how many stories
    seed: int | None = None  # same seed, same story; None takes a new one and says which
    device: str = "auto"  # cpu, cuda, mps, or auto for the best one there is
    interactive: Annotated[bool, tyro.conf.arg(aliases=["-i"])] = False  # ask for one prompt after the other

    def run(self) -> None:
        if self.num < 1:
            raise InputError(f"--num is {self.num}; expected at least 1")
        if sys.stdout is None or self.interactive and sys.stdin is None:
            raise InputError("standard input or output is closed; stories need a place to go, and -i one to come from")
        is_run = self.run_dir == "tinylm" or os.path.isfile(os.path.join(self.run_dir, "config.json"))
        if self.prompt and not is_run:
            raise InputError(f"no run at {self.run_dir}; expected a folder that `tinylm train` made, then the prompt")
        run, prompt = (Path(self.run_dir), self.prompt) if is_run else (_newest_run(shipped=True), self.run_dir)
        from tinylm.train import load_run

        model, tokenizer, _ = load_run(run, self.device)
        seed = secrets.randbelow(100_000) if self.seed is None else self.seed
        say(f"{run}, seed {seed}")
        if not self.interactive:
            self.tell(model, tokenizer, prompt, seed)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 become U+FFFD
        say("Begin a story; an empty line lets the model begin; Ctrl-D ends.")
        with contextlib.suppress(EOFError):
            while True:
                self.tell(model, tokenizer, prompt or input("> "), seed)
                prompt, seed = "", seed + self.num

    def tell(self, model: Any, tokenizer: Any, prompt: str, seed: int) -> None:
        """Write the stories to standard output as they come; story r is that of seed + r."""
        from tinylm.generate import start_ids, stream, stream_text

        for r in range(self.num):
            ids = stream(model, start_ids(tokenizer, prompt), self.max_new_tokens, temperature=self.temperature,
                         top_k=self.top_k, top_p=self.top_p, stop_id=tokenizer.special_tokens.get(END_OF_TEXT), seed=seed + r)
            print("\n" * (r > 0) + prompt, end="", flush=True)
            for piece in stream_text(tokenizer, ids):
                print(piece, end="", flush=True)
            print(flush=True)


READ = {  # format -> (default name, how to read it)
    "hf": ("hf", 'from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained("{out}")'),
    "tiktoken": ("vocabulary.tiktoken", 'from tiktoken.load import load_tiktoken_bpe; load_tiktoken_bpe("{out}")'),
    "llama2c": ("llama2c/model.bin", "./run {out} -z {out.parent}/tokenizer.bin"),
    "gguf": ("model.gguf", "llama-cli -m {out} -no-cnv -e -p '\\nOnce upon a time'"),
    "onnx": ("model.onnx", 'import onnxruntime; onnxruntime.InferenceSession("{out}")'),
}


@dataclass(frozen=True)
class _Export:
    """Write a trained model in the format of another tool, and say how to read it there.

    RUN is the folder of a run; without it, the newest one under runs/ is taken."""

    run_dir: Annotated[Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""  # folder of a run
    format: Literal["hf", "tiktoken", "llama2c", "gguf", "onnx"] = "hf"  # hf is a Hugging Face folder
    out: str | None = None  # the file or folder to make; None puts it into RUN/export/

    def run(self) -> None:
        run = Path(self.run_dir or _newest_run())
        from tinylm import export
        from tinylm.train import load_run

        name, how = READ[self.format]
        out = Path(self.out or run / "export" / name)
        getattr(export, f"to_{self.format}")(load_run(run)[1] if self.format == "tiktoken" else run, out)
        print(f"{out}\n\nTo read it:\n\n    {how.format(out=out)}\n")


@dataclass(frozen=True)
class _Compare:
    """Hold a run of a standard preset against the reference runs: is it right? If not, the exit code is 1.

    RUN is the folder of a run, finished or not, or a record; without it, the newest run under runs/ is taken."""

    run_dir: Annotated[Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""  # folder of a run, or a record

    def run(self) -> int:
        from tinylm.ablations import compare_run

        right, text = compare_run(self.run_dir or _newest_run())
        print(text)
        return int(not right)


@dataclass(frozen=True)
class _Check:
    """Compare your own part with the book's and hear the first thing that differs; then the exit code is 1.

    `tinylm check RMSNorm > my.py` writes a stub to fill in, and `tinylm check RMSNorm=my.py` checks it;
    `RMSNorm=my.py:MyNorm` if it has another name there. In a folder that `tinylm start` made, `tinylm check` alone
    prints the score; a teacher marks a class with `tinylm check FOLDER FOLDER ...`."""

    parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME[=FILE.py[:OBJECT]]|FOLDER")] = ()  # NAME for a stub, NAME=FILE.py, or a folder
    train: bool = False  # if they pass, also train a small model with your parts, and one with the book's
    time_limit: float = 30.0  # seconds that one case, or one training step, may take
    seed: int = 0  # of the numbers in the cases: others for a class than for practice
    report: str | None = None  # of folders: also write the points of each case to FILE.xml (JUnit) or FILE.json

    def run(self) -> int:
        from tinylm.check import check_file, stub
        from tinylm.course import PLACES, mark_class

        if self.time_limit <= 0:
            raise InputError(f"--time_limit is {self.time_limit}; expected more than 0 seconds")
        here = not self.parts and any(map(os.path.isfile, PLACES.values()))
        if here or self.parts and all(map(os.path.isdir, self.parts)):
            return int(not mark_class(self.parts or ["."], self.time_limit, self.seed, self.report))
        if not self.parts:
            raise InputError("which part? NAME=FILE.py, or NAME alone for a stub; `tinylm start FOLDER` begins a course; "
                             f"there are {', '.join(PLACES)}")
        if stubs := [part for part in self.parts if "=" not in part]:
            print(stub(*stubs), end="")
        files: dict[str, list[str]] = {}
        for part in self.parts:
            if found := re.fullmatch(r"(.*?)=(.*?)(:\w+)?", part):
                files.setdefault(found[2], []).append(found[1] + (found[3] or ""))
        return min(1, sum(check_file(path, names, self.time_limit, self.seed, self.train) for path, names in files.items()))


@dataclass(frozen=True)
class _Start:
    """Begin a course: make a folder with a file for every part of a language model, to write yourself.

    Next: read its README.md, fill in the first file, and run `tinylm check` in the folder."""

    folder: Annotated[Positional[str], tyro.conf.arg(metavar="FOLDER")] = "my-lm"  # the folder to make

    def run(self) -> None:
        from tinylm.course import start

        print(f"{start(self.folder)} is ready. To see the score:\n\n    cd {self.folder}\n    tinylm check\n")


VERBS: dict[str, Any] = {  # a dataclass of flags that runs, or a function of the verb and its arguments
    "data": _Data, "tokenize": _Tokenize, "train": _train, "generate": _Generate, "search": _sweep, "ablate": _sweep,
    "compare": _Compare, "export": _Export, "check": _Check, "start": _Start,
}


def _dispatch(argv: list[str]) -> int:
    """Do what the arguments say; a verb that returns nothing has ended well."""
    verb, *rest = argv or ["--help"]
    rest = ["=".join(map(os.path.expanduser, word.split("=", 1))) for word in rest]  # the shell leaves ~ after =
    if verb in VERBS:
        kind = VERBS[verb]
        return (_read(kind, verb, rest).run() if isinstance(kind, type) else kind(verb, rest)) or 0
    if verb == "--version":
        print(f"tinylm {__version__}")
    elif verb in ("-h", "--help", "help"):
        print(f"tinylm {__version__}: a language model from scratch\n{(__doc__ or '').partition(chr(10))[2]}")
    else:
        raise InputError(f"unknown verb {verb!r}; there are {', '.join(VERBS)}; see `tinylm --help`")
    return 0


def main(
    argv: list[str] | None = None,  # the arguments; None takes those of the process
) -> int:  # exit code: 0 well, 1 a run that differs, 2 a mistake to mend, 3 diverged, 130, 141, 143 a signal
    """Run the `tinylm` command; each failure that is expected becomes a line and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letter shows a question mark
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)  # a closed pipe shows here, not when Python ends
        return code
    except SystemExit as end:  # tyro has shown the help
        return int(end.code or 0)
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
