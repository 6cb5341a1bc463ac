"""The readable results of a run: `report.json`, `report.html`, the learning curve, the model card.

All are generated from the report, the recipe and `metrics.jsonl` alone, so they can be generated
again at any time. Unknown values are left out.
"""

from lora_cli.reporting.html_page import write_page
from lora_cli.reporting.learning_curve_png import plot_learning_curve
from lora_cli.reporting.model_card import write_model_card
from lora_cli.reporting.report import read_metrics_log, results_table, write_report

__all__ = [
    "plot_learning_curve",
    "read_metrics_log",
    "results_table",
    "write_model_card",
    "write_page",
    "write_report",
]
