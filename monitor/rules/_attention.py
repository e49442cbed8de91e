"""What the rules on attention logits share: the largest logit of each head, from the bound or from the rows read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitor.metric import Array, Mask
from monitor.rule import Window
from monitor.rules._series import Steps, exactly

BOUND, READ = "attn_logit_max.lse_max", "attn_logit_max.found"


@dataclass(frozen=True)
class Logits:
    """The largest logit of each head over the judged steps; every array is ``(step, head)``.

    Attributes:
        steps: ``(step,)``, at which there is a bound or rows were read.
        modules: the heads.
        value: the bound, else the largest of the rows read.
        bounded: where it is the bound.
        read: where it is of rows read, of heads that have no bound.
    """

    steps: Steps
    modules: tuple[str, ...]
    value: Array
    bounded: Mask
    read: Mask

    @property
    def has(self) -> Mask:
        """Where there is a number to judge."""
        return (self.bounded | self.read) & ~np.isnan(self.value)


def largest_logits(window: Window) -> Logits:
    """The largest logits; a head that has a bound is judged by it alone, at the steps where there is one."""
    bound, found = window[BOUND], window[READ]
    steps = np.union1d(bound.steps, found.steps)
    steps = steps[steps >= window.first]
    modules = tuple(dict.fromkeys((*bound.modules, *found.modules)))
    (high, bounded), (rows, sampled) = (exactly(b, steps, modules) for b in (bound, found))
    read = sampled & ~np.isin(np.array(modules), bound.modules)[None, :]
    return Logits(steps, modules, np.where(bounded, high, rows), bounded, read)
