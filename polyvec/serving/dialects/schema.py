"""What the request bodies of all dialects share."""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

#: A whole number; never true, 1.0 or "1".
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]  # whole ones too
Flag = Annotated[bool, Field(strict=True)]

Item = TypeVar("Item")
#: A list that is read up to its first fault. Of millions of faults pydantic would make gigabytes, and one is told.
Several: TypeAlias = Annotated[list[Item], Field(fail_fast=True)]
TokenIds = Annotated[list[Integer], Field(fail_fast=True, max_length=100_000)]


class Body(BaseModel):
    """A field that is not in the schema is an error: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
