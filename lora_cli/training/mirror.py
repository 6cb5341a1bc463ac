"""Mirror a run to another disk or an object store, for machines that may be taken away.

The mirror has a folder for each checkpoint, with everything another machine needs to continue:

    MIRROR/run.json                    the recipe of the run, and the hashes of its rows
    MIRROR/step-000500/checkpoint/…    the checkpoint, as in the output folder
                       published/…     the best adapter so far
                       logs/…          metrics and samples up to this step
                       recipe.yaml
                       manifest.json   size and SHA-256 of each file, written last
    MIRROR/final/output/…              the output folder of the complete run, likewise

A folder without a manifest, or that does not match it, was being written when the machine was taken
away, and is skipped. A mirror belongs to one run: other runs neither read nor write it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from rich.console import Console

from lora_cli.errors import IntegrityError, LoraError, Problem, ResourceError
from lora_cli.files import MANIFEST, sha256_of, verify_manifest
from lora_cli.format_version import FORMAT
from lora_cli.recipe import Recipe
from lora_cli.training.checkpoints import FOLDER, checkpoint_folder, checkpoints
from lora_cli.training.output_folder import locked_output
from lora_cli.training.train_state import TrainState, reject_changes

FINAL, RUN = "final", "run.json"
OTHER_MIRROR = "name another with `--set checkpoint.mirror=…`"
MAX_TRIES = 3
PAUSE_S = 2.0


class Mirror:
    """Folders at an address that fsspec supports; each is complete or ignored.

    Args:
        recipe: `checkpoint.mirror` is the address.

    Raises:
        LoraError: If the address is invalid, or a package for it is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.url, self.at = str(recipe.checkpoint.mirror), recipe.at("checkpoint.mirror")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise LoraError(str(error), self.at, "install it, or name a folder") from error
        except Exception as error:  # each kind of store has its own exceptions
            hint = "name a folder, or an address such as `s3://bucket/folder`"
            what = f"`{self.url}` cannot be used as a mirror: {error}"
            raise LoraError(what, self.at, hint) from error

    def check(self) -> None:
        """Check that the mirror can be written, before a run relies on it."""
        self.put("check", {})
        self.remove("check")

    def put(self, name: str, files: dict[str, Path]) -> None:
        """Copy files into a folder of the mirror, the manifest last.

        Args:
            name: The folder, `step-000500` or `final`; it is replaced if it exists.
            files: The local files, by their names in the mirror.

        Raises:
            ResourceError: If all attempts fail.
        """
        facts = {
            remote_name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for remote_name, file in files.items()
        }
        manifest = json.dumps({"format": FORMAT, "files": facts}, indent=2).encode()
        for attempt in range(1, MAX_TRIES + 1):
            try:
                if self._manifest(name) == manifest:
                    return  # already mirrored
                self.remove(name)
                for remote_name, file in files.items():
                    target = self._prepare_path(f"{name}/{remote_name}")
                    self.files.put_file(str(file), target)
                self.files.pipe_file(self._prepare_path(f"{name}/{MANIFEST}"), manifest)
                return
            except Exception as error:  # each kind of store has its own exceptions
                if attempt == MAX_TRIES:
                    what = f"cannot write to {self.url}: {error}"
                    raise ResourceError(what, self.at, "fix that, then use `--resume`") from error
                time.sleep(PAUSE_S * attempt)

    def _manifest(self, name: str) -> bytes | None:
        return self._read(f"{name}/{MANIFEST}")

    def _read(self, name: str) -> bytes | None:
        path = f"{self.root}/{name}"
        return bytes(self.files.cat_file(path)) if self.files.exists(path) else None

    def owner(self) -> TrainState | None:
        """Return the recipe and the rows of the mirrored run; None if the mirror is empty.

        Raises:
            IntegrityError: If the mirror contains a run, but not its recipe.
        """
        content = self._read(RUN)
        if content is None and not any(self._manifest(name) for name in self.names()):
            return None
        try:
            facts = json.loads(content or b"")
            return TrainState(recipe=dict(facts["recipe"]), data=dict(facts["data"]))
        except (ValueError, TypeError, KeyError) as error:
            what = f"{self.url} holds a run, and its {RUN} does not say of which recipe"
            raise IntegrityError(what, self.at, OTHER_MIRROR) from error

    def compare(self, recipe: Recipe, now: TrainState | None = None) -> list[str]:
        """Reject the mirror of another run.

        Args:
            recipe: The recipe of this run.
            now: The rows of this run; None before they are read.

        Returns:
            The allowed changes since then.

        Raises:
            LoraError: With the differences.
        """
        owner = self.owner()
        if owner is None:
            return []
        try:
            return reject_changes(owner, recipe, now)
        except LoraError as error:
            first = Problem(f"{self.url} is the mirror of another run", self.at)
            *others, last = error.problems
            hint = OTHER_MIRROR + (f"; or {last.hint}" if last.hint else "")
            raise LoraError([first, *others, Problem(last.what, last.at, hint)]) from error

    def claim(self, recipe: Recipe, state: TrainState) -> None:
        """Mark the mirror as belonging to this run, and remove an earlier result.

        Raises:
            LoraError: If it belongs to another run.
        """
        self.compare(recipe, state)
        facts = json.dumps({"recipe": state.recipe, "data": state.data}, indent=2).encode()
        if self._read(RUN) != facts:
            self.files.pipe_file(self._prepare_path(RUN), facts)
        self.remove(FINAL)  # from before the run was given more steps

    def _prepare_path(self, path: str) -> str:
        """Return the full path of a file in the mirror, and create its folder."""
        target = f"{self.root}/{path}"
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        return target

    def names(self) -> list[str]:
        """Return the folders of the mirror, the best one to continue from first."""
        self.files.invalidate_cache()
        if not self.files.exists(self.root):
            return []
        folders = [str(path).rpartition("/")[2] for path in self.files.ls(self.root, detail=False)]
        steps = sorted((name for name in folders if step_of(name)), key=step_of, reverse=True)
        return [name for name in folders if name == FINAL] + steps

    def get(self, name: str, target: Path) -> None:
        """Copy a folder of the mirror to a local folder, and verify it.

        Raises:
            IntegrityError: If it is not complete.
        """
        source = f"{self.root}/{name}"
        if self._manifest(name) is None:
            raise IntegrityError("it was being written when its machine disappeared", source)
        target.mkdir(parents=True)
        for path in self.files.find(source):
            local_file = target / str(path)[len(source) + 1 :]
            if not local_file.resolve().is_relative_to(target.resolve()):
                raise IntegrityError(f"`{path}` lies outside its folder", source)
            local_file.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(str(path), str(local_file))
        verify_manifest(target)

    def remove(self, name: str) -> None:
        """Remove a folder of the mirror, its manifest first, so that a rest of it is not used."""
        source = f"{self.root}/{name}"
        if self.files.exists(f"{source}/{MANIFEST}"):
            self.files.rm_file(f"{source}/{MANIFEST}")
        if self.files.exists(source):
            self.files.rm(source, recursive=True)


