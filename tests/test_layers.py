"""Layers out of the ordinary: without elements, without gradients, of kinds that cannot be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import device
from gradwatch.rules import GradientsAboveOne
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from collections.abc import Callable


def watched(model: nn.Module, steps: int, extra: str = "", scale: float = 1.0, **settings: object) -> gradwatch.Monitor:
    """Train; the parameter ``extra`` adds its sum to the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:  # type: ignore[arg-type]
        for _ in range(steps):
            optimizer.zero_grad()
            loss = scale * nn.functional.mse_loss(model(x), y)
            (loss + getattr(model, extra).sum() if extra else loss).backward()
            optimizer.step()
    return monitor


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    """Return a small model with one parameter more, called extra."""
    torch.manual_seed(0)
    model = mlp()
    model.register_parameter("extra", parameter)
    return model


def test_a_layer_without_elements_is_neither_dead_nor_in_the_way_of_other_rules() -> None:
    """A vector and a matrix without elements: no incident; where all others' gradients are large, that is still seen."""
    for shape in ((0,), (0, 3), (3, 0)):
        monitor = watched(with_parameter(nn.Parameter(torch.zeros(shape))), 70, "extra")
        assert monitor.incidents == []
        large = watched(
            with_parameter(nn.Parameter(torch.zeros(shape))), 5, "extra", scale=1e4, rules=[GradientsAboveOne()]
        )
        assert [alarm.code for alarm in large.alarms] == ["GW203"]


def test_a_layer_that_never_gets_a_gradient_is_not_called_dead() -> None:
    """Its norm is missing, not zero."""
    monitor = watched(with_parameter(nn.Parameter(torch.ones(4, 4))), 70)
    assert monitor.incidents == []


class Packed(Tensor):
    """Numbers in a form of its own: it has no norm, as of a library for quantisation."""

    @staticmethod
    def __new__(cls, _: Tensor) -> Packed:
        """Say that there are 4 x 4 floats."""
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, _args: Any = (), _kwargs: Any = None) -> Any:
        """Refuse everything but what a parameter needs."""
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _args[0]
        raise NotImplementedError(str(function))


def nested(layout: torch.layout) -> Tensor:
    """Return two matrices of different lengths as one tensor."""
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


ODD: dict[str, Callable[[], Tensor]] = {
    "of type float8_e4m3fn": lambda: torch.ones(8, 8).to(torch.float8_e4m3fn),
    "of layout sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "nested": lambda: nested(torch.strided),
    "nested, jagged": lambda: nested(torch.jagged),
    "on the meta device": lambda: torch.ones(4, 4, device="meta"),
    "of class Packed": lambda: Packed(torch.ones(4, 4)),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR|invariant).*:UserWarning")
@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("kind", ODD)
def test_weights_that_cannot_be_measured_are_left_out_and_the_others_go_on(
    kind: str, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of all others are those of a model without it; it is named once, with the reason; the guard is no trap."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    torch.manual_seed(0)
    plain = watched(mlp(), 70, clip="norm").history
    model = with_parameter(nn.Parameter(ODD[kind](), requires_grad=False))
    monitor = watched(model, 70, clip="norm")
    history = monitor.history
    place = history.layers.index("extra")
    assert history.rows == 70
    np.testing.assert_array_equal(np.delete(history.grad_norm(), place, axis=1), plain.grad_norm())
    np.testing.assert_array_equal(np.delete(history.weight_norm(), place, axis=1), plain.weight_norm())
    assert np.isnan(history.weight_norm()[:, place]).all()
    assert monitor.incidents == []
    told = [note for note in monitor.notes if "extra" in note]
    assert len(told) == 1
    assert kind.partition(",")[0] in told[0]
    assert monitor.checkpoint_guard()


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
def test_gradients_that_cannot_be_measured_are_left_out_and_the_others_go_on(
    clip: str | None, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nested parameter is trained beside plain ones, with an explosion: the others are measured and clipped."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = with_parameter(nn.Parameter(nested(torch.strided)))
    x, y = data()
    truth = []
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name != "extra"], lr=0.01)
    optimizer.add_param_group({"params": [model.extra], "lr": 0.0, "foreach": False})
    with gradwatch.attach(model, report=None, strict=True, clip=clip) as monitor:
        for step in range(70):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) * (1e3 if step >= 68 else 1.0)
            (loss + torch.nested.to_padded_tensor(model.extra, 0.0).sum()).backward()
            truth.append(
                torch.nn.utils.get_total_norm(
                    [g for p in list(model.parameters())[1:] if (g := p.grad) is not None]
                ).item()
            )
            optimizer.step()
    assert monitor.history.rows == 70
    np.testing.assert_allclose(monitor.history.global_norm(), truth, rtol=1e-6)
    assert (monitor.history.clip_coefficient().min() < 0.9) == (clip is not None)
    assert sum("gradients that cannot be measured are left out: extra (nested)" in note for note in monitor.notes) == 1


def test_a_layer_that_can_no_longer_be_measured_is_left_out_from_then_on() -> None:
    """A frozen layer is turned into float8 in the middle of the training."""
    model = with_parameter(nn.Parameter(torch.ones(4, 4), requires_grad=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(40):
            if step == 20:
                model.extra.data = model.extra.data.to(torch.float8_e4m3fn)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    place = monitor.history.layers.index("extra")
    weights = monitor.history.weight_norm()[:32]
    assert weights[:20, place].tolist() == pytest.approx([4.0] * 20)
    assert np.isnan(weights[20:, place]).all()
    assert np.isfinite(np.delete(weights, place, axis=1)).all()
    assert len(monitor.notes) == 1
    assert "extra (of type float8_e4m3fn)" in monitor.notes[0]


@pytest.mark.parametrize(("count", "said"), [(4, "and 1 more layer ("), (5, "and 2 more layers (")])
def test_what_is_left_out_names_three_layers_and_counts_the_others(count: int, said: str) -> None:
    """In English, one is no plural."""
    model = mlp()
    for number in range(count):
        frozen = torch.ones(4, 4).to(torch.float8_e4m3fn)
        model.register_parameter(f"extra{number}", nn.Parameter(frozen, requires_grad=False))
    (note,) = watched(model, 1).notes
    assert f"extra0, extra1, extra2 {said}" in note
