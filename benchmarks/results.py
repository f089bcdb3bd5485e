"""Raw results on disk: what was measured, on what, with what."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from linearize.evaluate import hardware
from linearize.files import write_text


def provenance() -> dict[str, Any]:
    """Commit, device and versions."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit or "unknown", "hardware": hardware(), "versions": versions}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write `results` as JSON that diffs well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")
