"""What every section of a recipe shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Conflicts = Iterator[tuple[str, str, str]]  # of each: the key, what is wrong, how to fix it
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Word], Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes
LayerNumber = Annotated[int, Field(ge=0)]
LayerRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the recipe: unknown keys are refused, values are not converted."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )

    def conflicts(self) -> Conflicts:
        """Yield what is wrong between keys that are each right by themselves."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.conflicts()):
            raise PydanticCustomError("conflict", "{found}", {"found": found})
        return self
