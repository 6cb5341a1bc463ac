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
    """Classify a text, or a pair of texts."""

    peft_task_type = "SEQ_CLS"
    pipeline_tag = "text-classification"
    suitable_models = (
        "take a model that transformers can make a classifier of, such as BERT, RoBERTa or Llama"
    )
    packing_hint = "leave it out; `train.group_by_length: true` saves padding here"
    can_distill = True

    type: Literal["sequence_classification"]
    """Which task."""

    text_column: Word = "text"
    """Column of the text."""

    text_pair_column: Word | None = None
    """Column of the second text, for pairs."""

    max_length: Positive = 512
    """Longest input in tokens; longer texts are cut. Never more than the model can take."""

    truncate: Truncation = "right"
    """What happens to a longer text: it loses its end (`right`) or its beginning (`left`), its row
    is left out (`drop`), or it is an error (`error`)."""

    split_special_tokens: bool = False
    """Read a control token that is spelled out in a text, such as `</s>` or `[SEP]`, as its letters
    and not as the token."""

    pad_token: Word | None = None
    """The padding token, where the tokenizer has none of its own."""

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The columns of the text, and of the second text."""
        pair = {"task.text_pair_column": self.text_pair_column} if self.text_pair_column else {}
        return {"task.text_column": self.text_column, **pair}

    def usage(self, labels: list[str], settings: Any) -> Usage | None:
        """Return how a text is classified."""
        if self.problem != "regression" and not labels:
            return None
        texts = '"Some text", "Another text"' if self.text_pair_column else '"Some text"'
        code = CLASSIFYING.format(texts=texts, length=self.max_length, answer=ANSWERS[self.problem])
        setup = f"tokenizer.pad_token = {self.pad_token!r}\n" if self.pad_token else ""
        return Usage(
            "AutoModelForSequenceClassification", code, "import torch\n", setup, head_of(labels)
        )
