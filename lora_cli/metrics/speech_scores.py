"""Speech synthesis metrics: spectrogram error, accuracy of the stop decision, length error."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFINITIONS = {
    "mel_l1": (
        "mean absolute error of the log-mel spectrogram (log10), where each step of the model "
        "reads the recorded frames before it; 0 is best"
    ),
    "stop_accuracy": (
        "mean of two shares: of the recordings' last steps at which the model stops, and of the "
        "other steps at which it continues; 0.5 if it never stops, 1 is best"
    ),
    "length_error": (
        "mean relative difference between the duration of generated speech and that of the "
        "recording; 0 is best"
    ),
}


def mel_error(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
) -> float:
    """Return the mean absolute error of spectrograms.

    Args:
        predictions: For each row: the sum of absolute errors, the last steps at which the model
            stops, and the other steps at which it continues.
        references: For each row: the spectrogram's number of values, of last steps, and of other
            steps.
    """
    return _share(predictions, references, 0)


def stop_accuracy(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
) -> float:
    """Return the balanced accuracy of the stop decision, from rows as in `mel_error`.

    If no row has more than its last step, return the accuracy over last steps.
    """
    ends, goes_on = (_share(predictions, references, i) for i in (1, 2))
    return ends if math.isnan(goes_on) else (ends + goes_on) / 2


def length_error(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean relative difference of the generated lengths from the recorded ones."""
    errors = [abs(p / r - 1) for p, r in zip(predictions, references, strict=True)]
    return sum(errors) / len(errors)


def _share(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]], i: int
) -> float:
    total = math.fsum(row[i] for row in references)
    return math.fsum(row[i] for row in predictions) / total if total else math.nan
