"""Other tools' names for our keys (Axolotl, LLaMA-Factory, ms-swift, Unsloth, NeMo AutoModel, transformers).

`ALIASES` are the same setting under another name, read with a notice.  `NOT_YET` and `NOT_NEEDED` are settings that
people copy from there and that have no key here: each says why, or what to write.  `plain_values` reads values that
other tools spell in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

ALIASES: dict[str, str] = {
    # Axolotl
    "base_model": "model_name_or_path",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layers_to_transform": "layers_to_transform",
    "lora_modules_to_save": "modules_to_save",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "adapter": "type",
    "lora_target_linear": "lora_target_modules",
    # LLaMA-Factory
    "cutoff_len": "max_length",
    "neat_packing": "packing",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "additional_target": "modules_to_save",
    "finetuning_type": "type",
    "flash_attn": "attn_implementation",
    # ms-swift, Unsloth
    "max_seq_length": "max_length",
    "target_modules": "lora_target_modules",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "init_weights": "init_lora_weights",
    "attn_impl": "attn_implementation",
    "batch_size": "per_device_train_batch_size",
    "torch_dtype": "dtype",
    "lr": "learning_rate",
}

# Keys people will look for that this version does not have, with what to do instead.
NOT_YET: dict[str, str] = {
    "load_in_4bit": "write method: {type: qlora}, or method: {type: auto} and the plan decides",
    "load_in_8bit": "write method: {type: qlora, bnb_quant_type: int8}",
    "quantization_bit": "write method: {type: qlora}, for 8 bits with bnb_quant_type: int8",
    "use_liger_kernel": "not in this version; the loss is already computed at supervised positions only",
    "exclude_modules": "name the modules that are wanted in method.lora_target_modules",
    "layers_pattern": "layers are known by themselves; method.layers_to_transform takes their numbers",
    "rank_pattern": "one rank for all modules: method.lora_r",
    "alpha_pattern": "one scale for all modules: method.lora_alpha",
    "neftune_noise_alpha": "not in this version",
    "wandb_project": "results go to MLflow: tracking.experiment names the project there",
    "max_samples": "cut the data file, e.g. with head; train.max_steps ends a run earlier",
}

# Keys that mean nothing here, and why.
NOT_NEEDED: dict[str, str] = {
    "logging_steps": "every step is logged; remove it",
    "logging_strategy": "every step is logged; remove it",
    "logging_dir": "logs lie in the run's folder; tracking.mlflow_uri names a server for them",
    "logging_first_step": "every step is logged; remove it",
    "save_strategy": "checkpoints follow checkpoint.save_steps; remove it",
    "saves_per_epoch": "write checkpoint.save_steps",
    "save_safetensors": "files are always safetensors; remove it",
    "save_only_model": "a checkpoint always holds what resuming needs; remove it",
    "eval_strategy": "write eval.eval_steps: a number of steps, or null for the end only",
    "evaluation_strategy": "write eval.eval_steps: a number of steps, or null for the end only",
    "evals_per_epoch": "write eval.eval_steps",
    "do_train": "`submit` trains; remove it",
    "do_eval": "held-out rows are measured wherever data.eval names some; remove it",
    "do_predict": "held-out rows are answered wherever data.eval names some; remove it",
    "stage": "supervised fine-tuning is what is done here; remove it",
    "val_size": "write data.eval: {split: 0.1}",
    "val_set_size": "write data.eval: {split: 0.1}",
    "dataset": "write data.train: the path of the rows",
    "datasets": "write data.train: a path, or a list of paths",
    "dataset_dir": "write whole paths in data.train; they start at the job file's folder",
    "train_file": "write data.train",
    "validation_file": "write data.eval",
    "template": "the tokenizer's own chat template is used; data.chat_template takes a .jinja file",
    "overwrite_output_dir": "every run has a folder of its own; remove it",
    "overwrite_cache": "prepared data is found by its content; remove it",
    "dataset_prepared_path": "prepared data is kept beside the runs; remove it",
    "preprocessing_num_workers": "rows are tokenised by all cores; remove it",
    "dataloader_num_workers": "batches are ready before they are needed; remove it",
    "dataset_num_proc": "rows are tokenised by all cores; remove it",
    "group_by_length": "data.packing: true wastes nothing; without it rows of like length already share a micro-batch",
    "pad_to_sequence_len": "rows are never padded further than they must be; remove it",
    "remove_unused_columns": "columns are chosen by data.format; remove it",
    "bf16": "write model.dtype: bfloat16, or leave it to the plan",
    "fp16": "write model.dtype: float16, or leave it to the plan",
    "tf32": "write model.dtype; the plan knows what the device computes fast",
    "flash_attention": "write model.attn_implementation: flash_attention_2, or leave it to the plan",
    "use_flash_attention_2": "write model.attn_implementation: flash_attention_2, or leave it to the plan",
    "train_on_inputs": "write data.assistant_only_loss or completion_only_loss; prompts are not learnt by default",
    "train_on_prompt": "write data.assistant_only_loss or completion_only_loss; prompts are not learnt by default",
    "mask_history": "every assistant turn is learnt; leave it out",
    "lora_fan_in_fan_out": "GPT-2's transposed maps are recognised; remove it",
    "fan_in_fan_out": "GPT-2's transposed maps are recognised; remove it",
    "task_type": "it is always CAUSAL_LM; remove it",
    "model_type": "the model's config.json says it; remove it",
    "tokenizer_type": "the model's own tokenizer is used; remove it",
    "tokenizer_name": "the model's own tokenizer is used; remove it",
    "special_tokens": "the tokenizer's own are used; change them in the model's folder",
    "resume_from_checkpoint": "`orchestrator resume RUN` continues from the newest checkpoint; remove it",
    "ddp_timeout": "a silent worker is given up by itself; remove it",
    "ddp_find_unused_parameters": "not needed here; remove it",
    "local_rank": "workers are started by the plan; remove it",
    "fsdp": "write strategy.mode: zero2 or zero3, or leave it to the plan",
    "fsdp_config": "write strategy.mode: zero2 or zero3, or leave it to the plan",
    "per_device_eval_batch_size": "held-out rows are measured in micro-batches that fit; remove it",
    "eval_batch_size": "held-out rows are measured in micro-batches that fit; remove it",
    "plot_loss": "`orchestrator report RUN` draws it; remove it",
    "disable_tqdm": "write --quiet on the command line",
    "push_to_hub": "nothing is sent anywhere; upload the run's adapter folder yourself",
    "hub_model_id": "nothing is sent anywhere; upload the run's adapter folder yourself",
    "wandb_run_id": "results go to MLflow, or only into the run's folder; remove it",
    "run_name": "write name",
    "early_stopping_threshold": "write eval.early_stopping_patience alone",
    "metric_for_best_model": "the lowest held-out loss is the best; remove it",
    "greater_is_better": "the lowest held-out loss is the best; remove it",
    "gradient_checkpointing_kwargs": "write train.gradient_checkpointing: true; its ways are chosen by themselves",
    "lora_model_dir": "write method.init_adapter: the folder of an adapter to start from",
    "adapter_name_or_path": "write method.init_adapter: the folder of an adapter to start from",
    "data_seed": "write train.seed: it orders the rows, too",
}

_TARGETS = ("lora_target_modules", "shira_target_modules")


def plain_values(values: dict[str, Any], where: Callable[[tuple[str, str]], str]) -> list[str]:
    """Rewrite, in place, values that other tools spell differently; a notice for each."""
    method = values.get("method")
    if not isinstance(method, dict):
        return []
    notices = []
    for key in _TARGETS:
        if key not in method:
            continue
        stated, read = method[key], targets_of(method[key])
        if read == stated and type(read) is type(stated):
            continue
        method[key] = read
        notices.append(f"{where(('method', key))}: method.{key} {stated!r} is read as {read!r}")
    return notices


def targets_of(stated: Any) -> Any:
    """The targets as PEFT takes them: `all-linear`, a list of names, or an expression.

    `all` (LLaMA-Factory) and `true` (Axolotl's lora_target_linear) are all linear maps; names with commas are a list.
    """
    if stated is True or stated in (["all"], ["all-linear"]):
        return "all-linear"
    if not isinstance(stated, str):
        return stated
    if stated.strip().lower() in ("all", "all-linear", "all_linear"):
        return "all-linear"
    names = [name for name in re.split(r"[,\s]", stated) if name]
    is_list = names and all(re.fullmatch(r"[A-Za-z_][\w.]*", name) for name in names)
    return names if is_list else stated
