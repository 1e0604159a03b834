"""Content of `tinylm check`: for each part a plain answer, cases to try, and the likely mistakes. A plain module.

A part is one row of `PARTS`, in the order of the chapters. Its answer is code of the plainest kind, and the docstring
is the task: it states each convention that the cases test, so a stub is the answer without its bodies. A case does
something with an answer and returns results by name. A mistake is an edit of the answer's source: the text to find,
then the new text, several times if need be. Cases are made when they are first asked for; the import draws nothing.
Their numbers come from `SEED`: another seed, other cases."""
import ast
import inspect
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.fables import fables
from tinylm.model import ModelConfig, parameter_table
from tinylm.rope import apply_rope, rope_angles

Case = Callable[[Any], dict[str, Any]]  # an answer -> the results, by name
SEED = 0  # of the numbers in the cases; a teacher's may be secret


@dataclass(frozen=True)
class Part:
    """Something to write: the plain answer, what to try, and what may go wrong."""

    chapter: str  # the notebook that explains it
    answer: Any  # the plain answer, a function or class
    make_cases: Callable[[], dict[str, Case]]  # what is tried, from simple to hard
    mistakes: dict[str, tuple[str, ...]]  # what one may have done -> the edits (old, new, old, new, ...) that do it

    @cached_property
    def cases(self) -> dict[str, Case]:
        return self.make_cases()

    @cached_property
    def source(self) -> str:
        return inspect.getsource(self.answer)

    @property
    def book(self) -> Any:
        """The book's own part, where its chapter exports one; else the plain answer."""
        module = import_module(f"tinylm.{self.chapter.partition('_')[2]}")
        return getattr(module, self.answer.__name__, self.answer)

    @property
    def needs(self) -> list[str]:
        """The parts that this one is made of."""
        used = {node.id for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.Name)}
        return [name for name, p in PARTS.items() if p is not self and p.answer.__name__ in used]

    def wrong(self, words: str) -> Any:
        """Make the answer that has one of the mistakes."""
        text, edits = self.source, self.mistakes[words]
        for old, new in zip(edits[::2], edits[1::2], strict=True):
            assert old in text, f"{old!r} is not in the answer for {words!r}"
            text = text.replace(old, new)
        return self.build({}, text)

    def build(self, others: Mapping[str, Any], text: str = "") -> Any:
        """Run the answer's source, or another text, where other things stand under some of the names that it uses."""
        space = {**globals(), **others}
        exec(compile(text or self.source, "<the table of exercises>", "exec"), space)
        return space[self.answer.__name__]


PARTS: dict[str, Part] = {}


# What cases are made of.

def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw normal numbers, always the same ones."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * SEED))


def outcome(function: Callable, inputs: dict[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Call a function; return its output, what became of the inputs, and the gradients of inputs and parameters.

    The gradients are those of the outputs' sum, each with a random weight: with plain sums, any softmax has none."""
    copies = deepcopy(inputs)
    tensors = {k: v for k, v in copies.items() if isinstance(v, Tensor)}
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    output = function(*copies.values())
    results = {"output": output.detach() if isinstance(output, Tensor) else output}
    results |= {f"{k} after the call": v.detach() for k, v in tensors.items()}
    if isinstance(output, Tensor) and output.requires_grad:
        leaves |= parameters
        weights = normal(*output.shape, seed=99).to(output.dtype)
        gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()), allow_unused=True)
        results |= {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True) if g is not None}
    return results


def call(**inputs: Any) -> Case:
    """Make the case of a function: call it with these inputs."""
    return lambda function: outcome(function, inputs, {})


def layer(make: type[nn.Module], *sizes: Any, use: Callable | None = None, **inputs: Any) -> Case:
    """Make the case of a layer: build it in these sizes, fill it with weights, call it with the inputs, or `use` it."""
    dtype = next((x.dtype for x in inputs.values() if x.is_floating_point()), torch.float32)
    shapes = {name: tuple(p.shape) for name, p in make(*sizes).named_parameters()}
    weights = {name: normal(*shape, seed=i, scale=0.5).to(dtype) for i, (name, shape) in enumerate(shapes.items())}

    def case(yours: Callable) -> dict[str, Any]:
        module = yours(*sizes)
        own = dict(module.named_parameters())
        results: dict[str, Any] = {"the list of parameters": {name: tuple(p.shape) for name, p in own.items()}}
        if results["the list of parameters"] == shapes:
            for name, p in own.items():
                p.data = weights[name].clone()
            results |= use(module) if use else outcome(module, inputs, own)
        return results
    return case


def fresh(make: type[nn.Module], *sizes: int, std: float = 1.0) -> Case:
    """Make a case of how a layer's weights are drawn."""
    def case(yours: Callable) -> dict[str, Any]:
        with torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            w = yours(*sizes).weight.detach() / std
        return {"the deviation of fresh weights, over the wanted one,": round(float(w.std()), 1),
                "the largest fresh weight, in deviations, over 3,": max(1.0, round(float(w.abs().max()) / 3, 2))}
    return case


# 00: data and tokenizer

def get_batch(tokens: np.ndarray, batch_size: int, context_length: int, device: Any = "cpu", rng: Any = None):
    """Draw `batch_size` windows of tokens (N,) from random places; return inputs and
    targets, each (batch_size, context_length) and int64, on the device.

    The target of each token is the one that comes next, so a window is context_length +
    1 tokens long. All places where one fits are equally likely: the starts are
    `rng.integers(len(tokens) - context_length, size=batch_size)`; without an rng, a
    fresh one draws. The tokens may be uint16."""
    # Hint: take context_length + 1 tokens from each start, stack them, and cut off the last or the first column.
    rng = rng or np.random.default_rng()
    starts = rng.integers(len(tokens) - context_length, size=batch_size)
    rows = np.stack([tokens[i : i + context_length + 1] for i in starts]).astype(np.int64)
    x = torch.from_numpy(rows).to(device)
    return x[:, :-1], x[:, 1:]



def _batches(count: int, batch_size: int, context_length: int, dtype: Any = np.int64) -> Case:
    tokens, rng = normal(count, scale=1000).abs().numpy().astype(dtype), np.random.default_rng(SEED)
    return call(tokens=tokens, batch_size=batch_size, context_length=context_length, device="cpu", rng=rng)


PARTS["get_batch"] = Part("00_data", get_batch, lambda: {
    "four windows of five tokens": _batches(50, 4, 5), "tokens for a single window": _batches(6, 2, 5),
    "tokens of type uint16": _batches(50, 4, 5, np.uint16)}, {
    "the targets are not shifted": ("x[:, 1:]", "x[:, :-1]"),
    "the targets come before the inputs": ("x[:, :-1], x[:, 1:]", "x[:, 1:], x[:, :-1]"),
    "the last place is never drawn": ("- context_length, size", "- context_length - 1, size"),
    "all windows of a batch begin at the same place": ("size=batch_size)", "size=1).repeat(batch_size)")})

def equal_weights(text: str) -> str:
    """Take the weights out of a grammar's text, so that all options of a rule are
    equally likely.

    A weight is a number and a space before an option. An option stands at the beginning
    of a line (which may be indented), or after a colon or a comma and a space. Numbers
    inside an option stay."""
    return re.sub(r"(?m)(^\s*|[:,]\s+)\d+ (?=\S)", r"\1", text)


def _lines(text: str) -> Case:
    return lambda answer: {"the list of lines": [" ".join(line.split()) for line in answer(text).split("\n")]}


PARTS["equal_weights"] = Part("00_data", equal_weights, lambda: {
    "a rule in lines": _lines("close:\n3 They end up <ending>\n2 {hero} slept.\n<moral>"),
    "a rule in one line": _lines("once: 4 Once upon a time, 12 Long ago, Many summers ago, 2 Last year"),
    "a rule that goes on in the next line": _lines("girl (he=she): 2 Mia, 3 Lily,\n    10 Rosie, Clara"),
    "numbers inside an option": _lines("who:\n4 <name> and 7 dwarfs\n1 a fox of 3\nnight: 2 101 nights, 1 night")}, {
    "nothing is changed": ("return re", "return text or re"),
    "only the first number is taken out": (r'r"\1", text', r'r"\1", text, count=1'),
    "the weights at the beginning of a line stay": (r"^\s*|", ""),
    "numbers inside an option are taken out too": (r"(^\s*|[:,]\s+)", "()")})


def longest_match(text: bytes, vocab: dict[int, bytes]) -> list[int]:
    """Encode by taking, at each place from the left, the longest token of the
    vocabulary (id -> bytes) that fits."""
    ids = {token: i for i, token in vocab.items()}
    found = []
    while text:
        length = next(n for n in range(len(text), 0, -1) if text[:n] in ids)
        found.append(ids[text[:length]])
        text = text[length:]
    return found


def _match(text: bytes) -> Case:
    return call(text=text, vocab={i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"he", 258: b"hen"})


PARTS["longest_match"] = Part("00_tokenizer", longest_match, lambda: {
    "then": _match(b"then"), "when": _match(b"when"), "the hen": _match(b"the hen"), "the empty text": _match(b"")}, {
    "the shortest token that fits is taken": ("range(len(text), 0, -1)", "range(1, len(text) + 1)"),
    "it goes on one byte later, whatever the token's length": ("text = text[length:]", "text = text[1:]"),
    "the tokens are listed, not their ids": ("ids[text[:length]]", "text[:length]"),
    "the text is read from its end": ("text[:n]", "text[-n:]", "text[:length]", "text[-length:]", "text[length:]",
        "text[:-length]", "return found", "return found[::-1]")})


