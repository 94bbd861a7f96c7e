"""The method of the registry: which MLPs get a memory, what that costs, and how a model is set up for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import MethodDefaults, StrategyPlan, option
from strategies.cost.micro_batches import num_micro_batches, tokens_per_micro_batch
from strategies.cost.plan import predict
from strategies.cost.time import bus_rate, host_update_rate, memory_rate
from strategies.export import Export, Loader
from strategies.model.architecture import Architecture
from strategies.shape import ModelShape
from strategies.sparse_memory.costs import MemoryCosts
from strategies.sparse_memory.folder import FORMAT, MemoryConfig, put_on, save
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques, Workload

if TYPE_CHECKING:
    from strategies.sparse_memory.layer import RowMemory
    from strategies.sparse_memory.optimizer import SpecificRows
    from strategies.sparse_memory.slots import BackgroundCounts

_UNMERGED = "each token reads rows of its own choice, and no one set of weights computes the same"


@dataclass(frozen=True)
class SparseMemory(MethodDefaults):
    """y = MLP(x) + mean of relu(k_r . x) v_r over the rows that x chooses, which alone train (MEFT, 2406.04984).

    Rows lie on the host with 16 bytes a number; the device holds the frozen weights and a router of 4 d sqrt(rows)
    bytes a layer, and the rows of one pass, whatever their number.  Meant for new facts that must not cost old ones
    (arXiv 2510.15103).  Not for ZeRO, offload, fp16, several workers, or optimizers other than AdamW.
    """

    memory_rows: int = option(
        16384, "rows of a memory, a square number; more rows forget less", tried=(4096, 16384, 65536), ge=4
    )
    rows_per_token: int = option(8, "rows that a token reads", tried=(4, 8, 16), ge=1)
    layers_to_transform: list[int] | None = option(
        None, "decoder layers (0 = first) with a memory beside their MLP; null = the middle one"
    )
    slots: Literal["all", "surprising"] = option(
        "all",
        "rows that a step moves: all that it reads, or the updated_rows most specific to it beside what data.eval's"
        " rows read, which should be what must not be forgotten",
    )
    updated_rows: int = option(256, "with slots: surprising, rows of a memory that a step moves at most", ge=1)
    calibration_rows: int = option(16, "samples by which routers learn what all tokens have in common", ge=1)

    name: ClassVar[str] = "experimental_memory"
    full_rank: ClassVar[bool] = True
    keeps_base_frozen: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    is_proposed: ClassVar[bool] = False
    own_format: ClassVar[str | None] = FORMAT

    @property
    def layers_are_alike(self) -> bool:
        return False

    @property
    def observes_held_out(self) -> bool:
        return self.slots == "surprising"

    def why_alone(self) -> str:
        return "its rows move beside the computation, layer by layer"

    def why_one_worker(self) -> str:
        return (
            "gradients of single rows are not summed over workers: set cluster.num_workers: 1, or a method whose"
            " gradients are"
        )

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        if wrong := self._wrong_sizes(shape):
            return wrong
        if shape.num_experts:
            return f"a memory stands beside an MLP, and those of {shape.model_type} are experts: set method.type: lora"
        if shape.family.encoder or not shape.family.mlp_at:
            return (
                f"a memory stands beside an MLP, and those of {shape.model_type} are no modules of their own: set"
                " method.type: lora"
            )
        if not techniques.optim.startswith("adamw_torch"):
            return "a memory moves its rows by an AdamW of its own: set train.optim: auto"
        if techniques.dtype == "float16":
            return "a memory takes gradients row by row, before fp16's scale could be undone: set model.dtype"
        if techniques.torch_compile:
            return "how many rows a pass reads is not known before it: set train.torch_compile: false"
        if techniques.zero_stage or techniques.offload != "none":
            return (
                "a memory keeps its rows and their moments on the host itself: set strategy.offload: none and"
                " strategy.mode: single"
            )
        return None

    def _wrong_sizes(self, shape: ModelShape) -> str | None:
        side = round(self.memory_rows**0.5)
        if side * side != self.memory_rows:
            return (
                f"method.memory_rows is {self.memory_rows}, and product keys name a square number of rows: set it to"
                f" {side * side}"
            )
        if self.rows_per_token > self.memory_rows:
            return f"method.rows_per_token is {self.rows_per_token}, and there are {self.memory_rows} rows: lower it"
        if shape.hidden_size % 2:
            return f"product keys cut a vector in halves, and the model's width is {shape.hidden_size}"
        return None

    def find_misfits(self, architecture: Architecture) -> list[str]:
        layers, count = self.layers_to_transform, architecture.num_layers
        if layers is None:
            return []
        if not layers or len(set(layers)) < len(layers):
            return ["layers_to_transform: name at least one layer, and none twice"]
        if wrong := [layer for layer in layers if not 0 <= layer < count]:
            return [f"layers_to_transform: {wrong[0]} is no layer of the model, which has 0 to {count - 1}"]
        return []

    def exports(self, shape: ModelShape) -> Export:
        """A folder of this program's own: no other one knows rows that tokens choose.

        Looked up in PEFT 0.21.2 (peft/utils/peft_types.py), transformers 5.24 (integrations/peft.py), vLLM
        (lora/peft_helper.py) and llama.cpp (convert_lora_to_gguf.py).
        """
        cannot: dict[Loader, str] = {
            "peft": f"it has no adapter of this type ({FORMAT})",
            "transformers": "its load_adapter puts on what PEFT knows, which this is not",
            "vllm": "it corrects maps by pairs of A and B, and has no rows that tokens choose",
            "llama.cpp": "it corrects maps by pairs of A and B, and has no rows that tokens choose",
        }
        return Export("own", cannot, _UNMERGED)

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers // 2,) if self.layers_to_transform is None else tuple(sorted(self.layers_to_transform))

    def _costs(self, shape: ModelShape, techniques: Techniques) -> MemoryCosts:
        layers = self._layers(shape.num_layers)
        return MemoryCosts(shape, techniques, self.memory_rows, self.rows_per_token, layers, self.slots == "surprising")

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        """Rows come before a layer computes and are waited for; gradients leave, and rows move, beside it on a GPU."""
        costs, on_cpu = self._costs(workload.shape, techniques), device.kind == "cpu"
        tokens, passes = tokens_per_micro_batch(workload, techniques), num_micro_batches(workload, techniques)
        plan = predict(self.name, workload, device, node, techniques, costs.costs(tokens, on_cpu))
        bus = memory_rate(device)[0] / 2 if on_cpu else bus_rate(device)  # a copy reads and writes
        down, up = costs.bus_bytes(tokens)
        moved = costs.different_rows(workload.share * workload.tokens_per_step)
        if self.slots == "surprising":
            moved = min(moved, self.updated_rows)
        update_s = len(costs.layers) * moved * 2 * workload.shape.hidden_size / host_update_rate(node)
        transfer_s = passes * (down + up) / bus
        if not on_cpu:
            beside_s = passes * down / bus + update_s
            late_s = max(0.0, beside_s - plan.time.compute_s - plan.time.memory_s)
            update_s, transfer_s = 0.0, passes * up / bus + late_s
        time = replace(plan.time, update_s=update_s, transfer_s=transfer_s)
        memory = costs.with_copies(plan.memory, tokens)
        return replace(plan, memory=memory, time=time, checkpoint_bytes=costs.checkpoint_bytes)

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        import torch

        from strategies.lsp_offload.adam import AdamNumbers
        from strategies.lsp_offload.optimizer import Route
        from strategies.lsp_offload.schedule import Lanes
        from strategies.lsp_offload.transport import bus_of
        from strategies.model.architecture import decoder_layers
        from strategies.sparse_memory.layer import MemorySizes, attach
        from strategies.sparse_memory.observers import BackgroundReads, RouterCalibration
        from strategies.sparse_memory.optimizer import RowAdamW

        model.requires_grad_(False)
        device, layers = model.device, self._layers(len(decoder_layers(model)))
        sizes = MemorySizes(
            model.config.get_text_config().hidden_size, round(self.memory_rows**0.5), self.rows_per_token
        )
        memories = attach(model, layers, sizes, getattr(torch, settings.techniques.dtype), device)
        if device.type != "meta":
            for memory in memories.values():
                memory.draw(settings.seed)
        betas = (settings.adam_beta1, settings.adam_beta2)
        numbers = AdamNumbers(settings.learning_rate, *betas, settings.adam_epsilon, settings.weight_decay)
        specific = self._specific(memories)
        route = Route(bus_of(device), Lanes(overlapped=device.type == "cuda"))
        every = list(memories.values())
        optimizer = RowAdamW(every, route, numbers, specific)

        def export(folder: Path, weights: Mapping[str, Any] | None = None) -> None:
            optimizer.settle()
            save(memories, MemoryConfig(sizes.num_keys, sizes.top_k, list(layers)), folder)

        return TrainSetup(
            model,
            optimizer,
            {f"{name}.rows": memory.rows for name, memory in memories.items()},
            export,
            export_format="own",
            streaming=optimizer,
            learner=RouterCalibration(every, optimizer, self.calibration_rows),
            held_out_observer=BackgroundReads(every, specific.background) if specific else None,
            buffers=_buffers(memories, specific),
        )

    def _specific(self, memories: Mapping[str, RowMemory]) -> SpecificRows | None:
        from strategies.sparse_memory.optimizer import SpecificRows
        from strategies.sparse_memory.slots import BackgroundCounts

        if self.slots == "all":
            return None
        counts = {one.layer: BackgroundCounts(self.memory_rows) for one in memories.values()}
        return SpecificRows(self.updated_rows, counts)

    @classmethod
    def load(cls, model: Any, folder: Path) -> Any:
        return put_on(model, folder)


def _buffers(memories: Mapping[str, RowMemory], specific: SpecificRows | None) -> dict[str, Any]:
    """What a checkpoint holds beside the rows: routers, and what the background read."""
    found = {f"{name}.router.{key}": kept for name, one in memories.items() for key, kept in one.router.named_buffers()}
    for name, one in memories.items():
        if specific is not None:
            counts: BackgroundCounts = specific.background[one.layer]
            found |= {f"{name}.background.readers": counts.readers_M, f"{name}.background.tokens": counts.num_tokens}
    return found
