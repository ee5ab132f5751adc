"""What a step of each kind of dataset asks of the vectors: its batch, and the loss over it.

Distillation is of arXiv 2004.09813 and 2106.04420, the pair stage of arXiv 2409.10173, section 4.2, the losses of the
adapters of its section 4.3. Every batch is a function of the seed and the step alone, of one dataset, and brings its
dataset's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyvec.data.sampling import GroupedSampler, LabelSampler
from polyvec.errors import InputError
from polyvec.losses import cosent, matryoshka, orthogonal_regularisation, pair_loss, separation_loss
from polyvec.training.distill import distillation_loss
from polyvec.training.examples import COLUMNS, Dataset, left_out_of
from polyvec.training.gradcache import Encode
from polyvec.training.run import Run

#: An encoder of texts and the number of a step to the step's loss.
Objective = Callable[[Encode, int], Tensor]
#: A query, its answer, and hard negatives.
Pair = tuple[str, str, Sequence[str]]
Draw = Callable[[int], list[Pair]]
_ALONE = "are alone in their lang and source"
_SEPARATED = 4  # texts a class in a batch of the separation adapter


def objective(
    run: Run,
    datasets: Sequence[Dataset],
    tasks: Sequence[str | None],
    dims: Sequence[int],
    projection: Tensor | None = None,
    *,
    notice: Callable[[str], None] = lambda sentence: None,
) -> Objective:
    """Return the loss of a step of ``run``: of a dataset drawn by ``run.shares``, else by size.

    ``tasks`` are the adapters that learn, None the base: of queries and of passages, or one for both. ``projection``
    is the matrix of a distillation that has one. ``notice`` is told which examples no step will draw. Raises
    ``InputError`` for data that has nothing to learn from.
    """
    if run.stage == "classification" and all(dataset.kind != "labelled" for dataset in datasets):
        sources = ", ".join(dataset.source for dataset in datasets)
        raise InputError(
            f"data must hold texts with labels in stage classification, got pairs alone in {sources}; add a file with "
            "the columns text, label, or train another stage"
        )
    if run.stage == "distillation":
        parts = [_distillation(run, dataset, dims, projection) for dataset in datasets]
    else:
        parts = [_part(run, dataset, tasks, dims) for dataset in datasets]
    for dataset, part in zip(datasets, parts, strict=True):
        if part.left_out:
            notice(f"{dataset.source}: {part.left_out}")
    shares = np.array(run.shares or [part.mass for part in parts])

    def loss(encode: Encode, step: int) -> Tensor:
        chosen = np.random.default_rng((run.seed, step, 2)).choice(len(parts), p=shares / shares.sum())
        return parts[chosen].loss(encode, step)

    return loss


@dataclass(frozen=True)
class _Part:
    """The loss of one dataset, how much it weighs among others, and what of it is never drawn, in words."""

    loss: Objective
    mass: float
    left_out: str = ""


def _part(run: Run, dataset: Dataset, tasks: Sequence[str | None], dims: Sequence[int]) -> _Part:
    if dataset.kind == "labelled":
        return _labelled(run, dataset, tasks[0], dims)
    if dataset.kind == "graded":
        return _graded(run, dataset, tasks[0], dims)
    draw, mass, left_out = (_inferences if dataset.kind == "inference" else _pairs)(run, dataset)

    def loss(encode: Encode, step: int) -> Tensor:
        drawn = distinct(draw(step))
        answers = {answer for _, answer, _ in drawn}
        hard = [text for _, _, negatives in drawn for text in negatives[: run.negatives]]
        return pair_step(
            encode,
            [(query, answer) for query, answer, _ in drawn],
            negatives=list(dict.fromkeys(text for text in hard if text not in answers)),
            tasks=(tasks[0], tasks[-1]),
            dims=dims,
            temperature=run.temperature,
            hardness=run.hardness,
            guard=run.guard,
            orthogonality=run.orthogonality,
        )

    return _Part(loss, mass, left_out)


def _sampler(
    run: Run, dataset: Dataset, groups: Iterable[tuple[Any, ...]], *, has_negatives: bool = False
) -> GroupedSampler:
    """Return one whose batches share language and source, which ``groups`` tells of each pair. Without negatives a pair
    alone in its group has nothing to be told apart from, and is never drawn."""
    sampler = GroupedSampler(groups, smallest=1 if has_negatives else 2, smoothing=run.smoothing, seed=run.seed)
    if not sampler.groups:
        raise InputError(
            f"{dataset.source} must hold two pairs of one lang and source to tell apart, got none in {len(dataset)} "
            "examples; add examples, or leave out the columns lang and source"
        )
    return sampler


def _pairs(run: Run, dataset: Dataset) -> tuple[Draw, float, str]:
    has_negatives = any(negatives for (negatives,) in dataset.walk("negatives"))
    sampler = _sampler(run, dataset, dataset.walk("lang", "source"), has_negatives=has_negatives)
    sides = COLUMNS[dataset.kind]

    def draw(step: int) -> list[Pair]:
        rows = dataset.take(sampler.draw(step, run.batch_size))
        return [(row[sides[0]], row[sides[1]], row["negatives"]) for row in rows]

    return draw, sampler.mass, left_out_of(len(dataset), sampler.num_records, "pairs", f"that {_ALONE}")


def _inferences(run: Run, dataset: Dataset) -> tuple[Draw, float, str]:
    """Premises as queries of the hypotheses that they entail, with those that they contradict as negatives
    (arXiv 1908.10084 and after; neutral ones are neither)."""
    entailed: list[int] = []
    premises: list[str] = []
    groups: list[tuple[str, str]] = []
    contradicted: dict[str, list[int]] = {}
    for number, (premise, label, *group) in enumerate(dataset.walk("premise", "label", "lang", "source")):
        if label == "entailment":
            entailed.append(number)
            premises.append(premise)
            groups.append((group[0], group[1]))
        elif label == "contradiction":
            contradicted.setdefault(premise, []).append(number)
    if not entailed:
        raise InputError(f"{dataset.source} must hold an entailment, got {len(dataset)} examples of other labels")
    has_negatives = not contradicted.keys().isdisjoint(premises)
    sampler = _sampler(run, dataset, groups, has_negatives=has_negatives)
    entailing = {premises[i] for group in sampler.groups for i in group}
    used = sampler.num_records + sum(len(numbers) for p, numbers in contradicted.items() if p in entailing)
    why = f"that are neutral, or contradict a premise that entails nothing, or {_ALONE}"

    def draw(step: int) -> list[Pair]:
        rows = dataset.take([entailed[i] for i in sampler.draw(step, run.batch_size)])
        negatives = [contradicted.get(row["premise"], []) for row in rows]
        texts = iter([row["hypothesis"] for row in dataset.take([i for numbers in negatives for i in numbers])])
        return [
            (row["premise"], row["hypothesis"], [next(texts) for _ in numbers])
            for row, numbers in zip(rows, negatives, strict=True)
        ]

    return draw, sampler.mass, left_out_of(len(dataset), used, "inferences", why)


def _graded(run: Run, dataset: Dataset, task: str | None, dims: Sequence[int]) -> _Part:
    sampler = _sampler(run, dataset, dataset.walk("lang", "source"))

    def loss(encode: Encode, step: int) -> Tensor:
        rows = dataset.take(sampler.draw(step, run.batch_size))
        graded = [(row["text_a"], row["text_b"], row["score"]) for row in rows]
        return graded_step(encode, graded, task=task, dims=dims, temperature=run.temperature)

    return _Part(loss, sampler.mass, left_out_of(len(dataset), sampler.num_records, "pairs", f"that {_ALONE}"))


def _labelled(run: Run, dataset: Dataset, task: str | None, dims: Sequence[int]) -> _Part:
    has_classmates = run.stage == "classification" or run.classmates
    per_class = 2 if has_classmates else _SEPARATED
    labelled = (((lang, source), label) for lang, source, label in dataset.walk("lang", "source", "label"))
    sampler = LabelSampler(labelled, per_class=per_class, smoothing=run.smoothing, seed=run.seed)
    if not sampler.datasets:
        raise InputError(
            f"{dataset.source} must have at least two classes of {per_class} texts of one lang and source, got "
            f"{len({label for (label,) in dataset.walk('label')})} labels in {len(dataset)} examples; add examples"
        )

    def texts_of(numbers: Sequence[int]) -> list[str]:
        return [row["text"] for row in dataset.take(numbers)]

    def classification(encode: Encode, step: int) -> Tensor:
        drawn = sampler.draw_classmates(step, run.batch_size, run.negatives)
        queries, passages = texts_of(drawn.queries), texts_of([*drawn.positives, *drawn.others])
        labels = ([*drawn.labels], [*drawn.labels, *drawn.other_labels])
        return classification_step(encode, queries, passages, labels, task=task, dims=dims, temperature=run.temperature)

    def separation(encode: Encode, step: int) -> Tensor:
        numbers, labels = sampler.draw(step, max(2, run.batch_size // per_class))
        return separation_step(encode, texts_of(numbers), labels, task=task, dims=dims, temperature=run.temperature)

    why = f"of classes that have fewer than {per_class} of one lang and source, or are alone there"
    left_out = left_out_of(len(dataset), sampler.num_texts, "texts", why)
    return _Part(classification if has_classmates else separation, sampler.mass, left_out)


def _distillation(run: Run, dataset: Dataset, dims: Sequence[int], projection: Tensor | None) -> _Part:
    sampler = GroupedSampler(dataset.walk("lang", "source"), smoothing=run.smoothing, seed=run.seed)
    width = dataset.embeddings([0]).shape[1]
    wanted = max(dims) if projection is None else projection.shape[1]
    if width != wanted:
        remedy = "set projection = true" if projection is None else "give every file one teacher's vectors"
        raise InputError(f"{dataset.source}: embedding must have {wanted} numbers, got {width}; {remedy}")

    def loss(encode: Encode, step: int) -> Tensor:
        own = sampler.draw(step, run.batch_size)
        others = np.random.default_rng((run.seed, step, 3)).integers(len(dataset), size=run.others)
        vectors = encode([row["text"] for row in dataset.take(own)], None)
        targets = torch.from_numpy(dataset.embeddings([*own, *np.setdiff1d(others, own).tolist()]))
        return distillation_loss(
            vectors,
            targets.to(vectors.device),
            dims=dims,
            relation=run.relation,
            temperature=run.temperature,
            projection=projection,
        )

    return _Part(loss, sampler.mass)


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """Return ``pairs`` without false negatives, whose one or other side came before, case and spaces aside."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for pair in pairs:
        keys = {(side, " ".join(text.casefold().split())) for side, text in enumerate(pair[:2])}
        if not keys & seen:
            kept.append(pair)
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
    encode: Encode,
    queries: Sequence[str],
    passages: Sequence[str],
    labels: tuple[Sequence[int], Sequence[int]],
    *,
    task: str | None,
    dims: Sequence[int],
    temperature: float = 0.05,
) -> Tensor:
    """Each query finds its classmate, the passage of its number, among all passages, and each of those its query.

    ``labels`` are the classes of queries and of passages. The paper marks the texts of a tuple with an id so that a
    classmate among the negatives is told apart. Here a classmate is no negative at all: the loss leaves it out, and no
    text is read that is not the user's.
    """
    vectors = encode(queries, task), encode(passages, task)
    classes = [torch.tensor(of_side, device=vectors[0].device) for of_side in labels]
    related = classes[0].unsqueeze(1) == classes[1]
    return matryoshka(pair_loss, *vectors, dims=dims, related=related, temperature=temperature)


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
