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

from a3_hf.engines.vllm.requests import Blanks  # noqa: E402
from tests.conftest import tiny_model  # noqa: E402
from tests.engines.vllm.cases import LAYOUTS, SHAPE, continued, filled, given_tokens  # noqa: E402


def pytest_collection_modifyitems(items):
    """Two processes end at about the same time if what takes longest begins first."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of tiny models, and the models, by `slot_start`."""
    found = {}
    for start in ("left_token", "query_embed"):
        model = tiny_model(slot_start=start, **SHAPE)
        folder = tmp_path_factory.mktemp(start)
        model.save_pretrained(folder)
        found[start] = (str(folder), model)
    return found


@pytest.fixture(scope="session")
def model(checkpoints):
    return checkpoints["left_token"][1]


@pytest.fixture(scope="session")
def blanks_of_all_kinds(model):
    """Each layout, one row a token."""
    return [
        filled(model, Blanks(*layout, is_text=False), given_tokens(sum(layout[0]), number), in_groups=False)
        for number, layout in enumerate(LAYOUTS)
    ]


@pytest.fixture(scope="session")
def same_tokens(model):
    """Four lengths before the same text, two other cuts of the same tokens, and two continuations."""
    given = given_tokens(90, 100)
    splits = [((50, 40), (length,)) for length in (3, 5, 8, 11)] + [((64, 26), (5,)), ((33, 57), (5,))]
    cases = [filled(model, Blanks(*split, is_text=False), given, in_groups=False) for split in splits]
    return [*cases, continued(model, given, 6), continued(model, given[:50], 6)]
