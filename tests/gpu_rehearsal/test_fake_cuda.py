"""The product's own set-up, step, checkpoint and restore on fake tensors of two cards: no GPU, and no shortcut."""

import pytest

from tests.gpu_rehearsal import fake_cuda
from tests.gpu_rehearsal.cases import CASES, pairs, possible


@pytest.fixture(scope="module")
def stubs(request, tmp_path_factory):
    if fake_cuda.compiler() is None:
        pytest.skip("no C++ compiler (c++, g++, clang++): the stubs that make torch take fake cuda tensors need one")
    kept = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return kept.mkdir("gpu_rehearsal") if kept else tmp_path_factory.mktemp("gpu_rehearsal")


@pytest.fixture(scope="module")
def rehearsed(stubs):
    return {line["name"]: line for line in fake_cuda.run("tests.gpu_rehearsal.rehearsal", stubs)}


@pytest.fixture(params=CASES, ids=str)
def case(request, rehearsed):
    found = rehearsed[str(request.param)]
    assert "error" not in found, found["error"]
    return request.param, found


def test_every_pair_that_the_rules_allow_is_rehearsed():
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, possible()))
    assert len(CASES) < 30


def test_autocast_and_loss_scaling_are_on(rehearsed):
    found = rehearsed["mixed_precision"]

    assert (found["product"], found["scaler"], found["scale"]) == ("torch.float16", True, "cuda:0")


def test_a_step_computes_in_the_number_format_that_was_chosen_and_scales_the_loss_in_fp16(case):
    case, found = case

    for step in found["steps"]:
        assert f"torch.{case.dtype}" in step["products"]
        assert set(step["products"]) <= {f"torch.{case.dtype}", "torch.float32"}
        assert step["is_unscaled"] == (case.dtype == "float16")


def test_what_is_trained_lies_on_the_card_in_fp32_and_is_gathered_on_the_host(case):
    case, found = case

    assert (found["trained"], found["on"], found["gathered on"]) == (["torch.float32"], [case.device], ["cpu"])


def test_restored_state_lies_where_a_fresh_step_puts_it(case):
    assert case[1]["fresh"]

    assert case[1]["restored"] == case[1]["fresh"]


def test_preflight_sees_the_peak_of_the_second_step_and_not_much_more(case):
    foreseen, peak = case[1]["foreseen"], case[1]["steps"][1]["peak"]

    assert peak <= foreseen <= 1.1 * peak


def test_a_step_waits_for_the_card_only_where_it_is_listed(case):
    case, found = case
    scaled = case.dtype == "float16"
    read_in = ["compute_gradients"]  # the loss
    read_in += ["update"] * (scaled and not case.is_fused)  # whether it overflowed
    read_in += ["update_weights"]  # the gradients' norm
    read_in += ["overflow"] * 2 * scaled  # the loss scale and how often it has held, when the card has nothing to do

    listed = [f"a number is read in {function}" for function in read_in]

    assert [step["waits"] for step in found["steps"]] == [listed, listed]


def test_keys_are_shared_only_where_the_flash_kernel_runs(case):
    case, found = case
    flash = case.device == "cuda:0" and case.dtype != "float32"
    wanted = {"document": [f"varlen, torch.{case.dtype}"] if flash else ["sdpa"], "eager": []}

    for step in found["steps"]:
        assert "sdpa, shared" not in step["attention"] or flash
        assert step["attention"] == wanted.get(case.attention, step["attention"])


def test_activation_offload_sends_no_weight(case):
    case, found = case

    for step in found["steps"]:
        assert (step["sent"] > 0) == (case.technique == "activation offload")
        assert step["sent_weights"] == 0


def test_streamed_weights_come_without_waiting_and_two_at_a_time(rehearsed):
    found = rehearsed["streamed_weights"]

    assert "error" not in found, found["error"]
    assert found["waits"] == ["cuda to cpu in enter"]  # which rows of the embedding are looked up
    assert (found["trained on"], found["most_visitors"], found["slices"]) == (["cuda:0"], 2, 4)
    up, down, ahead = 4 + 4, 3 + 4, 1  # layers and slices; the top slice is still there; the next micro-batch's second
    assert found["visits"] == up + down + ahead


def test_the_host_holds_a_tied_matrix_once(rehearsed):
    found = rehearsed["streamed_matrices"]

    assert "error" not in found, found["error"]
    assert found["one matrix"] == found["two matrix"] == 256 * 64 * 2  # in bf16
    assert found["two"] - found["one"] == found["one matrix"]


def test_gradients_travel_over_the_host_while_the_backward_pass_runs(rehearsed):
    found = rehearsed["buckets"]

    assert "error" not in found, found["error"]
    assert found["waits"] == []
    assert 1 < found["sent in the backward pass"] <= found["sent"]
    assert (found["sent from"], found["gradients on"]) == (["cpu"], ["cuda:0"])


def test_a_batch_goes_to_the_card_without_waiting(rehearsed):
    found = rehearsed["batches"]

    assert "error" not in found, found["error"]
    assert (found["waits"], found["on"]) == ([], ["cuda:1"])
    assert found["tensors"] >= 5


def test_what_frozen_layers_made_goes_to_the_host_and_comes_back_without_waiting(rehearsed):
    found = rehearsed["kept_states"]

    assert "error" not in found, found["error"]
    assert found["waits"] == [[], []]
    assert found["known"] == 9 + 8  # tokens of the second pass
    assert found["bytes"] == (9 + 8) * 64 * 2  # in bf16
    assert (found["on"], found["gradients on"]) == (["cpu"], ["cuda:0"])


@pytest.mark.parametrize("name", ["divided_optimizer", "streaming_optimizer"])
def test_state_that_is_divided_or_on_the_host_comes_back_to_its_place(rehearsed, name):
    found = rehearsed[name]

    assert "error" not in found, found["error"]
    assert found["fresh"]
    assert found["restored"] == found["fresh"]
