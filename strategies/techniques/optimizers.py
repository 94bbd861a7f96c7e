"""Smaller optimizer states."""

from strategies.techniques.libraries import refuse_bitsandbytes
from strategies.techniques.technique import Technique

EIGHT_BIT_OPTIMIZER = Technique(
    name="8-bit optimizer",
    about="Adam's two moments in blocks of 8-bit numbers (Dettmers et al., arXiv 2110.02861)",
    switch="train.optim: adamw_bnb_8bit",
    on=lambda choice: choice.with_(optim="adamw_bnb_8bit"),
    off=lambda choice: choice.with_(optim="adamw_torch_fused"),
    impossible=refuse_bitsandbytes,
    quality="published runs find no loss",
    saves_first="memory",
)
