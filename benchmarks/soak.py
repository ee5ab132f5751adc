"""A server under steady load for a long time: every dialect, clients that leave, inputs that are refused.

    python benchmarks/soak.py --minutes 20

Arrivals are random at 80 % of what the server was measured to do. Printed are, by the minute, answers, percentiles,
memory, and what the server, this client and all other work took of the machine's cores: only where the last stays
near nothing do the percentiles speak of the server. Then the answers by status and the 99th percentile of the first and
the last third. Exit code 1 when something went wrong: a status of 500
or above, an answer that was not the one expected, memory that grows by more than ``--slope`` MB a minute, or a 99th
percentile that more than doubled (``--p99``), which on a machine with other work says nothing.

With ``--faults`` the server is that of the tests, which has a model that breaks on some inputs: then these, and these
alone, are answered with 500. Needs Linux and the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import busy_seconds, cpu_seconds, memory_mb, processes
from load import Connection, Request, closed_loop, post

from polyvec import Embedder
from polyvec.samples import corpus

LOAD = 0.8
WAITING = (200, 429)  # random arrivals at 80 % may fill the queue for a moment
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Visit:
    """A request, the statuses that it may get, and the seconds after which its client leaves, if it does."""

    request: Request
    expected: tuple[int, ...] = WAITING
    leaves: float | None = None


@dataclass(frozen=True)
class Sample:
    """Megabytes of the server's processes at a time, and seconds of a core used until then."""

    at: float
    megabytes: float
    server: float
    client: float
    machine: float


@dataclass
class Log:
    """What was seen: answers by status, latencies of good ones with their time, and samples."""

    statuses: Counter[int] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def visits_of(embedder: Embedder, faults: bool) -> list[Visit]:
    """Return one of everything, over texts of several lengths, in random order."""
    name, tasks = embedder.model_name, list(embedder.tasks)
    texts = [row["text"] for row in corpus()]
    rng = np.random.default_rng(0)
    visits = []
    for i, text in enumerate(texts):
        tokens = len(embedder.tokenizer.encode(text))
        pair = [text, texts[i - 1]]
        openai = {"model": name, "input": pair}
        bodies = [
            ("/v1/embeddings", openai | {"encoding_format": "base64"}),
            ("/v1/embeddings", openai | {"task": tasks[i % len(tasks)], "embedding_type": ["binary", "float"]}),
            ("/v1/embeddings", openai | {"task": "retrieval.passage", "late_chunking": True}),
            ("/v2/embed", {"model": name, "texts": pair, "input_type": "clustering"}),
            ("/embed", {"inputs": pair, "prompt_name": "retrieval.query", "truncate": True}),
            ("/embed_all", {"inputs": text, "truncate": True}),
            ("/similarity", {"inputs": {"source_sentence": text, "sentences": pair}}),
            ("/tokenize", {"inputs": pair}),
            ("/api/embed", {"model": name, "input": pair}),
        ]
        visits += [Visit(post(path, body, 2 * tokens)) for path, body in bodies]
        visits.append(Visit(post(*bodies[i % len(bodies)], 2 * tokens), leaves=float(rng.exponential(0.01))))
        bad = [{"input": [[10**9]]}, {"input": ""}, {"input": "a", "dimensions": -1}, {"input": "a", "x": text}]
        visits.append(Visit(post("/v1/embeddings", {"model": name} | bad[i % len(bad)], 0), (400,)))
        if faults:
            # tests/serving/faulty_server.py: one raises, one gives no number.
            ids = [embedder.config.vocab_size - 4 + i % 2, 5]
            visits.append(Visit(post("/v1/embeddings", {"model": name, "input": ids}, 4), (500, 429)))
    return [visits[i] for i in rng.permutation(len(visits))]


