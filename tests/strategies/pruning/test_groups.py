"""What is removed, and when: counts and schedules that a person can check, and what is refused before the start."""

import contextlib
import dataclasses

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from strategies.export import Export
from strategies.families import FAMILIES
from strategies.methods.lora import Lora
from strategies.pruning.groups import (
    channels_of,
    heads_of,
    kept_of,
    layers_of,
    smaller_shape,
    why_no_config,
    why_unknown,
)
from strategies.pruning.method import PrunedLora
from strategies.pruning.schedule import SparsitySchedule
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload

SMOLLM2 = ModelShape(576, 30, 9, 3, 64, 1536, 49152, True)
TINY = ModelShape(64, 2, 4, 2, 16, 128, 500, True)
PLAIN = Techniques("float32", "sdpa", False, False, 1, 64)


def test_what_remains_is_a_multiple_and_never_nothing():
    assert kept_of(1536, 0.3, 32) == 1088 and kept_of(1536, 0.3) == 1075
    assert kept_of(3, 0.3) == 2 and kept_of(1, 0.9) == 1 and kept_of(40, 0.1, 32) == 32
    assert kept_of(100, 0.01, 64) == 100 or kept_of(100, 0.01, 64) == 64 * 2  # no more than there are
    assert kept_of(100, 0.01, 64) <= 100


def test_half_of_smollm2s_channels_are_a_third_less_parameters():
    """3 x 576 x 768 x 30 = 39.8 million of 134.5."""
    smaller = smaller_shape(SMOLLM2, [channels_of(SMOLLM2, 0.5, 32)])

    assert SMOLLM2.num_parameters == 134_515_008
    assert smaller.num_parameters == 134_515_008 - 3 * 576 * 768 * 30 == 94_701_888
    exports = PrunedLora(ratio=0.5).exports(SMOLLM2)
    assert exports.sizes == (
        "768 of 1536 channels of each MLP remain: 94,701,888 of 134,515,008 parameters (29.6% fewer)"
    )
    assert exports.sentences[0] == f"Sizes: {exports.sizes}" and exports.format == "model"
    assert exports.loads_with == {"transformers", "vllm", "llama.cpp"}


def test_key_value_groups_leave_with_the_query_heads_that_share_them():
    heads = heads_of(SMOLLM2, 0.3)
    smaller = smaller_shape(SMOLLM2, [heads])

    assert (heads.kept, smaller.num_heads, smaller.num_kv_heads, smaller.head_dim) == (2, 6, 2, 64)
    assert SMOLLM2.num_parameters - smaller.num_parameters == 30 * 576 * (2 * 192 + 2 * 64)
    assert [(part.path, part.width) for part in heads.parts] == [
        ("self_attn.q_proj", 192),
        ("self_attn.k_proj", 64),
        ("self_attn.v_proj", 64),
        ("self_attn.o_proj", 192),
    ]
    assert PrunedLora(groups="mlp+attention").exports(SMOLLM2).loads_with == {"transformers", "llama.cpp"}


def test_first_and_last_layers_are_never_dropped():
    layers = layers_of(SMOLLM2, 0.4)

    assert (layers.kept, layers.rows, layers.protected) == (18, 1, (0, 1, 2, 29))
    assert smaller_shape(SMOLLM2, [layers]).num_layers == 18


def test_masks_close_along_a_cubic_and_end_exactly():
    schedule = SparsitySchedule.of_run(200, 0.1, 0.5, 10)

    assert (schedule.start, schedule.end) == (20, 100)
    moves = [done for done in range(1, 201) if schedule.moves(done)]
    assert moves == [30, 40, 50, 60, 70, 80, 90, 100]
    assert schedule.part(20) == 0 and schedule.part(60) == pytest.approx(1 - 0.5**3) and schedule.part(100) == 1
    assert [channels_of(SMOLLM2, 0.5, 32).removed_at(schedule.part(one)) for one in (60, 100)] == [672, 768]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 12, 1000])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.1, 0.5), (0.98, 0.99), (0.0, 0.01)])
def test_whatever_the_length_of_a_run_masks_end_inside_it_and_at_their_goal(num_steps, begin, end):
    schedule = SparsitySchedule.of_run(num_steps, begin, end, 10)

    moves = [done for done in range(1, num_steps + 1) if schedule.moves(done)]
    parts = [schedule.part(done) for done in moves]
    assert moves[-1] == schedule.end <= num_steps and parts[-1] == 1 and parts == sorted(parts)


def test_a_run_without_steps_moves_nothing():
    schedule = SparsitySchedule.of_run(0, 0.1, 0.5, 10)

    assert schedule.end == 0 and not any(schedule.moves(done) for done in range(20))


ONE_B = ModelShape(2048, 16, 32, 8, 64, 8192, 128256, True)  # as Llama-3.2-1B


