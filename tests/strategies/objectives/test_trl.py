"""Loss, rewards and gradients of each objective are those of TRL's trainer on the same tokens, to 1e-5."""

import copy
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data.batches import collate
from orchestrator.training.evaluate import divergence_of
from orchestrator.training.model.references import compute_references
from orchestrator.training.parallel import ProcessGroup
from strategies import OBJECTIVES
from strategies.step.step import summed_loss
from tests.strategies.objectives.test_steps import ONE_BY_ONE, data_of, folders, move, set_up  # noqa: F401

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs pip install --no-deps trl"),
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]
SAMPLES = [0, 3, 5, 6, 11]
PAD = 2
CASES = {
    "dpo": ({}, {"loss_type": ["sigmoid"], "beta": 0.1}),
    **{
        f"dpo-{kind}": ({"loss_type": kind, "beta": 0.2}, {"loss_type": [kind], "beta": 0.2})
        for kind in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")
    },
    "dpo-discopop": (
        {"loss_type": "discopop", "discopop_tau": 0.5},  # 0.05 multiplies TRL's rounding in fp32
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
    ),
    **{
        f"dpo-{kind}": (
            {"loss_type": kind, "label_smoothing": 0.1},
            {"loss_type": [kind], "label_smoothing": 0.1},
        )
        for kind in ("robust", "exo_pair")
    },
    "ipo": ({"beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
    "orpo": ({"beta": 0.4}, {"beta": 0.4}),
    "simpo": ({"label_smoothing": 0.1}, {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1, "cpo_alpha": 0.0}),
    "reward": ({}, {}),
    "reward-centred": ({"center_rewards_coefficient": 0.3}, {"center_rewards_coefficient": 0.3}),
    "simpo-cpo": ({"cpo_alpha": 0.5}, {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5}),
}


def trainer_of(name, options, model, tokenizer, folder):
    """TRL's trainer around a model; its own rows are never used."""
    from datasets import Dataset as Rows

    rows = Rows.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    common = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, **options}
    if name.startswith("reward"):
        from trl import RewardConfig as Config
        from trl import RewardTrainer as Trainer
    elif name == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    elif name.startswith("simpo"):
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        common["loss_type"] = "simpo"
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    return Trainer(
        model=model,
        args=Config(**common, gradient_checkpointing=False, remove_unused_columns=False),
        processing_class=tokenizer,
        train_dataset=rows,
        **({"ref_model": reference_of(model)} if name.startswith(("dpo", "ipo")) else {}),
    )


def reference_of(model):
    return AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32, attn_implementation="sdpa")


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def inputs_of(data, name):
    """The tokens of the samples as TRL's collators lay them out: all chosen documents, then all rejected ones."""
    parts = [data.documents_of(index) for index in SAMPLES]
    documents = [part[0] for part in parts] + [part[1] for part in parts]
    answers = []
    for place in (0, 1):
        for index, part in zip(SAMPLES, parts, strict=True):
            whole = data.answers(index)
            own = whole[: part[0][1].sum()] if place == 0 else whole[part[0][1].sum() :]
            mask = part[place][1].copy()
            mask[mask] = own
            answers.append(mask)
    ids = padded([tokens.tolist() for tokens, _ in documents], PAD)
    attention = padded([[1] * len(tokens) for tokens, _ in documents], 0)
    completion = padded([mask.astype(int).tolist() for mask in answers], 0)
    if name.startswith("reward"):
        margins = {} if data.margins is None else {"margin": torch.tensor(data.margins[SAMPLES])}
        return {"input_ids": ids, "attention_mask": attention} | margins
    if not name.startswith(("orpo", "simpo")):
        return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    labels, half = ids.masked_fill(completion == 0, -100), len(SAMPLES)
    found = {}
    for kind, rows in (("chosen", slice(None, half)), ("rejected", slice(half, None))):
        found |= {
            f"{kind}_input_ids": ids[rows],
            f"{kind}_attention_mask": attention[rows],
            f"{kind}_labels": labels[rows],
        }
    return found | {"prompt_input_ids": ids[:half, :1], "prompt_attention_mask": attention[:half, :1]}


