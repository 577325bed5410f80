"""Copies the adapter of a finished run to a folder, in bfloat16: half the size.

    python scripts/release_adapter.py runs/smollm2-135m adapters/smollm2-135m --scale 0.5

A scale below 1 takes that part of what the adapter adds: nearer to the base, often better on other text than it learnt from.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of what the adapter adds, stored in lora_alpha"
    )
    arguments = parser.parse_args()
    if not 0 < arguments.scale < float("inf"):
        parser.error(f"scale={arguments.scale}: expected a number above 0")
    missing = [name for name in (WEIGHTS, SETTINGS, CARD) if not (arguments.run / name).is_file()]
    if missing:
        parser.error(
            f"run={str(arguments.run)!r} lacks {', '.join(missing)}: expected the folder of a finished run with lora"
        )
    settings = json.loads((arguments.run / SETTINGS).read_text(encoding="utf-8"))
    if Path(settings["base_model_name_or_path"]).is_absolute():
        parser.error(
            f"base={settings['base_model_name_or_path']!r}: expected a relative path or a hub id, for other machines"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(arguments.run / WEIGHTS).items()}
    save_file(weights, arguments.output / WEIGHTS, metadata={"format": "pt"})
    settings["lora_alpha"] *= arguments.scale
    (arguments.output / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    run, output = arguments.run.name, arguments.output
    card = (arguments.run / CARD).read_text(encoding="utf-8")
    card = card.replace(f"\n# {run}\n", f"\n# {output.name}\n").replace(f'("{run}")', f'("{output}")')
    made = f"Made by `python scripts/release_adapter.py {arguments.run} {arguments.output} --scale {arguments.scale:g}`"
    (arguments.output / CARD).write_text(
        f"{card.rstrip()}\n\n## Release\n\n{made}: in bfloat16, and what the adapter adds times {arguments.scale:g} "
        f"(alpha {settings['lora_alpha']:g}).\n",
        encoding="utf-8",
    )
    size = (arguments.output / WEIGHTS).stat().st_size / 1e6
    print(f"{arguments.output}: {sum(tensor.numel() for tensor in weights.values()):,} parameters, {size:.1f} MB")


if __name__ == "__main__":
    main()
