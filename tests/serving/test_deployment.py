"""docs/serving.md and recipes/serving say what the server has: options, fields, metrics, ports; their requests get answers."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from a3_hf.cli import app

pytest.importorskip("fastapi")

from a3_hf.serving.metrics import Metrics
from a3_hf.serving.schemas import ChatRequest, CompletionRequest, InfillRequest, ScoreRequest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "serving"
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
PROMETHEUS = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
SERVER = COMPOSE["services"]["a3"]


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", text))


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def instruction(name: str) -> str:
    return [rest for key, rest in instructions() if key == name][-1]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def openai_fields() -> tuple[set[str], set[str]]:
    """OpenAI's fields of completions and of chat."""
    pytest.importorskip("openai")
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    return tuple(set(one.CompletionCreateParamsBase.__annotations__) | {"stream"} for one in (completion, chat))


def test_options_exist():
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).output
    known = set(re.findall(r"--[a-z][a-z-]*", shown))
    known |= set(re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / "eval/bench_serve.py").read_text()))  # of its "Load"
    runs = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("docker run")]
    words = [*SERVER["command"], *json.loads(instruction("CMD"))]
    words += [word for line in runs for word in shlex.split(line.split(" a3-serve", 1)[1])]
    found = re.findall(r"(?<![-\w])--[a-z][a-z-]*", PAGE) + [word for word in words if word.startswith("--")]
    assert len(runs) == 2 and {"--host", "--drain-seconds", "--max-queue"} <= set(found)
    assert set(found) <= known


def test_tables_of_fields():
    completion, chat = openai_fields()
    mine = {name for cells in rows("Fields beyond OpenAI's") for name in named(cells[0])}
    assert mine == set(CompletionRequest.model_fields) - completion
    differ = {name for cells in rows("OpenAI's fields that differ") for name in named(cells[0])}
    known = set(CompletionRequest.model_fields) & completion | set(ChatRequest.model_fields) & chat
    assert {"suffix", "seed", "presence_penalty", "messages"} <= differ <= known
    assert set(CompletionRequest.model_fields) | set(ChatRequest.model_fields) <= named(PAGE) | {"stream"}
    refused = named(section("OpenAI's fields that differ").split("All other fields")[1].split("…")[0])
    assert refused and refused <= chat - set(ChatRequest.model_fields)


def test_other_fields():
    text = section("Scores")
    fields = named(text.split("Its fields are")[1].split(".")[0])
    assert fields == set(ScoreRequest.model_fields) - {"model"}
    infill = section("Editors: llama.cpp's `/infill`")
    taken = named(infill.split("server:")[1].split(".")[0]) | named(
        infill.split("own cache and sampler (")[1].split(")")[0]
    )
    assert len(taken) >= 7 and taken <= set(InfillRequest.model_fields)
    assert (
        "lengths up to 16" in InfillRequest.model_fields["n_predict"].description.lower()
        and "up to 16 tokens" in infill
    )


def test_metrics():
    families = list(Metrics().registry.collect())
    known = {f"{one.name}_total" if one.type == "counter" else one.name for one in families}
    assert known == {name for cells in rows("Operation") for name in named(cells[0])}


def test_python_of_the_page_runs(live, capsys):
    pytest.importorskip("openai")
    scope: dict = {}
    for block in blocks(PAGE, "py"):
        block = block.replace("http://127.0.0.1:8000", live.url).replace("smollm2-135m", "tiny")
        exec(compile(block, "docs/serving.md", "exec"), scope)
    assert scope["client"].base_url.port and capsys.readouterr().out.count("\n") >= 9


