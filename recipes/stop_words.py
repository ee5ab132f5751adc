"""Stop words of many languages: the words of stopwords-iso that texts of the language hold often.

    pip install stopwordsiso
    python -m recipes.stop_words text.parquet parallel.parquet > polyvec/apps/stop_words.json

stopwords-iso (MIT) also lists words that name a topic, such as "order" or "room"; those are rarer. Tables have the
columns lang, source, text, and perhaps en.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import pyarrow.parquet as pq
import stopwordsiso

LEAST = 200  # texts of a source, before it has a say
MOST = 3000  # texts read of a source
LENGTH = 300  # characters read of a text, so that long ones hold no more words than short ones
SHARE = 0.01  # of the texts that hold the word, in the median source


def texts(path: str) -> Iterator[tuple[str, str, str]]:
    """Yield the language, the source and the text of each row, and of its English."""
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            yield row["lang"].partition("-")[0], row["source"], row["text"]
            if isinstance(row.get("en"), str):
                yield "en", row["source"], row["en"]


def main() -> None:
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    totals = Counter[tuple[str, str]]()
    for path in sys.argv[1:]:
        for lang, source, text in texts(path):
            if totals[lang, source] < MOST:
                totals[lang, source] += 1
                counts[lang][source].update(set(re.findall(r"[^\W\d_]+", text[:LENGTH].casefold())))
    lines = []
    for lang in sorted(set(counts) & (stopwordsiso.langs() - {"ja", "th", "zh"})):  # these have no spaces
        sources = [source for source in counts[lang] if totals[lang, source] >= LEAST]
        shares = {
            word: statistics.median(counts[lang][source][word] / totals[lang, source] for source in sources)
            for word in stopwordsiso.stopwords(lang)
            if sources
        }
        if found := sorted(word for word, share in shares.items() if share >= SHARE):
            lines.append(f"{json.dumps(lang)}: {json.dumps(found, ensure_ascii=False)}")
    print("{" + ",\n".join(lines) + "}")


if __name__ == "__main__":
    main()
