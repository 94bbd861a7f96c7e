"""What is promised of a memory whose rows lie on the host: exact gradients, counted bytes, a device without rows."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from clusters.capability import DeviceCapability, NodeCapability
from strategies.lsp_offload.adam import AdamNumbers
from strategies.lsp_offload.optimizer import LaneFailed, Route
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.transport import EmulatedBus, HostBuffers
from strategies.measure.trace import Lengths, LiveStorages, even
from strategies.model.targets import architecture_of_shape
from strategies.shape import ModelShape
from strategies.sparse_memory import product
from strategies.sparse_memory.folder import put_on
from strategies.sparse_memory.layer import MemorySizes, RowMemory
from strategies.sparse_memory.method import SparseMemory
from strategies.sparse_memory.optimizer import RowAdamW, SpecificRows
from strategies.sparse_memory.product import Brought, read_rows
from strategies.sparse_memory.router import InputStatistics, ProductKeys, keys_for
from strategies.sparse_memory.row_adam import move_rows, zero_row_moments
from strategies.sparse_memory.slots import BackgroundCounts, most_specific
from strategies.step.step import Update, forward_backward, update
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.workload import Workload
from tests.strategies import test_trace as peaks
from tests.strategies.test_contract import CPU, NODE, base_model, settings, techniques, workload

SMALL = SparseMemory(memory_rows=64, rows_per_token=4, layers_to_transform=[1])
BATCHES = [Lengths((20, 12), (9, 5)), Lengths((7,), (4,))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def whole_numbers(*shape, seed, most=3):
    """Products and sums of these are exact in fp32, in any order."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).float()


# What rows add, and their gradients.


def dense_masked(x_TD, rows_M2D, rows_TK, scale):
    """The memory as one product with all rows, of which a token's mask leaves its own."""
    keys_MD, values_MD = rows_M2D.chunk(2, dim=1)
    mask_TM = torch.zeros(len(x_TD), len(rows_M2D)).scatter_(1, rows_TK, 1.0)
    return scale * ((torch.relu(x_TD @ keys_MD.T) * mask_TM) @ values_MD)


@pytest.mark.parametrize("at_once", [1 << 22, 5])
def test_gathered_rows_have_exactly_the_gradients_of_dense_masked_ones(monkeypatch, at_once):
    monkeypatch.setattr(product, "_AT_ONCE", at_once)
    x_TD, rows_M2D = whole_numbers(9, 6, seed=1).requires_grad_(), whole_numbers(16, 12, seed=2).requires_grad_()
    rows_TK = torch.stack([torch.randperm(16, generator=generator(t))[:4] for t in range(9)])
    rows_U, places_TK = rows_TK.unique(return_inverse=True)
    weights_TD, taken = whole_numbers(9, 6, seed=3), []

    y_TD = read_rows(
        x_TD, rows_M2D, Brought(rows_M2D.detach()[rows_U], places_TK, 0.25), lambda *given: taken.append(given)
    )
    (y_TD * weights_TD).sum().backward()
    ((gradient_U2D, readers_U),), x_grad, x_TD.grad = taken, x_TD.grad, None
    expected_TD = dense_masked(x_TD, rows_M2D, rows_TK, 0.25)
    (expected_TD * weights_TD).sum().backward()

    assert torch.equal(y_TD, expected_TD) and torch.equal(x_grad, x_TD.grad)
    assert torch.equal(gradient_U2D, rows_M2D.grad[rows_U])
    unread = sorted(set(range(16)) - set(rows_U.tolist()))
    assert unread and not rows_M2D.grad[unread].any()
    assert readers_U.tolist() == [int((rows_TK == row).sum()) for row in rows_U]


def test_tokens_whose_output_does_not_matter_are_no_readers():
    x_TD, rows = torch.ones(3, 4), torch.ones(2, 8).requires_grad_()
    taken = []

    y_TD = read_rows(x_TD, rows, Brought(rows.detach(), torch.tensor([[0], [1], [1]]), 1.0), lambda *g: taken.append(g))
    y_TD[:2].sum().backward()

    assert taken[0][1].tolist() == [1, 1]


# The router.


