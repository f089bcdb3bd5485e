"""Raw results on disk: what was measured, on what, with what."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from linearize.evaluate import hardware
from linearize.files import write_text
from linearize.measures import Interval, Suite
from linearize.results import Report
from linearize.results import read as read_report

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def provenance() -> dict[str, Any]:
    """Commit, device and versions."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit or "unknown", "hardware": hardware(), "versions": found}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write `results` as JSON that diffs well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")


def measured(name: str) -> dict[str, Any] | None:
    """The raw results called `name`; None where there are none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def made_on(data: dict[str, Any]) -> str:
    """Device, versions and commit of raw results."""
    return f"{data['hardware']}, {versions(data['versions'])}, commit {data['commit']}"


def report_made_on(report: Report) -> str:
    """Device and versions of a run, and how much was measured."""
    return f"{report.hardware}, {versions(report.versions)}; {report.eval_tokens:,} held-out tokens."


def versions(of: dict[str, str]) -> str:
    """Those that a reader asks for."""
    return ", ".join(f"{name} {of[name]}" for name in ("torch", "transformers", "triton") if name in of)


def rows_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of raw results that are there, and all of these results."""
    data = measured(name)
    assert data is not None
    return data["rows"], data


def report_of(name: str) -> Report:
    """A run's report."""
    return read_report(RESULTS / f"{name}.json")


def suite_of(report: Report) -> Suite:
    """Its full suite, which is there."""
    assert report.suite is not None
    return report.suite


def interval(found: Interval) -> str:
    """A share with its interval."""
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"
