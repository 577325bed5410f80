"""Model cards: what they say, what they never overwrite, and what a push to the hub would send."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.cli import app
from a3_hf.models.a3_llama.model_card import MARK, build_card, write_card
from tests.conftest import tiny_model
from tests.training.test_odd_runs import settings

ROOT = Path(__file__).parents[3]


def adapt(source: Path, folder: Path, **changes) -> ModelCard:
    """Runs `a3 adapt` for two steps and returns the card in its `output_dir`."""
    folder.mkdir(exist_ok=True)
    evaluated = {"validation_file": str(source / "validation.txt"), "eval_strategy": "steps", "eval_steps": 2}
    changes = {"max_steps": 2, "curriculum": {"stages": [{"name": "permute", "group_size": 2}]}, **evaluated, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings(source, folder / "out", **changes)))
    done = CliRunner().invoke(app, ["adapt", str(folder / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    return ModelCard.load(folder / "out" / "README.md")


def operations(monkeypatch) -> list[CommitOperationAdd]:
    """Records what every commit to the hub would add; no call reaches a network."""
    sent = []

    def create_commit(self, repo_id, operations, **options):
        sent.extend(operations)
        return SimpleNamespace(commit_url="", oid="")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    session = MagicMock()  # the hub's check of the metadata in README.md
    session.return_value.post.return_value.json.return_value = {}
    monkeypatch.setattr("huggingface_hub.hf_api.get_session", session)
    return sent


def test_metadata_survives_the_round_trip():
    card = build_card(
        "mine", base_model="someone/llama", license="apache-2.0", tags=["a3_llama"], datasets=["some/texts"]
    )
    again = ModelCard(str(card), ignore_metadata_errors=False)
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/llama",
        "license": "apache-2.0",
        "tags": ["a3_llama"],
        "datasets": ["some/texts"],
    }


def test_a_saved_model_has_a_card_which_loads_it(tmp_path):
    tiny_model().save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.tags == ["a3_llama"] and card.data.library_name == "transformers"
    assert 'from_pretrained("mine")' in card.text and "trust_remote_code" in card.text


def test_a_readme_of_somebody_else_stays(tmp_path, source):
    for folder in (tmp_path / "mine", tmp_path / "run" / "out"):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("# My notes\n")
    tiny_model().save_pretrained(tmp_path / "mine")
    adapt(source, tmp_path / "run")
    for folder in (tmp_path / "mine", tmp_path / "run" / "out"):
        assert (folder / "README.md").read_text() == "# My notes\n"
    assert not write_card(build_card("mine"), tmp_path / "mine", replace=True)


def test_an_earlier_card_is_replaced_only_where_asked(tmp_path):
    assert write_card(build_card("first"), tmp_path, replace=False)
    assert not write_card(build_card("second"), tmp_path, replace=False)
    assert "# first" in (tmp_path / "README.md").read_text()
    assert write_card(build_card("second"), tmp_path, replace=True)
    assert "# second" in (tmp_path / "README.md").read_text()


def test_a_finished_run_reports_its_base_recipe_tokens_and_losses(tmp_path, source):
    card = adapt(source, tmp_path)
    assert f"| base | `{source.name}` |" in card.text
    assert "| tokens | 32 (16 a step) |" in card.text  # 2 steps × 2 rows × 8 tokens
    assert "| curriculum | permute |" in card.text and "| data | `train.txt` |" in card.text
    header = next(line for line in card.text.splitlines() if line.startswith("| after |"))
    assert header == "| after | step | left_to_right | contiguous_4 | scattered_1 | scattered_4 |"
    lines = [line for line in card.text.splitlines() if line.startswith(("| (start) | 0 |", "| permute | 2 |"))]
    assert len(lines) == 2 and all(float(cell) > 0 for line in lines for cell in line.split("|")[3:7])
    assert str(tmp_path) not in str(card) and str(source) not in str(card)
    assert card.data.base_model is None and card.data.license is None


def test_the_licence_and_the_name_of_a_local_base_come_from_its_card(tmp_path, source):
    write_card(build_card("base", base_model="someone/llama", license="apache-2.0"), source, replace=True)
    try:
        card = adapt(source, tmp_path)
    finally:
        (source / "README.md").unlink()
    assert (card.data.base_model, card.data.license) == ("someone/llama", "apache-2.0")


@pytest.mark.parametrize(
    ("changes", "tag", "use"),
    [
        ({"lora": {"r": 2, "rows": "slots"}}, "a3_llama", "load_model("),
        ({"architecture": "decoupled_rope"}, "decoupled_rope_llama", "import a3_hf"),
        ({"architecture": "llama", "curriculum": None}, "llama", 'pipeline("text-generation"'),
    ],
)
def test_every_kind_of_run_has_a_card(tmp_path, source, changes, tag, use):
    if changes.get("architecture") == "decoupled_rope":
        changes = {**changes, "curriculum": {"stages": [{"name": "permute"}]}}
    card = adapt(source, tmp_path, **changes)
    assert use in card.text and "| architecture |" in card.text and MARK in card.content
    assert tag in card.data.tags or "lora" in changes  # peft writes tags of its own


def test_push_to_hub_sends_weights_configuration_code_and_a_card(tmp_path, monkeypatch):
    def no_card(*arguments, **options):
        raise EntryNotFoundError("none there")

    sent = operations(monkeypatch)
    monkeypatch.setattr(ModelCard, "load", no_card)
    tiny_model().push_to_hub("me/mine")
    names = {operation.path_in_repo for operation in sent}
    assert {"README.md", "config.json", "model.safetensors", "modeling_a3_llama.py", "orders.py"} <= names


def test_the_documented_upload_sends_the_model_and_its_card_alone(tmp_path, source):
    """By huggingface_hub's own filter, which `hf upload` applies to the folder."""
    adapt(source, tmp_path)
    (command,) = re.findall(r"^hf upload .*$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    words = shlex.split(command)
    left_out = [words[at + 1] for at, word in enumerate(words) if word == "--exclude"]
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = [path.relative_to(tmp_path / "out").as_posix() for path in paths]
    sent = set(filter_repo_objects(names, ignore_patterns=left_out))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_a3_llama.py"} <= sent
    assert {"run.json", "training_args.bin", "checkpoint-2/model.safetensors"} <= set(names) - sent
    assert not any(str(source) in (tmp_path / "out" / name).read_text() for name in sent if name.endswith("json"))
    assert "## Losses" in (tmp_path / "out" / "README.md").read_text()
    A3LlamaForCausalLM.from_pretrained(tmp_path / "out")
