"""A checkpoint that carries its code, used where the package is not installed."""

import json
import os
import subprocess
import sys

from transformers import pipeline

from tests.models.a3_llama.test_infilling_batches import TEXTS, model_for
from tests.models.a3_llama.test_infilling_templates import kind

USE = """
import sys
sys.modules["a3_hf"] = None  # as if it were not installed
import json
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

path, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
fill = pipeline("infilling", model=path, trust_remote_code=True)
told = {
    "infill": model.infill(tokenizer, texts),
    "pipeline": [one["text"] for one in fill(texts, batch_size=3)],
    "score": model.score(tokenizer, "The dog ran").totals.tolist(),
    "module": type(model).__module__.split(".")[0],
}
print("TOLD" + json.dumps(told))
"""


def test_a_saved_pipeline_works_without_the_package(tmp_path):
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    pipeline("infilling", model=model, tokenizer=tokenizer, device="cpu").save_pretrained(tmp_path / "shared_model")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", USE, "shared_model", json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.split("TOLD")[1])
    assert told["infill"] == told["pipeline"] == model.infill(tokenizer, TEXTS)
    assert abs(told["score"][0] - model.score(tokenizer, "The dog ran").totals.item()) < 1e-4
    assert told["module"] == "transformers_modules"
