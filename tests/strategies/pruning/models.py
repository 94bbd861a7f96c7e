"""Small models whose groups are pruned, and masks over them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.pruning.method import PrunedLora
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques

TECHNIQUES = Techniques("float32", "sdpa", False, False, 1, 64)
GATED = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
    "smollm3",
)  # fmt: skip


def small(name, layers=3, **changes):
    """A model of this family with unequal widths, grouped-query attention and biases where the family has them."""
    values = {
        "hidden_size": 48, "num_hidden_layers": layers, "num_attention_heads": 6, "num_key_value_heads": 3,
        "head_dim": 8, "intermediate_size": 40, "vocab_size": 90, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "sliding_window": 16, "attention_bias": True,
        "mlp_bias": True, "use_bias": True, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    known = AutoConfig.for_model(name).to_dict()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{key: value for key, value in {**values, **changes}.items() if key in known})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, mean=parameter.data.mean().item(), std=0.2)
    return model


def prepared(model, num_steps=0, seed=1, techniques=TECHNIQUES, **options):
    """A training of the model whose correction is not zero."""
    method = PrunedLora(**{"multiple_of": 1, "ratio": 0.3, **options})
    settings = TrainSettings(
        1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques, seed, num_samples=24, num_steps=num_steps
    )
    setup = method.setup(model, settings)
    for name, parameter in setup.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return method, setup


def masks_of(setup):
    return setup.between._masks
