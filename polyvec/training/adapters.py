"""The five adapters over a frozen base (arXiv 2409.10173, section 4.3): one loss for each kind of task.

Shape letters: B texts, N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from polyvec.inference.batching import Batch, plan_batches
from polyvec.losses import cosent, matryoshka, pair_loss, separation_loss
from polyvec.model.encoder import Attention, Encoder
from polyvec.model.pooling import mean_pool
from polyvec.tasks import resolve_task
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.loop import fast_short_texts

#: Texts with their task to (B, D) mean-pooled vectors.
Encode = Callable[[Sequence[str], str], Tensor]

_PART_TOKENS = 2048  # of texts that run together; larger leaves the cache


def freeze_base(encoder: Encoder) -> list[nn.Parameter]:
    """Leave gradients to the adapters alone and return their parameters; the base stays bit for bit."""
    adapters = []
    for name, parameter in encoder.named_parameters():
        is_adapter = ".lora_" in name and not name.startswith("pooler.")
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            adapters.append(parameter)
    return adapters


def switch_dropout_off(encoder: Encoder) -> None:
    """For runs too short to overfit, where noise costs steps."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Attention):
            module.dropout = 0.0


def text_encoder(encoder: Encoder, tokenizer: Tokenizer, *, max_tokens: int, bf16: bool = False) -> Encode:
    """Return a function of texts and a task that applies the adapter with its prompt, as at inference.

    Texts of like length run together in parts, one graph over all: a loss may compare any two of them.
    """

    def encode(texts: Sequence[str], name: str) -> Tensor:
        task = resolve_task(name, encoder.config.prompts)
        rows = [e.input_ids for e in tokenizer.encode_batch(list(texts), [task.prompt] * len(texts), max_tokens)]
        plans = plan_batches([len(row) for row in rows], batch_tokens=_PART_TOKENS)
        parts = []
        for plan in plans:
            batch = Batch.of([rows[i] for i in plan], [task.adapter_id] * len(plan))
            cu_seqlens = torch.from_numpy(batch.cu_seqlens)
            with fast_short_texts(bf16=bf16):
                states = encoder(torch.from_numpy(batch.input_ids), cu_seqlens, torch.from_numpy(batch.task_ids))
            parts.append(mean_pool(states, cu_seqlens))
        order = torch.tensor([i for plan in plans for i in plan])
        return torch.cat(parts)[order.argsort()]

    return encode


def retrieval_step(
    encode: Encode,
    pairs: Sequence[tuple[str, str]],
    *,
    dims: Sequence[int],
    tasks: tuple[str, str] = ("retrieval.query", "retrieval.passage"),
) -> Tensor:
    """Both retrieval adapters at once: each query finds its passage among the batch's, and the reverse."""
    queries = encode([q for q, _ in pairs], tasks[0])
    passages = encode([p for _, p in pairs], tasks[1])
    return matryoshka(pair_loss, queries, passages, dims=dims, temperature=0.05)


def text_matching_step(
    encode: Encode,
    graded: Sequence[tuple[str, str, float]],
    translations: Sequence[tuple[str, str]] = (),
    *,
    dims: Sequence[int],
    translation_weight: float = 0.5,
    task: str = "text-matching",
) -> Tensor:
    """Order of graded similarity, plus translations found among other sentences so that languages stay together."""
    texts = [t for a, b, _ in graded for t in (a, b)] + [t for pair in translations for t in pair]
    vectors = encode(texts, task)
    pairs, bitext = vectors[: 2 * len(graded)], vectors[2 * len(graded) :]
    grades = torch.tensor([grade for _, _, grade in graded])
    order = matryoshka(_graded_loss, pairs[0::2], pairs[1::2], dims=dims, grades=grades)
    if not translations:
        return order
    meeting = matryoshka(pair_loss, bitext[0::2], bitext[1::2], dims=dims, temperature=0.05)
    return order + translation_weight * meeting


def _graded_loss(first: Tensor, second: Tensor, *, grades: Tensor) -> Tensor:
    return cosent((first * second).sum(dim=-1), grades, temperature=0.05)


def classification_step(
    encode: Encode, texts: Sequence[str], *, dims: Sequence[int], task: str = "classification"
) -> Tensor:
    """``texts`` come two a class: each finds its classmate.

    The paper marks tuples with an id so that a classmate never stands among the negatives; with one pair a class, no
    mark is needed.
    """
    vectors = encode(texts, task)
    return matryoshka(pair_loss, vectors[0::2], vectors[1::2], dims=dims, temperature=0.05)


def separation_step(
    encode: Encode, texts: Sequence[str], labels: Sequence[int], *, dims: Sequence[int], task: str = "separation"
) -> Tensor:
    """Texts that share a label lie closer than texts that do not, over every two texts of the batch."""
    vectors = encode(texts, task)
    return matryoshka(separation_loss, vectors, dims=dims, labels=torch.tensor(labels), temperature=0.05)
