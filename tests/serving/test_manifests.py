"""recipes/serving/vllm and recipes/serving/kubernetes: what their readers (docker, compose, the API server, kustomize, vLLM)
would refuse or pass over in silence, and what the files say of one another.
"""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from a3_hf import A3LlamaConfig
from a3_hf.engines.vllm.registration import ARCHITECTURE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "serving"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
OVERLAYS = ("tensor-parallel", "groups")
# vLLM's flags that the files may use. Not --api-key: it would show in lists of processes, and in the manifest.
FLAGS = {
    *("--hf-overrides", "--enable-lora", "--max-loras", "--lora-modules", "--tensor-parallel-size"),
    "--shutdown-timeout",
}
VERSIONS = {  # of each kind, and fields of its spec that the API server insists on
    "Deployment": ("apps/v1", "selector template"),
    "Service": ("v1", "ports"),
    "PersistentVolumeClaim": ("v1", "accessModes resources"),
    "NetworkPolicy": ("networking.k8s.io/v1", "podSelector"),
    "PodDisruptionBudget": ("policy/v1", "selector"),
    "PodMonitor": ("monitoring.coreos.com/v1", "selector podMetricsEndpoints"),
}
PROBE = "httpGet exec tcpSocket grpc periodSeconds timeoutSeconds failureThreshold successThreshold initialDelaySeconds"
# Fields by the key that holds them: a misspelt one is refused, or worse, passed over.
FIELDS = {
    "metadata": "name namespace labels annotations",
    "Deployment.spec": "replicas progressDeadlineSeconds minReadySeconds revisionHistoryLimit selector strategy template",
    "Service.spec": "type selector ports sessionAffinity clusterIP",
    "PersistentVolumeClaim.spec": "accessModes resources storageClassName volumeMode volumeName selector",
    "NetworkPolicy.spec": "podSelector policyTypes ingress egress",
    "PodDisruptionBudget.spec": "minAvailable maxUnavailable selector unhealthyPodEvictionPolicy",
    "PodMonitor.spec": "selector podMetricsEndpoints namespaceSelector",
    "podMetricsEndpoints": "port path interval scrapeTimeout scheme",
    "strategy": "type rollingUpdate",
    "rollingUpdate": "maxUnavailable maxSurge",
    "template": "metadata spec",
    "template.spec": "automountServiceAccountToken containers enableServiceLinks initContainers nodeSelector affinity "
    "priorityClassName runtimeClassName securityContext serviceAccountName terminationGracePeriodSeconds tolerations "
    "topologySpreadConstraints volumes imagePullSecrets",
    "containers": "name image imagePullPolicy command args env envFrom ports resources startupProbe readinessProbe "
    "livenessProbe lifecycle securityContext volumeMounts workingDir",
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "httpGet": "path port scheme httpHeaders",
    "exec": "command",
    "lifecycle": "preStop postStart",
    "preStop": "exec httpGet sleep",
    "env": "name value valueFrom",
    "valueFrom": "secretKeyRef configMapKeyRef fieldRef",
    "secretKeyRef": "name key optional",
    "ports": "name port targetPort containerPort protocol",
    "limits": "cpu memory ephemeral-storage nvidia.com/gpu",
    "requests": "cpu memory ephemeral-storage nvidia.com/gpu storage",
    "volumes": "name persistentVolumeClaim emptyDir",
    "persistentVolumeClaim": "claimName readOnly",
    "emptyDir": "medium sizeLimit",
    "volumeMounts": "name mountPath readOnly subPath",
    "tolerations": "key operator value effect",
    "topologySpreadConstraints": "maxSkew topologyKey whenUnsatisfiable labelSelector",
    "labelSelector": "matchLabels matchExpressions",
    "podSelector": "matchLabels matchExpressions",
    "namespaceSelector": "matchLabels matchExpressions",
    "ingress": "from ports",
    "egress": "to ports",
    "securityContext": "runAsNonRoot runAsUser runAsGroup fsGroup fsGroupChangePolicy seccompProfile "
    "allowPrivilegeEscalation readOnlyRootFilesystem capabilities",
}
UNITS = {"Gi": 2**30, "Mi": 2**20, "": 1}
PLACES = ("vllm", "kubernetes")
FILES = sorted(path for place in PLACES for path in (FOLDER / place).rglob("*.y*ml"))


