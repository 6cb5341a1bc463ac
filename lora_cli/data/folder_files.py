"""The files in a folder that may be data: not those that this tool, or a model's folder, put there.

`cd flowers; lora init . …; lora train recipe.yaml` writes into the folder of the data.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from lora_cli.errors import LoraError

SCHEMA = "recipe.schema.json"  # that `lora init` writes next to a recipe
MARKS = (  # files by which a folder is one of a run, an adapter or a model
    {"recipe.yaml", "metrics.jsonl"},
    {"adapter_config.json"},
    {"model_index.json"},
    {"config.json", "model.safetensors"},
    {"config.json", "model.safetensors.index.json"},
)


def files_inside(folder: Path) -> list[Path]:
    """Return the files in a folder and below, relative to it and in order.

    Raises:
        LoraError: If the folder holds a data set as `save_to_disk` writes it.
    """
    reject_saved(folder)
    found = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names: dict[Path, set[str]] = defaultdict(set)
    for file in found:
        names[file.parent].add(file.name)
    written = {
        place for place, own in names.items() if place != Path() and any(m <= own for m in MARKS)
    }
    return [
        file for file in found if file.name != SCHEMA and not written.intersection(file.parents)
    ]


def reject_saved(folder: Path) -> None:
    """Reject a data set that the library `datasets` saved in its own form.

    Raises:
        LoraError: If it is one; its hint writes parquet files.
    """
    has_splits = (folder / "dataset_dict.json").is_file()
    if not has_splits and not ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
        return
    loaded = f"load_from_disk({str(folder)!r})"
    write = f"{loaded}.to_parquet('rows.parquet')"
    if has_splits:
        write = f"[d.to_parquet(f'{{name}}.parquet') for name, d in {loaded}.items()]"
    raise LoraError(
        "this is a data set as `save_to_disk` of the library datasets writes it",
        str(folder),
        f'write it as parquet: `python -c "from datasets import load_from_disk; {write}"`',
    )
