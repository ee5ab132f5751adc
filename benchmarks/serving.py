"""polyvec's server against its peers: same weights, same texts, same cores, one client, side by side in one run.

    python benchmarks/serving.py --infinity path/to/infinity_emb

Peers: a plain server of FastAPI around sentence-transformers, as many write it (``--peer``), and infinity, from a
virtual environment of its own; its transformers does not know this architecture, so it gets the same weights as a
RoFormer, which computes the same function. All answer OpenAI's ``/v1/embeddings`` in base64, one text a request where
nothing else is said.
Outputs are compared first: the smallest cosine of a text's vector to that of polyvec's float32 graph.

The client shares the cores with the servers; repeats alternate between them. "Offline" is ``Embedder.encode`` on the
same texts and tasks, without server and client, in three ways: by the clock, client and server on the same cores; by
the seconds of a core that the server's processes used, which leaves the client out; and with the engine on one core
and all else on another, as where clients are elsewhere or the engine is a GPU. Needs Linux, two cores and the ``dev``
extra.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import cpu_seconds, make_texts, processes, where
from cpu import write_peers
from load import Connection, Measured, Request, closed_loop, open_loop, post

from polyvec import Embedder
from polyvec.samples import corpus

PACKAGES = ("uvicorn", "fastapi", "torch", "sentence-transformers", "transformers")
MIXES = ("short", "mixed", "long")
MOST_SECONDS = 40.0  # of one run
MIXED_TASKS = "polyvec, five tasks and none in turn"


def texts_of(mix: str, count: int = 256) -> list[str]:
    """Return texts of eight words, of log-normal length with a median of 60 tokens, or of about 500 tokens."""
    if mix == "mixed":
        return make_texts(count)
    rng = np.random.default_rng(1)
    words = [word for row in corpus() for word in row["text"].split()]
    return [" ".join(rng.choice(words, 8 if mix == "short" else 250)) for _ in range(count)]


def write_roformer(folder: Path) -> None:
    """Write polyvec-mini's base weights as a RoFormer, in the files of sentence-transformers 3.

    RoFormer turns neighbouring components by an angle where this model turns those half a head apart, so the rows of
    queries and keys change places; its table of angles is a weight, and so holds this model's theta.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, RoFormerConfig, RoFormerModel

    from polyvec.model.weights import load_encoder

    mini = Embedder().folder
    encoder = load_encoder(mini)
    ours, config = encoder.state_dict(), encoder.config
    size, heads, half = config.hidden_size, config.num_attention_heads, config.head_dim // 2
    peer = RoFormerModel(
        RoFormerConfig(
            vocab_size=config.vocab_size, hidden_size=size, embedding_size=size, num_attention_heads=heads,
            num_hidden_layers=config.num_hidden_layers, intermediate_size=config.intermediate_size, hidden_act="gelu",
            max_position_embeddings=config.max_tokens, type_vocab_size=1, layer_norm_eps=config.layer_norm_eps,
            pad_token_id=config.pad_token_id,
        )
    )  # fmt: skip
    angles = torch.arange(config.max_tokens)[:, None] * config.rope_theta ** -(torch.arange(half) / half)
    theirs = {"encoder.embed_positions.weight": torch.cat((angles.sin(), angles.cos()), dim=1)}
    interleaved = torch.arange(size).view(heads, 2, half).transpose(1, 2).flatten()
    modules = {
        "embeddings.word_embeddings": "embeddings.word_embeddings",
        "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    }
    for i in range(config.num_hidden_layers):
        here, there = f"layers.{i}", f"encoder.layer.{i}"
        modules |= {
            f"{here}.attention.out": f"{there}.attention.output.dense",
            f"{here}.attention_norm": f"{there}.attention.output.LayerNorm",
            f"{here}.mlp.fc1": f"{there}.intermediate.dense",
            f"{here}.mlp.fc2": f"{there}.output.dense",
            f"{here}.mlp_norm": f"{there}.output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            query, key, value = ours[f"{here}.attention.qkv.{kind}"].chunk(3)
            for name, rows in (("query", query[interleaved]), ("key", key[interleaved]), ("value", value)):
                theirs[f"{there}.attention.self.{name}.{kind}"] = rows
    for name, other in modules.items():
        theirs |= {f"{other}.{k}": ours[f"{name}.{k}"] for k in ("weight", "bias") if f"{name}.{k}" in ours}
    peer.load_state_dict({name: rows.float() for name, rows in theirs.items()})
    peer.save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(mini / "tokenizer.json"), **special)
    tokenizer.model_max_length = config.max_tokens
    tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules_json = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules_json))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": config.max_tokens}))
    pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "2_Normalize").mkdir()


