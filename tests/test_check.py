"""`tinylm check` knows its mistakes: each is planted here anew, in code that shares nothing with the tables."""
import re
import sys
import types
from dataclasses import replace

import pytest
import torch

from tinylm import check as book
from tinylm import cli
from tinylm.data import InputError, fables

# A student's correct answer, and for each mistake the edits (old, new) that make it.
NORM = '''
class MyNorm(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        y = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        length = torch.sqrt(y.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        y = y / length * self.weight
        return y.to(x.dtype)
'''
ROOT_LINE = "torch.sqrt(y.pow(2).mean(dim=-1, keepdim=True) + self.eps)"
NORM_MISTAKES = {
    "epsilon is added outside the root": [(ROOT_LINE, "y.pow(2).mean(dim=-1, keepdim=True).sqrt() + self.eps")],
    "epsilon is missing": [(" + self.eps", "")],
    "epsilon is 1e-5, whatever `eps` says": [("self.eps = eps", "self.eps = 1e-5")],
    "the mean is subtracted first, as in LayerNorm": [
        ("        length", "        y = y - y.mean(-1, True)\n        length")],
    "the gain (`weight`) is missing": [(" * self.weight", "")],
    "the gain is 1 + weight": [("* self.weight", "* (1 + self.weight)")],
    "the root is missing": [("torch.sqrt", "")],
    "the squares are summed, not averaged": [(".mean(", ".sum(")],
    "the mean runs over all axes, not over the last": [("dim=-1, keepdim=True", "")],
    "the mean runs over axis 1, not over the last": [("dim=-1", "dim=1")],
    "the mean lost its axis (keepdim=True)": [(", keepdim=True", "")],
    "half precision is not lifted to float32, so the squares overflow": [("x.to(torch.float32) if", "x if")],
    "the result is not turned back into the dtype of x": [
        ("y.to(x.dtype)", "y.float() if x.element_size() < 4 else y")],
    "the result is cut off from the graph (.detach(), .data, .item() or no_grad)": [
        ("    def forward", "    @torch.no_grad()\n    def forward")],
}
LINEAR = '''
class MyLinear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight)
'''
LINEAR_MISTAKES = {
    "the weight is stored as (d_in, d_out), not as (d_out, d_in)": [
        ("(d_out, d_in)", "(d_in, d_out)"), ("oi->", "io->")],
    "there is a bias": [("d_in))", "d_in))\n        self.bias = nn.Parameter(torch.zeros(d_out))"),
                        ("self.weight)\n", "self.weight) + self.bias\n")],
    "the weight is a plain tensor, not an nn.Parameter": [("nn.Parameter(torch.randn(d_out, d_in))",
                                                           "torch.randn(d_out, d_in)")],
    "the weight is not transposed (x @ W, not x @ W.T)": [('torch.einsum("...i,oi->...o", x, self.weight)',
                                                           "torch.matmul(x, self.weight)")],
    "the product is divided by sqrt(d_in)": [(", self.weight)", ", self.weight) / x.shape[-1] ** 0.5")],
    "the result is cut off from the graph (.detach(), .data or no_grad)": [("x, self.weight", "x, self.weight.data")],
}
EMBEDDING = '''
class MyEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def forward(self, ids):
        one_hot = torch.eye(self.weight.shape[0])[ids]
        return one_hot @ self.weight
'''
EMBEDDING_MISTAKES = {
    "the table is stored as (embedding_dim, num_embeddings)": [
        ("num_embeddings, embedding_dim))", "embedding_dim, num_embeddings))")],
    "the table is a plain tensor, not an nn.Parameter": [("nn.Parameter", "")],
    "ids are counted from 1": [("[ids]", "[ids - 1]")],
    "the vectors are multiplied by sqrt(embedding_dim)": [
        ("@ self.weight", "@ self.weight * self.weight.shape[1] ** 0.5")],
    "the batch is flattened and not restored": [("[ids]", "[ids.reshape(-1)]")],
    "id 0 is taken for padding": [("torch.eye(self.weight.shape[0])", "torch.eye(self.weight.shape[0]).tril().triu()"),
                                  ("        return", "        one_hot[..., 0] = 0\n        return")],
    "the result is cut off from the graph (.data, .detach() or no_grad)": [("@ self.weight", "@ self.weight.detach()")],
}
SWIGLU = '''
class MyFeedForward(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        make = lambda a, b: nn.Linear(a, b, bias=False)
        self.w1, self.w2, self.w3 = make(d_model, d_ff), make(d_ff, d_model), make(d_model, d_ff)

    def forward(self, x):
        a, b = self.w1(x), self.w3(x)
        return self.w2(a * torch.sigmoid(a) * b)
'''
HIDDEN = "a * torch.sigmoid(a) * b"
SWIGLU_MISTAKES = {
    "w2 and w3 have exchanged shapes": [
        ("make(d_ff, d_model), make(d_model, d_ff)", "make(d_model, d_ff), make(d_ff, d_model)"),
                                        ("self.w3(x)", "self.w2(x)"), ("self.w2(a", "self.w3(a")],
    "w1 and w3 are exchanged: silu belongs to w1": [("a, b =", "b, a =")],
    "the gate is a sigmoid, not silu": [(HIDDEN, "torch.sigmoid(a) * b")],
    "the gate is relu, not silu": [(HIDDEN, "a.clamp(min=0) * b")],
    "the gate is gelu, not silu": [(HIDDEN, "a * 0.5 * (1 + torch.erf(a / 2 ** 0.5)) * b")],
    "silu is missing": [(HIDDEN, "a * b")],
    "silu comes after the product": [(HIDDEN, "a * b * torch.sigmoid(a * b)")],
    "the two branches are added, not multiplied": [("(a) * b", "(a) + b")],
    "w3 is not used: there is no gate": [("(a) * b", "(a)")],
    "silu as x / (1 + exp(-x)) has no gradient where exp overflows": [
        ("a * torch.sigmoid(a)", "a / (1 + torch.exp(-a))")],
}
SOFTMAX = '''
def my_softmax(x, dim):
    shifted = x - x.max(dim=dim, keepdim=True).values
    powers = torch.exp(shifted)
    return powers / powers.sum(dim=dim, keepdim=True)
'''
SHIFT = "x.max(dim=dim, keepdim=True).values"
SOFTMAX_MISTAKES = {
    "the maximum is not subtracted first, so exp overflows": [(SHIFT, "0")],
    "the maximum of the whole tensor is subtracted, not that along `dim`": [(SHIFT, "x.max()")],
    "the minimum is subtracted, not the maximum": [("x.max(", "x.min(")],
    "the mean is subtracted, not the maximum": [(SHIFT, "x.mean(dim=dim, keepdim=True)")],
    "the sum runs over the last axis, whatever `dim` says": [("dim=dim", "dim=-1")],
    "the sum runs over the first axis, whatever `dim` says": [("dim=dim", "dim=0")],
    "the sum runs over all axes": [("powers.sum(dim=dim, keepdim=True)", "powers.sum()"), (SHIFT, "x.max()")],
    "the sum, or the maximum, lost its axis (keepdim=True)": [(SHIFT, "x.max(dim=dim).values")],
    "`max(dim)` gives a pair: take its `.values`": [(".values", "")],
    "the logarithm is taken too": [("return powers /", "return shifted - powers.sum(dim=dim, keepdim=True).log() #")],
    "an epsilon is added to the sum, which is never below 1": [("keepdim=True)\n", "keepdim=True) + 1e-6)\n"),
                                                               ("/ powers", "/ (powers")],
    "exp is missing": [("torch.exp(shifted)", "x")],
    "the input is changed in place": [("shifted = x -", "shifted = x; shifted -=")],
    "the result is float32 whatever the input is": [("shifted = x -", "x = x.float(); shifted = x -")],
    "the result is cut off from the graph (.detach(), .data or no_grad)": [("x - x", "x.data - x.data")],
}
ATTENTION = '''
def my_attention(q, k, v, mask=None):
    scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(k.size(-1))
    if mask is not None:
        scores = torch.where(mask, scores, torch.tensor(float("-inf")))
    weights = F.softmax(scores, dim=-1)
    weights = torch.nan_to_num(weights, nan=0.0)
    return torch.einsum("...qk,...kd->...qd", weights, v)
'''
ZERO = "    weights = torch.nan_to_num(weights, nan=0.0)\n"
ATTENTION_MISTAKES = {
    "sqrt(d_k) is missing": [(" / math.sqrt(k.size(-1))", "")],
    "the scores are divided by d_k, not by its root": [("math.sqrt(k.size(-1))", "k.size(-1)")],
    "the scores are divided by the root of the number of keys": [("k.size(-1)", "k.size(-2)")],
    "the scores are multiplied by sqrt(d_k), not divided": [("/ math", "* math")],
    "`k.T` turns the axes of the batch around too: `k.transpose(-2, -1)`": [
        ('torch.einsum("...qd,...kd->...qk", q, k)', "q @ k.permute(*range(k.dim())[::-1])")],
    "softmax runs over the queries, not over the keys": [("dim=-1", "dim=-2")],
    "there is no softmax": [("F.softmax(scores, dim=-1)", "scores")],
    "keys and values are exchanged": [("    scores = torch.ein", "    k, v = v, k\n    scores = torch.ein")],
    "the mask is inverted: True means may attend": [("where(mask", "where(~mask")],
    "the mask is inverted, so a row has nothing to attend: True means may attend": [
        ("where(mask", "where(~mask"), (ZERO, "")],
    "the mask is changed in place": [("where(mask", "where(~mask.logical_not_()")],
    "the mask is ignored": [("mask is not None", "False")],
    "the mask is always causal": [
        ("    if mask is not",
         "    mask = torch.ones(q.size(-2), k.size(-2)).tril(k.size(-2) - q.size(-2)).bool()\n    if mask is not")],
    "the mask is added to the scores as 0 and 1": [
        ('torch.where(mask, scores, torch.tensor(float("-inf")))', "scores + mask.float()")],
    "masked scores are set to 0, and exp(0) is 1": [('float("-inf")', "0.0")],
    "masked scores are set to a number that is not low enough": [('float("-inf")', "-1e3")],
    "the mask comes after the softmax, so the weights no longer sum to one": [
        ('scores = torch.where(mask, scores, torch.tensor(float("-inf")))', "pass"),
        (ZERO, "    weights = weights if mask is None else weights * mask\n")],
    "the maximum is not subtracted in the softmax": [
        ("F.softmax(scores, dim=-1)", "scores.exp() / scores.exp().sum(-1, keepdim=True)"), (ZERO, "")],
    "the result is float32 whatever the inputs are": [
        ("    scores = torch.ein", "    q, k, v = q.float(), k.float(), v.float()\n    scores = torch.ein")],
    "a row of -inf alone gives NaN: set masked weights to 0 after the softmax": [(ZERO, "")],
    "a query without keys averages all values: set masked weights to 0 after the softmax": [('float("-inf")', "-1e30")],
}
ROPE = '''
class MyRotation(nn.Module):
    def __init__(self, theta, d_k, max_seq_len):
        super().__init__()
        pairs = torch.arange(0, d_k // 2).double()
        speed = 1 / theta ** (2 * pairs / d_k)
        self.register_buffer("angle", torch.arange(max_seq_len + 1)[:, None] * speed)

    def forward(self, x, token_positions):
        angle = self.angle[token_positions]
        c, s = torch.cos(angle), torch.sin(angle)
        out = torch.empty_like(x)
        first, second = x[..., 0::2], x[..., 1::2]
        out[..., 0::2] = c * first - s * second
        out[..., 1::2] = s * first + c * second
        return out
'''
ROPE_MISTAKES = {
    "the pairs are (i, i + d_k/2), the halves, and not (2i, 2i + 1)": [
        ("0::2", ":x.shape[-1] // 2"), ("1::2", "x.shape[-1] // 2:")],
    "it turns the wrong way: the signs of the sines are exchanged": [
        ("- s * second", "+ s * second"), ("= s * first", "= -s * first")],
    "sine and cosine are exchanged": [("c, s =", "s, c =")],
    "the positions are counted from 1": [("[token_positions]", "[token_positions + 1]")],
    "the positions given are ignored": [("[token_positions]", "[:x.shape[-2]]")],
    "the exponent is -i / d_k, not -2i / d_k": [("2 * pairs", "pairs")],
    "the exponent is -2i / (d_k / 2), not -2i / d_k": [("pairs / d_k", "pairs / (d_k // 2)")],
    "the exponent has the wrong sign": [("1 / theta", "theta")],
    "the pairs count from 1, not from 0": [("torch.arange(0, d_k // 2)", "torch.arange(1, d_k // 2 + 1)")],
    "all pairs turn equally fast": [("2 * pairs / d_k", "0 * pairs")],
    "theta is 10000, whatever the argument says": [("1 / theta", "1 / 10000")],
    "the turned pairs are laid end to end, not put back in their places": [
        ("out[..., 0::2] =",
         "left ="), ("out[..., 1::2] =", "right ="), ("return out", "return torch.cat([left, right], -1).to(x.dtype)")],
    "the result is not turned back into the dtype of x": [
        ("torch.empty_like(x)", "torch.empty_like(x, dtype=torch.float32)")],
}
LOSS = '''
def my_cross_entropy(logits, targets):
    m = logits.max(dim=-1, keepdim=True).values
    logits = logits - m
    log_sum = torch.log(torch.exp(logits).sum(dim=-1))
    right = torch.gather(logits, -1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.mean(log_sum - right)
'''
LOSS_MISTAKES = {
    "the minus sign is missing": [("log_sum - right", "right - log_sum")],
    "the losses are summed, not averaged": [("torch.mean", "torch.sum")],
    "the losses are summed over each sequence and averaged over the batch": [
        ("torch.mean(log_sum - right)", "(log_sum - right).sum(-1).mean()")],
    "the losses are not averaged": [("torch.mean(log_sum - right)", "log_sum - right")],
    "the mean runs over all V logits too": [("right)\n", "right) / logits.shape[-1]\n")],
    "the logarithm has base 2": [("torch.mean(log_sum - right)", "torch.mean((log_sum - right) / math.log(2))")],
    "the probability is averaged, without a logarithm": [
        ("torch.mean(log_sum - right)", "-torch.exp(right - log_sum).mean()")],
    "softmax is applied twice: the argument holds logits": [("    m =", "    logits = logits.softmax(-1)\n    m =")],
    "softmax runs over the first axis, not over the last": [
        ("    m = logits.max(dim=-1, keepdim=True).values", "    m = logits.max(dim=0, keepdim=True).values"),
        ("sum(dim=-1)",
         "sum(dim=0)"), ("log_sum - right", "torch.gather(log_sum - logits, -1, targets.unsqueeze(-1))")],
    "the maximum is not subtracted first, so exp overflows": [("logits - m", "logits")],
    "the maximum of the whole tensor is subtracted, not that of each row": [
        ("logits.max(dim=-1, keepdim=True).values", "logits.max()")],
    "the maximum is subtracted in the sum, but not from the target's logit": [
        ("log_sum - right", "log_sum - right - m.squeeze(-1)")],
    "the logarithm of a softmax that has become 0": [
        ("log_sum - right", "-torch.log(torch.exp(right) / torch.exp(log_sum))")],
    "the result is cut off from the graph (.item(), .detach() or no_grad)": [("right)\n", "right).detach()\n")],
}
SCHEDULE = '''
def my_schedule(step, max_lr, min_lr, warmup_iters, cosine_cycle_iters):
    if step < warmup_iters:
        return max_lr * step / warmup_iters
    if step > cosine_cycle_iters:
        return min_lr
    done = (step - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_lr + (max_lr - min_lr) * (math.cos(done * math.pi) + 1) / 2
'''
SCHEDULE_MISTAKES = {
    "the warm-up is one step ahead: (step + 1) / warmup_iters": [("* step", "* (step + 1)")],
    "the warm-up is one step behind: (step - 1) / warmup_iters": [("* step", "* (step - 1)")],
    "the warm-up starts at min_lr, not at 0": [
        ("max_lr * step / warmup_iters", "min_lr + (max_lr - min_lr) * step / warmup_iters")],
    "there is no warm-up": [("    if step <", "    warmup_iters = 0\n    if step <")],
    "warmup_iters = 0 divides by zero": [("    if step <", "    share = step / warmup_iters\n    if step <")],
    "min_lr is ignored: the cosine ends at 0": [("    if step <", "    min_lr = 0.0\n    if step <")],
    "the cosine starts at step 0, not at the end of the warm-up": [
        ("(step - warmup_iters) / (cosine_cycle_iters - warmup_iters)", "step / cosine_cycle_iters")],
    "the cosine lasts cosine_cycle_iters after the warm-up, instead of ending there": [
        ("    if step > cosine", "    cosine_cycle_iters += warmup_iters\n    if step > cosine")],
    "the cosine is one step behind": [
        ("    done =", "    step = step - 1 if step > warmup_iters else step\n    done ="),
        ("step > cosine", "step > 1 + cosine")],
    "the decay is a straight line, not a cosine": [("(math.cos(done * math.pi) + 1) / 2", "(1 - done)")],
    "pi is missing: the cosine takes radians": [
        ("done * math.pi", "done"), ("step > cosine", "step >= cosine")],
    "it is a whole cosine, down and up again, not half of one": [
        ("math.pi", "2 * math.pi"), ("step > cosine", "step >= cosine")],
    "the factor 1/2 is missing": [("+ 1) / 2", "+ 1)")],
    "after cosine_cycle_iters the rate rises again": [("step > cosine_cycle_iters", "False")],
    "after cosine_cycle_iters the rate is 0, not min_lr": [("        return min_lr\n", "        return 0.0\n")],
}
CLIP = '''
def my_clip(params, max_l2_norm):
    grads = [p.grad for p in params if p.grad is not None]
    total = math.sqrt(sum(float((g ** 2).sum()) for g in grads))
    if total > max_l2_norm:
        for g in grads:
            g *= max_l2_norm / (total + 1e-6)
    return total
'''
CLIP_MISTAKES = {
    "gradients below the limit are scaled up": [("total > max_l2_norm", "True")],
    "each tensor is clipped by its own norm, not all by their joint one": [
        ("if total > max_l2_norm",
         "if True"), ("g *= max_l2_norm / (total + 1e-6)", "g *= min(1, max_l2_norm / (float(g.norm()) + 1e-6))")],
    "each number is clamped, and the direction is lost": [
        ("if total > max_l2_norm", "if True"),
        ("g *= max_l2_norm / (total + 1e-6)", "g[:] = g.clamp(-max_l2_norm, max_l2_norm)")],
    "the norm is returned as it is after clipping": [
        ("return total", "return math.sqrt(sum(float((g ** 2).sum()) for g in grads))")],
    "the root is missing in the norm": [("math.sqrt", "")],
    "the norm is the sum of magnitudes (L1)": [("math.sqrt", ""), ("(g ** 2).sum()", "g.abs().sum()")],
    "the norm is the largest magnitude": [
        ("math.sqrt(sum(float((g ** 2).sum()) for g in grads))", "max(float(g.abs().max()) for g in grads)")],
    "the norms of the tensors are added, not their squares": [
        ("math.sqrt", ""), ("float((g ** 2).sum())", "float(g.norm())")],
    "the limit is taken for 1": [("    grads =", "    max_l2_norm = 1.0\n    grads =")],
    "a parameter without a gradient is not skipped": [(" if p.grad is not None", "")],
    "the epsilon 1e-6 in the denominator, as in PyTorch, is missing": [(" + 1e-6", "")],
    "the gradients are not scaled": [("g *= max", "g * max")],
    "the parameters are read twice, but a generator gives them once": [
        ("for g in grads:", "for g in [p.grad for p in params if p.grad is not None]:")],
}
ADAMW = '''
class MyAdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.data
                state = self.state[p]
                t = state.get("t", 0) + 1
                m = b1 * state.get("m", torch.zeros_like(g)) + (1 - b1) * g
                v = b2 * state.get("v", torch.zeros_like(g)) + (1 - b2) * g ** 2
                self.state[p] = {"t": t, "m": m, "v": v}
                p.data.mul_(1 - lr * decay)
                m_hat = m / (1 - b1 ** t)
                v_hat = v / (1 - b2 ** t)
                p.data.sub_(lr * m_hat / (v_hat.sqrt() + eps))
'''
DECAY = "                p.data.mul_(1 - lr * decay)\n"
ADAMW_MISTAKES = {
    "there is no bias correction": [(" / (1 - b1 ** t)", ""), (" / (1 - b2 ** t)", "")],
    "only the second moment is corrected for its bias": [(" / (1 - b1 ** t)", "")],
    "only the first moment is corrected for its bias": [(" / (1 - b2 ** t)", "")],
    "steps are counted from 0, so the correction divides by zero": [
        ("b1 ** t", "b1 ** (t - 1)"), ("b2 ** t", "b2 ** (t - 1)")],
    "the correction does not count the steps": [("b1 ** t", "b1"), ("b2 ** t", "b2")],
    "the moments are forgotten between steps": [('"m": m, "v": v', "")],
    "the betas are exchanged": [("b1, b2 =", "b2, b1 =")],
    "the factor 1 - beta1 is missing": [("(1 - b1) * g", "g")],
    "the factor 1 - beta2 is missing": [("(1 - b2) * g ** 2", "g ** 2")],
    "the gradient is not squared for the second moment": [("g ** 2", "g")],
    "the second moment averages magnitudes, not squares": [("g ** 2", "g.abs()")],
    "the root of the second moment is missing": [("v_hat.sqrt()", "v_hat")],
    "it climbs: the sign of the update": [("p.data.sub_", "p.data.add_")],
    "epsilon is inside the root": [("(v_hat.sqrt() + eps)", "(v_hat + eps).sqrt()")],
    "epsilon is added before the bias correction": [
        ("(v_hat.sqrt() + eps)", "((v.sqrt() + eps) / math.sqrt(1 - b2 ** t))")],
    "there is no weight decay": [(DECAY, "")],
    "the decay is added to the gradient (L2, as in Adam), not taken off the weight": [
        (DECAY, ""), ("p.grad.data", "p.grad.data + decay * p.data")],
    "the decay is not multiplied by the learning rate": [("1 - lr * decay", "1 - decay")],
    "the decay comes after the step, not before it as here and in PyTorch (both are in use)": [
        (DECAY, ""), ("(v_hat.sqrt() + eps))\n", "(v_hat.sqrt() + eps))\n" + DECAY)],
    "the learning rate is that of the start: read it from `param_groups`": [
        ('lr, eps, decay = group["lr"]', "lr, eps, decay = self.rate"),
        ("        super()", "        self.rate = lr\n        super()")],
}
TOKENIZER = r'''
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class MyTokenizer:
    def __init__(self, vocab, merges, special_tokens=None):
        special_tokens = special_tokens or []
        self.bytes_of = dict(vocab)
        for name in special_tokens:
            self.bytes_of[max(self.bytes_of) + 1] = name.encode("utf-8")
        self.id_of = {b: i for i, b in self.bytes_of.items()}
        self.merges = merges
        self.special = sorted(special_tokens, key=lambda name: -len(name))

    def pieces(self, text):
        if not self.special:
            return [text]
        return regex.split("(%s)" % "|".join(regex.escape(name) for name in self.special), text)

    def words(self, text):
        return regex.findall(GPT2, text)

    def begin(self, word):
        return [bytes([b]) for b in word.encode("utf-8")]

    def encode(self, text):
        ids = []
        for piece in self.pieces(text):
            if piece in self.special:
                ids.append(self.id_of[piece.encode("utf-8")])
                continue
            for word in self.words(piece):
                ids.extend(self.id_of[part] for part in self.merge(self.begin(word)))
        return ids

    def merge(self, parts):
        for a, b in self.merges:
            i = 0
            while i + 1 < len(parts):
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
        return parts

    def encode_iterable(self, chunks):
        yield from self.encode("".join(chunks))

    def decode(self, ids):
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", errors="replace")
'''
MERGE_LOOP = TOKENIZER[TOKENIZER.index("        for a, b in self.merges"):TOKENIZER.index("        return parts")]
TOKENIZER_MISTAKES = {
    "merges are made from left to right, not in the order of training": [(MERGE_LOOP, '''
        i = 0
        while i + 1 < len(parts):
            if (parts[i], parts[i + 1]) in self.merges:
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
                i = -1
            i += 1
''')],
    "the longest token that fits is taken, instead of making the merges": [(MERGE_LOOP, '''
        text, parts = b"".join(parts), []
        while text:
            best = max((t for t in self.id_of if text.startswith(t)), key=len)
            parts.append(best)
            text = text[len(best):]
''')],
    "no merge is made": [(MERGE_LOOP, "")],
    "merges cross the borders of pretokens": [("regex.findall(GPT2, text)", "[text] if text else []")],
    "whitespace is lost: the text is split at spaces": [("regex.findall(GPT2, text)", "text.split()")],
    "a space is a pretoken of its own, instead of going before its word": [("findall(GPT2", r'findall(r"\S+|\s+"')],
    "the pattern keeps contractions in one piece": [
        (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+", r" ?[\p{L}']+"), (r"[^\s\p{L}", r"[^\s\p{L}'")],
    "the pattern takes a run of spaces whole, with the space of the next word": [(r"|\s+(?!\S)", "")],
    "characters are merged, not bytes": [
        ('[bytes([b]) for b in word.encode("utf-8")]', '[c.encode("utf-8") for c in word]')],
    "each token is decoded by itself, so letters of several bytes break": [
        ('b"".join(self.bytes_of[i] for i in ids).decode("utf-8", errors="replace")',
         '"".join(self.bytes_of[i].decode("utf-8", errors="replace") for i in ids)')],
    "bytes that are no UTF-8 raise an error: errors='replace'": [(', errors="replace"', "")],
    "bytes that are no UTF-8 are dropped: errors='replace', not 'ignore'": [('"replace"', '"ignore"')],
    "special tokens are split like other text": [("if not self.special", "if True")],
    "special tokens are lost when the text is cut at them": [('"(%s)"', '"(?:%s)"')],
    "the shorter of two special tokens wins": [("-len(name)", "len(name)")],
    "special tokens are not escaped (regex.escape)": [("regex.escape(name)", "name")],
    "`special_tokens=None` is not handled": [("special_tokens = special_tokens or []", "pass")],
    "each chunk of a stream is encoded by itself": [
        ('yield from self.encode("".join(chunks))', "for chunk in chunks:\n            yield from self.encode(chunk)")],
}
TRAINER = r'''
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

def my_trainer(input_path, vocab_size, special_tokens):
    with open(input_path, encoding="utf-8", newline="") as file:
        text = file.read()
    documents = [text]
    for name in special_tokens:
        documents = [part for document in documents for part in document.split(name)]
    counts = {}
    for document in documents:
        for word in regex.findall(GPT2, document):
            key = tuple(bytes([b]) for b in word.encode("utf-8"))
            counts[key] = counts.get(key, 0) + 1
    vocab = {i: bytes([i]) for i in range(256)}
    merges = []
    while len(vocab) + len(special_tokens) < vocab_size:
        pairs = {}
        for word, n in counts.items():
            for a, b in zip(word, word[1:]):
                pairs[a, b] = pairs.get((a, b), 0) + n
        if not pairs:
            break
        most = max(pairs.values())
        best = max(pair for pair in pairs if pairs[pair] == most)
        new = {}
        for word, n in counts.items():
            parts, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best:
                    parts.append(best[0] + best[1])
                    i += 2
                else:
                    parts.append(word[i])
                    i += 1
            new[tuple(parts)] = new.get(tuple(parts), 0) + n
        counts = new
        merges.append(best)
        vocab[len(vocab)] = best[0] + best[1]
    for name in special_tokens:
        vocab[len(vocab)] = name.encode("utf-8")
    return vocab, merges
'''
BEST = "max(pair for pair in pairs if pairs[pair] == most)"
NAMES = '''    for name in special_tokens:
        vocab[len(vocab)] = name.encode("utf-8")
'''
CUT = '''    for name in special_tokens:
        documents = [part for document in documents for part in document.split(name)]
'''
TRAINER_MISTAKES = {
    "ties go to the smaller pair, not to the greater one": [(BEST, BEST.replace("max", "min"))],
    "ties go to the pair that came first": [(BEST, "next(pair for pair in pairs if pairs[pair] == most)")],
    "ties go to the pair that came last": [(BEST, "[pair for pair in pairs if pairs[pair] == most][-1]")],
    "ties are decided by ids, not by the bytes": [(BEST, '''max((pair for pair in pairs if pairs[pair] == most),
            key=lambda pair: [list(vocab.values()).index(token) for token in pair])''')],
    "ties are decided by the joined bytes, not by the pair": [
        (BEST, "max((pair for pair in pairs if pairs[pair] == most), key=b''.join)")],
    "pairs are counted across pretokens": [("regex.findall(GPT2, document)", "[document]")],
    "whitespace is lost: the text is split at spaces": [("regex.findall(GPT2, document)", "document.split()")],
    "every pretoken counts once, however often it occurs": [("counts.get(key, 0) + 1", "1")],
    "special tokens are merged like other text": [(CUT, "")],
    "the text around a special token is joined": [("document.split(name)]", '[document.replace(name, "")]]')],
    "the special tokens come first in the vocabulary, not last": [
        (NAMES, ""), ("return vocab, merges", """
    tokens = [name.encode() for name in special_tokens] + list(vocab.values())
    return dict(enumerate(tokens)), merges""")],
    "the special tokens are missing in the vocabulary": [(NAMES, "")],
    "there is room for special tokens twice: too few merges": [
        ("len(vocab) + len(special_tokens)", "len(vocab) + 2 * len(special_tokens)")],
    "it stops one merge early": [("< vocab_size", "< vocab_size - 1")],
    "it makes one merge too many": [("< vocab_size", "<= vocab_size")],
    "the pair in a run of one letter is joined from the right": [
        ("            parts, i = [], 0\n", """
            turned = best[0] == best[1]
            word = word[::-1] if turned else word
            parts, i = [], 0
"""),
        ("            new[tuple", "            parts = parts[::-1] if turned else parts\n            new[tuple")],
}
STUDENTS = {
    "RMSNorm": (NORM, NORM_MISTAKES), "Linear": (LINEAR, LINEAR_MISTAKES), "Embedding": (EMBEDDING, EMBEDDING_MISTAKES),
    "SwiGLU": (SWIGLU, SWIGLU_MISTAKES), "softmax": (SOFTMAX, SOFTMAX_MISTAKES),
    "attention": (ATTENTION, ATTENTION_MISTAKES),
    "RoPE": (ROPE, ROPE_MISTAKES), "cross_entropy": (LOSS, LOSS_MISTAKES), "cosine_lr": (SCHEDULE, SCHEDULE_MISTAKES),
    "clip_grad_norm": (CLIP, CLIP_MISTAKES), "AdamW": (ADAMW, ADAMW_MISTAKES),
    "Tokenizer": (TOKENIZER, TOKENIZER_MISTAKES), "train_bpe": (TRAINER, TRAINER_MISTAKES),
}
HEAD = "import math\nimport regex\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


def written(source: str, edits=()) -> object:
    "What a student's source defines, after the edits."
    for old, new in edits:
        assert old in source, f"{old!r} is not in the student's answer"
        source = source.replace(old, new)
    module = types.ModuleType("student")
    exec(compile("from __future__ import annotations\n" + HEAD + source, "student.py", "exec"), vars(module))
    return getattr(module, re.search(r"^(?:class|def) (\w+)", source, re.MULTILINE)[1])


def complaint(name: str, answer) -> str:
    with pytest.raises(book.Wrong) as caught:
        book.check(name, answer)
    return str(caught.value)


def test_the_parts_of_the_design_are_all_there():
    assert list(STUDENTS) == [name for name in book.PARTS if name in STUDENTS]
    for name, (_, mistakes) in STUDENTS.items():
        assert list(mistakes) == list(book.PARTS[name].mistakes), f"plant each known mistake of {name} here too"


@pytest.mark.parametrize("name", STUDENTS)
def test_a_right_answer_passes(name, capsys):
    book.check(name, written(STUDENTS[name][0]))
    assert f"agrees with the book's in all {len(book.PARTS[name].cases)} cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words", [(name, words) for name, (_, mistakes) in STUDENTS.items() for words in mistakes])
def test_a_planted_mistake_is_named(name, words):
    source, mistakes = STUDENTS[name]
    said = complaint(name, written(source, mistakes[words]))
    assert re.findall("likely mistake: (.*)", said)[:1] == [words], said
    assert re.match(rf"{name} differs in case \d+ of \d+, .+:\n  \S", said), said


@pytest.mark.parametrize("name", book.PARTS)
def test_the_reference_passes_and_the_table_names_its_own_mistakes(name):
    part = book._find(name)[1]
    assert book._complaint(name, part, part.reference, trusted=True) is None
    for words, wrong in part.mistakes.items():
        said = book._complaint(name, part, wrong, trusted=True)
        assert said and f"likely mistake: {words}" in said, (words, said)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_stub_is_told_to_be_filled_in(name):
    answer = written(book.stub_file(name).partition("from torch import Tensor, nn")[2])
    assert "it is still a stub" in complaint(name, answer)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("body", ["pass", "return None"])
def test_an_empty_body_is_no_answer(name, body):
    answer = written(re.sub("raise NotImplementedError", body, book.stub(name)))
    said = complaint(name, answer)
    assert "fill in" in said or "filled in" in said or "super().__init__()" in said, said


RETURNS_NONE = {
    "softmax": (SOFTMAX, "return powers", "powers", "case 1 of 11, three scores:\n  output"),
    "clip_grad_norm": (CLIP, "    return total\n", "", "case 1 of 11, one long gradient:\n  the norm"),
}


@pytest.mark.parametrize("name", RETURNS_NONE)
def test_a_missing_return_is_told(name):
    source, old, new, place = RETURNS_NONE[name]
    assert complaint(name, written(source, [(old, new)])) == (
        f"{name} differs in {place} is None: a `return` is missing, or the body is still to be filled in")


def test_a_parameter_of_another_name_is_told():
    assert complaint("RMSNorm", written(NORM, [("self.weight", "self.g")])) == (
        "RMSNorm differs in case 1 of 8, one vector:\n"
        "  the list of parameters has 'g', which must be called 'weight'")


def test_a_detour_through_less_precision_is_told():
    said = complaint("attention", written(ATTENTION, [
        ("    scores = torch.ein",
         "    kind = v.dtype\n    q, k, v = q.float(), k.float(), v.float()\n    scores = torch.ein"),
        ('weights, v)', 'weights, v).to(kind)')]))
    assert "float64 stays float64" in said and "output" in said
    got, expected = re.search(r"is (\S+), expected (\S+) ", said).groups()
    assert got != expected  # there are digits enough to see it


# Whatever it is called and however it is wrapped, the book's own part is no answer.

WRAPPED = {
    "the part itself": ("softmax", "from tinylm.layers import softmax\nanswer = softmax"),
    "an alias": ("RMSNorm", "import tinylm.layers as L\nanswer = getattr(L, 'RMS' + 'Norm')"),
    "a function around it": ("softmax", "from tinylm.layers import *\ndef answer(x, dim): return softmax(x, dim)"),
    "a function that returns it": (
        "RMSNorm", "from tinylm.layers import RMSNorm\ndef answer(d, eps=1e-5): return RMSNorm(d, eps)"),
    "a subclass": ("RMSNorm", "from tinylm.layers import RMSNorm\nclass answer(RMSNorm): pass"),
    "one of its methods": ("RMSNorm", """from tinylm import layers
class answer(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps
    forward = lambda self, x: layers.RMSNorm.forward(self, x)"""),
    "its helper": ("RMSNorm", """from tinylm.layers import rms_norm
class answer(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)"""),
    "an optimizer": ("AdamW", "from tinylm.optim import AdamW\nclass answer(AdamW): pass"),
    "a partial": ("cosine_lr", "import functools, tinylm.optim\nanswer = functools.partial(tinylm.optim.cosine_lr)"),
    "a tokenizer": ("Tokenizer", "from tinylm.tokenizer import Tokenizer\nanswer = lambda *rest: Tokenizer(*rest)"),
    "the slow trainer": ("train_bpe", "from tinylm.tokenizer import train_bpe_naive\ndef answer(path, size, special):\n"
                         "    return train_bpe_naive(open(path, encoding='utf-8').read(), size, special)"),
    "without the watch": ("softmax", "import sys\nfrom tinylm.layers import softmax\ndef answer(x, dim):\n"
                          "    sys.setprofile(None)\n    return softmax(x, dim)"),
    "the watch switched off for a while": ("softmax", """import sys
from tinylm.layers import softmax
def answer(x, dim):
    watch = sys.getprofile()
    sys.setprofile(None)
    y = softmax(x, dim)
    sys.setprofile(watch)
    return y"""),
    "in a thread": ("softmax", """import threading
from tinylm.layers import softmax
def answer(x, dim):
    out = []
    thread = threading.Thread(target=lambda: out.append(softmax(x, dim)))
    thread.start()
    thread.join()
    return out[0]"""),
    "a copy of its code": ("softmax", """import types, tinylm.layers as L
code = L.softmax.__code__.replace(co_name="mine")
answer = types.FunctionType(code, globals())"""),
    "the table's tokenizer": ("Tokenizer", "from tinylm import check\nclass answer(check._PlainTokenizer): pass"),
    "the table's optimizer": ("AdamW", "from tinylm import check\nclass answer(check._PlainAdamW): pass"),
    "the table's trainer": ("train_bpe", "from tinylm import check\nanswer = lambda *rest: check._trainer()(*rest)"),
    "the table's clipping": ("clip_grad_norm", "from tinylm import check\nanswer = check._clipping()"),
    "the table's attention": ("attention", "from tinylm import check\nmine = check._attention()\n"
                              "answer = lambda q, k, v, mask=None: mine(q, k, v, mask).nan_to_num()"),
    "the table's loss": ("cross_entropy", "from tinylm import check\nanswer = lambda x, t: check._nll(x, t).mean()"),
    "a part of a larger one": ("attention", "from tinylm.model import attention_weights\n"
                               "answer = lambda q, k, v, mask=None: attention_weights(q, k, mask) @ v"),
    "an exercise's answer": ("layer_norm", "from tinylm import answers\nanswer = lambda x: answers.layer_norm(x)"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_book_is_no_answer(how):
    name, source = WRAPPED[how]
    module = types.ModuleType("student")
    exec(HEAD + source, vars(module))
    said = complaint(name, module.answer)
    assert re.search(r"the answer runs the book's own code \(\w.*\); write that yourself", said), said


def test_pytorch_is_an_answer_in_whatever_wrapping(capsys):
    book.check("softmax", torch.softmax)
    book.check("softmax", lambda x, dim: torch.softmax(x, dim))
    assert capsys.readouterr().out.count("agrees") == 2


def test_a_folder_named_like_the_package_is_not_the_package():
    code = compile("", f"{book._HERE[:-1]}-mine/my.py", "exec")
    assert not book._forbidden(book.PARTS["softmax"])(code)
    assert book._forbidden(book.PARTS["softmax"])(code.replace(co_filename=book._HERE + "my.py"))


def test_other_parts_of_the_book_may_be_used():
    source = SWIGLU.replace("lambda a, b: nn.Linear(a, b, bias=False)", "__import__('tinylm.layers').layers.Linear")
    assert source != SWIGLU
    book.check("SwiGLU", written(source))
    book.check("layer_norm", written("""
def my_norm(x):
    from tinylm.layers import rms_norm
    return rms_norm(x - x.mean(-1, keepdim=True), torch.ones(x.shape[-1]))"""))


def test_what_is_random_is_told():
    said = complaint("softmax", lambda x, dim: torch.rand_like(x).softmax(dim))
    assert "two calls with the same input differ" in said


def test_a_wrong_call_is_told():
    said = complaint("softmax", lambda x: x)
    assert "softmax(x, dim)" in said and "raises TypeError" in said
    assert "expected a function or class" in complaint("softmax", 3)
    assert "called with 8, it should make a module, and gives 16" in complaint("RMSNorm", lambda x: 2 * x)


def test_the_line_of_the_answer_is_told():
    def broken(x, dim):
        return x + torch.ones(77)
    said = complaint("softmax", broken)
    assert re.search(r"line \d+ of test_check.py: return x \+ torch.ones\(77\)", said), said
    assert "tinylm/check.py" not in said


def test_a_notebook_shows_the_message_and_no_traceback():
    assert book.Wrong("one\ntwo")._render_traceback_() == ["one", "two"]


def test_the_nearest_part_is_suggested():
    for typed, meant in {"rmsnorm": "RMSNorm", "crossentropy": "cross_entropy", "SwiGlu": "SwiGLU"}.items():
        with pytest.raises(InputError, match=f"did you mean {meant}"):
            book.check(typed, lambda: None)
    with pytest.raises(InputError, match="There are: RMSNorm, Linear"):
        book.check("zzzzzz", lambda: None)


# The command: the answer runs in a process of its own.

FILE = HEAD + NORM + SOFTMAX + ATTENTION + """
def hangs(x, dim):
    if x.dim() == 2:
        while True: pass
    return x.softmax(dim)

def leaves(x, dim):
    import os
    os._exit(0)

def ends(x, dim):
    raise SystemExit(0)

def divides(x, dim):
    return x / 0 / [][0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "my.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def told(capfd, *argv) -> tuple[int, str]:
    capfd.readouterr()
    code = cli.main(["check", *map(str, argv)])
    found = capfd.readouterr()
    assert "Traceback" not in found.err + found.out
    return code, found.out + found.err


def test_the_command_judges_several_parts(capfd, file):
    code, said = told(capfd, f"RMSNorm={file}:MyNorm", f"softmax={file}:my_softmax")
    assert (code, said.count("agrees with the book's")) == (0, 2), said


@pytest.mark.parametrize("name, words", [
    ("hangs", "running the case 'a matrix, along its rows': it took more than 1 seconds"),
    ("leaves", "ended the process while running the case 'three scores'"),
    ("ends", "it ends the program"),
    ("divides", "IndexError: list index out of range\n  line 45 of my.py: return x / 0 / [][0]"),
])
def test_no_code_can_fake_a_pass(capfd, file, monkeypatch, name, words):
    if name in ("ends", "divides"):  # caught where the cases run, so no process of its own is needed
        monkeypatch.setattr(book, "_in_child", in_this_process)
    code, said = told(capfd, f"softmax={file}:{name}", "--time_limit", 1)
    assert code == 1 and words in said and "agrees" not in said, said


BAD = [
    ("softmax=none.py", "none.py: no such file"),
    ("softmax={file}:my_soft", "defines no my_soft; did you mean my_softmax?"),
    ("softmx={file}", "did you mean softmax?"), ("softmax={broken}", "line 1: "), ("", "which part?"),
    ("softmax={text}", "name should end in .py"),
    ("softmax={raising}", "it raises ValueError: no line 2 of raising.py: raise ValueError('no')"),
]


def in_this_process(job, *arguments, time_limit):
    "What does a job of the command without a process of its own, which takes seconds to start."
    return job(lambda step: None, *arguments)


def test_bad_input_is_told_in_a_line(capfd, file, monkeypatch):
    places = {"file": file}
    for name, text in {"broken.py": "def f(:", "text.txt": "f = 1", "raising.py": "\nraise ValueError('no')"}.items():
        places[name.split(".")[0]] = file.with_name(name)
        file.with_name(name).write_text(text, encoding="utf-8")
    for number, (argument, words) in enumerate(BAD):
        if number == 1:  # the first complaint comes through the pipe
            monkeypatch.setattr(book, "_in_child", in_this_process)
        code, said = told(capfd, *[argument.format(**places)] * bool(argument))
        assert code == 2 and words in said and said.startswith("tinylm: ") and said.count("\n") == 1, said


def test_a_name_alone_gives_a_file_to_fill_in(capfd, tmp_path):
    for name in ("RoPE", "long_context"):
        code, text = told(capfd, name)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        answer = book._load_answer(str(tmp_path / f"{name}.py"), *book._names(name, None))
        assert code == 0 and "still a stub" in complaint(name, answer)


# Training with a part exchanged.

SMALL = dict(vocab_size=300, context_length=16, d_model=16, num_heads=2, d_ff=32, batch_size=4, max_steps=3)


@pytest.mark.parametrize("name", STUDENTS)
def test_training_uses_the_answer_and_loses_nothing(name, monkeypatch):
    monkeypatch.setattr(book, "fables", lambda num_stories, seed: fables(20, seed))
    config = replace(book.tinylm.train.PRESETS["debug"], **SMALL)
    answer, calls = written(STUDENTS[name][0]), set()
    own = {id(code) for code in book._code(answer)}
    def note(frame, event, arg):
        if id(frame.f_code) in own:
            calls.add(frame.f_code.co_name)
    sys.setprofile(note)
    try:
        losses = book.training_curve({name: answer}, config)
    finally:
        sys.setprofile(None)
    method = {"AdamW": "step", "Tokenizer": "encode"}.get(name, "forward")
    assert (method if isinstance(answer, type) else answer.__name__) in calls
    assert losses == pytest.approx(book.training_curve({}, config), abs=2e-3)


def test_training_leaves_everything_as_it_was():
    before = {name: getattr(module, name) for module in (book.tinylm.train, book.tinylm.model) for name in vars(module)}
    config = replace(book.tinylm.train.PRESETS["debug"], **SMALL)
    with pytest.raises(ZeroDivisionError):
        book.training_curve({"cross_entropy": lambda logits, targets: 1 / 0, "softmax": torch.softmax}, config)
    after = {name: getattr(module, name) for module in (book.tinylm.train, book.tinylm.model) for name in vars(module)}
    assert before == after


REFUSED = {"a stub": "raise NotImplementedError", "a mistake": "return x / x.sum(dim, keepdim=True)",
           "the book's own": "from tinylm.layers import softmax as s\n    return s(x, dim)"}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_the_command_does_not_train_with_a_refused_answer(capfd, file, tmp_path, monkeypatch, body):
    def here(job, *arguments, time_limit):
        assert job is book._check_job, "it trains"
        return in_this_process(job, *arguments, time_limit=time_limit)

    monkeypatch.setattr(book, "_in_child", here)
    (tmp_path / "bad.py").write_text(f"def softmax(x, dim):\n    {body}\n", encoding="utf-8")
    assert cli.main(["check", f"softmax={tmp_path / 'bad.py'}", f"RMSNorm={file}:MyNorm", "--train"]) == 1
    out, err = capfd.readouterr()
    assert "agrees with the book's" in out and err.count("\n") == 1 and "no training" in err, out + err


def test_the_command_trains_with_the_answer(capfd, file, monkeypatch):
    drawn, plot = [], book.plot_curves
    monkeypatch.setattr(book, "plot_curves", lambda curves: drawn.append(plot(curves)) or drawn[0])
    code, said = told(capfd, f"attention={file}:my_attention", "--train")
    assert code == 0 and "after 40 steps" in said and said.count("->") == 2, said
    assert file.with_name("my-attention.png").read_bytes()[:4] == b"\x89PNG"
    [axis] = drawn[0].axes
    ends = re.findall(r"^(with .+?) +(\S+) -> (\S+) after", said, re.MULTILINE)
    assert [name for name, *_ in ends] == ["with yours", "with the book's"] and len(axis.lines) == 2
    for line, (name, *logged) in zip(axis.lines, ends, strict=True):
        steps, losses = line.get_data()
        assert list(steps) == list(range(1, 41)) and [f"{losses[i]:.4f}" for i in (0, -1)] == logged
        assert line.get_label() == f"{name}: {losses[-1]:.3f}"


def test_the_curves_hold_every_loss():
    curves = {"with yours": [3.0, 2.0, 2.5], "with the book's": [3.0, 1.0], "hopeless": []}
    [axis] = book.plot_curves(curves).axes
    for line, losses in zip(axis.lines, curves.values(), strict=True):
        assert list(line.get_ydata()) == losses and list(line.get_xdata()) == list(range(1, len(losses) + 1))
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["with yours: 2.500", "with the book's: 1.000", "hopeless: diverged"]
