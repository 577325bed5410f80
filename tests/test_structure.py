"""What rots: the direction of imports, the README's commands and tree, names that outside checks rely on."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import a3_hf
from a3_hf.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "a3_hf"
# Each file may import from those that stand before it, in its own line excepted.
LAYERS = [
    {"orders", "masks", "decoding", "configuration_a3_llama", "rendering", "templates", "cache", "caching", "cpu"}
    | {"inputs", "rope", "chunked_loss", "plateaus", "throughput", "checkpoints", "configuration_decoupled_rope_llama"}
    | {"configuration_masked_diffusion_llama", "corruption", "loading", "checking", "versions", "files", "locking"}
    | {"places", "outputs", "training_fields", "even_rows"},
    {"mixtures"},
    {"stages"},
    {"curriculum", "auxiliary", "likelihood", "generation_config", "lengths", "scoring"},
    {"canvas", "observers", "diffusion_likelihood"},
    {"processors"},
    {"strategies"},
    {"generation"},
    {"infilling", "decoupled_generation"},
    {"modeling_a3_llama", "unmasking"},
    {"modeling_decoupled_rope_llama", "modeling_masked_diffusion_llama"},
    {"architectures", "base_trainer", "callbacks", "pipeline"},
    {"trainer", "diffusion_trainer"},
    {"arguments"},
    {"recipes"},
    {"data", "adapters", "record", "plot"},
    {"streaming", "plan", "registration"},
    {"settings"},
    {"train", "commands"},
    {"evaluation"},
    {"experiments"},
    {"cli"},
    {"__init__", "__main__"},
]
# The same within each folder, whose files may also import from those of the layers before it.
FOLDERS = {
    "evaluation": [
        {"requests", "results", "identity", "runs", "speed", "running_code", "running_text", "published", "__init__"},
        {"batched", "sources", "drawing"},
        {"harness", "tasks"},
        {"causal", "perplexity", "judged", "needle", "calibration"},
        {"measure", "report"},
        {"command"},
    ],
    "experiments": [
        {"trained", "starts", "tables", "__init__"},
        {"subjects", "drawing"},
        {"losses", "infilling", "samples", "presenting"},
        {"attention", "decoding", "grid"},
        {"runner"},
    ],
}
PURE = {"orders", "masks", "decoding"}
FLAT = {
    "outputs",
    "configuration_decoupled_rope_llama",
    "configuration_masked_diffusion_llama",
    "corruption",
    "decoupled_generation",
    "diffusion_likelihood",
    "modeling_decoupled_rope_llama",
    "modeling_masked_diffusion_llama",
    "unmasking",
    "chunked_loss",
    "configuration_a3_llama",
    "modeling_a3_llama",
    "generation_config",
    "cache",
    "caching",
    "cpu",
    "canvas",
    "observers",
    "processors",
    "strategies",
    "generation",
    "infilling",
    "templates",
    "lengths",
    "scoring",
    "likelihood",
    "loading",
    "masks",
    "inputs",
    "rope",
    "orders",
    "decoding",
    "pipeline",
}


def imports(name: str) -> tuple[set[str], set[str]]:
    """Modules of the package (by relative import) and outside it that a file imports anywhere, functions included."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is None:
            inside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            inside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            inside |= {f"..{alias.name}" for alias in node.names} if node.module is None else {f"..{node.module}"}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


def test_every_folder_of_the_package_is_installed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert folders <= set(packages)


def test_every_file_has_a_layer():
    files = {path.stem for path in PACKAGE.glob("*.py")} | set(FOLDERS)
    assert sorted(files) == sorted(set().union(*LAYERS))
    for folder, layers in FOLDERS.items():
        files = {path.stem for path in (PACKAGE / folder).glob("*.py")}
        assert sorted(files) == sorted(set().union(*layers))


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, layers in FOLDERS.items() for name in sorted(set().union(*layers))]
)
def test_imports_inside_a_folder_run_one_way(folder, name):
    inside, outside = imports(f"{folder}/{name}")
    depth = next(index for index, layer in enumerate(FOLDERS[folder]) if name in layer)
    below = set().union(*LAYERS[: LAYERS.index({folder})])
    inside = {f"..{other.removeprefix('..').split('.')[0]}" if other.startswith("..") else other for other in inside}
    allowed = set().union(*FOLDERS[folder][:depth]) | {f"..{other}" for other in below}
    assert inside <= allowed, f"{folder}/{name} imports {inside - allowed}, which stand beside or above it"
    assert "a3_hf" not in outside


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS) - set(FOLDERS)))
def test_imports_run_one_way(name):
    inside, outside = imports(name)
    depth = next(index for index, layer in enumerate(LAYERS) if name in layer)
    allowed = set().union(*LAYERS[:depth])
    assert inside <= allowed, f"{name} imports {inside - allowed}, which stand beside or above it"
    assert "a3_hf" not in outside, "relative imports only: a checkpoint carries these files along"
    if name in PURE:
        assert not outside & {"transformers", "accelerate", "datasets", "peft"}
    if name in FLAT:
        assert inside <= FLAT, "a checkpoint with its own code carries the model's files only"


