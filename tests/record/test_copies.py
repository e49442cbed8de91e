"""A recorded model is copied and saved as if it were not recorded."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import monitor
from tests.record import trainings
from tests.record.small import clean, mlp, train

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.optim.swa_utils.AveragedModel(m).module,
        lambda m: torch.load(_saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "averaged", "save"],
)
def test_a_recorded_model_can_be_copied_and_saved(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Oracle: invariance. The copy computes the same, is not recorded, and the recording goes on."""
    model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        train(model, 3)
        other = copied(model)
        x = torch.randn(8, 12)
        assert torch.equal(other(x), model(x))
        train(other, 3)
        train(model, 3)
    clean(tmp_path / "run", 6)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"monitor" not in file.getvalue()  # so that it loads where there is none
    file.seek(0)
    return file


class _Inner(nn.Linear):
    """Says what is saved of it in a way of its own."""

    def __getstate__(self) -> dict[str, object]:
        return {"inner": self.__dict__.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["inner"])


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, _Inner])
def test_a_recorded_model_is_saved_as_if_it_were_not(kind: type[nn.Linear], closed: bool, tmp_path: Path) -> None:
    """Oracle: invariance. The same names are needed to load it, and it holds the user's hooks and no others."""

    def saved(record: bool) -> bytes:
        model = kind(12, 5)
        handle = monitor.attach(model, tmp_path / "run") if record else None
        mine = model.register_forward_pre_hook(_mine, with_kwargs=True)
        train(model, 3)
        if handle is not None and closed:
            handle.close()
        data = pickle.dumps(model, 2)
        mine.remove()
        assert not model._forward_pre_hooks or (handle is not None and not closed)
        return data

    def needed(data: bytes) -> set[object]:
        return {name for op, name, _ in pickletools.genops(data) if op.name == "GLOBAL"}

    ours, plain = saved(True), saved(False)
    assert needed(ours) == needed(plain)
    model, other = pickle.loads(ours), pickle.loads(plain)
    assert list(vars(model)) == list(vars(other))
    assert [type(x) for x in vars(model).values()] == [type(x) for x in vars(other).values()]
    assert list(model._forward_pre_hooks.values()) == [_mine]
    assert len(model._forward_pre_hooks_with_kwargs) == 1
    assert not model._forward_hooks and not model._forward_hooks_always_called


def test_a_copy_by_hand_is_itself(tmp_path: Path) -> None:
    """Oracle: invariance. A copy of the attributes with weights of its own is saved with those."""
    model = nn.Linear(12, 5)
    with monitor.attach(model, tmp_path / "run"):
        train(model, 3)
        other = nn.Linear(12, 5)
        other.__dict__.update(model.__dict__)
        other._parameters = dict(other._parameters)
        other.weight = nn.Parameter(torch.full((5, 12), 7.0))
        assert (copy.deepcopy(other).weight == 7).all()
    assert not copy.deepcopy(other)._forward_hooks


def test_a_recorded_model_loads_with_weights_only(tmp_path: Path) -> None:
    """Oracle: independent library. What torch lets through for a plain model it lets through for a recorded one."""
    model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        train(model, 3)
        file = _saved(model)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        assert torch.equal(torch.load(file, weights_only=True).state_dict()["2.bias"], model.state_dict()["2.bias"])


def _mine(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
    """A hook of the user's."""


@pytest.mark.parametrize("training", [trainings.plain])
def test_a_model_copied_while_recorded_trains_to_the_same_bits(
    training: Callable[[Callable[[nn.Module], object]], str], tmp_path: Path
) -> None:
    """Oracle: invariance, bitwise. Copying and pickling a recorded model in the middle changes nothing."""
    control = training(lambda _: None)

    def watch(model: nn.Module) -> None:
        monitor.attach(model, tmp_path / "run")
        copy.deepcopy(model)
        pickle.dumps(model)

    assert training(watch) == control
