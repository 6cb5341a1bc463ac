"""Run a command as a user does, in this process: exit code, stdout and stderr."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass

import pytest

from lora_cli.cli import app as cli


@dataclass
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str


def lora(*arguments: object) -> Outcome:
    """Run `lora` with these arguments."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lora", *map(str, arguments)])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
    except SystemExit as left:
        code = left.code or 0
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.excepthook = hook
    assert isinstance(code, int), code
    return Outcome(code, out.getvalue(), err.getvalue())
