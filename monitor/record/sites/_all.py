"""Which sites there are, in the order of a training step."""

from __future__ import annotations

from monitor.record.site import Site
from monitor.record.sites.activation import ActivationSite
from monitor.record.sites.adam_state import AdamStateSite
from monitor.record.sites.attention import AttentionSite
from monitor.record.sites.autocast import AutocastSite
from monitor.record.sites.batch_norm import BatchNormSite
from monitor.record.sites.binary_loss import BinaryLossSite
from monitor.record.sites.embedding import EmbeddingSite
from monitor.record.sites.evaluation import EvaluationSite
from monitor.record.sites.example import ExampleSite
from monitor.record.sites.fused_loss import FusedLossSite
from monitor.record.sites.gradient import GradientSite
from monitor.record.sites.input import InputSite
from monitor.record.sites.labels import LabelsSite
from monitor.record.sites.logged import LoggedSite
from monitor.record.sites.logits import LogitsSite
from monitor.record.sites.loss import LossSite
from monitor.record.sites.mode import ModeSite
from monitor.record.sites.norm import NormSite
from monitor.record.sites.optimizer_age import OptimizerAgeSite
from monitor.record.sites.overlap import OverlapSite
from monitor.record.sites.parameter import ParameterSite
from monitor.record.sites.probe import ProbeSite
from monitor.record.sites.resumed import ResumedSite
from monitor.record.sites.reuse import ReuseSite
from monitor.record.sites.router import RouterSite
from monitor.record.sites.state import StateSite
from monitor.record.sites.stream import StreamSite
from monitor.record.sites.underflow import UnderflowSite
from monitor.record.sites.units import UnitsSite

SITES: tuple[type[Site], ...] = (
    InputSite,
    ActivationSite,
    StreamSite,
    NormSite,
    BatchNormSite,
    ModeSite,
    UnitsSite,
    AttentionSite,
    RouterSite,
    LossSite,
    LogitsSite,
    ExampleSite,
    FusedLossSite,
    BinaryLossSite,
    LabelsSite,
    GradientSite,
    UnderflowSite,
    AutocastSite,
    ReuseSite,
    ParameterSite,
    EmbeddingSite,
    AdamStateSite,
    OptimizerAgeSite,
    ResumedSite,
    OverlapSite,
    StateSite,
    EvaluationSite,
    LoggedSite,
    ProbeSite,
)

#: Those that read nothing but parameters, their gradients and what the optimizer keeps of them.
PARTED: tuple[type[Site], ...] = (GradientSite, ParameterSite)
