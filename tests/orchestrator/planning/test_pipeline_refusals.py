"""What cannot be a pipeline is refused before anything starts, by what the user can change."""

import dataclasses

import pytest

from orchestrator.errors import JobError
from strategies.shape import ModelShape
from tests.orchestrator.planning.machines import MIDDLE, SMALL, machine
from tests.orchestrator.planning.test_choice import plan

TWO = machine("a", "RTX 3090"), machine("b", "RTX 3090")
THREE = (*TWO, machine("c"))
SHALLOW, SINGLE = dataclasses.replace(SMALL, num_layers=2), dataclasses.replace(SMALL, num_layers=1)
GPT2 = ModelShape.from_config(
    {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
)
GIGABIT, SLOW = 1e9 / 8, 4.9e6 / 8
PIPELINE = "strategy: {mode: pipeline}\n"
LORA = f"{PIPELINE}method: {{type: lora, %s}}\n"


@pytest.mark.parametrize(
    ("shape", "nodes", "text", "message"),
    [
        (SHALLOW, THREE, "strategy: {mode: pipeline, pipeline: {stages: 3}}\n", "is 3, and the model has 2 layers"),
        (SHALLOW, THREE, "strategy: {pipeline: {stages: 3}}\n", "stages is 3, and the model has 2 layers"),
        (SHALLOW, THREE, f"{PIPELINE}cluster: {{num_workers: 3}}\n", "num_workers is 3, and the model has 2 layers"),
        (SINGLE, TWO, PIPELINE, "the model has one; set it to auto"),
        (SMALL, TWO, "strategy: {mode: pipeline, pipeline: {stages: 3}}\n", "2 devices can train; lower it to 2"),
        (SMALL, TWO[:1], PIPELINE, "here is one worker"),
        (GPT2, TWO, PIPELINE, "gpt2 models are not cut into stages: .*: set strategy.mode: auto"),
        (SMALL, TWO, f"{PIPELINE}method: {{type: full}}\n", "one tensor of this model, and it trains"),
        (SMALL, TWO, LORA % "modules_to_save: [lm_head]", "one tensor of this model, and it trains"),
        (SMALL, TWO, LORA % "modules_to_save: [embed_tokens]", "one tensor of this model, and it trains"),
        (SMALL, TWO, LORA % "target_modules: [q_proj, lm_head]", "one tensor of this model, and it trains"),
        (SMALL, TWO, LORA % "trainable_token_indices: [1, 2]", "one tensor of this model, and it trains"),
        (
            SMALL,
            TWO,
            "strategy: {mode: pipeline, deepspeed: {zero_optimization: {overlap_comm: true}}}\n",
            "strategy.deepspeed configures ZeRO, of which a pipeline has none: remove it",
        ),
        (
            SMALL,
            TWO,
            "strategy: {pipeline: {stages: 2}, deepspeed: {zero_optimization: {overlap_comm: true}}}\n",
            "strategy.pipeline.stages: with strategy.deepspeed no pipeline is made",
        ),
        (SMALL, TWO, "strategy: {pipeline: {ahead: 1}, local_steps: 4}\n", "with strategy.local_steps no pipeline"),
        (SMALL, TWO, "strategy: {mode: zero2, pipeline: {stages: 2}}\n", "strategy.mode is zero2; set it to pipeline"),
        (SMALL, TWO, "strategy: {mode: pipeline, offload: optimizer}\n", "stages do not offload their optimizer"),
        (SMALL, TWO, f"{PIPELINE}train: {{torch_compile: true}}\n", "set train.torch_compile: false"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_be_is_refused_with_what_to_change(shape, nodes, text, message):
    with pytest.raises(JobError, match=message):
        plan(shape, *nodes, text=text, link_bytes_per_s=GIGABIT)


def test_a_link_that_cannot_carry_hidden_states_is_refused_by_both_names_and_its_rate():
    with pytest.raises(JobError, match=r"the best link of these machines, a - b, carries 4.9 Mbit/s, and .* needs 5"):
        plan(SMALL, *TWO, text=PIPELINE, link_bytes_per_s=SLOW)


@pytest.mark.parametrize(("shape", "text"), [(SMALL, PIPELINE), (MIDDLE, LORA % "modules_to_save: [lm_head]")])
def test_what_can_be_cut_is_planned_in_stages(shape, text):
    made = plan(shape, *TWO, text=text, link_bytes_per_s=GIGABIT)

    assert [part.techniques.stage.index for part in made.nodes] == [0, 1]


def test_a_model_that_cannot_be_cut_is_planned_in_one_piece_where_the_job_leaves_it_open():
    assert all(part.techniques.stage is None for part in plan(GPT2, *TWO, link_bytes_per_s=GIGABIT).nodes)
