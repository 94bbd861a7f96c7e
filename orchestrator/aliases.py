"""Other tools' names for our keys (Axolotl, LLaMA-Factory, ms-swift, Unsloth, NeMo AutoModel), read with a notice."""

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
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    # LLaMA-Factory
    "cutoff_len": "max_length",
    "neat_packing": "packing",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
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
    "use_liger_kernel": "not in this version; the loss is already computed at supervised positions only",
}
