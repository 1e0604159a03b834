import sys
p=sys.argv[1]; s=open(p,encoding='utf8').read()
def r(a,b,n=1):
    global s
    assert s.count(a)>=1,("missing",a)
    s=s.replace(a,b)
r('''from .data import END_OF_TEXT, InputError, atomic_write, corpus_name, fable_logprob, fetch_corpus
from .model''' if p.endswith(".py") else '''from tinylm.data import END_OF_TEXT, InputError, atomic_write, corpus_name, fable_logprob, fetch_corpus
from tinylm.model''','''from .data import END_OF_TEXT, InputError, atomic_write, corpus_name, fable_logprob, fetch_corpus
from .distributed import any_rank, from_rank0, joined, mean_over_ranks, rank, rank0_first, spread, whole, world_size
from .model''' if p.endswith(".py") else '''from tinylm.data import END_OF_TEXT, InputError, atomic_write, corpus_name, fable_logprob, fetch_corpus
from tinylm.distributed import (
    any_rank,
    from_rank0,
    joined,
    mean_over_ranks,
    rank,
    rank0_first,
    spread,
    whole,
    world_size,
)
from tinylm.model''')
# the batch
r('''    """Gather the windows of one step."""
    return _windows(tokens, _starts_of_step(tokens, config, step), config.context_length, device)''',
'''    """Gather the windows of one step; of several processes, each takes its own."""
    starts = _starts_of_step(tokens, config, step)[rank() :: world_size()]
    return _windows(tokens, starts, config.context_length, device)''')
r('''    loss = _add_gradients(model, batch, config)
    grad_norm = clip_grad_norm(model.parameters(), config.max_l2_norm)
''','''    loss = mean_over_ranks(_add_gradients(model, batch, config))
    grad_norm = whole(clip_grad_norm(model.parameters(), config.max_l2_norm))
''')
# checkpoints
r('''    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
''','''    tensors = {key: whole(value) for key, value in state.items() if isinstance(value, Tensor)}
''')
r('''    files = {"model.safetensors": save_tensors(model.state_dict()), "optimizer.safetensors": save_tensors(moments)}
''','''    weights = {name: whole(value) for name, value in model.state_dict().items()}
    if rank() > 0:
        return
    files = {"model.safetensors": save_tensors(weights), "optimizer.safetensors": save_tensors(moments)}
''')
r('''    for old in _checkpoints(run.folder)[_CHECKPOINTS_KEPT:]:
        shutil.rmtree(old)
''','''    for old in _checkpoints(run.folder)[_CHECKPOINTS_KEPT:] if rank() == 0 else []:
        shutil.rmtree(old)
''')
# log
r('''        for name in self.names:
            with open(run_dir / name, "ab") as file:
                file.truncate(''','''        for name in self.names if rank() == 0 else ():
            with open(run_dir / name, "ab") as file:
                file.truncate(''')
r('''        """Add text to one of the files."""
        with open(''','''        """Add text to one of the files; of several processes, the first does."""
        if rank() > 0:
            return
        with open(''')
r('''    forward: Any  # the model itself, or what torch.compile made of it
''','''    eager: nn.Module  # the model, or what shares its training among processes
    forward: Any  # the same, or what torch.compile made of it
''')
r('train_step(run.model if watch else run.forward,','train_step(run.eager if watch else run.forward,')
r('''_add_gradients(run.model, _batch_of_step(''','''_add_gradients(run.eager, _batch_of_step(''')
r('stopping = stop.is_due()','stopping = any_rank(stop.is_due())')
r('''    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item()''','''    return whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))).item()''')
r('''    forward = torch.compile(model) if config.compile else model
''','''    eager = spread(model, optimizer, config.fsdp)
    forward = torch.compile(eager) if config.compile else eager
''')
r('''on_eval, device, model, forward, optimizer, log,
        step,''','''on_eval, device, model, eager, forward, optimizer,
        log, step,''')
r('''_tracker(config, folder, step))''','''_tracker(config, folder, step) if rank() == 0 else lambda row: None)''')
r('''    tqdm.write(message, file=sys.stderr)''','''    if rank() == 0:
        tqdm.write(message, file=sys.stderr)''')
r('''unit="step", mininterval=interval, dynamic_ncols=True)''','''unit="step", mininterval=interval, dynamic_ncols=True,
                disable=rank() > 0)''')
