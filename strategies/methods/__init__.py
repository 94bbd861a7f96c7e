"""Training methods: full training, adapters, low-rank gradients, sparse entries.

lora                start here: LoRA
boosted_lora        LoRA in rounds: a pair trains, is kept, and a fresh one begins (XGBLoRA, BoostLoRA)
boosted_rounds      what boosted LoRA does between steps, and the weights of its samples
fused_maps          whether LoRA's maps are one function each with their corrections
full                full fine-tuning
lora_config         LoRA's options as PEFT's configuration
lora_start          how LoRA begins: from another adapter, or with directions of its inputs
kept_pairs          corrections that no longer train, beside the pair that does: what restarts add to
low_rank_adamw      AdamW whose moments of some weights live in a low-rank window on the gradient
low_rank_gradients  GaLore and APOLLO: full training through a low-rank window on the gradient
peft_config         any of PEFT's methods that looks at no data, by its own configuration
peft_fields         names of the fields of PEFT's configuration classes, without importing it
qlora               QLoRA
shira               SHiRA
sparse_entries      linear maps some of whose entries train, and the choice of those entries
"""
