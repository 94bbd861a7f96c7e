"""No document in a packed row sees another, and the loss at supervised positions is the whole loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.step import document_attention
from strategies.step.document_attention import Scoring
from strategies.step.supervised_logits import Batch, loss_sum

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
}


def tiny(family, **extra):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )
    document_attention.register()
    return AutoModelForCausalLM.from_config(config, attn_implementation=document_attention.NAME).eval()


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def as_batch(docs, mask=None):
    masks = mask or [torch.tensor([False] + [True] * (len(d) - 1)) for d in docs]
    return Batch(torch.cat(docs)[None], torch.cat(masks)[None], tuple(map(len, docs)), None, tuple(range(len(docs))))


@pytest.mark.parametrize("lengths", [(9, 3, 14, 5), (9, 150, 3, 131)], ids=["short", "short and long"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_loss_is_the_mean_of_separate_losses(family, lengths):
    model = tiny(family, **FAMILIES[family])
    docs = documents(*lengths)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        separate = sum(
            F.cross_entropy(plain(d[None], use_cache=False).logits[0, :-1], d[1:], reduction="sum") for d in docs
        )

        packed = loss_sum(model, as_batch(docs))

    assert model.config._attn_implementation == document_attention.NAME
    assert packed.item() == pytest.approx(separate.item(), rel=1e-5)


def test_gradients_of_short_and_long_documents_are_those_of_separate_runs():
    model = tiny("llama", num_key_value_heads=2)
    docs = documents(9, 150, 3, 40)

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            loss_sum(model, batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    separate = gradients([as_batch([doc]) for doc in docs])
    packed = gradients([as_batch(docs)])

    assert (packed - separate).norm() <= 1e-5 * separate.norm()


@pytest.mark.parametrize("window", [None, 4])
def test_the_shared_product_of_short_documents_is_each_ones_own_attention(window):
    lengths, generator = (9, 3, 14), torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    row = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    together = [(0, 0, 9), (1, 9, 3), (2, 12, 14)]

    shared = document_attention.attend_short(*row, together, Scoring(sliding_window=window))
    ours = torch.cat([shared[i, :length] for i, (_, _, length) in enumerate(together)])
    parts = [[x[:, :, a : a + n] for x in row] for _, a, n in together]
    alone = [document_attention.attend_document(*part, Scoring(sliding_window=window)) for part in parts]
    weights = torch.randn(ours.shape, generator=generator)

    assert torch.allclose(ours, torch.cat(alone), atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), row), torch.autograd.grad((torch.cat(alone) * weights).sum(), row),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_bf16_on_a_cpu_uses_the_shared_product_and_gives_nearly_the_same_loss():
    model = tiny("llama", num_key_value_heads=2)
    docs = documents(9, 3, 14, 5)
    exact = loss_sum(model, as_batch(docs)).item()
    assert document_attention.find_short((9, 3, 14, 5), torch.zeros(1, dtype=torch.bfloat16))

    assert loss_sum(model.to(torch.bfloat16), as_batch(docs)).item() == pytest.approx(exact, rel=0.01)


def test_one_changed_document_leaves_the_others_alone():
    model = tiny("llama")
    docs = documents(6, 7)
    changed = [docs[0].flip(0), docs[1]]
    only_second = [torch.zeros(6, dtype=torch.bool), torch.tensor([False] + [True] * 6)]

    with torch.no_grad():
        assert loss_sum(model, as_batch(docs, only_second)) == loss_sum(model, as_batch(changed, only_second))


def test_a_leak_is_seen_by_the_check():
    model = tiny("llama")
    assert document_attention.packing_error(model) < 1e-4

    original = document_attention.packed_arguments
    try:
        document_attention.packed_arguments = lambda lengths, device: original(
            [sum(lengths)], device
        )  # borders forgotten

        assert document_attention.packing_error(model) > 0.05
    finally:
        document_attention.packed_arguments = original


def test_a_model_that_does_not_pass_borders_on_is_refused():
    with pytest.raises(ValueError, match="document_lengths"):
        document_attention.document_attention(torch.nn.Module(), *[torch.zeros(1, 2, 3, 4)] * 3, None)


def test_a_family_that_leaks_with_ordinary_kernels_is_found_out():
    """OPT in transformers 5.23 forgets the borders when it builds its mask; only the document kernel keeps them."""
    model = tiny("opt", **FAMILIES["opt"])
    assert document_attention.packing_error(model) < 1e-4

    model.set_attn_implementation("sdpa")

    assert document_attention.packing_error(model) > 0.05


@pytest.mark.parametrize(("family", "leaks"), [("llama", False), ("opt", True)])
def test_a_copy_of_the_first_layers_leaks_as_the_whole_model_does(family, leaks):
    model = tiny(family, **FAMILIES[family])
    num_parameters = sum(p.numel() for p in model.parameters())

    first = document_attention.first_layers(model, torch.device("cpu"))
    first.set_attn_implementation("sdpa")

    assert sum(p.numel() for p in first.parameters()) < num_parameters == sum(p.numel() for p in model.parameters())
    assert model.config.num_hidden_layers == 2
    assert (document_attention.packing_error(first) > 0.05) == leaks
    assert document_attention.packing_error(model) < 1e-4


def test_borders_are_handed_over_so_that_no_kernel_has_to_find_them_out():
    arguments = document_attention.packed_arguments((3, 1, 2), torch.device("cpu"))

    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] and arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["cu_seq_lens_k"] is arguments["cu_seq_lens_q"]
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (3, 3)


@pytest.mark.parametrize("window", [None, 4])
def test_copied_keys_give_what_shared_ones_give(window):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))

    shared = document_attention.attend_document(query, key, value, Scoring(sliding_window=window))
    copied = [document_attention.expand_heads(x, query) for x in (key, value)]

    assert torch.allclose(
        document_attention.attend_document(query, *copied, Scoring(sliding_window=window)), shared, atol=1e-6
    )


def test_padded_rows_give_the_same_loss_as_packed_rows():
    model = tiny("llama")
    docs = documents(9, 3, 14)
    width = max(map(len, docs))
    ids, mask, attend = (torch.zeros(3, width, dtype=torch.long) for _ in range(3))
    for row, doc in enumerate(docs):
        ids[row, : len(doc)], attend[row, : len(doc)], mask[row, 1 : len(doc)] = doc, 1, 1
    packed = loss_sum(model, as_batch(docs))
    model.set_attn_implementation("sdpa")

    padded = loss_sum(model, Batch(ids, mask.bool(), None, attend, (0, 1, 2)))

    assert padded.item() == pytest.approx(packed.item(), rel=1e-5)


def test_loss_of_some_positions_is_the_full_loss_masked():
    model = tiny("llama")
    (doc,) = documents(12)
    mask = torch.tensor([False, False, False, True, True, False, True, False, False, True, True, True])
    with torch.no_grad():
        logits = model(doc[None], document_lengths=(12,), use_cache=False).logits[0]
    each = F.cross_entropy(logits[:-1], doc[1:], reduction="none")

    chosen = loss_sum(model, as_batch([doc], [mask]))

    assert chosen.item() == pytest.approx(each[mask[1:]].sum().item(), rel=1e-6)
