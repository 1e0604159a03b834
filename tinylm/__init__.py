"""A book that runs: a Transformer language model from scratch, one chapter to a module.

In the order of the chapters: `data`, `tokenizer`, `layers`, `rope`, `model`, `optim`, `distributed`, `saving`, `train`,
`ablations`, `generate`, `export`, `kernels`, `cli`, `check`, `answers`. Most programs begin with `train.PRESETS`,
`train.train`, `train.load_run` and `generate.generate`.
"""

__version__ = "0.2.0.dev0"
