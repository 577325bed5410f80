"""Prints the lower ends of the project's requirements as exact versions, a constraints file for `make test-oldest`.

torch is left out: older builds for a CPU alone are on no public registry, so that each would cost gigabytes.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["eval"], *extras["serve"], *extras["dev"]]:
    name, lowest = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
