"""Maps fused with their corrections: every order gives what autograd gives, and training is what PEFT's layers make."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from clusters.capability import DeviceCapability, NodeCapability
from strategies.compatibility import conflict
from strategies.measure.trace import Lengths
from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.shape import ModelShape
from strategies.step import document_attention
from strategies.step.step import Update, forward_backward, update
from strategies.techniques import checkpointing
from strategies.techniques.lora_algebra import CorrectedLinear, fuse, is_plain
from strategies.techniques.lora_forms import FORMS, Form, MapSizes, cheapest, products
from strategies.techniques.precision import gradient_scaler
from strategies.workload import StagePart
from tests.strategies.test_contract import settings, techniques, workload

SIZES = MapSizes(tokens=11, inputs=7, outputs=5, rank=3)


def tensors(sizes, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(sizes.tokens, sizes.inputs), (sizes.rank, sizes.inputs), (sizes.outputs, sizes.rank)]
    x, a, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return x, (torch.randn(sizes.outputs, sizes.inputs, dtype=dtype), torch.randn(sizes.outputs, dtype=dtype)), a, b


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_order_equals_autograd_in_fp64(form):
    x, (weight, bias), a, b = tensors(SIZES)
    gradient = torch.randn(SIZES.tokens, SIZES.outputs, dtype=torch.float64)

    ours = CorrectedLinear.apply(x, (weight, bias), a, b, (1.7, form))
    plain = torch.nn.functional.linear(x, weight, bias) + 1.7 * (x @ a.T) @ b.T

    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(y, (x, a, b), gradient) for y in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_input_that_needs_no_gradient_gets_none(form):
    x, frozen, a, b = tensors(SIZES)

    CorrectedLinear.apply(x.detach(), frozen, a, b, (1.7, form)).sum().backward()

    expected = torch.autograd.grad((1.7 * (x @ a.T) @ b.T).sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), expected, rtol=0, atol=1e-12)


def added_product(_sum, left, right, *_, **__):
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_flops_of_every_order_are_those_that_torch_counts(form):
    x, frozen, a, b = tensors(SIZES)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        CorrectedLinear.apply(x, frozen, a, b, (1.0, form)).sum().backward()

    assert len(set(FORMS)) == 16
    assert counter.get_total_flops() == sum(one.flops for one in products(form, SIZES))


def test_the_cheapest_order_follows_tokens_widths_rank_and_precision():
    by_flops = [cheapest(MapSizes(tokens, 64, 64, 16), 4, flops_per_element=0.0) for tokens in (8, 512)]

    assert by_flops == [Form(), Form(merges_forward=True, merges_backward=True)]
    assert cheapest(MapSizes(512, 64, 64, 16), 2, flops_per_element=0.0) == Form()
    assert cheapest(MapSizes(4096, 64, 64, 256), 2, flops_per_element=0.0) == Form(a_by_weight=True, b_by_weight=True)


def test_in_16_bits_a_merged_weight_would_lose_a_small_correction():
    x, (weight, _), a, b = (one if isinstance(one, tuple) else one.detach().bfloat16() for one in tensors(SIZES))
    weight, small = weight.bfloat16(), 1e-4

    merged, apart = (
        CorrectedLinear.apply(x, (weight, None), a, b, (small, form)) for form in (Form(merges_forward=True), Form())
    )

    assert torch.equal(merged, torch.nn.functional.linear(x, weight))
    assert not torch.equal(apart, merged)


def trained(model_folder, dtype, prepare=lambda setup: None, checkpoints=False, **options):
    """Losses of three steps of a packed row, and the weights after them."""
    document_attention.register()
    switches = techniques(dtype=dtype, attn_implementation="document", gradient_checkpointing=checkpoints)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=getattr(torch, dtype), attn_implementation="document"
    )
    setup = Lora(lora_r=4, **options).setup(model, settings(techniques=switches))
    prepare(setup)
    if checkpoints:
        checkpointing.enable(setup.model)
    setup.model.train()
    scaler, losses = gradient_scaler("cpu", dtype), []
    for _ in range(3):
        batch = Lengths((20, 12), (9, 5)).batch(True)
        losses.append(forward_backward(setup, batch, 14, switches, scaler).item())
        update(setup, scaler, Update(1.0, 1.0))
    return losses, setup


def assert_alike(one, other, **tolerance):
    (losses, setup), (others, second) = one, other
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), **tolerance)
    assert losses[-1] < losses[0]
    for name, parameter in setup.parameters.items():
        torch.testing.assert_close(parameter, second.parameters[name], **tolerance)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "recomputed"])
def test_fused_maps_train_as_the_layers_of_peft_do(model_folder, checkpoints):
    fused = trained(model_folder, "float32", checkpoints=checkpoints, fused=True)

    assert_alike(fused, trained(model_folder, "float32", fused=False), rtol=1e-4, atol=1e-5)
    assert fused[1].notes == ()


def test_fused_maps_train_alike_in_bf16_up_to_its_rounding(model_folder):
    losses, _ = trained(model_folder, "bfloat16", fused=True)
    others, _ = trained(model_folder, "bfloat16", fused=False)

    assert losses == pytest.approx(others, rel=0.01)


def test_an_input_that_is_not_cast_trains_to_the_same_bits(model_folder):
    def cast_inputs(setup):
        for layer in filter(is_plain, (m for m in setup.model.modules() if hasattr(m, "lora_A"))):
            del layer._cast_input_dtype

    without = trained(model_folder, "bfloat16", fused=False)

    assert_alike(without, trained(model_folder, "bfloat16", cast_inputs, fused=False), rtol=0, atol=0)


def test_an_adapter_over_16_bit_weights_still_runs_outside_autocast(model_folder):
    _, setup = trained(model_folder, "bfloat16", fused=True)

    setup.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = setup.model(torch.arange(6)[None]).logits

    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_a_correction_that_is_none_of_a_plain_linear_map_is_noted(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))

    setup = Lora(lora_r=4, lora_target_modules=["q_proj"]).setup(model, settings())
    setup.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_()

    assert fuse(setup.model) == (
        "method.fused: 1 of 2 corrections are not of plain linear maps, e.g."
        " base_model.model.model.layers.0.self_attn.q_proj",
    )


@pytest.fixture
def shape(model_folder):
    return ModelShape.from_config(AutoModelForCausalLM.from_pretrained(model_folder).config.to_dict())


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (Lora(fused=True, lora_dropout=0.1), {}, "lora_dropout"),
        (Lora(fused=True, use_dora=True), {}, "use_dora"),
        (Lora(fused=True, bias="all"), {}, "bias: all"),
        (QLora(fused=True), {}, "bitsandbytes' own functions"),
        (Lora(fused=True), {"torch_compile": True}, "torch.compile"),
        (Lora(fused=True), {"offload": "weights", "gradient_checkpointing": True}, "streamed weights"),
        (Lora(fused=True), {"stage": StagePart(0, 2, 0, 1)}, "stages"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_cannot_be_fused_is_refused_with_its_reason(shape, method, changes, why):
    device = DeviceCapability("cpu", "here", 8 * 2**30)

    refusal = method.refuses(techniques(**changes), shape)

    assert refusal and why in refusal and refusal == conflict(method, techniques(**changes), device, shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_map_is_planned_to_cost_less_time_and_no_more_memory(shape, dtype):
    device = DeviceCapability("cpu", "here", 8 * 2**30)
    node = NodeCapability("here", 2, 8 * 2**30, (device,))

    fused, plain = (
        Lora(fused=on).estimate(workload(shape), device, node, techniques(dtype=dtype)) for on in (True, False)
    )

    assert fused.time.step_s < plain.time.step_s
    assert fused.memory == plain.memory
