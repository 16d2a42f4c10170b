"""What every test relies on: one torch thread, and proof that nothing of gradwatch is left behind."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from rich.live import _RefreshThread
from torch.nn.utils import clip_grad as torch_clip
from torch.optim import optimizer as torch_optimizer

from gradwatch import monitor
from gradwatch.probe import optimizer_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent.parent))  # the examples are imported as a package-less folder
torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in the background of a shell: the programs under test shall not ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

_GROUP = "_group_tensors_by_device_and_dtype"
_BACKWARD, _GROUPING = torch.autograd.backward, getattr(torch_clip, _GROUP)


def _threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if "Refresh" in type(thread).__name__ or "gradwatch" in thread.name
    ]


def left_behind() -> list[str]:
    """Name everything of gradwatch that is still in torch or in this process."""
    found = []
    if torch.autograd.backward is not _BACKWARD:
        found.append("patch of torch.autograd.backward")
    if getattr(torch_clip, _GROUP) is not _GROUPING:
        found.append(f"patch of {_GROUP}")
    if (
        optimizer_hooks._handles
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        found.append("optimizer hooks")
    if len(monitor.attached):
        found.append("an attached monitor")
    return found + _threads()


@pytest.fixture(autouse=True, scope="session")
def nothing_stays_frozen() -> Iterator[None]:
    """After all tests: plugins of pytest that are imported in the end ask who refers to whom."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def known_objects_stay() -> None:
    """Spare `gc.collect` after each test what was there before its module: torch, and all that modules hold, for good."""
    gc.collect()
    gc.freeze()


def _join_told() -> None:
    """Wait for threads of rich's that have been told to end; rich does not, and they need some moments."""
    for thread in threading.enumerate():
        if isinstance(thread, _RefreshThread) and thread.done.is_set():
            thread.join(5.0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After each test no hook, patch or thread remains."""
    yield
    _join_told()
    gc.collect()
    found = left_behind()
    for one in list(monitor.attached.values()):
        one.detach()
    assert found == []
