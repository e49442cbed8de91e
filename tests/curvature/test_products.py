from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

from monitor.curvature import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    LossClosure,
    combined,
    head_hessian,
    lanczos,
    scaled,
)
from monitor.curvature.products import Operator
from monitor.errors import MonitorError, UsageError

WAYS = ["cached", "recompute", "forward", "difference"]


def closure(problem: Any, **options: Any) -> LossClosure:
    return LossClosure(problem.model, problem.loss_fn, problem.batch, **{"dtype": torch.float64, **options})


@pytest.mark.parametrize(
    ("kind", "way"),
    # torch has no forward-over-reverse rule for mean squared error
    [("classifier", way) for way in WAYS] + [("regression", way) for way in WAYS if way != "forward"],
)
def test_every_way_gives_the_hessian(way, kind, request):
    """Oracle: dense reference (torch.func, float64); central differences are good to eps^(2/3)."""
    problem = request.getfixturevalue(kind)
    H = Hessian(closure(problem), way=way).dense()
    torch.testing.assert_close(H, problem.hessian(), rtol=1e-10, atol=1e-8 if way == "difference" else 1e-13)


@pytest.mark.parametrize("way", WAYS[:3])
def test_float32_products_are_good_to_float32(classifier, way):
    """Oracle: dense reference (torch.func, float64)."""
    v = torch.randn(79)
    expected = classifier.hessian() @ v.double()
    product = Hessian(closure(classifier, dtype=None), way=way)(v)
    assert product.dtype == torch.float32
    assert (product.double() - expected).norm() < 1e-5 * expected.norm()


def test_auto_caches_and_refuses_a_graph_of_old_parameters(classifier):
    """Oracle: planted fault (parameters change under a cached graph)."""
    H = Hessian(closure(classifier, dtype=None))
    H(torch.ones(H.n))
    assert H.way == "cached"
    torch.optim.SGD(classifier.model.parameters(), lr=0.1).step()  # no gradient, no change
    H(torch.ones(H.n))
    with torch.no_grad():
        classifier.model[0].weight.add_(1.0)
    with pytest.raises(UsageError, match="changed since"):
        H(torch.ones(H.n))


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher, Fisher])
def test_graphs_are_freed_without_the_garbage_collector(classifier, kind):
    """Oracle: invariance (nothing outlives the operator: memory is back before the optimizer step)."""
    gc.disable()
    try:
        operator = kind(closure(classifier, dtype=None))
        operator(torch.ones(79))
        alive = [weakref.ref(operator), weakref.ref(operator.point), weakref.ref(operator.point.leaves[0])]
        del operator
        assert [r() for r in alive] == [None] * 3
    finally:
        gc.enable()


def test_several_batches_give_the_hessian_of_all_data(classifier):
    """Oracle: invariance (the mean over batches, weighted by size, is the mean over the data)."""
    batches = [(classifier.x[i:j], classifier.y[i:j]) for i, j in [(0, 10), (10, 14), (14, 24)]]
    whole = LossClosure.mean(classifier.model, F.cross_entropy, batches, dtype=torch.float64)
    H = Hessian(whole)
    torch.testing.assert_close(H.dense(), classifier.hessian(), rtol=1e-10, atol=1e-13)
    assert H.way == "recompute" and whole.size == 24
    assert whole.value() == pytest.approx(closure(classifier).value(), rel=1e-12)
    G = GaussNewton(whole).dense()
    torch.testing.assert_close(G, GaussNewton(closure(classifier)).dense(), rtol=1e-10, atol=1e-13)


def _parts(problem) -> tuple[Tensor, Tensor]:
    """Per-example Jacobian ``(N, C, n)`` and outputs ``(N, C)`` in float64."""
    named = {k: p.detach().double() for k, p in problem.model.named_parameters()}

    def outputs(values):
        return functional_call(problem.model, values, (problem.x.double(),))

    J = jacrev(outputs)(named)
    z = outputs(named)
    return torch.cat([j.reshape(*z.shape, -1) for j in J.values()], -1), z


