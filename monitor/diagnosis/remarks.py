"""What is remarkable in a run without being a trouble: its way to generalisation, its attention, routing and curvature.

A line each at most, from summaries; of a family about which a finding speaks, nothing is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monitor.diagnosis.finding import Verdict
from monitor.diagnosis.phases import NORMAL, Phases, phases
from monitor.diagnosis.text import number
from monitor.diagnosis.transition import told as hint
from monitor.diagnosis.transition import transition
from monitor.metric import load_metrics
from monitor.rule import load_rules
from monitor.rules._series import logged_as

if TYPE_CHECKING:
    from monitor.store.run import Run
    from monitor.store.summary import SeriesSummary

#: Metrics that measure curvature; their site is the loss, as that of much else.
CURVATURE = (
    "sharpness", "preconditioned_sharpness", "edge_of_stability", "hessian_eigenvalue", "spectral_density",
    "opposing_signals",
)  # fmt: skip
# From where on something is worth a word; where no source is named it is our own choice, and nothing is judged by it.
#: Of what its entropy could be, a head below this looks at hardly more than one key.
SHARP = 0.1
#: Attention of the first key from which on it is a sink.
SINK = 0.5
#: Part of its even share that an idle expert does not get, and of the experts that a narrow router does not use.
IDLE, NARROW = 0.1, 0.5
#: Share of the assignments whose loss is worth a word (arXiv 2101.03961 sec. 2.2: usual below it).
DROPPED = 0.01
#: Ratio to the edge of stability that is at the edge (as in `opposing_groups`) or above (as in the rule of that name).
EDGE, ABOVE = 0.9, 1.5
#: Growth of the sharpness.
GROWN = 2.0
#: Steps from which on it is worth a word that nearly all of them were clipped.
CLIPPED = 500


@dataclass(frozen=True)
class Remark:
    """One line: ``family`` is "phases", "clipping", "attention", "routing" or "curvature"."""

    family: str
    text: str


def remarks(run: Run, verdict: Verdict) -> tuple[Remark, ...]:
    """What is remarkable in ``run``, beside what ``verdict`` tells; names in it are as recorded.

    Cost: summaries and the training accuracy; where the script logged held-out data its series, or else those of
    `transition`, if the training data were learned.
    """
    told = {_family(f.rule) for incident in verdict.incidents for f in incident.findings}
    way = phases(run)
    found = [("phases", _hint(run) if way is None else _way(way)), ("clipping", _clipping(run))]
    for family, of in (("attention", _attention), ("routing", _routing), ("curvature", _curvature)):
        if family not in told:
            found.append((family, "; ".join(of(run))))
    return tuple(Remark(family, text) for family, text in found if text)


def _family(rule: str) -> str:
    known = load_rules().get(rule)
    if known is None or not known.needs:
        return ""
    metric = known.needs[0].partition(".")[0]
    if metric in CURVATURE:
        return "curvature"
    return {"attention": "attention", "router": "routing"}.get(load_metrics()[metric].site, "")


def _hint(run: Run) -> str:
    """What is said of generalisation where no held-out data are known."""
    return hint(found) if (found := transition(run)) else ""


def _way(p: Phases) -> str:
    """When the training data were learned, and when that held for other data."""
    if p.memorised is None:
        return ""
    learned = f"training data learned at step {p.memorised:,}"
    if p.generalised is not None and p.ratio is not None:
        near = "no delay" if p.ratio <= NORMAL else "never far behind"
        word = near if p.label == "normal" else p.label
        return f"{learned}, held-out data at step {p.generalised:,}: delay ratio {p.ratio:.3g} ({word})"
    quantity = "accuracy" if logged_as([p.test], "accuracy") else "loss"
    side = "lower" if (p.gap > 0) == (quantity == "accuracy") else "higher"
    return f"{learned}, held-out data not as well: at the end {quantity} {number(abs(p.gap))} {side}"


def _clipping(run: Run) -> str:
    """What it means that the gradients of nearly all steps were clipped, which depends on the optimizer."""
    for s in run.summary("clip.coefficient"):
        if s.n < CLIPPED or not s.quantiles["p95"] < 1:
            continue
        optimizers = run.facts.get("optimizers", ())
        groups = [group for optimizer in optimizers for group in optimizer.get("groups", ())]
        adaptive = bool(groups) and all("betas" in group for group in groups)
        size = (
            "the size of updates hardly depends on it"
            if adaptive
            else "the threshold times the learning rate sets the size of updates"
        )
        return (
            f"nearly every gradient was clipped, half of them to {s.quantiles['p50']:.2g} of their norm or less: {size}"
        )
    return ""


def _attention(run: Run) -> Iterator[str]:
    rules = load_rules()
    uniform = rules["uniform_attention"].values["entropy"]
    for ref, beyond, words in (
        ("attn_entropy.normalised", lambda x: x < SHARP, "look at hardly more than one key"),
        ("attn_entropy.normalised", lambda x: x > uniform, "look at all keys alike"),
        ("attn_sink_mass.mass", lambda x: x > SINK, "give the first key more than half"),
    ):
        heads = run.summary(ref)
        several = sum(map(beyond, _last(heads)))
        if several:
            yield f"{several:,} of {len(heads):,} heads {words}"
    bounds = run.summary("attn_logit_max.lse_max") or run.summary("attn_logit_max.found")
    largest = max(bounds, key=lambda s: -math.inf if math.isnan(s.last) else s.last, default=None)
    if largest is not None and largest.last > rules["attention_entropy_collapse"].values["logit"]:
        yield f"logits up to {number(largest.last)} ({largest.module})"


def _routing(run: Run) -> Iterator[str]:
    experts = {s.module: s.last for s in run.summary("router_balance.experts")}
    loads = [s for s in run.summary("router_load.load") if s.module.rpartition("[")[0] in experts]
    idle = sum(s.last < IDLE / experts[s.module.rpartition("[")[0]] for s in loads)
    if idle:
        yield f"{idle:,} of {len(loads):,} experts get less than a tenth of their share"
    for s in run.summary("router_balance.effective"):
        if s.last < NARROW * experts.get(s.module, 0):
            yield f"{s.module} uses {s.last:.3g} of {experts[s.module]:.0f} experts"
            break
    dropped = max(_last(run.summary("router_balance.dropped")), default=0.0)
    if dropped > DROPPED:
        yield f"{dropped:.1%} of the assignments dropped"


def _curvature(run: Run) -> Iterator[str]:
    other = 0.0 in _last(run.summary("sharpness.of_step"))  # another loss than that of the training was measured
    for s in run.summary("edge_of_stability.ratio"):
        if other:
            break
        if s.last > ABOVE:
            yield f"sharpness is {number(s.last)} times what the learning rate allows"
        elif s.last >= EDGE:
            yield f"at the edge of stability: {s.last:.2f} of what the learning rate allows"
    for s in run.summary("sharpness.value"):
        if s.first > 0 and s.last > 0 and max(s.last / s.first, s.first / s.last) >= GROWN:
            whose = "of the loss that was given, " if other else ""
            yield f"sharpness {whose}{number(s.first)} → {number(s.last)}"


def _last(several: Iterable[SeriesSummary]) -> list[float]:
    return [s.last for s in several if not math.isnan(s.last)]
