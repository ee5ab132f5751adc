"""A client that costs little, for the benchmarks of the server: raw HTTP/1.1 over asyncio, requests made beforehand.

Closed loop: a fixed number of clients, each with one request at a time. Open loop: Poisson arrivals at a rate, whatever
the server does, which alone shows overload.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Request:
    """The bytes of one request and the tokens that it makes the model read."""

    payload: bytes
    tokens: int


@dataclass
class Measured:
    """What happened within ``seconds``: tokens answered, and seconds of each answer by status."""

    seconds: float
    tokens: int = 0
    latencies: dict[int, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def percentile(self, q: float, status: int = 200) -> float:
        """Return the ``q``-th percentile of the seconds to an answer with ``status``; nan without one."""
        values = self.latencies.get(status, [])
        return float(np.percentile(values, q)) if values else float("nan")

    def add(self, status: int, seconds: float, tokens: int) -> None:
        self.latencies.setdefault(status, []).append(seconds)
        self.tokens += tokens if status == 200 else 0


def post(path: str, body: object, tokens: int, *headers: str) -> Request:
    """Return a request with a JSON body."""
    content = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", *headers)
    return Request("\r\n".join((*lines, f"content-length: {len(content)}", "\r\n")).encode() + content, tokens)


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 22))

    async def ask(self, request: Request) -> tuple[int, bytes]:
        """Return status and body."""
        self.writer.write(request.payload)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        return int(head[9:12]), await self.reader.readexactly(length)

    def close(self) -> None:
        self.writer.close()


async def closed_loop(port: int, requests: Sequence[Request], clients: int, seconds: float) -> Measured:
    """Return what ``clients`` get answered in ``seconds``, after a tenth of that to fill the queue."""
    measured = Measured(seconds)
    begin = time.perf_counter() + seconds / 10

    async def client(own: Iterator[Request]) -> None:
        connection = await Connection.open(port)
        try:
            for request in own:
                started = time.perf_counter()
                status, _ = await connection.ask(request)
                now = time.perf_counter()
                if begin <= now <= begin + seconds:
                    measured.add(status, now - started, request.tokens)
        finally:
            connection.close()

    source = itertools.cycle(requests)
    running = [asyncio.create_task(client(source)) for _ in range(clients)]
    await asyncio.sleep(begin + seconds - time.perf_counter())
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    for task in running:
        if not task.cancelled():
            task.result()  # a client that failed fails the benchmark
    return measured


async def open_loop(
    port: int, requests: Sequence[Request], tokens_per_second: float, seconds: float, seed: int = 0
) -> Measured:
    """Return what is answered when requests arrive at random, ``tokens_per_second`` on average, for ``seconds``.

    All are waited for, but only those that are answered within ``seconds`` count as answered.
    """
    measured = Measured(seconds)
    rng = np.random.default_rng(seed)
    rate = tokens_per_second / np.mean([request.tokens for request in requests])
    idle: list[Connection] = []
    start = due = time.perf_counter()

    async def one(request: Request) -> None:
        connection = idle.pop() if idle else await Connection.open(port)
        began = time.perf_counter()
        status, _ = await connection.ask(request)
        now = time.perf_counter()
        idle.append(connection)
        measured.add(status, now - began, request.tokens if now <= start + seconds else 0)

    running = []
    for request in itertools.cycle(requests):
        due += rng.exponential(1 / rate)
        if due > start + seconds:
            break
        await asyncio.sleep(due - time.perf_counter())
        running.append(asyncio.create_task(one(request)))
    await asyncio.gather(*running)
    for connection in idle:
        connection.close()
    return measured