def test_heads_that_no_configuration_can_describe_are_refused_with_what_can_be():
    method = PrunedLora(groups="mlp+attention", ratio=0.3)

    assert "24 heads would remain, of which a llama model's hidden size (2048) must be a multiple" in str(
        method.refuses(PLAIN, ONE_B)
    )
    assert "set method.ratio to 0.5 (16 heads)" in str(method.refuses(PLAIN, ONE_B))
    assert PrunedLora(groups="mlp+attention", ratio=0.5).refuses(PLAIN, ONE_B) is None
    assert method.refuses(PLAIN, dataclasses.replace(ONE_B, model_type="mistral")) is None


@pytest.mark.parametrize(
    "name",
    [name for name, one in FAMILIES.items() if why_unknown(dataclasses.replace(TINY, model_type=name), True) is None],
)
def test_which_families_divide_their_hidden_size_is_what_transformers_checks(name):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    shape = dataclasses.replace(TINY, model_type=name, num_heads=8, num_kv_heads=4, head_dim=8)
    made = contextlib.nullcontext()
    if why_no_config(shape, dataclasses.replace(heads_of(shape, 0.25), kept=3)):
        made = pytest.raises(Exception, match="not a multiple of the number of attention heads")
    with made:
        AutoConfig.for_model(name, num_hidden_layers=2, intermediate_size=64, vocab_size=64, **sizes)


PHI = dataclasses.replace(TINY, model_type="phi")
MIXTRAL = dataclasses.replace(TINY, model_type="mixtral", num_experts=4, num_experts_per_token=2, expert_size=64)
PHI3 = dataclasses.replace(TINY, model_type="phi3")
OLMO2 = dataclasses.replace(TINY, model_type="olmo2")


@pytest.mark.parametrize(
    ("options", "changes", "shape", "words"),
    [
        ({}, {}, MIXTRAL, "mixtral models have experts, of which no group is known here"),
        ({}, {}, PHI, "only models with gated MLPs are pruned"),
        ({"groups": "mlp+attention"}, {}, PHI3, "phi3's attention is qkv_proj, o_proj: set method.groups: mlp"),
        ({"groups": "mlp+attention"}, {}, OLMO2, "norms all heads together"),
        ({"ratio": 0.1}, {}, TINY, "of 128 channels removes none of them: raise it, or lower method.multiple_of"),
        ({"groups": "mlp+attention", "ratio": 0.2}, {}, TINY, "of 2 key-value groups removes none of them"),
        ({"score": "layer", "ratio": 0.5}, {}, TINY, "of 2 layers is 1, and the first layers and the last stay: 0"),
        ({"score": "layer", "groups": "mlp+attention"}, {}, SMOLLM2, "set groups: mlp"),
        ({"prune_from": 0.5, "prune_until": 0.4}, {}, TINY, "lower prune_from"),
        ({}, {"torch_compile": True}, TINY, "untested with torch.compile"),
        ({}, {"offload": "weights"}, TINY, "set train.torch_compile: false and strategy.offload: none"),
        ({"score": "gate"}, {"optim": "muon"}, TINY, "set train.optim: adamw_torch_fused"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused_before_the_start(options, changes, shape, words):
    method, techniques = PrunedLora(**options), dataclasses.replace(PLAIN, **changes)

    assert words in str(method.refuses(techniques, shape))
    assert isinstance(method.exports(shape), Export)  # says what it would be all the same


@pytest.mark.parametrize("options", [{}, {"groups": "mlp+attention"}, {"score": "layer"}, {"score": "gate"}])
def test_what_can_be_is_not(options):
    assert PrunedLora(**options).refuses(PLAIN, SMOLLM2) is None


def test_scores_take_time_beside_lora_where_gradients_are_asked_and_little_memory():
    cpu = DeviceCapability("cpu", "test", 64 * 2**30)
    node = NodeCapability("here", 2, 64 * 2**30, (cpu,))
    work = Workload(SMOLLM2, 100, 30000, 9000, 300, 8, 10, 80)

    def plan(method):
        return method.estimate(work, cpu, node, PLAIN)

    lora, pruned = plan(Lora(lora_r=8, lora_alpha=16)), plan(PrunedLora(ratio=0.5))
    still, gated = plan(PrunedLora(ratio=0.5, score="random")), plan(PrunedLora(ratio=0.5, score="gate"))
    groups = 30 * 1536
    assert pruned.num_trainable_parameters == lora.num_trainable_parameters
    assert gated.num_trainable_parameters == lora.num_trainable_parameters + groups
    assert pruned.memory.weights_bytes - lora.memory.weights_bytes == 8 * groups
    assert lora.time.step_s < still.time.step_s < pruned.time.step_s
    assert still.time.step_s < 1.03 * lora.time.step_s