def rows_of(documents):
    """Token ids, their mask, and the mask of the answers, padded."""
    ids = padded([tokens.tolist() for tokens, _ in documents], PAD)
    attention = padded([[1] * len(tokens) for tokens, _ in documents], 0)
    return ids, attention, padded([mask.astype(int).tolist() for _, mask in documents], 0)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradients_of_labelled_rows_are_trls(kind, model_folder, folders, tmp_path):  # noqa: F811
    from datasets import Dataset as Rows
    from trl import KTOConfig, KTOTrainer

    chosen = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.7, "loss_type": kind}
    objective = OBJECTIVES["kto"](**chosen)
    data = data_of(folders, objective).select(SAMPLES)
    setup, everything = set_up(model_folder, ONE_BY_ONE, objective, "full"), list(range(len(SAMPLES)))
    base = copy.deepcopy(setup.model.state_dict())
    move(setup)
    data.references = compute_references(setup, data, ONE_BY_ONE, ProcessGroup())
    reference = copy.deepcopy(setup.model)
    setup.model.load_state_dict(base)  # likelier than its reference: the divergence is above 0

    setup.model.train()
    moved, _ = divergence_of(setup, data, everything, len(SAMPLES), ONE_BY_ONE, ProcessGroup())
    setup.objective.begin(len(SAMPLES), 0, moved)
    loss = summed_loss(setup, collate(data, everything, packing=False), ONE_BY_ONE) / len(SAMPLES)
    loss.backward()

    own = torch.cat([p.grad.flatten() for p in setup.parameters.values()])
    setup.optimizer.zero_grad(set_to_none=True)
    rows = Rows.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, **chosen}
    trainer = KTOTrainer(
        model=setup.model,
        ref_model=reference,
        args=KTOConfig(**options, gradient_checkpointing=False, remove_unused_columns=False),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        train_dataset=rows,
    )
    setup.model.train()
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = dict(zip(names, rows_of([data.tokens(index) for index in everything]), strict=True))
    others = rows_of([data.mismatched(index) for index in everything])
    inputs |= {f"KL_{name}": value for name, value in zip(names, others, strict=True)}
    expected = trainer.compute_loss(setup.model, inputs | {"label": torch.tensor(data.labels)})
    expected.backward()
    other = torch.cat([p.grad.flatten() for p in setup.parameters.values()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (own - other).norm() <= 1e-5 * other.norm()
    assert moved > 0 or kind != "kto"


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(name, model_folder, folders, tmp_path):  # noqa: F811
    options, theirs = CASES[name]
    objective = OBJECTIVES[name.partition("-")[0]](**options)
    data = data_of(folders, objective)
    setup = set_up(model_folder, ONE_BY_ONE, objective, "full")
    batch = collate(data, SAMPLES, packing=False)
    if objective.writes_text:
        with torch.no_grad():
            reference_D = setup.objective.answer_logps(setup.model, batch, "nll")
        data.references = (
            torch.zeros(len(data), 2, dtype=torch.float64)
            .index_put((torch.tensor(SAMPLES),), reference_D.view(-1, 2))
            .numpy()
        )
    move(setup)

    setup.model.train()
    setup.objective.begin(len(SAMPLES), data.num_chosen_tokens(SAMPLES))
    loss = summed_loss(setup, collate(data, SAMPLES, packing=False), ONE_BY_ONE) / len(SAMPLES)
    loss.backward()
    rewards = setup.objective.metrics_of(setup.objective.take())

    own = torch.cat([p.grad.flatten() for p in setup.parameters.values()])
    setup.optimizer.zero_grad(set_to_none=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = trainer_of(name, theirs, setup.model, tokenizer, tmp_path)
    setup.model.train()
    expected = trainer.compute_loss(setup.model, inputs_of(data, name))
    expected.backward()
    other = torch.cat([p.grad.flatten() for p in setup.parameters.values()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (own - other).norm() <= 1e-5 * other.norm()
    if not objective.writes_text:
        assert rewards["rewards/accuracies"] == pytest.approx(trainer._metrics["train"]["accuracy"][-1])
        assert rewards["rewards/margins"] == pytest.approx(trainer._metrics["train"]["margin"][-1], rel=1e-4, abs=1e-5)
        return
    told = trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer._stored_metrics["train"]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert rewards[key] == pytest.approx(told[key][-1], rel=1e-4, abs=1e-5)
