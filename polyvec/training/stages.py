"""The stages of arXiv 2409.10173, each from a ``Run``: what it reads, which parameters learn, the loss of a step.

Texts, batches and the masks of dropout of every stage are a function of the seed and the step's number alone, so that a
stopped run goes on exactly where it was, on any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from polyvec.atomic import check_new_folder
from polyvec.errors import InputError, NotFiniteError
from polyvec.files import Record
from polyvec.model.config import ModelConfig, mini, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.model.xlm_roberta import is_xlm_roberta, load_xlm_roberta
from polyvec.text.tokenizer import Tokenizer
from polyvec.training import distributed
from polyvec.training.adapters import TextEncoder, freeze_base, num_tokens, switch_dropout_off
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.examples import Dataset, read_dataset
from polyvec.training.gradcache import cached_shares
from polyvec.training.kernels import keep_freed_memory
from polyvec.training.loop import Schedule, train
from polyvec.training.mlm import MaskedLanguageModel
from polyvec.training.objectives import objective
from polyvec.training.own_adapter import ADAPTERS, add_tasks, new_tasks
from polyvec.training.progress import draw_losses, live_tensorboard
from polyvec.training.run import CHANGEABLE, FREE, Run
from polyvec.training.utilisation import Work, measured_peak
from polyvec.training.windows import MaskedWindows, read_windows

_SHAPES: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "mini": mini, "jina-v3": ModelConfig}
_OF_BASE = ("distillation", "pairs")  # stages with the loss of vectors that train the base
Shares = Callable[[int], Iterator[Tensor]]
Group = tuple[Sequence[nn.Parameter], float]


def run_stage(
    run: Run,
    *,
    records: Mapping[str, list[Record]] | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
) -> list[float]:
    """Train as ``run`` says, write the model to ``run.output`` and return the loss of every step.

    The same run again goes on from its checkpoint, and so does one that differs in ``FREE`` or ``CHANGEABLE`` fields.
    ``records`` holds the examples of those of ``run.data`` that are in memory. ``notice`` is told what of the data is
    left out, what has changed, and of a stop by a signal. Raises ``InputError`` before any step for data that does
    not fit and for an output that holds something else, and where it cannot be written; ``NotFiniteError`` for a loss
    or weights that are not finite. What was saved before stays.
    """
    with distributed.processes() as device:
        torch.manual_seed(run.seed)
        if device.type == "cpu":
            keep_freed_memory()
        output = Path(run.output)
        checkpoint = Checkpoint(
            output / "checkpoint.safetensors", every=run.save_every, run=asdict(run), free=FREE, changeable=CHANGEABLE,
            notice=notice if distributed.is_first() else lambda sentence: None,
        )  # fmt: skip
        if not checkpoint.path.exists():
            check_new_folder(output, besides=checkpoint.parts_pattern)
        distributed.wait_for_all()  # the first to go on writes there
        encoder, companions = _open(run)
        tokenizer_file = companions / "tokenizer.json" if companions.is_dir() else companions
        datasets = _read(run, encoder.config, tokenizer_file, records or {})
        # Names alone would let a run go on with other examples under them, to weights that no run gives.
        checkpoint.run["examples"] = [dataset.state() for dataset in datasets]
        released = encoder.config
        if run.rope_theta:
            encoder.config = replace(released, rope_theta=run.rope_theta)
        if not run.dropout:
            switch_dropout_off(encoder)
        encoder.gradient_checkpointing = run.gradient_checkpointing
        encoder.train().to(device)
        tokenizer = Tokenizer.from_file(tokenizer_file, **encoder.config.tokenizer_ids)
        groups, shares, work, left_out = _prepare(run, encoder, tokenizer, datasets)
        for sentence in left_out:
            notice(sentence)
        log_path = output / "training.jsonl"
        with _plain_errors(output), live_tensorboard(log_path, output / "tensorboard") as add:

            def told(row: dict[str, float]) -> None:
                add(row)
                if report:
                    report(row)

            output.mkdir(parents=True, exist_ok=True)
            losses = train(
                groups,
                shares,
                Schedule(steps=run.steps, learning_rate=run.learning_rate, warmup_steps=run.warmup_steps),
                log_path=log_path,
                log_every=min(20, run.steps),
                checkpoint=checkpoint,
                average=run.average,
                work=work,
                peak=measured_peak(device, bf16=run.bf16),
                report=told,
                notice=notice,
                names={parameter: name for name, parameter in encoder.named_parameters()},
            )
            state = {name: distributed.whole(tensor).cpu() for name, tensor in encoder.state_dict().items()}
            if distributed.is_first():
                draw_losses(log_path, output / "training.svg")
                trained = Encoder(released)
                trained.load_state_dict(state)
                save_encoder(trained.eval(), output)
                if companions.is_dir():
                    copy_companions(companions, output)
                else:
                    shutil.copyfile(companions, output / "tokenizer.json")
    return losses


@contextmanager
def _plain_errors(output: Path) -> Iterator[None]:
    """Turn what a full disk, a quota or a folder of another user raises into ``InputError``, and name the run of
    numbers that are not finite."""
    try:
        yield
    except FloatingPointError as error:
        raise NotFiniteError(f"{output}: {error}; the last checkpoint there is of finite numbers") from error
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"output must be a folder to write in, with room left, got {output}: {error}; make room and give the same "
            "command again, which goes on from the last checkpoint"
        ) from error


def _open(run: Run) -> tuple[Encoder, Path]:
    """Return the model that the run starts from, and the folder or file that its tokenizer is from."""
    if run.architecture:
        encoder, companions = Encoder(_SHAPES[run.architecture]()), Path(run.tokenizer)
    else:
        companions = resolve_model_folder(None if run.model == "polyvec-mini" else run.model)
        encoder = load_xlm_roberta(companions) if is_xlm_roberta(companions) else load_encoder(companions)
    if run.adapter:
        encoder = add_tasks(encoder, new_tasks(run.adapter, run.stage))
    if run.max_tokens > encoder.config.max_tokens:
        raise InputError(f"max_tokens must be at most the model's {encoder.config.max_tokens}, got {run.max_tokens}")
    return encoder, companions


def _read(run: Run, config: ModelConfig, tokenizer_file: Path, records: Mapping[str, list[Record]]) -> list[Dataset]:
    if run.stage != "mlm":
        return [read_dataset(source, run.stage, records.get(source)) for source in run.data]
    return [
        read_windows(source, tokenizer_file, config.tokenizer_ids, run.max_tokens, records.get(source))
        for source in run.data
    ]


def _learning(run: Run) -> tuple[str | None, ...]:
    """Return the names of the adapters that learn, of queries and of passages; None is the base."""
    if run.stage in _OF_BASE:
        return (None,)
    return tuple(new_tasks(run.adapter, run.stage)) if run.adapter else ADAPTERS[run.stage]


def _prepare(
    run: Run, encoder: Encoder, tokenizer: Tokenizer, datasets: Sequence[Dataset]
) -> tuple[list[Group], Shares, Work, list[str]]:
    """Return what learns, the shares of a step's loss, the count of what they did, and what of the data is left out."""
    left_out = [f"{dataset.source}: {dataset.left_out}" for dataset in datasets if dataset.left_out]
    if run.stage == "mlm":
        windows = MaskedWindows(run, datasets, mask_token_id=encoder.config.vocab_size - 1)
        model = MaskedLanguageModel(encoder).to(encoder.embeddings.word_embeddings.weight.device)
        if run.sharded:
            distributed.shard(model, encoder.layers)
        groups: list[Group] = [(_base_parameters(encoder), 1.0), (model.head_parameters, 1.0)]
        return groups, lambda step: windows.shares(step, model), windows.work, left_out
    of_base = run.stage in _OF_BASE
    if of_base:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(".lora_" not in name)
    else:
        freeze_base(encoder)
    if run.sharded:
        distributed.shard(encoder, encoder.layers)
    learning = _base_parameters(encoder) if of_base else [p for p in encoder.parameters() if p.requires_grad]
    device = encoder.embeddings.word_embeddings.weight.device
    heads = [_projection(encoder.config.hidden_size, datasets[0], device)] if run.projection else []
    loss = objective(run, datasets, _learning(run), encoder.config.matryoshka_dims, *heads, notice=left_out.append)
    texts = TextEncoder(encoder, tokenizer, max_tokens=run.max_tokens, part_tokens=run.part_tokens, bf16=run.bf16)

    def shares(step: int) -> Iterator[Tensor]:
        return cached_shares(
            lambda encode: loss(encode, step), texts.parts, texts.embed, heads, seed=(run.seed, step),
            size_of=num_tokens, room=run.part_tokens,
        )  # fmt: skip

    return [(learning, 1.0), (heads, 1.0)], shares, texts.work, left_out


def _projection(width: int, dataset: Dataset, device: torch.device) -> nn.Parameter:
    """Return a random (D, T) matrix from the student's width to that of the teacher's vectors in ``dataset``."""
    shape = (width, dataset.embeddings([0]).shape[1])
    return nn.Parameter(torch.randn(shape, device=device) * width**-0.5)


def _base_parameters(encoder: Encoder) -> list[nn.Parameter]:
    return [p for n, p in encoder.named_parameters() if ".lora_" not in n and not n.startswith("pooler.")]
