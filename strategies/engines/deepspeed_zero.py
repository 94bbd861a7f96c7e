"""ZeRO 1 to 3 and the offload of optimizer and weights, by DeepSpeed, configured from the plan.

Rajbhandari et al., arXiv 1910.02054 (ZeRO); Ren et al., arXiv 2101.06840 (ZeRO-Offload); Rajbhandari et al., arXiv
2104.07857 (NVMe).  DeepSpeed owns gradients and update; the loss, the order of the samples and the checkpoint stay
ours: state is gathered whole, so it may be taken up by another number of workers, or by none of DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from clusters.safe.reading import first_line
from strategies.cost.memory import BUCKET_ELEMENTS, LIVE_PARAMETERS
from strategies.engines.even_passes import EvenPasses
from strategies.step.state import to_cpu, zero
from strategies.train_setup import TrainSettings, TrainSetup, TrainState
from strategies.workload import Techniques


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What a job may say of DeepSpeed beside the plan."""

    overrides: Mapping[str, Any]
    nvme_path: str | None = None  # offload to this folder instead of the host's memory
    sync_dtype: str = "float32"


class CannotOffload(ValueError):
    """DeepSpeed cannot do what the job asks on this machine; the text names what is missing."""


def config_of(techniques: Techniques, options: DeepSpeedOptions) -> dict[str, Any]:
    """DeepSpeed's configuration for a plan."""
    zero_options: dict[str, Any] = {
        "stage": techniques.zero_stage or (3 if techniques.offload == "parameters" else 2),
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": LIVE_PARAMETERS // 2,
        "stage3_max_live_parameters": LIVE_PARAMETERS,
        "stage3_max_reuse_distance": LIVE_PARAMETERS,
    }
    place: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    if options.nvme_path:
        place = {"device": "nvme", "nvme_path": options.nvme_path, "pin_memory": True}
        zero_options["stage"] = 3  # the only one that knows files
    if techniques.offloads_optimizer:
        zero_options["offload_optimizer"] = dict(place)
    if techniques.offload == "parameters":
        zero_options["offload_param"] = dict(place)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # counted by us; DeepSpeed's counters mean nothing here
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends when the loop says so
        "zero_optimization": zero_options,
        "bf16": {"enabled": techniques.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bfp16"}[options.sync_dtype],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merged(config, options.overrides)


def _merged(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(copy.deepcopy(config))
    for key, value in more.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


class DeepSpeedZero:
    """DeepSpeed's engine as the training loop and the checkpoint use it."""

    def __init__(self, engine: Any, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.model = engine
        self._parameters = parameters
        self._size, self._rank = dist.get_world_size(), dist.get_rank()

    @property
    def _optimizer(self) -> Any:
        return self.model.optimizer

    @property
    def _states(self) -> list[dict[str, Any]]:
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link:  # stages 1 and 2 of 0.19 link states after the first group's update, when the others have none
            self._optimizer._hp_optimizer_states_linked = False
            link()
        return [state for state in self._optimizer.optimizer.state.values() if state]

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss * self._size)  # DeepSpeed divides by the workers; parts of a step are to be added

    def update(self, max_grad_norm: float) -> torch.Tensor:
        self._optimizer.clip_grad = max_grad_norm
        self.model.step()
        return torch.as_tensor(float(self.model.get_global_grad_norm() or 0.0))

    def gather(self) -> TrainState | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        sample = self._states[0] if self._states else {}
        keys = sorted(key for key, value in sample.items() if torch.is_tensor(value) and value.dim())
        step = torch.as_tensor(sample.get("step", 0)).to("cpu", torch.float32)
        for name, parameter in self._parameters.items():
            whole: Any = safe_get_full_fp32_param(parameter)
            found: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if self._rank == 0:
                shape = self._shape(parameter)
                weights[name] = to_cpu(whole.view(shape))
                moments[name] = {key: to_cpu(value.view(shape)) for key, value in found.items()}
                if keys:
                    moments[name]["step"] = step.clone()
        return TrainState(weights, moments) if self._rank == 0 else None

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        """The engine's states exist only after its first update: one must have been made, whatever it did."""
        for name, parameter in self._parameters.items():
            self._put(parameter, state.weights[name], None)
            for key, value in state.moments.get(name, {}).items():
                if key != "step":
                    self._put(parameter, value, key)
        steps = [found["step"] for found in state.moments.values() if "step" in found]
        for held in self._states if steps else []:
            held["step"] = steps[0].clone().to(held["step"]) if torch.is_tensor(held["step"]) else int(steps[0])

    def forget(self) -> None:
        zero(self._states)

    def _put(self, parameter: Any, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if not hasattr(parameter, "ds_id"):  # stages 1 and 2: whole weights here, parts of what is beside them
            if key is None:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value.to(parameter.device))
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
            return
        # DeepSpeed's own call for a whole value cannot pad the last worker's part.
        length = parameter.ds_tensor.ds_numel
        flat = torch.zeros(length * self._size, dtype=value.dtype)
        flat[: value.numel()] = value.flatten()
        part = flat[length * self._rank : length * (self._rank + 1)]
        if key is None:
            parameter.ds_tensor.data.copy_(part.view_as(parameter.ds_tensor))
            if parameter.ds_persist and parameter.data.numel() == parameter.ds_numel:
                parameter.data.copy_(value)  # small weights stay whole on every worker
            safe_set_local_fp32_param(parameter, part.to(parameter.ds_tensor.device, torch.float32))
        else:
            safe_set_local_optimizer_state(parameter, part.to(parameter.ds_tensor.device, torch.float32), key)

    @staticmethod
    def _shape(parameter: Any) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)


def shard_by_deepspeed(
    setup: TrainSetup, settings: TrainSettings, options: DeepSpeedOptions, device: torch.device
) -> TrainSetup:
    """`setup` trained by DeepSpeed as `settings.techniques` say.  Raises CannotOffload."""
    techniques = settings.techniques
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # the only way DeepSpeed takes a device
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with quiet():
        import deepspeed

        # Its sum over the workers of one CPU machine would be compiled, for minutes; gloo's needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if options.nvme_path:
        _refuse_without_files(options.nvme_path)
    optimizer: Any = setup.optimizer
    if techniques.offloads_optimizer:
        optimizer = _host_optimizer(setup, settings)
    if not dist.is_initialized():  # one worker is a group, too
        # It talks to nobody, and yet DeepSpeed sums and scatters its gradients on the device (its
        # coalesced_collectives.py), which gloo does not do for a GPU's tensors, or by way of the host:
        # https://docs.pytorch.org/docs/stable/distributed.html#backends
        backend, store = "nccl" if device.type == "cuda" else "gloo", distributed_c10d.HashStore()  # pyright: ignore[reportAttributeAccessIssue]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    with quiet():
        made: Any = deepspeed.initialize(
            model=setup.model,  # type: ignore[arg-type]
            optimizer=optimizer,
            config=config_of(techniques, options),
            dist_init_required=False,
        )
    engine = made[0]
    gc.collect()  # what stays of the undivided weights hangs in cycles
    divided = DeepSpeedZero(engine, setup.parameters)
    setup.optimizer, setup.sharding, setup.engine = engine.optimizer, divided, divided
    setup.passes = EvenPasses(setup, device if dist.get_backend() == "nccl" else torch.device("cpu"))
    return setup


def _host_optimizer(setup: TrainSetup, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW for states in host memory: DeepSpeed's vectorised one, or torch's where that cannot be built."""
    if not settings.optim.startswith("adamw"):
        return setup.optimizer
    betas = (settings.adam_beta1, settings.adam_beta2)
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with quiet():
            return DeepSpeedCPUAdam(  # type: ignore[return-value]
                setup.optimizer.param_groups,
                betas=betas,
                eps=settings.adam_epsilon,
                weight_decay=settings.weight_decay,  # type: ignore[arg-type]  # its stub says int
                adamw_mode=True,
            )
    except Exception as error:  # a compiler, a header, a version: whatever it is, torch's own does the same
        reason = missing_piece(error)
        setup.notes += (f"DeepSpeed's CPU Adam cannot be built ({reason}); torch's AdamW updates instead, slower",)
        return setup.optimizer


_MISSING = (  # what compilers and torch's extension builder say -> what to install
    ("ninja", "ninja is missing: pip install ninja"),
    ("cuda_home", "CUDA_HOME is not set: install the CUDA toolkit of torch's version or set CUDA_HOME"),
    ("cuda version", "the CUDA toolkit's version is not torch's: install the matching one"),
    ("curand", "cuRAND's headers are missing: apt install libcurand-dev-12-x of torch's CUDA version"),
    ("python.h", "Python's headers are missing: apt install python3-dev"),
    ("omp.h", "OpenMP's header is missing: apt install g++ (or libomp-dev for clang)"),
    ("no such file or directory: 'c++'", "there is no C++ compiler: apt install g++"),
    ("no such file or directory: 'g++'", "there is no C++ compiler: apt install g++"),
    ("'which'", "there is no C++ compiler: apt install g++"),
    ("compiler", "there is no working C++ compiler: apt install g++"),
)


def missing_piece(error: BaseException) -> str:
    """What stands in the way of compiling an extension, in words that name the fix."""
    messages, at = [], error
    while at is not None:
        messages.append(f"{at} {getattr(at, 'output', '')} {getattr(at, 'stderr', '')}".lower())
        at = at.__cause__ or at.__context__
    text = " ".join(messages)
    for words, fix in _MISSING:
        if words in text:
            return fix
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def _has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    with quiet():
        return AsyncIOBuilder().is_compatible(verbose=False)


def _refuse_without_files(folder: str) -> None:
    if not _has_libaio():
        raise CannotOffload("strategy.nvme_path needs libaio: apt install libaio-dev, or remove the key")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise CannotOffload(f"strategy.nvme_path: {folder} is not a folder on this machine")


@contextlib.contextmanager
def quiet() -> Any:
    """DeepSpeed greets, counts and warns on standard output and error; its log has it all the same."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