class Tokenizer:
    r"""Encode text with the vocabulary (id -> bytes) and the merges of a byte-pair
    training, and decode ids.

    Special tokens that the vocabulary lacks get the ids after its largest one, in their
    order; the others keep theirs. `special_tokens` may be None. A text is cut at its
    special tokens first (where two of them fit, the longer one counts), then into
    pretokens by GPT-2's pattern
        '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    A pretoken starts as single bytes of UTF-8. The merges are made inside of pretokens,
    in the order of training: the earliest merge that fits, from left to right. Bytes
    that are no UTF-8 decode to U+FFFD (errors="replace")."""

    def __init__(self, vocab: dict[int, bytes], merges: list, special_tokens: list[str] | None = None):
        """Take the vocabulary, and the merges as pairs of tokens in the order of training."""
        self.special = sorted(special_tokens or [], key=len, reverse=True)
        self.bytes_of = dict(vocab)
        for name in [n for n in special_tokens or [] if n.encode() not in vocab.values()]:
            self.bytes_of[max(self.bytes_of) + 1] = name.encode()
        self.id_of = {token: i for i, token in self.bytes_of.items()}
        self.merges = merges

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids; the empty text has none."""
        ids = []
        cuts = "|".join(regex.escape(name) for name in self.special)
        for piece in regex.split(f"({cuts})", text) if self.special else [text]:
            if piece in self.special:
                ids.append(self.id_of[piece.encode()])
                continue
            pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            for word in regex.findall(pattern, piece):
                ids.extend(self.id_of[token] for token in self._merge([bytes([b]) for b in word.encode()]))
        return ids

    def _merge(self, tokens: list[bytes]) -> list[bytes]:
        for a, b in self.merges:
            i = 0
            while i + 1 < len(tokens):
                if tokens[i] == a and tokens[i + 1] == b:
                    tokens[i:i + 2] = [a + b]
                i += 1
        return tokens

    def encode_iterable(self, chunks: Iterable[str]) -> Iterator[int]:
        """Give the ids of a text that comes in chunks; wherever these are cut, the ids
        are those of the whole text."""
        yield from self.encode("".join(chunks))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a text again."""
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace")


def _encoder(special: list[str] | None, use: Callable[[Any], dict[str, Any]]) -> Case:
    pairs = "t+h h+e t+he s+h e+_ _+t _t+he _+e y+' 1+0 10+0 _+_ \xc3+\xa9"
    tokens = [tuple(pair.replace("_", " ").encode("latin-1").split(b"+")) for pair in pairs.split()]
    vocab = dict(enumerate([*(bytes([b]) for b in range(256)), *(a + b for a, b in tokens), b"<|old|>"]))
    return lambda make: use(make(dict(vocab), list(tokens), special))



def _texts(*texts: str, special: list[str] | None = None) -> Case:
    return _encoder(special, lambda tokenizer: {f"encode({text!r})": list(tokenizer.encode(text)) for text in texts} | {
        f"what decode makes of {text!r}": tokenizer.decode(list(tokenizer.encode(text))) for text in texts})


def _decoded(*ids: int) -> Case:
    return _encoder(None, lambda tokenizer: {f"decode({list(ids)})": tokenizer.decode(list(ids))})


def _streamed(*chunks: str) -> Case:
    return _encoder(["<|end|>"], lambda tokenizer: {
        f"encode_iterable({list(chunks)})": list(tokenizer.encode_iterable(iter(chunks)))})


PARTS["Tokenizer"] = Part("00_tokenizer", Tokenizer, lambda: {
    "one word": _texts("x", "the", "she"),
    "contractions, numbers and runs of spaces": _texts("they're", "100 10", "the   end  ", "a\n\n b"),
    "letters of several bytes": _texts("café naïve", "日本 🙂"),
    "a letter in two tokens, decoded together": _decoded(*"é🙂".encode()),
    "bytes that are no text": _decoded(104, 0xC3, 105),
    "special tokens": _texts("the<|end|>the", "<|end|>", special=["<|end|>"]),
    "characters that mean something in a pattern": _texts("the[x|y]the", "x", special=["[x|y]"]),
    "a stream cut in the middle of words": _streamed("the o", "ther the", "atre", "<|en", "d|>the")}, {
    "merges are made from left to right, not in the order of training": ("for a, b in self.merges:",
        "for a, b in [p for p in pairwise(tokens) if p in self.merges][:1]:", "        return tokens",
        "            return self._merge(tokens)\n        return tokens"),
    "characters are merged, not bytes": ("[bytes([b]) for b in word.encode()]", "[c.encode() for c in word]"),
    "each token is decoded by itself, so letters of several bytes break": (
        'b"".join(self.bytes_of[i] for i in ids).decode(errors="replace")',
        '"".join(self.bytes_of[i].decode(errors="replace") for i in ids)'),
    "special tokens are split like other text": (" if self.special else [text]", " if False else [text]"),
    "each chunk of a stream is encoded by itself": ('yield from self.encode("".join(chunks))',
        "for chunk in chunks:\n            yield from self.encode(chunk)")})


def train_bpe(input_path: str, vocab_size: int, special_tokens: list[str]) -> tuple[dict[int, bytes], list]:
    r"""Train byte-pair encoding on a text file (UTF-8, its line ends as they are);
    return vocabulary and merges.

    The text is cut at its special tokens, and what lies between them into pretokens by
    GPT-2's pattern
        '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    Pairs are counted inside of pretokens, as often as these occur. Each merge joins the
    most frequent pair everywhere, from left to right; of several, the greatest pair of
    byte strings (Python's max of tuples) wins. The vocabulary is id -> bytes: the 256
    bytes, a token a merge, then the special tokens, `vocab_size` in all. The merges are
    pairs of bytes in the order in which they were made."""
    pieces = [Path(input_path).read_bytes().decode()]
    for name in special_tokens:
        pieces = [part for piece in pieces for part in piece.split(name)]
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    words = Counter(word for piece in pieces for word in regex.findall(pattern, piece))
    cut = {word: [bytes([b]) for b in word.encode()] for word in words}  # word -> its tokens so far
    merges: list = []
    while 256 + len(merges) + len(special_tokens) < vocab_size:
        pairs: Counter = Counter()
        for word, n in words.items():
            for pair in pairwise(cut[word]):
                pairs[pair] += n
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        for word, tokens in cut.items():
            cut[word] = []
            for token in tokens:
                if cut[word] and (cut[word][-1], token) == merges[-1]:
                    cut[word][-1] += token
                else:
                    cut[word].append(token)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return dict(enumerate(tokens + [name.encode() for name in special_tokens])), merges


def _corpus(text: str, merges: int, *special: str) -> Case:
    def case(train: Callable) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.txt"
            path.write_text(text, encoding="utf-8", newline="")
            vocab, chosen = train(str(path), 256 + len(special) + merges, list(special))
        return {"the list of merges": [tuple(pair) for pair in chosen], "the vocabulary": vocab}
    return case


PARTS["train_bpe"] = Part("00_tokenizer", train_bpe, lambda: {
    "a tie": _corpus("ab cd", 1), "one merge builds on another": _corpus("low low low lower lower newest", 3),
    "a word that is repeated counts more": _corpus("xy xy xy xy ab abab", 2),
    "a tie between tokens of several bytes": _corpus("ab ab ab abz abz abc abc abq", 3),
    "a run of one letter": _corpus("aaaaa aaa", 2),
    "a special token": _corpus("<<|<|end|>a b<|end|>a b<|end|>", 2, "<|end|>"),
    "letters of several bytes": _corpus("éé éé éa 日日 日", 4),
    "two stories": _corpus("<|end|>".join(fables(2, SEED)), 30, "<|end|>")}, {
    "ties go to the smaller pair, not to the greater one": ("max(pairs, key=lambda pair: (pairs[pair], pair))",
        "min(pairs, key=lambda pair: (-pairs[pair], pair))"),
    "ties go to the pair that came first": ("(pairs[pair], pair))", "pairs[pair])"),
    "pairs are counted across pretokens": ("regex.findall(pattern, piece)", "[piece]"),
    "special tokens are merged like other text": ("in piece.split(name)", "in [piece]"),
    "the special tokens are missing in the vocabulary": (" + [name.encode() for name in special_tokens]", "")})


# 01: layers

