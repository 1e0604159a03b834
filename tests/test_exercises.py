"""The table of `tinylm.exercises`: each plain answer and the book's own part pass, each planted mistake is named."""
import ast
import re

import pytest

from tinylm.check import Wrong, _attempt, check, difference, stub
from tinylm.core import InputError
from tinylm.exercises import PARTS


def complaint(name, answer):
    with pytest.raises(Wrong) as caught:
        check(name, answer)
    return str(caught.value)


@pytest.mark.parametrize("name", PARTS)
def test_the_plain_answer_and_the_books_own_part_pass(name, capsys):
    check(name, PARTS[name].answer)
    check(name, PARTS[name].book)
    assert capsys.readouterr().out == f"{name}: agrees with the book's in all {len(PARTS[name].cases)} cases\n" * 2


@pytest.mark.parametrize("name", PARTS)
def test_each_planted_mistake_differs_from_the_answer_and_from_all_others(name):
    part = PARTS[name]
    answers = {"": part.answer} | {words: part.wrong(words) for words in part.mistakes}
    results = {words: [_attempt(case, answer) for case in part.cases.values()] for words, answer in answers.items()}
    for words, mine in results.items():
        assert [other for other, theirs in results.items() if difference(theirs, mine) is None] == [words]
    words, wrong = answers.popitem()
    assert f"likely mistake: {words}" in complaint(name, wrong)


def test_the_table_is_in_the_order_of_the_chapters_and_holds_the_books_parts():
    chapters = [part.chapter for part in PARTS.values()]
    order = list(dict.fromkeys(chapters))
    assert chapters == sorted(chapters, key=order.index) and order == sorted(order, key=lambda c: (c[:2], c))
    assert all(len(part.mistakes) >= 4 for part in PARTS.values())
    own = [name for name, part in PARTS.items() if part.book is not part.answer]
    assert own == ["get_batch", "Tokenizer", "train_bpe", "Linear", "Embedding", "RMSNorm", "SwiGLU", "softmax", "RoPE",
                   "attention", "MultiHeadSelfAttention", "TransformerBlock", "TransformerLM", "cross_entropy",
                   "cosine_lr", "clip_grad_norm", "AdamW", "KVCache", "temper", "keep_top_p", "generate", "Muon"]


@pytest.mark.parametrize("name", PARTS)
def test_a_stub_and_an_empty_body_are_told_to_be_filled_in(name):
    signs = {"raise NotImplementedError": "it is still a stub"}
    if name in ("softmax", "RMSNorm", "AdamW"):
        signs |= dict.fromkeys(("pass", "return None"), r"fill(ed)? in|super\(\).__init__\(\)")
    for body, sign in signs.items():
        space: dict = {}
        exec(compile(stub(name).replace("raise NotImplementedError", body), "my.py", "exec"), space)
        assert re.search(sign, complaint(name, space[PARTS[name].answer.__name__]))


def test_several_stubs_are_one_file_with_all_that_it_needs():
    text = stub(*PARTS)
    exec(compile(text, "all.py", "exec"), {})
    assert text.count("import torch\n") == 1 and "    @torch.no_grad()\n    def step" in text
    assert {"from tinylm.ablations import t_quantile", "from tinylm.rope import apply_rope", "import regex"} <= set(
        text.splitlines())
    tree = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert len(tree) == len(PARTS) and all(ast.get_docstring(node) for node in tree.values())
    assert "def _merge" not in text and "1e-6" in ast.get_docstring(tree["clip_grad_norm"])


def test_parts_are_found_by_both_names_and_near_ones_are_suggested():
    assert stub("attention") == stub("scaled_dot_product_attention")
    for typed, meant in {"rmsnorm": "RMSNorm", "crossentropy": "cross_entropy", "SwiGlu": "SwiGLU"}.items():
        with pytest.raises(InputError, match=f"did you mean {meant}"):
            check(typed, len)
    for wrong in (lambda: check("zzzzzz", len), lambda: stub("zzzzzz"), lambda: check(3)):
        with pytest.raises(InputError, match="here are: get_batch, equal_weights, longest_match") as caught:
            wrong()
        assert "\n" not in str(caught.value)
    assert "TypeError: 'int' object is not callable" in complaint("softmax", 3)
