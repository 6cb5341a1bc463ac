"""The labels of objects: which there are, and which of them a category in the data is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lora_cli.characters import difference_of_form
from lora_cli.data.boxes import BoxError, categories_in, crowd_marks_in
from lora_cli.data.load_rows import Rows, stream_label_names
from lora_cli.errors import LoraError, Problem, counted, did_you_mean, printable
from lora_cli.recipe import ObjectDetectionSpec, Recipe

SHOWN = 60
MOST_UNKNOWN = 10


class DetectionLabels:
    """The labels of objects, in the order of the model's outputs."""

    def __init__(self, recipe: Recipe, spec: ObjectDetectionSpec) -> None:
        self.recipe, self.spec = recipe, spec
        self.names = [str(label).strip() for label in spec.labels or []]
        self.category_names: list[str] = []  # of the data set; its rows may hold positions

    def learn(self, splits: dict[str, Rows]) -> None:
        """Find the labels.

        Raises:
            LoraError: If there are none, or with the categories in the data that are none.
        """
        column = self.spec.objects_column
        if self.recipe.data.streaming:
            names = stream_label_names(self.recipe)
            self.category_names = names.get(column, self.category_names)
        for rows in splits.values():
            self.category_names = rows.label_names.get(column, self.category_names)
        if not self.names:
            self.names = self._infer(splits)
        if "train" in splits:
            self._require_objects(splits["train"])
        problems = [p for name, rows in splits.items() for p in self._unknown(name, rows)]
        if problems:
            raise LoraError(problems)

    def _require_objects(self, rows: Rows) -> None:
        """Check that there is an object to train.

        Raises:
            LoraError: If there is none, or all are marked to be left out.
        """
        column, has_any = self.spec.objects_column, False
        for row in rows:
            marks = crowd_marks_in(row.get(column))
            if not all(marks):
                return
            has_any = has_any or bool(marks)
        what, hint = "no row of the train split has an object", "is it the right column, "
        hint += "`task.objects_column`?"
        if has_any:
            what = "all objects of the train split are marked as `iscrowd` or `difficult`, and "
            what, hint = what + "such are not trained", "correct the marks in the data"
        raise LoraError(what, rows.source, hint)

    def _infer(self, splits: dict[str, Rows]) -> list[str]:
        """Return the names that the data set gives its categories, or those that are found."""
        if "train" not in splits:
            raise LoraError(
                "the labels are not known",
                self.recipe.at("task.labels"),
                "name them in the order of the model's outputs: `--set 'task.labels=[cat, dog]'`",
            )
        rows = splits["train"]
        if named := rows.label_names.get(self.spec.objects_column):
            return list(named)
        found = self.count(rows)
        if all(name.isdecimal() for name in found):
            return sorted(found, key=int)
        return sorted(found)

    def count(self, rows: Rows) -> Counter[str]:
        """Return how many objects of each category the rows have, by its name."""
        column = self.spec.objects_column
        return Counter(self.name_of(c) for row in rows for c in categories_in(row.get(column)))

    def name_of(self, category: str | int) -> str:
        """Return the name of a category that the data give by its name, or by a position."""
        if isinstance(category, int) and 0 <= category < len(self.category_names):
            # labels of other names in the recipe rename the categories, by position
            renamed = self.names and not set(self.names) & set(self.category_names)
            if not renamed or category >= len(self.names):
                return self.category_names[category]
        if isinstance(category, int) and str(category) not in self.names:
            by_position = not any(name.isdecimal() for name in self.names)
            if by_position and 0 <= category < len(self.names):
                return self.names[category]
        return str(category)

    def position(self, category: str | int) -> int | None:
        """Return the output that stands for a category, or None if it is no label."""
        name = self.name_of(category)
        return self.names.index(name) if name in self.names else None

    def names_in(self, row: dict[str, Any]) -> list[str]:
        """Return the labels of a row's objects, each once, in the order of the labels."""
        try:
            categories = categories_in(row.get(self.spec.objects_column))
        except BoxError:
            return []
        found = {self.name_of(category) for category in categories}
        return [name for name in self.names if name in found]

    def problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return which category of a row is no label."""
        for category in categories_in(row.get(self.spec.objects_column)):
            if self.position(category) is None:
                what = f"`{printable(str(category), SHOWN)}` is not a label"
                return Problem(what, place, self._meant(str(category)))
        return None

    def _unknown(self, split: str, rows: Rows) -> list[Problem]:
        """Return a problem for each category of a split that is no label."""
        counts = self.count(rows)
        unknown = [name for name in counts if name not in self.names]
        places: dict[str, str] = {}
        for i, row in enumerate(rows if unknown else ()):
            for category in categories_in(row.get(self.spec.objects_column)):
                places.setdefault(self.name_of(category), rows.place(i))
        problems = [
            Problem(
                f"`{printable(name, SHOWN)}` is not a label "
                f"({counted(counts[name], 'object')} of {split})",
                places[name],
                self._meant(name),
            )
            for name in unknown[:MOST_UNKNOWN]
        ]
        if len(unknown) > MOST_UNKNOWN:
            more = counted(len(unknown) - MOST_UNKNOWN, "more category").replace("ys", "ies")
            hint = "name them in `task.labels`, or leave it out: they are found in the train split"
            problems.append(Problem(f"{more} of {split} are not labels", rows.source, hint))
        return problems

    def _meant(self, name: str) -> str:
        for label in self.names:
            if how := difference_of_form(name, label):
                return f"it is the label `{label}` but for {how}: write both alike"
        if name.isdecimal() and not any(label.isdecimal() for label in self.names):
            return f"positions are 0 to {len(self.names) - 1}: {', '.join(self.names[:20])}"
        known = did_you_mean(name, self.names, "the labels are")
        return f"{known}; fix the rows, or name it in `task.labels`"