class Linear(nn.Module):
    """Multiply the last axis of x (..., d_in) by a matrix: y = x W^T of shape (...,
    d_out), without a bias.

    The matrix is a parameter called `weight` of shape (d_out, d_in), drawn from N(0, 2
    / (d_in + d_out)) and cut off at 3 standard deviations."""
    # Hint: nn.init.trunc_normal_(tensor, mean, std, low, high) fills a tensor; std is the root of the variance.

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        std = math.sqrt(2 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


PARTS["Linear"] = Part("01_layers", Linear, lambda: {
    "one vector, 3 to 2": layer(Linear, 3, 2, x=normal(3)),
    "a batch of sequences": layer(Linear, 3, 2, x=normal(2, 4, 3)),
    "float64 stays float64": layer(Linear, 3, 2, x=normal(4, 3).double()),
    "fresh weights": fresh(Linear, 300, 100, std=200**-0.5)}, {
    "the weight is stored as (d_in, d_out), not as (d_out, d_in)": ("empty(d_out, d_in)", "empty(d_in, d_out)",
        "weight.T", "weight"), "the weight is not transposed (x @ W, not x @ W.T)": ("weight.T", "weight"),
    "fresh weights are drawn from N(0, 1)": ("math.sqrt(2 / (d_in + d_out))", "1.0"),
    "fresh weights are not cut off": ("trunc_normal_", "normal_", "std, -3 * std, 3 * std", "std")})


class Embedding(nn.Module):
    """Look up a vector for each id, whatever the shape (...) of `ids` (integers from
    0): the result is (..., D).

    The table is a parameter called `weight` of shape (num_embeddings, embedding_dim);
    row i belongs to id i. It is drawn from N(0, 1) and cut off at 3 standard
    deviations."""
    # Hint: a tensor can be indexed by a tensor of ids of any shape.

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        nn.init.trunc_normal_(self.weight, 0.0, 1.0, -3.0, 3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


PARTS["Embedding"] = Part("01_layers", Embedding, lambda: {
    "a batch of sequences": layer(Embedding, 5, 3, ids=torch.tensor([[1, 4], [3, 2]])),
    "the first id and the last": layer(Embedding, 5, 3, ids=torch.tensor([0, 4])),
    "an id that occurs twice": layer(Embedding, 5, 3, ids=torch.tensor([3, 1, 3])),
    "fresh vectors": fresh(Embedding, 300, 100)}, {
    "the table is stored as (embedding_dim, num_embeddings)": ("empty(num_embeddings, embedding_dim)",
        "empty(embedding_dim, num_embeddings)"),
    "the table is a plain tensor, not an nn.Parameter": ("nn.Parameter", ""),
    "ids are counted from 1": ("[ids]", "[ids - 1]"),
    "the result is cut off from the graph (.data, .detach() or no_grad)": ("weight[ids]", "weight.data[ids]")})


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then multiply it by a gain (Zhang and
    Sennrich 2019).

        y = x / sqrt(mean(x * x) + eps) * weight

    The mean runs over the last axis of x (..., D). The gain is a parameter called
    `weight` of shape (D), all ones at first. Half precision (float16, bfloat16) is computed in float32,
    and the result has the dtype of x."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if x.element_size() < 4 else x
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y.to(x.dtype)


PARTS["RMSNorm"] = Part("01_layers", RMSNorm, lambda: {
    "one vector": layer(RMSNorm, 8, x=normal(8)), "a fresh gain": lambda make: {"weight": make(4).weight.detach()},
    "a batch of sequences": layer(RMSNorm, 8, x=normal(2, 3, 8)), "eps = 0.5": layer(RMSNorm, 8, 0.5, x=normal(3, 8)),
    "numbers so small that the default epsilon counts": layer(RMSNorm, 8, x=normal(3, 8, scale=1e-3)),
    "float64 stays float64": layer(RMSNorm, 8, x=normal(3, 8).double()),
    "bfloat16 stays bfloat16": layer(RMSNorm, 8, x=normal(3, 8).bfloat16()),
    "float16, numbers in the thousands": layer(RMSNorm, 8, x=normal(3, 8, scale=2e3).half())}, {
    "epsilon is added outside the root": ("torch.sqrt(", "(torch.sqrt(", " + self.eps)", ") + self.eps)"),
    "epsilon is missing": (" + self.eps", ""),
    "the mean is subtracted first, as in LayerNorm": ("else x\n", "else x\n        y = y - y.mean(-1, keepdim=True)\n"),
    "the gain (`weight`) is missing": (" * self.weight", ""),
    "half precision is not lifted to float32, so the squares overflow": ("x.float() if", "x if")})


class SwiGLU(nn.Module):
    """Compute y = W2 (silu(W1 x) * W3 x), a feed-forward network with a gate (Shazeer
    2020); silu(a) = a * sigmoid(a).

    x has the shape (..., d_model), as the result. The three linear layers, without
    biases, are attributes called `w1`, `w2` and `w3`, each with a `weight`: (d_ff,
    d_model) for w1 and w3, (d_model, d_ff) for w2. Gradients stay finite for hidden
    values in the hundreds."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(d_model, d_ff), Linear(d_ff, d_model), Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w1(x), self.w3(x)
        return self.w2(a * torch.sigmoid(a) * b)


PARTS["SwiGLU"] = Part("01_layers", SwiGLU, lambda: {
    "a batch of sequences": layer(SwiGLU, 4, 6, x=normal(2, 3, 4)),
    "float64 stays float64": layer(SwiGLU, 4, 6, x=normal(3, 4).double()),
    "numbers in the hundreds": layer(SwiGLU, 4, 6, x=normal(3, 4, scale=200))}, {
    "w2 and w3 have exchanged shapes": ("self.w2, self.w3 =", "self.w3, self.w2 ="),
    "the gate is a sigmoid, not silu": ("a * torch.sigmoid(a)", "torch.sigmoid(a)"),
    "w3 is not used: there is no gate": ("(a) * b", "(a)"),
    "silu as x / (1 + exp(-x)) has no gradient where exp overflows": ("a * torch.sigmoid(a)", "a / (1 + (-a).exp())")})


def softmax(x: Tensor, dim: int) -> Tensor:
    """Turn scores into shares that sum to one along the axis `dim`: exp(x_i) / sum_j
    exp(x_j).

    The result has the shape and dtype of x. Scores around 1000 or -1000 must not
    overflow or vanish, also where one row lies far below another, and a score of minus
    infinity gets the share zero. x itself stays as it is."""
    shifted = x - x.max(dim, keepdim=True).values
    powers = torch.exp(shifted)
    return powers / powers.sum(dim, keepdim=True)


PARTS["softmax"] = Part("01_layers", softmax, lambda: {
    "three scores": call(x=torch.tensor([1.0, 2.0, 3.0]), dim=-1),
    "a matrix, along its rows": call(x=normal(2, 5), dim=-1),
    "a matrix, along its columns": call(x=normal(2, 5), dim=0),
    "scores around 1000": call(x=1000 + normal(2, 3), dim=-1),
    "one row far below the other": call(x=torch.tensor([[0.0, 1.0], [-1000.0, -1001.0]]), dim=-1),
    "a score of minus infinity": call(x=torch.tensor([-math.inf, 0.0, 1.0]), dim=-1),
    "bfloat16 stays bfloat16": call(x=normal(3).bfloat16(), dim=-1),
    "float64 stays float64": call(x=normal(3).double(), dim=-1)}, {
    "the maximum is not subtracted first, so exp overflows": ("x - x.max(dim, keepdim=True).values", "x"),
    "the maximum of the whole tensor is subtracted, not that along `dim`": (".max(dim, keepdim=True).values", ".max()"),
    "the sum runs over the last axis, whatever `dim` says": ("(dim, keepdim", "(-1, keepdim"),
    "the input is changed in place": ("shifted = x - ", "shifted = x.sub_(", "values\n", "values)\n")})


def layer_norm(x: Tensor) -> Tensor:
    """Subtract the mean over the last axis of x (..., D), then divide by the standard
    deviation; there are no gains.

    The variance is the mean of the squares (divided by D, not by D - 1), and the
    epsilon 1e-5 is added to it."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


PARTS["layer_norm"] = Part("01_layers", layer_norm, lambda: {
    "a batch of sequences": call(x=3 + normal(2, 5, 8)),
    "numbers so small that epsilon counts": call(x=normal(2, 8, scale=1e-3))}, {
    "the mean is not subtracted": ("x - x.mean(-1, keepdim=True)", "x"),
    "the mean runs over all axes, not over the last": ("x.mean(-1, keepdim=True)", "x.mean()"),
    "the variance divides by D - 1": ("square().mean(-1, keepdim=True)", "var(-1, keepdim=True)"),
    "epsilon is added outside the root": (" + 1e-5).sqrt()", ").sqrt().add(1e-5)")})


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """Take the logarithm of the softmax along the axis `dim`: x_i - log sum_j exp(x_j).

    The result has the shape and dtype of x. Scores around 1000 must not overflow, nor
    the logarithm of zero be taken, also where one row lies far below another."""
    shifted = x - x.max(dim, keepdim=True).values
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


PARTS["log_softmax"] = Part("01_layers", log_softmax, lambda: {
    "a matrix, along its rows": call(x=torch.tensor([[1.0, 2.0], [3.0, -4.0]]), dim=1),
    "along its columns": call(x=torch.tensor([[1.0, 2.0], [3.0, -4.0]]), dim=0),
    "a score of 1000": call(x=torch.tensor([1000.0, 0.0]), dim=0),
    "one row far below the other": call(x=torch.tensor([[0.0, 1.0], [-1000.0, -1001.0]]), dim=-1)}, {
    "the logarithm of a softmax that has become 0": ("shifted - shifted.exp().sum(dim, keepdim=True).log()",
        "(shifted.exp() / shifted.exp().sum(dim, keepdim=True)).log()"),
    "the maximum is not subtracted": ("x - x.max(dim, keepdim=True).values", "x"),
    "the maximum of the whole tensor is subtracted": ("x.max(dim, keepdim=True).values", "x.max()"),
    "`dim` is ignored": ("(dim, keepdim", "(-1, keepdim")})


# 02: rotary positions

class RotaryPositionalEmbedding(nn.Module):
    """Turn each pair of features by an angle that grows with the position (Su et al.
    2021).

    The pairs are neighbors, (x[2i], x[2i + 1]) for i = 0, 1, ..., d_k / 2 - 1. At
    position p (from 0), pair i turns counterclockwise by the angle a = p * theta^(-2i /
    d_k):
        (even, odd) -> (even cos a - odd sin a, even sin a + odd cos a)
    x has the shape (..., T, d_k), `token_positions` (T), integers below `max_seq_len`
    in any order. The result has the shape and dtype of x, each number in the place of
    the one that it replaces. There are no parameters."""

    angles: Tensor

    def __init__(self, theta: float, d_k: int, max_seq_len: int):
        super().__init__()
        speeds = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64) / d_k)
        self.register_buffer("angles", torch.arange(max_seq_len)[:, None] * speeds)

    def forward(self, x: Tensor, token_positions: Tensor) -> Tensor:
        angles = self.angles[token_positions]
        cos, sin = angles.cos(), angles.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return pairs.flatten(-2).to(x.dtype)


