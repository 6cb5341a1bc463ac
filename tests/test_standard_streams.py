from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.cli import app as cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **streams: str | None) -> object:
    """Run a command with streams that are files, or closed, and return its exit code."""
    opened = [open(name, "w") for name in streams.values() if name]  # noqa: SIM115
    files = iter(opened)
    for name, file in streams.items():
        monkeypatch.setattr(sys, name, next(files) if file else None)
    monkeypatch.setattr(sys, "argv", ["lora", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    monkeypatch.undo()
    for file in opened:
        with contextlib.suppress(OSError):  # what /dev/full never took
            file.close()
    return left.value.code


def test_a_full_disk_is_an_error_for_stdout_but_not_for_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert run(monkeypatch, "--version", stdout="/dev/full", stderr=str(log)) == 5
    assert log.read_text().startswith("error: the output cannot be printed: no space left")
    assert "--resume" not in log.read_text()
    assert run(monkeypatch, "validate", "no-such-recipe.yaml", stderr="/dev/full") == 2
    assert run(monkeypatch, "--version", stderr="/dev/full") == 0


def test_closed_streams_are_replaced_by_dev_null(tmp_path: Path) -> None:
    """Otherwise the next file that is opened would get the number of stdout, and its output."""
    code = (
        "import os, sys\nfrom lora_cli.cli.standard_streams import prepare_streams\n"
        "prepare_streams()\n"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2, file.fileno()\n"
        "print('lost'); os.write(1, b'lost too'); sys.stderr.write('lost'); print(sys.stdin.read())"
    )
    file = tmp_path / "file"
    line = f'"{sys.executable}" -c "$0" "$1" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line, code, str(file)], check=False)
    assert done.returncode == 0
    assert file.read_text() == ""


@pytest.mark.slow
def test_a_command_prints_nothing_into_closed_streams() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for streams in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        line = f'"{sys.executable}" -m lora_cli --version {streams}'
        done = subprocess.run(
            ["bash", "-c", line], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, streams
        assert not done.stderr
        assert bool(done.stdout) == (">&-" not in streams or streams == "2>&-")
