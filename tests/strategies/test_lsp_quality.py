"""Proof (e): of what full AdamW gains over frozen layers, learned subspaces recover a part, averaged over seeds."""

import pytest
import torch

from strategies.lsp_offload.optimizer import AdamNumbers, Learning, LspAdamW, ProjectedWeight
from strategies.lsp_offload.projector import Subspace
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.transport import EmulatedBus

VOCABULARY, WIDTH, CONTEXT, STEPS, RATE = 64, 128, 6, 300, 3e-3
pytestmark = pytest.mark.slow


class Model(torch.nn.Module):
    """A small neural language model (Bengio et al. 2003): the two wide layers are what methods differ in."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.wide = torch.nn.ModuleList(
            [torch.nn.Linear(CONTEXT * WIDTH, 2 * WIDTH, bias=False), torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)]
        )
        self.output = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BT):
        x = self.embed(tokens_BT).flatten(1)
        for layer in self.wide:
            x = torch.nn.functional.gelu(layer(x))
        return self.output(x)


def text(seed, count):
    """Tokens of a random second-order source: each pair has a few likely followers."""
    made = torch.Generator().manual_seed(0)
    followers = torch.randint(0, VOCABULARY, (VOCABULARY, VOCABULARY, 3), generator=made)
    drawn = torch.Generator().manual_seed(seed)
    tokens = [1, 2]
    choices = torch.randint(0, 3, (count,), generator=drawn).tolist()
    for choice in choices:
        tokens.append(int(followers[tokens[-2], tokens[-1], choice]))
    windows = torch.tensor(tokens).unfold(0, CONTEXT + 1, 1)
    return windows[:, :-1], windows[:, -1]


def loss_after(seed, method):
    torch.manual_seed(seed)
    model = Model()
    inputs, targets = text(seed + 1, 20_000)
    held_inputs, held_targets = text(10_000, 4_000)
    rest = [*model.embed.parameters(), *model.output.parameters()]
    wide = [layer.weight for layer in model.wide]
    if method == "frozen":
        for weight in wide:
            weight.requires_grad_(False)
    adam = torch.optim.AdamW(rest + (wide if method == "full" else []), lr=RATE, weight_decay=0.0)
    lsp = None
    if method in ("learned", "random"):
        generator = torch.Generator().manual_seed(seed)
        spaces = [Subspace.random(tuple(weight.shape), 64, 4, generator) for weight in wide]
        weights = [
            ProjectedWeight(i, weight, space) for i, (weight, space) in enumerate(zip(wide, spaces, strict=True))
        ]
        learning = Learning(100, 0.3, 100) if method == "learned" else None
        lsp = LspAdamW(weights, EmulatedBus(), Lanes(), AdamNumbers(), RATE, learning)
        for i, layer in enumerate(model.wide):
            layer.register_forward_pre_hook(lsp.waiter(i))
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(0, len(inputs), (64,), generator=order)
        torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        if lsp:
            lsp.pass_done()
            lsp.update()
        adam.step()
        adam.zero_grad()
    if lsp:
        lsp.lanes.wait_all()
        lsp.close()
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(held_inputs), held_targets).item()


def test_learned_subspaces_recover_a_part_of_the_gap_and_no_less_than_random_ones():
    losses = {
        method: [loss_after(seed, method) for seed in (0, 1, 2)] for method in ("frozen", "full", "learned", "random")
    }
    mean = {method: sum(found) / 3 for method, found in losses.items()}
    print({method: round(loss, 4) for method, loss in mean.items()})
    gap = mean["frozen"] - mean["full"]

    assert gap > 0.02, "a gap that can be recovered"
    assert (mean["frozen"] - mean["learned"]) / gap >= 0.25
    assert mean["learned"] <= mean["random"]
