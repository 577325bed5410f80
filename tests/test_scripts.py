"""Scripts that make texts and release adapters, run as a user runs them."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.adapters.layers import SlotLinear, attach
from a3_hf.data.arguments import DataArguments
from a3_hf.data.written import load_written
from a3_hf.evaluation.measures.sentence_nats import IN_PLACE, arrange, blank_nats
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

SCRIPTS = Path(__file__).parents[1] / "scripts"
END = "\n<|endoftext|>\n"


def script(name: str, *arguments, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_texts_are_mixed_in_turns(tmp_path):
    (tmp_path / "stories.txt").write_text(END.join(["One.", "Two.", "Three."]))
    long = 'It was n\'t 3 @.@ 5 @-@ fold ( so he said ) , and " all right " . ' * 6
    (tmp_path / "wiki.txt").write_text(f" = Heading = \n {long}\n short line\n {long.upper()}\n")
    done = script("mix_texts.py", "mixed.txt", "stories.txt", "wiki.txt", "--documents", "4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    documents = (tmp_path / "mixed.txt").read_text().split(END)
    assert [documents[0], documents[2], documents[4]] == ["One.", "Two.", ""]
    assert documents[1].startswith('It wasn\'t 3.5-fold (so he said), and "all right". It was')
    done = script("mix_texts.py", "mixed.txt", "stories.txt", "wiki.txt", "--documents", "6", folder=tmp_path)
    assert done.returncode == 2 and "documents=6: expected at most 4, for wiki.txt" in done.stderr
    done = script("mix_texts.py", "mixed.txt", "stories.txt", "wiki.txt", "--documents", "3", folder=tmp_path)
    assert done.returncode == 2 and "documents=3: expected a multiple of the 2 texts" in done.stderr
    done = script("mix_texts.py", "mixed.txt", "storys.txt", "--documents", "1", folder=tmp_path)
    assert done.returncode == 2 and "there is no file storys.txt" in done.stderr


def test_a_stopped_text_goes_on_to_the_same(source, tmp_path):
    settings = ["--tokens", "60", "--length", "8", "--batch-size", "2"]
    done = script("write_text.py", source, "whole.txt", *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole.txt").read_text()
    script("write_text.py", source, "part.txt", *settings, "--seed", "1", folder=tmp_path)
    assert (tmp_path / "part.txt").read_text() != whole
    parts = sorted((tmp_path / "whole.txt.parts").glob("*.txt"))
    assert len(parts) >= 2 and whole.count(END) == 2 * len(parts)
    parts[-1].unlink()
    again = script("write_text.py", source, "whole.txt", *settings, folder=tmp_path)
    assert again.returncode == 0 and (tmp_path / "whole.txt").read_text() == whole
    other = script("write_text.py", source, "whole.txt", *settings, "--temperature", "0", folder=tmp_path)
    assert other.returncode == 2 and "other settings" in other.stderr


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_released_adapter_adds_a_part(source, tmp_path, monkeypatch, scale):
    monkeypatch.chdir(source.parent)
    base = A3LlamaForCausalLM.from_pretrained(source.name, slot_start="left_token")
    adapted = attach(base, LoraArguments(r=2, rows="slots"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text('---\n\n# run\n\nmodel = load_model("run")')
    done = script("release_adapter.py", tmp_path / "run", tmp_path / "out", "--scale", scale, folder=source.parent)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    whole, released = (
        next(one for one in load_model(path).modules() if isinstance(one, SlotLinear))
        for path in (tmp_path / "run", tmp_path / "out")
    )
    assert released.scaling["default"] == scale * whole.scaling["default"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert settings["slot_start"] == "left_token" and f"times {scale:g}" in card
    assert "\n# out\n" in card and f'load_model("{tmp_path / "out"}")' in card
    done = script("release_adapter.py", tmp_path / "run", tmp_path / "out", "--scale", "0", folder=source.parent)
    assert done.returncode == 2 and "scale=0.0: expected a number above 0" in done.stderr


def test_several_blanks_hold_the_true_words(stories, made_data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent / "eval"))
    from several_blanks import blanked, total_nats

    words = 'Later: "{suffix}"\n'
    tokenizer, model = load_tokenizer(str(stories)), load_model(str(stories), dtype=torch.float64).eval()
    text = "One day, Tom went to the park. He saw a big ball, and it was red. In the end, Tom was happy."
    template, targets = blanked(tokenizer, text, 3, random.Random(0))
    assert "".join(itertools.chain(*zip(template.pieces, [*targets, ""], strict=True))) == text
    assert blanked(tokenizer, "Tom went home.", 3, random.Random(0)) is None
    (template, (word,)) = one = blanked(tokenizer, text, 1, random.Random(3))
    before, after = template.pieces
    for way, shown in ((None, IN_PLACE), (words, words)):
        row = arrange(tokenizer, (before.removesuffix(" "), f" {word}", after), shown)
        wanted = blank_nats(model, [row])[0]
        assert total_nats(model, tokenizer, [one], way) == pytest.approx(wanted, rel=1e-9)
        assert total_nats(model, tokenizer, [one, one], way) == pytest.approx(2 * wanted, rel=1e-9)

    told = made_data / "rocstories" / "cloze_test_val__spring2016.csv"
    command = [
        sys.executable,
        str(SCRIPTS.parent / "eval" / "several_blanks.py"),
        str(stories),
        str(stories),
        str(told),
    ]
    done = subprocess.run(
        [*command, "--count", "3", "--json", "out.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0]["nats"] > 0


def test_documents_of_greedy_text_are_what_their_base_writes(source, tmp_path):
    settings = ["--tokens", "400", "--length", "12", "--batch-size", "8", "--temperature", "0", "--opening-tokens", "3"]
    done = script("write_text.py", source, "greedy.jsonl", *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "greedy.jsonl").read_text().splitlines()[0])
    model, ids = A3LlamaForCausalLM.from_pretrained(source, slot_start="left_token"), document["input_ids"]
    given = torch.tensor([ids[: document["prompt_length"]]])
    output = model.generate_any_order(given, max_new_tokens=12, eos_token_id=model.generation_config.eos_token_id)
    assert output.sequences[0, : len(ids)].tolist() == ids
    rows, _ = load_written(DataArguments(train_file=str(tmp_path / "greedy.jsonl")), vocab_size=model.config.vocab_size)
    assert rows[0]["input_ids"] == ids and rows[0]["labels"].count(-100) == document["prompt_length"]
