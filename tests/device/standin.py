"""Loads the stand-in, which must happen before torch is imported, and tells `torch.cuda` of it."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from tests.device.build import torch_folder

if TYPE_CHECKING:
    from pathlib import Path


class StandIn:
    """The device of this process.

    ``lag`` is the number of kernels after which an event has happened and a copy to pinned memory has arrived.
    """

    def __init__(self, library: Path) -> None:
        assert "torch" not in sys.modules
        lib = torch_folder() / "lib"
        for one in (*sorted(lib.glob("libgomp*")), lib / "libc10.so", lib / "libtorch_cpu.so"):
            ctypes.CDLL(str(one), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.standin_number.restype = ctypes.c_long
        self._library.standin_lag.argtypes = [ctypes.c_long]
        self._library.standin_reasons.restype = ctypes.c_char_p
        import torch
        import torch._dynamo  # which asks a device that it finds for more than this one knows

        assert self._library.standin_start() > 1000
        self._captures = False
        for name, answer in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "current_device": self._library.standin_current,
            "is_current_stream_capturing": lambda: self._captures,
            "manual_seed_all": lambda _: None,
        }.items():
            setattr(torch.cuda, name, answer)

    def begin(self, lag: int = 25) -> None:
        """Count anew, with everything as on an ordinary device."""
        self.lag(lag)
        self.capture(on=False)
        self.waits_raise(on=False)
        self.without_float64(on=False)
        self._library.standin_reset()

    def lag(self, kernels: int) -> None:
        """Let events happen and copies arrive so many kernels later."""
        self._library.standin_lag(kernels)

    def capture(self, *, on: bool, here: bool = True) -> None:
        """Capture a graph: whoever asks for an event, or waits, raises. If not ``here``, another thread captures it."""
        self._captures = on and here
        self._library.standin_captures(int(on))

    def waits_raise(self, *, on: bool) -> None:
        """Raise where the host would wait for the device."""
        self._library.standin_waits_raise(int(on))

    def without_float64(self, *, on: bool) -> None:
        """Refuse every tensor in float64."""
        self._library.standin_without_float64(int(on))

    def without(self, operator: str) -> None:
        """Have no kernel for an operator from now on."""
        self._library.standin_without(operator.encode())

    @property
    def waits(self) -> str:
        """For what the host has waited; nothing if it has not."""
        return str(self._library.standin_reasons().decode())

    @property
    def event_waits(self) -> int:
        """How often the host has waited for an event that had not happened."""
        return int(self._library.standin_number(1))

    @property
    def questions(self) -> int:
        """How often an event was asked whether it has happened."""
        return int(self._library.standin_number(2))

    @property
    def peak(self) -> int:
        """The most bytes in use on both devices together."""
        return int(self._library.standin_number(3))

    @property
    def launches(self) -> int:
        """How many kernels and copies were started; one for tensors that CUDA takes together, although it splits many."""
        return int(self._library.standin_number(4))
