"""Built-in metrics, which need no network, and any metric that `evaluate` can load."""

from lora_cli.metrics.builtin_metrics import Channel, MetricContext, is_exact_match, lacks_answer
from lora_cli.metrics.final_answers import final_answer
from lora_cli.metrics.metric_definitions import definition
from lora_cli.metrics.metric_names import (
    LOSS,
    builtin_value,
    channel_of,
    check_metric_names,
    is_script,
    known_metrics,
    metric_mode,
    metric_of_result,
    result_names,
)
from lora_cli.metrics.metric_set import MetricSet

__all__ = [
    "LOSS",
    "Channel",
    "MetricContext",
    "MetricSet",
    "builtin_value",
    "check_metric_names",
    "definition",
    "final_answer",
    "is_exact_match",
    "is_script",
    "lacks_answer",
    "known_metrics",
    "metric_of_result",
    "metric_mode",
    "channel_of",
    "result_names",
]