open(p,'w',encoding='utf8').write(s)
s=open(p,encoding='utf8').read()
r('''    grad_accum_steps: int = 1''','''    fsdp: bool = False  # under torchrun, share out the model among the processes instead of copying it
    grad_accum_steps: int = 1''')
r('''"watch", "tracker"}''','''"watch", "tracker", "fsdp"}''')
r('''        for name in self.names:
            with open(self.run_dir / name, "ab") as file:
                os.fsync''','''        for name in self.names if rank() == 0 else ():
            with open(self.run_dir / name, "ab") as file:
                os.fsync''')
r('''    text = run.on_eval(run.model, run.tokenizer, run.step) if run.on_eval else None
''','''    model = _in_one_piece(run)
    text = run.on_eval(model, run.tokenizer, run.step) if run.on_eval and rank() == 0 else None
''')
r('''def _save(run: _Run) -> None:''','''def _in_one_piece(run: _Run) -> TransformerLM:
    """Return the model itself, or a copy of one that FSDP has shared out."""
    if run.eager is not run.model or not run.config.fsdp:
        return run.model
    model = TransformerLM(run.config).to(run.device)
    model.load_state_dict({name: whole(value) for name, value in run.model.state_dict().items()})
    return model


def _save(run: _Run) -> None:''')
r('''    _report(run.folder)''','''    if rank() == 0:
        _report(run.folder)''')
r('''    try:
        descriptor = os.open(run_dir / ".lock",''','''    if rank() > 0:
        yield
        return
    try:
        descriptor = os.open(run_dir / ".lock",''')
r('''    with atomic_write(run_dir / "config.json", "w") as file:
        json.dump(content, file, indent=1)''','''    if rank() == 0:
        with atomic_write(run_dir / "config.json", "w") as file:
            json.dump(content, file, indent=1)''')
r('''    if (run_dir / ".lock").exists():
        with _locked''','''    if rank() > 0:
        return
    if (run_dir / ".lock").exists():
        with _locked''')
r('''    stamp = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{corpus_name(config.corpus)}-{config.preset}"
    run_dir = Path(config.run_dir or f"runs/{stamp}")
    _refuse_existing(run_dir)
    device = _check_machine(config)
    tokenizer, files, paths = _prepare(config)
''','''    with joined():
        if _is_restart(config):
            return resume(str(config.run_dir), on_eval)
        return _start(config, on_eval)


def _is_restart(config: TrainConfig) -> bool:
    """Whether torchrun has started this run before, so that it has to go on."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and config.run_dir is not None and Path(config.run_dir, "config.json").exists()


def _start(config: TrainConfig, on_eval: _OnEval | None) -> Path:
    """Train from the first step."""
    stamp = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{corpus_name(config.corpus)}-{config.preset}"
    run_dir = from_rank0(Path(config.run_dir or f"runs/{stamp}"))
    _refuse_existing(run_dir)
    device = _check_machine(config)
    tokenizer, files, paths = rank0_first(lambda: _prepare(config))
''')
r('''    run_dir.mkdir(parents=True)
    with _locked(run_dir):
        tokenizer.save(run_dir / "tokenizer")
''','''    if rank() == 0:
        run_dir.mkdir(parents=True)
    with _locked(run_dir):
        if rank() == 0:
            tokenizer.save(run_dir / "tokenizer")
''')
r('''    run_dir = Path(run_dir)
    _read_config(run_dir)
    with _locked(run_dir):
''','''    run_dir = Path(run_dir)
    _read_config(run_dir)
    with joined(), _locked(run_dir):
''')
r('''        tokenizer, files, _ = _prepare(changed)
''','''        tokenizer, files, _ = rank0_first(lambda: _prepare(changed))
''')
r('''        for leftover in (run_dir / "checkpoints").glob(".*.tmp"):
''','''        for leftover in (run_dir / "checkpoints").glob(".*.tmp") if rank() == 0 else ():
''')
r('''    if config.compile and device == "cpu" and not''','''    pieces = world_size() * config.grad_accum_steps
    if config.batch_size % pieces:
        raise InputError(f"batch_size {config.batch_size} is no multiple of {pieces}, processes x grad_accum_steps")
    if config.fsdp and world_size() == 1:
        raise InputError("fsdp shares out the model among processes, and there is one; start several by torchrun")
    if config.compile and device == "cpu" and not''')
open(p,'w',encoding='utf8').write(s)
