"""On the pretrained model itself: packed documents stay apart, step 0 is the base model."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import needs_smollm2

pytestmark = needs_smollm2

TEXTS = (
    "The desk on the second floor is free on Monday.",
    "Two cats.",
    "Please order eight monitor stands for the design team, and tell the office when they arrive.",
    "It rained all day, so the market closed at noon and everybody went home early.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from pathlib import Path

    from orchestrator.job.model_files import locate

    return locate("smollm2-135m-instruct", Path())


def test_packed_loss_is_that_of_separate_documents(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from strategies.step import document_attention
    from strategies.step.supervised_logits import loss_sum
    from tests.strategies.test_packing_exact import as_batch

    document_attention.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    docs = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        separate = sum(
            F.cross_entropy(plain(doc[None], use_cache=False).logits[0, :-1], doc[1:], reduction="sum") for doc in docs
        )
        plain.set_attn_implementation(document_attention.NAME)

        packed = loss_sum(plain, as_batch(docs))

        assert packed.item() == pytest.approx(separate.item(), rel=1e-5)
        assert document_attention.packing_error(plain) < 1e-4
        # In bf16 rounding alone differs by 0.04 on CPUs with units for it; one border forgotten is 0.6.
        assert document_attention.packing_error(plain.to(torch.bfloat16)) < 0.1


def test_the_model_is_a_real_one(folder):
    """Its loss on plain English is far below that of a uniform guess (ln 49152 = 10.8)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(TEXTS[3])["input_ids"])[None]

    with torch.no_grad():
        assert model(ids, labels=ids).loss < 6  # measured: 4.67
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
