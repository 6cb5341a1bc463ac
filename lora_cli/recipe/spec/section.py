"""The base class of all sections of a recipe, and the types that they share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Conflicts = Iterator[tuple[str, str, str]]  # the key, what is wrong, how to fix it
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Word], Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that all libraries accept
LayerNumber = Annotated[int, Field(ge=0)]
LayerRange = Annotated[str, Field(pattern=r"^\d+(-\d+)?$")]
Size = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?([kMGT]i?)?B$")]  # of memory or of a disk
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the recipe. It is immutable, rejects unknown keys and converts no values."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )

    def conflicts(self) -> Conflicts:
        """Yield what is wrong between keys whose values are valid one by one."""
        yield from ()

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy in which some keys have other values, which are not validated.

        Args:
            values: By field name; keys of inner sections have dots: `{"data.test": None}`.
        """
        changed = self
        for key, value in values.items():
            name, _, rest = key.partition(".")
            assert name in type(self).model_fields, f"{type(self).__name__} has no `{name}`"
            if rest:
                value = getattr(changed, name).with_values({rest: value})
            changed = changed.model_copy(update={name: value})
        return changed

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.conflicts()):
            raise PydanticCustomError("conflict", "{found}", {"found": found})
        return self


def bytes_of(size: str) -> int:
    """Return a size in bytes: 4,000,000,000 for `4GB`, 4,294,967,296 for `4GiB`."""
    number, unit = re.fullmatch(r"([\d.]+) ?(.*)B", size).groups()  # type: ignore[union-attr]
    base = 1024 if unit.endswith("i") else 1000
    return int(float(number) * base ** " kMGT".index(unit[:1] or " "))
