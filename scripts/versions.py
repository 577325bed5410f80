"""Prints the versions of what a3_hf stands on, if installed, in one line. Given a constraints file, fails if any differs."""

import sys
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "lm_eval", "vllm")


def locked(path: str) -> dict[str, str]:
    """name → version of a constraints file."""
    lines = [line for line in Path(path).read_text().splitlines() if line and not line.startswith("#")]
    return {_name(name): number for name, _, number in (line.partition("==") for line in lines)}


def _name(name: str) -> str:
    return name.lower().replace("_", "-")


if __name__ == "__main__":
    installed = {_name(each.metadata["Name"]): each.version.partition("+")[0] for each in distributions()}
    print(", ".join(f"{name} {installed[_name(name)]}" for name in PACKAGES if _name(name) in installed))
    if len(sys.argv) > 1:
        newer = [name for name, number in locked(sys.argv[1]).items() if installed.get(name, number) != number]
        if newer:
            sys.exit(f"not as in {sys.argv[1]}: " + ", ".join(f"{name} {installed[name]}" for name in newer))
