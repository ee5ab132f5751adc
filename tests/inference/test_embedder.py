"""What ``Embedder`` promises: a vector is its text's own, whatever is embedded with it, on both engines."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyvec import Embedder, InputError, TruncationWarning, UntrainedDimensionWarning, WeightsError
from polyvec.inference import blocks as blocks_module
from polyvec.inference.batching import Batch
from polyvec.inference.late_chunking import chunk_means, chunk_spans
from polyvec.tasks import TASK_NAMES, resolve_task
from polyvec.text.tokenizer import Encoding

WORDS = "router the train night 打印机 пароль Passwort is and".split()
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), min_size=1, max_size=8)
TASKS = st.sampled_from([None, *TASK_NAMES])
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = "the router is on the night train and " * 300


@pytest.fixture(params=["onnx", "torch"])
def any_embedder(request: pytest.FixtureRequest, embedder: Embedder, torch_embedder: Embedder) -> Embedder:
    return embedder if request.param == "onnx" else torch_embedder


@SETTINGS
@given(texts=TEXTS, data=st.data())
def test_order_neighbours_their_tasks_and_batch_size_change_nothing(
    any_embedder: Embedder, texts: list[str], data: st.DataObject
) -> None:
    tasks = [data.draw(TASKS) for _ in texts]
    alone = np.stack([any_embedder.encode(t, task=k) for t, k in zip(texts, tasks, strict=True)])
    together = any_embedder.encode(texts, task=tasks, batch_tokens=data.draw(st.integers(1, 400)))
    np.testing.assert_allclose(together, alone, atol=2e-6)
    order = data.draw(st.permutations(range(len(texts))))
    shuffled = any_embedder.encode([texts[i] for i in order], task=[tasks[i] for i in order])
    np.testing.assert_allclose(shuffled, alone[list(order)], atol=2e-6)


def test_int8_graph_vectors_do_not_depend_on_neighbours(model_folder: Path) -> None:
    embedder = Embedder(model_folder, engine="onnx-int8")
    texts = ["the router", "night train " * 30, "打印机"]
    alone = np.stack([embedder.encode(t, task="separation") for t in texts])
    np.testing.assert_allclose(embedder.encode(texts, task="separation"), alone, atol=2e-6)


def test_both_engines_agree_for_every_task(embedder: Embedder, torch_embedder: Embedder) -> None:
    texts = [" ".join(WORDS[i:]) for i in range(6)]
    tasks = [None, *TASK_NAMES]
    for a in tasks:
        np.testing.assert_allclose(embedder.encode(texts, task=a), torch_embedder.encode(texts, task=a), atol=5e-6)


@pytest.mark.parametrize("width", range(1, 33))
def test_every_width_has_unit_norm_and_untrained_ones_warn(embedder: Embedder, width: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = embedder.encode(["the router", "night train"], dimensions=width)
    assert vectors.shape == (2, width)
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6
    untrained = [w for w in caught if issubclass(w.category, UntrainedDimensionWarning)]
    assert len(untrained) == (width not in (8, 16, 32))
    assert all("8, 16, 32" in str(w.message) for w in untrained)


def test_a_narrow_vector_is_the_cut_and_rescaled_wide_one(embedder: Embedder) -> None:
    wide, narrow = embedder.encode("the router"), embedder.encode("the router", dimensions=8)
    np.testing.assert_allclose(narrow, wide[:8] / np.linalg.norm(wide[:8]), atol=1e-6)


@pytest.mark.parametrize("vectors", [np.ones((2, 16), np.float32), np.ones(32, np.float32), np.ones((2, 32), np.int8)])
def test_what_is_no_row_of_full_width_is_not_converted(embedder: Embedder, vectors: Any) -> None:
    with pytest.raises(InputError, match="vectors must be rows of 32 floats, got .*; pass what encode gives"):
        embedder.convert(vectors, dimensions=8)


def test_a_task_is_its_adapter_with_its_prompt(embedder: Embedder) -> None:
    prompt = embedder.config.prompts["retrieval.query"]
    task = embedder.encode("router", task="retrieval.query")
    without_prompt = embedder.encode("router", task="retrieval.query", prompt="")
    without_adapter = embedder.encode(prompt + "router")
    assert np.abs(task - without_prompt).max() > 1e-3 and np.abs(task - without_adapter).max() > 1e-3
    np.testing.assert_allclose(embedder.encode(prompt + "router", task="retrieval.query", prompt=""), task, atol=1e-6)


@pytest.mark.parametrize("late_chunking", [None, "sentence"])
def test_a_prompt_that_fills_the_context_is_refused(embedder: Embedder, late_chunking: Any) -> None:
    with pytest.raises(InputError, match="must leave room .* shorten"):
        embedder.encode("the router", prompt=LONG, late_chunking=late_chunking)


def test_shapes_follow_the_input(embedder: Embedder) -> None:
    assert embedder.encode("one").shape == (32,)
    assert embedder.encode(["one"]).shape == (1, 32)
    assert embedder.encode(t for t in ["one", "two"]).shape == (2, 32)
    assert embedder.encode([]).shape == (0, 32)
    assert embedder.encode([], dtype="binary").shape == (0, 4)


def test_a_warning_is_of_the_callers_line_so_each_line_is_warned_once(embedder: Embedder) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        embedder.encode(LONG, dimensions=7)
        embedder.encode(LONG, dimensions=7)
        list(embedder.encode_stream([LONG], dimensions=7))
        embedder.convert(np.ones((1, 32), np.float32), dimensions=7)
    assert [w.category for w in caught] == [UntrainedDimensionWarning, TruncationWarning] * 3 + [caught[0].category]
    assert {w.filename for w in caught} == {__file__} and len({w.lineno for w in caught}) == 4


def test_a_cut_text_warns_where_nobody_asks_for_the_end_of_the_stream(embedder: Embedder) -> None:
    texts = ["router", LONG]
    with pytest.warns(TruncationWarning, match="1 of 2 texts"):
        assert len(list(zip(texts, embedder.encode_stream(texts), strict=False))) == 2


def test_a_stream_is_read_as_it_is_written(embedder: Embedder) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "router"

    first = next(embedder.encode_stream(endless(), task="classification"))
    assert first.task == "classification" and first.num_tokens == len(embedder.tokenizer.encode("router"))
    assert read < 5_000


def test_a_stream_and_a_list_give_the_same_vectors(embedder: Embedder) -> None:
    texts = [" ".join(WORDS[: i % 9 + 1]) for i in range(1500)]
    stream = np.stack([e.vector for e in embedder.encode_stream(iter(texts)) if e.vector is not None])
    np.testing.assert_array_equal(stream, embedder.encode(texts))


class Beside:
    """An engine of a device: while it computes a block, the next one must be tokenised, or it waits in vain."""

    def __init__(self, embedder: Embedder, told: list[str], tokenised: threading.Semaphore) -> None:
        self.inner, self.config, self.name = embedder.engine, embedder.config, "beside"
        self.batch_tokens = self.lane_tokens = 1024
        self.lanes, self.lane, self.own_pass_tokens, self.pads, self.leaves_host = 1, self, None, True, True
        self.told, self.tokenised = told, tokenised

    def pool(self, batch: Batch) -> np.ndarray:
        if "pool" not in self.told:
            assert self.tokenised.acquire(timeout=20) and self.tokenised.acquire(timeout=20)
        self.told.append("pool")
        return self.inner.pool(batch)

    def token_states(self, batch: Batch) -> np.ndarray:
        return self.inner.token_states(batch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_TEXTS", 8)
    monkeypatch.setattr(blocks_module, "_PASSES", 0)


def beside(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> tuple[Embedder, list[str]]:
    told: list[str] = []
    tokenised = threading.Semaphore(0)
    model = Embedder(embedder.folder, engine=Beside(embedder, told, tokenised))
    make = model.tokenizer.tokens_batch

    def tokens_batch(*args: Any) -> Any:
        found = make(*args)
        told.append("tokens")
        tokenised.release()
        return found

    monkeypatch.setattr(model.tokenizer, "tokens_batch", tokens_batch)
    return model, told


def test_the_next_texts_are_tokenised_while_a_device_computes(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    model, told = beside(embedder, monkeypatch)
    texts = [" ".join(WORDS[i % 5 :]) + f" {i}" for i in range(45)]
    tasks = [[None, *TASK_NAMES][i % 6] for i in range(45)]
    got = model.encode(texts, task=tasks)
    assert told[:3] == ["tokens", "tokens", "pool"] and told.count("tokens") == 6
    # Not to the last bit: on a single core the two make batches of their own.
    np.testing.assert_allclose(got, embedder.encode(texts, task=tasks), rtol=0, atol=1e-6)


def test_what_is_wrong_with_texts_ahead_is_told_after_the_results_before(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    def texts(bad: object) -> Iterator[Any]:
        yield from WORDS[:8]
        if isinstance(bad, Exception):
            raise bad
        yield bad

    for bad, kind in ((7, InputError), (OSError("gone"), OSError)):
        model, _ = beside(embedder, monkeypatch)
        model.tokenizer.tokens_batch([WORDS[0]], [""])  # the second that the engine waits for
        stream = model.encode_stream(texts(bad))
        assert len([next(stream) for _ in range(8)]) == 8
        with pytest.raises(kind):
            next(stream)


def test_later_blocks_of_a_device_are_as_long_as_its_passes_need() -> None:
    rows = [("x" * 10, resolve_task(None, {}))] * 6000
    blocks = list(blocks_module.blocks(iter(rows), device_tokens=1250))
    assert [(first, len(block)) for first, block in blocks] == [(0, 1024), (1024, 2000), (3024, 2000), (5024, 976)]
    assert {len(block) for _, block in blocks_module.blocks(iter(rows))} == {1024, 6000 % 1024}


def test_a_long_text_is_cut_with_a_warning_and_counted(embedder: Embedder) -> None:
    with pytest.warns(TruncationWarning, match="1 of 2 texts"):
        results = list(embedder.encode_stream(["router", LONG]))
    assert results[0].cut_characters == 0
    assert results[1].num_tokens == 512 and 0 < results[1].cut_characters < len(LONG)
    with pytest.raises(InputError, match=r"texts\[1\] must be at most 512 tokens with its prompt, got \d+"):
        embedder.encode(["router", LONG], truncate=False)


def test_one_chunk_over_the_whole_text_is_its_vector(any_embedder: Embedder) -> None:
    text = "the router is on. the night train is and was."
    for task in (None, *TASK_NAMES):
        chunks = any_embedder.encode(text, task=task, late_chunking=[(0, len(text))])
        np.testing.assert_allclose(chunks.vectors[0], any_embedder.encode(text, task=task), atol=2e-6)


def test_late_chunks_are_means_of_their_tokens_in_context(torch_embedder: Embedder) -> None:
    text = "The router is on. The night train. And the password."
    chunks = torch_embedder.encode(text, task="retrieval.passage", late_chunking="sentence")
    assert [text[a:b] for a, b in chunks.spans] == ["The router is on.", "The night train.", "And the password."]
    alone = torch_embedder.encode("The night train.", task="retrieval.passage")
    assert np.abs(chunks.vectors[1] - alone).max() > 1e-3
    fixed = torch_embedder.encode(text, late_chunking=4)
    tokens = torch_embedder.tokenizer.encode(text)
    assert len(fixed) == -(-(len(tokens) - 2) // 4)


def test_a_chunk_within_a_text_takes_its_own_tokens_alone(torch_embedder: Embedder) -> None:
    e, text = torch_embedder, "The router is on. The night train. And the password."
    encoding = e.tokenizer.encode(text, prompt=e.config.prompts["retrieval.passage"])
    states = e.engine.token_states(Batch.of([encoding.input_ids], [e.config.tasks.index("retrieval.passage")]))
    parts = (("The router is on.", True, False), ("night", False, False), ("password.", False, True))
    for part, opens, closes in parts:
        span = (text.index(part), text.index(part) + len(part))
        own = (encoding.offsets[:, 0] < span[1]) & (encoding.offsets[:, 1] > span[0])
        own[: encoding.num_prefix_tokens], own[-1] = opens, closes
        mean = states[own].mean(axis=0)
        (vector,) = e.encode(text, task="retrieval.passage", late_chunking=[span]).vectors
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)


def test_a_line_that_the_tokenizer_drops_is_no_sentence() -> None:
    text = "Hi.\n\u200b\nBye."
    places = np.array([(0, 0), (0, 0), (0, 3), (6, 10), (10, 10)], np.int32)  # as of a mark of a space, which is empty
    encoding = Encoding(np.arange(5, dtype=np.int32), 0, places, 1)
    spans = chunk_spans("sentence", text, encoding)
    assert [text[a:b] for a, b in spans] == ["Hi.", "Bye."]
    states = np.eye(5, dtype=np.float32)
    means = chunk_means([(states, 0)], encoding, spans, width=5)
    np.testing.assert_allclose(means, [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0, 1 / 2, 1 / 2]])


def test_late_chunks_of_many_texts_equal_those_alone(embedder: Embedder) -> None:
    texts = ["the router. the train.", "night.", LONG, ""]
    together = embedder.encode(texts, task="retrieval.passage", late_chunking="sentence", dimensions=16)
    for text, chunks in zip(texts, together, strict=True):
        alone = embedder.encode(text, task="retrieval.passage", late_chunking="sentence", dimensions=16)
        assert alone.spans == chunks.spans
        np.testing.assert_allclose(alone.vectors, chunks.vectors, atol=2e-6)
    assert together[3].vectors.shape == (0, 16)


def test_text_beyond_the_context_is_chunked_to_its_end(embedder: Embedder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunks = embedder.encode(LONG + "пароль", task="retrieval.passage", late_chunking=50)
    assert chunks.spans[-1][1] == len(LONG) + 6
    assert np.abs(np.linalg.norm(chunks.vectors, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda text: [(0, 9)], r"texts\[2\] must be .* got: late_chunking\[0\] must lie in the text's 5 characters"),
        (
            lambda text: None if text == "night" else [(0, 3)],
            r"texts\[2\] .* must give spans, got NoneType; return a list",
        ),
        (lambda text: [(0, 2.5)], r"texts\[0\] .* whole numbers, got \(0, 2.5\)"),
    ],
)
def test_spans_that_do_not_fit_are_told_with_the_number_of_their_text(
    embedder: Embedder, cut: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        embedder.encode(["the router", "the train", "night"], late_chunking=cut)


def test_chunks_need_tokens_that_know_their_places(embedder: Embedder) -> None:
    text = "The router is new. It is blue."
    tokens = embedder.tokenizer.tokens_batch([text], [""])
    with pytest.raises(InputError, match="tokens must be of type Encoding for late_chunking, got Tokens"):
        next(embedder.encode_stream([text], late_chunking="sentence", tokens=tokens))
    encodings = embedder.tokenizer.encode_batch([text], [""])
    (found,) = embedder.encode_stream([text], late_chunking="sentence", tokens=encodings)
    assert found.chunks is not None and len(found.chunks.spans) == 2


def test_tokens_are_those_of_every_text(embedder: Embedder) -> None:
    tokens = embedder.tokenizer.tokens_batch(["the router"], [""])
    with pytest.raises(InputError, match="tokens must be those of every text, got 1, and more texts"):
        list(embedder.encode_stream(["the router", "night"], tokens=tokens))


def test_a_later_window_reopens_with_its_frame_and_prompt(torch_embedder: Embedder) -> None:
    """A chunk in the second window, against that window run by hand: ``<s>``, prompt, overlap, text, ``</s>``."""
    e = torch_embedder
    task = e.config.tasks.index("retrieval.passage")
    encoding = e.tokenizer.encode(LONG, prompt=e.config.prompts["retrieval.passage"])
    ids, prefix = encoding.input_ids, encoding.num_prefix_tokens
    body, offsets = ids[prefix:-1], encoding.offsets[prefix:-1]
    size = e.max_tokens - prefix - 1
    first = size - size // 2
    chunk = range(size + 3, size + 9)
    span = (int(offsets[chunk[0], 0]), int(offsets[chunk[-1], 1]))
    chunks = e.encode(LONG, task="retrieval.passage", late_chunking=[(0, 3), span, (len(LONG) - 4, len(LONG))])
    window = np.concatenate((ids[:prefix], body[first : first + size], ids[-1:]))
    states = e.engine.token_states(Batch.of([window], [task]))
    mean = states[[prefix + i - first for i in chunk]].mean(axis=0)
    np.testing.assert_allclose(chunks.vectors[1], mean / np.linalg.norm(mean), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "query"}, "task must be one of retrieval.query"),
        ({"dimensions": 0}, "dimensions must be a whole number between 1 and 32, got 0; trained widths are 8, 16, 32"),
        ({"dimensions": 33}, "between 1 and 32"),
        ({"dimensions": 2.5}, "whole number"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": "int8"}, "needs calibrated ranges"),
        ({"dtype": "binary", "dimensions": 4}, "multiple of 8"),
        ({"task": 5}, "task must be one of .* got 5"),
        ({"dimensions": True}, "whole number"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"batch_tokens": "8"}, "batch_tokens must be a whole number from 1, got '8'"),
        ({"batch_tokens": 1.5}, "batch_tokens must be a whole number from 1, got 1.5"),
        ({"late_chunking": 0}, "late_chunking"),
        ({"late_chunking": "paragraph"}, "late_chunking"),
        ({"late_chunking": True}, "late_chunking"),
        ({"late_chunking": np.array([[0, 2], [2, 3]])}, "late_chunking must be 'sentence', .* got array"),
        ({"late_chunking": [(0, 2)]}, "belong to one text"),
        ({"task": ["separation"]}, "one per text, got more texts than tasks: tasks end at 1"),
        ({"task": ["separation"] * 3}, "got more tasks than texts"),
    ],
)
@pytest.mark.filterwarnings("ignore::polyvec.errors.UntrainedDimensionWarning")
def test_bad_options_are_named(embedder: Embedder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embedder.encode(["one", "two"], **options)


def test_whole_numbers_may_be_those_of_numpy(embedder: Embedder) -> None:
    eight, wide = np.int64(8), np.int32(400)
    found = embedder.encode("the router", dimensions=eight, late_chunking=eight, batch_tokens=wide)
    np.testing.assert_array_equal(found.vectors, embedder.encode("the router", dimensions=8, late_chunking=8).vectors)
    assert embedder.fingerprint(dimensions=eight) == embedder.fingerprint(dimensions=8)


@pytest.mark.parametrize("texts", [{"a": 1}, {"a", "b"}, np.array([["a", "b"]]), np.array("a")])
def test_texts_in_no_order_or_in_more_than_one_dimension_are_refused(embedder: Embedder, texts: Any) -> None:
    with pytest.raises(InputError, match=r"texts must be in one order and one dimension, got (dict|set|ndarray); pass"):
        embedder.encode(texts)


def test_the_columns_of_a_data_frame_are_no_texts_and_one_column_is(embedder: Embedder) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["the router", "night"], "id": [1, 2]})
    with pytest.raises(InputError, match="got DataFrame; pass a list, or one column"):
        embedder.encode(frame)
    np.testing.assert_array_equal(embedder.encode(frame["text"]), embedder.encode(["the router", "night"]))


@pytest.mark.parametrize("texts", [None, 5, b"bytes", ["ok", None], [["nested"]]])
def test_what_is_no_text_is_an_error(embedder: Embedder, texts: Any) -> None:
    with pytest.raises(InputError, match="must be a str"):
        embedder.encode(texts)


def test_a_span_of_whitespace_is_an_error(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="must hold text"):
        embedder.encode("the   router", late_chunking=[(4, 5)])


@pytest.mark.parametrize("model", ["no/such/folder", Path("missing"), "./missing", "", 3])
def test_a_model_that_is_nowhere_is_an_error(model: Any) -> None:
    with pytest.raises(WeightsError, match="model must be"):
        Embedder(model)


@pytest.mark.parametrize("engine", ["onnx-int8", "torch"])
def test_another_process_opens_what_was_pickled_anew(model_folder: Path, engine: str) -> None:
    model = Embedder(model_folder, engine=engine, threads=1)
    again = pickle.loads(pickle.dumps(model))
    assert again.engine is not model.engine and again.engine.name == model.engine.name
    np.testing.assert_array_equal(again.encode(["the router"]), model.encode(["the router"]))
    assert repr(again) == f"<Embedder of {model_folder}: 32 dimensions, engine {model.engine.name}>"


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("threads", [0, -1, "2"])
def test_threads_are_a_number_from_one(model_folder: Path, engine: str, threads: Any) -> None:
    with pytest.raises(InputError, match="threads must be a whole number from 1, got .*; leave it out"):
        Embedder(model_folder, engine=engine, threads=threads)


def test_a_number_of_threads_may_be_numpys(model_folder: Path) -> None:
    threads: Any = np.int64(1)
    assert Embedder(model_folder, engine="onnx", threads=threads).engine.lanes == 1


@pytest.mark.parametrize("device", ["bogus", "cuda:99", "xpu"])
def test_a_device_that_is_not_here_is_named(model_folder: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"device must be one that torch finds here, got '{device}' .*; leave it out"):
        Embedder(model_folder, device=device)


def test_fingerprints_tell_apart_what_makes_vectors_differ(embedder: Embedder, mini: Embedder) -> None:
    prints = {
        embedder.fingerprint(),
        embedder.fingerprint(task="separation"),
        embedder.fingerprint(task="classification"),
        embedder.fingerprint(task="classification", prompt="Class: "),
        embedder.fingerprint(dimensions=16),
        embedder.fingerprint(dtype="binary"),
        mini.fingerprint(),
    }
    assert len(prints) == 7
    assert embedder.fingerprint() == embedder.fingerprint(dimensions=32)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_what_has_no_vectors_has_no_fingerprint(embedder: Embedder, dtype: str) -> None:
    with pytest.raises(InputError, match="dtype must be one of|needs calibrated ranges"):
        embedder.fingerprint(dtype=dtype)


def test_ranges_are_of_at_least_one_text(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="texts must be at least one to calibrate on, got none"):
        embedder.calibrate([])
    assert not embedder.int8_ranges


def test_the_hash_of_weights_is_of_all_that_decides_a_vector_and_of_no_more(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    before = Embedder(folder, engine="onnx")
    (folder / "checkpoint.safetensors").write_bytes(b"of training")
    beside_a_checkpoint = Embedder(folder, engine="onnx")
    assert beside_a_checkpoint.weights_hash == before.weights_hash
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    assert Embedder(folder, engine="onnx").weights_hash != before.weights_hash


def test_int8_vectors_of_other_ranges_have_another_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    model = Embedder(shutil.copytree(model_folder, tmp_path / "model"), engine="onnx")
    model.calibrate(["the router", "the night train"])
    before = model.fingerprint(), model.fingerprint(dtype="int8")
    (model.folder / "int8_ranges.json").unlink()
    other = Embedder(model.folder, engine="onnx")
    other.calibrate(["a", "b"])
    assert other.fingerprint() == before[0] and other.fingerprint(dtype="int8") != before[1]


def test_an_engine_of_another_model_is_refused(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="engine must be of the model in .*mini, of vocab_size 40000, got 512"):
        Embedder(engine=embedder.engine)
    for other in (None, 1):
        with pytest.raises(InputError, match=f"engine must be one of auto, .*, or an open engine, got {other}"):
            Embedder(engine=cast(Any, other))


def test_a_type_checker_knows_what_encode_gives(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(
        "from polyvec import Embedder\n"
        "model = Embedder()\n"
        "reveal_type(model.encode(['a', 'b'], task=iter(['classification', None])))\n"
        "reveal_type(model.encode('a. b.', late_chunking='sentence'))\n"
        "reveal_type(model.encode(['a. b.'], late_chunking=lambda text: [(0, 2)]))\n"
    )
    said, _, status = mypy.run([str(program), "--strict", "--cache-dir", str(tmp_path / "cache")])
    found = re.findall(r'Revealed type is "(.*)"', said)
    assert status == 0 and found[0].startswith("numpy.ndarray[")
    assert found[1:] == ["polyvec.inference.embedder.Chunks", "list[polyvec.inference.embedder.Chunks]"]
