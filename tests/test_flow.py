"""Gradients inside of a graph, without the engine of autograd: they are those of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn

from gradwatch.forensics.flow import Flow
from gradwatch.forensics.graph_walk import nodes_below

if TYPE_CHECKING:
    from collections.abc import Callable


def in_place(x: Tensor) -> Tensor:
    """Change a part of what was computed."""
    y = x * 2
    y[:, 1:3].mul_(y[:, 0:1].exp())
    y[0] = 1.0
    return y.relu_().sum()


def recurrent(x: Tensor) -> Tensor:
    """Run a recurrent cell for some steps, with one weight in all of them."""
    torch.manual_seed(1)
    cell, state = nn.GRUCell(4, 4), torch.zeros(6, 4)
    for _ in range(5):
        state = cell(x, state)
    return state.square().mean()


GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "broadcasting": lambda x: ((x[:, :1] * x + x[0]) / (1 + x[:, 1:2].abs())).mean(),
    "several outputs": lambda x: sum(part.sum() * place for place, part in enumerate(x.split(1, 1), 1)),
    "a second output alone": lambda x: torch.linalg.svd(x)[1].sum() + x.max(0).values.sum(),
    "one tensor in several places": lambda x: (x * x + x.exp() * x).logsumexp(1).sum(),
    "in place": in_place,
    "complex numbers": lambda x: torch.fft.rfft(x).abs().sum() + torch.view_as_complex(x.view(6, 2, 2)).real.sum(),
    "mixed dtypes": lambda x: (x.half() * x).double().sum() + (x.bfloat16() @ x.bfloat16().T).float().mean(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]).square().sum(),
    "normalisation": lambda x: (F.layer_norm(x, (4,)) * F.batch_norm(x, None, None, training=True)).sum(),
    "recurrence": recurrent,
    "infinities that are dropped": lambda x: torch.where(x > 0, (x * (x > 0)).log(), x).sum(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_at_all_places_are_those_of_the_engine(name: str) -> None:
    """And the graph is as it was, so that its backward runs afterwards."""
    torch.manual_seed(0)
    leaf = torch.randn(6, 4, requires_grad=True)
    x = leaf * 1.0
    root = GRAPHS[name](x)
    places = [
        (node, place)
        for node in nodes_below([root.grad_fn])
        if not hasattr(node, "variable")
        for place in range(len(node._input_metadata))
    ]
    edges = [torch.autograd.graph.GradientEdge(*place) for place in places]
    expected = torch.autograd.grad([root], edges, retain_graph=True, allow_unused=True)
    flow = Flow([root], places)
    for place, gradient in zip(places, expected, strict=True):
        found = flow.at(place)
        assert flow.knows(place)
        assert (found is None) == (gradient is None), place
        if found is not None and gradient is not None:
            assert found.dtype is gradient.dtype
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert leaf.grad is None
    root.backward()
    assert leaf.grad is not None


def test_only_what_leads_to_a_place_is_run() -> None:
    """A node behind it keeps something that was changed since, which running it would refuse."""
    x = torch.randn(6, 4, requires_grad=True)
    y = x * 1.0
    early = y.exp()
    late = early.sigmoid()
    with torch.no_grad():
        early.zero_()
    root = late.sum()
    flow = Flow([root], [(late.grad_fn, 0)])
    assert flow.at((late.grad_fn, 0)) is not None