@pytest.mark.parametrize(("num_keys", "top_k"), [(8, 5), (4, 9), (3, 9)])
def test_a_token_reads_the_rows_with_the_largest_sums_of_all_pairs(num_keys, top_k):
    router, x_TD = ProductKeys(6, num_keys, top_k), torch.randn(50, 6, generator=generator())
    router.draw(generator(1))

    rows_TK = router.choose(x_TD)

    halves = torch.nn.functional.normalize(x_TD.unflatten(1, (2, 3)), dim=-1)
    first, second = (halves[:, half] @ router.keys[half].T for half in (0, 1))
    pairs_TM = (first[:, :, None] + second[:, None]).flatten(1)
    assert torch.equal(rows_TK.sort().values, pairs_TM.topk(top_k).indices.sort().values)
    assert all(len(set(row)) == top_k for row in rows_TK.tolist())


def test_what_all_tokens_have_in_common_does_not_choose_their_rows():
    common, own = 20 * torch.randn(16, generator=generator()), torch.randn(400, 16, generator=generator(1))
    router, seen = ProductKeys(16, 16, 2), InputStatistics(torch.zeros(16))
    router.draw(generator(2))
    crowded = len(router.choose(own + common).unique())

    for part in (own + common).split(150):
        seen.add(part)
    seen.tell(router)

    torch.testing.assert_close(router.mean, (own + common).mean(0))
    torch.testing.assert_close(router.spread, (own + common).std(0, correction=0))
    assert len(router.choose(own + common).unique()) > 3 * crowded


@pytest.mark.parametrize(("rows", "keys"), [(4, 2), (16384, 128), (5000, None)])
def test_only_square_numbers_of_rows_have_names(rows, keys):
    assert keys_for(rows) == keys


# AdamW of rows.


def test_each_row_follows_the_adamw_of_the_steps_in_which_it_had_a_gradient():
    numbers = AdamNumbers(1e-2, 0.9, 0.99, 1e-8, 0.1)
    start_MW, used_SM = torch.randn(6, 5, generator=generator()), torch.rand(30, 6, generator=generator(1)) < 0.4
    used_SM[:, 5] = False
    rows_MW = start_MW.clone()
    state = zero_row_moments(rows_MW)
    alone = [torch.nn.Parameter(row.clone()) for row in start_MW]
    plain = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "foreach": False}
    dense = [torch.optim.AdamW([p], **plain) for p in alone]
    for step, used_M in enumerate(used_SM):
        gradient_MW = torch.randn(6, 5, generator=generator(100 + step))
        places = used_M.nonzero()[:, 0]
        move_rows(rows_MW, state, places, gradient_MW[places], numbers)
        for row in places.tolist():
            alone[row].grad = gradient_MW[row].clone()
            dense[row].step()

    torch.testing.assert_close(rows_MW, torch.stack([p.detach() for p in alone]), rtol=1e-6, atol=1e-7)
    assert state["step"].tolist() == used_SM.sum(0).tolist()
    assert torch.equal(rows_MW[5], start_MW[5]) and not state["exp_avg"][5].any() and not state["exp_avg_sq"][5].any()


# A memory in a model.


def memory_of(width=8, num_keys=8, top_k=3, layer=1, seed=0):
    memory = RowMemory(layer, MemorySizes(width, num_keys, top_k), torch.device("cpu"), torch.float32)
    memory.draw(seed)
    with torch.no_grad():
        memory.rows.chunk(2, dim=1)[1].normal_(generator=generator(seed + 1))
    return memory


def optimizer_of(memories, lanes=None, specific=None):
    return RowAdamW(memories, Route(EmulatedBus(), lanes or Lanes(overlapped=False)), AdamNumbers(1e-2), specific)


def loss_of(memories, step, tokens=12, width=8):
    x = torch.randn(tokens, width, generator=generator(step))
    for memory in memories:
        x = x + memory(x)
    return x.square().mean()


def train(made, memories, steps, max_grad_norm=1.0, accumulate=2):
    for step in range(steps):
        for part in range(accumulate):
            made.last_pass(max_grad_norm)
            loss_of(memories, 10 * step + part).backward()
        made.update(max_grad_norm)
    made.settle()


