"""polyvec: jina-embeddings-v3 as an open system. Text in, task-specific Matryoshka embeddings out."""

from polyvec.errors import (
    InputError,
    MachineWarning,
    MissingExtraError,
    NotFiniteError,
    PolyvecError,
    TextTooLargeError,
    TruncationWarning,
    UntrainedDimensionWarning,
    WeightsError,
)
from polyvec.inference.embedder import Chunks, Embedder, Embedding

__version__ = "0.1.0"

__all__ = [
    "Chunks",
    "Embedder",
    "Embedding",
    "InputError",
    "MachineWarning",
    "MissingExtraError",
    "NotFiniteError",
    "PolyvecError",
    "TextTooLargeError",
    "TruncationWarning",
    "UntrainedDimensionWarning",
    "WeightsError",
    "__version__",
]