def serve_peer(folder: str, port: int) -> None:
    """The plain server: a route that calls ``encode`` and waits for it, in FastAPI's own threads."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    app = FastAPI()

    class Body(BaseModel):
        model: str
        input: list[str]
        encoding_format: str

    def embeddings(body: Body) -> dict[str, Any]:
        vectors = model.encode(body.input)
        rows = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}

    embeddings.__annotations__["body"] = Body  # the class is local, so its name alone would not be found
    app.post("/v1/embeddings")(embeddings)
    uvicorn.run(app, port=port, log_level="warning")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """A process that answers on ``port``; ``model`` is the name that it wants to hear."""

    def __init__(self, command: Sequence[object], port: int, model: str, log: Path) -> None:
        self.port, self.model, self._log = port, model, log
        environment = os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as sink:
            self.process = subprocess.Popen([*map(str, command)], stdout=sink, stderr=sink, env=environment)
        until = time.time() + 120
        while time.time() < until and self.process.poll() is None:
            try:
                asyncio.run(self.ask(["first"]))
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")

    def request(self, text: str | list[str], tokens: int, task: str | None = None) -> Request:
        texts = text if isinstance(text, list) else [text]
        body = {"model": self.model, "input": texts, "encoding_format": "base64"} | ({"task": task} if task else {})
        return post("/v1/embeddings", body, tokens)

    async def ask(self, texts: Sequence[str]) -> np.ndarray:
        """Return (B, D) vectors of ``texts``, asked one by one."""
        connection = await Connection.open(self.port)
        rows = []
        for text in texts:
            status, body = await connection.ask(self.request(text, 0))
            if status != 200:
                raise SystemExit(f"a server answered {status}: {body[:300]!r}\n{self._log.read_text()[-1000:]}")
            rows.append(np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), "<f4"))
        connection.close()
        return np.stack(rows)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def start_polyvec(folder: Path, *arguments: object) -> Server:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "polyvec", "serve", "--port", port, *arguments]
    return Server(command, port, "polyvec-mini", folder / f"polyvec-{port}.log")


def start_servers(folder: Path, infinity: str | None, stack: ExitStack) -> dict[str, Server]:
    """Start each server on the weights that were written to ``folder``; they end with ``stack``."""
    servers = {"polyvec": stack.enter_context(start_polyvec(folder))}
    port = free_port()
    peer = [sys.executable, "-W", "ignore", __file__, "--peer", folder / "hf", port]
    plain = Server(peer, port, "mini", folder / "st.log")
    servers["sentence-transformers + FastAPI"] = stack.enter_context(plain)
    if infinity:
        port = free_port()
        options = ["--model-id", folder / "roformer", "--served-model-name", "mini", "--engine", "torch"]
        options += [
            "--device",
            "cpu",
            "--no-bettertransformer",
            "--no-model-warmup",
            "--url-prefix",
            "/v1",
            "--port",
            port,
        ]
        other = Server([infinity, "v2", *options], port, "mini", folder / "infinity.log")
        servers["infinity"] = stack.enter_context(other)
    return servers


@dataclass(frozen=True)
class Rate:
    """Tokens a second of the clock, and of a core."""

    by_clock: float
    by_core: float


def offline(embedder: Embedder, texts: list[str], tasks: Sequence[str | None], tokens: int, seconds: float) -> Rate:
    """Return the rate of ``encode`` over and over for at least ``seconds``."""
    passes, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < started + seconds:
        embedder.encode(texts, task=tasks)
        passes += 1
    return Rate(passes * tokens / (time.perf_counter() - started), passes * tokens / (time.process_time() - used))


def answered(server: Server) -> float:
    """Return the tokens of all requests that the server has answered, by its own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as page:
        return sum(float(n) for n in re.findall(r"^polyvec_tokens_total\{.*\} (\S+)$", page.read().decode(), re.M))


