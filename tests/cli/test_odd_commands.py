"""Command lines that can't work: each ends in one line that names what is wrong, with nothing written and no traceback."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.cli import app
from tests.conftest import tiny_model

WORDS = ["<s>", "</s>", "<unk>", *"the a dog cat ran sat home mat on was happy .".split()]
RECIPE = """\
model_name_or_path: model
train_file: text.txt
block_size: 16
output_dir: out
max_steps: 2
per_device_train_batch_size: 2
use_cpu: true
report_to: none
curriculum: {unit: steps, stages: [{name: ar, until: 1}, {name: permute, group_size: 2}]}
"""


def save_model(folder: Path, **settings) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    config = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "slot_start": "left_token"}
    tiny_model(seed=2, **{**config, **settings}).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command lines below name."""
    folder = tmp_path_factory.mktemp("odd")
    save_model(folder / "model")
    base = A3LlamaForCausalLM.from_pretrained(folder / "model")
    base.config._name_or_path = "model"
    attach(base, LoraArguments(r=2, rows="slots")).save_pretrained(folder / "adapter")
    settings = folder / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": "model"}))
    (folder / "text.txt").write_text("the dog ran home . " * 200)
    (folder / "latin.txt").write_bytes("the dôg ran".encode("latin-1"))
    (folder / "latin.yaml").write_bytes("output_dir: dôg".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "empty").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "list.yaml").write_text("[1, 2]")
    (folder / "twice.yaml").write_text(RECIPE + "max_steps: 3\n")
    (folder / "broken.yaml").write_text("a: [1\nb: {")
    for name, file, content in (
        ("cut", "config.json", '{"model_type": "a3_ll'),
        ("alien", "config.json", '{"model_type": "bert"}'),
        ("cut-adapter", "adapter_config.json", '{"peft_type": "LO'),
        ("other-adapter", "adapter_config.json", '{"peft_type": "IA3"}'),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(content)
    save_model(folder / "no-weights")
    (folder / "no-weights" / "model.safetensors").unlink()
    save_model(folder / "cut-weights")
    weights = folder / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    save_model(folder / "cut-tokenizer")
    (folder / "cut-tokenizer" / "tokenizer.json").write_text('{"version"')
    save_model(folder / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no-tokenizer" / name).unlink()
    (folder / "results").mkdir()
    (folder / "results" / "results_1.json").write_text("[1")
    return folder


INFILL = ["infill", "model", "the <blank:2> ran"]
GENERATE = ["generate", "model", "the dog"]
SCORE = ["score", "model", "the dog ran"]
ADAPT = ["adapt", "recipe.yaml"]
PPL = ["eval", "ppl", "model", "text.txt"]
ODD = [
    # the command line itself
    (["infil"], "infil"),
    (["infill"], "argument 'model'"),
    (["infill", "model"], "argument 'text'"),
    ([*INFILL, "more"], "more"),
    ([*INFILL, "--stratgy", "dynamic"], "--stratgy"),
    ([*INFILL, "--seed"], "--seed"),
    ([*INFILL, "--seed", "x"], "--seed"),
    ([*INFILL, "--group-size", "1.5"], "--group-size"),
    ([*INFILL, "--group_size", "two"], "--group-size"),
    (["infill", "model", "- buy <blank:3> milk"], "-- '- buy <blank:3> milk'"),
    (["generate", "model", "- the dog"], "-- '- the dog'"),
    (["--versoin"], "--versoin"),
    # texts
    (["infill", "model", "no blank"], "no blank marker"),
    (["infill", "model", ""], "text"),
    (["infill", "model", "the <blank:0>"], "<blank:0>"),
    (["infill", "model", "the <blank:5..2>"], "<blank:5..2>"),
    (["infill", "model", "the <blank:500> ran"], "max_position_embeddings=128"),
    (["infill", "model", "the <blank:99999999999> ran"], "99999999999"),
    (["infill", "model", "the <blank:1..99999999999> ran"], "99999999999"),
    (["infill", "model", "the <blank:auto> ran", "--auto-lengths", "1..99999999999"], "99999999999"),
    (["infill", "model", "the <blank:auto> ran", "--auto-lengths", "few"], "auto_lengths='few'"),
    (["infill", "model", "the <blank:auto> ran", "--auto_lengths", "9..2"], "9..2"),
    (["score", "model", ""], "text is empty"),
    (["score", "model", "the dog " * 99], "max_position_embeddings=128"),
    (["generate", "model", "the dog " * 99], "max_position_embeddings=128"),
    # numbers
    ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens"),
    ([*GENERATE, "--max-new-tokens", "-1"], "max_new_tokens"),
    ([*GENERATE, "--max-new-tokens", "500"], "max_position_embeddings=128"),
    ([*GENERATE, "--max-new-tokens", "100000000000"], "100000000000"),
    ([*GENERATE, "--max-new-tokens", "100000000000000000000"], "100000000000000000000"),
    ([*INFILL, "--group-size", "0"], "group_size=0"),
    ([*INFILL, "--group-size", "-3"], "group_size=-3"),
    ([*INFILL, "--max-time", "-1"], "max_time"),
    ([*INFILL, "--max-time", "nan"], "max_time"),
    ([*SCORE, "--num-orders", "0"], "num_orders=0"),
    ([*SCORE, "--num-orders", "3"], "num_orders=3"),
    ([*SCORE, "--order", "random", "--num-orders", "100000000"], "num_orders=100000000"),
    ([*SCORE, "--order", "random", "--num-orders", "100000000000000000000"], "num_orders"),
    ([*SCORE, "--group-size", "0"], "group_size=0"),
    ([*SCORE, "--order", "random", "--seed", "100000000000000000000"], "seed"),
    ([*INFILL, "--strategy", "dynamic", "--tokens-per-step", "0"], "tokens_per_step"),
    ([*INFILL, "--strategy", "dynamic", "--threshold", "7"], "threshold"),
    ([*INFILL, "--strategy", "dynamic", "--threshold", "nan"], "threshold"),
    ([*INFILL, "--strategy", "dynamic", "--entropy-budget", "-1"], "entropy_budget"),
    ([*INFILL, "--strategy", "dynamic", "--window", "0"], "window"),
    ([*INFILL, "--strategy", "speculative", "--draft-tokens", "0"], "draft_tokens"),
    ([*INFILL, "--strategy", "refine", "--refine-fraction", "2"], "refine_fraction"),
    ([*INFILL, "--do-sample", "--temperature", "0"], "temperature"),
    ([*INFILL, "--do-sample", "--temperature", "-1"], "temperature"),
    ([*INFILL, "--do-sample", "--top-p", "2"], "top_p"),
    ([*INFILL, "--do-sample", "--top-k", "-1"], "top_k"),
    ([*INFILL, "--do-sample", "--min-p", "7"], "min_p"),
    ([*INFILL, "--repetition-penalty", "0"], "penalty"),
    # words
    ([*INFILL, "--strategy", "luck"], "strategy='luck'"),
    ([*INFILL, "--order", "spiral"], "order='spiral'"),
    ([*INFILL, "--order", "spans"], "span_length"),
    ([*INFILL, "--strategy", "dynamic", "--criterion", "mood"], "criterion='mood'"),
    ([*INFILL, "--strategy", "speculative", "--draft", "none"], "draft='none'"),
    ([*SCORE, "--order", "spiral"], "order='spiral'"),
    ([*SCORE, "--html", "page.html", "--against", "spiral"], "spiral"),
    ([*INFILL, "--slot-start", "nothing"], "--slot-start nothing"),
    ([*INFILL, "--slot-start", "query_embed"], "--slot-start query_embed"),
    # without effect
    ([*INFILL, "--tokens-per-step", "2"], "tokens_per_step"),
    ([*INFILL, "--temperature", "0.5"], "--temperature 0.5 has no effect without --do-sample"),
    ([*GENERATE, "--top_k", "5"], "--top-k 5 has no effect without --do-sample"),
    ([*GENERATE, "--top-p", "0.5"], "--top-p 0.5 has no effect without --do-sample"),
    ([*GENERATE, "--min-p", "0.5"], "--min-p 0.5 has no effect without --do-sample"),
    ([*SCORE, "--span-length", "3"], "span_length"),
    ([*SCORE, "--against", "random"], "against='random' has no effect"),
    ([*INFILL, "--base", "model"], "base='model'"),
    # files and models
    ([*INFILL, "--html", "no/such/page.html"], "no/such/page.html"),
    ([*INFILL, "--html", "empty"], "html='empty' is a folder"),
    ([*SCORE, "--html", "no/page.html"], "no/page.html"),
    (["infill", "nowhere", "a <blank:1>"], "nowhere"),
    (["infill", "text.txt", "a <blank:1>"], "text.txt"),
    (["infill", "empty", "a <blank:1>"], "empty"),
    (["infill", "cut", "a <blank:1>"], "cut"),
    (["infill", "alien", "a <blank:1>"], "alien"),
    (["infill", "no-weights", "a <blank:1>"], "no-weights"),
    (["infill", "cut-weights", "a <blank:1>"], "cut-weights"),
    (["infill", "cut-tokenizer", "a <blank:1>"], "cut-tokenizer"),
    (["infill", "no-tokenizer", "a <blank:1>"], "no-tokenizer"),
    (["infill", "cut-adapter", "a <blank:1>"], "cut-adapter"),
    (["infill", "other-adapter", "a <blank:1>"], "IA3"),
    (["infill", "adapter", "a <blank:1>", "--base", "nowhere"], "nowhere"),
    (["infill", "adapter", "a <blank:1>", "--base", "alien"], "alien"),
    (["merge", "adapter", "merged"], "rows: slots"),
    (["merge", "model", "merged"], "model"),
    (["merge", "nowhere", "merged"], "nowhere"),
    (["export", "model", "exported"], "model"),
    (["export", "nowhere", "exported"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["report", "empty"], "empty"),
    (["report", "results"], "results_1.json"),
    (["experiment", "nothing"], "nothing"),
    # recipes
    (["adapt", "nowhere.yaml"], "nowhere.yaml"),
    (["adapt", "empty"], "empty"),
    (["adapt", "latin.yaml"], "latin.yaml"),
    (["adapt", "list.yaml"], "list.yaml"),
    (["adapt", "twice.yaml"], "max_steps"),
    (["adapt", "broken.yaml"], "broken.yaml"),
    ([*ADAPT, "--max_stesp", "3"], "max_stesp"),
    ([*ADAPT, "--max-stesp", "3"], "max_stesp"),
    ([*ADAPT, "--max_steps", "many"], "max_steps"),
    ([*ADAPT, "--max_steps"], "max_steps"),
    ([*ADAPT, "--max_steps", "null"], "max_steps"),
    ([*ADAPT, "--lora.r", "x"], "r: expected an integer"),
    ([*ADAPT, "--lora.q", "8"], "--lora.q"),
    ([*ADAPT, "--lora.r"], "--lora.r"),
    ([*ADAPT, "--lora.r", "{"], "--lora.r"),
    ([*ADAPT, "--lora.r.s", "1"], "--lora.r.s"),
    ([*ADAPT, "--lora", "8"], "lora"),
    ([*ADAPT, "--sources.web.path", "x"], "--sources.web.path"),
    ([*ADAPT, "--curriculum", "{"], "curriculum"),
    ([*ADAPT, "--train_file", "nowhere.txt"], "nowhere.txt"),
    ([*ADAPT, "--train_file", "empty.txt"], "empty.txt"),
    ([*ADAPT, "--train_file", "latin.txt"], "latin.txt"),
    ([*ADAPT, "--train-file", "null"], "train_file"),
    ([*ADAPT, "--model_name_or_path", "nowhere"], "nowhere"),
    ([*ADAPT, "--model_name_or_path", "alien"], "bert"),
    ([*ADAPT, "--dry-run", "--accelerate-configs", "empty", "--tflops", "0"], "tflops"),
    ([*ADAPT, "--dry-run", "--accelerate-configs", "nowhere"], "nowhere"),
    # measurements
    (["eval", "ppl", "model", "nowhere.txt"], "nowhere.txt"),
    (["eval", "ppl", "model", "latin.txt"], "latin.txt"),
    (["eval", "ppl", "model", "empty.txt"], "empty.txt"),
    (["eval", "ppl", "nowhere", "text.txt"], "nowhere"),
    ([*PPL, "--orders", "spiral"], "spiral"),
    ([*PPL, "--num_orders", "0"], "num_orders=0"),
    ([*PPL, "--batch-size", "0"], "--batch-size"),
    ([*PPL, "--max_length", "x"], "max_length='x'"),
    ([*PPL, "--max_length", "100000000000"], "max_length"),
    ([*PPL, "--output", "page.txt"], "page.txt"),
    ([*PPL, "--base", "nowhere"], "nowhere"),
    ([*PPL, "--rope_scaling", "{"], "rope_scaling"),
    ([*PPL, "--documents", "0"], "documents=0"),
    ([*PPL, "--separator", "|"], "separator='|'"),
    (["eval", "judge", "model", "text.txt", "--judge", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("words", "named"), ODD, ids=[" ".join(words)[:60] for words, _ in ODD])
def test_an_odd_command_ends_in_one_line(folder, monkeypatch, words, named):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    said = [line for line in done.stderr.splitlines() if line.startswith("a3: ")]
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert len(said) == 1 and said[0] == done.stderr.splitlines()[-1], done.stderr
    assert named.lower() in said[0].lower()
    assert "Traceback" not in done.output and done.stdout == ""
    assert sorted(folder.rglob("*")) == before


def test_there_are_enough():
    assert len(ODD) >= 80
