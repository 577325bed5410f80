import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.cli import app
from a3_hf.orders import GroupOrder
from tests.conftest import tiny_model

WORDS = ["<s>", "</s>", "<unk>", *"the a dog cat ran sat home mat on was happy .".split()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    tiny_model(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1).save_pretrained(path)
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
    order = GroupOrder.scattered(torch.ones_like(ids), group_size=2, generator=[torch.Generator().manual_seed(3)])
    assert result.exit_code == 0, result.output
    assert f"log-likelihood {model.log_likelihood(ids, order.group_ids).sum():.4f} nats" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["infill", "MODEL", "no blank"], "no blank marker"),
        (["infill", "MODEL", "the <blank:3>", "--strategy", "luck"], "groupwise, dynamic"),
        (["infill", "MODEL", "the <blank:3>", "--tokens-per-step", "2"], "no meaning for strategy='groupwise'"),
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