def served(server: Server, requests: Sequence[Request], seconds: float) -> Rate:
    """Return the rate of 64 clients, the core's seconds being those of the server's processes, before and after too."""
    pids = processes(server.process.pid)
    tokens, used = answered(server), sum(map(cpu_seconds, pids))
    run = asyncio.run(closed_loop(server.port, requests, 64, seconds))
    time.sleep(0.5)  # until what the clients left behind is dropped
    return Rate(run.tokens_per_second, (answered(server) - tokens) / (sum(map(cpu_seconds, pids)) - used))


def pin(process: int, core: int) -> None:
    """Keep a process, its threads and those to come on one core."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def median(runs: Sequence[Measured], of: Callable[[Measured], float]) -> float:
    return statistics.median(of(run) for run in runs)


def compare(servers: dict[str, Server], mixes: Sequence[str], clients: Sequence[int], options: Any) -> None:
    """Print throughput and percentiles of every server, mix and number of clients: without a task, which is all that
    the peers have, and for polyvec with its five tasks and none in turn too.

    A run lasts three times what the slowest takes to answer all clients once: what is cut off at the end counts for
    nobody. There are more texts than clients, for equal ones in flight are computed once.
    """
    embedder = Embedder()
    print("| texts | clients | server | tokens/s of polyvec's | p50 ms | p95 ms | p99 ms | not answered | runs, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mix in mixes:
        texts = texts_of(mix, 4 * max(clients))
        lengths = [len(e) for e in embedder.tokenizer.tokens_batch(texts, [""] * len(texts))]
        asked = {n: [s.request(*row) for row in zip(texts, lengths, strict=True)] for n, s in servers.items()}
        tasks = [[*embedder.tasks, None][i % 6] for i in range(len(texts))]
        prompted = [e.num_tokens for e in embedder.encode_stream(texts, task=tasks)]
        in_turn = [servers["polyvec"].request(*row) for row in zip(texts, prompted, tasks, strict=True)]
        asked[MIXED_TASKS] = in_turn
        slowest = min(
            asyncio.run(closed_loop(servers[name].port, asked[name], 4, 2 * options.seconds)).tokens_per_second
            for name in servers
        )
        for number in clients:
            once = number * statistics.mean(lengths) / slowest
            seconds = min(MOST_SECONDS, max(options.seconds, 3 * once))
            repeats = options.repeats if seconds <= 2 * options.seconds else 1
            runs: dict[str, list[Measured]] = {name: [] for name in asked}
            for _ in range(repeats):
                for name in asked:
                    server = servers[name.partition(",")[0]]
                    runs[name].append(asyncio.run(closed_loop(server.port, asked[name], number, seconds)))
                    asyncio.run(server.ask(["idle"] * 4))  # not all servers drop what a client no longer waits for
            ours = median(runs["polyvec"], lambda run: run.tokens_per_second)
            for name, own in runs.items():
                ratio = median(own, lambda run: run.tokens_per_second) / ours
                cells = [f"{1000 * median(own, lambda run, q=q: run.percentile(q)):.0f}" for q in (50, 95, 99)]
                failed = sum(len(v) for run in own for status, v in run.latencies.items() if status != 200)
                row = f"{name} | {ratio:.2f} | {' | '.join(cells)} | {failed} | {repeats} x {seconds:.0f}"
                print(f"| {mix} | {number} | {row} |", flush=True)


def against_offline(folder: Path, mixes: Sequence[str], options: Any) -> None:
    """Print what the server gives of the engine's own throughput at 64 clients, in the three ways."""
    cores = sorted(os.sched_getaffinity(0))
    print("\n| texts | a request | tasks | same cores, by the clock | by the server's core | a core for the engine |")
    print("|---|---|---|---|---|---|")
    with start_polyvec(folder) as shared, start_polyvec(folder, "--threads", 1) as parted:
        parent, *children = processes(parted.process.pid)
        pin(parent, cores[0])
        for child in children:
            pin(child, cores[1])
        embedder = Embedder()
        os.sched_setaffinity(0, {cores[1]})  # before its threads start
        single = Embedder(threads=1)
        os.sched_setaffinity(0, cores)
        for mix, together in [(mix, 1) for mix in mixes] + [(mix, 16) for mix in mixes if mix == "short"]:
            texts = texts_of(mix, 256 * together)  # more than are in flight: equal ones are computed once
            for kind in ("none", "mixed"):
                names = [*embedder.tasks, None] if kind == "mixed" else [None]
                tasks = [names[i // together % len(names)] for i in range(len(texts))]
                lengths = [e.num_tokens for e in embedder.encode_stream(texts, task=tasks)]
                warm = offline(embedder, texts, tasks, sum(lengths), 1)
                once = 64 * together * statistics.mean(lengths) / warm.by_clock  # all clients at a time
                seconds = max(options.seconds, 3 * once)
                work = (texts, tasks, sum(lengths), seconds)
                requests = [
                    shared.request(texts[i : i + together], sum(lengths[i : i + together]), tasks[i])
                    for i in range(0, len(texts), together)
                ]
                ratios: list[tuple[float, float, float]] = []
                for _ in range(options.repeats + 1):
                    ours = served(shared, requests, seconds)
                    alone = offline(embedder, *work)
                    os.sched_setaffinity(0, {cores[0]})
                    apart = served(parted, requests, seconds)
                    os.sched_setaffinity(0, {cores[1]})
                    alone_on_one = offline(single, *work)
                    os.sched_setaffinity(0, cores)
                    ratios.append(
                        (
                            ours.by_clock / alone.by_clock,
                            ours.by_core / alone.by_core,
                            apart.by_clock / alone_on_one.by_clock,
                        )
                    )
                cells = " | ".join(f"{statistics.median(way):.0%}" for way in zip(*ratios, strict=True))
                print(f"| {mix} | {together} | {kind} | {cells} |", flush=True)


def overload(server: Server, options: Any) -> None:
    """Print goodput and percentiles at 0.5 to 1.5 of the capacity."""
    embedder = Embedder()
    port = server.port
    texts = texts_of("mixed")
    tasks = [[*embedder.tasks, None][i % 6] for i in range(len(texts))]
    lengths = [e.num_tokens for e in embedder.encode_stream(texts, task=tasks)]
    requests = [server.request(*row) for row in zip(texts, lengths, tasks, strict=True)]
    capacity = asyncio.run(closed_loop(port, requests, 64, 2 * options.seconds)).tokens_per_second
    print("\n| offered, of capacity | answered, of capacity | p50 ms | p99 ms | refused | p50, p99 of a refusal ms |")
    print("|---|---|---|---|---|---|")
    for load in (0.5, 0.8, 1.2, 1.5):
        run = asyncio.run(open_loop(port, requests, load * capacity, 3 * options.seconds))
        total = sum(map(len, run.latencies.values()))
        refused = len(run.latencies.get(429, []))
        cells = [f"{1000 * run.percentile(q, status):.0f}" for status in (200, 429) for q in (50, 99)]
        rate = f"{run.tokens_per_second / capacity:.0%}"
        other = total - refused - len(run.latencies.get(200, []))
        assert other == 0, f"{other} answers were neither 200 nor 429"
        print(f"| {load} | {rate} | {cells[0]} | {cells[1]} | {refused / total:.0%} | {cells[2]}, {cells[3]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infinity", help="the infinity_emb command of another environment")
    parser.add_argument("--parts", nargs="+", default=["compare", "offline", "overload"])
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--queue", type=int, default=20_000, help="tokens that may wait in the part 'overload'")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peer:
        serve_peer(options.peer[0], int(options.peer[1]))
        return
    print(where(*PACKAGES))
    print(f"polyvec chose {Embedder().engine.name}; medians of {options.repeats} alternating repeats of ", end="")
    print(f"{options.seconds:g} s where nothing else is said\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "compare" in options.parts:
            write_peers(folder)
            write_roformer(folder / "roformer")
            with ExitStack() as stack:
                servers = start_servers(folder, options.infinity, stack)
                sample = texts_of("mixed", 32)
                exact = Embedder(engine="onnx").encode(sample)
                for name, server in servers.items():
                    cosine = float((asyncio.run(server.ask(sample)) * exact).sum(axis=1).min())
                    print(f"{name}: smallest cosine to polyvec's float32 {cosine:.5f}")
                print()
                compare(servers, options.mix, options.clients, options)
        if "offline" in options.parts:
            against_offline(folder, options.mix, options)
        if "overload" in options.parts:
            with start_polyvec(folder, "--queue-tokens", options.queue) as server:
                overload(server, options)


if __name__ == "__main__":
    main()
