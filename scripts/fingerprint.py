"""Fingerprint of what a commit computes, for proving that a change of structure changes no result.

    python scripts/fingerprint.py LLAMA TEXT            # prints one line per run: its name and a SHA-256
    diff before.txt after.txt                           # two commits on one machine, with the same packages

For each slot start, `a3 adapt` makes 20 steps from the LLaMA in the folder LLAMA on the file TEXT (stages ar, expand,
permute): the logged losses and the trained weights are hashed. Each strategy then fills 64 tokens of two padded rows, greedily
and sampled: tokens, commit steps and log-probabilities are hashed, and so are the likelihoods under a random order.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

import a3_hf  # noqa: F401  (registers the models)
from a3_hf import A3LlamaForCausalLM

NEW_TOKENS = 64
STAGES = [
    {"name": "ar", "until": 6},
    {"name": "expand", "until": 12, "group_size": [1, 4]},
    {"name": "permute", "group_size": 4},
]
STRATEGIES = {
    "groupwise": {"strategy": "groupwise", "group_size": 4, "order": "random"},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 4},
    "speculative": {"strategy": "speculative", "order": "random"},
}


def digest(*parts: bytes | torch.Tensor) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(
            part if isinstance(part, bytes) else part.detach().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return hashed.hexdigest()


def adapt(llama: str, text: str, slot_start: str, output: Path) -> str:
    settings = {
        "model_name_or_path": llama,
        "slot_start": slot_start,
        "train_file": text,
        "document_separator": "<|endoftext|>",
        "block_size": 128,
        "curriculum": {"unit": "steps", "stages": STAGES},
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": 1,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(output),
    }
    recipe = output.with_suffix(".yaml")
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "a3_hf", "adapt", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a3 adapt ended with {done.returncode}: {done.stderr[-2000:]}")
    states = sorted(output.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    losses = [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]
    assert len(losses) == 20, f"{len(losses)} losses were logged, not 20"
    with safe_open(output / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(name) for name in sorted(file.keys())]
    return digest(json.dumps(losses).encode(), *weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", help="folder of a LLaMA with its tokenizer")
    parser.add_argument("text", help="text file to train on, documents separated by <|endoftext|>")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for slot_start in ("query_embed", "left_token"):
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"{slot_start} training {adapt(arguments.llama, arguments.text, slot_start, Path(folder, 'run'))}",
                flush=True,
            )
            model = A3LlamaForCausalLM.from_pretrained(Path(folder, "run")).eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=generator)
        ids[:, 0] = model.config.bos_token_id
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        ids[1, 3] = model.config.bos_token_id
        for name, settings in STRATEGIES.items():
            for do_sample in (False, True):
                output = model.generate_any_order(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=do_sample,
                    eos_token_id=None,
                    seed=3,
                    **settings,
                )
                parts = digest(output.sequences, output.commit_step, output.log_probs)
                print(f"{slot_start} {name} {'sampled' if do_sample else 'greedy'} {parts}", flush=True)
        groups = torch.rand(ids.shape, generator=generator).argsort(dim=1)
        print(f"{slot_start} likelihood {digest(model.log_likelihood(ids, groups))}", flush=True)


if __name__ == "__main__":
    main()
