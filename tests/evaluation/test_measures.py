"""The commands ppl, judge, needle and calibration on a folder with a small LLaMA."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.cli.measures import app
from a3_hf.evaluation.measures.inputs import read_documents
from a3_hf.evaluation.reporting.results import read_results
from tests.conftest import tiny_model

WORDS = "w1,w2,w3"


@pytest.fixture(scope="module")
def texts(source, tmp_path_factory):
    """Documents of 20 words each, cut out of the source's training text."""
    words = (source / "train.txt").read_text().split()
    path = tmp_path_factory.mktemp("texts") / "documents.txt"
    path.write_text("\n<|end|>\n".join(" ".join(words[start : start + 20]) for start in range(0, 100, 20)))
    return path


@pytest.fixture
def run(source, texts):
    def invoke(*arguments):
        places = {"MODEL": str(source), "TEXT": str(texts)}
        words = [places.get(word, str(word)) for word in arguments]
        return CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})

    return invoke


def result_of(outcome, folder):
    assert outcome.exit_code == 0, outcome.output
    (result,) = read_results(folder)
    assert result["versions"]["torch"] and result["config"]["seed"] == 0
    return result


def test_ppl(run, source, texts, tmp_path):
    outcome = run(
        *("ppl", "MODEL", "TEXT", "--base", source, "--separator", "<|end|>", "--documents", "3"),
        *("--orders", "left_to_right,random,spans", "--span-length", "4", "--group-sizes", "1,2", "--num_orders", "2"),
        *("--max_length", "8,128", "--output", tmp_path / "new" / "ppl.json"),
    )
    result = result_of(outcome, tmp_path)
    assert result["kind"] == "ppl" and result["config"]["model"] == result["config"]["base"] == str(source)
    assert result["config"]["orders"] == ["left_to_right", "random", "spans"] and result["config"]["max_length"] == [
        8,
        128,
    ]
    assert result["config"]["text"] == str(texts)
    assert len(result["rows"]) == 2 * (1 + 3 * 2)
    assert {row["tokens"] for row in result["rows"]} == {60}
    assert [row["windows"] for row in result["rows"]] == [9] * 7 + [3] * 7
    assert "right_to_left" not in outcome.stdout and "3 documents" in outcome.stdout and "cost" in outcome.stdout
    ours = result["rows"][1]
    assert f"{ours['nats_per_token']:.4f}" in outcome.stdout and f"{ours['adaptation_cost']:.4f}" in outcome.stdout


def test_ppl_beyond_the_context(run, source, tmp_path):
    arguments = ("ppl", "MODEL", source / "train.txt", "--base", source, "--orders", "left_to_right")
    long = run(*arguments, "--max_length", "195")
    assert long.exit_code == 2 and "max_length=195 is above the model's context" in long.stderr
    scaling = ("--rope_scaling", '{"rope_type": "yarn", "factor": 2}')
    result = result_of(run(*arguments, "--max_length", "195", *scaling, "--output", tmp_path / "1.json"), tmp_path)
    assert result["config"]["rope_scaling"] == {"rope_type": "yarn", "factor": 2}
    assert all(row["windows"] == 1 and row["tokens"] == 195 for row in result["rows"])
    plain = tmp_path / "plain"
    short = ("--max_length", "100")
    unscaled = result_of(run(*arguments, *short, "--output", plain / "2.json"), plain)["rows"]
    scaled = tmp_path / "scaled"
    stretched = result_of(run(*arguments, *short, *scaling, "--output", scaled / "3.json"), scaled)["rows"]
    for before, after in zip(unscaled, stretched, strict=True):  # of the base and of the model
        assert abs(before["nats_per_token"] - after["nats_per_token"]) > 1e-4


