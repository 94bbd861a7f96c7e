"""The ways to change a model: full training, adapters, low-rank gradients, sparse entries.

lora                start here: LoRA
as_techniques       training corrections instead of weights
full                full fine-tuning
low_rank_adamw      AdamW whose moments of some weights live in a low-rank window on the gradient
low_rank_gradients  full training whose optimizer sees gradients through a low-rank window
qlora               QLoRA
shira               SHiRA
sparse_entries      linear maps some of whose entries train, and the choice of those entries
"""
