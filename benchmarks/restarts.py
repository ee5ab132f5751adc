"""How long a server is not ready when its computing process is killed, while clients go on asking.

    python benchmarks/restarts.py --kills 10

``kill -9`` at random moments under steady load. Printed are the seconds of the first start, from the command to ready,
and of each kill those until ``/ready`` says no and until it says yes again, with what the clients were answered. Exit
code 1 for an answer other than 200, or for a kill after which the server was not ready within ``--most`` seconds. Needs
Linux and the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import memory_mb, processes, where
from load import Connection, Request
from serving import Server, start_polyvec, texts_of

READY = Request(b"GET /ready HTTP/1.1\r\nhost: bench\r\n\r\n", 0)


async def until_ready(port: int, expected: bool) -> float:
    """Return the time of the clock at which ``/ready`` first says so."""
    connection = await Connection.open(port)
    while ((await connection.ask(READY))[0] == 200) is not expected:
        await asyncio.sleep(0.002)
    now = time.perf_counter()
    connection.close()
    return now


async def kill_often(server: Server, kills: int, clients: int) -> tuple[list[tuple[float, float]], Counter[int]]:
    """Return for each kill the seconds to not ready and to ready, and all answers by status."""
    rng, statuses, is_over = random.Random(0), Counter[int](), False
    requests = itertools.cycle([server.request(text, 0) for text in texts_of("mixed")])

    async def client() -> None:
        connection = await Connection.open(server.port)
        while not is_over:
            statuses[(await connection.ask(next(requests)))[0]] += 1
        connection.close()

    asking = [asyncio.create_task(client()) for _ in range(clients)]
    seen = []
    for _ in range(kills):
        await asyncio.sleep(rng.uniform(0.5, 2.0))
        worker = max(processes(server.process.pid)[1:], key=lambda pid: memory_mb("VmRSS", pid))  # the weights' holder
        killed = time.perf_counter()
        os.kill(worker, signal.SIGKILL)
        noticed = await until_ready(server.port, False)
        seen.append((noticed - killed, await until_ready(server.port, True) - killed))
    is_over = True
    await asyncio.gather(*asking)
    return seen, statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--most", type=float, default=5.0, help="seconds until ready again")
    options = parser.parse_args()
    print(where("uvicorn"))
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        with start_polyvec(Path(temporary)) as server:
            first = time.perf_counter() - started
            seen, statuses = asyncio.run(kill_often(server, options.kills, options.clients))
    print(f"first start, from the command to an answer: {first:.2f} s")
    print("kill to not ready, ms:", " ".join(f"{1000 * noticed:.0f}" for noticed, _ in seen))
    print("kill to ready, s:", " ".join(f"{ready:.2f}" for _, ready in seen))
    slowest = max(ready for _, ready in seen)
    print(f"median {statistics.median(ready for _, ready in seen):.2f} s, slowest {slowest:.2f} s; answers {statuses}")
    raise SystemExit(1 if set(statuses) != {200} or slowest > options.most else 0)


if __name__ == "__main__":
    main()
