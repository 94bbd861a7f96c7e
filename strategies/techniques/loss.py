"""The loss without all logits at once.  The computation is in supervised_logits.py."""

from clusters.capability import DeviceCapability
from strategies.shape import ModelShape
from strategies.techniques.technique import Technique


def refuse_chunked_loss(device: DeviceCapability, shape: ModelShape) -> str | None:
    return "the model caps its logits after the output matrix" if shape.softcap else None


CHUNKED_LOSS = Technique(
    name="chunked cross-entropy",
    about="the output matrix on 256 positions at a time, and again for the gradient",
    switch="train.loss_type: chunked_nll",
    on=lambda choice: choice.with_(loss_type="chunked_nll"),
    off=lambda choice: choice.with_(loss_type="nll"),
    impossible=refuse_chunked_loss,
    saves_first="memory",
)
