"""Imported by the server process of test_faults.py: does all once, so that the children it forks start quickly."""
import contextlib
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tell, tiny_config
from tqdm import tqdm

from tinylm.train import train

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread, so that forking is safe
tqdm.set_lock(threading.RLock())  # tqdm's own is shared by all children: one that is killed would keep it for ever
with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as quiet:
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        train(replace(tiny_config(Path(folder)), run_dir=f"{folder}/run", max_steps=2), tell)
