"""Which modules compute something else in training than in evaluation, as far as that can be known from outside."""

from __future__ import annotations

import re
import weakref

from torch import nn

#: Layers of other libraries that leave something out at random are known by their name, and where they keep how often.
_DROPS, _SHARES = re.compile(r"(?i)drop|stochasticdepth"), ("p", "drop_prob", "drop_rate")
#: Looks after which the modules of a root are looked up again: they may have been replaced.
AGAIN = 20


def drops(module: nn.Module) -> bool:
    """True if ``module`` puts noise into training: a dropout that drops something, a random slope."""
    names: tuple[str, ...] = _SHARES if _DROPS.search(type(module).__name__) else ()
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        names = ("dropout",)
    shares = (getattr(module, name, None) for name in names)
    return isinstance(module, nn.RReLU) or any(isinstance(s, int | float) and s > 0 for s in shares)


def averages(module: nn.Module) -> bool:
    """True if ``module`` normalises with its batch in training, and in evaluation with averages that it keeps."""
    return getattr(module, "running_mean", None) is not None and hasattr(module, "momentum")


class Modes:
    """The modules inside each root that depend on the mode."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[weakref.ref[nn.Module]]]]
        self._known = weakref.WeakKeyDictionary()

    def inside(self, root: nn.Module) -> list[nn.Module]:
        """Those that there are, ``root`` included; looked up at every `AGAIN`-th call."""
        calls, held = self._known.get(root, (0, []))
        if calls % AGAIN == 0:
            held = [weakref.ref(m) for m in root.modules() if drops(m) or averages(m)]
        self._known[root] = calls + 1, held
        return [m for ref in held if (m := ref()) is not None]
