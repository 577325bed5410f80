import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.cli import app
from a3_hf.cli.common import report_user_errors
from a3_hf.models.a3_llama.orders import GroupOrder
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ["<s>", "</s>", "<unk>", *"the a dog cat ran sat home mat on was happy .".split()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    tiny_model(seed=2, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1).save_pretrained(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_infill(checkpoint):
    result = run("infill", checkpoint, "the dog <blank:2> home .", "--strategy", "dynamic", "--criterion", "entropy")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the dog ") and result.stdout.rstrip().endswith(" home .")
    assert "2 tokens in 2 passes" in result.stderr
    assert "4 tokens in 1 passes" in run("infill", checkpoint, "the <blank:4> .", "--group-size", "4").stderr


def test_generate(checkpoint):
    result = run("generate", checkpoint, "the dog", "--max-new-tokens", "6", "--group-size", "2")
    assert result.exit_code == 0 and result.stdout.startswith("the dog")
    assert "6 tokens in 3 passes" in result.stderr
    sampled = [
        run("generate", checkpoint, "the dog", "--do-sample", "--seed", seed, "--max-new-tokens", "20").stdout
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_score(checkpoint):
    result = run("score", checkpoint, "the dog ran home .", "--order", "random", "--group-size", "2", "--seed", "3")
    model = A3LlamaForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([[WORDS.index(word) for word in "<s> the dog ran home .".split()]])
    order = GroupOrder.scattered(
        torch.ones_like(ids), group_size=2, generator=[torch.Generator().manual_seed(3_000_009)]
    )
    assert result.exit_code == 0, result.output
    assert f"log-likelihood {model.log_likelihood(ids, order.group_ids).sum():.4f} nats" in result.stdout


def test_pages_and_the_animation(checkpoint, tmp_path):
    page = tmp_path / "replay.html"
    text = "the dog <blank:auto> home <blank:1..2> ."
    result = run("infill", checkpoint, text, "--auto-lengths", "1..3", "--html", str(page), "--show")
    assert result.exit_code == 0, result.output
    assert " home " in result.stdout and "blank 1: likeliest lengths" in result.stderr
    assert "step 1 of" in page.read_text() or "steps" in page.read_text()
    result = run("generate", checkpoint, "the dog", "--max-new-tokens", "6", "--html", str(page), "--order", "random")
    assert result.exit_code == 0 and "the" in page.read_text()
    page = tmp_path / "score.html"
    result = run("score", checkpoint, "the dog ran home .", "--html", str(page), "--against", "right_to_left")
    assert result.exit_code == 0 and "left_to_right" in page.read_text() and "right_to_left" in page.read_text()


def test_score_over_several_orders(checkpoint):
    result = run("score", checkpoint, "the dog ran home .", "--order", "random", "--num-orders", "4")
    assert result.exit_code == 0 and "over 4 orders" in result.stdout


def test_generate_stops_at_the_end_of_text(checkpoint, tmp_path):
    model = A3LlamaForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([[0, 3]])
    second = int(model.generate_any_order(ids, max_new_tokens=2).sequences[0, 3])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.eos_token = WORDS[second]
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    result = run("generate", str(tmp_path), "the", "--max-new-tokens", "9")
    assert result.exit_code == 0 and f"{1 + (second != int(ids[0, 1]))} tokens in" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["infill", "MODEL", "no blank"], "no blank marker"),
        (["infill", "MODEL", "the <blank:3>", "--strategy", "luck"], "groupwise, dynamic"),
        (["infill", "MODEL", "the <blank:3>", "--tokens-per-step", "2"], "no effect with strategy='groupwise'"),
        (["infill", "MODEL", "the <blank:auto>", "--auto-lengths", "few"], "auto_lengths='few': expected LEAST..MOST"),
        (["infill", "MODEL", "the <blank:auto>", "--auto-lengths", "9..2"], "the range 9..2"),
        (["infill", "MODEL", "the <blank:2>", "--html", "no/such/folder.html"], "html='no/such/folder.html'"),
        (["score", "MODEL", "the dog", "--num-orders", "3"], "num_orders=3"),
        (["generate", "MODEL", "the", "--max-new-tokens", "500"], "more than the model's context"),
        (["score", "MODEL", ""], "text is empty"),
        (["score", "MODEL", "the dog", "--order", "spiral"], "order='spiral'"),
        (["adapt", "no-such-recipe.yaml"], "no-such-recipe.yaml"),
        (["infill", "no-such-model", "the <blank:1>"], "no-such-model"),
    ],
)
def test_mistakes_are_said_in_a_line(checkpoint, arguments, message):
    result = run(*[checkpoint if argument == "MODEL" else argument for argument in arguments])
    assert result.exit_code == 2
    assert any(line.startswith("a3: ") for line in result.stderr.splitlines()) and message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["infill", "--help"], ["infill"], ["nonsense"]])
def test_help_waits_for_no_library(arguments):
    """The console script, in a process of its own: neither torch nor transformers is imported. `make bench-start` times it."""
    code = (
        "import sys, a3_command\ntry: a3_command.main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}  # where `make test-other-kernels` imports torch
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import a3_hf, transformers as t",
        "import transformers as t, a3_hf",
        "from transformers import AutoModelForCausalLM; import transformers as t, a3_hf",
        "import a3_command, a3_hf, transformers as t; from a3_hf import A3LlamaForCausalLM",
        "import a3_command, transformers as t, a3_hf.cli.common as common; common.report_user_errors(lambda: None)",
    ],
)
def test_models_are_registered_in_any_order_of_imports(checkpoint, first):
    code = (
        f"{first}\nmodel = t.AutoModelForCausalLM.from_pretrained({checkpoint!r})\n"
        "from a3_hf import GroupOrder, Curriculum, A3LlamaForCausalLM\nprint(type(model) is A3LlamaForCausalLM)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("code", [0, 130, 143])
def test_what_a_run_returns_is_the_exit_code(monkeypatch, code):
    monkeypatch.setattr("a3_hf.training.run.run", lambda recipe: code)
    assert run("adapt", str(ROOT / "recipes" / "demo" / "config.yaml")).exit_code == code


def test_version():
    assert run("--version").stdout == f"a3 {version('a3-hf')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["infill", "MODEL", "the <blank:2> .", "--group_size", "2", "--do_sample", "--top_k=3"],
        ["infill", "MODEL", "the <blank:auto> .", "--auto_lengths", "1..2", "--slot_start", "query_embed"],
        ["generate", "MODEL", "the", "--max_new_tokens", "3", "--draft_tokens=2", "--strategy", "speculative"],
        ["score", "MODEL", "the dog", "--num_orders=2", "--order", "random"],
    ],
)
def test_options_take_hyphens_and_underscores(checkpoint, arguments):
    words = [checkpoint if word == "MODEL" else word for word in arguments]
    spelled = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    one, other = run(*words, "--seed", "3"), run(*spelled, "--seed", "3")
    assert one.exit_code == other.exit_code == 0, one.output
    assert one.stdout == other.stdout


def test_the_prompt_is_shown_as_it_was_given(checkpoint):
    """In `generate` as in `infill`, white space and unknown words included."""
    prompt = "the  dog zebra\n"
    assert run("generate", checkpoint, prompt, "--max-new-tokens", "3").stdout.startswith(prompt)
    assert run("infill", checkpoint, f"{prompt}<blank:3>").stdout.startswith(prompt)


def test_warnings_to_developers_are_not_shown(checkpoint, recwarn):
    report_user_errors(lambda: warnings.warn("x is deprecated", FutureWarning, stacklevel=1))
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
