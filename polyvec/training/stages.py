"""The stages of arXiv 2409.10173, each from a ``Run``: what it reads, which parameters learn, the loss of a step.

Texts and batches of every stage are a function of the seed and the step's number alone, so that a stopped run goes on
exactly where it was, on any number of processes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyvec.data.filters import overlaps
from polyvec.data.masking import IGNORED, mask_words, word_starts
from polyvec.data.sampling import GroupedSampler, LabelSampler
from polyvec.errors import InputError
from polyvec.files import Record
from polyvec.inference.batching import plan_batches
from polyvec.model.config import ModelConfig, mini, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training import distributed
from polyvec.training.adapters import (
    TextEncoder,
    classification_step,
    freeze_base,
    retrieval_step,
    separation_step,
    switch_dropout_off,
    text_matching_step,
)
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.examples import COLUMNS, read_examples
from polyvec.training.gradcache import Encode, cached_shares
from polyvec.training.loop import Schedule, train
from polyvec.training.mlm import MaskedLanguageHead, masked_loss_sum
from polyvec.training.progress import draw_losses, write_tensorboard
from polyvec.training.run import Run

_SHAPES: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "mini": mini, "jina-v3": ModelConfig}
Shares = Callable[[int], Iterator[Tensor]]
Group = tuple[Sequence[nn.Parameter], float]


def run_stage(run: Run, *, report: Callable[[dict[str, float]], None] | None = None) -> list[float]:
    """Train as ``run`` says, write the model to ``run.output`` and return the loss of every step.

    The same run again goes on from its checkpoint. Raises ``InputError`` before any step for data that does not fit.
    """
    with distributed.processes() as device:
        torch.manual_seed(run.seed)
        output = Path(run.output)
        encoder, tokenizer, companions = _open(run)
        examples = [row for path in run.data for row in read_examples(Path(path), COLUMNS[run.stage], run.stage)]
        if not run.dropout:
            switch_dropout_off(encoder)
        encoder.train().to(device)
        groups, shares, counter = _prepare(run, encoder, tokenizer, examples)
        output.mkdir(parents=True, exist_ok=True)
        losses = train(
            groups,
            shares,
            Schedule(steps=run.steps, learning_rate=run.learning_rate, warmup_steps=run.warmup_steps),
            log_path=output / "training.jsonl",
            log_every=min(20, run.steps),
            checkpoint=Checkpoint(output / "checkpoint.safetensors", every=run.save_every, run=asdict(run)),
            average=run.average,
            num_tokens=counter,
            report=report,
        )
        state = {name: distributed.whole(tensor).cpu() for name, tensor in encoder.state_dict().items()}
        if distributed.is_first():
            draw_losses(output / "training.jsonl", output / "training.svg")
            write_tensorboard(output / "training.jsonl", output / "tensorboard")
            trained = Encoder(encoder.config)
            trained.load_state_dict(state)
            save_encoder(trained.eval(), output)
            if companions.is_dir():
                copy_companions(companions, output)
            else:
                shutil.copyfile(companions, output / "tokenizer.json")
    return losses


def _open(run: Run) -> tuple[Encoder, Tokenizer, Path]:
    """Return the model that the run starts from, its tokenizer, and the folder or file that the tokenizer is from."""
    if run.architecture:
        encoder, companions = Encoder(_SHAPES[run.architecture]()), Path(run.tokenizer)
        path = companions
    else:
        companions = resolve_model_folder(None if run.model == "polyvec-mini" else run.model)
        encoder, path = load_encoder(companions), companions / "tokenizer.json"
    config = encoder.config
    if run.max_tokens > config.max_tokens:
        raise InputError(f"max_tokens must be at most the model's {config.max_tokens}, got {run.max_tokens}")
    tokenizer = Tokenizer.from_file(
        path, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    return encoder, tokenizer, companions


def _prepare(
    run: Run, encoder: Encoder, tokenizer: Tokenizer, examples: list[Record]
) -> tuple[list[Group], Shares, Callable[[], int]]:
    """Return what learns, the shares of a step's loss, and a counter of the tokens seen."""
    if run.stage == "mlm":
        windows = MaskedWindows(run, tokenizer, examples, mask_token_id=encoder.config.vocab_size - 1)
        head = MaskedLanguageHead(encoder).to(encoder.embeddings.word_embeddings.weight.device)
        base = _base_parameters(encoder)
        if run.sharded:
            raise InputError("sharded must be false for stage mlm, whose head reads the whole word table, got true")
        return (
            [(base, 1.0), (list(head.parameters()), 1.0)],
            lambda step: windows.shares(step, encoder, head),
            (lambda: windows.num_tokens),
        )
    loss = contrastive_step(run, examples, encoder.config.matryoshka_dims)
    if run.stage == "pairs":
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(".lora_" not in name)
        if run.sharded:
            distributed.shard(encoder)
        learning = _base_parameters(encoder)
    else:
        freeze_base(encoder)
        if run.sharded:
            distributed.shard(encoder)
        learning = [p for p in encoder.parameters() if p.requires_grad]
    texts = TextEncoder(encoder, tokenizer, max_tokens=run.max_tokens, part_tokens=run.part_tokens, bf16=run.bf16)

    def shares(step: int) -> Iterator[Tensor]:
        return cached_shares(lambda encode: loss(encode, step), texts.parts, texts.embed)

    return [(learning, 1.0)], shares, lambda: texts.num_tokens


