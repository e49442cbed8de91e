from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monitor.curvature import Hessian, LossClosure, spectrum
from monitor.errors import UsageError


class Awkward(nn.Module):
    """Everything a measurement could disturb: BatchNorm, dropout, random numbers, counters, caches, buffers in eval."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen += 1
        noise = 0.01 * (random.random() + float(np.random.rand()))
        return self.net(x + noise + 0.01 * torch.randn_like(x))


def setup(seed: int = 0) -> tuple[Awkward, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Awkward()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, optimizer, torch.randn(16, 6), torch.randint(0, 3, (16,))


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # type: ignore[index]
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "version": [t._version for t in [*model.parameters(), *model.buffers()]],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "needs": [p.requires_grad for p in model.parameters()],
        "grad_enabled": torch.is_grad_enabled(),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("form", ["batch", "closure"])
def test_a_measurement_leaves_no_trace(mode, form):
    """Oracle: invariance (every state that could differ is bit for bit the same)."""
    model, _, x, y = setup()
    model.net[1].eval()  # a mixed mode has to come back as it was
    F.cross_entropy(model(x), y).backward()
    called = []
    handle = next(model.parameters()).register_hook(lambda g: called.append(1))
    before, calls, last = state(model), model.calls, model.last
    if form == "batch":
        spectrum(model, F.cross_entropy, (x, y), mode=mode, steps=5, top=2)
    else:
        spectrum(model, lambda: F.cross_entropy(model(x), y), mode=mode, steps=5, top=2)
    after = state(model)
    for key in before:
        assert same(before[key], after[key]), key
    assert model.calls == calls and model.last is last and not called
    handle.remove()


def test_training_is_bitwise_the_same_with_measurements_in_between():
    """Oracle: invariance (a run with and a run without)."""

    def run(measure: bool) -> tuple[list[float], dict[str, Any], Any]:
        model, optimizer, x, y = setup(3)
        losses = []
        for step in range(12):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if measure and step % 3 == 1:
                spectrum(model, F.cross_entropy, (x, y), mode="train", optimizer=optimizer, steps=4, top=1, bottom=0)
        return losses, model.state_dict(), (torch.rand(3), random.random(), optimizer.state_dict())

    assert same(run(False), run(True))


def test_state_is_put_back_when_the_closure_raises():
    """Oracle: planted fault."""
    model, _, x, _ = setup()
    before = state(model)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        model(x)
        raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        spectrum(model, closure)
    assert calls == 1 and all(same(before[k], state(model)[k]) for k in before)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_loss_is_the_same_number_every_time(mode):
    """Oracle: invariance; in train mode also the loss that training would see with these random numbers."""
    model, _, x, y = setup()
    c = LossClosure(model, F.cross_entropy, (x, y), mode=mode)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    values = {c.value() for _ in range(3)}
    torch.rand(5)  # a closure keeps the random numbers of its construction
    values.add(c.value())
    assert len(values) == 1
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    model.train(mode == "train")
    assert F.cross_entropy(model(x), y).item() == values.pop()


def test_train_mode_products_repeat_and_use_batch_statistics():
    """Oracle: invariance (cached and recomputed graphs see one dropout mask), and difference of gradients."""
    model, _, x, y = setup()
    c = LossClosure(model, F.cross_entropy, (x, y), mode="train", dtype=torch.float64)
    H = Hessian(c, way="recompute")
    v = torch.randn(H.n, dtype=torch.float64)
    torch.testing.assert_close(H(v), H(v), rtol=0, atol=0)
    torch.testing.assert_close(H(v), Hessian(c, way="cached")(v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(H(v), Hessian(c, way="difference")(v), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(H(v), Hessian(LossClosure(model, F.cross_entropy, (x, y), dtype=torch.float64))(v))


def test_forms_of_a_batch_agree(classifier):
    """Oracle: invariance (one loss, said in six ways)."""
    model, x, y = classifier.model, classifier.x, classifier.y

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, labels=None):
            logits = self.model(x)
            return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}

    wrapped = Output()
    losses = [
        LossClosure(model, F.cross_entropy, (x, y)),
        LossClosure(model, F.cross_entropy, ((x,), y)),
        LossClosure(model, lambda: F.cross_entropy(model(x), y)),
        LossClosure(wrapped, lambda out, y: F.cross_entropy(out["logits"], y), ({"x": x}, y)),
        LossClosure(wrapped, None, {"x": x, "labels": y}),
        LossClosure(wrapped, lambda out: out["loss"], {"x": x, "labels": y}),
    ]
    values = {c.value() for c in losses}
    assert values == {F.cross_entropy(model(x), y).item()}
    v = torch.randn(79)
    for c in losses:
        torch.testing.assert_close(Hessian(c)(v), Hessian(losses[0])(v), rtol=0, atol=0)
    assert [c.size for c in losses] == [24, 24, None, 24, 24, 24]


def test_value_and_gradient_elsewhere(classifier):
    """Oracle: dense reference (autograd on a moved copy)."""
    c = LossClosure(classifier.model, F.cross_entropy, classifier.batch)
    offset = torch.randn(79)
    value, gradient = c.value(c.point().moved(offset)), c.gradient(c.point().moved(offset))
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(classifier.model.parameters()) + offset, classifier.model.parameters()
        )
    loss = F.cross_entropy(classifier.model(classifier.x), classifier.y)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(classifier.model.parameters()))])
    assert value == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)


def test_half_precision_parameters_are_measured_in_float32(classifier):
    """Oracle: dense reference of the same rounded parameters."""
    classifier.model.bfloat16()
    H = Hessian(LossClosure(classifier.model, F.cross_entropy, classifier.batch))
    assert H.dtype == torch.float32 and classifier.model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(H.dense().double(), classifier.hessian(), rtol=1e-4, atol=1e-6)


def test_autocast_outside_is_switched_off_and_inside_is_noticed(classifier):
    """Oracle: invariance outside; planted fault inside (a bfloat16 Hessian is not symmetric)."""
    model, x, y = classifier.model, classifier.x, classifier.y
    plain = spectrum(model, F.cross_entropy, (x, y), top=1, steps=8, samples=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = spectrum(model, F.cross_entropy, (x, y), top=1, steps=8, samples=2)
        assert torch.is_autocast_enabled("cpu")
    assert cast.sharpness == plain.sharpness and not plain.notes

    def inside():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    spoilt = spectrum(model, inside, top=1, steps=8, samples=2)
    assert not spoilt.converged and "not symmetric" in spoilt.notes[0]


def test_no_grad_and_inference_mode_around_are_lifted(classifier):
    """Oracle: invariance."""
    c = LossClosure(classifier.model, F.cross_entropy, classifier.batch)
    expected = Hessian(c)(torch.ones(79))
    with torch.no_grad():
        assert torch.equal(Hessian(c)(torch.ones(79)), expected)
    with torch.inference_mode():
        assert torch.equal(Hessian(c)(torch.ones(79)), expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "child"])
def test_compiled_models_are_looked_through_and_not_recompiled(how, classifier):
    """Oracle: invariance (the eager product), and a counting backend that must not be called again."""
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    model, x, y = classifier.model, classifier.x, classifier.y
    expected = Hessian(LossClosure(model, F.cross_entropy, (x, y)))(torch.ones(79))
    if how == "wrapped":
        model = cast("nn.Module", torch.compile(model, backend=backend))
    elif how == "in place":
        model = _Around(model)  # torch does not compile a Sequential in place
        model.compile(backend=backend)
    else:
        model[0] = torch.compile(model[0], backend=backend)
    out = model(x)
    count = len(compilations)
    assert count
    for c in (LossClosure(model, F.cross_entropy, (x, y)), LossClosure(model, lambda: F.cross_entropy(model(x), y))):
        assert torch.equal(Hessian(c)(torch.ones(79)), expected)
        assert c.names[0] == ("inner.0.weight" if how == "in place" else "0.weight")
    assert torch.equal(model(x), out) and len(compilations) == count
    torch._dynamo.reset()


def test_what_a_closure_reads_from_outside_is_refused(classifier):
    """Oracle: planted fault (a penalty on parameters taken out of the model beforehand)."""
    model, (x, y) = classifier.model, classifier.batch
    taken = list(model.parameters())
    with pytest.raises(UsageError, match=r"reads parameter 0\.weight from outside"):
        Hessian(LossClosure(model, lambda: F.cross_entropy(model(x), y) + taken[0].square().sum()))(torch.ones(79))

    def penalty():
        return 0.5 * sum(p.square().sum() for p in model.parameters())

    both = Hessian(LossClosure(model, lambda: F.cross_entropy(model(x), y) + penalty())).dense()
    alone = Hessian(LossClosure(model, F.cross_entropy, (x, y))).dense()
    torch.testing.assert_close(both, alone + torch.eye(79))  # the curvature of |w|²/2 is the identity


def test_two_closures_on_one_model_do_not_mix(classifier):
    """Oracle: invariance (products inside each other's sessions)."""
    a = Hessian(LossClosure(classifier.model, F.cross_entropy, (classifier.x[:9], classifier.y[:9])), way="recompute")
    b = Hessian(LossClosure(classifier.model, F.cross_entropy, (classifier.x[9:], classifier.y[9:])), way="recompute")
    v = torch.randn(79)
    alone = a(v), b(v)
    with a.session(), b.session():
        inside = a(v), b(v), a(v)
    assert torch.equal(inside[0], alone[0]) and torch.equal(inside[1], alone[1]) and torch.equal(inside[2], alone[0])


def test_messages(classifier):
    """Oracle: planted fault."""
    model, (x, y) = classifier.model, classifier.batch
    for arguments, message in [
        ((model, F.cross_entropy, x), "batch is a Tensor; expected"),
        ((model, F.cross_entropy, (x, y, y)), "batch is a tuple of 3; expected"),
        ((model, None, None), "neither a loss function"),
        ((nn.Tanh(), F.cross_entropy, (x, y)), "no trainable parameter"),
    ]:
        with pytest.raises(UsageError, match=message):
            LossClosure(*arguments)
    with pytest.raises(UsageError, match='expected "eval" or "train"'):
        LossClosure(model, F.cross_entropy, (x, y), mode="test")  # type: ignore[arg-type]
    for loss, message in [
        (lambda: model(x), r"the loss is shape \(24, 3\)"),
        (lambda: 1.0, "the loss is float"),
        (lambda: model(x).detach().sum(), "does not depend on the selected"),
    ]:
        with pytest.raises(UsageError, match=message):
            LossClosure(model, loss).gradient()
    with pytest.raises(UsageError, match="hold no loss"):
        LossClosure(_Silent(), None, {"x": x}).value()
    with pytest.raises(UsageError, match="batches is empty"):
        LossClosure.mean(model, F.cross_entropy, [])
    with pytest.raises(UsageError, match="expected one number >= 0 per batch"):
        LossClosure.mean(model, F.cross_entropy, [(x, y)], weights=[1, 2])
    with pytest.raises(UsageError, match=r"dtype torch\.complex64"):
        LossClosure(nn.Linear(2, 2, dtype=torch.complex64), lambda: None)


class _Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class _Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"logits": x * self.weight}