def step_of(name: str) -> int:
    """Return the step in the name of a folder, 0 for other names."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else 0


def mirror_checkpoint(recipe: Recipe, step: int, sizes: dict[str, int]) -> None:
    """Copy a checkpoint, its logs and the best adapter to the mirror, then remove old ones there.

    Args:
        recipe: The `checkpoint` section has the address, and how many checkpoints to keep.
        step: The step of the checkpoint.
        sizes: The sizes of the log files in the output folder, by name.
    """
    output, mirror = recipe.output_path, Mirror(recipe)
    checkpoint = checkpoint_folder(output, step)
    files = {f"logs/{log}": output / log for log in sizes}
    files["recipe.yaml"] = output / "recipe.yaml"
    files |= _inside(checkpoint, "checkpoint")
    if (output / MANIFEST).exists():
        published = json.loads((output / MANIFEST).read_text(encoding="utf-8"))["files"]
        files |= {f"published/{file}": output / file for file in (*published, MANIFEST)}
    mirror.put(checkpoint.name, files)
    for old in [name for name in mirror.names() if step_of(name)][recipe.checkpoint.keep :]:
        mirror.remove(old)


def mirror_result(recipe: Recipe) -> None:
    """Copy the output folder of a complete run to its mirror, without checkpoints.

    Nothing happens if the recipe has no mirror.

    Raises:
        LoraError: If the mirror belongs to another run.
        ResourceError: If the mirror cannot be written.
    """
    if recipe.checkpoint.mirror is None:
        return
    mirror, excluded = Mirror(recipe), (f"output/{FOLDER}/", "output/.")
    with _reaching(mirror):
        mirror.compare(recipe)
    files = _inside(recipe.output_path, "output")
    mirror.put(FINAL, {k: v for k, v in files.items() if not k.startswith(excluded)})


def _inside(folder: Path, prefix: str) -> dict[str, Path]:
    """Return the files of a folder by their relative names, with a prefix."""
    return {
        f"{prefix}/{file.relative_to(folder).as_posix()}": file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def open_mirror(recipe: Recipe, resume: bool) -> None:
    """Restore the output folder from the mirror, if the mirror is ahead of it.

    The checkpoint is restored last and atomically: if restoring is interrupted, it starts over.

    Args:
        recipe: Names the mirror and the output folder.
        resume: Whether the run is resumed; a new run needs an empty mirror.

    Raises:
        LoraError: If the mirror belongs to another run.
        ResourceError: If the mirror cannot be read.
    """
    if recipe.checkpoint.mirror is None:
        return
    mirror, output = Mirror(recipe), recipe.output_path
    with _reaching(mirror):
        if not resume and mirror.owner() is not None:
            what = f"{mirror.url} holds a run already, and a mirror belongs to one"
            raise LoraError(
                what, mirror.at, f"go on with that run with `--resume`, or {OTHER_MIRROR}"
            )
        if not resume or (output / "report.json").exists():
            return
        changed = bool(mirror.compare(recipe))
        with locked_output(recipe, resume=True):
            _restore(mirror, output, changed)


@contextmanager
def _reaching(mirror: Mirror) -> Iterator[None]:
    """Convert errors within the context to an error that names the mirror."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:  # each kind of store has its own exceptions
        what = f"cannot read from {mirror.url}: {error}"
        hint = "is it the right address, and can it be reached? Without it: "
        hint += "`--set checkpoint.mirror=null`"
        raise ResourceError(what, mirror.at, hint) from error