def test_rows_that_no_token_read_stay_as_they_are_bit_by_bit():
    memory = memory_of(num_keys=16)
    made, before = optimizer_of([memory]), memory.rows.detach().clone()
    train(made, [memory], 3)

    moved_M = made.state[memory.rows]["step"] > 0
    assert 0 < moved_M.sum() < len(moved_M)
    assert torch.equal(memory.rows[~moved_M], before[~moved_M])
    assert (memory.rows[moved_M] != before[moved_M]).any(dim=1).all()
    assert not made.state[memory.rows]["exp_avg"][~moved_M].any()


def test_beside_the_computation_rows_move_as_they_do_after_it():
    """Three lanes or none: the same rows to the last bit, since a layer waits for its own before it reads them."""
    results = []
    for overlapped in (False, True):
        memories = [memory_of(layer=layer, seed=layer) for layer in (0, 1, 2)]
        made = optimizer_of(memories, Lanes(overlapped=overlapped))
        train(made, memories, 6, max_grad_norm=0.5, accumulate=3)
        results.append([memory.rows.detach().clone() for memory in memories])
        made.close()

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_gradient_that_is_not_finite_moves_nothing_and_the_next_step_is_a_step():
    memory, other = memory_of(), memory_of()
    made, plain = optimizer_of([memory]), optimizer_of([other])
    (memory(torch.randn(4, 8)) * float("nan")).sum().backward()

    with pytest.raises(LaneFailed, match="no row has moved"):
        made.update(1.0)
    assert memory.rows.grad is None
    train(made, [memory], 2)
    train(plain, [other], 2)
    assert torch.equal(memory.rows, other.rows)


def test_a_step_that_is_given_up_leaves_nothing_behind():
    memory, other = memory_of(), memory_of()
    made, plain = optimizer_of([memory]), optimizer_of([other])
    loss_of([memory], 99).backward()
    made.zero_grad()

    train(made, [memory], 2)
    train(plain, [other], 2)

    assert torch.equal(memory.rows, other.rows)


