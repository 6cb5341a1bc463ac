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
    """Rows drawn from another split, and taken away from it."""

    from_: Word = Field("train", alias="from")
    """The split that the rows are drawn from."""

    fraction: Share
    """Share of the rows. (Where `test` is drawn from the same split, of those that it leaves.)"""

    disjoint: Literal["exact", "substring"] | None = "exact"
    """`exact`: a text is never on both sides, however it is typed (see `max_overlap`). `substring`:
    nor does a text of one side stand inside a text of the other, word for word, or letter for
    letter in scripts without spaces (Chinese, Japanese, Thai, …); a text that stands inside texts
    of both sides is dropped."""

    stratify: bool = False
    """Keep the proportions of the labels."""

    group_by: Word | None = None
    """Rows with the same value in this column stay on one side (a customer, a document)."""

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
    """How a data file is read, where its name does not say."""

    type: Literal["csv", "json", "parquet", "text", "conll"] | None = None
    """Kind of file. Default: by its suffix; `json` covers JSON lines; `conll` has a word a line
    with its tags, and a blank line between sentences."""

    encoding: Annotated[Word, AfterValidator(python_name)] = "utf-8"
    """Encoding of the text (utf-8, latin-1, cp1252, cp932, utf-16); a byte order mark is
    dropped."""

    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = None
    """The one character between the columns of a csv file; a tab is written `"\\t"`, with the
    quotation marks. Default: a tab in `.tsv`, a comma elsewhere."""

    quoting: Literal["auto", "csv", "backslash", "none"] = "auto"
    """How quotation marks in a csv file are meant. `csv`: they enclose fields that may hold
    delimiters and line ends, and `""` is a mark inside; `backslash`: the same, with `\\"` for a
    mark inside; `none`: they are letters of the text, and every line is a row (GLUE's tsv files).
    `auto` reads the whole file in each way, takes the one that gives every row the fields of the
    header, and prints which it took where they differ."""

    header: bool = True
    """The first line of a csv file names the columns."""

    columns: Words | None = None
    """Names of the columns, instead of those in the header; the name of a text file's column; the
    names of a CoNLL file's columns, of which the first is else `tokens` and the last `tags`."""

    skip_lines: Annotated[int, Field(ge=0)] = 0
    """Lines of a csv file before its header, or before its rows, that are neither: a title, a
    remark."""

    decimal: Literal[".", ","] = "."
    """The decimal mark of a number that is text: `0,5` is a half with `","`."""

    thousands: Literal[".", ","] | None = None
    """The thousands separator of a number that is text: `2,301` is 2301 with `","`.
    (Spaces and apostrophes between them need no key.)"""

    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What is one row of a text file."""

    label_from: Literal["folder", "first_word", "fasttext"] | None = None
    """Where a text file holds its label, which becomes the column `label`: in the name of the
    `folder` that it is in (then each file is a row, and only folders that hold no folders count);
    in the `first_word` of each line; or in the words that begin with `__label__` (`fasttext`;
    several are joined by a space, so `task.label_separator: " "` divides them)."""

    def conflicts(self) -> Conflicts:
        """Yield an encoding that does not exist, and columns that are named twice."""
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
            what = f"`{self.decimal}` cannot stand both before the fraction and between thousands"
            yield "thousands", what, "name another for one of the two, or leave it out"
        for name, times in Counter(self.columns or ()).items():
            if times > 1:
                what = f"the column `{name}` appears {times} times in `columns`"
                yield "columns", what, "give each column a name of its own"


class CheckSpec(Section):
    """What is looked for in the rows before a model is loaded."""

    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of the validation or test rows whose text also occurs in train; more is an
    error, for their metrics would measure memory. Case, spaces, width, Unicode's normal form,
    characters that cannot be seen and the punctuation at the end do not count. (Honest data sets
    share short texts by chance: SST-2's test rows and Banking77's 0.3 %. A copied or overlapping
    split shares far more.)"""

    near_duplicates: bool = True
    """Look for texts that are nearly equal too (four fifths of their runs of a few characters are
    the same), within and between the splits, and warn of them; about a second for 100,000 short
    texts."""


