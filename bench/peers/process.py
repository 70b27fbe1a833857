"""A peer in an environment of its own: a process that stays alive and answers a line with a line.

Only the order to begin and the answer that all is done go through the pipes while it works, so a race may count its
time as if the work were done here.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import Missing


class Peer:
    """A process that reads a JSON value per line and answers with one; the first line says that it is ready."""

    def __init__(self, python: Path, script: Path, environment: Mapping[str, str] = {}) -> None:
        self.name = script.name
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment},
        )
        self.about = self.answer()

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Missing(f"{self.name} stopped; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """End it by closing what it reads."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
