"""Measurements that are done, in a file, so that an interrupted suite goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from linearize.files import write_text


class Kept:
    """What was measured, by name; without a path it is in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if path is not None and path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, name: str, kind: Any, measure: Callable[[], Any]) -> Any:
        """The measurement called `name`, a value of the type `kind`: as it was kept, or measured and kept."""
        adapter = TypeAdapter(kind)
        if name not in self.found:
            self.found[name] = adapter.dump_python(measure(), mode="json")
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.found))
        return adapter.validate_python(self.found[name])

    def forget(self) -> None:
        """Remove the file: what it is for has been written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
