"""Adapters of every kind over the tiny model, with weights large enough to change its answers."""

import json

import pytest

from orchestrator.serving.engines.protocol import Query, ServedModel
from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.folders import base_digest
from strategies.adapter_bank.store import Bank

KINDS = {
    "plain": {},
    "scaled": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "norm": {"modules_to_save": ["norm"]},
    "biased": {"bias": "lora_only"},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def write_adapter(model_folder, folder, seed, std=0.2, **options):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(model_folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_shira(model_folder, folder):
    import torch
    from peft import ShiraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    config = ShiraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", random_seed=1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    for name, parameter in model.named_parameters():
        if "shira" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def adapter(folder, rank=8, content=b"weights", **settings):
    """The files of an adapter, without weights, for an engine that is a double."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, **settings}))
    (folder / "adapter_model.safetensors").write_bytes(content)
    return ServedModel(folder.name, "/models/base", str(folder))


def question(model, text="hello", **options):
    return Query(model, messages=[{"role": "user", "content": text}], **options)


async def answer(engine, query):
    """The whole text, and the last piece, which says why it ended."""
    pieces = [piece async for piece in engine.generate(query)]
    return "".join(piece.text for piece in pieces), pieces[-1]


@pytest.fixture(scope="session")
def adapters(model_folder, tmp_path_factory):
    """Folders by name: LoRA of each kind, SHiRA, and a whole model."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("adapters")
    found = {
        name: write_adapter(model_folder, place / name, seed, **options)
        for seed, (name, options) in enumerate(KINDS.items())
    }
    found["sparse"] = write_shira(model_folder, place / "sparse")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.save_pretrained(place / "whole")
    return found | {"whole": place / "whole"}


@pytest.fixture
def bank(tmp_path, model_folder, adapters):
    """A bank with one adapter."""
    made = Bank(tmp_path / "bank", create=True)
    add_to(made, model_folder, adapters["plain"], "first")
    return made


def add_to(bank, model_folder, folder, name):
    return bank.add(folder, AdapterCard(name, str(model_folder), base_digest(model_folder)))
