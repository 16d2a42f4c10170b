"""Gradients at places inside of a graph, for which no code of the program is run: no hooks, no functions written in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    Place = tuple[Any, int]  # a node, and which of its outputs


class Flow:
    """The gradients of the sum of some roots, with nodes run one by one, as the engine of autograd does without hooks.

    Args:
        roots: tensors.
        places: where gradients are wanted.
        ends: nodes behind which nothing is wanted.
    """

    def __init__(self, roots: Sequence[Tensor], places: Sequence[Place], ends: Iterable[Any] = ()) -> None:
        self._arrived: dict[Any, dict[int, Tensor]] = {}
        self._unknown: set[Any] = set()
        wanted = {node for node, _ in places}
        needed = _leading_to(wanted, _parents([one.grad_fn for one in roots], frozenset(ends)))
        waits = dict.fromkeys(needed, 0)
        for node in needed:
            for following, _ in node.next_functions:
                if following in waits:
                    waits[following] += 1
        for one in roots:
            self._add(one.grad_fn, one.output_nr, torch.ones_like(one))
        ready = [node for node, left in waits.items() if not left]
        while ready:
            node = ready.pop()
            gradients = self._behind(node) if any(one in waits for one, _ in node.next_functions) else ()
            for number, (following, place) in enumerate(node.next_functions):
                if following not in waits:
                    continue
                if gradients is None:
                    self._unknown.add(following)
                elif gradients and (gradient := gradients[number]) is not None:
                    self._add(following, place, gradient)
                waits[following] -= 1
                if not waits[following]:
                    ready.append(following)

    def knows(self, place: Place) -> bool:
        """Return whether the gradient at a place is known; it is not if that needs a function of the program."""
        return place[0] not in self._unknown

    def at(self, place: Place) -> Tensor | None:
        """Return the gradient at a place; None if none arrives there, or if it is not known."""
        return self._arrived.get(place[0], {}).get(place[1])

    def _behind(self, node: Any) -> Sequence[Tensor | None] | None:
        """Return the gradients that a node returns, none if nothing arrives; None if they are not known."""
        if node in self._unknown or is_of_program(node):
            return None
        arrived = self._arrived.get(node)
        if not arrived:
            return ()
        with torch.no_grad():
            found = node(*(arrived.get(number) for number in range(len(node._input_metadata))))
        return found if isinstance(found, tuple) else (found,)

    def _add(self, node: Any, place: int, gradient: Tensor) -> None:
        like = node._input_metadata[place]
        gradient = gradient if gradient.shape == tuple(like.shape) else gradient.sum_to_size(tuple(like.shape))
        gradient = gradient.to(like.dtype)
        here = self._arrived.setdefault(node, {})
        here[place] = here[place] + gradient if place in here else gradient


def is_of_program(node: Any) -> bool:
    """Return whether running a node runs code of the program, or of an extension, which may do anything."""
    if (
        isinstance(node, torch.autograd.function.BackwardCFunction)
        or "CppNode" in node.name()
        or hasattr(node, "variable")
    ):
        return True
    return any(is_packed(getattr(node, name)) for name in dir(node) if name.startswith("_raw_saved_"))


def is_packed(raw: Any) -> bool:
    """Return whether unpacking what a node keeps calls a hook of the program, or of a checkpoint, which computes it anew."""
    kept = raw if isinstance(raw, (list, tuple)) else (raw,)
    return any(getattr(one, "unpack_hook", None) is not None for one in kept)


def _parents(roots: Sequence[Any], ends: frozenset[Any]) -> dict[Any, list[Any]]:
    """Return the nodes that a backward would reach, each with those that lead to it."""
    found: dict[Any, list[Any]] = {node: [] for node in roots}
    ahead = list(found)
    while ahead:
        node = ahead.pop()
        for following, _ in node.next_functions if node not in ends else ():
            if following is None:
                continue
            if following not in found:
                found[following] = []
                ahead.append(following)
            found[following].append(node)
    return found


def _leading_to(wanted: set[Any], parents: dict[Any, list[Any]]) -> set[Any]:
    ahead = [node for node in wanted if node in parents]
    found = set(ahead)
    while ahead:
        for node in parents[ahead.pop()]:
            if node not in found:
                found.add(node)
                ahead.append(node)
    return found
