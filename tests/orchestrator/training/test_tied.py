"""Adapters of an embedding and an output matrix, one tensor or two, merged."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from orchestrator.training.model.tied import merged_model

ADAPTED = {
    "output matrix in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "output matrix": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora on the output matrix": {"target_modules": ["lm_head"], "use_dora": True},
    "neither": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def bases(model_folder, tmp_path_factory):
    """The tiny model with one tensor for both, and with two."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight = torch.nn.Parameter(0.9 * model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return {"tied": model_folder, "untied": folder}


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@torch.no_grad()
def test_the_merged_model_read_again_says_what_base_and_adapter_say(bases, tmp_path, kind, adapted):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases[kind]), LoraConfig(r=4, **ADAPTED[adapted]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.arange(5, 37)[None]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), str(tmp_path / "adapter"))
    wanted = tuned.eval()(ids).logits
    before = AutoModelForCausalLM.from_pretrained(bases[kind]).eval()(ids).logits

    merged_model(tuned).save_pretrained(tmp_path / "merged")

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max() < (wanted - before).abs().max()
    says_tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert says_tied == (kind == "tied" and adapted == "neither")
    shutil.rmtree(tmp_path / "merged")