def _positions(*positions: int, d_k: int = 4, theta: float = 10_000.0, batch: tuple[int, ...] = ()) -> Case:
    x = normal(*batch, len(positions), d_k)
    return layer(RotaryPositionalEmbedding, theta, d_k, 64, x=x, token_positions=torch.tensor(positions))


PARTS["RoPE"] = Part("02_rope", RotaryPositionalEmbedding, lambda: {
    "position 0, where nothing turns": _positions(0), "position 1, a single pair": _positions(1, d_k=2),
    "positions 0 to 3, two pairs": _positions(0, 1, 2, 3), "positions in any order": _positions(5, 2, 9, 2),
    "a batch with heads": _positions(0, 1, 2, d_k=8, batch=(2, 3)),
    "bfloat16 stays bfloat16": layer(RotaryPositionalEmbedding, 10_000.0, 4, 64, x=normal(3, 4).bfloat16(),
        token_positions=torch.arange(3))}, {
    "the pairs are (i, i + d_k/2), the halves, and not (2i, 2i + 1)": ("x[..., 0::2], x[..., 1::2]", "x.chunk(2, -1)",
        "torch.stack", "torch.cat", ".flatten(-2)", ""),
    "it turns the wrong way: the signs of the sines are exchanged": ("angles.sin()", "-angles.sin()"),
    "the positions are counted from 1": ("[token_positions]", "[(token_positions + 1) % 64]"),
    "the positions given are ignored": ("[token_positions]", "[: x.shape[-2]]")})


def query_for_distance(key: Tensor, distance: int) -> Tensor:
    """Turn a key (K) into a query that scores highest against equal keys `distance`
    places before it.

    Both are turned by RoPE after that, each at its own position, with theta =
    10,000."""
    angles = rope_angles(torch.tensor(distance), len(key))
    return apply_rope(key, angles.cos(), -angles.sin())


def _looks_back(distance: int) -> Case:
    def case(answer: Callable) -> dict[str, Any]:
        key, angles = torch.tensor([1.0, 0.0] * 8), rope_angles(torch.arange(10), 16)
        turned = [apply_rope(x.expand(10, 16), angles.cos(), angles.sin()) for x in (key, answer(key, distance))]
        return {"the distance of the highest score": 9 - int((turned[0] @ turned[1][9]).argmax())}
    return case


PARTS["query_for_distance"] = Part("02_rope", query_for_distance, lambda: {
    f"{distance} places back": _looks_back(distance) for distance in (0, 3, 5, 8)}, {
    "the key is not turned": ("apply_rope(key, angles.cos(), -angles.sin())", "key"),
    "it is turned the wrong way and looks ahead": ("-angles.sin()", "angles.sin()"),
    "it looks one place too near": ("torch.tensor(distance)", "torch.tensor(max(0, distance - 1))"),
    "it is turned twice": ("torch.tensor(distance)", "torch.tensor(2 * distance)")})


# 03: the model

def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the values, weighted by how well their keys fit each query: softmax(q k^T
    / sqrt(K)) v.

    q has the shape (..., T, K), k and v (..., S, K), the result (..., T, K), in their
    dtype. `mask` (T, S), or with a batch before it, is bool: True means that a query
    may attend to a key, and the weights of those sum to one. A query that may attend to
    nothing gets zeros. Scores in the thousands must not overflow. The inputs and the
    mask stay as they are."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v


def _attend(*batch: int, keys: int = 3, mask: Any = None, scale: float = 1.0, dtype: Any = torch.float32) -> Case:
    q, k, v = (normal(*batch, n, 4, seed=i, scale=scale).to(dtype) for i, n in enumerate((3, keys, keys)))
    return call(q=q, k=k, v=v, mask=mask)


_CAUSAL, _NO_ZEROS = torch.ones(3, 3).tril().bool(), ("weights.masked_fill(~mask, 0.0)", "weights")
PARTS["attention"] = Part("03_model", scaled_dot_product_attention, lambda: {
    "no mask": _attend(), "a causal mask": _attend(mask=_CAUSAL),
    "a batch with heads, one mask for all": _attend(2, 2, mask=_CAUSAL),
    "a batch with heads, a mask for each sequence": _attend(2, 2, mask=torch.stack([_CAUSAL, _CAUSAL | True])[:, None]),
    "scores in the thousands": _attend(scale=50, mask=_CAUSAL),
    "scores in the thousands, all negative": call(q=normal(3, 4, scale=99).abs(), k=-normal(3, 4, seed=1,
        scale=99).abs(), v=normal(3, 4), mask=_CAUSAL),
    "bfloat16 stays bfloat16": torch.no_grad()(_attend(mask=_CAUSAL, dtype=torch.bfloat16)),
    "float64 stays float64": _attend(mask=_CAUSAL, dtype=torch.float64),
    "a query that may look at nothing": torch.no_grad()(_attend(mask=torch.eye(3).bool() & (torch.arange(3) != 1)))}, {
    "sqrt(d_k) is missing": (" / math.sqrt(q.shape[-1])", ""),
    "the scores are divided by d_k, not by its root": ("math.sqrt(q.shape[-1])", "q.shape[-1]"),
    "softmax runs over the queries, not over the keys": ("scores, -1", "scores, -2"),
    "the mask is inverted: True means may attend": (*_NO_ZEROS, "~mask", "mask"),
    "the mask is ignored": ("mask is not None", "False"),
    "masked scores are set to a number that is not low enough": (*_NO_ZEROS, "-math.inf", "-1e3"),
    "the mask comes after the softmax, so the weights no longer sum to one": (".masked_fill(~mask, -math.inf)", ""),
    "a row of -inf alone gives NaN: set masked weights to 0": _NO_ZEROS})


