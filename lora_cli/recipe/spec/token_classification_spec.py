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
    """Find entities: words or spans of a text that have a type, such as persons."""

    peft_task_type = "TOKEN_CLS"
    pipeline_tag = "token-classification"
    suitable_models = (
        "use a model for which transformers has a tagger, such as BERT, RoBERTa or Llama"
    )
    baselines = frozenset({"base", "none"})
    # most words are outside entities: at the usual rate, the model tagged all words as outside
    usual_training = UsualTraining(rate_scale=0.5)
    packing_hint = "leave it out; `train.group_by_length: true` saves padding here"

    type: Literal["token_classification"]
    """The type of task."""

    tokens_column: Word = "tokens"
    """Column of the words: a list in every row. Files in CoNLL format have it."""

    tags_column: Word = "tags"
    """Column of the tags: a list of names, such as `B-PER`, or numbers, one for each word."""

    scheme: Literal["auto", "iob1", "iob2", "io", "iobes"] = "auto"
    """How the tags mark the beginning of an entity. `iob2`: B at each beginning; `iob1`: B only
    after another entity of the same type; `io`: not marked; `iobes`: as in `iob2`, with E for the
    last word and S for a single word (L and U in BILOU). `auto` detects it from the tags of the
    train split. The model always learns IOB2."""

    text_column: Word | None = None
    """Column of the text, if entities are spans of a text instead of tags of words."""

    spans_column: Word | None = None
    """Column of the entities in `text_column`: a list of `{start, end, label}`, in characters.
    Exports of Doccano, Label Studio (JSON-MIN) and Prodigy are read too."""

    labels: Annotated[list[str], Field(min_length=3)] | None = None
    """The tags in the order of the model's outputs, in IOB2: `[O, B-PER, I-PER]`. Default: made
    from the types found in the train split, sorted."""

    tag_names: Annotated[list[Word], Field(min_length=2)] | None = None
    """Names of the tags, if the data contains their numbers: the first name is number 0. Default:
    the names in the data set on the Hub, or `labels`."""

    word_separator: str = " "
    """Text between two words of `tokens_column` in the model's input; `""` for scripts without
    spaces."""

    max_length: Positive = 512
    """Maximum length of an input in tokens. A longer row is divided into overlapping windows, and
    each word is predicted in the window that has the most context around it. It never exceeds what
    the model supports."""

    split_special_tokens: bool = False
    """Whether a control token that is spelled out in a text, such as `</s>` or `[SEP]`, is read as
    ordinary characters instead of the token."""

    def conflicts(self) -> Conflicts:
        """Yield keys for words together with keys for spans, and labels that are not IOB2."""
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
            what = "`labels` must be O and, for each type, one tag with B- and one with I-"
            hint = f"`labels: [{shown}]`; use `scheme` for how the data writes its tags, and "
            yield "labels", what, f"{hint}`tag_names` if they are numbers"

    @property
    def has_spans(self) -> bool:
        """Whether a row is a text with spans, instead of words with tags."""
        return self.text_column is not None and self.spans_column is not None

    @property
    def answer_kind(self) -> AnswerKind:
        """Spans of a text, with their types."""
        return "spans"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the words, or of the text."""
        if self.text_column is not None:
            return {"task.text_column": self.text_column}
        return {"task.tokens_column": self.tokens_column}

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how to print the tags of a text with the model."""
        if not labels:
            return None
        condition = ANY_PIECE if self.has_spans else FIRST_PIECE
        code = TAGGING.format(length=self.max_length, condition=condition)
        head = ", num_labels=len(labels), id2label=dict(enumerate(labels))"
        return Usage("AutoModelForTokenClassification", code, "import torch\n", head=head)
