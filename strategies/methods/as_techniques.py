"""Training corrections instead of weights: LoRA, and LoRA over a quantised base."""

from __future__ import annotations

from dataclasses import replace

from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.techniques.libraries import refuse_bitsandbytes
from strategies.techniques.technique import Technique

LORA = Technique(
    name="LoRA",
    about="trains low-rank corrections of frozen linear maps",
    switch="method: {type: lora, lora_r: 16}",
    on=lambda choice: replace(choice, method=Lora()),
    off=lambda choice: replace(choice, method=Full()),
    quality="as full fine-tuning within the noise of published runs",
    saves_first="memory",
)
QLORA_NF4 = Technique(
    name="QLoRA nf4",
    about="LoRA over a base in 4 bits, expanded weight by weight",
    switch="method: {type: qlora, bnb_quant_type: nf4}",
    on=lambda choice: replace(choice, method=QLora(bnb_quant_type="nf4")),
    off=lambda choice: replace(choice, method=Lora()),
    impossible=refuse_bitsandbytes,
    quality="the base is rounded to 4 bits (9 % weight error); the adapter learns around it",
    saves_first="memory",
)
QLORA_INT8 = Technique(
    name="QLoRA int8",
    about="LoRA over a base in 8 bits with outliers apart",
    switch="method: {type: qlora, bnb_quant_type: int8}",
    on=lambda choice: replace(choice, method=QLora(bnb_quant_type="int8")),
    off=lambda choice: replace(choice, method=Lora()),
    impossible=refuse_bitsandbytes,
    quality="the base is rounded to 8 bits",
    saves_first="memory",
)
