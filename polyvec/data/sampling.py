"""Batches of one dataset and one language each: texts of different kinds are told apart too easily to teach anything
(arXiv 2409.10173, section 4.2)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

Record = TypeVar("Record")


class GroupedSampler(Generic[Record]):
    """Draws a group, in proportion to its size to the power ``smoothing``, then records of it without repeats.

    A draw is a function of (seed, step) alone, so that a run can resume at any step.
    """

    def __init__(
        self, keyed: Iterable[tuple[Hashable, Record]], *, smallest: int, smoothing: float = 0.5, seed: int = 0
    ) -> None:
        groups: dict[Hashable, list[Record]] = {}
        for key, record in keyed:
            groups.setdefault(key, []).append(record)
        self.groups: list[Sequence[Record]] = [rows for rows in groups.values() if len(rows) >= smallest]
        shares = np.array([len(rows) ** smoothing for rows in self.groups])
        self._shares = shares / shares.sum()
        self.seed = seed

    def draw(self, step: int, count: int) -> list[Record]:
        """Return ``count`` records of one group, fewer only if the group is smaller."""
        rng = np.random.default_rng((self.seed, step))
        rows = self.groups[rng.choice(len(self.groups), p=self._shares)]
        return [rows[i] for i in rng.choice(len(rows), size=min(count, len(rows)), replace=False)]


class LabelSampler:
    """Draws texts of one dataset, ``per_class`` of each of up to ``num_classes`` classes."""

    def __init__(self, labelled: Iterable[tuple[Hashable, str, str]], *, per_class: int, seed: int = 0) -> None:
        """``labelled`` yields (dataset, label, text); a class with fewer than ``per_class`` texts is left out."""
        datasets: dict[Hashable, dict[str, list[str]]] = {}
        for dataset, label, text in labelled:
            datasets.setdefault(dataset, {}).setdefault(label, []).append(text)
        kept = [[t for t in classes.values() if len(t) >= per_class] for classes in datasets.values()]
        self.datasets = [classes for classes in kept if len(classes) > 1]
        shares = np.array([sum(map(len, classes)) ** 0.5 for classes in self.datasets])
        self._shares = shares / shares.sum()
        self.per_class, self.seed = per_class, seed

    def draw(self, step: int, num_classes: int) -> tuple[list[str], list[int]]:
        """Return texts and their class numbers, class by class."""
        rng = np.random.default_rng((self.seed, step))
        classes = self.datasets[rng.choice(len(self.datasets), p=self._shares)]
        texts: list[str] = []
        labels: list[int] = []
        for label, i in enumerate(rng.choice(len(classes), size=min(num_classes, len(classes)), replace=False)):
            rows = classes[i]
            texts += [rows[j] for j in rng.choice(len(rows), size=self.per_class, replace=False)]
            labels += [label] * self.per_class
        return texts, labels
