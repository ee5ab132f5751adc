"""polyvec as the embedders of Haystack: queries and documents each get their own task."""

import os
from dataclasses import replace

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # before the import, which would report it
from haystack import Document, Pipeline, component
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from polyvec import Embedder


@component
class PolyvecTextEmbedder:
    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        return {"embedding": self.embedder.encode(text, task="retrieval.query").tolist()}


@component
class PolyvecDocumentEmbedder:
    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        vectors = self.embedder.encode([d.content or "" for d in documents], task="retrieval.passage")
        return {"documents": [replace(d, embedding=v.tolist()) for d, v in zip(documents, vectors, strict=True)]}


def main(texts: list[str], question: str) -> str:
    embedder, store = Embedder(), InMemoryDocumentStore(embedding_similarity_function="dot_product")
    documents = [Document(content=text) for text in texts]
    store.write_documents(PolyvecDocumentEmbedder(embedder).run(documents)["documents"])
    pipeline = Pipeline()
    pipeline.add_component("embedder", PolyvecTextEmbedder(embedder))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return pipeline.run({"embedder": {"text": question}})["retriever"]["documents"][0].content


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