def test_host_buffers_of_any_number_of_rows_are_few_and_are_used_again():
    buffers = HostBuffers()
    sizes = set()
    for rows in range(1, 200):
        taken = buffers.take((rows, 3), torch.bfloat16)
        assert taken.shape == (rows, 3) and taken.dtype == torch.bfloat16
        sizes.add(len(taken.untyped_storage()) // 6)
        buffers.give(taken)
        buffers.give(torch.empty(rows, 3))  # somebody else's

    assert len(sizes) < 50 and max(sizes) <= 224
    assert sum(map(len, buffers._free.values())) == len(sizes)


# Bytes, memory.


def prepared(model_folder, method=SMALL, checkpoints=False, **switches):
    setup = method.setup(base_model(method, model_folder), settings(techniques=techniques(**switches)))
    if checkpoints:
        checkpointing.enable(setup.model)
    setup.model.train()
    return setup


def memory_in(setup):
    return next(module for module in setup.model.modules() if isinstance(module, RowMemory))


def one_pass(setup, lengths):
    forward_backward(setup, lengths.batch(False), 9, techniques(), gradient_scaler("cpu", "float32"))


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("slots", ["all", "surprising"])
def test_what_crosses_the_bus_is_the_different_rows_there_and_their_gradients_back(model_folder, checkpoints, slots):
    method = dataclasses.replace(SMALL, slots=slots)
    setup = prepared(model_folder, method, checkpoints)
    memory, read = memory_in(setup), []
    memory.observer = lambda x, rows: read.append(len(rows.unique()))
    shape = ModelShape.from_config(setup.model.config.to_dict())
    switched, width = techniques(gradient_checkpointing=checkpoints), shape.hidden_size
    visits = 2 if checkpoints else 1

    for lengths in BATCHES:
        one_pass(setup, lengths)

    different = sum(read[::visits])
    down, up = method._costs(shape, switched).bytes_of_rows(different, 2 * width * 4)
    assert len(read) == 2 * visits and setup.optimizer.transport.up_bytes == up == visits * different * 2 * width * 4
    named = 4 * (visits + (slots == "surprising"))
    assert setup.optimizer.transport.down_bytes == down == different * (2 * width * 4 + named)
    assert setup.streaming.report()["bus_up_bytes"] == up


class HostSide(Lanes):
    """Lanes whose work, done at once, is not counted as the device's."""

    def submit(self, layer, stages, gate=None):
        with _disable_current_modes():
            super().submit(layer, stages, gate)


class HostMemory(HostBuffers):
    def take(self, shape, dtype=torch.float32):
        with _disable_current_modes():
            return super().take(shape, dtype)


def peak_of(call):
    """Bytes of the device's tensors alive at once beside those from before."""
    with LiveStorages() as counted:
        call()
    return counted.peak_bytes


def prepared_with_host(model_folder, memory_rows):
    """A training whose first step is done, and whose host's memory is not counted; each token reads rows of its own."""
    setup = prepared(model_folder, dataclasses.replace(SMALL, memory_rows=memory_rows))
    setup.optimizer.lanes, setup.optimizer.transport.buffers = HostSide(overlapped=False), HostMemory()
    memory_in(setup).router.choose = lambda x_TD: torch.arange(4 * len(x_TD)).view(-1, 4)
    one_pass(setup, BATCHES[0])
    setup.optimizer.update(1.0)
    return setup


def test_the_devices_peak_does_not_depend_on_how_many_rows_there_are(model_folder):
    """What a pass holds follows from its tokens; the number of rows is known to the router alone, as its root."""
    peaks = {}
    for rows in (1024, 65536):
        setup = prepared_with_host(model_folder, rows)
        peaks[rows] = peak_of(lambda setup=setup: one_pass(setup, BATCHES[0]))
        assert (setup.optimizer.state[memory_in(setup).rows]["step"] > 0).sum() > 20

    assert peaks[1024] == peaks[65536] < 0.05 * 65536 * 2 * 64 * 4


@pytest.mark.parametrize("num_keys", [32, 256])
def test_a_router_holds_its_sub_keys_and_for_a_moment_their_scores(num_keys):
    router, x_TD = ProductKeys(64, num_keys, 4), torch.randn(40, 64)

    held = sum(buffer.nbytes for buffer in router.buffers())
    peak = peak_of(lambda: router.choose(x_TD))

    assert held == 4 * 64 * num_keys + 2 * 4 * 64
    scores, others = 2 * 40 * num_keys * 4, 40 * (2 * 64 * 4 + 4 * 4 * 12 + 2 * 4 * 12)
    assert scores < peak < 2 * scores + others


def test_the_plan_keeps_rows_on_the_host_and_their_number_out_of_the_device(model_folder):
    shape = ModelShape.from_config(json.loads((model_folder / "config.json").read_text()))
    gpu = DeviceCapability("cuda", "GPU", 24 * 2**30, compute_capability=(8, 6))
    node = NodeCapability("here", 8, 64 * 2**30, (gpu,))

    def plan(rows):
        return SparseMemory(memory_rows=rows).estimate(workload(shape), gpu, node, techniques(dtype="bfloat16")).memory

    few, many = plan(16384), plan(4 * 16384)

    assert many.host_bytes - few.host_bytes == 3 * 16384 * (16 * 2 * shape.hidden_size + 4)
    passed = 0.05 * few.tensors_bytes  # of more rows a pass reads more different ones
    assert abs(many.tensors_bytes - few.tensors_bytes - 4 * shape.hidden_size * (256 - 128)) < passed


def test_a_pass_over_the_bus_takes_the_time_of_its_bytes(model_folder):
    shape = ModelShape.from_config(json.loads((model_folder / "config.json").read_text()))

    def seconds(rate):
        gpu = DeviceCapability(
            "cuda", "GPU", 24 * 2**30, host_to_device_bytes_per_s=rate, device_to_host_bytes_per_s=rate,
            sources={"host_to_device_bytes_per_s": "measured"},
        )  # fmt: skip
        node = NodeCapability("here", 8, 64 * 2**30, (gpu,))
        return SMALL.estimate(workload(shape), gpu, node, techniques()).time.transfer_s

    costs = SMALL._costs(shape, techniques())
    passes, tokens = 4, 60.0  # a step of 240 tokens, in rows of at most 64
    crossed_s = passes * sum(costs.bus_bytes(tokens)) / 1e3
    assert seconds(1e3) - seconds(2e3) == pytest.approx(crossed_s / 2, rel=0.02)


# Rows that are specific to new data.


def test_specific_rows_are_read_often_here_and_rarely_in_the_background():
    background = BackgroundCounts(5)
    background.add(torch.tensor([[0, 1], [0, 2], [0, 1]]))
    reads_P = torch.tensor([4, 2, 2, 1])  # of rows 0, 1, 2, 4

    assert background.readers_M.tolist() == [3, 2, 1, 0, 0] and background.num_tokens == 3
    torch.testing.assert_close(background.rareness(torch.tensor([0, 1])).exp(), torch.tensor([1.0, 4 / 3]).double())
    places_P = torch.tensor([0, 1, 2, 4])
    # 4 log 1 = 0, 2 log 4/3 = .58, 2 log 2 = 1.39, log 4 = 1.39: of the last two the first
    assert most_specific(places_P, reads_P, background, 1).tolist() == [2]
    assert most_specific(places_P, reads_P, background, 3).tolist() == [1, 2, 4]
    assert most_specific(places_P, reads_P, background, 9).tolist() == [0, 1, 2, 4]


def test_a_step_moves_no_more_rows_than_asked_and_forgets_the_others_gradients():
    memory = memory_of(num_keys=8)
    made = optimizer_of([memory], specific=SpecificRows(5, {1: BackgroundCounts(64)}))
    before = memory.rows.detach().clone()
    loss_of([memory], 0).backward()
    read = int(memory.rows.grad.any(dim=1).sum())

    made.update(1.0)

    assert read > 5 and made.report()["rows_moved"] == 5
    assert int((memory.rows != before).any(dim=1).sum()) == 5
    loss_of([memory], 1, tokens=1).backward()
    assert int(memory.rows.grad.any(dim=1).sum()) <= 3  # of the last step nothing is left


def test_reads_of_padding_count_nowhere(model_folder):
    method = dataclasses.replace(SMALL, slots="surprising")
    setup = prepared(model_folder, method)
    padded, alone = Lengths((20, 12), (9, 5)).batch(False), [Lengths((n,), (5,)).batch(False) for n in (20, 12)]

    def looked(*batches):
        counts = setup.held_out_observer._counts[1]
        counts.readers_M.zero_(), counts.num_tokens.zero_()
        for batch in batches:
            with setup.held_out_observer.over(batch), torch.no_grad():
                setup.model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
        return counts.readers_M.clone(), int(counts.num_tokens)

    (together, tokens), (apart, as_many) = looked(padded), looked(*alone)

    assert tokens == as_many == 32 and torch.equal(together, apart)
    told = setup.held_out_observer.end()
    assert told["rows_read"] == int((apart > 0).sum()) and "32 tokens of held-out rows" in told["text"]


def test_routers_learn_from_tokens_alone_and_the_pass_moves_nothing(model_folder):
    setup = prepared(model_folder)
    batch, learner, memory, seen = BATCHES[0].batch(False), setup.learner, memory_in(setup), []
    learner.begin_learning(1)
    learner.watch(batch)
    plain, memory.observer = memory.observer, lambda x, rows: (seen.append(x), plain(x, rows))
    setup.model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits.sum().backward()

    told = learner.end_learning()

    real = seen[0][batch.attention_mask_BT.flatten().bool()]
    assert told["num_tokens"] == len(real) == 32
    torch.testing.assert_close(memory.router.mean, real.mean(0))
    assert memory.rows.grad is None and memory.observer is None
    assert learner.is_due(0) and not learner.is_due(1)


# What is handed back, what is refused.


def test_a_folder_of_another_model_or_of_no_memories_is_refused(model_folder, tmp_path):
    setup = prepared(model_folder)
    setup.export(tmp_path / "made")
    model, config = base_model(SMALL, model_folder), tmp_path / "made" / "adapter_config.json"
    settings_of = json.loads(config.read_text())

    for changes, message in (
        ({"num_keys": 9}, "belongs to another model.*keys"),
        ({"layers_to_transform": [0]}, "belongs to another model"),
        ({"layers_to_transform": [7]}, "holds no memories: memories of 8 x 8 rows.* of 2"),
        ({"num_keys": 10**9}, "holds no memories"),
        ({"top_k": "four"}, "holds no memories.*top_k"),
    ):
        config.write_text(json.dumps(settings_of | changes))
        with pytest.raises(ValueError, match=message):
            put_on(copy.deepcopy(model), tmp_path / "made")
    (tmp_path / "made" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no memories"):
        put_on(model, tmp_path / "made")


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"memory_rows": 5000}, {}, "a square number of rows: set it to 5041"),
        ({"memory_rows": 4, "rows_per_token": 5}, {}, "rows_per_token is 5, and there are 4 rows"),
        ({}, {"offload": "optimizer"}, "on the host itself"),
        ({}, {"zero_stage": 1}, "strategy.mode: single"),
        ({}, {"dtype": "float16"}, "set model.dtype"),
        ({}, {"optim": "sgd"}, "set train.optim: auto"),
        ({}, {"torch_compile": True}, "set train.torch_compile: false"),
    ],
)
def test_what_a_memory_cannot_do_is_refused_with_the_way_out(model_folder, options, changes, message):
    shape = ModelShape.from_config(json.loads((model_folder / "config.json").read_text()))

    assert message in SparseMemory(**options).refuses(techniques(**changes), shape)


