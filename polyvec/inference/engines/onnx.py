"""ONNX Runtime on the CPU: the default engine, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from polyvec.errors import ModelTooLargeError, WeightsError
from polyvec.inference.batching import Batch
from polyvec.inference.threads import physical_cores, usable_cores
from polyvec.model.config import ModelConfig
from polyvec.model.layouts import weight_files

#: Precision of a graph to its file in a model folder.
GRAPH_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
_BATCH_TOKENS = 1024
_ONE_CORE_TOKENS = 384  # what a layer writes must still lie in the core's cache when the next one reads it
_LANE_BYTES = 300_000_000  # of weights: lanes hold them a second time, in the order in which kernels read them
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")
_INPUTS = ["input_ids", "attention_mask", "task_ids"]
#: ONNX Runtime would fuse the addition into the layer norm, whose kernel then takes ten times as long.
_SLOWER_FUSIONS = ["SkipLayerNormFusion"]


class OnnxEngine:
    """A graph written by ``polyvec.inference.export``. ``threads`` defaults to one per physical core, or to what a
    container may use of them.
    """

    own_pass_tokens: int | None = None
    pads = True
    leaves_host = False

    def __init__(self, path: str | Path, config: ModelConfig, *, threads: int | None = None) -> None:
        self.config = config
        self.name = f"onnx-{'int8' if '.int8.' in Path(path).name else 'float32'}"
        self._path = Path(path)
        self._opening = Lock()
        self._lane: OnnxEngine | None = None
        options = self.session_options = ort.SessionOptions()
        cores = usable_cores()
        options.intra_op_num_threads = threads or (cores if cores < (os.cpu_count() or 1) else 0)  # 0: physical cores
        weights = sum(file.stat().st_size for file in weight_files(self._path.parent))
        self.lanes = (threads or physical_cores()) if weights <= _LANE_BYTES else 1
        self.lane_tokens = _ONE_CORE_TOKENS if weights <= _LANE_BYTES else _BATCH_TOKENS
        self.batch_tokens = self.lane_tokens if self.lanes == 1 else _BATCH_TOKENS
        # Between passes threads turn in wait of the next one, for milliseconds: 44 % of the work of a query each 20 ms.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # plans memory for shapes that repeat; lengths vary
        # The arena keeps its buffers from batch to batch: asking the system for pages takes a fifth of the time.
        # One long text must not make it keep that much for ever, so a large run gives its pages back.
        self._giving_back = ort.RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER_FUSIONS
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            if _is_out_of_memory(error):
                raise ModelTooLargeError(
                    f"{path} must fit into memory, got {error}; free memory, or use the graph in 8 bits"
                ) from error
            raise WeightsError(f"{path} must be a whole ONNX file, got {error}; export it again") from error
        if [i.name for i in self._session.get_inputs()] != _INPUTS:
            found = [i.name for i in self._session.get_inputs()]
            raise WeightsError(f"{path} must take {_INPUTS}, got {found}; write it with polyvec export")

    @property
    def lane(self) -> OnnxEngine:
        """The same graph on one thread, for as many callers at a time as there are ``lanes``."""
        if self.lanes == 1:
            return self
        with self._opening:  # two callers would open it twice
            if self._lane is None:
                self._lane = type(self)(self._path, self.config, threads=1)
            return self._lane

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors, neither truncated nor normalised."""
        return self._run("pooled", self._pad(batch)[0])

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens."""
        feed, real = self._pad(batch)
        states = self._run("token_states", feed)
        return states.reshape(-1, states.shape[-1]) if real.all() else states[real]

    def _run(self, output: str, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        options = self._giving_back if feed["input_ids"].size > self.batch_tokens else None
        try:
            result: NDArray[np.float32] = self._session.run([output], feed, options)[0]
        except Exception as error:
            if _is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise
        return result

    def _pad(self, batch: Batch) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
        lengths = batch.lengths
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, self.config.pad_token_id, dtype=np.int64)
        ids[real] = batch.input_ids
        return {"input_ids": ids, "attention_mask": real.astype(np.int64), "task_ids": batch.task_ids}, real


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of ONNX Runtime is of an allocator, which tells of its failure in words alone."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