async def soak(port: int, visits: list[Visit], tokens_per_second: float, seconds: float, pids: list[int]) -> Log:
    """Send ``visits`` over and over at random times for ``seconds`` and wait for every answer."""
    log, rng, idle = Log(), np.random.default_rng(1), list[Connection]()
    rate = tokens_per_second / np.mean([visit.request.tokens for visit in visits])
    start = due = time.perf_counter()

    async def visit_once(visit: Visit) -> None:
        connection = idle.pop() if idle else await Connection.open(port)
        began = time.perf_counter()
        try:
            status, body = await asyncio.wait_for(connection.ask(visit.request), visit.leaves)
        except asyncio.TimeoutError:
            connection.close()
            return
        now = time.perf_counter()
        idle.append(connection)
        log.statuses[status] += 1
        if status not in visit.expected:
            log.unexpected[f"{status} for one of {visit.expected}: {body[:200]!r}"] += 1
        elif status == 200:
            log.latencies.append((now - start, now - began))

    async def watch() -> None:
        while True:
            megabytes = sum(memory_mb("VmRSS", pid) for pid in pids)
            used = (sum(map(cpu_seconds, pids)), time.process_time(), busy_seconds())
            log.samples.append(Sample(time.perf_counter() - start, megabytes, *used))
            await asyncio.sleep(min(5.0, seconds / 40))

    def stopped(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a process is gone that should not be
            log.unexpected[f"a process died: {task.exception()!r}"] += 1

    watching = asyncio.create_task(watch())
    watching.add_done_callback(stopped)
    running = set()
    for visit in itertools.cycle(visits):
        due += rng.exponential(1 / rate)
        if due > start + seconds:
            break
        await asyncio.sleep(due - time.perf_counter())
        task = asyncio.create_task(visit_once(visit))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    watching.cancel()
    for connection in idle:
        connection.close()
    return log


def port_of(server: subprocess.Popen[bytes], said: Path) -> int:
    """Wait for the line that names the address."""
    while server.poll() is None:
        if found := re.search(r"http://\S+:(\d+)\n", said.read_text()):
            return int(found[1])
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{said.read_text()[-1000:]}")


def print_minutes(log: Log) -> None:
    """Print a line for each minute, or for each tenth of a run that is shorter than ten."""
    step = min(60.0, log.samples[-1].at / 10)
    print("| until, s | answers | p50 ms | p99 ms | server, MB | its ms an answer | server, cores | client | others |")
    print("|---|---|---|---|---|---|---|---|---|")
    marks = [log.samples[0]]
    for sample in log.samples:
        if sample.at - marks[-1].at >= step:
            marks.append(sample)
    for before, after in itertools.pairwise(marks):
        seconds = after.at - before.at
        own = [s for at, s in log.latencies if before.at <= at < after.at]
        middle, tail = np.percentile(own, (50, 99)) * 1000 if own else (np.nan, np.nan)
        server, client = after.server - before.server, after.client - before.client
        others = after.machine - before.machine - server - client
        cells = (
            f"{len(own)} | {middle:.0f} | {tail:.0f} | {after.megabytes:.0f} | {1000 * server / max(1, len(own)):.1f}"
        )
        print(
            f"| {after.at:.0f} | {cells} | {server / seconds:.2f} | {client / seconds:.2f} | {others / seconds:.2f} |"
        )


def report(log: Log, minutes: float, most_growth: float, most_slower: float) -> list[str]:
    """Print what was seen and return what was wrong."""
    print("answers by status:", dict(sorted(log.statuses.items())))
    wrong = [f"{count} times {what}" for what, count in log.unexpected.items()]
    settled = [(sample.at, sample.megabytes) for sample in log.samples if sample.at > minutes * 60 / 4]  # buffers fill
    if len(settled) < 2:  # a process died, as was said
        return wrong
    print_minutes(log)
    slope = float(np.polyfit(*np.array(settled).T, 1)[0]) * 60
    print(
        f"memory: {settled[0][1]:.0f} MB after a quarter, {settled[-1][1]:.0f} MB at the end, {slope:+.2f} MB a minute"
    )
    third = minutes * 20
    parts = [[s for at, s in log.latencies if third * i <= at < third * (i + 1)] for i in (0, 2)]
    first, last = (float(np.percentile(part, 99)) * 1000 for part in parts)
    print(f"99th percentile: first third {first:.0f} ms, last third {last:.0f} ms")
    if slope > most_growth:
        wrong.append(f"memory grows by {slope:.2f} MB a minute")
    if last > most_slower * first + 100:
        wrong.append(f"the 99th percentile went from {first:.0f} to {last:.0f} ms")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", help="folder; polyvec-mini if left out")
    parser.add_argument("--slope", type=float, default=1.0, help="MB a minute that memory may grow")
    parser.add_argument("--p99", type=float, default=2.0, help="times that the 99th percentile may grow")
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    program = [ROOT / "tests/serving/faulty_server.py"] if options.faults else ["-m", "polyvec"]
    model = ["--model", options.model] if options.model else []
    engine = ["--engine", "onnx"] if options.faults else []  # a measurement of engines would meet the faults
    command = [sys.executable, "-W", "ignore", *program, "serve", "--port", "0", *model, *engine]
    with tempfile.NamedTemporaryFile("w") as said:  # not a pipe: nobody would read it
        server = subprocess.Popen([*map(str, command)], stderr=said)
        try:
            port = port_of(server, Path(said.name))
            visits = visits_of(Embedder(options.model, engine="onnx"), options.faults)
            good = [visit.request for visit in visits if visit.leaves is None and visit.expected == WAITING]
            capacity = asyncio.run(closed_loop(port, good, 16, min(20.0, options.minutes * 15)))
            rate = LOAD * capacity.tokens_per_second
            log = asyncio.run(soak(port, visits, rate, options.minutes * 60, processes(server.pid)))
        finally:
            server.terminate()
            server.wait()
    wrong = report(log, options.minutes, options.slope, options.p99)
    print(*wrong, sep="\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
