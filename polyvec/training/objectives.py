"""What a step of each kind of dataset asks of the vectors: its batch, and the loss over it.

Distillation is of arXiv 2004.09813 and 2106.04420, the pair stage of arXiv 2409.10173, section 4.2, the losses of the
adapters of its section 4.3. Every batch is a function of the seed and the step alone, of one dataset, and brings its
dataset's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyvec.data.sampling import Classmates, GroupedSampler, LabelSampler
from polyvec.errors import InputError
from polyvec.files import Record
from polyvec.losses import cosent, matryoshka, orthogonal_regularisation, pair_loss, separation_loss
from polyvec.training.distill import distillation_loss
from polyvec.training.examples import Dataset
from polyvec.training.gradcache import Encode
from polyvec.training.run import Run

#: An encoder of texts and the number of a step to the step's loss.
Objective = Callable[[Encode, int], Tensor]
_SEPARATED = 4  # texts a class in a batch of the separation adapter


def objective(
    run: Run,
    datasets: Sequence[Dataset],
    tasks: Sequence[str | None],
    dims: Sequence[int],
    projection: Tensor | None = None,
) -> Objective:
    """Return the loss of a step of ``run``: of a dataset drawn by ``run.shares``, else by size.

    ``tasks`` are the adapters that learn, None the base: of queries and of passages, or one for both. ``projection``
    is the matrix of a distillation that has one.
    """
    if run.stage == "distillation":
        parts = [_distillation(run, dataset, dims, projection) for dataset in datasets]
    else:
        parts = [_part(run, dataset, tasks, dims) for dataset in datasets]
    shares = np.array(run.shares or [part.mass for part in parts])

    def loss(encode: Encode, step: int) -> Tensor:
        chosen = np.random.default_rng((run.seed, step, 2)).choice(len(parts), p=shares / shares.sum())
        return parts[chosen].loss(encode, step)

    return loss


@dataclass(frozen=True)
class _Part:
    """The loss of one dataset, and how much it weighs among others."""

    loss: Objective
    mass: float


def _part(run: Run, dataset: Dataset, tasks: Sequence[str | None], dims: Sequence[int]) -> _Part:
    if dataset.kind == "labelled":
        return _labelled(run, dataset, tasks[0], dims)
    rows = _inferences(dataset.rows) if dataset.kind == "inference" else dataset.rows
    sampler = GroupedSampler(((group_of(row), row) for row in rows), smallest=1, smoothing=run.smoothing, seed=run.seed)

    def graded(encode: Encode, step: int) -> Tensor:
        drawn = [(r["text_a"], r["text_b"], r["score"]) for r in sampler.draw(step, run.batch_size)]
        return graded_step(encode, drawn, task=tasks[0], dims=dims, temperature=run.temperature)

    def pairs(encode: Encode, step: int) -> Tensor:
        sides = ("text_a", "text_b") if dataset.kind == "equals" else ("query", "passage")
        drawn = distinct(sampler.draw(step, run.batch_size), sides)
        answers = {row[sides[1]] for row in drawn}
        hard = [text for row in drawn for text in (row.get("negatives") or ())[: run.negatives]]
        return pair_step(
            encode,
            [(row[sides[0]], row[sides[1]]) for row in drawn],
            negatives=list(dict.fromkeys(text for text in hard if text not in answers)),
            tasks=(tasks[0], tasks[-1]),
            dims=dims,
            temperature=run.temperature,
            hardness=run.hardness,
            guard=run.guard,
            orthogonality=run.orthogonality,
        )

    return _Part(graded if dataset.kind == "graded" else pairs, sampler.mass)


def _labelled(run: Run, dataset: Dataset, task: str | None, dims: Sequence[int]) -> _Part:
    per_class = 2 if run.stage == "classification" else _SEPARATED
    sampler = LabelSampler(
        ((group_of(row), str(row["label"]), row["text"]) for row in dataset.rows),
        per_class=per_class,
        smoothing=run.smoothing,
        seed=run.seed,
    )
    if not sampler.datasets:
        raise InputError(
            f"{dataset.path} must have at least two classes of {per_class} texts of one lang and source, got "
            f"{len({str(row['label']) for row in dataset.rows})} labels in {len(dataset.rows)} examples; add examples"
        )

    def classification(encode: Encode, step: int) -> Tensor:
        drawn = sampler.draw_classmates(step, run.batch_size, run.negatives)
        return classification_step(encode, drawn, task=task, dims=dims, temperature=run.temperature)

    def separation(encode: Encode, step: int) -> Tensor:
        drawn = sampler.draw(step, max(2, run.batch_size // per_class))
        return separation_step(encode, *drawn, task=task, dims=dims, temperature=run.temperature)

    return _Part(classification if run.stage == "classification" else separation, sampler.mass)


def _distillation(run: Run, dataset: Dataset, dims: Sequence[int], projection: Tensor | None) -> _Part:
    sampler = GroupedSampler(
        ((group_of(row), (row["text"], i)) for i, row in enumerate(dataset.rows)),
        smallest=1,
        smoothing=run.smoothing,
        seed=run.seed,
    )
    targets = torch.from_numpy(np.stack([row["embedding"] for row in dataset.rows]))
    wanted = max(dims) if projection is None else projection.shape[1]
    if targets.shape[1] != wanted:
        remedy = "set projection = true" if projection is None else "give every file one teacher's vectors"
        raise InputError(f"{dataset.path}: embedding must have {wanted} numbers, got {targets.shape[1]}; {remedy}")

    def loss(encode: Encode, step: int) -> Tensor:
        drawn = sampler.draw(step, run.batch_size)
        own = [i for _, i in drawn]
        others = np.random.default_rng((run.seed, step, 3)).integers(len(targets), size=run.others)
        vectors = encode([text for text, _ in drawn], None)
        return distillation_loss(
            vectors,
            targets[[*own, *np.setdiff1d(others, own).tolist()]].to(vectors.device),
            dims=dims,
            relation=run.relation,
            temperature=run.temperature,
            projection=projection,
        )

    return _Part(loss, sampler.mass)


def group_of(row: Record) -> tuple[str, str]:
    """Return the language and source of an example: texts of one batch share both."""
    return str(row.get("lang", "")), str(row.get("source", ""))


def _inferences(rows: Sequence[Record]) -> list[Record]:
    """Return premises as queries of the hypotheses that they entail, with those that they contradict as negatives
    (arXiv 1908.10084 and after; neutral ones are neither)."""
    contradicted: dict[str, list[str]] = {}
    for row in rows:
        if row["label"] == "contradiction":
            contradicted.setdefault(row["premise"], []).append(row["hypothesis"])
    return [
        {
            **{key: row[key] for key in ("lang", "source") if key in row},
            "query": row["premise"],
            "passage": row["hypothesis"],
            "negatives": contradicted.get(row["premise"], []),
        }
        for row in rows
        if row["label"] == "entailment"
    ]


def distinct(rows: Sequence[Record], sides: tuple[str, str] = ("query", "passage")) -> list[Record]:
    """Return ``rows`` without false negatives, whose one or other side came before, case and spaces aside."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        keys = {(side, " ".join(row[side].casefold().split())) for side in sides}
        if not keys & seen:
            kept.append(row)
        seen |= keys
    return kept


