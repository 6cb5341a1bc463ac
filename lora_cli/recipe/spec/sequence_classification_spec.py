"""`task` for `type: sequence_classification`."""

from __future__ import annotations

from typing import Any, Literal

from lora_cli.recipe.spec.classification_section import ANSWERS, ClassificationSection, head_of
from lora_cli.recipe.spec.section import Positive, Word
from lora_cli.recipe.spec.task_section import Truncation, Usage

CLASSIFYING = """\
inputs = tokenizer({texts}, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits[0]
print({answer})"""


class SequenceClassificationSpec(ClassificationSection):
    """Classify texts, or pairs of texts."""

    peft_task_type = "SEQ_CLS"
    pipeline_tag = "text-classification"
    suitable_models = (
        "use a model for which transformers has a classifier, such as BERT, RoBERTa or Llama"
    )
    packing_hint = "leave it out; `train.group_by_length: true` saves padding here"
    can_distill = True

    type: Literal["sequence_classification"]
    """The type of task."""

    text_column: Word = "text"
    """Column of the text."""

    text_pair_column: Word | None = None
    """Column of the second text, to classify pairs."""

    max_length: Positive = 512
    """Maximum length of an input in tokens. It never exceeds what the model supports."""

    truncate: Truncation = "right"
    """What happens to a longer text: its end (`right`) or its beginning (`left`) is cut off, its
    row is left out (`drop`), or it is an error (`error`)."""

    split_special_tokens: bool = False
    """Whether a control token that is spelled out in a text, such as `</s>` or `[SEP]`, is read as
    ordinary characters instead of the token."""

    pad_token: Word | None = None
    """The padding token, if the tokenizer does not have one."""

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The columns of the text, and of the second text."""
        pair = {"task.text_pair_column": self.text_pair_column} if self.text_pair_column else {}
        return {"task.text_column": self.text_column, **pair}

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how to classify a text with the model."""
        if self.problem != "regression" and not labels:
            return None
        texts = '"Some text", "Another text"' if self.text_pair_column else '"Some text"'
        code = CLASSIFYING.format(texts=texts, length=self.max_length, answer=ANSWERS[self.problem])
        setup = f"tokenizer.pad_token = {self.pad_token!r}\n" if self.pad_token else ""
        return Usage(
            "AutoModelForSequenceClassification", code, "import torch\n", setup, head_of(labels)
        )