class MultiHeadSelfAttention(nn.Module):
    """Let every token of x (B, T, d_model) attend to itself and to what came before it,
    with `num_heads` heads side by side; the result has the shape of x.

    Queries, keys and values are `q_proj(x)`, `k_proj(x)` and `v_proj(x)`, four linear
    layers with `output_proj`, each without bias and with a `weight` (d_model, d_model).
    Head h works on the h-th piece of d_model / num_heads features. The heads' results
    stand side by side in the same order, and go through `output_proj`.

    `rope`, if given, is called as rope(q, token_positions), with q of shape (B, H, T,
    K), to turn queries and keys, not values. Positions (T) are 0, 1, ..., T - 1 where
    None are given.

    `cache`, if given, remembers the tokens before x: k, v = cache.append(k, v) takes
    new keys (turned) and values (B, H, T, K), and returns all S so far. Then the T
    queries are those of the last T positions."""
    # Hint: unflatten the last axis into (H, K) and exchange it with the axis of time; at the end the way back. A mask
    # of ones (T, S) with tril(S - T) is causal with a cache and without.

    def __init__(self, d_model: int, num_heads: int, rope: Any = None):
        super().__init__()
        self.num_heads, self.rope = num_heads, rope
        self.q_proj, self.k_proj = Linear(d_model, d_model), Linear(d_model, d_model)
        self.v_proj, self.output_proj = Linear(d_model, d_model), Linear(d_model, d_model)

    def forward(self, x: Tensor, token_positions: Tensor | None = None, cache: Any = None) -> Tensor:
        heads = (*x.shape[:-1], self.num_heads, -1)
        q, k, v = (proj(x).view(heads).transpose(-3, -2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            positions = torch.arange(x.shape[-2]) if token_positions is None else token_positions
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache is not None:
            k, v = cache.append(k, v)
        before = k.shape[-2] - q.shape[-2]
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(before)
        y = scaled_dot_product_attention(q, k, v, mask)
        return self.output_proj(y.transpose(-3, -2).flatten(-2))


def _rope(d_k: int = 4) -> nn.Module:
    return PARTS["RoPE"].book(10_000.0, d_k, 64)


def _pieces(make: type[nn.Module], *sizes: Any, layers: int = 0) -> Case:
    def use(module: nn.Module) -> dict[str, Any]:
        caches: Any = [KVCache(6) for _ in range(layers)] or KVCache(6)
        x = torch.arange(10).view(2, 5) if layers else normal(2, 5, 8)
        pieces = (module(x[:, a:b], torch.arange(a, b), caches) for a, b in pairwise((0, 2, 4, 5)))
        return {f"the output of piece {i}": y.detach() for i, y in enumerate(pieces)}
    return layer(make, *sizes, use=use, x=normal(1))


PARTS["MultiHeadSelfAttention"] = Part("03_model", MultiHeadSelfAttention, lambda: {
    "two heads": layer(MultiHeadSelfAttention, 8, 2, x=normal(1, 3, 8, scale=0.3)),
    "a batch, four heads": layer(MultiHeadSelfAttention, 8, 4, x=normal(2, 5, 8, scale=0.3)),
    "with RoPE": layer(MultiHeadSelfAttention, 8, 2, _rope(), x=normal(2, 5, 8, scale=0.3)),
    "in three pieces, with a cache": _pieces(MultiHeadSelfAttention, 8, 2, _rope())}, {
    "there is no causal mask": (".tril(before)", ""),
    "the features are cut into heads without exchanging the axes": (".view(heads).transpose(-3, -2) for",
        ".reshape(len(x), self.num_heads, x.shape[1], -1) for"),
    "the heads are not brought back behind the tokens": ("y.transpose(-3, -2).flatten(-2)", "y.reshape(x.shape)"),
    "RoPE turns the queries and not the keys": ("self.rope(k, positions)", "k"),
    "with a cache, the mask is that of the first T positions": ("tril(before)", "tril()")})


class TransformerBlock(nn.Module):
    """Add to the residual stream x (B, T, d_model) what attention finds, then what the
    feed-forward network makes of it:

        x = x + attn(ln1(x));  x = x + ffn(ln2(x))

    `ln1` and `ln2` are RMSNorms, `attn` is a MultiHeadSelfAttention with `num_heads`
    heads and the rope given, `ffn` a SwiGLU of hidden width `d_ff`; the config has
    d_model, num_heads and d_ff. Token positions and cache are passed on to attention."""
    # Hint: two lines in forward. What is added is computed from the normalized stream; the stream itself is not.

    def __init__(self, config: ModelConfig, rope: Any = None):
        super().__init__()
        self.ln1, self.ln2 = RMSNorm(config.d_model), RMSNorm(config.d_model)
        self.attn = MultiHeadSelfAttention(config.d_model, config.num_heads, rope)
        self.ffn = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x: Tensor, token_positions: Tensor | None = None, cache: Any = None) -> Tensor:
        x = x + self.attn(self.ln1(x), token_positions, cache)
        return x + self.ffn(self.ln2(x))


_SMALL = ModelConfig(vocab_size=11, context_length=16, d_model=8, num_layers=2, num_heads=2, d_ff=12)
PARTS["TransformerBlock"] = Part("03_model", TransformerBlock, lambda: {
    "two tokens": layer(TransformerBlock, _SMALL, x=normal(1, 2, 8)),
    "a batch of sequences": layer(TransformerBlock, _SMALL, x=normal(2, 4, 8)),
    "with RoPE, at other positions": layer(TransformerBlock, _SMALL, _rope(), x=normal(2, 3, 8),
        token_positions=torch.tensor([0, 4, 9])),
    "in three pieces, with a cache": _pieces(TransformerBlock, _SMALL, _rope())}, {
    "attention replaces the stream, and is not added to it": ("x = x + self.attn", "x = self.attn"),
    "the stream is normalized after each addition (post-norm)": ("x + self.attn(self.ln1(x), token_positions, cache)",
        "self.ln1(x + self.attn(x, token_positions, cache))", "x + self.ffn(self.ln2(x))", "self.ln2(x + self.ffn(x))"),
    "the feed-forward network reads the stream from before attention": ("        x = x + self", "        y = x + self",
        "return x +", "return y +"), "positions and cache are not passed on": (", token_positions, cache)\n", ")\n")})


class TransformerLM(nn.Module):
    """Turn ids (B, T) into logits (B, T, vocab_size), at each position for the token
    that comes next.

    `token_embeddings`, then the blocks in order (an nn.ModuleList called `layers`),
    then the RMSNorm `ln_final`, then the linear layer `lm_head`. There is one
    RotaryPositionalEmbedding(rope_theta, size of a head, context_length) for all. The
    config has vocab_size, context_length, d_model, num_layers, num_heads, d_ff and
    rope_theta. `caches`, if given, has a cache for each block."""
    # Hint: nn.ModuleList, not a list, or the blocks' parameters are not found.

    def __init__(self, config: ModelConfig):
        super().__init__()
        rope = RotaryPositionalEmbedding(config.rope_theta, config.d_model // config.num_heads, config.context_length)
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config, rope) for _ in range(config.num_layers))
        self.ln_final = RMSNorm(config.d_model)
        self.lm_head = Linear(config.d_model, config.vocab_size)

    def forward(self, ids: Tensor, token_positions: Tensor | None = None, caches: list | None = None) -> Tensor:
        x = self.token_embeddings(ids)
        for block, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = block(x, token_positions, cache)
        return self.lm_head(self.ln_final(x))



PARTS["TransformerLM"] = Part("03_model", TransformerLM, lambda: {
    "two tokens": layer(TransformerLM, _SMALL, ids=torch.tensor([[3, 5]])),
    "a batch of sequences": layer(TransformerLM, _SMALL, ids=torch.tensor([[1, 4, 9], [3, 0, 10]])),
    "at other positions": layer(TransformerLM, _SMALL, ids=torch.tensor([[1, 4, 9]]), token_positions=torch.tensor([0,
        5, 9])), "in three pieces, with caches": _pieces(TransformerLM, _SMALL, layers=2)}, {
    "the last norm is not used": ("self.lm_head(self.ln_final(x))", "self.lm_head(x)"),
    "the result is probabilities, not logits": ("self.lm_head(self.ln_final(x))",
        "self.lm_head(self.ln_final(x)).softmax(-1)"),
    "positions and caches are not passed on": ("block(x, token_positions, cache)", "block(x)"),
    "the blocks share their weights": ("TransformerBlock(config, rope) for _ in range(config.num_layers)",
        "[TransformerBlock(config, rope)] * config.num_layers")})


def multi_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with the queries of all heads (B, H, T, K) to keys and values (B, S, K)
    that the heads share.

    The result is softmax(q k^T / sqrt(K)) v of shape (B, H, T, K); `mask` (T, S), True:
    may attend."""
    scores = q @ k[:, None].mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v[:, None]


def _shared(batch: int, heads: int, mask: Tensor | None = None) -> Case:
    return call(q=normal(batch, heads, 3, 4), k=normal(batch, 3, 4, seed=1), v=normal(batch, 3, 4, seed=2), mask=mask)


PARTS["multi_query_attention"] = Part("03_model", multi_query_attention, lambda: {
    "two texts, three heads": _shared(2, 3), "as many texts as heads": _shared(2, 2),
    "a causal mask": _shared(2, 3, torch.ones(3, 3).tril().bool())}, {
    "the batch is taken for the heads: give k and v an axis in their place": ("k[:, None]", "k", "v[:, None]", "v"),
    "the mask is ignored": ("mask is not None", "False"),
    "the mask is inverted: True means may attend": ("~mask", "mask"),
    "the scores are divided by the root of H K, not of K": ("q.shape[-1]", "q.shape[-1] * q.shape[1]")})


def long_context(config: ModelConfig) -> int:
    """Find the first context length at which attention's scores and averages cost more
    than the blocks' matrices.

    Per token, a matrix of P numbers costs 2P operations; at context length T, scores
    and averages cost 4 T d_model a block. The matrices are those of attention and
    feed-forward network; the head does not count."""
    parts = parameter_table(config)
    return (parts["attention"] + parts["feed-forward"]) // (2 * config.num_layers * config.d_model) + 1


PARTS["long_context"] = Part("03_model", long_context, lambda: {
    "a small model": call(config=ModelConfig(d_model=64, num_heads=4, d_ff=192)),
    "the reference model": call(config=ModelConfig())}, {
    "the feed-forward network is left out": (' + parts["feed-forward"]', ""),
    "at this length the two are equal: one more is wanted": (" + 1", ""),
    "only the scores are counted, not the averages": ("(2 * config", "(1 * config"),
    "one block's attention is compared with all blocks' matrices": ("config.num_layers * ", "")})


# 04: loss and optimizer

def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the surprise at the targets, in nats: the mean over all positions of log
    sum_j exp(z_j) - z_target.

    logits z has the shape (..., V), targets (...), integers from 0; the result is a
    scalar of the dtype of the logits. Logits around 1000 must not overflow, also where
    one row lies far below another, and a target that seemed impossible must cost what
    it costs, not infinity."""
    shifted = logits - logits.max(-1, keepdim=True).values
    log_sum = shifted.exp().sum(-1).log()
    right = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (log_sum - right).mean()


PARTS["cross_entropy"] = Part("04_optim", cross_entropy, lambda: {
    "one position": call(logits=torch.tensor([[1.0, 2.0, 0.5]]), targets=torch.tensor([1])),
    "a batch of sequences": call(logits=normal(2, 3, 5), targets=torch.tensor([[3, 0, 4], [4, 1, 1]])),
    "logits around 1000": call(logits=1000 + normal(2, 3), targets=torch.tensor([0, 2])),
    "a target that seemed impossible": call(logits=torch.tensor([[0.0, 200.0]]), targets=torch.tensor([0])),
    "one row far below the other": call(logits=torch.tensor([[0.0, 1.0], [-1000.0, -1001.0]]), targets=torch.tensor([0,
        1])), "float64 stays float64": call(logits=normal(2, 3).double(), targets=torch.tensor([0, 2]))}, {
    "the losses are summed, not averaged": (".mean()", ".sum()"),
    "softmax is applied twice: the argument is logits": ("    shifted", "    logits = logits.softmax(-1)\n    shifted"),
    "the maximum is not subtracted first, so exp overflows": ("logits - logits.max(-1, keepdim=True).values", "logits"),
    "the maximum of the whole tensor is subtracted, not that of each row": (".max(-1, keepdim=True).values", ".max()")})


