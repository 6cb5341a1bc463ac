"""The labels of an object detection task, and the mapping of the data's categories to them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lora_cli.characters import difference_of_form
from lora_cli.data.boxes import BoxError, categories_in, crowd_flags_in
from lora_cli.data.load_rows import Rows, stream_label_names
from lora_cli.errors import LoraError, Problem, counted, did_you_mean, printable
from lora_cli.recipe import ObjectDetectionSpec, Recipe

MAX_SHOWN_CHARACTERS = 60
MAX_UNKNOWN = 10


class DetectionLabels:
    """The labels, in the order of the model's outputs."""

    def __init__(self, recipe: Recipe, spec: ObjectDetectionSpec) -> None:
        self.recipe, self.spec = recipe, spec
        self.names = [str(label).strip() for label in spec.labels or []]
        self.category_names: list[str] = []  # given by the data set, whose rows may hold indices

    def learn(self, splits: dict[str, Rows]) -> None:
        """Take the labels from the recipe, or else infer them from the data; check all rows.

        Raises:
            LoraError: If there are no labels, or with every category in the data that is not one.
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
        problems = [p for name, rows in splits.items() for p in self._unknown_labels(name, rows)]
        if problems:
            raise LoraError(problems)

    def _require_objects(self, rows: Rows) -> None:
        """Check that there is an object to train on.

        Raises:
            LoraError: If there is none, or all are marked as crowds or difficult.
        """
        column, has_any = self.spec.objects_column, False
        for row in rows:
            flags = crowd_flags_in(row.get(column))
            if not all(flags):
                return
            has_any = has_any or bool(flags)
        what, hint = "no row of the train split has an object", "is it the right column, "
        hint += "`task.objects_column`?"
        if has_any:
            what = "all objects of the train split are marked as `iscrowd` or `difficult`, and "
            what, hint = what + "such are not trained", "correct the marks in the data"
        raise LoraError(what, rows.source, hint)

    def _infer(self, splits: dict[str, Rows]) -> list[str]:
        """Return the data set's own category names, or else the categories in the train split."""
        if "train" not in splits:
            raise LoraError(
                "the labels are not known",
                self.recipe.at("task.labels"),
                "name them in the order of the model's outputs: `--set 'task.labels=[cat, dog]'`",
            )
        rows = splits["train"]
        if named := rows.label_names.get(self.spec.objects_column):
            return list(named)
        counts = self.count(rows)
        if all(name.isdecimal() for name in counts):
            return sorted(counts, key=int)
        return sorted(counts)

    def count(self, rows: Rows) -> Counter[str]:
        """Count the objects of each category by name."""
        column = self.spec.objects_column
        return Counter(self.name_of(c) for row in rows for c in categories_in(row.get(column)))

    def name_of(self, category: str | int) -> str:
        """Return the name of a category that the data give by name or by index."""
        if isinstance(category, int) and 0 <= category < len(self.category_names):
            # if the recipe has none of the data set's names, it renames the categories by index
            renamed = self.names and not set(self.names) & set(self.category_names)
            if not renamed or category >= len(self.names):
                return self.category_names[category]
        if isinstance(category, int) and str(category) not in self.names:
            by_position = not any(name.isdecimal() for name in self.names)
            if by_position and 0 <= category < len(self.names):
                return self.names[category]
        return str(category)

    def position(self, category: str | int) -> int | None:
        """Return the index of a category's label, or None if it is not a label."""
        name = self.name_of(category)
        return self.names.index(name) if name in self.names else None

    def names_in(self, row: dict[str, Any]) -> list[str]:
        """Return the distinct labels of a row's objects, in label order."""
        try:
            categories = categories_in(row.get(self.spec.objects_column))
        except BoxError:
            return []
        names_found = {self.name_of(category) for category in categories}
        return [name for name in self.names if name in names_found]

    def problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return a problem for the first category of a row that is not a label."""
        for category in categories_in(row.get(self.spec.objects_column)):
            if self.position(category) is None:
                what = f"`{printable(str(category), MAX_SHOWN_CHARACTERS)}` is not a label"
                return Problem(what, place, self._hint(str(category)))
        return None

    def _unknown_labels(self, split: str, rows: Rows) -> list[Problem]:
        """Return a problem for each category of a split that is not a label."""
        counts = self.count(rows)
        unknown = [name for name in counts if name not in self.names]
        places: dict[str, str] = {}
        for i, row in enumerate(rows if unknown else ()):
            for category in categories_in(row.get(self.spec.objects_column)):
                places.setdefault(self.name_of(category), rows.place(i))
        problems = [
            Problem(
                f"`{printable(name, MAX_SHOWN_CHARACTERS)}` is not a label "
                f"({counted(counts[name], 'object')} of {split})",
                places[name],
                self._hint(name),
            )
            for name in unknown[:MAX_UNKNOWN]
        ]
        if len(unknown) > MAX_UNKNOWN:
            remaining = counted(len(unknown) - MAX_UNKNOWN, "more category").replace("ys", "ies")
            hint = "name them in `task.labels`, or leave it out: they are found in the train split"
            problems.append(Problem(f"{remaining} of {split} are not labels", rows.source, hint))
        return problems

    def _hint(self, name: str) -> str:
        for label in self.names:
            if difference := difference_of_form(name, label):
                return f"it is the label `{label}` but for {difference}: write both alike"
        if name.isdecimal() and not any(label.isdecimal() for label in self.names):
            return f"positions are 0 to {len(self.names) - 1}: {', '.join(self.names[:20])}"
        known = did_you_mean(name, self.names, "the labels are")
        return f"{known}; fix the rows, or name it in `task.labels`"
