"""Where models are looked for: a mistyped path is said at once, and an adapter's base is found where it can be."""

import shutil

import pytest
from huggingface_hub import HfApi
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters import checkpoint_info
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoint_info import CheckpointInfo, check_is_there
from a3_hf.adapters.checkpoints import load_model
from a3_hf.adapters.layers import attach
from a3_hf.cli import app
from a3_hf.training.recipes import parse_recipe
from a3_hf.training.run import run


@pytest.fixture
def hub(monkeypatch):
    """A hub that is asked and does not answer."""
    asked = []

    def model_info(self, name, **settings):
        asked.append(name)
        raise ConnectionError("the hub can't be reached\nmore")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    checkpoint_info._check_is_on_hub.cache_clear()
    return asked


@pytest.mark.parametrize(
    "path",
    [
        "./mine",
        "../mine",
        "/no/such/mine",
        "~/mine",
        "mine",
        "here/mien",
        "runs/mien",
        "models/x",
        "a/b/c",
        "a//b",
        "",
        "a b/c",
    ],
)
def test_what_is_no_hubs_name_is_no_such_folder(hub, tmp_path, monkeypatch, path):
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        check_is_there(path)
    assert hub == []


def test_a_hubs_name_is_asked_for_once_and_the_cache_stands_for_it(hub, tmp_path, monkeypatch):
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"'owner/name': no such folder .* no such model on the hub: the hub can't be reached$"
        ):
            check_is_there("owner/name")
    monkeypatch.setattr(checkpoint_info.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--other" / "snapshots").mkdir(parents=True)
    check_is_there("owner/other")
    assert set(hub) == {"owner/name"}


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_is_there(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "words",
    [
        ["infill", "runs/mien", "a <blank:1>"],
        ["generate", "runs/mien", "a"],
        ["score", "runs/mien", "a"],
        ["merge", "runs/mien", "out"],
        ["export", "runs/mien", "out"],
        ["eval", "ppl", "runs/mien", __file__],
        ["infill", "MODEL", "a <blank:1>", "--base", "runs/mien"],
    ],
)
def test_every_command_says_it(hub, source, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [str(source) if word == "MODEL" else word for word in words])
    assert done.exit_code == 2 and "runs/mien" in done.stderr, done.output
    assert "no such folder" in done.stderr or "expected None" in done.stderr
    assert hub == [] and list(tmp_path.iterdir()) == []


def test_a_training_says_it_too(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "a.txt").write_text("some words " * 99)
    recipe.write_text(
        "model_name_or_path: runs/mien\ntrain_file: a.txt\noutput_dir: out\nmax_steps: 2\nreport_to: none\n"
        "curriculum: {unit: steps, stages: [{name: ar, until: 2}]}\n"
    )
    with pytest.raises(ValueError, match="'runs/mien': no such folder"):
        run(parse_recipe(recipe))
    assert hub == [] and not (tmp_path / "out").exists()


@pytest.fixture
def project(source, tmp_path, monkeypatch):
    """A folder with models/base, and runs/adapter made from there."""
    shutil.copytree(source, tmp_path / "project" / "models" / "base")
    monkeypatch.chdir(tmp_path / "project")
    model = A3LlamaForCausalLM.from_pretrained("models/base", slot_start="left_token")
    attach(model, LoraArguments(r=2, rows="slots")).save_pretrained("runs/adapter")
    return tmp_path / "project"


def test_a_base_is_found_from_another_folder(project, tmp_path, monkeypatch):
    assert CheckpointInfo.read("runs/adapter").base == "models/base"
    monkeypatch.chdir(tmp_path)
    assert (
        CheckpointInfo.read(str(project / "runs" / "adapter")).base
        == CheckpointInfo.read("project/runs/adapter").base
        == str(project / "models/base")
    )
    done = CliRunner().invoke(app, ["infill", "project/runs/adapter", "w1 <blank:2> w3", "--slot-start", "left_token"])
    assert done.exit_code == 0, done.output


def test_a_base_is_found_beside_the_adapter(project, tmp_path, monkeypatch):
    (tmp_path / "usb").mkdir()
    shutil.move(project / "models" / "base", tmp_path / "usb" / "base")
    shutil.move(project / "runs" / "adapter", tmp_path / "usb" / "adapter")
    monkeypatch.chdir("/")
    assert CheckpointInfo.read(str(tmp_path / "usb" / "adapter")).base == str(tmp_path / "usb" / "base")
    assert load_model(str(tmp_path / "usb" / "adapter"), slot_start="left_token").active_adapters == ["default"]


@pytest.mark.parametrize(
    "command", [["infill", "w1 <blank:2>"], ["generate", "w1", "--max-new-tokens", "3"], ["score", "w1 w2"]]
)
def test_a_base_that_is_nowhere_can_be_named(project, tmp_path, command):
    shutil.move(project / "models" / "base", tmp_path / "else")
    words = [command[0], "runs/adapter", *command[1:], "--slot-start", "left_token"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "'models/base'" in refused.stderr and "--base" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--base", str(tmp_path / "else")])
    assert done.exit_code == 0, done.output


def test_the_backbone_is_still_a_llama(project):
    assert LlamaForCausalLM.from_pretrained("models/base").config.model_type == "llama"