def cosine_lr(step: int, max_lr: float, min_lr: float, warmup_iters: int, cosine_cycle_iters: int) -> float:
    """Compute the learning rate of a step t: a linear warm-up, then half a cosine.

    t < warmup_iters: max_lr * t / warmup_iters. Up to cosine_cycle_iters, in which the
    warm-up is included: min_lr + (max_lr - min_lr) * (1 + cos(pi * s)) / 2, where the
    share s rises from 0 at warmup_iters to 1 at cosine_cycle_iters. After that: min_lr.
    warmup_iters = 0 means no warm-up."""
    if step < warmup_iters:
        return max_lr * step / warmup_iters
    if step > cosine_cycle_iters:
        return min_lr
    share = (step - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


def _rates(*steps: int, warmup: int = 10) -> Case:
    return lambda schedule: {f"the rate of step {t}": schedule(t, 1.0, 0.1, warmup, 50) for t in steps}


PARTS["cosine_lr"] = Part("04_optim", cosine_lr, lambda: {
    "during the warm-up": _rates(0, 1, 5, 9), "at the end of the warm-up": _rates(10, 11), "halfway down": _rates(30),
    "at cosine_cycle_iters and after it": _rates(50, 51, 70, 1000), "without a warm-up": _rates(0, 1, 25, warmup=0)}, {
    "the warm-up is one step ahead: (step + 1) / warmup_iters": ("* step", "* (step + 1)"),
    "warmup_iters = 0 divides by zero": ("    if step <", "    rise = step / warmup_iters\n    if step <"),
    "the cosine starts at step 0, not after the warm-up": ("(step - warmup_iters) / (cosine_cycle_iters - warmup_iters)",
        "step / cosine_cycle_iters"),
    "after cosine_cycle_iters the rate rises again": ("step > cosine_cycle_iters", "False")})


def clip_grad_norm(params: Iterable[Tensor], max_l2_norm: float) -> Tensor | float:
    """Scale all gradients together, in place, if their joint L2 norm exceeds
    `max_l2_norm`; return that norm.

    It is the norm before scaling. The factor is max_l2_norm / (norm + 1e-6), never
    above 1. `params` may be a generator, which can be read once only; parameters whose
    `.grad` is None are passed over. Gradients keep their dtype."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    if norm > max_l2_norm:
        for g in grads:
            g *= max_l2_norm / (norm + 1e-6)
    return norm


def _clip(*gradients: list[float] | None, limit: float = 1.0, once: bool = False, dtype: Any = torch.float32) -> Case:
    def case(clip: Callable) -> dict[str, Any]:
        params = [nn.Parameter(torch.zeros(len(g or [0.0]), dtype=dtype)) for g in gradients]
        for p, g in zip(params, gradients, strict=True):
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
        norm = clip(iter(params) if once else params, limit)
        results = {"the norm": float(norm) if isinstance(norm, Tensor) and norm.numel() == 1 else norm}
        return results | {f"gradient {i}": p.grad for i, p in enumerate(params) if p.grad is not None}
    return case


PARTS["clip_grad_norm"] = Part("04_optim", clip_grad_norm, lambda: {
    "one long gradient": _clip([3.0, 4.0]), "a gradient below the limit": _clip([0.3, 0.4]),
    "two parameters": _clip([3.0, 0.0], [0.0, 4.0]), "one of them below the limit by itself": _clip([0.5], [12.0]),
    "a parameter without a gradient": _clip([3.0], None, [4.0]),
    "a gradient as small as the epsilon 1e-6": _clip([3e-6, 4e-6], limit=1e-6),
    "float64 stays float64": _clip([3.0, 4.0], [12.0], dtype=torch.float64),
    "the parameters come from a generator": _clip([3.0], [4.0], once=True)}, {
    "gradients below the limit are scaled up": ("norm > max_l2_norm", "True"),
    "each tensor is clipped by its own norm, not all by their joint one": ("norm > max_l2_norm", "True",
        "max_l2_norm / (norm + 1e-6)", "min(1, max_l2_norm / (float(g.norm()) + 1e-6))"),
    "a parameter without a gradient is not skipped": (" if p.grad is not None", ""),
    "the epsilon 1e-6 in the denominator, as in PyTorch, is missing": (" + 1e-6", ""),
    "the parameters are read twice, but a generator gives them once": ("for g in grads:",
        "for g in [p.grad for p in params if p.grad is not None]:")})


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017), a subclass of
    torch.optim.Optimizer.

    Per step t = 1, 2, ... and parameter p with gradient g, in this order:
        p <- p - lr * weight_decay * p
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g * g
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    m and v start at zero and belong to the parameter. Parameters whose `.grad` is None
    stay as they are. The rate is read from `group["lr"]` at each step, since a schedule
    changes it there. Parameters keep their dtype."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad, self.state[p]
                t = state.get("t", 0) + 1
                m = b1 * state.get("m", 0.0) + (1 - b1) * g
                v = b2 * state.get("v", 0.0) + (1 - b2) * g * g
                self.state[p] = {"t": t, "m": m, "v": v}
                p -= lr * decay * p
                p -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def _steps(*shapes: tuple[int, ...], num: int = 1, rates: Any = (), dtype: Any = None, **settings: Any) -> Case:
    def case(make: Callable) -> dict[str, Any]:
        params = [nn.Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate([*shapes, (2, 2)])]
        optimizer, results = make(params, lr=0.1, **settings), dict[str, Any]()
        for step in range(num):
            for group in optimizer.param_groups:
                group["lr"] = rates[step] if rates else 0.1
            for i, p in enumerate(params[:-1]):  # the last has no gradient
                p.grad = normal(*p.shape, seed=10 * step + i + 5).to(dtype)
            optimizer.step()
            results |= {f"parameter {i} after step {step + 1}": p.detach().clone() for i, p in enumerate(params)}
        return results
    return case


def _adam(num: int = 3, **settings: Any) -> Case:
    return _steps((3,), (2, 2), num=num, **{"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0} | settings)


_DECAY = "                p -= lr * decay * p\n"
PARTS["AdamW"] = Part("04_optim", AdamW, lambda: {
    "one step": _adam(1), "three steps": _adam(), "weight decay": _adam(weight_decay=0.1),
    "an epsilon of 1": _adam(eps=1.0), "a learning rate that changes": _adam(rates=(0.1, 0.05, 0.01)),
    "float64 stays float64": _adam(weight_decay=0.1, dtype=torch.float64),
    "bfloat16 stays bfloat16": _adam(weight_decay=0.1, dtype=torch.bfloat16)}, {
    "there is no bias correction": ("(m / (1 - b1**t))", "m", "(v / (1 - b2**t))", "v"),
    "epsilon is inside the root": ("((v / (1 - b2**t)).sqrt() + eps)", "(v / (1 - b2**t) + eps).sqrt()"),
    "the decay is not multiplied by the learning rate": ("lr * decay", "decay"),
    "the decay is added to the gradient (L2, as in Adam), not taken off the weight": (_DECAY, "", "g, state = p.grad,",
        "g, state = p.grad + decay * p,"),
    "the decay comes after the step, not before it as here and in PyTorch (both are in use)": (_DECAY, "", "+ eps)\n",
        "+ eps)\n" + _DECAY),
    "the rate is that of the start: read it from `param_groups`": ('lr, eps, decay = group["lr"]',
        "lr, eps, decay = self.lr", "        super()", "        self.lr = lr; super()")})


def smooth_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Average the cross-entropy against smoothed targets, in nats: the share
    `smoothing` is spread evenly over all V tokens (the target among them), and the rest
    is on the target.

    logits have the shape (N, V), targets (N); the result is a scalar."""
    log_probs = logits.log_softmax(-1)
    hit = log_probs.gather(-1, targets[..., None])[..., 0]
    return -((1 - smoothing) * hit + smoothing * log_probs.mean(-1)).mean()


PARTS["smooth_cross_entropy"] = Part("04_optim", smooth_cross_entropy, lambda: {
    f"smoothing {s}": call(logits=normal(6, 5), targets=torch.arange(6) % 5, smoothing=s) for s in (0.0, 0.1, 0.5)}, {
    "nothing is spread over the other tokens": (" + smoothing * log_probs.mean(-1)", ""),
    "a constant is added": ("log_probs.mean(-1)", "(hit - math.log(logits.shape[-1]))"),
    "the target gets no part of the spread": ("log_probs.mean(-1)", "(log_probs.sum(-1) - hit) / (len(logits.T) - 1)"),
    "the two shares are exchanged": ("(1 - smoothing) * hit + smoothing *", "smoothing * hit + (1 - smoothing) *")})


def warmup_factor(step: int, beta1: float, beta2: float) -> float:
    """Find what the rate of a step (counted from 1) must be multiplied by to replace
    both of Adam's bias corrections.

    Without them, m is too small by 1 - beta1^step, and the root of v by the root of 1 -
    beta2^step."""
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)


PARTS["warmup_factor"] = Part("04_optim", warmup_factor, lambda: {
    f"step {step}": call(step=step, beta1=0.9, beta2=0.99) for step in (1, 2, 10, 1000)}, {
    "the root is missing": ("math.sqrt", ""),
    "only the first moment's correction is replaced": ("math.sqrt(1 - beta2**step)", "1"),
    "steps are counted from 0": ("**step", "**(step - 1)"),
    "the betas are exchanged": ("beta2**", "beta**", "beta1**", "beta2**", "beta**", "beta1**")})


# 05: training, saving

