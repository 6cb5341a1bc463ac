"""The recipe: what a user writes, checked and typed, without importing torch."""

from lora_cli.recipe.computing_keys import (
    COMPUTATION_FILE,
    FORMAT,
    check_labels,
    computing_values,
    read_computation,
)
from lora_cli.recipe.load import RECIPE_FILE, dump_recipe, load_adapter_recipe, load_recipe
from lora_cli.recipe.schema_errors import recipe_schema
from lora_cli.recipe.spec import (
    TASKS,
    AdapterSpec,
    CausalLMSpec,
    CheckpointSpec,
    DataSpec,
    EvaluateSpec,
    FormatSpec,
    HeldOutSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    SchedulerSpec,
    SequenceClassificationSpec,
    SplitSpec,
    TaskSpec,
    TrainSpec,
)

__all__ = [
    "TASKS",
    "load_recipe",
    "load_adapter_recipe",
    "RECIPE_FILE",
    "COMPUTATION_FILE",
    "FORMAT",
    "check_labels",
    "computing_values",
    "read_computation",
    "dump_recipe",
    "recipe_schema",
    "Recipe",
    "ModelSpec",
    "TaskSpec",
    "SequenceClassificationSpec",
    "CausalLMSpec",
    "DataSpec",
    "SplitSpec",
    "HeldOutSpec",
    "FormatSpec",
    "AdapterSpec",
    "TrainSpec",
    "OptimizerSpec",
    "SchedulerSpec",
    "EvaluateSpec",
    "CheckpointSpec",
]
