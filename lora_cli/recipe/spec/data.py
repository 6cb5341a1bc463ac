"""`data`: where the rows come from, and how they are read and checked."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from lora_cli.recipe.spec.encodings import python_name
from lora_cli.recipe.spec.section import (
    Conflicts,
    Section,
    Seed,
    Share,
    Size,
    Word,
    Words,
    bytes_of,
)


class HeldOutSpec(Section):
    """Rows that are drawn from another split, and removed from it."""

    from_: Word = Field("train", alias="from")
    """The split from which the rows are drawn."""

    fraction: Share
    """Share of the rows. (If `validation` and `test` are drawn from the same split, `test` is a
    share of what `validation` leaves.)"""

    disjoint: Literal["exact", "substring"] | None = "exact"
    """`exact`: no text is on both sides, however it is typed (see `max_overlap`). `substring`:
    also, no text of one side is contained in a text of the other, word for word, or character for
    character in scripts without spaces (Chinese, Japanese, Thai, …); a text that is contained in
    texts of both sides is dropped."""

    stratify: bool = False
    """Keep the proportions of the labels."""

    group_by: Word | None = None
    """Keep rows with the same value in this column (a customer, a document) on one side."""

    def conflicts(self) -> Conflicts:
        """Yield the two ways of keeping rows together that exclude each other."""
        if self.group_by is not None and self.disjoint == "substring":
            what = "`group_by` and `disjoint: substring` cannot be combined"
            yield "group_by", what, "leave one of the two out"


def _split_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "named"
    return "held_out" if isinstance(value, dict | HeldOutSpec) else None


SplitSpec = Annotated[
    Annotated[Word, Tag("named")] | Annotated[HeldOutSpec, Tag("held_out")],
    Discriminator(
        _split_form,
        custom_error_type="split",
        custom_error_message="a name (`validation`), a slice (`train[:80%]`), a file (`dev.csv`), "
        "or rows drawn from another: `{from: train, fraction: 0.1}`",
    ),
]


class FormatSpec(Section):
    """How a data file is read, where its name does not say it."""

    type: Literal["csv", "json", "parquet", "text", "conll"] | None = None
    """Format of the file. Default: by its suffix. `json` includes JSON lines; `conll` has one word
    per line with its tags, and a blank line between sentences."""

    encoding: Annotated[Word, AfterValidator(python_name)] = "utf-8"
    """Encoding of the text (utf-8, latin-1, cp1252, cp932, utf-16). A byte order mark is
    removed."""

    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = None
    """The character between the columns of a csv file; write a tab as `"\\t"`, with the quotation
    marks. Default: a tab in `.tsv` files, a comma in others."""

    quoting: Literal["auto", "csv", "backslash", "none"] = "auto"
    """What quotation marks in a csv file mean. `csv`: they enclose fields that may contain
    delimiters and line breaks, and `""` is a quotation mark inside; `backslash`: the same, with
    `\\"` for a mark inside; `none`: they are ordinary characters, and every line is a row (GLUE's
    tsv files). `auto` reads the whole file in each way and uses the one that gives every row as
    many fields as the header; it prints its choice if the ways differ."""

    header: bool = True
    """Whether the first line of a csv file contains the names of the columns."""

    columns: Words | None = None
    """Names of the columns, instead of those in the header. For a text file, the name of its only
    column; for a CoNLL file, the names of its columns (by default, the first is `tokens` and the
    last `tags`)."""

    skip_lines: Annotated[int, Field(ge=0)] = 0
    """Lines to skip at the beginning of a csv file, before the header or the first row, such as a
    title or a remark."""

    decimal: Literal[".", ","] = "."
    """The decimal mark of numbers that are stored as text: with `","`, `0,5` is a half."""

    thousands: Literal[".", ","] | None = None
    """The thousands separator of numbers that are stored as text: with `","`, `2,301` is 2301.
    (Spaces and apostrophes as separators need no key.)"""

    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What forms a row of a text file."""

    label_from: Literal["folder", "first_word", "fasttext"] | None = None
    """Where a text file contains its label, which becomes the column `label`: in the name of its
    `folder` (each file is then a row; only folders without subfolders count); in the `first_word`
    of each line; or in the words that begin with `__label__` (`fasttext`; several are joined by a
    space, so add `task.label_separator: " "`)."""

    def conflicts(self) -> Conflicts:
        """Yield an unknown encoding, columns named twice, and keys that exclude each other."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)
        except (LookupError, ValueError):
            hint = "for example utf-8, latin-1, cp1252, cp932, utf-16"
            yield "encoding", f"`{self.encoding}` is not an encoding of text", hint
        if self.label_from and self.type not in (None, "text"):
            what = f"`label_from` is for text files, and `type` is `{self.type}`"
            yield "label_from", what, "leave one of the two out"
        if self.label_from and self.sample_by != "line":
            what = f"`label_from: {self.label_from}` already says what a row is"
            yield "sample_by", what, "leave `sample_by` out"
        if self.thousands == self.decimal:
            what = f"`{self.decimal}` cannot be both the decimal mark and the thousands separator"
            yield "thousands", what, "use another character for one of them, or leave it out"
        for name, times in Counter(self.columns or ()).items():
            if times > 1:
                what = f"the column `{name}` appears {times} times in `columns`"
                yield "columns", what, "give each column a different name"


class CheckSpec(Section):
    """What is checked in the rows before a model is loaded."""

    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of the validation or test rows whose text also occurs in train. More is an
    error, since their metrics would measure memorisation. Texts are compared without regard to
    case, spaces, character width, Unicode normal form, invisible characters and punctuation at the
    end. (Good data sets share short texts by chance: 0.3 % of the test rows of SST-2 and Banking77.
    A copied or overlapping split shares far more.)"""

    near_duplicates: bool = True
    """Also look for texts that are nearly equal (they share four fifths of their runs of a few
    characters), within and between the splits, and warn of them. Takes about a second for 100,000
    short texts."""