def gradients_in_halves(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Leave in `.grad` the gradient of a batch's mean loss, computed from its two
    halves; return that loss as a number.

    x and y have the shape (B, T); with an odd number of rows, the first half is the
    larger one. The model gives logits (B, T, V), and the loss is the cross-entropy,
    averaged over all tokens of the batch. Gradients from before do not count."""
    model.zero_grad()
    total = 0.0
    for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
        loss = F.cross_entropy(model(half_x).flatten(0, 1), half_y.flatten()) * len(half_x) / len(x)
        loss.backward()
        total += loss.item()
    return total


def _halves(rows: int) -> Case:
    def case(answer: Callable) -> dict[str, Any]:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
        for i, p in enumerate(model.parameters()):
            p.data, p.grad = normal(*p.shape, seed=i), torch.ones(p.shape)
        x = torch.arange(7 * rows).reshape(rows, 7)
        loss = answer(model, x % 7, x % 5)
        return {"the loss": loss} | {f"the gradient of {name}": p.grad for name, p in model.named_parameters()}
    return case


PARTS["gradients_in_halves"] = Part("05_train", gradients_in_halves, lambda: {
    "four rows": _halves(4), "three rows, so that the halves differ in size": _halves(3)}, {
    "the gradients are added, but not divided by the number of halves": (" * len(half_x) / len(x)", ""),
    "both halves weigh the same, whatever their size": ("len(half_x) / len(x)", "0.5"),
    "the gradient of the first half is lost": ("        loss =", "        model.zero_grad()\n        loss ="),
    "gradients from before are not cleared": ("    model.zero_grad()\n", "")})


class Checkpoint:
    """Save all that a training run needs to go on, and load it.

    Model and optimizer have state_dict() and load_state_dict(). How the file looks is
    free. After loading, training goes on as if it had never stopped."""
    # Hint: torch.save writes a dict of state dicts, torch.load reads it.

    @staticmethod
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: str) -> None:
        """Write a checkpoint after `iteration` steps to the path `out`."""
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}, out)

    @staticmethod
    def load(src: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Give model and optimizer what was saved, and return the iteration."""
        saved = torch.load(src)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["iteration"]


def _go_on(steps: int, **settings: Any) -> Case:
    def begin(seed: int, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        for i, p in enumerate(model.parameters()):
            p.data = normal(*p.shape, seed=seed + i)
        return model, torch.optim.AdamW(model.parameters(), **settings)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(normal(4, 3, seed=seed)).square().mean().backward()
        optimizer.step()

    def case(answer: Any) -> dict[str, Any]:
        old, new = begin(0, **settings), begin(10)
        for i in range(steps):
            step(*old, i)
        with tempfile.TemporaryDirectory() as folder:
            answer.save(*old, steps, f"{folder}/checkpoint")
            step(*old, 77)  # what comes after must not change what was saved
            results = {"the iteration": answer.load(f"{folder}/checkpoint", *new)}
        results |= {f"after loading, {name}": x.clone() for name, x in new[0].state_dict().items()}
        step(*new, 88)
        return results | {f"a step later, {name}": x.clone() for name, x in new[0].state_dict().items()}
    return case


PARTS["Checkpoint"] = Part("05_train", Checkpoint, lambda: {
    "before the first step": _go_on(0), "after three steps": _go_on(3),
    "with other settings": _go_on(2, lr=0.1, betas=(0.8, 0.9))}, {
    "the weights are not loaded": ('model.load_state_dict(saved["model"])', "pass"),
    "the optimizer's state is not loaded": ('optimizer.load_state_dict(saved["optimizer"])', "pass"),
    "the optimizer is loaded, but without its settings": ('optimizer.load_state_dict(saved["optimizer"])',
        'optimizer.load_state_dict(saved["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})'),
    "the parameters are saved, but not the buffers": ("model.state_dict()", "dict(model.named_parameters())",
        'saved["model"])', 'saved["model"], strict=False)')})



# 06: ablations

def seeds_needed(deviation: float, difference: float) -> int:
    """Find the fewest seeds (at least 2) whose 95% interval of Student is narrower than
    `difference` on either side.

    `deviation` is the standard deviation of the paired differences. With n seeds, half
    the width of the interval is t * deviation / sqrt(n), where t = t_quantile(0.95, n -
    1) is Student's factor for n - 1 degrees of freedom."""
    from tinylm.ablations import t_quantile

    seeds = 2
    while t_quantile(0.95, seeds - 1) * deviation / math.sqrt(seeds) >= difference:
        seeds += 1
    return seeds


PARTS["seeds_needed"] = Part("06_ablations", seeds_needed, lambda: {
    "a difference that is large": call(deviation=0.001, difference=0.1),
    "a deviation of 0.0053, a difference of 0.011": call(deviation=0.0053, difference=0.011),
    "a difference as small as the deviation": call(deviation=0.01, difference=0.01),
    "a difference smaller than the deviation": call(deviation=0.03, difference=0.01)}, {
    "Student's factor is that of infinitely many seeds, 1.96": ("t_quantile(0.95, seeds - 1)", "1.96"),
    "the degrees of freedom are the seeds, not one less": ("seeds - 1)", "seeds)"),
    "the deviation is not divided by the root of the number of seeds": (" / math.sqrt(seeds) >=", " * (seeds < 99) >="),
    "the whole interval is compared, not its half": (">= difference", ">= difference / 2")})



# 07: generation

class KVCache:
    """Remember the keys and values of one attention layer, with room for `capacity`
    positions."""
    # Hint: torch.cat along the axis of time will do; memory that is made once for all positions is faster.

    def __init__(self, capacity: int):
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T new positions (B, H, T, K); return all S so far (B, H, S, K)."""
        if self.keys.numel():
            k, v = torch.cat([self.keys, k], -2), torch.cat([self.values, v], -2)
        self.keys, self.values = k, v
        return k, v


def _appended(*lengths: int) -> Case:
    def case(make: Callable) -> dict[str, Any]:
        cache, results = make(sum(lengths)), dict[str, Any]()
        for i, n in enumerate(lengths):
            k, v = cache.append(normal(2, 3, n, 4, seed=i), normal(2, 3, n, 4, seed=10 + i))
            results |= {f"keys, call {i}": k.clone(), f"values, call {i}": v.clone()}
        return results
    return case


PARTS["KVCache"] = Part("07_generate", KVCache, lambda: {
    "one call": _appended(3), "token by token": _appended(1, 1, 1), "pieces of all lengths": _appended(4, 1, 3)}, {
    "only the new ones are returned": ("[self.keys, k]", "[k]", "[self.values, v]", "[v]"),
    "the new ones are put before the old ones": ("[self.keys, k]", "[k, self.keys]", "[self.values, v]",
        "[v, self.values]"), "the values are those of the last call alone": ("torch.cat([self.values, v], -2)", "v"),
    "they are laid side by side along the wrong axis": ("k], -2)", "k], 0)", "v], -2)", "v], 0)")})


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Turn logits (B, V) into probabilities softmax(logits / temperature), float32.

    At temperature 0 the largest logit of each row gets the probability 1. Temperatures
    as low as 0.001 must not overflow."""
    # Hint: zero is a case of its own; for the rest, a softmax that subtracts the maximum first is enough.
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return softmax(logits / temperature, -1)


PARTS["temper"] = Part("07_generate", temper, lambda: {
    f"temperature {t}": torch.no_grad()(call(logits=3 * normal(2, 5), temperature=t)) for t in (1.0, 0.5, 2.0, 0.001,
        0)}, {
    "the logits are multiplied by the temperature": ("logits / temp", "logits * temp"),
    "the probabilities are divided by the temperature": ("softmax(logits / temperature, -1)",
        "softmax(logits, -1) / temperature"),
    "temperature 0 divides by zero": ("    if temp", "    scaled = 1 / temperature\n    if temp"),
    "exp overflows at low temperatures": ("softmax(logits / temperature, -1)",
        "(logits / temperature).exp() / (logits / temperature).exp().sum(-1, True)")})


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Keep, in each row of probs (B, V), the smallest set of most probable tokens that
    holds at least p (0 < p <= 1); the others get zero, and the rows sum to 1 again."""
    # Hint: sort downwards and take the running sum. A token is kept if the sum *before* it is less than p.
    ranked, order = probs.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.zeros_like(probs).scatter(-1, order, ranked * (before < p))
    return kept / kept.sum(-1, keepdim=True)


PARTS["keep_top_p"] = Part("07_generate", keep_top_p, lambda: {
    f"p = {p}": torch.no_grad()(call(probs=torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.85, 0.05, 0.07, 0.03]]),
        p=p)) for p in (0.6, 0.9, 0.05, 0.98)}, {
    "the rows no longer sum to 1": ("kept / kept.sum(-1, keepdim=True)", "kept"),
    "the token that crosses p is dropped": ("before < p", "before + ranked <= p"),
    "the tokens are not put back in their places": ("torch.zeros_like(probs).scatter(-1, order, ranked * (before < p))",
        "ranked * (before < p)"), "single tokens are compared with p, not running sums": ("before < p", "ranked >= p")})


def generate(model, prompt_ids: list[int], max_new_tokens: int, *, temperature=1.0, top_p=None, stop_id=None, seed=0):
    """Continue a prompt, token by token; return the new ids alone.

    model(ids, token_positions, caches) gives logits (1, T, V) for ids (1, T), and needs
    to read each token once: `caches` has a KVCache for each of `model.layers`. The
    logits of the last position become probabilities by temperature, then by top_p
    unless it is None. To draw, take u = torch.rand(1, generator=g,
    dtype=torch.float64), where g = torch.Generator().manual_seed(seed), once a token:
    the token is the first whose running sum of probabilities is above u.

    It ends after `max_new_tokens`, or at `stop_id`, which is not returned. Prompt and
    new tokens fit in the context."""
    # Hint: read the whole prompt first, then in each round only the token that was just chosen, at its position.
    g = torch.Generator().manual_seed(seed)
    caches = [KVCache(len(prompt_ids) + max_new_tokens) for _ in model.layers]
    ids, read = list(prompt_ids), 0
    while len(ids) < len(prompt_ids) + max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids[read:]]), torch.arange(read, len(ids)), caches)[:, -1]
        probs = temper(logits, temperature)
        probs = probs if top_p is None else keep_top_p(probs, top_p)
        u = torch.rand(1, generator=g, dtype=torch.float64)
        sums = probs[0].double().cumsum(-1)
        chosen = int((sums <= u * sums[-1]).sum())
        if chosen == stop_id:
            break
        read = len(ids)
        ids.append(chosen)
    return ids[len(prompt_ids):]


def _continued(*prompt: int, num: int = 8, **choice: Any) -> Case:
    def case(answer: Callable) -> dict[str, Any]:
        model = PARTS["TransformerLM"].book(_SMALL, seed=SEED)
        model.lm_head.weight.data *= 4
        return {"the list of new ids": answer(model, list(prompt), num, **choice)}
    return case


PARTS["generate"] = Part("07_generate", generate, lambda: {
    "one token, greedily": _continued(1, 4, 9, num=1, temperature=0.0),
    "eight tokens, greedily": _continued(1, 4, 9, temperature=0.0), "eight draws": _continued(3, 2),
    "other seeds": _continued(5, seed=3), "a temperature of 3": _continued(5, 3, temperature=3.0),
    "top_p = 0.3": _continued(5, 3, top_p=0.3, temperature=2.0),
    "a token that ends it": lambda answer: {f"the list up to {i}": _continued(7,
        stop_id=i)(answer)["the list of new ids"] for i in range(11)}, "no token at all": _continued(2, num=0)}, {
    "the prompt is returned too": ("return ids[len(prompt_ids):]", "return ids"),
    "the logits of the first position are used": ("[:, -1]", "[:, 0]"),
    "positions begin at 0 for every token": ("torch.arange(read, len(ids))", "torch.arange(len(ids) - read)"),
    "the seed is ignored": ("manual_seed(seed)", "manual_seed(0)"),
    "stop_id is ignored": ("chosen == stop_id", "False")})


def keep_min_p(probs: Tensor, share: float) -> Tensor:
    """Keep, in each row of probs (..., V), tokens at least `share` times as probable as
    the row's likeliest.

    The others get zero, and each row sums to one again (Nguyen et al. 2024)."""
    kept = probs * (probs >= share * probs.max(-1, keepdim=True).values)
    return kept / kept.sum(-1, keepdim=True)


PARTS["keep_min_p"] = Part("07_generate", keep_min_p, lambda: {
    f"share {share}": call(probs=torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.85, 0.05]]), share=share) for share in (0.5,
        1.0, 0.0)}, {
    "the rows no longer sum to 1": ("kept / kept.sum(-1, keepdim=True)", "kept"),
    "the threshold is absolute, not a share of the highest": ("share * probs.max(-1, keepdim=True).values", "share"),
    "the highest is that of all rows": ("probs.max(-1, keepdim=True).values", "probs.max()"),
    "a token exactly at the threshold is dropped": (">=", ">")})


def entropy(probs: Tensor) -> Tensor:
    """Find the entropy of each distribution in nats: the sum over V of -p ln p, for
    probs (..., V).

    A token that never comes adds nothing: 0 ln 0 counts as 0."""
    return -torch.xlogy(probs, probs).sum(-1)


PARTS["entropy"] = Part("07_generate", entropy, lambda: {
    "four tokens, equally likely": call(probs=torch.full((4,), 0.25)),
    "two rows": call(probs=torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.85, 0.05]])),
    "a token that never comes": torch.no_grad()(call(probs=torch.tensor([0.5, 0.5, 0.0])))}, {
    "0 ln 0 must count as 0": ("torch.xlogy(probs, probs)", "(probs * probs.log())"),
    "the sign is missing": ("-torch", "torch"), "the logarithm has base 2": (".sum(-1)", ".sum(-1) / math.log(2)"),
    "the surprises are averaged, not weighed": ("torch.xlogy(probs, probs).sum", "probs.log().mean")})


# 08: export

def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a matrix (R, C) into whole numbers of int8, from -127 to 127, and one scale
    (R) for each row.

    The scale is the row's largest magnitude / 127, and a number is the weight / scale,
    rounded to the nearest. A row of zeros gives zeros and the scale zero."""
    scales = weight.abs().amax(-1) / 127
    return (weight / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8), scales



PARTS["quantize_rows"] = Part("08_export", quantize_rows, lambda: {
    "one row": call(weight=torch.tensor([[1.27, -0.5, 0.014]])),
    "rows of different size": call(weight=normal(3, 5) * torch.tensor([[1.0], [10.0], [0.1]])),
    "a row of zeros": call(weight=torch.zeros(1, 3))}, {
    "the numbers are cut off, not rounded": (".round()", ""),
    "there is one scale for all rows": (".amax(-1)", ".amax(-1).max().expand(len(weight))"),
    "the largest number is taken without its magnitude": (".abs()", ""),
    "the numbers are whole, but not of type int8": (".to(torch.int8)", "")})


def half_split_matrix(head_size: int) -> Tensor:
    """Build the matrix (K, K) that takes feature 2i of a head to place i, and feature
    2i + 1 to place i + K/2.

    As float32, to be multiplied from the left: (P @ x)[i] = x[2i]."""
    return torch.eye(head_size)[[*range(0, head_size, 2), *range(1, head_size, 2)]]


PARTS["half_split_matrix"] = Part("08_export", half_split_matrix, lambda: {
    f"a head of size {size}": call(head_size=size) for size in (2, 4, 8)}, {
    "it leads the other way: the matrix is transposed": ("2)]]", "2)]].T"),
    "the odd features come first": ("range(0, head_size, 2), *range(1,", "range(1, head_size, 2), *range(0,"),
    "neighbors change places": ("*range(0, head_size, 2), *range(1, head_size, 2)", "i ^ 1 for i in range(head_size)"),
    "nothing changes its place": ("[[*range(0, head_size, 2), *range(1, head_size, 2)]]", "")})


# 10: several processes

def whole_gradient(gradients: list[Tensor], rows: list[int]) -> Tensor:
    """Combine the gradients of the processes' mean losses into the gradient of the mean
    loss of the whole batch.

    `rows` are the numbers of rows that the processes had; one of them may be 0."""
    return torch.stack([g * n for g, n in zip(gradients, rows, strict=True)]).sum(0) / sum(rows)


PARTS["whole_gradient"] = Part("10_distributed", whole_gradient, lambda: {
    "equal shares": call(gradients=list(normal(2, 5)), rows=[4, 4]),
    "shares of 3, 3 and 2 rows": call(gradients=list(normal(3, 5)), rows=[3, 3, 2]),
    "a process without a row": call(gradients=list(normal(2, 5)), rows=[8, 0])}, {
    "every share counts the same": ("g * n for", "g for", "sum(rows)", "len(rows)"),
    "the gradients are added up, not averaged": ("g * n for", "g for", " / sum(rows)", ""),
    "the sum is divided by the number of processes, not of rows": ("/ sum(rows)", "/ len(rows)"),
    "the sum over all rows is not divided by their number": (" / sum(rows)", "")})


# 12: a better recipe

class Muon(torch.optim.Optimizer):
    """Update matrices (R, C) by their momentum, made orthogonal (Jordan et al. 2024); a
    subclass of torch.optim.Optimizer.

    Per step and parameter with gradient g, where mu is `momentum` and m starts at zero:
        m <- mu * m + (1 - mu) * g
        x <- mu * m + (1 - mu) * g         (Nesterov looks ahead)
        x <- x / ||x||, the root of the sum of its squares, at least 1e-7
        five times: a = x x^T;  x <- 3.4445 x + (-4.7750 a + 2.0315 a a) x
        p <- p - lr * sqrt(max(1, R / C)) * x
    Of a matrix with R > C, x is transposed for the five steps, so that a is the smaller
    square. Parameters whose `.grad` is None stay as they are. The rate is read from
    `group["lr"]` at each step."""
    # Hint: it is AdamW's frame with another rule: the moments in self.state[p], the settings in self.param_groups.

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p]["m"] = mu * self.state[p].get("m", 0.0) + (1 - mu) * p.grad
                x = mu * m + (1 - mu) * p.grad
                tall = len(x) > len(x.T)
                x = x.T if tall else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p -= group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5 * (x.T if tall else x)



PARTS["Muon"] = Part("12_recipe", Muon, lambda: {
    "a square matrix": _steps((3, 3)), "a wide one": _steps((2, 4)), "a tall one": _steps((4, 2)),
    "three steps": _steps((3, 3), (2, 3), num=3), "a rate that changes": _steps((3, 3), num=2, rates=(0.1, 0.01))}, {
    "the matrix is not made orthogonal": ("range(5)", "range(0)"),
    "the step of tall matrices is not longer": ("max(1, p.shape[0] / p.shape[1])", "1"),
    "it does not look ahead: x is m": ("x = mu * m + (1 - mu) * p.grad", "x = m"),
    "the momentum is forgotten between steps": ('self.state[p].get("m", 0.0)', "0.0")})
