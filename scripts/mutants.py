"""Runs the tests against deliberate errors: each of `tests/mutants.yaml` is put into a copy of the package.
Prints for each the test that failed; exit status 1 if any mutant survives.

python scripts/mutants.py [NAME_CONTAINS]
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.progress import track

ROOT = Path(__file__).parents[1]
TESTS_FAILED = 1  # pytest's exit status; others mean that the tests could not run


def main(wanted: str = "") -> None:
    mutants = [one for one in yaml.safe_load((ROOT / "tests/mutants.yaml").read_text()) if wanted in one["name"]]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in tracked.splitlines():
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        for mutant in track(mutants, "mutants", disable=not sys.stderr.isatty()):
            path = Path(folder) / "a3_hf" / mutant["file"]
            source = path.read_text(encoding="utf-8")
            if source.count(mutant["find"]) != 1:
                sys.exit(f"{mutant['name']}: {mutant['find']!r} stands {source.count(mutant['find'])} times in {path}")
            path.write_text(source.replace(mutant["find"], mutant["put"]), encoding="utf-8")
            run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
            done = subprocess.run([*run, *mutant["tests"].split()], cwd=folder, capture_output=True, text=True)
            path.write_text(source, encoding="utf-8")
            killers = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            is_killed = done.returncode == TESTS_FAILED
            survived += [] if is_killed else [mutant["name"]]
            print(
                f"{mutant['name']}: {killers[0].split(' - ')[0] if is_killed and killers else 'SURVIVED'}", flush=True
            )
    print(f"{len(mutants) - len(survived)} of {len(mutants)} mutants killed")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