def test_requests_of_the_pages_are_answered(live):
    lines = [line for text in (PAGE, README) for block in blocks(text, "sh") for line in block.splitlines()]
    requests = [shlex.split(line) for line in lines if line.startswith("curl")]
    assert len(requests) == 3
    for words in requests:
        path = words[1].removeprefix("http://127.0.0.1:8000")
        response = live.client.post(path, content=option(words, "-d"), headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert named(section("Scores").split("The answer has")[1]) <= set(answer) or path != "/v1/score"


def test_events_of_a_stream(live):
    body = {"prompt": "The <blank:2> home", "blanks": True, "stream": True, "commits": True, "logprobs": 1, "seed": 1}
    lines = live.post("/v1/completions", **body).text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    places = {"first event": choices[:1], "each event": choices[1:-1], "last event": choices[-1:]}
    table = rows("Streams")
    assert {when for _, when, _ in table} == set(places)
    for name, when, content in table:
        (field,) = named(name)
        assert all(field in choice for choice in places[when]), field
        if field == "commits":
            assert named(content) == set(places[when][0]["commits"][0])


def test_the_dockerfile():
    names = [key for key, _ in instructions()]
    assert names[:2] == ["ARG", "FROM"] and instruction("FROM") == "${BASE}"
    assert json.loads(instruction("ENTRYPOINT")) == ["a3", "serve"] and instruction("STOPSIGNAL") == "SIGTERM"
    assert instruction("USER") not in ("root", "0")
    for sources in (rest.split()[:-1] for key, rest in instructions() if key == "COPY"):
        for source in sources:
            assert (ROOT / source).exists(), source
    runs = [rest for key, rest in instructions() if key == "RUN"]
    (torch,) = (number for number, rest in enumerate(runs) if "torch==" in rest)
    (package,) = (number for number, rest in enumerate(runs) if ".[serve]" in rest)
    assert torch < package
    words = json.loads(instruction("CMD"))
    assert option(words, "--host") == "0.0.0.0"
    check = json.loads(instruction("HEALTHCHECK").split("CMD ", 1)[1])
    assert check[:2] == ["python", "-c"] and f"http://127.0.0.1:{option(words, '--port')}/health" in check[2]
    compile(check[2], "HEALTHCHECK", "exec")
    for name in re.findall(r"--build-arg (\w+)=", README):
        assert ("ARG", name) in [(key, rest.split("=")[0]) for key, rest in instructions()]


def test_the_health_check_asks_a_server(live):
    (code,) = json.loads(instruction("HEALTHCHECK").split("CMD ", 1)[1])[2:]
    exec(code.replace("http://127.0.0.1:8000", live.url), {})
    with pytest.raises(OSError):
        exec(code.replace("http://127.0.0.1:8000/health", f"{live.url}/nothing"), {})


def test_compose():
    words = SERVER["command"]
    assert option(words, "--host") == "0.0.0.0"
    assert float(SERVER["stop_grace_period"].removesuffix("s")) > float(option(words, "--drain-seconds"))
    build = SERVER["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]) == FOLDER / "Dockerfile"
    assert SERVER["environment"]["A3_API_KEY"].startswith("${A3_API_KEY:?")
    volumes = dict(volume.split(":")[1::-1] for volume in SERVER["volumes"])
    assert all(volume.endswith(":ro") for volume in SERVER["volumes"])
    model = Path("/srv") / words[0]
    (mounted,) = (folder for folder in volumes if model.is_relative_to(folder))
    assert (FOLDER / volumes[mounted] / model.relative_to(mounted) / "adapter_config.json").is_file()
    assert instruction("WORKDIR") == "/srv"


def test_prometheus_asks_the_server_with_the_key():
    (job,) = PROMETHEUS["scrape_configs"]
    port = option(SERVER["command"], "--port")
    assert [f"a3:{port}"] == job["static_configs"][0]["targets"] and job["metrics_path"] == "/metrics"
    assert [mapping.split(":")[-1] for mapping in SERVER["ports"]] == [port] == [instruction("EXPOSE")]
    service = COMPOSE["services"]["prometheus"]
    (secret,) = service["secrets"]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": f"/run/secrets/{secret}"}
    assert COMPOSE["secrets"][secret] == {"environment": "A3_API_KEY"}
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in service["volumes"]
