"""An encoder as training sees it: which parameters learn, and texts with a task to vectors.

Shape letters: B texts, N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from polyvec.inference.batching import Batch, plan_batches
from polyvec.model.encoder import Attention, Encoder
from polyvec.model.pooling import mean_pool
from polyvec.tasks import resolve_task
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.loop import training_kernels
from polyvec.training.utilisation import Work


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


def num_tokens(part: Batch) -> int:
    return len(part.input_ids)


class TextEncoder:
    """Texts and a task to vectors, with the adapter and its prompt as at inference; None is the base model.

    Texts of like length run together in parts. Called, it gives one graph over all of them; ``parts`` and ``embed``
    are the two halves, for batches whose graph would not fit (``gradcache``). ``work`` counts what was embedded
    with a graph.
    """

    def __init__(
        self, encoder: Encoder, tokenizer: Tokenizer, *, max_tokens: int, part_tokens: int = 2048, bf16: bool = False
    ) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.max_tokens, self.part_tokens, self.bf16 = max_tokens, part_tokens, bf16
        self.work = Work()
        self._trains_base = encoder.embeddings.word_embeddings.weight.requires_grad

    def parts(self, texts: Sequence[str], name: str | None) -> tuple[list[Batch], Tensor]:
        """Return packed parts and the (B,) place of each text among their rows."""
        task = resolve_task(name, self.encoder.config.prompts)
        rows = [
            e.input_ids for e in self.tokenizer.tokens_batch(list(texts), [task.prompt] * len(texts), self.max_tokens)
        ]
        plans = plan_batches([len(row) for row in rows], batch_tokens=self.part_tokens)
        order = torch.tensor([i for plan in plans for i in plan])
        return [Batch.of([rows[i] for i in p], [task.adapter_id] * len(p)) for p in plans], order.argsort()

    def embed(self, part: Batch) -> Tensor:
        """Return the (b, D) mean-pooled vectors of a part."""
        device = self.encoder.embeddings.word_embeddings.weight.device
        input_ids, cu_seqlens, task_ids = (
            torch.from_numpy(array).to(device) for array in (part.input_ids, part.cu_seqlens, part.task_ids)
        )
        if torch.is_grad_enabled():
            self.work.add(self.encoder.config, np.diff(part.cu_seqlens).tolist(), trains_base=self._trains_base)
        with training_kernels(device, bf16=self.bf16, longest=part.max_seqlen):
            states = self.encoder(input_ids, cu_seqlens, task_ids, max_seqlen=part.max_seqlen, adapters=part.adapters)
            return mean_pool(states, cu_seqlens)

    def __call__(self, texts: Sequence[str], name: str | None) -> Tensor:
        parts, places = self.parts(texts, name)
        vectors = torch.cat([self.embed(part) for part in parts])
        return vectors[places.to(vectors.device)]
