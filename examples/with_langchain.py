"""polyvec as the embeddings of LangChain: queries and passages each get their own task."""

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from polyvec import Embedder


class PolyvecEmbeddings(Embeddings):
    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embedder.encode(texts, task="retrieval.passage").tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embedder.encode(text, task="retrieval.query").tolist()


def main(texts: list[str], question: str) -> str:
    store = InMemoryVectorStore(PolyvecEmbeddings(Embedder()))
    store.add_texts(texts)
    return store.similarity_search(question, k=1)[0].page_content


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