class SourceSpec(Section):
    """Where rows come from, and which are held out."""

    name: Word | None = None
    """A data set on the Hub, or a folder that is laid out like one (relative to the recipe)."""

    config: Word | None = None
    """Configuration of the data set on the Hub (`sst2` of `nyu-mll/glue`)."""

    revision: Word = "main"
    """Branch, tag or commit of the data set on the Hub."""

    path: Word | None = None
    """A file, a folder, or a pattern of files (csv, tsv, json lines, parquet, txt; also .gz). Text
    files that belong together line by line are named at once: `train.{en,de}.txt` has the columns
    `en` and `de`."""

    split_column: Word | None = None
    """Column of the files in `path` that says which split a row is of. `train`, `validation` and
    `test` then name its values, such as `dev`."""

    columns: dict[Word, Word] = Field(default_factory=dict)
    """Other names for columns: `{question: prompt}` reads the column `question` as `prompt`. All
    other keys use the new names."""

    train: Word = "train"
    """The rows to train on: a split, a slice, or a file."""

    validation: SplitSpec | None = None
    """The rows to choose the best adapter by."""

    test: SplitSpec | None = None
    """The rows that are used once, at the end."""

    format: FormatSpec = Field(default_factory=FormatSpec)
    """How the files are read."""

    def conflicts(self) -> Conflicts:
        """Yield what keeps the rows from having exactly one source."""
        if self.name and self.path:
            what = "`name` and `path` exclude each other"
            yield "path", what, "keep `name` for a data set on the Hub, `path` for files"
        if not self.name and not self.path and not is_file(self.train):
            yield (
                "",
                "the recipe does not say where the rows are",
                "add `path: FILE` (or a folder), `train: FILE`, or `name:` with a Hub id; several "
                "sets stand in `mix`",
            )
        if self.config and not self.name:
            what = "`config` is of a data set on the Hub, and `name` is missing"
            yield "config", what, "leave it out, or add `name:` with the Hub id"
        if self.split_column and not self.path:
            what = "`split_column` divides the rows of files, and `path` is missing"
            yield "split_column", what, "name the file or folder: `path: FILE`"
        for name, times in Counter(self.columns.values()).items():
            if times > 1:
                what = f"{times} columns get the name `{name}`"
                yield "columns", what, "give each a name of its own"


class MixedSpec(SourceSpec):
    """One of the data sets that are mixed: where its rows come from, and its share."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the trained examples: this over the sum of all weights. All sets have one, or
    none; without, every example is trained once an epoch."""


SET_NAME = re.compile(r"[\w-]+")


class DataSpec(SourceSpec):
    """Where the rows come from, and which are held out."""

    mix: dict[Word, MixedSpec] = Field(default_factory=dict)
    """Several data sets by name, instead of `name`, `path` and what goes with them:
    `{math: {path: gsm8k, weight: 2}, talk: {path: talk.jsonl, weight: 1}}`. Each has validation and
    test rows of its own; metrics are of all rows together, and of each set (`math/loss`). An epoch
    has as many examples as all sets together: with weights, a set with a larger share than its size
    is repeated, evenly; of one with a smaller share each epoch takes other examples, until all had
    their turn. (With `train.packing`, the shares are of the filled rows, so of the tokens.)"""

    split_seed: Seed = 0
    """Seed of the draw of held-out rows; `train.seed` does not change them."""

    streaming: bool = False
    """Read the train rows as they come, for data larger than the disk. Needs `train.max_steps`."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read: stop, or skip and count it."""

    check: CheckSpec = Field(default_factory=CheckSpec)
    """What is looked for in the rows before a model is loaded."""

    cache_limit: Size = "16GB"
    """How much of the disk a run may take for what the frozen parts of a model compute of each
    example, once: an encoder's features, an autoencoder's latents, and the hidden states that enter
    the first trained layer, where all below it is frozen. A split that takes more is computed again
    in every step, and that is printed. `0B` keeps nothing. The folder is that of the encoded rows,
    `HF_DATASETS_CACHE`."""

    @property
    def cache_bytes(self) -> int:
        """`cache_limit` in bytes."""
        return bytes_of(self.cache_limit)

    @property
    def sources(self) -> list[SourceSpec]:
        """The sets that are mixed, or the section itself."""
        return list(self.mix.values()) or [self]

    @property
    def number_forms(self) -> list[tuple[str, str | None]]:
        """The decimal marks and thousands separators of the sources, each pair once."""
        forms = [(source.format.decimal, source.format.thousands) for source in self.sources]
        return list(dict.fromkeys(forms))

    def has(self, split: str) -> bool:
        """Return whether there are rows of a split."""
        return any(getattr(source, split) is not None for source in self.sources)

    def of_set(self, name: str) -> DataSpec:
        """Return the section that a set would have alone."""
        chosen = {key: getattr(self.mix[name], key) for key in SourceSpec.model_fields}
        return self.with_values({**chosen, "mix": {}})

    def set_of_metric(self, metric: str) -> tuple[str | None, str]:
        """Return the set and the metric of `math/loss`; None for a metric of all rows."""
        name, slash, rest = metric.partition("/")
        return (name, rest) if slash and name in self.mix else (None, metric)

    def conflicts(self) -> Conflicts:
        """Yield what keeps the rows from having exactly one source, and what cannot be streamed."""
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
                what = f"`{key}` is of one data set, and `mix` names several"
                yield key, what, f"write it into a set: `mix: {{NAME: {{{key}: …}}}}`"
        if self.streaming:
            what = "the sets of `mix` are drawn from by position, so they cannot be streamed"
            yield "streaming", what, "leave `streaming` out"
        for name in self.mix:
            if not SET_NAME.fullmatch(name):
                what = f"`{name}` is no name of a set, which stands before its metrics"
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
    """Return whether a split is given as a file: it has a folder, a known suffix, or a pattern.

    `train.{en,de}.gz` stands for two files.
    """
    if not isinstance(split, str):
        return False
    name = re.sub(r"\[[^\[\]/]*\]$", "", split).lower()
    name = re.sub(r"\?[\w.-]+=.*", "", name).removesuffix(".gz")  # of an address; rejected later
    is_pair = re.search(r"\{[^{},]+(,[^{},]+)+\}", name) is not None
    return "/" in name or is_pair or name.endswith(DATA_SUFFIXES)
