"""One server over one ``Embedder``: requests of every dialect and task share batches."""
