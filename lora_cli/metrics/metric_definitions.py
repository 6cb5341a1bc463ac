"""One-line definitions of the metrics: which label or average, which scale, how words are counted.

They are shown next to the values: on the screen, in the reports and in the model card.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from lora_cli.errors import printable
from lora_cli.metrics.box_scores import DEFINITIONS as BOX_DEFINITIONS
from lora_cli.metrics.box_scores import PER_LABEL_DEFINITION, label_result_names
from lora_cli.metrics.builtin_metrics import SPECS, MetricContext
from lora_cli.metrics.entity_scores import DEFINITIONS as ENTITY_DEFINITIONS
from lora_cli.metrics.metric_names import is_script, result_names
from lora_cli.metrics.retrieval_scores import DEFINITIONS as RETRIEVAL_DEFINITIONS
from lora_cli.metrics.speech_scores import DEFINITIONS as SPEECH_DEFINITIONS
from lora_cli.metrics.word_tokenizers import BLEU_WORDS, ROUGE_WORDS

AVERAGES = {
    "macro": "the mean over {labels}, each counting the same",
    "micro": "counted over all rows and {labels} together",
    "weighted": "the mean over {labels}, weighted by their rows",
}
SCORES = {
    "f1": "harmonic mean of precision and recall",
    "precision": "share of the rows predicted as a label that have it",
    "recall": "share of the rows with a label that are predicted as it",
}
ROUGE = {
    "rouge1": "single words",
    "rouge2": "pairs of words",
    "rougeL": "the longest common subsequence of words",
    "rougeLsum": "the longest common subsequences of words, with each line as a sentence",
}
UNDEFINED = "-1 to 1; not defined for fewer than two rows, or where either side is constant"
VALUE_DEFINITIONS = {
    "pearson": f"correlation of answers and references, {UNDEFINED}",
    "spearman": f"correlation of the ranks of answers and references, {UNDEFINED}",
    "mse": "mean squared error, in the square of the label's unit",
    "rmse": "root of the mean squared error, in the label's unit",
    "mae": "mean absolute error, in the label's unit",
}


BLEU_SIGNATURE = "case:mixed|eff:yes|tok:13a|smooth:exp"
CHRF_SIGNATURE = "case:mixed|eff:yes|nc:6|nw:0|space:no"


def definition(metric: str, context: MetricContext) -> dict[str, str]:
    """Return a one-line definition for each value of a metric, by the value's name.

    Args:
        metric: The metric's name in the recipe.
        context: The task's labels and how it compares texts.
    """
    if metric not in SPECS:
        how = "the script" if is_script(metric) else "`evaluate`'s metric"
        return {Path(metric).stem: f"computed by {how} `{metric}`"}
    suffix = f"; texts are written by {context.normalizer}"
    compares_texts = SPECS[metric].channel == "text"
    if not (compares_texts and context.normalizer):
        suffix = ""
    if compares_texts and context.max_answers is not None:
        suffix += f"; of at most {context.max_answers:,} rows (`evaluate.generation.max_rows`)"
    lines = {name: _line(metric, name, context) + suffix for name in result_names(metric)}
    if metric == "coco":
        lines |= dict.fromkeys(label_result_names(context.labels), PER_LABEL_DEFINITION)
    return lines


def _line(metric: str, name: str, context: MetricContext) -> str:
    score, _, average = metric.partition("_")
    if score in SCORES:
        return f"{_average(average, context)} ({SCORES[score]}; 0 where nothing can be divided)"
    match metric:
        case "accuracy" if context.multi_label:
            return "share of rows of which every label is right (exact match)"
        case "accuracy":
            return "share of rows whose label is right"
        case "balanced_accuracy":
            return "mean recall of the labels that the references contain"
        case "matthews_correlation":
            return "-1 to 1; 0 where answers or references are all the same label"
        case "perplexity":
            return (
                "exp(mean loss per token of this model's tokenizer), so not comparable with others"
            )
        case "exact_match":
            of = "one of the references" if context.several_references else "the reference"
            if context.answer_pattern is not None:
                return (
                    f"share of answers whose last match of `{context.answer_pattern}` is that of "
                    f"{of}; numbers are compared by value, without their commas"
                )
            return (
                f"share of answers equal to {of}, but for spaces around it and Unicode's "
                "normal form"
            )
        case "no_answer":
            return f"share of answers in which `{context.answer_pattern}` finds nothing"
        case "bleu":
            return f"corpus BLEU, 0 to 100; {BLEU_WORDS}{_signature(BLEU_SIGNATURE, context)}"
        case "chrf":
            what = "corpus chrF2, 0 to 100: runs of up to 6 characters, recall counting twice"
            return f"{what}{_signature(CHRF_SIGNATURE, context)}"
        case "wer" | "cer":
            unit = "word" if metric == "wer" else "character"
            return (
                f"{unit} error rate: {unit}s that are substituted, deleted or inserted, over those "
                "of the references, of all rows together; 0 is best, and it can be more than 1"
            )
        case "seqeval":
            return ENTITY_DEFINITIONS[name]
        case "retrieval":
            return RETRIEVAL_DEFINITIONS[name]
        case "coco":
            return BOX_DEFINITIONS[name]
        case "mel_l1" | "stop_accuracy" | "length_error":
            return SPEECH_DEFINITIONS[metric]
        case "rouge":
            words = ROUGE_WORDS if name == "rouge1" else "words as for rouge1"
            best = ", with the most similar reference" if context.several_references else ""
            return f"F1 of {ROUGE[name]}{best}, mean over rows, 0 to 1; {words}"
    return VALUE_DEFINITIONS[metric]


def _signature(settings: str, context: MetricContext) -> str:
    """Return sacrebleu's signature of a metric, which tells whether two scores are comparable."""
    try:
        version = importlib.metadata.version("sacrebleu")
    except importlib.metadata.PackageNotFoundError:  # using the metric reports the missing package
        return ""
    references = "var" if context.several_references else "1"
    return f" (sacrebleu: nrefs:{references}|{settings}|version:{version})"


def _average(average: str, context: MetricContext) -> str:
    """Describe which labels a score covers, and how it is averaged over them."""
    if context.multi_label and context.n_labels == 1:
        return f"of the label {_label_name(context, 0)}"
    if context.n_labels == 2 and not context.multi_label and not average:
        return f"of the label {_label_name(context, 1)}, the second of two"
    average = average or "macro"
    labels = "the labels" if context.n_labels is None else f"the {context.n_labels} labels"
    if not context.multi_label:  # labels in neither answers nor references have no score
        labels = f"those of {labels} that occur"
    return f"{average} average, {AVERAGES[average].format(labels=labels)}"


def _label_name(context: MetricContext, position: int) -> str:
    if not context.labels:
        return f"at position {position}"
    return f"`{printable(context.labels[position]).replace('`', chr(39))}`"