class SourceSpec(Section):
    """Where the rows come from, and which of them are held out."""

    name: Word | None = None
    """A data set on the Hub, or a folder with the layout of one (relative to the recipe)."""

    config: Word | None = None
    """Configuration of the data set on the Hub (`sst2` of `nyu-mll/glue`)."""

    revision: Word = "main"
    """Branch, tag or commit of the data set on the Hub."""

    path: Word | None = None
    """A file, a folder, or a pattern of file names (csv, tsv, json lines, parquet, txt; also .gz).
    Name text files that belong together line by line as one: `train.{en,de}.txt` has the columns
    `en` and `de`."""

    split_column: Word | None = None
    """Column of the files in `path` that contains the split of each row. `train`, `validation` and
    `test` are then values of this column, such as `dev`."""

    columns: dict[Word, Word] = Field(default_factory=dict)
    """New names for columns: `{question: prompt}` reads the column `question` as `prompt`. All
    other keys use the new names."""

    train: Word = "train"
    """The rows for training: a split, a slice, or a file."""

    validation: SplitSpec | None = None
    """The rows by which the best adapter is chosen."""

    test: SplitSpec | None = None
    """The rows that are used only once, at the end."""

    format: FormatSpec = Field(default_factory=FormatSpec)
    """How the files are read."""

    def conflicts(self) -> Conflicts:
        """Yield what prevents the rows from having exactly one source."""
        if self.name and self.path:
            what = "`name` and `path` exclude each other"
            yield "path", what, "keep `name` for a data set on the Hub, `path` for files"
        if not self.name and not self.path and not is_file(self.train):
            yield (
                "",
                "the recipe does not say where the rows are",
                "add `path: FILE` (or a folder), `train: FILE`, or `name:` with a Hub id; or name "
                "several sets in `mix`",
            )
        if self.config and not self.name:
            what = "`config` belongs to a data set on the Hub, and `name` is missing"
            yield "config", what, "leave it out, or add `name:` with the Hub id"
        if self.split_column and not self.path:
            what = "`split_column` divides the rows of files, and `path` is missing"
            yield "split_column", what, "name the file or folder: `path: FILE`"
        for name, times in Counter(self.columns.values()).items():
            if times > 1:
                what = f"{times} columns get the name `{name}`"
                yield "columns", what, "give each a different name"


