"""infinity's engine on texts, in the environment of infinity, which polyvec does not share (see cpu.py).

INFINITY/bin/python benchmarks/infinity_peer.py MODEL TEXTS.json VECTORS.npy
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


async def main(model: str, texts_path: Path, output: Path) -> dict[str, float]:
    """Return seconds to the first vector and for all texts, and the peak of the memory in MB; write the vectors."""
    started = time.time()
    arguments = EngineArgs(
        model_name_or_path=model, engine="torch", device="cpu", bettertransformer=False, model_warmup=False
    )
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        await engine.embed(["first"])
        opened = time.time() - started
        texts = json.loads(texts_path.read_text())
        started = time.time()
        vectors, _ = await engine.embed(texts)
        seconds = time.time() - started
    np.save(output, np.asarray(vectors, np.float32))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"open_seconds": opened, "seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) / 1024}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], *map(Path, sys.argv[2:])))))
