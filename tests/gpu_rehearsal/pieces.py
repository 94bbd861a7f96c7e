"""Parts of the product beside its step, on fake tensors of a card; run by rehearsal.py."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from orchestrator.training.parallel import GradientSum, ProcessGroup
from strategies.engines.uneven_zero import shard_by_memory
from strategies.lsp_offload.method import LspOffload
from strategies.methods.lora import Lora
from strategies.reuse.lower_layers import LowerLayers
from strategies.step.side_stream import SideStream
from strategies.step.state import gather, restore
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import Batch
from strategies.step.weight_stream import stream_weights
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSetup, TrainState
from tests.gpu_rehearsal import fake_device, inputs
from tests.gpu_rehearsal.cases import Case

PLAIN = Case("lora", "plain", "bfloat16", "document", "cuda:0")


class _Done:
    def wait(self) -> None: ...


class _Wire(ProcessGroup):
    """Two workers whose network is a list."""

    def _all_reduce(self, tensor: torch.Tensor) -> Any:
        sent.append(tensor)
        return _Done()


sent: list[torch.Tensor] = []


def buckets() -> dict[str, Any]:
    """Gradients of a card that travel over the host: what waits in the backward pass, and where they end."""
    with fake_device.FAKE:
        setup, batch = inputs.set_up(PLAIN), inputs.batch_of(PLAIN).to(torch.device(PLAIN.device))
        sums = GradientSum(_Wire(rank=0, size=2, bucket_bytes=1024), setup.summed)
        sums.arm()
        with fake_device.Watch() as watch:
            forward_backward(setup, batch, 9, PLAIN.techniques(), gradient_scaler("cuda", "bfloat16"))
            in_backward = len(sent)
            sums.finish()
        return {
            "waits": watch.waits,
            "sent in the backward pass": in_backward,
            "sent": len(sent),
            "sent from": sorted({str(tensor.device) for tensor in sent}),
            "gradients on": sorted({str(p.grad.device) for p in setup.summed if p.grad is not None}),
        }


def batches() -> dict[str, Any]:
    """A micro-batch on its way to the card."""
    with fake_device.FAKE:
        batch = inputs.batch_of(PLAIN)
        with fake_device.Watch() as watch:
            moved = batch.to(torch.device("cuda:1"))
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        return {"waits": watch.waits, "on": sorted({str(tensor.device) for tensor in tensors}), "tensors": len(tensors)}


def divided_optimizer() -> dict[str, Any]:
    """ZeRO-1 by memory: the state after a step, and after a resume."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        with fake_device.FAKE:
            batch = inputs.batch_of(PLAIN).to(torch.device(PLAIN.device))
            setup = shard_by_memory(inputs.set_up(PLAIN), [1.0], torch.device(PLAIN.device))
            return _there_and_back(setup, batch)
    finally:
        dist.destroy_process_group()


def _there_and_back(setup: TrainSetup, batch: Batch) -> dict[str, Any]:
    with fake_device.Watch():
        scaler = gradient_scaler("cuda", "bfloat16")
        forward_backward(setup, batch, 9, PLAIN.techniques(), scaler)
        update(setup, scaler, Update(1.0, 1.0))
        fresh = fake_device.places(setup.optimizer.state.values())
        held = TrainState(
            {name: torch.zeros(p.shape) for name, p in setup.parameters.items()},
            {
                name: {"exp_avg": torch.zeros(p.shape), "exp_avg_sq": torch.zeros(p.shape), "step": torch.zeros(())}
                for name, p in setup.parameters.items()
            },
        )
        restore(setup, held)
        return {"fresh": fresh, "restored": fake_device.places(setup.optimizer.state.values())}