def test_gauss_newton_of_cross_entropy(classifier):
    """Oracle: closed form, mean of J'(diag p − pp')J over examples."""
    J, z = _parts(classifier)
    p = z.softmax(-1)
    B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nci,ncd,ndj->ij", J, B, J) / len(z)
    torch.testing.assert_close(GaussNewton(closure(classifier)).dense(), expected, rtol=1e-10, atol=1e-14)


def test_gauss_newton_of_squared_error(regression):
    """Oracle: closed form, (2 / NC) J'J for the mean over examples and outputs."""
    J, z = _parts(regression)
    expected = 2 / z.numel() * torch.einsum("nci,ncj->ij", J, J)
    torch.testing.assert_close(GaussNewton(closure(regression)).dense(), expected, rtol=1e-10, atol=1e-14)


def test_empirical_fisher(classifier):
    """Oracle: closed form, mean of the outer products of per-example gradients."""
    J, z = _parts(classifier)
    r = z.softmax(-1) - F.one_hot(classifier.y, 3)
    g = torch.einsum("nci,nc->ni", J, r)
    torch.testing.assert_close(EmpiricalFisher(closure(classifier)).dense(), g.T @ g / len(g), rtol=1e-10, atol=1e-14)


def test_fisher_is_gauss_newton_on_average_and_repeats_its_draws(classifier):
    """Oracle: closed form (the Fisher information of softmax is the Gauss–Newton matrix); 4 standard errors."""
    c = closure(classifier)
    draws = torch.stack([Fisher(c, seed=s).dense() for s in range(30)])
    assert torch.equal(draws[0], Fisher(c, seed=0).dense())
    error = (draws.mean(0) - GaussNewton(c).dense()).norm()
    assert error < 4 * (draws.var(0).sum() / 30).sqrt()
    several = torch.stack([Fisher(c, draws=30, seed=s).dense() for s in range(3)])
    assert several.var(0).sum() < draws.var(0).sum() / 10  # a 30th is expected


def test_output_operators_agree_with_an_independent_library(classifier):
    """Oracle: independent library (curvlinops), float64."""
    curvlinops = pytest.importorskip("curvlinops")
    model = classifier.model.double()
    parameters = list(model.parameters())
    data = [(classifier.x.double(), classifier.y)]
    v = torch.randn(79, dtype=torch.float64)
    for ours, theirs in [
        (Hessian, curvlinops.HessianLinearOperator),
        (GaussNewton, curvlinops.GGNLinearOperator),
        (EmpiricalFisher, curvlinops.EFLinearOperator),
    ]:
        loss = nn.CrossEntropyLoss()
        product = ours(LossClosure(model, loss, data[0]))(v)
        torch.testing.assert_close(product, theirs(model, loss, parameters, data) @ v, rtol=1e-9, atol=1e-12)


def test_a_selection_is_the_block_of_the_whole(classifier):
    """Oracle: dense reference; names may be parameters or modules, and order is the model's."""
    H = classifier.hessian()
    block = Hessian(closure(classifier), parameters=["4", "0.weight"])
    where = block.closure.point().slices()
    index = torch.cat([torch.arange(79)[where[name]] for name in ["0.weight", "4.weight", "4.bias"]])
    assert block.point.names == ("0.weight", "4.weight", "4.bias")
    torch.testing.assert_close(block.dense(), H[index][:, index], rtol=1e-10, atol=1e-13)