class Strict(yaml.SafeLoader):
    """A key twice in a mapping is an error, as it is for kubectl and compose."""

    def construct_mapping(self, node, deep=False):
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(own) == len(set(own)), f"a key twice: {own}"
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict:
    return yaml.load(path.read_text(encoding="utf-8"), Strict)


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line]


def instruction(name: str, path: Path = FOLDER / "vllm" / "Dockerfile") -> str:
    return [rest for key, rest in instructions(path) if key == name][-1]


def merged(one, patch):
    """Kubernetes' strategic merge: mappings, and lists of named things by their names; other lists are replaced."""
    if isinstance(one, dict) and isinstance(patch, dict):
        return one | {key: merged(one.get(key), value) for key, value in patch.items()}
    if isinstance(one, list) and all(isinstance(item, dict) and "name" in item for item in [*one, *patch]):
        found = {item["name"]: item for item in one}
        return list((found | {item["name"]: merged(found.get(item["name"]), item) for item in patch}).values())
    return patch


BASE = FOLDER / "kubernetes" / "base"
OBJECTS = {(read(path) or {}).get("kind"): read(path) for path in sorted(BASE.glob("*.yaml"))}
KUSTOMIZATION, SECRET = OBJECTS.pop("Kustomization"), OBJECTS.pop("Secret")
PATCHES = {name: read(FOLDER / f"kubernetes/overlays/{name}/deployment-patch.yaml") for name in OVERLAYS}
DEPLOYMENTS = {"base": OBJECTS["Deployment"]} | {
    name: merged(OBJECTS["Deployment"], patch) for name, patch in PATCHES.items()
}
COMPOSE = read(FOLDER / "vllm" / "compose.yaml")
SERVERS = {name: one for name, one in COMPOSE["services"].items() if one["image"].startswith("a3-vllm")}
COMMANDS = {
    f"kubernetes {name}": one["spec"]["template"]["spec"]["containers"][0]["args"] for name, one in DEPLOYMENTS.items()
}
COMMANDS |= {f"compose {name}": one["command"] for name, one in SERVERS.items()}
each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
each_command = pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
each_server = pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)


def environment() -> dict[str, str]:
    """What the image sets."""
    return dict(word.split("=", 1) for word in instruction("ENV").split())