def pair_step(
    encode: Encode,
    pairs: Sequence[tuple[str, str]],
    *,
    tasks: tuple[str | None, str | None],
    dims: Sequence[int],
    negatives: Sequence[str] = (),
    temperature: float = 0.05,
    hardness: float = 0.0,
    guard: float = 0.0,
    orthogonality: float = 0.0,
) -> Tensor:
    """Each query finds its passage among the batch's and the hard ``negatives``, and each passage its query.

    With the two retrieval tasks this trains both adapters at once, with ``(None, None)`` it is the pair stage of the
    base. ``orthogonality`` weighs the regularisation of both sides.
    """
    queries = encode([q for q, _ in pairs], tasks[0])
    passages = encode([*(p for _, p in pairs), *negatives], tasks[1])
    options = {"temperature": temperature, "hardness": hardness, "guard": guard}
    loss = matryoshka(pair_loss, queries, passages, dims=dims, **options)
    if orthogonality:
        for side in (queries, passages):
            loss = loss + orthogonality * matryoshka(orthogonal_regularisation, side, dims=dims)
    return loss


def graded_step(
    encode: Encode,
    graded: Sequence[tuple[str, str, float]],
    *,
    task: str | None,
    dims: Sequence[int],
    temperature: float = 0.05,
) -> Tensor:
    """Pairs of higher grade lie closer than pairs of lower grade."""
    vectors = encode([text for a, b, _ in graded for text in (a, b)], task)
    grades = torch.tensor([grade for _, _, grade in graded], device=vectors.device)
    return matryoshka(_graded_loss, vectors[0::2], vectors[1::2], dims=dims, grades=grades, temperature=temperature)


def _graded_loss(first: Tensor, second: Tensor, *, grades: Tensor, temperature: float) -> Tensor:
    return cosent((first * second).sum(dim=-1), grades, temperature=temperature)


def classification_step(
    encode: Encode, drawn: Classmates, *, task: str | None, dims: Sequence[int], temperature: float = 0.05
) -> Tensor:
    """Each text finds its classmate among the others' and among texts of other classes, both ways.

    The paper marks the texts of a tuple with an id so that a classmate among the negatives is told apart. Here a
    classmate is no negative at all: the loss leaves it out, and no text is read that is not the user's.
    """
    queries = encode(drawn.queries, task)
    passages = encode([*drawn.positives, *drawn.others], task)
    labels = torch.tensor([*drawn.labels, *drawn.other_labels], device=queries.device)
    related = labels[: len(queries)].unsqueeze(1) == labels
    return matryoshka(pair_loss, queries, passages, dims=dims, related=related, temperature=temperature)


def separation_step(
    encode: Encode,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    task: str | None,
    dims: Sequence[int],
    temperature: float = 0.05,
) -> Tensor:
    """Texts that share a label lie closer than texts that do not, over every two texts of the batch."""
    vectors = encode(texts, task)
    classes = torch.tensor(labels, device=vectors.device)
    return matryoshka(separation_loss, vectors, dims=dims, labels=classes, temperature=temperature)