def test_frozen_unused_and_tied_parameters():
    """Oracle: dense reference (torch.func) over what is trainable; the unused block is zero and named."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model, x, y = Odd().double(), torch.randn(9, 4).double(), torch.randint(0, 4, (9,))
    H = Hessian(LossClosure(model, F.cross_entropy, (x, y)))

    def loss(weight, bias):
        return F.cross_entropy(torch.tanh(x @ weight.T + bias) @ weight.T + model.second.bias, y)

    blocks = torch.func.hessian(loss, argnums=(0, 1))(model.first.weight.detach(), model.first.bias.detach())
    expected = torch.cat(
        [torch.cat([b.reshape(a, -1) for b in row], 1) for a, row in zip((16, 4), blocks, strict=True)]
    )
    dense = H.dense()
    torch.testing.assert_close(dense[:20, :20], expected, rtol=1e-10, atol=1e-13)
    assert not dense[20:].any() and H.unused == ("unused.weight", "unused.bias")
    assert Hessian(H.closure, parameters="second.weight").point.names == ("first.weight",)  # an alias
    with pytest.raises(UsageError, match="frozen"):
        Hessian(H.closure, parameters="second.bias")


@pytest.mark.parametrize("way", WAYS)
def test_ways_agree_where_the_first_parameter_is_frozen(classifier, way):
    """Oracle: dense reference. Points then share the stand-in that comes first, and nothing else."""
    H = Hessian(closure(classifier), parameters=["2", "4"], way=way)
    torch.testing.assert_close(H.dense(), classifier.hessian()[36:, 36:], rtol=1e-8, atol=1e-8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(a.transpose(1, 2).flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.net(x).mean(-1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False):
        super().__init__()
        self.first, self.out = nn.Linear(8, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.reentrant = reentrant

    def _inner(self, h):
        return torch.tanh(self.attention(h, h, h, need_weights=False)[0])

    def forward(self, x):
        return self.out(checkpoint(self._inner, self.first(x), use_reentrant=self.reentrant).mean(1))


def _difference_of_gradients(c: LossClosure, v: Tensor) -> Tensor:
    point, h = c.point(), 1e-5
    return (c.gradient(point.moved(h * v)) - c.gradient(point.moved(-h * v))) / (2 * h)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [Attention, Recurrent, Normalised, Checkpointed, nn.TransformerEncoderLayer])
def test_architectures(kind, mode):
    """Oracle: central difference of float64 gradients along random directions, and symmetry."""
    torch.manual_seed(0)
    if kind is nn.TransformerEncoderLayer:
        model: nn.Module = nn.Sequential(
            kind(8, 2, 16, batch_first=True, activation="gelu"), nn.Flatten(), nn.Linear(48, 3)
        )
    else:
        model = kind()
    x, y = torch.randn(7, 6, 8), torch.randint(0, 3, (7,))
    c = LossClosure(model, F.cross_entropy, (x, y), mode=mode, dtype=torch.float64)
    H = Hessian(c)
    u, v = (torch.randn(H.n, dtype=torch.float64) / H.n**0.5 for _ in range(2))
    Hv = H(v)
    assert H.way == "cached"
    torch.testing.assert_close(Hv, _difference_of_gradients(c, v), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(u @ Hv, v @ H(u), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Hessian(c, way="recompute")(v), Hv, rtol=1e-9, atol=1e-12)
    G = GaussNewton(c)
    torch.testing.assert_close(u @ G(v), v @ G(u), rtol=1e-9, atol=1e-12)
    assert v @ G(v) > 0


def test_reentrant_checkpointing_is_named():
    """Oracle: planted fault."""
    model = Checkpointed(reentrant=True)
    c = LossClosure(model, F.cross_entropy, (torch.randn(4, 6, 8), torch.randint(0, 3, (4,))))
    with pytest.raises(UsageError, match="use_reentrant=False"):
        Hessian(c)(torch.ones(c.point().n))


class _Once(torch.autograd.Function):
    """x³ whose backward pass cannot be differentiated by reverse mode, but has a forward-mode rule or not."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_no_way_is_said_with_reasons_and_the_difference_still_works():
    """Oracle: planted fault, and the closed form 30x⁴ of the second derivative of x⁶."""
    model = nn.Linear(1, 3, bias=False).double()
    linear = LossClosure(model, lambda: _Once.apply(model.weight).sum())  # here autograd itself would answer 0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Hessian(linear, way="cached")(torch.ones(3).double())
    c = LossClosure(model, lambda: _Once.apply(model.weight).square().sum())
    with pytest.raises(MonitorError, match=r"cached: .*recompute: .*forward: .*difference"):
        Hessian(c)(torch.ones(3).double())
    H = Hessian(c, way="difference").dense()
    torch.testing.assert_close(H, torch.diag(30 * model.weight.detach().flatten() ** 4), rtol=1e-6, atol=1e-6)


