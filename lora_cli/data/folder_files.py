"""List the files in a folder that may be data, without the output of `lora` and model folders.

`cd flowers; lora init . …; lora train recipe.yaml` writes into the data folder.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from lora_cli.errors import LoraError

SCHEMA = "recipe.schema.json"  # written by `lora init` next to a recipe
MARKS = (  # files that identify the folder of a run, an adapter or a model
    {"recipe.yaml", "metrics.jsonl"},
    {"adapter_config.json"},
    {"model_index.json"},
    {"config.json", "model.safetensors"},
    {"config.json", "model.safetensors.index.json"},
)


def files_inside(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted, as relative paths.

    Raises:
        LoraError: If the folder contains a data set written by `save_to_disk`.
    """
    reject_saved(folder)
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names: dict[Path, set[str]] = defaultdict(set)
    for file in files:
        names[file.parent].add(file.name)
    output_folders = {
        subfolder
        for subfolder, own in names.items()
        if subfolder != Path() and any(marks <= own for marks in MARKS)
    }
    return [
        file
        for file in files
        if file.name != SCHEMA and not output_folders.intersection(file.parents)
    ]


def reject_saved(folder: Path) -> None:
    """Reject a folder written by `save_to_disk` of the library `datasets`.

    Raises:
        LoraError: If it is one; the hint is a command that converts it to parquet.
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
