"""Batches of one dataset and one language each: texts of different kinds are told apart too easily to teach anything
(arXiv 2409.10173, section 4.2)."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class GroupedSampler:
    """Draws a group, in proportion to its size to the power ``smoothing``, then numbers of its records, none twice.

    ``keys`` tells the group of each record, from number 0 on; a group of fewer than ``smallest`` is left out, and all
    may be: ``groups`` are those that stay, ``num_records`` counts their records. A draw is a function of (seed, step)
    alone, so that a run can resume at any step. ``mass`` is the sum of all groups' sizes to that power. Eight bytes a
    record are kept.
    """

    def __init__(self, keys: Iterable[Hashable], *, smallest: int = 1, smoothing: float = 0.5, seed: int = 0) -> None:
        groups: dict[Hashable, array[int]] = {}
        for number, key in enumerate(keys):
            groups.setdefault(key, array("q")).append(number)
        self.groups = [numbers for numbers in groups.values() if len(numbers) >= smallest]
        sizes = [len(numbers) for numbers in self.groups]
        self.num_records = sum(sizes)
        self.mass, self._shares = _shares(sizes, smoothing)
        self.seed = seed

    def draw(self, step: int, count: int) -> list[int]:
        """Return the numbers of ``count`` records of one group, fewer only if the group is smaller."""
        rng = np.random.default_rng((self.seed, step))
        numbers = self.groups[rng.choice(len(self.groups), p=self._shares)]
        return [numbers[i] for i in rng.choice(len(numbers), size=min(count, len(numbers)), replace=False)]


@dataclass(frozen=True)
class Classmates:
    """Numbers of queries, each with another text of its class, and of texts of other classes; and their classes'."""

    queries: list[int]
    positives: list[int]
    labels: list[int]
    others: list[int]
    other_labels: list[int]


class LabelSampler:
    """Draws numbers of labelled texts of one dataset; a draw is a function of (seed, step) alone."""

    def __init__(
        self,
        labelled: Iterable[tuple[Hashable, str]],
        *,
        per_class: int,
        smoothing: float = 0.5,
        seed: int = 0,
    ) -> None:
        """``labelled`` tells (dataset, label) of each text, from number 0 on. A class of fewer than ``per_class`` texts
        is left out, and so is a dataset with fewer than two classes left; none at all may be left in ``datasets``.
        ``num_texts`` counts the texts that are."""
        datasets: dict[Hashable, dict[str, array[int]]] = {}
        for number, (dataset, label) in enumerate(labelled):
            datasets.setdefault(dataset, {}).setdefault(label, array("q")).append(number)
        kept = [[t for t in classes.values() if len(t) >= per_class] for classes in datasets.values()]
        self.datasets = [classes for classes in kept if len(classes) > 1]
        sizes = [sum(map(len, classes)) for classes in self.datasets]
        self.num_texts = sum(sizes)
        self.mass, self._shares = _shares(sizes, smoothing)
        self.per_class, self.seed = per_class, seed

    def _draw(self, step: int) -> tuple[np.random.Generator, Sequence[Sequence[int]]]:
        rng = np.random.default_rng((self.seed, step))
        return rng, self.datasets[rng.choice(len(self.datasets), p=self._shares)]

    def draw(self, step: int, num_classes: int) -> tuple[list[int], list[int]]:
        """Return ``per_class`` texts of each of up to ``num_classes`` classes and their class numbers."""
        rng, classes = self._draw(step)
        texts: list[int] = []
        labels: list[int] = []
        for label, i in enumerate(rng.choice(len(classes), size=min(num_classes, len(classes)), replace=False)):
            rows = classes[i]
            texts += [rows[j] for j in rng.choice(len(rows), size=self.per_class, replace=False)]
            labels += [label] * self.per_class
        return texts, labels

    def draw_classmates(self, step: int, count: int, num_others: int) -> Classmates:
        """Return up to ``count`` pairs of classmates, no text in two, every class as often as its size allows; and
        ``num_others`` texts of other classes for each."""
        rng, classes = self._draw(step)
        unused = [rng.permutation(len(rows)).tolist() for rows in classes]
        drawn = Classmates([], [], [], [], [])
        while len(drawn.queries) < count and any(len(rest) > 1 for rest in unused):
            for label in rng.permutation(len(classes)).tolist():
                rest = unused[label]
                if len(rest) < 2 or len(drawn.queries) == count:
                    continue
                drawn.queries.append(classes[label][rest.pop()])
                drawn.positives.append(classes[label][rest.pop()])
                drawn.labels.append(label)
                for other in rng.integers(len(classes) - 1, size=num_others).tolist():
                    other += other >= label  # any class but this
                    drawn.others.append(classes[other][int(rng.integers(len(classes[other])))])
                    drawn.other_labels.append(other)
        return drawn


def _shares(sizes: Sequence[int], smoothing: float) -> tuple[float, NDArray[np.float64]]:
    """Return the sum of ``sizes`` to the power ``smoothing``, and what part of it each is."""
    masses = np.array(sizes, np.float64) ** smoothing
    return float(masses.sum()), masses / masses.sum() if len(masses) else masses
