"""Code in a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def python(*code: str, **environment: str) -> str:
    """What lines of code print, `sys` being imported."""
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *code])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    return result.stdout.strip()
