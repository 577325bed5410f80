"""What rots: the direction of imports, the README's commands and tree, names that outside checks rely on."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import a3_hf
from a3_hf.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "a3_hf"
# Each folder (or file at the top) may import from itself and from these; a folder's name stands for what is in it, too.
MAY_IMPORT = {
    "models.a3_llama": "",
    "models.decoupled_rope_llama": "models.a3_llama",
    "models.masked_diffusion_llama": "models.a3_llama",
    "models.a3_draft_head": "models.a3_llama",
    "models": "",
    "settings": "",
    "devices": "",
    "adapters": "models settings",
    "data": "settings",
    "training": "models adapters data settings devices",
    "evaluation": "models adapters data settings training",
    "experiments": "models adapters data settings training evaluation",
    "visualization": "models",
    "serving": "models visualization",
    "engines.vllm": "models adapters serving registration",
    "engines": "",
    "versions": "",
    "registration": "models adapters training versions",
    "cli": "models adapters data settings devices training evaluation experiments visualization serving registration versions",
}
# Where a library may be imported, by the start of a module's name.
ONLY_IN = {
    "typer": "cli",
    "matplotlib": ("training.loss_report", "evaluation.reporting.plots"),
    "lm_eval": "evaluation",
    "fastapi": ("serving", "engines"),
    "starlette": ("serving", "engines"),
    "vllm": "engines.vllm",
    "uvicorn": "serving",
    "prometheus_client": "serving",
    "pydantic": ("serving", "engines"),
}
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and libraries, that a module imports anywhere, functions included."""
    inside, outside = set(), set()
    folder = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            inside |= {f"{folder}.{node.module or alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "a3_hf":
            inside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("a3_hf."):
            inside.add(node.module.removeprefix("a3_hf."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports from another folder are absolute"
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


def is_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__", "__main__"}))
def test_imports_run_one_way(name):
    inside, outside = imports(name)
    own = next(folder for folder in MAY_IMPORT if is_in(name, folder))
    allowed = [own, *MAY_IMPORT[own].split()]
    wrong = {other for other in inside if not any(is_in(other, folder) for folder in allowed)}
    assert not wrong, f"{name} imports {wrong}; {own} may import from {allowed}"
    for library, places in ONLY_IN.items():
        assert library not in outside or name.startswith(places), f"{name} imports {library}"
    if own == "models.a3_llama":  # a checkpoint carries these files along
        # huggingface_hub and safetensors come with every transformers
        assert outside <= {"torch", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}


def test_every_folder_of_the_package_is_one():
    assert {path.parent for path in MODULES.values()} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_tests_mirror_the_package():
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    assert folders >= {"models/a3_llama", "data", "training", "evaluation"}
    assert not [folder for folder in folders if not (PACKAGE / folder / "__init__.py").is_file()]


def test_modeling_draws_nothing_at_random_and_generation_does_not_know_it():
    source = MODULES["models.a3_llama.modeling_a3_llama"].read_text()
    assert not re.search(r"torch\.(rand|randn|randint|randperm|multinomial|bernoulli)\b", source)
    assert "models.a3_llama.modeling_a3_llama" not in imports("models.a3_llama.generation")[0]


def test_contract_names():
    for name in (
        "A3LlamaConfig A3LlamaModel A3LlamaForCausalLM A3GenerationConfig GroupOrder Curriculum CurriculumCallback A3Trainer"
    ).split():
        assert name in a3_hf.__all__ and getattr(a3_hf, name).__doc__
    for method in ("generate_any_order", "infill", "log_likelihood", "generate", "forward"):
        assert callable(getattr(a3_hf.A3LlamaForCausalLM, method))


def test_the_readmes_tree_names_what_exists():
    tree = (ROOT / "README.md").read_text().split("## Layout")[1]
    for name in re.findall(r"^\s*([\w/]+/)\s", tree, re.MULTILINE):
        assert list(ROOT.rglob(name.rstrip("/"))), f"README's tree names {name}, which does not exist"
    for folder in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        assert re.search(rf"^\s*{folder}/\s+\S+", tree, re.MULTILINE), f"README's tree lacks {folder}"


def commands() -> list[str]:
    texts = [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(path for pattern in ("docs/*.md", "recipes/*/README.md") for path in sorted(ROOT.glob(pattern))),
    ]
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
    known = {"git", "cd", "make", "a3", "python", "pip", "accelerate", "lm_eval", "source", "hf"}
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


@pytest.mark.parametrize("command", ["adapt", "infill", "generate", "score", "merge", "export", "eval", "report"])
def test_help_names_every_command(command):
    assert command in CliRunner().invoke(app, ["--help"]).output


def test_importing_is_all_it_takes_to_register():
    code = "import a3_hf, transformers as t; print(t.AutoConfig.for_model('a3_llama').__class__.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "A3LlamaConfig", done.stderr


def test_no_machine_paths_or_hosts():
    # Its own folders: beside them may lie a .venv or the runs of recipes, which are full of the machine's paths.
    folders = ("a3_hf", "accelerate_configs", "eval", "examples", "recipes", "scripts", "tests", "docs")
    paths = [
        *ROOT.glob("*.*"),
        *ROOT.glob(".github/**/*.*"),
        *ROOT.glob(".*.yaml"),
        *(path for folder in folders for path in (ROOT / folder).rglob("*.*")),
    ]
    texts = [
        path
        for path in paths
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".cff", ".ipynb"} and path.is_file()
    ]
    assert len(texts) > 150
    for path in texts:
        if path != Path(__file__):
            assert not re.search(
                r"/work/|/root/|/home/|/tmp/|https?://(?!arxiv\.org|huggingface\.co|127\.0\.0\.1|localhost|\{)",
                path.read_text(),
            ), path


def test_ruff_has_one_version():
    (locked,) = re.findall(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == 2 and all(hook["additional_dependencies"] == [f"ruff=={locked}"] for hook in hooks)


def test_workflows_run_what_ci_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": "bash .ci/run"} in jobs["test"]["steps"]
    built = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["build"]["steps"]
    assert any("python -m build" in step.get("run", "") for step in built)


def test_the_citation_names_the_software_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    urls = {reference["url"] for reference in citation["references"]}
    assert (
        urls
        == {"https://arxiv.org/abs/2601.13228", "https://arxiv.org/abs/2602.16092"}
        == set(project["urls"].values())
    )
