"""The faster of two graphs is measured once on a machine, then remembered until something changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from polyvec import Embedder
from polyvec.errors import ModelTooLargeError
from polyvec.inference.batching import Batch
from polyvec.inference.engines import choice
from polyvec.inference.engines.onnx import OnnxEngine


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def pretend(monkeypatch: pytest.MonkeyPatch, *, int8_seconds: float) -> list[str]:
    """Let float32 take one second and int8 ``int8_seconds``; return the list of what is timed."""
    timed: list[str] = []

    def seconds(engine: OnnxEngine, batch: Batch) -> float:
        timed.append(engine.name)
        return int8_seconds if engine.name == "onnx-int8" else 1.0

    monkeypatch.setattr(choice, "_timed", seconds)
    return timed


@pytest.mark.parametrize(("int8_seconds", "name"), [(0.5, "onnx-int8"), (0.95, "onnx-float32"), (2.0, "onnx-float32")])
def test_int8_is_taken_where_it_is_clearly_faster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, int8_seconds: float, name: str
) -> None:
    timed = pretend(monkeypatch, int8_seconds=int8_seconds)
    assert Embedder(folder).engine.name == name
    measured = len(timed)
    assert set(timed) == {"onnx-int8", "onnx-float32"}
    assert Embedder(folder).engine.name == name and len(timed) == measured  # remembered


def test_a_machine_that_slows_down_between_the_graphs_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 4.0, 8.0, 0.5, 0.5])  # float32, int8, and again: what slowed them is over
    monkeypatch.setattr(choice, "_timed", lambda engine, batch: next(seconds))
    assert Embedder(folder).engine.name == "onnx-int8"


@pytest.mark.parametrize("where", ["opening", "running"])
def test_a_graph_that_does_not_fit_into_memory_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real_session, real_run = ort.InferenceSession, OnnxEngine._run

    def session(path: str, *args: Any, **options: Any) -> ort.InferenceSession:
        if where == "opening" and "int8" not in path:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")
        return real_session(path, *args, **options)

    def run(engine: OnnxEngine, *args: Any) -> Any:
        if where == "running" and engine.name == "onnx-float32":
            raise MemoryError
        return real_run(engine, *args)

    pretend(monkeypatch, int8_seconds=2.0)
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(OnnxEngine, "_run", run)
    assert Embedder(folder).engine.name == "onnx-int8"
    assert not (folder.parent / "cache").exists()  # another day there may be room
    if where == "opening":
        with pytest.raises(ModelTooLargeError, match=r"model\.onnx must fit into memory, got .*bad_alloc"):
            Embedder(folder, engine="onnx")


def test_a_new_graph_is_measured_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, int8_seconds=0.5)
    assert Embedder(folder).engine.name == "onnx-int8"
    pretend(monkeypatch, int8_seconds=2.0)
    os.utime(folder / "model.int8.onnx", ns=(0, 0))
    assert Embedder(folder).engine.name == "onnx-float32"


def test_a_lone_float32_graph_is_taken_unmeasured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = pretend(monkeypatch, int8_seconds=0.5)
    (folder / "model.int8.onnx").unlink()
    assert Embedder(folder).engine.name == "onnx-float32" and not timed


@pytest.mark.parametrize("content", ["{oops", "[1]", None])
def test_a_cache_that_cannot_be_used_costs_a_measurement_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    pretend(monkeypatch, int8_seconds=0.5)
    cache = folder.parent / "cache"
    if content is None:
        cache.write_text("a file where the folder would be")
    else:
        (cache / "polyvec").mkdir(parents=True)
        (cache / "polyvec" / "engines.json").write_text(content)
    assert Embedder(folder).engine.name == "onnx-int8"


def test_a_real_measurement_gives_one_of_the_two(folder: Path) -> None:
    assert choice.faster_precision(folder, Embedder(folder, engine="onnx").config) in ("fp32", "int8")
    assert (folder.parent / "cache" / "polyvec" / "engines.json").exists()
