"""The commands and Python of README.md and docs/, block after block as they stand, offline, with no other files.

What stands in for what a test can't have: `make` is not called (`make demo-synthetic` is its script at a few steps); in place
of SmolLM2, its draft head, and the models and texts of recipes that come from the hub, there are a tiny LLaMA and a few lines;
the tasks' items are made up; a training takes three steps; of a launcher's command the part behind `-m a3_hf` runs.
"""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from a3_hf.cli import app
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from tests.conftest import tiny_config
from tests.evaluation.test_task_sources import write_all

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": ["runs/mine/config.json", "runs/mine/README.md"]} | {
    f"docs/{path.name}": [] for path in sorted((ROOT / "docs").glob("*.md"))
}
PAGES["docs/training.md"] = ["runs/mine/config.json", "runs/adapter/adapter_config.json", "runs/merged/config.json"]
PAGES["docs/decoding.md"] = ["runs/replay.html", "runs/surprise.html", "runs/alone/config.json"]
PAGES["docs/evaluation.md"] = ["results/report.md", "results/ppl.json"]


def blocks(page: str) -> list[tuple[str, str]]:
    """The kind and text of each block of a page that is to run."""
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tokenizer):
    """The repository as a reader sees it, with the models that `make demo-synthetic` and `make smollm2` make, smaller."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "accelerate_configs", "eval"):
        (folder / name).symlink_to(ROOT / name)
    demo = [sys.executable, str(ROOT / "examples" / "demo_synthetic.py"), "--smoke", "--output-dir", "runs/demo"]
    subprocess.run(demo, cwd=folder, check=True, capture_output=True)
    stories = folder / "runs" / "demo" / "stories.txt"
    stories.write_text("\n".join([stories.read_text()] * 20))
    config = tiny_config(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, max_position_embeddings=256
    ).to_dict()
    del config["model_type"], config["slot_start"]
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / "models" / "smollm2-135m")
    tokenizer.save_pretrained(folder / "models" / "smollm2-135m")
    sizes = {"rank": 2, "sampler_size": 4, "base_model_name_or_path": "models/smollm2-135m"}
    head = DraftHead(DraftHeadConfig.for_base(LlamaConfig(**config), **sizes))
    head.save_pretrained(folder / "adapters" / "smollm2-135m-drafts")
    write_all(folder / "items")
    lines = [json.dumps({"text": f"The dog ran home, and {number} cats sat on a mat."}) for number in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def stand_in(words: list[str], clone: Path) -> list[str]:
    """What a command says in addition, so that it takes a moment and no network."""
    if words[0] == "adapt" and "recipes/demo" in words[1]:
        return ["--max_steps", "3"]
    if words[0] == "adapt":
        sources = ("fineweb", "slimpajama")
        return [
            *("--model_name_or_path", "models/smollm2-135m", "--block_size", "64"),
            *(word for name in sources for word in (f"--sources.{name}.path", "texts.jsonl")),
            *("--validation_documents", "5", "--use_cpu", "true", "--num_shards", "1", "--dataloader_num_workers", "0"),
            "--dry-run",
        ]
    if words[0] == "eval" and "--tasks" in words:
        return ["--metadata", f"data_dir={clone / 'items'}"]
    return []


def run(command: str, clone: Path) -> None:
    words = shlex.split(command, comments=True)
    if not words or words[0] in ("make", "source", "pip", "hf"):
        return
    if words[0] == "accelerate":
        words = ["a3", *words[words.index("a3_hf") + 1 :]]
    assert words[0] == "a3", f"who runs {command!r}?"
    more = [word for word in stand_in(words[1:], clone) if word != "--dry-run" or word not in words]
    done = CliRunner().invoke(app, [*words[1:], *more], env={"COLUMNS": "200"})
    assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_runs_in_its_turn(page, clone, monkeypatch):
    monkeypatch.chdir(clone)
    # lm-eval indexes its thousands of tasks for ten seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["a3"])
    scope: dict = {}
    for kind, block in blocks(page):
        if kind == "python":
            exec(compile(block, page, "exec"), scope)
        else:
            for line in block.replace("\\\n", " ").splitlines():
                run(line, clone)
    for made in PAGES[page]:
        assert (clone / made).is_file(), f"{page} did not make {made}"


def test_the_blocks_need_nothing_beside_the_clone():
    texts = [text for page in PAGES for _, text in blocks(page)]
    assert len(texts) >= 12 and len(blocks("README.md")) >= 3
    assert not any("../" in text or "shared" in text for text in texts)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