def _restore(mirror: Mirror, output: Path, changed: bool) -> None:
    """Restore the best folder of the mirror; the final result only if the recipe is unchanged."""
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    last_step = max((step for step, _ in checkpoints(output)), default=0)
    staging = output / ".mirror.tmp"
    for name in mirror.names():
        if name == FINAL and changed:
            continue
        if name != FINAL and step_of(name) <= last_step:
            return
        shutil.rmtree(staging, ignore_errors=True)
        try:
            mirror.get(name, staging)
        except IntegrityError as error:
            say(f"warning: {name} in {mirror.url} is skipped: {error.problems[0].what}")
            continue
        (_take_result if name == FINAL else _take_checkpoint)(staging, output, name)
        say(f"restored {name} from {mirror.url}")
        return


def _take_result(staging: Path, output: Path, _: str) -> None:
    files = [file for file in (staging / "output").rglob("*") if file.is_file()]
    # report.json last, as it marks the run as complete
    for file in sorted(files, key=lambda file: file.name == "report.json"):
        _move(file, output / file.relative_to(staging / "output"))
    shutil.rmtree(staging)


def _take_checkpoint(staging: Path, output: Path, name: str) -> None:
    _move(staging / "recipe.yaml", output / "recipe.yaml")
    for folder in ("logs", "published"):
        for file in (staging / folder).glob("*"):
            _move(file, output / file.name)
    (output / FOLDER).mkdir(exist_ok=True)
    shutil.rmtree(output / FOLDER / name, ignore_errors=True)
    (staging / "checkpoint").rename(output / FOLDER / name)
    shutil.rmtree(staging)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