def test_scaling_reaches_the_base_of_an_adapter(run, source, tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    model = tiny_model(num_hidden_layers=2)
    model.name_or_path = str(tmp_path / "base")
    adapted = attach(model, LoraArguments(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((source / name).read_bytes())
    words = ("needle", tmp_path / "adapter", "--lengths", "200", "--answers", WORDS, "--count", "1", "--depths", "0")
    assert run(*words).exit_code == 2
    outcome = run(*words, "--rope_scaling", '{"rope_type": "linear", "factor": 2}')
    assert outcome.exit_code == 0, outcome.output


def test_judge(run, source, tmp_path):
    outcome = run(
        *("judge", "MODEL", "TEXT", "--judge", source, "--separator", "<|end|>", "--prompt_tokens", "5"),
        *("--new_tokens", "8", "--steps", "2,8", "--criteria", "confidence,margin", "--count", "4"),
        *("--temperature", "0.7", "--output", tmp_path / "judge.json"),
    )
    result = result_of(outcome, tmp_path)
    assert result["kind"] == "judge" and result["config"]["judge"] == str(source)
    assert [row["passes"] for row in result["rows"]] == [None, *[8] * 3, *[32] * 3]
    assert all(row["judge_tokens"] == 32 for row in result["rows"])
    assert "reference" in outcome.stdout and "margin" in outcome.stdout and str(source) in outcome.stdout


def test_needle(run, texts, tmp_path):
    arguments = ("needle", "MODEL", "--lengths", "64,100", "--depths", "0,0.5,1", "--answers", WORDS, "--count", "3")
    result = result_of(run(*arguments, "--output", tmp_path / "needle.json"), tmp_path)
    assert result["kind"] == "needle" and result["config"]["haystack"] is None
    assert [(row["length"], row["depth"]) for row in result["rows"]] == [(n, d) for n in (64, 100) for d in (0, 0.5, 1)]
    outcome = run(*arguments, "--haystack", texts)
    assert outcome.exit_code == 0 and "depth 0.5" in outcome.stdout and "among 3 words" in outcome.stdout


def test_calibration(run, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = run(
        *("calibration", "MODEL", "TEXT", "--separator", "<|end|>", "--share", "0.3", "--shape", "spans"),
        *("--blank_length", "2", "--strategy", "dynamic", "--criterion", "entropy", "--tokens-per-step", "2"),
        *("--bins", "5", "--plot", tmp_path / "new" / "plot.png", "--output", tmp_path / "calibration.json"),
    )
    result = result_of(outcome, tmp_path)
    assert result["kind"] == "calibration" and result["config"]["strategy"] == "dynamic"
    assert result["config"]["tokens_per_step"] == 2 and "group_size" not in result["config"]
    assert [row["bin"] for row in result["rows"]] == [1, 2, 3, 4, 5, "all"]
    assert result["rows"][-1]["tokens"] == 30 and result["rows"][-1]["passes"] == 15
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"expected calibration error {result['rows'][-1]['expected_calibration_error']:.4f}" in outcome.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["ppl", "MODEL", "TEXT", "--orders", "spiral"],
            "'spiral': expected some of left_to_right",
        ),
        (["ppl", "MODEL", "TEXT", "--orders", "random,random"], "orders='random,random'"),
        (["ppl", "MODEL", "TEXT", "--group_sizes", "few"], "group_sizes='few': expected numbers"),
        (["ppl", "MODEL", "TEXT", "--group_sizes", "2,2"], "group_sizes='2,2': expected each number once"),
        (["ppl", "MODEL", "TEXT", "--batch_size", "0"], "Invalid value for '--batch-size'"),
        (["ppl", "MODEL", "TEXT", "--rope_scaling", "yarn"], "rope_scaling='yarn': expected JSON"),
        (["ppl", "MODEL", "TEXT", "--rope_scaling", '{"rope_type": "ntk", "factor": 2}'], "rope_type='ntk'"),
        (["ppl", "MODEL", "TEXT", "--output", "result.txt"], "output='result.txt': expected a file that ends in .json"),
        (["ppl", "MODEL", "TEXT", "--documents", "0"], "documents=0"),
        (["ppl", "MODEL", "TEXT", "--separator", "<|no|>"], "separator='<|no|>' is not in"),
        (["ppl", "MODEL", "no-such-file.txt"], "text='no-such-file.txt' can't be read"),
        (["ppl", "no-such-model", "TEXT"], "model='no-such-model': no such folder"),
        (["ppl", "MODEL", "TEXT", "--base", "no-such-base"], "base='no-such-base': no such folder"),
        (
            ["judge", "MODEL", "TEXT", "--judge", "no-such-judge", "--new_tokens", "64"],
            "judge='no-such-judge': no such folder",
        ),
        (
            ["judge", "MODEL", "TEXT", "--judge", "MODEL", "--steps", "5"],
            "steps=5: expected a divisor of new_tokens=64",
        ),
        (["judge", "MODEL", "TEXT", "--judge", "MODEL", "--criteria", "luck"], "criterion='luck': expected one of"),
        (["needle", "MODEL", "--depths", "deep"], "depths='deep'"),
        (["needle", "MODEL", "--lengths", "4096"], "lengths=4096 is above the model's context"),
        (["needle", "MODEL"], "lengths=256 is above the model's context"),
        (["needle", "MODEL", "--lengths", "100"], "answers holds 'dog' and 'ball', which have the same tokens"),
        (["needle", "MODEL", "--haystack", "no-such-hay.txt"], "haystack='no-such-hay.txt' can't be read"),
        (["calibration", "MODEL", "TEXT", "--shape", "round"], "shape='round': expected one of"),
        (["calibration", "MODEL", "TEXT", "--strategy", "refine"], "writes tokens several times"),
        (["calibration", "MODEL", "TEXT", "--group_size", "2", "--threshold", "0.5"], "no effect with strategy="),
        (["calibration", "MODEL", "TEXT", "--plot", "plot.svg"], "plot='plot.svg': expected a file that ends in .png"),
        (["calibration", "MODEL", "TEXT", "--max_length", "500"], "max_length=500 is above the model's context"),
    ],
)
def test_mistakes_are_said_in_a_line(run, arguments, message):
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert any(line.startswith("a3: ") for line in outcome.stderr.splitlines()) and message in outcome.stderr
    assert "Traceback" not in outcome.output


def test_a_base_that_is_no_llama(run, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    outcome = run("ppl", "MODEL", "TEXT", "--base", tmp_path)
    assert outcome.exit_code == 2 and "model type 'a3_llama': architecture 'llama' expects a LLaMA" in outcome.stderr


def test_a_tokenizer_without_bos(run, source, tmp_path):
    for path in source.iterdir():
        if path.is_file():  # other tests leave a folder there, of packed rows
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for words in (
        ("ppl", tmp_path, "TEXT"),
        ("calibration", tmp_path, "TEXT"),
        ("judge", tmp_path, "TEXT", "--judge", "MODEL"),
        ("needle", tmp_path, "--lengths", "100", "--answers", WORDS),
    ):
        outcome = run(*words)
        assert outcome.exit_code == 2 and "tokenizer has no BOS token" in outcome.stderr, outcome.output


def test_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" one\n--\n \n--\ntwo\n--\nthree é ", encoding="utf-8")
    assert read_documents(path, separator="--") == ["one", "two", "three é"]
    assert read_documents(path, separator="--", documents=2) == ["one", "two"]
    assert read_documents(path, separator="--", documents=-2) == ["two", "three é"]
    assert read_documents(path) == ["one\n--\n \n--\ntwo\n--\nthree é"]
    path.write_text(" \n ")
    with pytest.raises(ValueError, match="contains no text"):
        read_documents(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="can't be read"):
        read_documents(path)
    with pytest.raises(ValueError, match="separator='' is not in"):
        path.write_text("one")
        read_documents(path, separator="")
