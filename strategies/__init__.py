"""What each way of training costs and how it changes a model.  Never imports ray.

Three registries (registry.py): a new method is one line in `METHODS`, a new objective one in `OBJECTIVES`, and their
options appear in the job file by themselves; a new technique is one entry of techniques/catalogue.toml, and appears in
the catalogue and its measurement.  They are loaded when one is asked for: a program that reads a run needs none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.registry import METHODS, OBJECTIVES, TECHNIQUES

__all__ = ("METHODS", "OBJECTIVES", "TECHNIQUES")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from strategies import registry

    return getattr(registry, name)