def streaming_optimizer() -> dict[str, Any]:
    """LSP-Offload: where a checkpoint's moments lie the moment they are back."""
    techniques = PLAIN.techniques()
    method = LspOffload(subspace_size=16, nonzeros_per_row=4, projection="learned")
    settings = inputs.settings_of(techniques)
    with fake_device.FAKE, fake_device.Watch():
        setup = method.setup(inputs.model_on("cuda:0", method, settings, num_layers=2), settings)
        optimizer: Any = setup.optimizer
        for one in optimizer.weights:
            optimizer._state_of(one)
        fresh = fake_device.places(optimizer.state.values())
        held = gather(setup)
        assert held is not None
        optimizer.state.clear()
        restore(setup, held)
        return {"fresh": fresh, "restored": fake_device.places(optimizer.state.values())}


def streamed_weights() -> dict[str, Any]:
    """Frozen weights that visit the card: what waits, how many layers are there at once, what crosses."""
    techniques = replace(PLAIN.techniques(), gradient_checkpointing=True, loss_type="chunked_nll", offload="weights")
    method, settings, card = Lora(lora_r=4), inputs.settings_of(techniques), torch.device("cuda:0")
    with fake_device.FAKE:
        setup = method.setup(inputs.model_on("cpu", method, settings, num_layers=4), settings)
        checkpointing.enable(setup.model)
        stream = stream_weights(setup, card, slice_bytes=2**13)
        setup.model.train()
        batch = inputs.batch_of(PLAIN).to(card)
        with fake_device.Watch() as watch:
            scaler = gradient_scaler("cuda", "bfloat16")
            forward_backward(setup, batch, 9, techniques, scaler)
            update(setup, scaler, Update(1.0, 1.0))
        return {
            "waits": watch.waits,
            "trained on": sorted({str(parameter.device) for parameter in setup.parameters.values()}),
            "slices": len(setup.model.get_output_embeddings().streamed.rows),
            **vars(stream.counts),
        }


def _host_bytes() -> int:
    """What all tensors of the host hold."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, FakeTensor) and one.fake_device.type == "cpu"]
    storages = [one.untyped_storage() for one in found]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def streamed_matrices() -> dict[str, Any]:
    """What the host holds of a model whose weights visit the card: with one matrix at both ends, and with two."""
    techniques = replace(PLAIN.techniques(), gradient_checkpointing=True, offload="weights")
    method, settings, card = Lora(lora_r=4), inputs.settings_of(techniques), torch.device("cuda:0")
    found: dict[str, Any] = {}
    with fake_device.FAKE:
        for name, is_tied in (("one", True), ("two", False)):
            before = _host_bytes()
            setup = method.setup(inputs.model_on("cpu", method, settings, is_tied=is_tied), settings)
            matrix_bytes = setup.model.get_output_embeddings().weight.nbytes
            stream = stream_weights(setup, card, slice_bytes=2**13)
            found |= {name: _host_bytes() - before, f"{name} matrix": matrix_bytes}
            del setup, stream
    return found


def kept_states() -> dict[str, Any]:
    """What a frozen layer made of a row, on its way to the host and, a step later, back ahead of its pass."""
    method, device = Lora(lora_r=4, layers_to_transform=[1]), torch.device("cuda:0")
    techniques = replace(PLAIN.techniques(), cache_frozen_activations=True)
    settings = inputs.settings_of(techniques)
    with fake_device.FAKE, fake_device.Watch() as watch:
        setup = method.setup(inputs.model_on("cuda:0", method, settings, num_layers=2), settings)
        setup.lower = lower = LowerLayers(setup.model, None, SideStream(device))
        scaler, found = gradient_scaler("cuda", "bfloat16"), []
        for _ in range(2):
            batch = inputs.batch_of(PLAIN).to(device)
            assert batch.parts
            watch.begin()
            lower.expect(batch.sample_ids, batch.parts)
            forward_backward(setup, batch, 9, techniques, scaler)
            found.append(watch.seen())
        kept = [lower._states.get(number) for number in batch.sample_ids]
        return {
            "waits": [one["waits"] for one in found],
            "known": lower.count(),
            "bytes": lower.num_bytes,
            "on": sorted({str(each.device) for each in kept if each is not None}),
            "gradients on": sorted({str(p.grad.device) for p in setup.summed if p.grad is not None}),
        }


PIECES = (streamed_weights, streamed_matrices, buckets, batches, kept_states, divided_optimizer, streaming_optimizer)
