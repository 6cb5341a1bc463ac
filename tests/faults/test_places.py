"""Places that are full, forbidden or gone, and workers that die: each is named, with a way on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError, ResourceError
from lora_cli.files import verify_manifest, write_manifest
from lora_cli.models.load_errors import place_error
from lora_cli.recipe import Learned, Recipe, load_recipe
from lora_cli.training import train
from lora_cli.training.batches import require_shared_memory
from lora_cli.training.checkpoints import load_checkpoint
from lora_cli.training.resource_errors import resource_error
from lora_cli.training.step import train_step

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def somebody() -> Iterator[None]:
    """Be a user who may not read everything, which root may."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step-000002", "state", "manifest"])
def test_checkpoints_that_may_not_be_read_are_not_called_damaged(
    what: str, open_folder: Path
) -> None:
    """ "Start again in another folder" would discard good checkpoints."""
    step = open_folder / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json"):
        (step / name).write_text("{}")
    write_manifest(step)
    names = {"state": step / "trainer.json", "manifest": step / "manifest.json"}
    path = names.get(what, open_folder / what)
    path.chmod(0)
    try:
        with somebody(), pytest.raises(ResourceError, match="permission denied") as found:
            load_checkpoint(open_folder)
    finally:
        path.chmod(0o755)
    assert "another folder" not in str(found.value)
    assert f"hint: let it be read: `chmod -R u+rwX {path}`" in str(found.value)
    assert verify_manifest(step)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = load_recipe(tiny.recipe("base", tmp_path))
    recipe.output_path.mkdir()
    return recipe


class Deadly:
    """Examples of which the second kills the worker that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i


def test_a_worker_that_is_killed_is_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch asks every five seconds whether its workers live
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    with pytest.raises(RuntimeError) as caught:
        list(DataLoader(Deadly(), num_workers=1, batch_size=1))  # type: ignore[arg-type]
    found = resource_error(caught.value, recipe, Learned(), "training")
    assert found is not None
    assert "a worker that prepares batches was killed while training" in str(found)
    assert "--set train.workers=0" in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0.\n…\nRuntimeError: unable to write to "
        "file </torch_12_34>: No space left on device (28)",
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_shared_memory_that_is_full_is_named(text: str, recipe: Recipe) -> None:
    """ "Make room, then go on with --resume" would end in the same way again."""
    found = resource_error(RuntimeError(text), recipe, Learned(), "training")
    assert found is not None
    assert "at /dev/shm" in str(found)
    assert "--set train.workers=0" in str(found)


def test_an_output_folder_that_was_removed_is_named(recipe: Recipe) -> None:
    def error() -> OSError:
        try:
            (recipe.output_path / ".publish.tmp" / "adapter_config.json").write_text("{}")
        except OSError as error:
            return error
        raise AssertionError("there was such a folder")

    found = resource_error(error(), recipe, Learned(), "saving")
    assert found is not None
    assert ".publish.tmp" in str(found)
    recipe.output_path.rmdir()
    found = resource_error(error(), recipe, Learned(), "saving")
    assert found is not None
    assert f"`{recipe.output_path}` was removed while saving" in str(found)
    other = FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere/base")
    recipe.output_path.mkdir()
    assert resource_error(other, recipe, Learned(), "saving") is None


@pytest.mark.parametrize("gone", ["out", "out/recipe.yaml"])
def test_an_output_folder_that_is_removed_while_training_is_not_made_again(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(base, tmp_path, checkpoint={"every_steps": 1}, train={"max_steps": 3})

    def removing(*arguments: Any) -> Any:
        if (tmp_path / "out" / "checkpoints" / "step-000001").is_dir():
            target = tmp_path / gone
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        return train_step(*arguments)

    monkeypatch.setattr("lora_cli.training.run.train_step", removing)
    with pytest.raises(ResourceError, match=f"{gone}` was removed while"):
        train(load_recipe(path))
    assert (tmp_path / "out").is_dir() == (gone != "out")


def test_shared_memory_that_is_full_before_workers_start_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def Semaphore(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    require_shared_memory(2)
    monkeypatch.setattr("multiprocessing.get_context", Full)
    require_shared_memory(0)
    with pytest.raises(OSError, match="/dev/shm") as caught:
        require_shared_memory(2)
    found = resource_error(caught.value, recipe, Learned(), "training")
    assert "the shared memory, through which workers hand over batches, is full" in str(found)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_cache_of_models_that_cannot_be_used_is_named(number: int) -> None:
    inner = OSError(number, os.strerror(number), "/cache/hub/models--a")
    outer = OSError("We couldn't connect to the Hub")
    outer.__cause__ = inner
    found = place_error(outer)
    assert found is not None
    assert os.strerror(number).lower() in str(found)
    assert "/cache/hub/models--a" in str(found)
    assert "HF_HOME=DIR" in str(found)
    assert place_error(OSError("no answer")) is None


@pytest.mark.parametrize("command", [["validate"], ["validate", "--data"], ["train"]])
def test_a_cache_that_cannot_be_written_to_is_a_resource(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    recipe = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)
    result = CliRunner().invoke(app, [command[0], str(recipe), *command[1:]])
    assert isinstance(result.exception, ResourceError)
    assert "the cache of data sets cannot be written to" in str(result.exception)


def test_it_is_none_if_the_recipe_is_wrong_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    adapter = {"target_modules": ["qery"]}
    recipe = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path, adapter=adapter)
    result = CliRunner().invoke(app, ["validate", str(recipe)])
    assert type(result.exception) is LoraError
    assert len(result.exception.problems) == 2
