"""polyvec as the embedding model of LlamaIndex: queries and passages each get their own task."""

from llama_index.core import VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode

from polyvec import Embedder


class PolyvecEmbedding(BaseEmbedding):
    _embedder: Embedder = PrivateAttr(default_factory=Embedder)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.encode(query, task="retrieval.query").tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.encode(texts, task="retrieval.passage").tolist()


def main(texts: list[str], question: str) -> str:
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=PolyvecEmbedding())
    return index.as_retriever(similarity_top_k=1).retrieve(question)[0].text


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
