"""Small models that every test file can use: random LLaMA shapes, on the CPU.

They compute in float64 unless a test asks for less: machines round differently, and so may two batches on one of them.
In float64 what is equal but for rounding differs by 1e-13, or by 1e-7 where LLaMA itself rounds to float32 (its norms, the
softmax of eager attention, losses); what these tests compare differs by 1e-3 and more where it is not equal.
"""

import os
import random
import signal
import threading
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "ACCELERATE_MIXED_PRECISION", "no"
)  # runs are compared in float32, on CPUs with bfloat16 products too

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from a3_hf import A3LlamaConfig, A3LlamaForCausalLM, devices
from tests.made import make_data

ROOT = Path(__file__).parents[1]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": LLAMA3_ROPE,
}

# On other CPUs torch 2.13 either can't compile flex attention, or (AVX2) what it compiles reads past the end of a mask's
# tensors and raises.
compiles_flex = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"), reason="flex attention compiles on CPUs with AVX512"
)


def tiny_config(**changes) -> A3LlamaConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # far from the start of training, so that logits differ visibly
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "slot_start": "query_embed",
    }
    return A3LlamaConfig(**{**settings, **changes})


def tiny_model(seed: int = 42, *, dtype: torch.dtype = torch.float64, **changes) -> A3LlamaForCausalLM:
    torch.manual_seed(seed)
    return A3LlamaForCausalLM(tiny_config(**changes)).eval().to(dtype)


def pytest_configure():
    """A Ctrl-C interrupts even where the shell that started this had it ignored (as with `nohup … &`): tests send it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """What the libraries changed is said before anything else fails by it."""
    items.sort(key=lambda item: item.path.name != "test_conventions.py")


@pytest.fixture(scope="session", autouse=True)
def commands_load_in_float32():
    """On every CPU: what commands print is compared with what models in float32 say."""
    with pytest.MonkeyPatch.context() as patch:
        default_dtype = devices.default_dtype
        patch.setattr(
            devices, "default_dtype", lambda device: torch.float32 if device.type == "cpu" else default_dtype(device)
        )
        yield


@pytest.fixture
def model() -> A3LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def made_data(tmp_path_factory) -> Path:
    """A folder with a small pretrained LLaMA, a text and ROCStories of the tests' own."""
    return make_data(tmp_path_factory.mktemp("beside") / "shared") / "data"


@pytest.fixture(scope="session")
def stories(made_data) -> Path:
    return made_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def story_text(made_data) -> Path:
    return made_data / "text" / "tinystories_sample_5M.txt"


@pytest.fixture
def beside_data(made_data, monkeypatch) -> Path:
    """The current directory is one whose `../shared` is what the recipes expect, and whose `recipes` are the repository's."""
    folder = made_data.parents[1] / "here"
    folder.mkdir(exist_ok=True)
    if not (folder / "recipes").is_dir():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)
    return folder


CORPUS = ["The dog ran home. Tom was happy, and so was his dog.", "One day, the cat sat <b> on a mat!"] * 20


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer as LLaMA 3 has, with BOS and without a pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A folder with a LLaMA, its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("source")
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(58))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)

    torch.manual_seed(0)
    settings = tiny_config(num_hidden_layers=2, attention_dropout=0.1).to_dict()  # dropout: random state matters
    del settings["model_type"]
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)

    words = random.Random(0)
    for name, num_words in (("train.txt", 28 * 7 - 1), ("validation.txt", 20)):
        (folder / name).write_text(" ".join(f"w{words.randrange(58)}" for _ in range(num_words)))
    return folder
