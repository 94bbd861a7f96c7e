"""A tokenizer without torch: the one that transformers loads, and torch as ever once somebody asks for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from strategies.model.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[1] / "fixtures/earlier/model"
TEXTS = ["Hello  world\n", "<s> ünï 日本 </s>", " 12 + 30", ""]
LATER = """
import sys
from strategies.model.tokenizer import load_tokenizer

tokenizer = load_tokenizer(sys.argv[1])
print("torch" in sys.modules, tokenizer("a b").input_ids)
from transformers import AutoModelForCausalLM, modeling_rope_utils
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import torch
logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
held = modeling_rope_utils
print(held.torch.Tensor is torch.Tensor, held.torch is torch, torch.isfinite(logits).all().item())
"""


def described(tokenizer):
    ids = [tokenizer(text).input_ids for text in TEXTS]
    offsets = [tokenizer(text, return_offsets_mapping=True).offset_mapping for text in TEXTS]
    shown = type(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.vocab_size
    return *shown, ids, offsets, [tokenizer.decode(row) for row in ids], tokenizer.name_or_path


@pytest.mark.parametrize(
    ("tokenizer_keys", "model_keys"),
    [
        ({}, {}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
        ({"tokenizer_class": "LlamaTokenizer"}, {}),
        ({"tokenizer_class": "GPT2TokenizerFast"}, {"model_type": "gpt2"}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"model_type": "qwen2"}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}),
        ({"tokenizer_class": None}, {}),
        ({"tokenizer_class": "OfNobody"}, {"model_type": "mistral"}),
        ({"add_bos_token": True, "bos_token": "<s>"}, {}),
    ],
)
def test_it_is_the_one_of_transformers_whatever_the_files_name(tmp_path, tokenizer_keys, model_keys):
    for file in MODEL.iterdir():
        shutil.copy(file, tmp_path)
    for name, keys in (("tokenizer_config.json", tokenizer_keys), ("config.json", model_keys)):
        values = json.loads((tmp_path / name).read_text()) | keys
        (tmp_path / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    light, whole = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert described(light) == described(whole)


def test_torch_is_not_loaded_for_it_and_works_afterwards():
    done = subprocess.run([sys.executable, "-c", LATER, str(MODEL)], capture_output=True, text=True, check=True)

    first, second = done.stdout.splitlines()
    assert first.startswith("False [") and second == "True True True"
