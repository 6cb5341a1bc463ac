"""`task` for `type: token_classification`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Positive, Word
from lora_cli.recipe.spec.task_section import AnswerKind, TaskSection, Usage, UsualTraining

TAGGING = """\
text = "Some text"  # its words are between spaces
inputs = tokenizer(
    text, truncation=True, max_length={length}, return_offsets_mapping=True, return_tensors="pt"
)
places = inputs.pop("offset_mapping")[0].tolist()
with torch.no_grad():
    scores = model(**inputs).logits[0]
for (start, end), tag in zip(places, scores.argmax(-1).tolist(), strict=True):
    piece = text[start:end]
    if {condition}:
        print(piece.strip(), model.config.id2label[tag])"""
ANY_PIECE = "piece.strip()"
FIRST_PIECE = 'piece.strip() and (start == 0 or " " in (text[start - 1], piece[0]))'


class TokenClassificationSpec(TaskSection):
    """Find entities: words or places of a text that have a type, such as persons."""

    peft_task_type = "TOKEN_CLS"
    pipeline_tag = "token-classification"
    suitable_models = (
        "take a model that transformers can make a tagger of, such as BERT, RoBERTa or Llama"
    )
    baselines = frozenset({"base", "none"})
    # most words are outside: at the usual rate, all were called so
    usual_training = UsualTraining(rate_scale=0.5)
    packing_hint = "leave it out; `train.group_by_length: true` saves padding here"

    type: Literal["token_classification"]
    """Which task."""

    tokens_column: Word = "tokens"
    """Column of the words: a list in every row. Files in the form of CoNLL have it."""

    tags_column: Word = "tags"
    """Column of the tags: a list of names, such as `B-PER`, or of numbers, one for each word."""

    scheme: Literal["auto", "iob1", "iob2", "io", "iobes"] = "auto"
    """How the tags mark where an entity begins. `iob2`: B at each beginning; `iob1`: B only after
    an entity of the same type; `io`: not at all; `iobes`: with E and S for the last and the only
    word (BILOU's L and U). `auto` takes the one that the tags of the train split show. Whatever the
    scheme, the model learns IOB2."""

    text_column: Word | None = None
    """Column of the text, where entities are places in a text and not tags of words."""

    spans_column: Word | None = None
    """Column of the entities of `text_column`: a list of `{start, end, label}`, in characters; also
    as Doccano, Label Studio (JSON-MIN) and Prodigy export them."""

    labels: Annotated[list[str], Field(min_length=3)] | None = None
    """The tags in the order of the model's outputs, in IOB2: `[O, B-PER, I-PER]`. Default: of the
    types found in the train split, sorted."""

    tag_names: Annotated[list[Word], Field(min_length=2)] | None = None
    """Names of the tags, where the data has their numbers: number 0 is the first name. Default: as
    the data set on the Hub names them, else `labels`."""

    word_separator: str = " "
    """What stands between two words of `tokens_column` in the text that the model reads; `""` for
    scripts without spaces."""

    max_length: Positive = 512
    """Longest input in tokens; a longer row is divided into windows that overlap, and each word is
    predicted in the one where most text stands around it. Never more than the model can take."""

    split_special_tokens: bool = False
    """Read a control token that is spelled out in a text, such as `</s>` or `[SEP]`, as its letters
    and not as the token."""

    def conflicts(self) -> Conflicts:
        """Yield keys of words next to keys of spans, and labels that are not IOB2."""
        if (self.text_column is None) != (self.spans_column is None):
            missing = "text_column" if self.text_column is None else "spans_column"
            what = "`text_column` and `spans_column` go together"
            yield missing, what, f"name `{missing}` too, or use `tokens_column` and `tags_column`"
        if self.has_spans:
            set_ = self.model_fields_set
            for key in ("tokens_column", "tags_column", "tag_names", "word_separator"):
                if key in set_ and getattr(self, key) != type(self).model_fields[key].default:
                    what = f"`{key}` is for rows of words, and `spans_column` for texts"
                    yield key, what, "leave one of the two out"
            if self.scheme not in ("auto", "iob2"):
                what = "`scheme` is for rows of words, and `spans_column` for texts"
                yield "scheme", what, "leave it out"
        yield from self._label_conflicts()

    def _label_conflicts(self) -> Conflicts:
        if self.labels is None:
            return
        for label, times in Counter(self.labels).items():
            if times > 1:
                what = f"the label `{label}` appears {times} times in `labels`"
                yield "labels", what, "list each label once, in the order of the model's outputs"
                return
        types = list(dict.fromkeys(x[2:] if x[1:2] == "-" else x for x in self.labels if x != "O"))
        wanted = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        if sorted(self.labels) != sorted(wanted):
            shown = ", ".join(wanted[:7]) + (", …" if len(wanted) > 7 else "")
            what = "`labels` are not O and, for each type, a tag with B- and one with I-"
            hint = f"`labels: [{shown}]`; how the data writes its tags is `scheme`, and what its "
            yield "labels", what, f"{hint}numbers stand for is `tag_names`"

    @property
    def has_spans(self) -> bool:
        """Whether a row is a text with places, and not words with tags."""
        return self.text_column is not None and self.spans_column is not None

    @property
    def answer_kind(self) -> AnswerKind:
        """Places in a text, with their types."""
        return "spans"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the words, or of the text."""
        if self.text_column is not None:
            return {"task.text_column": self.text_column}
        return {"task.tokens_column": self.tokens_column}

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how the tags of a text are printed."""
        if not labels:
            return None
        condition = ANY_PIECE if self.has_spans else FIRST_PIECE
        code = TAGGING.format(length=self.max_length, condition=condition)
        head = ", num_labels=len(labels), id2label=dict(enumerate(labels))"
        return Usage("AutoModelForTokenClassification", code, "import torch\n", head=head)
