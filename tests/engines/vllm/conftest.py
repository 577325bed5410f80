"""vLLM on two cores without a GPU: its kernels interpreted, its engine in this process. `make test-vllm` runs what needs it.

Whatever imports vLLM is left out where it is not installed; those named below need none.
"""

import os
from importlib.util import find_spec

WITHOUT_VLLM = ("test_requests.py", "test_group_progress.py", "test_vllm_scripts.py")
LONGEST_FIRST = (
    "test_many.py",
    "test_tensor_parallel.py",
    "test_groups.py",
    "test_server.py",
    "test_groups_pressure.py",
)
collect_ignore_glob = ["stand_in/*"]
if find_spec("vllm") is None:
    names = sorted(os.listdir(os.path.dirname(__file__)))
    collect_ignore_glob += [name for name in names if name.startswith("test_") and name not in WITHOUT_VLLM]
else:
    # triton reads it when it is first imported, which other imports do
    assert os.environ.get("TRITON_INTERPRET") == "1", "make test-vllm sets TRITON_INTERPRET=1"
    os.environ.update(
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )

import pytest  # noqa: E402

from tests.conftest import tiny_model  # noqa: E402
from tests.engines.vllm import cases  # noqa: E402


def pytest_collection_modifyitems(items):
    """Two processes end at about the same time if what takes longest begins first."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of tiny models, and the models, by `slot_start`."""
    found = {}
    for start in ("left_token", "query_embed"):
        model = tiny_model(slot_start=start, **cases.SHAPE)
        folder = tmp_path_factory.mktemp(start)
        model.save_pretrained(folder)
        found[start] = (str(folder), model)
    return found


@pytest.fixture(scope="session")
def model(checkpoints):
    return checkpoints["left_token"][1]


@pytest.fixture(scope="session")
def blanks_of_all_kinds(model):
    return cases.one_token_cases(model)


@pytest.fixture(scope="session")
def same_tokens(model):
    return cases.same_tokens(model)