def _base_parameters(encoder: Encoder) -> list[nn.Parameter]:
    return [p for n, p in encoder.named_parameters() if ".lora_" not in n and not n.startswith("pooler.")]


def contrastive_step(run: Run, examples: list[Record], dims: Sequence[int]) -> Callable[[Encode, int], Tensor]:
    """Return the loss of a step as a function of an encoder of texts and the step's number."""
    if run.stage in ("classification", "separation"):
        per_class = 2 if run.stage == "classification" else 4
        labels = LabelSampler(
            ((group_of(row), str(row["label"]), row["text"]) for row in examples), per_class=per_class, seed=run.seed
        )
        num_classes = max(2, run.batch_size // per_class)
        if run.stage == "classification":
            return lambda encode, step: classification_step(encode, labels.draw(step, num_classes)[0], dims=dims)
        return lambda encode, step: separation_step(encode, *labels.draw(step, num_classes), dims=dims)
    rows = GroupedSampler(
        ((group_of(row), row) for row in examples), smallest=1, smoothing=run.smoothing, seed=run.seed
    )
    if run.stage == "text-matching":
        return lambda encode, step: text_matching_step(
            encode, [(r["text_a"], r["text_b"], r["score"]) for r in rows.draw(step, run.batch_size)], dims=dims
        )
    tasks = (None, None) if run.stage == "pairs" else ("retrieval.query", "retrieval.passage")

    def search(encode: Encode, step: int) -> Tensor:
        drawn = distinct(rows.draw(step, run.batch_size))
        answers = {row["passage"] for row in drawn}
        negatives = dict.fromkeys(text for row in drawn for text in row.get("negatives") or () if text not in answers)
        return retrieval_step(
            encode,
            [(row["query"], row["passage"]) for row in drawn],
            negatives=list(negatives),
            dims=dims,
            tasks=tasks,
            temperature=run.temperature,
            hardness=run.hardness,
            orthogonality=run.orthogonality,
        )

    return search


def group_of(row: Record) -> tuple[str, str]:
    """Return the language and source of an example: texts of one batch share both."""
    return str(row.get("lang", "")), str(row.get("source", ""))


def distinct(rows: Sequence[Record]) -> list[Record]:
    """Return ``rows`` without false negatives, whose query or passage came before, case and spaces aside, and without
    pairs that teach to compare letters (``overlaps``)."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        keys = {(side, " ".join(row[side].casefold().split())) for side in ("query", "passage")}
        if not keys & seen and not overlaps(row["query"], row["passage"]):
            kept.append(row)
        seen |= keys
    return kept


class MaskedWindows:
    """Running text as windows of up to ``max_tokens``, one language a batch, words hidden anew at every step."""

    def __init__(self, run: Run, tokenizer: Tokenizer, examples: list[Record], *, mask_token_id: int) -> None:
        self.run, self.mask_token_id, self.num_tokens = run, mask_token_id, 0
        self.sampler = GroupedSampler(
            ((row.get("lang", ""), window) for row in examples for window in _windows(row["text"], tokenizer, run)),
            smallest=1,
            smoothing=run.smoothing,
            seed=run.seed,
        )

    def shares(self, step: int, encoder: Encoder, head: MaskedLanguageHead) -> Iterator[Tensor]:
        """Yield shares of the mean cross-entropy of the step's hidden tokens."""
        rng = np.random.default_rng((self.run.seed, step, 1))
        rate = self.run.mask_rate
        rows = [
            mask_words(ids, starts, rng, rate=rate, mask_token_id=self.mask_token_id)
            for ids, starts in self.sampler.draw(step, self.run.batch_size)
        ]
        hidden = sum(int((labels != IGNORED).sum()) for _, labels in rows)
        plans = plan_batches([len(ids) for ids, _ in rows], batch_tokens=self.run.part_tokens)
        mine, own = distributed.my_share(len(plans)), distributed.num_own(len(plans))
        device = head.bias.device
        for i in mine[:own]:
            ids, labels = (np.concatenate([rows[j][side] for j in plans[i]]).astype(np.int64) for side in (0, 1))
            cu_seqlens = torch.tensor([0, *(len(rows[j][0]) for j in plans[i])]).cumsum(0).int()
            self.num_tokens += len(ids)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.run.bf16):
                total = masked_loss_sum(
                    encoder, head, torch.from_numpy(ids).to(device), cu_seqlens.to(device),
                    torch.from_numpy(labels).to(device),
                )  # fmt: skip
            yield total / hidden


def _windows(text: str, tokenizer: Tokenizer, run: Run) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (n,) ids from ``<s>`` to ``</s>`` and (n,) word starts, of like length, until the text is used up."""
    encoding = tokenizer.encode(text)
    starts = word_starts(text, encoding)
    inner = len(encoding) - 2
    if inner < 1:
        return
    num_windows = math.ceil(inner / (run.max_tokens - 2))
    first, last = encoding.input_ids[:1], encoding.input_ids[-1:]
    one = np.ones(1, dtype=np.bool_)
    for part in np.array_split(np.arange(1, inner + 1), num_windows):
        yield (
            np.concatenate((first, encoding.input_ids[part], last)),
            np.concatenate((one, one, starts[part][1:], one)),
        )
