"""The exceptions and warnings of polyvec.

    PolyvecError
    ├── InputError          a bad argument or text at a public edge (also a ValueError)
    ├── WeightsError        a checkpoint that does not load whole (also a ValueError)
    │   └── ModelTooLargeError  a model that does not fit into memory (also a MemoryError)
    ├── MissingExtraError   an optional dependency that is not installed (also an ImportError)
    ├── TextTooLargeError   a single text that does not fit into memory (also a MemoryError)
    └── NotFiniteError      a text or a training step whose numbers are infinite or none (also an ArithmeticError)
    UserWarning
    ├── TruncationWarning           a text was longer than the context and lost its tail
    ├── MachineWarning              the machine made the model take a slower way
    └── UntrainedDimensionWarning   a width between the trained Matryoshka widths

Every message has one form: name, rule, what was got, remedy.
"""

from __future__ import annotations


class PolyvecError(Exception):
    """Base of every exception that polyvec raises on purpose."""


class InputError(PolyvecError, ValueError):
    """A bad argument or text at a public edge."""


class WeightsError(PolyvecError, ValueError):
    """A checkpoint that does not fit the model: every missing, unexpected or misshapen tensor is named."""


class ModelTooLargeError(WeightsError, MemoryError):
    """A model whose weights do not fit into memory."""


class MissingExtraError(PolyvecError, ImportError):
    """An optional dependency that is not installed; the message holds the pip line."""

    @classmethod
    def of(cls, what: str, extra: str) -> MissingExtraError:
        return cls(f"{what} needs the extra '{extra}', which is not installed: pip install 'polyvec[{extra}]'")


class TextTooLargeError(PolyvecError, MemoryError):
    """Even alone, a text does not fit into memory."""


class NotFiniteError(PolyvecError, ArithmeticError):
    """The model gave a text, or a step of training gave the model, numbers that are not finite."""


class MachineWarning(UserWarning):
    """Out of memory, or without a kernel, the model takes a slower way to the same vectors."""


class TruncationWarning(UserWarning):
    """Texts were longer than the context and lost their tails."""


class UntrainedDimensionWarning(UserWarning):
    """The model was not trained for this width; the nearest trained widths are named."""