class MixedSpec(SourceSpec):
    """One of the data sets of a mixture: where its rows come from, and its share."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """The set's share of the training examples: this divided by the sum of all weights. Give a
    weight to every set, or to none. Without weights, every example is trained once per epoch."""


SET_NAME = re.compile(r"[\w-]+")


class DataSpec(SourceSpec):
    """Where the rows come from, and which of them are held out."""

    mix: dict[Word, MixedSpec] = Field(default_factory=dict)
    """Several data sets by name, instead of `name`, `path` and the keys that go with them: `{math:
    {path: gsm8k, weight: 2}, talk: {path: talk.jsonl, weight: 1}}`. Each set has its own validation
    and test rows; metrics are computed on all rows together, and on each set (`math/loss`). An
    epoch has as many examples as all sets together. With weights, a set whose share is larger than
    its size is repeated evenly; a set whose share is smaller contributes other examples in each
    epoch, until all have been used. (With `train.packing`, shares are counted in packed rows, and
    therefore in tokens.)"""

    split_seed: Seed = 0
    """Seed of the draw of held-out rows. `train.seed` does not change which rows are drawn."""

    streaming: bool = False
    """Read the train rows while training, for data larger than the disk. Needs
    `train.max_steps`."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when a row cannot be read: stop (`error`), or leave it out and count it
    (`skip`)."""

    check: CheckSpec = Field(default_factory=CheckSpec)
    """What is checked in the rows before a model is loaded."""

    cache_limit: Size = "16GB"
    """Disk space that a run may use to cache what the frozen parts of a model compute for each
    example: the features of an encoder, the latents of an autoencoder, and the input of the first
    trained layer if all layers below it are frozen. A split that needs more is not cached but
    computed again in every step, and a message says so. `0B` turns the cache off. It is in the same
    folder as the encoded rows, `HF_DATASETS_CACHE`."""

    @property
    def cache_bytes(self) -> int:
        """`cache_limit` in bytes."""
        return bytes_of(self.cache_limit)

    @property
    def sources(self) -> list[SourceSpec]:
        """The data sets of `mix`, or the section itself."""
        return list(self.mix.values()) or [self]

    @property
    def number_forms(self) -> list[tuple[str, str | None]]:
        """The pairs of decimal mark and thousands separator of the sources, without duplicates."""
        forms = [(source.format.decimal, source.format.thousands) for source in self.sources]
        return list(dict.fromkeys(forms))

    def has(self, split: str) -> bool:
        """Return whether any source has rows of a split."""
        return any(getattr(source, split) is not None for source in self.sources)

    def of_set(self, name: str) -> DataSpec:
        """Return the `data` section of a recipe that trains on one set alone."""
        chosen = {key: getattr(self.mix[name], key) for key in SourceSpec.model_fields}
        return self.with_values({**chosen, "mix": {}})

    def set_of_metric(self, metric: str) -> tuple[str | None, str]:
        """Split `math/loss` into the set and the metric; the set is None for a metric of all."""
        name, slash, rest = metric.partition("/")
        return (name, rest) if slash and name in self.mix else (None, metric)

    def conflicts(self) -> Conflicts:
        """Yield what prevents exactly one source of the rows, and what cannot be streamed."""
        if self.mix:
            yield from self._mix_conflicts()
        else:
            yield from super().conflicts()
        if self.streaming and self.train.endswith("]"):
            what = "`streaming` reads all of `train`, so it cannot be a slice"
            yield "streaming", what, "leave the brackets out, or set `streaming: false`"
        for split in ("validation", "test"):
            spec = getattr(self, split)
            if self.streaming and isinstance(spec, HeldOutSpec) and spec.from_ == "train":
                what = f"`streaming` cannot draw `{split}` from `train`"
                yield split, what, f"name another split or a file: `{split}: FILE`"

    def _mix_conflicts(self) -> Conflicts:
        for key, field in SourceSpec.model_fields.items():
            if getattr(self, key) != field.get_default(call_default_factory=True):
                what = f"`{key}` belongs to one data set, and `mix` names several"
                yield key, what, f"write it into a set: `mix: {{NAME: {{{key}: …}}}}`"
        if self.streaming:
            what = (
                "examples are drawn from the sets of `mix` by position, so they cannot be streamed"
            )
            yield "streaming", what, "leave `streaming` out"
        for name in self.mix:
            if not SET_NAME.fullmatch(name):
                what = (
                    f"`{name}` cannot be the name of a set, which becomes a prefix of its metrics"
                )
                yield f"mix.{name}", what, "use letters, digits, `_` and `-`"
        without = [name for name, spec in self.mix.items() if spec.weight is None]
        if without and len(without) < len(self.mix):
            what = f"the set `{without[0]}` has no `weight`, and others have one"
            yield f"mix.{without[0]}", what, "give every set a weight, or none"


DATA_SUFFIXES = (
    ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".text", ".conll", ".conllu",
    ".bio", ".iob", ".iob2",
)  # fmt: skip


def is_file(split: SplitSpec | None) -> bool:
    """Return whether a split is the name of a file: with a folder, a known suffix, or a pattern.

    `train.{en,de}.gz` stands for two files.
    """
    if not isinstance(split, str):
        return False
    name = re.sub(r"\[[^\[\]/]*\]$", "", split).lower()
    # the query of a URL, which is rejected later
    name = re.sub(r"\?[\w.-]+=.*", "", name).removesuffix(".gz")
    is_pair = re.search(r"\{[^{},]+(,[^{},]+)+\}", name) is not None
    return "/" in name or is_pair or name.endswith(DATA_SUFFIXES)
