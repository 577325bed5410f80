import pytest

from a3_hf.data.arguments import DataArguments, SourceArguments
from a3_hf.training.arguments import A3TrainingArguments, ModelArguments
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.recipes import parse_recipe

STAGES = [{"name": "ar", "until": 0.2}, {"name": "expand", "until": 0.5, "group_size": [1, 4]}]
STAGES = [*STAGES, {"name": "permute", "group_size": 4}]
RECIPE = """
model_name_or_path: some/model
train_file: stories.txt
block_size: 64
max_steps: 20
curriculum:
  unit: fraction
  stages:
    - {name: ar, until: 0.2}
    - {name: expand, until: 0.5, group_size: [1, 4]}
    - {name: permute, group_size: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    def recipe(extra="", *, text=RECIPE):
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\n{text}\n{extra}\n", encoding="utf-8")
        return path

    return recipe


def test_a_recipe_is_a_complete_run(recipe):
    parsed = parse_recipe(recipe("learning_rate: 1e-4\nseed: 7\neval_strategy: no\nlr_scheduler_type: cosine"))
    assert parsed.model == ModelArguments(model_name_or_path="some/model")
    assert parsed.data == DataArguments(train_file="stories.txt", block_size=64)
    assert isinstance(parsed.training, A3TrainingArguments)
    assert (parsed.training.learning_rate, parsed.training.seed, parsed.training.max_steps) == (1e-4, 7, 20)
    assert parsed.training.eval_strategy == "no"
    assert parsed.training.lr_scheduler_type == "cosine"
    assert parsed.curriculum == Curriculum.from_config(STAGES, unit="fraction")


def test_defaults(recipe):
    training = parse_recipe(recipe()).training
    assert training.remove_unused_columns is False
    assert training.report_to in ([], ["none"])
    assert training.logging_steps == 10


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("2E-3", 2e-3), ("1.5e+1", 15.0), (".5", 0.5), ("3", 3.0), ("0.25", 0.25)],
)
def test_numbers_are_numbers(recipe, text, number):
    learning_rate = parse_recipe(recipe(f"learning_rate: {text}")).training.learning_rate
    assert isinstance(learning_rate, float)
    assert learning_rate == number


def test_the_command_line_wins(recipe):
    parsed = parse_recipe(
        recipe("learning_rate: 1e-4\nbf16: false\neval_on_start: true"),
        [
            *("--learning_rate", "1e-3", "--max_steps=30", "--model_name_or_path", "other", "--block-size", "32"),
            *("--eval_on_start", "false", "--max_train_rows", "5", "--document_boundary=bos"),
        ],
    )
    assert (parsed.training.learning_rate, parsed.training.max_steps) == (1e-3, 30)
    assert (parsed.model.model_name_or_path, parsed.data.block_size, parsed.data.max_train_rows) == ("other", 32, 5)
    assert parsed.training.eval_on_start is False
    assert parsed.data.document_boundary == "bos"
    assert parsed.training.output_dir.endswith("run")


def test_the_model_may_come_from_the_command_line(recipe):
    path = recipe(text=RECIPE.replace("model_name_or_path: some/model", ""))
    assert parse_recipe(path, ["--model_name_or_path", "m"]).model.model_name_or_path == "m"
    with pytest.raises(ValueError, match="required.*model_name_or_path"):
        parse_recipe(path)


def test_the_curriculum_may_come_from_the_command_line(recipe):
    curriculum = parse_recipe(recipe(), ["--curriculum", "{unit: steps, stages: [{name: permute, group_size: 2}]}"])
    expected = Curriculum.from_config([{"name": "permute", "group_size": 2}], unit="steps")
    assert curriculum.curriculum == expected


def test_a_curriculum_without_a_unit_counts_in_fractions(recipe):
    curriculum = "curriculum: {stages: [{name: ar, until: 0.5}, {name: permute, group_size: 4}]}"
    parsed = parse_recipe(recipe(text=RECIPE[: RECIPE.index("curriculum")] + curriculum))
    assert parsed.curriculum.unit == "fraction"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("learning_rat: 1.0", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("blocksize: 8", "unknown key 'blocksize'; did you mean 'block_size'"),
        ("xyzzy: 8", "unknown key 'xyzzy'$"),
        ("3: 8", "unknown key 3"),
        ('learning_rate: "3"', r"learning_rate: expected a number, got '3' \(str\)"),
        ('learning_rate: "1e-4"', r"learning_rate: expected a number, got '1e-4' \(str\)"),
        ("learning_rate: true", r"learning_rate: expected a number, got True \(bool\)"),
        ("learning_rate:", "learning_rate: expected a number, got nothing"),
        ("seed: 3.0", r"seed: expected an integer, got 3\.0 \(float\)"),
        ("seed: true", r"seed: expected an integer, got True \(bool\)"),
        ("max_train_rows: 1e3", r"max_train_rows: expected an integer or null, got 1000\.0 \(float\)"),
        ("eval_on_start: 1", r"eval_on_start: expected true or false or null, got 1 \(int\)"),
        ("eval_on_start: yes", r"eval_on_start: expected true or false or null, got 'yes' \(str\)"),
        ("validation_file: 3", r"validation_file: expected text or null, got 3 \(int\)"),
        ("attn_implementation: 3", r"attn_implementation: expected text, got 3 \(int\)"),
        ("dtype: float8", "dtype: expected one of 'float32', 'bfloat16', 'float16', got 'float8'"),
        ("document_boundary: none", "document_boundary: expected one of 'bos', 'eos', got 'none'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: expected one of 'linear', 'cosine'"),
        ("fsdp_config: [1]", "fsdp_config: expected a mapping or text or null"),
        ("remove_unused_columns: true", "remove_unused_columns=True"),
        ("max_steps: 21", "the key 'max_steps' comes twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "the key 'a' comes twice"),
        ("a: [", "config.yaml: not a recipe"),
        ("dataset_name: some/data", "expected exactly one of the two"),
        ("dataset_config_name: part", "dataset_config_name='part' has no effect without dataset_name"),
        ("validation_documents: -1", "validation_documents=-1"),
        ("validation_documents: 1\nvalidation_file: a.txt", "expected at most one of the two"),
        ("max_train_rows: 0", "max_train_rows=0: expected 1 or more"),
        ("max_eval_rows: 1", "max_eval_rows=1 has no effect without"),
        ('document_separator: ""', "document_separator=''"),
    ],
)
def test_bad_settings_are_named(recipe, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(extra))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learning_rate", "fast"], "learning_rate.*invalid float value: 'fast'"),
        (["--max_steps", "1.5"], "max_steps.*invalid int value: '1.5'"),
        (["--eval_on_start", "perhaps"], "eval_on_start"),
        (["--lr_scheduler_type=cosin"], "lr_scheduler_type.*invalid choice"),
        (["--document_boundary=none"], "document_boundary.*invalid choice"),
        (["--learning_rate"], "learning_rate.*expected one argument"),
        (["--learning_rat", "1"], "unknown setting '--learning_rat'; did you mean 'learning_rate'"),
        (["--learn", "1"], "unknown setting '--learn'"),
        (["-h"], "unknown setting '-h'"),
        (["surplus"], "unknown setting 'surplus'"),
        (["--block_size=1"], "block_size=1"),
        (["--remove_unused_columns", "true"], "remove_unused_columns=True"),
        (["--curriculum", "{unit: ["], "curriculum.*not YAML"),
        (["--curriculum", "ar"], "curriculum: expected a mapping"),
    ],
)
def test_bad_overrides_raise_and_do_not_exit(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(), overrides)


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ("", "curriculum is missing"),
        ("curriculum: [ar]", "curriculum: expected a mapping"),
        ("curriculum: {unit: steps}", "curriculum: stages is missing"),
        ("curriculum: {unit: epochs, stages: [{name: ar}]}", "unit='epochs'"),
        ("curriculum: {units: steps, stages: [{name: ar}]}", "curriculum: unknown key 'units'; did you mean 'unit'"),
        ("curriculum: {unit: steps, stages: [{name: xyzzy}]}", "xyzzy"),
    ],
)
def test_bad_curricula_are_named(recipe, curriculum, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(text=RECIPE[: RECIPE.index("curriculum")] + curriculum))


def test_block_size_is_at_least_two(recipe):
    with pytest.raises(ValueError, match="block_size=1"):
        parse_recipe(recipe(text=RECIPE.replace("block_size: 64", "block_size: 1")))


def test_the_file_itself(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml: no such recipe"):
        parse_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="can't be read as a recipe"):
        parse_recipe(tmp_path)
    for name, content in (("empty", b""), ("list", b"- a\n"), ("latin", b"\xff: 1\n")):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.yaml: .*recipe"):
            parse_recipe(path)


SOURCES = RECIPE.replace(
    "train_file: stories.txt", "sources:\n  web: {dataset_name: some/data, weight: 2}\n  own: {path: a.txt}"
)


def test_sources_are_checked_and_their_weights_are_numbers(recipe):
    data = parse_recipe(recipe("num_shards: 8\ndocuments: isolated", text=SOURCES)).data
    assert data.sources == {
        "web": SourceArguments(dataset_name="some/data", weight=2.0),
        "own": SourceArguments(path="a.txt"),
    }
    assert (data.num_shards, data.documents) == (8, "isolated")


def test_the_command_line_replaces_a_source(recipe):
    overrides = ["--sources.web.path", "b.jsonl", "--sources.own.weight=0.25", "--sources.own.text_column", "3"]
    data = parse_recipe(recipe(text=SOURCES), [*overrides, "--block_size", "16"]).data
    assert data.sources == {
        "web": SourceArguments(path="b.jsonl", weight=2.0),
        "own": SourceArguments(path="a.txt", weight=0.25, text_column="3"),
    }
    assert data.block_size == 16
    data = parse_recipe(recipe(text=SOURCES), ["--sources.own.dataset_name=other/data"]).data
    assert data.sources["own"] == SourceArguments(dataset_name="other/data")
    data = parse_recipe(recipe(text=SOURCES), ["--sources", "{one: {path: c.txt}}"]).data
    assert data.sources == {"one": SourceArguments(path="c.txt")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--sources.wob.path", "b"],
            "unknown setting '--sources.wob.path': the recipe has no such source; its.*web, own",
        ),
        (["--sources.web.paht", "b"], "unknown setting '--sources.web.paht'; did you mean 'path'"),
        (["--sources.web.path"], "--sources.web.path: expected one argument"),
        (["--sources.web.weight", "much"], "sources: web: weight: expected a number, got 'much'"),
        (["--sources.web.weight", "0"], "sources: web: weight=0.0: expected a number above 0"),
        (["--sources", "[a]"], "sources: expected a mapping"),
    ],
)
def test_bad_overrides_of_sources_are_named(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(text=SOURCES), overrides)
    with pytest.raises(ValueError, match=r"the recipe has no such source; it has none"):
        parse_recipe(recipe(), ["--sources.web.path", "b"])


@pytest.mark.parametrize(
    ("sources", "extra", "message"),
    [
        ("[a, b]", "", "sources: expected a mapping or null, got"),
        ("{}", "", "sources: expected a mapping"),
        ("{a: b.txt}", "", "sources: a: expected a mapping of path"),
        ("{a/b: {path: b.txt}}", "", "sources: expected names of letters"),
        ("{a: {path: b.txt, weigth: 1}}", "", "sources: a: unknown key 'weigth'; did you mean 'weight'"),
        ("{a: {path: 3}}", "", "sources: a: path: expected text or null, got 3"),
        ("{a: {weight: 1}}", "", "sources: a: path=None, dataset_name=None: expected exactly one of the two"),
        (
            "{a: {path: b, dataset_name: c}}",
            "",
            "sources: a: path='b', dataset_name='c': expected exactly one of the two",
        ),
        ("{a: {path: b, dataset_config_name: c}}", "", "sources: a: dataset_config_name='c' has no effect"),
        ("{a: {path: b, weight: -1}}", "", "sources: a: weight=-1.0"),
        ("{a: {path: b}}", "train_file: c", "train_file='c' and sources: expected only one"),
        ("{a: {path: b}}", "max_train_rows: 3", "max_train_rows=3 has no effect with sources"),
        ("{a: {path: b}}", "shuffle_documents: true", "shuffle_documents=True has no effect with sources"),
        ("{a: {path: b}}", "num_shards: 0", "num_shards=0: expected 1 or more"),
        ("null", "train_file: c\nnum_shards: 4", "num_shards=4 has no effect without sources"),
        ("{a: {path: b}}", "documents: apart", "documents: expected one of 'joined', 'isolated'"),
    ],
)
def test_bad_sources_are_named(recipe, sources, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(extra, text=RECIPE.replace("train_file: stories.txt", f"sources: {sources}")))


def test_direct_construction_refuses_too():
    with pytest.raises(ValueError, match="remove_unused_columns"):
        A3TrainingArguments(remove_unused_columns=True)
    with pytest.raises(ValueError, match="train_file=None, dataset_name=None"):
        DataArguments()
    with pytest.raises(ValueError, match="document_boundary='none'"):
        DataArguments(train_file="a.txt", document_boundary="none")


def test_null_unsets_and_settings_inside_others_are_named(recipe):
    path = recipe("lora: {r: 4, rows: slots}\nmax_train_rows: 5")
    words = ["--lora.r", "8", "--lora.target", "[q_proj, o_proj]", "--max-train-rows=null", "--lora.rows=null"]
    changed = parse_recipe(path, words)
    assert (changed.lora.r, changed.lora.rows, changed.lora.target) == (8, "all", ["q_proj", "o_proj"])
    assert (changed.data.max_train_rows, parse_recipe(path).data.max_train_rows) == (None, 5)
    with pytest.raises(ValueError, match="dtype: expected one of .* got nothing"):
        parse_recipe(path, ["--dtype", "null"])
    assert parse_recipe(path, ["--lora", "null"]).lora is None
    assert parse_recipe(path, ["--lora", "null", "--lora.r", "2"]).lora.r == 2
    assert parse_recipe(path, ["--lora", "{r: 5}", "--lora.alpha", "3"]).lora.alpha == 3.0
    assert parse_recipe(path, ["--lora.r", "2", "--lora", "{r: 5}"]).lora.r == 5
    assert parse_recipe(recipe(), ["--lora.r", "2"]).lora.r == 2


def test_names_take_hyphens(recipe):
    path = recipe()
    one = parse_recipe(path, ["--max-steps", "7", "--lr-scheduler-type=linear", "--lora.rows", "slots"])
    other = parse_recipe(path, ["--max_steps", "7", "--lr_scheduler_type=linear", "--lora.rows", "slots"])
    assert one.training.max_steps == other.training.max_steps == 7
    assert one.training.lr_scheduler_type == other.training.lr_scheduler_type == "linear"


def test_a_sources_own_name_keeps_its_hyphens(recipe):
    path = recipe(text=SOURCES.replace("own:", "my-web:"))
    data = parse_recipe(path, ["--sources.my-web.text-column", "body", "--sources.my-web.weight", "null"]).data
    assert (data.sources["my-web"].text_column, data.sources["my-web"].weight) == ("body", 1.0)