def pod(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def container(deployment: dict) -> dict:
    (only,) = pod(deployment)["containers"]
    return only


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def size(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi|)", quantity).groups()
    return int(number) * UNITS[unit]


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s", text)[1])


def mappings(value, path: tuple[str, ...] = ()):
    """Each mapping in a document and the keys that lead to it."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from mappings(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from mappings(inner, path)


# Files


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_is_one_document_without_a_key_twice(path):
    assert isinstance(read(path), dict)


def test_every_manifest_is_listed_or_an_example():
    listed = KUSTOMIZATION["resources"]
    there = {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}
    examples = {name for name in there if ".example." in name}
    assert len(listed) == len(set(listed)) and set(listed) == there - examples
    assert examples == {"secret.example.yaml"} and all(
        f"`{BASE.relative_to(FOLDER)}/{name}`" in README for name in examples
    )
    assert all(path.is_dir() or path.parent.name in ("base", *OVERLAYS) for path in (FOLDER / "kubernetes").rglob("*"))


def test_one_version_of_vllm_and_no_latest():
    (pin,) = (Requirement(one) for one in PROJECT["optional-dependencies"]["vllm"] if one.startswith("vllm"))
    assert instruction("FROM") == "${BASE}"
    tags = {KUSTOMIZATION["images"][0]["newTag"], instruction("ARG").rpartition(":")[2]}
    images = [one["image"] for one in COMPOSE["services"].values()] + [
        container(one)["image"] for one in DEPLOYMENTS.values()
    ]
    assert instruction("ARG").startswith("BASE=vllm/vllm-openai:")
    for text in (README, (FOLDER / "vllm/Dockerfile").read_text()):
        found = re.findall(r"(?:a3-vllm|vllm/vllm-openai):([\w.]+)", text)
        assert found
        tags |= set(found)
    for image in images:
        name, _, tag = image.partition(":")
        assert tag and tag != "latest", image
        tags |= {tag} if name == "a3-vllm" else set()
    (only,) = tags
    assert pin.specifier.contains(only.removeprefix("v"))
    assert [one["name"] for one in KUSTOMIZATION["images"]] == [
        container(OBJECTS["Deployment"])["image"].partition(":")[0]
    ]


# Kubernetes: each object


def test_kinds_versions_and_required_fields():
    assert set(OBJECTS) == set(VERSIONS)
    for kind, one in OBJECTS.items():
        version, required = VERSIONS[kind]
        assert one["apiVersion"] == version and set(required.split()) <= set(one["spec"]), kind
    for path in (BASE, *(FOLDER / "kubernetes/overlays" / name for name in OVERLAYS)):
        kustomization = read(path / "kustomization.yaml")
        assert (kustomization["apiVersion"], kustomization["kind"]) == (
            "kustomize.config.k8s.io/v1beta1",
            "Kustomization",
        )
    assert (SECRET["apiVersion"], SECRET["type"]) == ("v1", "Opaque")


def test_names_are_what_dns_takes():
    names = [one["metadata"]["name"] for one in (*OBJECTS.values(), SECRET)]
    for _, mapping in mappings([*DEPLOYMENTS.values(), OBJECTS["Service"]]):
        names += [one["name"] for key in ("containers", "volumes") for one in mapping.get(key) or []]
        for port in mapping.get("ports", []):
            assert len(port["name"]) <= 15
            names.append(port["name"])
    suffix = read(FOLDER / "kubernetes/overlays/groups/kustomization.yaml")["nameSuffix"]
    for name in names + [f"{name}{suffix}" for name in names]:
        assert len(name) <= 63 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name), name


@pytest.mark.parametrize("one", [*OBJECTS.values(), *PATCHES.values()], ids=lambda one: one["kind"])
def test_fields_are_known(one):
    assert set(one) <= {"apiVersion", "kind", "metadata", "spec"}
    for path, mapping in mappings(one):
        place = (
            f"{one['kind']}.spec"
            if path == ("spec",)
            else ".".join(path[-2:])
            if path[-1:] == ("spec",)
            else "".join(path[-1:])
        )
        if place in FIELDS:
            assert set(mapping) <= set(FIELDS[place].split()), ".".join(path)
        for key in ("labels", "matchLabels"):
            assert all(isinstance(value, str) for value in mapping.get(key, {}).values()), "a label is a string"
        assert not isinstance(mapping.get("value"), (int, bool, float)), "an environment variable is a string"


def test_selectors_are_the_pods_labels():
    spec = OBJECTS["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert {"app.kubernetes.io/name", "app.kubernetes.io/component"} == set(labels)
    selectors = {
        "Deployment": spec["selector"]["matchLabels"],
        "spread": pod(OBJECTS["Deployment"])["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        "Service": OBJECTS["Service"]["spec"]["selector"],
        "NetworkPolicy": OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        "PodDisruptionBudget": OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        "PodMonitor": OBJECTS["PodMonitor"]["spec"]["selector"]["matchLabels"],
    }
    for name, selector in selectors.items():
        assert selector == labels, name


def test_ports_are_the_servers():
    (port,) = container(OBJECTS["Deployment"])["ports"]
    assert port["containerPort"] == int(instruction("EXPOSE")) == 8000
    (service,) = OBJECTS["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"] and service["port"] == port["containerPort"]
    (endpoint,) = OBJECTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    (rule,) = OBJECTS["NetworkPolicy"]["spec"]["ingress"]
    assert rule["ports"] == [{"port": port["name"], "protocol": "TCP"}]


@each_deployment
def test_probes_and_times(deployment):
    server, words = container(deployment), container(deployment)["args"]
    names = {port["name"] for port in server["ports"]}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = server[name]
        assert probe["httpGet"]["path"] == "/health" and probe["httpGet"]["port"] in names, name
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    start = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
    assert 1200 <= start < deployment["spec"]["progressDeadlineSeconds"]
    assert f"timeout={deployment['spec']['progressDeadlineSeconds'] // 60}m" in README
    sleeps = server["lifecycle"]["preStop"]["exec"]["command"]
    assert sleeps[0] == "sleep" and int(sleeps[1]) >= 5
    stop = int(sleeps[1]) + int(option(words, "--shutdown-timeout"))
    assert (
        int(option(words, "--shutdown-timeout")) >= 30 and pod(deployment)["terminationGracePeriodSeconds"] >= stop + 15
    )


@each_deployment
def test_volumes(deployment):
    mounts = {one["name"]: one["mountPath"] for one in container(deployment)["volumeMounts"]}
    volumes = {one["name"]: one for one in pod(deployment)["volumes"]}
    assert set(mounts) == set(volumes) and len(mounts) == len(container(deployment)["volumeMounts"])
    at = {path: volumes[name] for name, path in mounts.items()}
    assert all(len(set(volume) - {"name"}) == 1 for volume in volumes.values())
    # The root is read-only: whatever is written has a volume.
    assert set(at) == {environment()["HF_HOME"], environment()["HOME"], "/tmp", "/dev/shm"}
    claim = at[environment()["HF_HOME"]]["persistentVolumeClaim"]["claimName"]
    assert claim == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    assert deployment["spec"]["replicas"] == 1 or OBJECTS["PersistentVolumeClaim"]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]
    assert size(OBJECTS["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]) > 2**30
    assert at["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert size(at["/dev/shm"]["emptyDir"]["sizeLimit"]) < size(container(deployment)["resources"]["limits"]["memory"])


@each_deployment
def test_keys_come_from_the_secret(deployment):
    variables = {one["name"]: one for one in container(deployment)["env"]}
    assert set(variables) == {"VLLM_API_KEY", "HF_TOKEN"}
    for name, one in variables.items():
        reference = one["valueFrom"]["secretKeyRef"]
        assert reference["name"] == SECRET["metadata"]["name"] and reference["key"] in SECRET["stringData"]
        assert reference.get("optional", False) == (name == "HF_TOKEN")
    assert set(SECRET["stringData"].values()) == {"replace-me"} and "data" not in SECRET
    (name, key) = re.search(r"create secret generic (\S+) --from-literal=([\w-]+)=", README).groups()
    required = variables["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert (name, key) == (required["name"], required["key"])


@each_deployment
def test_resources(deployment):
    requests, limits = (container(deployment)["resources"][name] for name in ("requests", "limits"))
    assert {"memory", "nvidia.com/gpu"} <= set(limits) and {"memory", "cpu"} <= set(requests)
    assert size(requests["memory"]) <= size(limits["memory"])
    assert all(isinstance(value, str) for value in (*requests.values(), *limits.values()))
    words = container(deployment)["args"]
    parallel = option(words, "--tensor-parallel-size") if "--tensor-parallel-size" in words else "1"
    assert limits["nvidia.com/gpu"] == parallel


@each_deployment
def test_nothing_runs_as_root(deployment):
    user, group = map(int, instruction("USER").split(":"))
    context = pod(deployment)["securityContext"]
    assert context["runAsNonRoot"] is True and user >= 1000
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(deployment)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(deployment)["automountServiceAccountToken"] is False
    assert pod(deployment)["enableServiceLinks"] is False, "VLLM_PORT of a Service named vllm"


@each_deployment
def test_a_server_stays_through_updates_and_drains(deployment):
    spec = deployment["spec"]
    assert spec["replicas"] >= 2
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    # Not minAvailable: of one replica it would let no node be drained.
    assert OBJECTS["PodDisruptionBudget"]["spec"]["maxUnavailable"] < spec["replicas"]


def test_who_reaches_the_port():
    spec = OBJECTS["NetworkPolicy"]["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    client, prometheus = spec["ingress"][0]["from"]
    # kustomize adds labels of selectors to matchLabels of peers, too, where there are any: clients would be shut out.
    assert set(client) == {"podSelector"} and set(client["podSelector"]) == {"matchExpressions"}
    (expression,) = client["podSelector"]["matchExpressions"]
    assert f"`{expression['key']}`" in README and expression["operator"] == "Exists"
    (namespace,) = prometheus["namespaceSelector"]["matchLabels"].values()
    assert f"`{namespace}`" in README
    assert {one["port"] for rule in spec["egress"] for one in rule["ports"]} == {53, 443}


# Kubernetes: overlays


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_what_is_there(name):
    folder, patch = FOLDER / "kubernetes/overlays" / name, PATCHES[name]
    kustomization = read(folder / "kustomization.yaml")
    assert [(folder / one).resolve() for one in kustomization["resources"]] == [BASE]
    patches = {one["path"] for one in kustomization["patches"]}
    assert {path.name for path in folder.iterdir()} == {"kustomization.yaml"} | patches
    target = OBJECTS[patch["kind"]]
    assert (patch["apiVersion"], patch["metadata"]) == (target["apiVersion"], {"name": target["metadata"]["name"]})
    known = {one["name"] for one in pod(target)["containers"]}
    assert {one["name"] for one in pod(patch)["containers"]} <= known
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches", "nameSuffix", "labels"}
    assert f"kubectl apply -k {folder.relative_to(ROOT)}\n" in README
    assert DEPLOYMENTS[name] != target


def test_groups_stand_beside_the_base():
    kustomization = read(FOLDER / "kubernetes/overlays/groups/kustomization.yaml")
    (added,) = kustomization["labels"]
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert added["includeSelectors"] is True and kustomization["nameSuffix"] == "-groups"
    assert set(added["pairs"]) <= set(labels) and added["pairs"].items().isdisjoint(labels.items())
    assert added["fields"] == [{"path": "spec/selector/matchLabels", "kind": "PodMonitor", "create": True}]
    assert "`a3-vllm-groups`" in README and OBJECTS["Deployment"]["metadata"]["name"] == "a3-vllm"
    assert not {"nameSuffix", "namePrefix", "labels"} & set(
        read(BASE.parent / "overlays/tensor-parallel/kustomization.yaml")
    )


# Commands of servers


@each_command
def test_flags(words):
    assert all(isinstance(word, str) for word in words) and not words[0].startswith("-")
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= FLAGS and len(flags) == len(set(flags))
    values = len(flags) - ("--enable-lora" in flags)  # all others take one
    assert len(words) == 1 + len(flags) + values
    overrides = json.loads(option(words, "--hf-overrides"))
    assert set(overrides) <= {"architectures", "model_type", "slot_start", "canvas_length"}
    assert (overrides["architectures"], overrides["model_type"]) == ([ARCHITECTURE], A3LlamaConfig.model_type)
    A3LlamaConfig(slot_start=overrides["slot_start"])


def test_which_servers_decode_groups():
    canvas = {
        name: json.loads(option(words, "--hf-overrides")).get("canvas_length") for name, words in COMMANDS.items()
    }
    assert canvas == {name: 32 if name.endswith("groups") else None for name in COMMANDS}
    assert set(COMMANDS) >= {"kubernetes base", "kubernetes groups", "compose a3", "compose a3-groups"}


def test_the_readme_names_the_flags():
    table = README.split("\n## vLLM\n")[1].split("\n## ")[0]
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", table)) - {"--build", "--profile"} == FLAGS
    assert '"canvas_length": 32' in table and json.loads(re.search(r"--hf-overrides '(.*?)'", table)[1]) == json.loads(
        option(COMMANDS["kubernetes base"], "--hf-overrides")
    )


# Compose


def test_compose_names_what_it_has():
    services, volumes = COMPOSE["services"], []
    assert set(COMPOSE) <= {"services", "volumes", "x-server"}
    for one in services.values():
        for volume in one["volumes"]:
            if isinstance(volume, dict):
                assert (
                    volume["type"] == "bind" and volume["bind"] == {"create_host_path": False} and volume["read_only"]
                )
                assert (FOLDER / "vllm" / volume["source"]).resolve().is_relative_to(ROOT)
            elif volume.startswith("."):
                assert (FOLDER / "vllm" / volume.split(":")[0]).is_file() and volume.endswith(":ro")
            else:
                volumes.append(volume.split(":")[0])
    assert set(volumes) == set(COMPOSE["volumes"])
    ports = [port for one in services.values() for port in one["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.split(":")[1] for port in ports}) == len(services)
    profiles = {profile for one in services.values() for profile in one.get("profiles", [])}
    assert profiles == set(re.findall(r"`--profile (\w+)`", README)) == {"groups"}
    assert SERVERS["a3-groups"]["profiles"] == ["groups"] and "profiles" not in SERVERS["a3"]
    assert f"docker compose -f {(FOLDER / 'vllm/compose.yaml').relative_to(ROOT)} up --build\n" in README


@each_server
def test_a_server_of_compose(server):
    assert server["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    assert set(server["environment"]) == {"VLLM_API_KEY", "HF_TOKEN"} and server["environment"]["HF_TOKEN"] is None
    build = server["build"]
    assert (FOLDER / "vllm" / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == FOLDER / "vllm" / "Dockerfile"
    named = dict(volume.split(":")[::-1] for volume in server["volumes"] if isinstance(volume, str))
    assert set(named) == {environment()["HF_HOME"], environment()["HOME"]}
    assert [port.split(":")[-1] for port in server["ports"]] == [instruction("EXPOSE")]
    assert size(server["shm_size"].replace("gb", "Gi")) >= 2**30 and server["init"] is True
    words = server["command"]
    assert seconds(server["stop_grace_period"]) >= int(option(words, "--shutdown-timeout")) + 15
    (bind,) = (volume for volume in server["volumes"] if isinstance(volume, dict))
    modules = [word for word in words if re.fullmatch(r"[\w.-]+=\S+", word)]
    assert 1 <= len(modules) <= int(option(words, "--max-loras")) and "--enable-lora" in words
    for module in modules:
        inside = (Path(instruction("WORKDIR")) / module.split("=")[1]).relative_to(bind["target"])
        assert f" {Path(bind['source'].replace('../', '')) / inside}\n" in README.split("a3 export")[-1].split("```")[0]


def test_each_server_of_compose_has_a_gpu_of_its_own():
    used = []
    for one in SERVERS.values():
        (device,) = one["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and "count" not in device
        used += device["device_ids"]
    assert len(used) == len(set(used)) == len(SERVERS) and all(isinstance(one, str) for one in used)


@each_server
def test_health_checks_are_one(server):
    check = server["healthcheck"]
    image = instruction("HEALTHCHECK")
    times = dict(word.removeprefix("--").split("=") for word in image.split("CMD")[0].split())
    assert ["CMD", *json.loads(image.split("CMD ", 1)[1])] == check["test"]
    for name in ("interval", "timeout", "start-period", "retries"):
        assert times[name] == str(check[name.replace("-", "_")]), name
    # `test_deployment` asks a live server with it
    other = json.loads(instruction("HEALTHCHECK", FOLDER / "Dockerfile").split("CMD ", 1)[1])
    assert check["test"][1:] == ["python3", *other[1:]]


def test_prometheus_reads_both_servers():
    (job,) = read(FOLDER / "vllm" / "prometheus.yml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert job["metrics_path"] == "/metrics" and set(found["names"]) == set(SERVERS)
    assert (found["type"], found["port"]) == ("A", int(instruction("EXPOSE")))
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in COMPOSE["services"]["prometheus"]["volumes"]


# The image


def test_the_dockerfile():
    path = FOLDER / "vllm" / "Dockerfile"
    assert json.loads(instruction("ENTRYPOINT")) == ["vllm", "serve"] and instruction("STOPSIGNAL") == "SIGTERM"
    assert "CMD" not in [key for key, _ in instructions(path)], "the base has none"
    for sources in (rest.split()[:-1] for key, rest in instructions(path) if key == "COPY"):
        assert sources and all((ROOT / source).exists() for source in sources), sources
    users = [rest for key, rest in instructions(path) if key == "RUN" and "useradd" in rest]
    user, group = instruction("USER").split(":")
    assert f"groupadd --gid {group} a3" in users[0]
    assert f"--uid {user} --gid {group} --home-dir {environment()['HOME']} --create-home" in users[0]
    assert users[0].endswith(f"install -d -o a3 -g a3 {environment()['HF_HOME']}")
    plugins = {
        name for key in PROJECT["entry-points"] if key.startswith("vllm.") for name in PROJECT["entry-points"][key]
    }
    assert (
        set(environment()["VLLM_PLUGINS"].split(",")) == plugins
        and f"`VLLM_PLUGINS={environment()['VLLM_PLUGINS']}`" in README
    )
    assert environment()["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_the_image_keeps_what_vllm_brings():
    runs = [rest for key, rest in instructions(FOLDER / "vllm" / "Dockerfile") if key == "RUN"]
    first, package = (run for run in runs if "uv pip install" in run)
    added = set(re.findall(r'"([a-z]+[><=][^"]+)"', first))
    brought = {name for name in re.search(r"\^\((.*?)\)==", first)[1].split("|")}
    of_vllm = {"numpy", "pyyaml", "safetensors", "torch", "transformers"}
    assert added | {one for one in PROJECT["dependencies"] if Requirement(one).name in of_vllm} == set(
        PROJECT["dependencies"]
    )
    assert {Requirement(one).name for one in added}.isdisjoint(of_vllm | brought)
    assert of_vllm - {"pyyaml"} <= brought and "-c kept.txt" in first
    assert package.split("uv pip install")[1].split() == ["--system", "--no-deps", "."]


@pytest.mark.parametrize(
    "version, plugins, error", [("0.32.1", 2, None), ("0.33.0", 2, "0.33.0"), ("0.32.1", 1, "a3_endpoints")]
)
def test_the_build_checks_versions_and_plugins(version, plugins, error, monkeypatch):
    (run,) = (
        rest for key, rest in instructions(FOLDER / "vllm" / "Dockerfile") if key == "RUN" and "python3 -c" in rest
    )
    (code,) = re.fullmatch(r'python3 -c "(.*)"', run).groups()
    extra = [f'{one}; extra == "vllm"' for one in PROJECT["optional-dependencies"]["vllm"]]
    extra.append('nothing-has-this; extra == "plot"')
    real = importlib.metadata.version
    groups = [f"vllm.{kind}_plugins" for kind in ("general", "endpoint")][:plugins]

    class Found:
        def __init__(self, group):
            self.names = set(PROJECT["entry-points"][group]) if group in groups else set()

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*PROJECT["dependencies"], *extra])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "vllm" else real(name))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: Found(group))
    if error is None:
        exec(code, {})
        return
    with pytest.raises(AssertionError, match=error):
        exec(code, {})