def test_modeling_draws_nothing_at_random_and_generation_does_not_know_it():
    assert not re.search(r"torch\.(rand|randn|randint|randperm|multinomial|bernoulli)\b", read("modeling_a3_llama"))
    assert "modeling_a3_llama" not in imports("generation")[0]
    assert not imports("cli")[0] & {"decoding", "masks"}


def read(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text()


def test_contract_names():
    for name in (
        "A3LlamaConfig A3LlamaModel A3LlamaForCausalLM A3GenerationConfig GroupOrder Curriculum CurriculumCallback A3Trainer"
    ).split():
        assert name in a3_hf.__all__ and getattr(a3_hf, name).__doc__
    for method in ("generate_any_order", "infill", "log_likelihood", "generate", "forward"):
        assert callable(getattr(a3_hf.A3LlamaForCausalLM, method))


def test_the_readmes_tree_names_every_file_with_its_phrase():
    readme = (ROOT / "README.md").read_text()
    for path in sorted(PACKAGE.rglob("*.py")):
        assert re.search(rf"^\s*{re.escape(path.name)}\s+\S+", readme, re.MULTILINE), f"README's tree lacks {path.name}"
    for name in re.findall(r"^\s{2,4}(\w+\.py)\s", readme, re.MULTILINE):
        assert list(ROOT.glob(f"*/**/{name}")), f"README's tree names {name}, which does not exist"


def commands() -> list[str]:
    texts = [ROOT / "README.md", *sorted(ROOT.glob("recipes/*/README.md"))]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text.read_text(), re.DOTALL)]
    return sorted(
        {line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()}
    )


def test_readmes_have_commands():
    assert any(command.startswith("make demo") for command in commands())
    assert any(command.startswith("a3 adapt") for command in commands())


@pytest.mark.parametrize("command", commands())
def test_readme_commands_exist(command):
    """Each command's program, subcommand, options and files of the repository exist."""
    words = shlex.split(command, comments=True)
    if not words:
        return
    known = {"git", "cd", "make", "a3", "python", "pip", "accelerate", "lm_eval", "source"}
    assert words[0].split("/")[-1] in known, f"who runs {command!r}?"
    for word in words:
        if word.split("/")[0] in ("recipes", "accelerate_configs", "eval", "examples", "scripts"):
            assert (ROOT / word).exists(), f"{command!r} names {word}, which does not exist"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if "a3_hf" in words:
        words = ["a3", *words[words.index("a3_hf") + 1 :]]
    if words[0] == "a3":
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
        assert shown.exit_code == 0, f"a3 {words[1]} does not exist"
        if words[1] not in ("adapt", "eval"):  # adapt takes the recipe's own keys, eval those of lm-eval
            for option in (word for word in words[2:] if word.startswith("--")):
                assert option.split("=")[0] in shown.output, f"{command!r}: no such option"


@pytest.mark.parametrize("command", ["adapt", "infill", "generate", "score", "merge", "eval", "report"])
def test_help_names_every_command(command):
    assert command in CliRunner().invoke(app, ["--help"]).output


def test_importing_is_all_it_takes_to_register():
    code = "import a3_hf, transformers as t; print(t.AutoConfig.for_model('a3_llama').__class__.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "A3LlamaConfig", done.stderr


def test_no_machine_paths_or_hosts():
    # Its own folders: beside them may lie a .venv or the runs of recipes, which are full of the machine's paths.
    folders = ("a3_hf", "accelerate_configs", "eval", "examples", "recipes", "scripts", "tests", "docs")
    paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    texts = [path for path in paths if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh"} and path.is_file()]
    assert len(texts) > 150
    for path in texts:
        if path != Path(__file__):
            assert not re.search(
                r"/work/|/root/|/home/|/tmp/|https?://(?!arxiv\.org|huggingface\.co)", path.read_text()
            ), path
