"""What each way of training costs and how it changes a model.  Never imports ray.

`METHODS` is the registry: a new method is one line here, and its knobs appear in the job file by themselves.
"""

from strategies.contract import Method
from strategies.full import Full
from strategies.lora import Lora

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "full": Full,
}
