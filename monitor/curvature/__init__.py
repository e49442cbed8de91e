"""Curvature of a training loss: pure functions of a model and fixed data, none of which disturbs training.

    from monitor.curvature import spectrum
    spectrum(model, F.cross_entropy, (x, y), optimizer=optimizer)

`spectrum` measures everything at once; the rest are its parts. Operators are known only by their products with vectors,
memory grows with the number of products, and every estimate carries a residual or a standard error.
"""

from __future__ import annotations

from monitor.curvature.closure import LossClosure
from monitor.curvature.density import SpectralDensity, density
from monitor.curvature.jacobian import Jacobian, SingularValues, jacobian, singular_values
from monitor.curvature.lanczos import Eigenvalues, Krylov, lanczos
from monitor.curvature.probes import (
    Alignment,
    Barrier,
    LossChanges,
    OpposingSignals,
    Slice,
    alignment,
    barrier,
    batch_sharpness,
    landscape,
    loss_changes,
    opposing_signals,
    trajectory_kl,
)
from monitor.curvature.products import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    Operator,
    combined,
    head_hessian,
    scaled,
)
from monitor.curvature.spectrum import Spectrum, block_spectra, spectrum
from monitor.curvature.stability import (
    Stability,
    averaged_gradient,
    batch_eigenvalue,
    batch_learning_rate,
    heavy_ball,
    nesterov,
    stability,
    update_rule,
)
from monitor.curvature.trace import Estimate, diagonal, traces, xtrace

__all__ = [
    "Alignment",
    "Barrier",
    "Eigenvalues",
    "EmpiricalFisher",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "Krylov",
    "LossChanges",
    "LossClosure",
    "Operator",
    "OpposingSignals",
    "SingularValues",
    "Slice",
    "SpectralDensity",
    "Spectrum",
    "Stability",
    "alignment",
    "averaged_gradient",
    "barrier",
    "batch_eigenvalue",
    "batch_learning_rate",
    "batch_sharpness",
    "block_spectra",
    "combined",
    "density",
    "diagonal",
    "head_hessian",
    "heavy_ball",
    "jacobian",
    "lanczos",
    "landscape",
    "loss_changes",
    "nesterov",
    "opposing_signals",
    "scaled",
    "singular_values",
    "spectrum",
    "stability",
    "traces",
    "trajectory_kl",
    "update_rule",
    "xtrace",
]
