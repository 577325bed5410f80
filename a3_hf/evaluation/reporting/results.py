"""Result files: one JSON per run, with its settings, environment and rows."""

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("a3-hf", "lm_eval", "torch", "transformers")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, git commit (of the working directory; None outside a repository), device and date of a run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    is_gpu = torch.device(device).type == "cuda"
    return {
        "versions": versions,
        "git_commit": found.stdout.strip() if found.returncode == 0 else None,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
    }


def write_result(
    output: Path, kind: str, config: dict[str, Any], rows: list[dict[str, Any]], *, device: torch.device | str
) -> None:
    """Writes a measurement to the file `output`.

    Args:
        kind: kind of measurement, e.g. "ppl"; `a3 report` has a table for each.
        config: settings, seed included, in plain values.
        rows: one flat dict per line of the table.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": kind, "config": config, **environment(device), "rows": rows}
    output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All JSON files under a folder, those of lm-eval (with `results`) and those of `write_result` (with `kind`), in the
    order of their paths; each has its own path under "path". Other JSON files are ignored.

    Raises:
        ValueError: no such folder, no result in it, or an unreadable or incomplete file.
    """
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: no such folder")
    found = []
    for path in sorted(path for path in folder.rglob("*.json") if path.is_file()):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        if isinstance(content, dict) and ("kind" in content or ("results" in content and "configs" in content)):
            _check_result(path, content)
            found.append({**content, "path": str(path.relative_to(folder))})
    if not found:
        raise ValueError(f"folder={str(folder)!r}: expected a folder with results of `a3 eval`")
    return found


def _check_result(path: Path, content: dict[str, Any]) -> None:
    if "kind" in content:
        rows = content.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} has kind={content['kind']!r} but no list of `rows`")
    elif not isinstance(content.get("config"), dict):
        raise ValueError(
            f"{path} has `results` but no `config`: expected a file that lm-eval wrote to its --output_path"
        )
