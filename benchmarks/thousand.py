"""Stragglers and failures at a thousand workers: what the size of a part and the order of work cost.

    python benchmarks/thousand.py

A discrete simulation, not a measurement: parts go from one queue to workers; a worker has its own speed (log-normal), a
few are five times as slow, each dies at random (exponential) and comes back after a while, and the part in hand starts
again. ``lost`` is the share of worker time that was computed and thrown away; ``tail`` the share in which workers have
nothing left to do while others finish; ``ideal`` divides the work by the speed of all workers. ``--backup`` runs a part
a second time when the queue is empty and its worker is late (MapReduce's backup tasks, Dean and Ghemawat 2004,
section 3.6), which is safe here: both write the same bytes under the same name.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fleet:
    """Workers in numbers. ``rows_per_second`` is that of a usual one."""

    workers: int = 1000
    rows_per_second: float = 500.0
    spread: float = 0.15  # of the logarithm of a worker's speed
    slow_share: float = 0.02
    slow_factor: float = 5.0
    hours_between_failures: float = 50.0  # of one worker: with 1000, one every three minutes
    restart_seconds: float = 90.0  # a node, and on it a model


@dataclass(frozen=True)
class Outcome:
    hours: float
    over_ideal: float
    lost: float
    tail: float
    failures: int
    backups: int


def simulate(rows: float, part_rows: int, fleet: Fleet, *, backup: bool, seed: int = 0) -> Outcome:
    """Return what a job of ``rows`` in parts of ``part_rows`` takes."""
    rng = np.random.default_rng(seed)
    speed = fleet.rows_per_second * np.exp(rng.normal(0, fleet.spread, fleet.workers))
    speed[rng.random(fleet.workers) < fleet.slow_share] /= fleet.slow_factor
    mean_life = fleet.hours_between_failures * 3600
    waiting = int(np.ceil(rows / part_rows))
    dies = rng.exponential(mean_life, fleet.workers)
    events = [(0.0, worker, -1) for worker in range(fleet.workers)]  # when a worker is free, and what it finished
    heapq.heapify(events)
    is_done = np.zeros(waiting, dtype=bool)
    running: dict[int, int] = {}  # part to copies
    lost = idle_from = 0.0
    next_part = failures = backups = finished = 0
    total = waiting
    again: list[int] = []
    idle: list[tuple[float, int]] = []
    now = 0.0
    while finished < total:
        now, worker, part = heapq.heappop(events)
        if part >= 0:
            running[part] -= 1
            if is_done[part]:
                lost += part_rows / speed[worker]
            else:
                is_done[part] = True
                finished += 1
        if again:
            part = again.pop()
        elif next_part < total:
            part = next_part
            next_part += 1
        else:
            open_parts = [p for p, copies in running.items() if copies == 1 and not is_done[p]] if backup else []
            if not open_parts:
                idle.append((now, worker))
                continue
            part = open_parts[0]
            backups += 1
        running[part] = running.get(part, 0) + 1
        end = now + part_rows / speed[worker]
        if end < dies[worker]:
            heapq.heappush(events, (end, worker, part))
            continue
        failures += 1
        lost += max(0.0, dies[worker] - now)
        running[part] -= 1
        if running[part] == 0 and not is_done[part]:
            again.append(part)
        back = max(now, dies[worker]) + fleet.restart_seconds
        dies[worker] = back + rng.exponential(mean_life)
        heapq.heappush(events, (back, worker, -1))
        for _, rested in idle:  # there is work again
            heapq.heappush(events, (max(now, back), rested, -1))
        idle_from += sum(max(now, back) - since for since, _ in idle)
        idle = []
    idle_from += sum(now - since for since, _ in idle)
    ideal = rows / speed.sum()
    spent = now * fleet.workers
    return Outcome(now / 3600, now / ideal, lost / spent, idle_from / spent, failures, backups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--rows-per-second", type=float, default=500.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    fleet = Fleet(workers=options.workers, rows_per_second=options.rows_per_second)
    print(f"{options.rows:.0e} rows, {fleet}, means of {options.repeats} seeds\n")
    print("| rows in a part | seconds of a part | backup | hours | over ideal | lost | tail | failures | backups |")
    print("|---|---|---|---|---|---|---|---|---|")
    for part_rows in (8_192, 65_536, 262_144, 1_048_576):
        for backup in (False, True):
            runs = [
                simulate(options.rows, part_rows, fleet, backup=backup, seed=seed) for seed in range(options.repeats)
            ]
            mean = {name: float(np.mean([getattr(run, name) for run in runs])) for name in Outcome.__annotations__}
            print(
                f"| {part_rows:,} | {part_rows / fleet.rows_per_second:,.0f} | {'yes' if backup else 'no'} "
                f"| {mean['hours']:.2f} | {mean['over_ideal']:.3f} | {mean['lost']:.2%} | {mean['tail']:.2%} "
                f"| {mean['failures']:.0f} | {mean['backups']:.0f} |"
            )


if __name__ == "__main__":
    main()