@pytest.mark.parametrize(("name", "what"), [("opt-125m", "no modules of their own"), ("mixtral", "are experts")])
def test_families_without_an_mlp_of_their_own_are_refused(name, what):
    values = {
        "opt-125m": {"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12,
                     "ffn_dim": 3072, "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 768},
        "mixtral": {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100},
    }[name]  # fmt: skip

    assert what in SparseMemory().refuses(techniques(), ModelShape.from_config(values))


@pytest.mark.parametrize(
    ("layers", "message"), [([], "at least one"), ([1, 1], "none twice"), ([2], "2 is no layer.*0 to 1"), ([1], None)]
)
def test_layers_that_the_model_does_not_have_are_named(model_folder, layers, message):
    shape = ModelShape.from_config(json.loads((model_folder / "config.json").read_text()))

    found = SparseMemory(layers_to_transform=layers).find_misfits(architecture_of_shape(shape))

    assert (not found) if message is None else __import__("re").search(message, found[0])


def test_more_rows_learn_as_much(model_folder):
    """The same pairs of tokens by heart: what a memory of many rows reaches, one of few does not undercut."""
    losses = {}
    for rows in (16, 4096):
        setup = prepared(model_folder, dataclasses.replace(SMALL, memory_rows=rows))
        batch, scaler = Lengths((24, 24, 24), (20, 20, 20)).batch(False), gradient_scaler("cpu", "float32")
        batch.input_ids_BT.random_(0, 300, generator=generator())
        batch.__post_init__()
        for _ in range(40):
            loss = forward_backward(setup, batch, 60, techniques(), scaler)
            update(setup, scaler, Update(1.0, 1.0))
        losses[rows] = loss.item()

    assert losses[4096] <= losses[16]


@pytest.mark.parametrize(("dtype", "checkpoints"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_the_plans_bytes_are_what_the_allocator_hands_out(monkeypatch, dtype, checkpoints):
    """Of a pass whose tokens read any rows, as the formula has it; sums of gradients lie where nobody looks."""

    def choose(router, x_TD):
        first_T1 = torch.randint(16384, (len(x_TD), 1), generator=generator())
        return (first_T1 + 97 * torch.arange(router.top_k)) % 16384

    monkeypatch.setattr(ProductKeys, "choose", choose)
    method, asked, lengths = SparseMemory(memory_rows=16384), peaks.settings(dtype, checkpoints), even(4, 200, 0.5)
    work = Workload(ModelShape.from_config(peaks.CONFIG), 4, 800, 400, 200, 4, 1, 4)

    sums_bytes = 16384 * 2 * work.shape.hidden_size * 4
    allocated = peaks.allocated_peak(method, asked, lengths) + sums_bytes

    predicted = method.estimate(work, CPU, NODE, asked.techniques).memory.tensors_bytes
    assert predicted == pytest.approx(allocated, rel=0.1)