class _Cube(_Once):
    """The same with a rule for forward mode."""

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[override]
        return 3 * ctx.saved_for_forward[0] ** 2 * tangent

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return _Once.forward(ctx, x)


def test_auto_goes_forward_where_backward_twice_does_not_work():
    """Oracle: planted fault, and the closed form 30x⁴ of the second derivative of x⁶."""
    model = nn.Linear(1, 3, bias=False).double()
    H = Hessian(LossClosure(model, lambda: _Cube.apply(model.weight).square().sum()))
    torch.testing.assert_close(H.dense(), torch.diag(30 * model.weight.detach().flatten() ** 4))
    assert H.way == "forward"


def test_a_loss_linear_in_the_parameters_has_no_curvature():
    """Oracle: closed form."""
    model = nn.Linear(3, 1)
    H = Hessian(LossClosure(model, lambda: model(torch.ones(2, 3)).mean()))
    assert not H(torch.ones(4)).any() and H.unused == ()


@pytest.mark.parametrize("bias", [True, False])
def test_head_hessian(bias):
    """Oracle: dense reference (torch.func, float64) and the whole Hessian's block at the head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=bias)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 4, (20,))
    z = model[:2](x).detach()
    found = head_hessian(z, model(x), bias=bias).dense()
    torch.testing.assert_close(found, Hessian(LossClosure(model, F.cross_entropy, (x, y)), "2").dense())
    head = model[2]
    parameters = {k: p.detach() for k, p in head.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        return F.cross_entropy(torch.func.functional_call(head, {k: v.view_as(p) for (k, p), v in parts}, (z,)), y)

    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    torch.testing.assert_close(found, torch.func.hessian(loss)(flat))


def test_head_hessian_at_zero():
    """Oracle: closed form (spec 5.1, 5.10): at W = 0 it is (1 − 11'/C)/C ⊗ X'X/N; doubled inputs quadruple it."""
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = head_hessian(x, torch.zeros(30, 3), bias=False)
    S = x.T @ x / 30
    expected = torch.kron((torch.eye(3, dtype=torch.float64) - 1 / 3) / 3, S)
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(head_hessian(2 * x, torch.zeros(30, 3), bias=False).dense(), 4 * expected)
    assert lanczos(found, 1, tol=1e-9).largest.values[0] == pytest.approx(float(torch.linalg.eigvalsh(S)[-1]) / 3)
    with pytest.raises(UsageError, match=r"expected \(N, d\) and \(N, C\)"):
        head_hessian(x, torch.zeros(29, 3))


def test_scaled_and_combined():
    """Oracle: closed form (spec 5.3): H = diag(4, 1), P = diag(2, .1) has preconditioned sharpness 10."""
    H = torch.diag(torch.tensor([4.0, 1.0]))
    A = Operator(lambda v: H @ v, 2)
    S = scaled(A, 1 / torch.tensor([2.0, 0.1])).dense()
    torch.testing.assert_close(S, torch.diag(torch.tensor([2.0, 10.0])))
    torch.testing.assert_close(combined([A, A], [3.0, -1.0]).dense(), 2 * H)
    with pytest.raises(UsageError, match="negative or not finite"):
        scaled(A, torch.tensor([1.0, -1.0]))
    with pytest.raises(UsageError, match="one value per parameter"):
        scaled(A, torch.ones(3))
    with pytest.raises(UsageError, match="one size"):
        combined([A, Operator(lambda v: v, 3)], [1, 1])


def test_messages(classifier):
    """Oracle: planted fault."""
    plain = LossClosure(classifier.model, lambda: classifier.loss_fn(classifier.model(classifier.x), classifier.y))
    with pytest.raises(UsageError, match="plain closure"):
        GaussNewton(plain)
    with pytest.raises(UsageError, match="way='newton'"):
        Hessian(plain, way="newton")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="class indices"):
        Fisher(LossClosure(classifier.model, F.mse_loss, (classifier.x, torch.randn(24, 3))))(torch.ones(79))
    with pytest.raises(UsageError, match=r"'0\.wieght' is neither .* 0\.weight"):
        Hessian(plain, parameters="0.wieght")
