"""The KV pool's memory on a GPU, so that another process on this host can be let into it; a `kvtransfer.device.DeviceMemory`.

    DeviceAllocation   one cudaMalloc of its own, for a handle names a whole allocation; torch gets a tensor over it, and the
                       memory lives as long as any tensor does
    handle             64 bytes of the driver's, the process and the GPU's UUID; opened by cudaIpcOpenMemHandle, once per link
    write, contents    one launch each, on streams of their own beside the engine's, waited for by event; what is written is
                       summed in the same pass (`triton_kernels.move_pieces`)

CUDA's runtime is the one that torch has loaded, called through ctypes: six functions, all documented. Nothing is unpickled. What
a write reads must be on the device by then: the runner reports layers only when the device is through with them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from common.errors import EngineFailure, StartupError, TransferBroken

_HANDLE_BYTES = 64
_HANDLE = struct.Struct(f"<4sQQ16s{_HANDLE_BYTES}s")  # magic, process, address in it, GPU, the driver's handle
_MAGIC = b"PDGM"
_LAZY_PEER_ACCESS = 1
WORD_BYTES = 8


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


class CudaRuntime:
    """The functions that torch has no public name for."""

    def __init__(self) -> None:
        """Raises StartupError where there is no such library."""
        torch.cuda.init()
        major = (torch.version.cuda or "").split(".")[0]
        for name in (f"libcudart.so.{major}", "libcudart.so"):
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise StartupError("CUDA's runtime library cannot be loaded", param="engine.device")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._library.cudaIpcOpenMemHandle.argtypes = [ctypes.POINTER(ctypes.c_void_p), _IpcHandle, ctypes.c_uint]

    def allocate(self, size_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self._check("cudaFree", ctypes.c_void_p(address))

    def handle_of(self, address: int) -> bytes:
        handle = _IpcHandle()
        self._check("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open_handle(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        opened = _IpcHandle.from_buffer_copy(handle)
        self._check("cudaIpcOpenMemHandle", ctypes.byref(address), opened, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return int(address.value or 0)

    def close_handle(self, address: int) -> None:
        self._check("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = self._library.cudaGetErrorString(code)
            self._library.cudaGetLastError()  # it is not the next caller's error
            raise EngineFailure(f"{function}: {text.decode(errors='replace')}")


class _Foreign:
    """Memory that torch did not allocate, as torch takes it. Tensors over it keep this alive, and with it the memory: `release`
    is called when the last of them is gone."""

    def __init__(self, address: int, size_bytes: int, release: Callable[[], None] | None = None) -> None:
        if release is not None:
            weakref.finalize(self, release).atexit = False  # a process that ends gives everything back
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size_bytes // WORD_BYTES,),
            "typestr": "<i8",
            "strides": None,
            "version": 3,
        }


def _words_over(address: int, size_bytes: int, device: torch.device, release: Callable[[], None] | None = None) -> torch.Tensor:
    return torch.as_tensor(_Foreign(address, size_bytes, release), device=device)


class DeviceAllocation:
    def __init__(self, size_bytes: int, device: torch.device) -> None:
        """Zeroed. Raises StartupError."""
        if size_bytes % WORD_BYTES:
            raise StartupError(f"a pool of {size_bytes} bytes is no whole number of words", param="engine.block_tokens")
        self.device = device
        self.size_bytes = size_bytes
        self._runtime = CudaRuntime()
        try:
            with torch.cuda.device(device):
                self._address = self._runtime.allocate(size_bytes)
        except EngineFailure as error:
            raise StartupError(f"no memory on the GPU for a KV pool of {size_bytes} bytes: {error.message}") from error
        self.words = _words_over(self._address, size_bytes, device, partial(self._runtime.free, self._address))
        self.words.zero_()
        self._reading = torch.cuda.Stream(device)

    def handle(self) -> bytes:
        with torch.cuda.device(self.device):
            driver = self._runtime.handle_of(self._address)
        return _HANDLE.pack(_MAGIC, os.getpid(), self._address, _gpu(self.device), driver)

    def contents(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Lane sums of each range."""
        return summed(self.words, None, [(offset, offset, size) for offset, size in ranges], self._reading)

    def open_peer(self, handle: bytes, size_bytes: int) -> PeerAllocation:
        try:
            magic, process, address, gpu, driver = _HANDLE.unpack(handle)
        except struct.error as error:
            raise TransferBroken("the handle of the pool is not one of ours") from error
        if magic != _MAGIC or gpu != _gpu(self.device):
            raise TransferBroken("the decode worker's pool is on another GPU")
        own = process == os.getpid()  # a process cannot open what it exported, and need not
        try:
            if not own:
                with torch.cuda.device(self.device):
                    address = self._runtime.open_handle(driver)
        except EngineFailure as error:
            raise TransferBroken(f"the decode worker's pool cannot be opened: {error.message}") from error
        close = (lambda: None) if own else (lambda: self._runtime.close_handle(address))
        return PeerAllocation(self, _words_over(address, size_bytes, self.device), close)


class PeerAllocation:
    """Used by one lane."""

    def __init__(self, own: DeviceAllocation, words: torch.Tensor, close: Callable[[], None]) -> None:
        self._own = own
        self._words: torch.Tensor | None = words
        self._close = close
        self._writing = torch.cuda.Stream(own.device)

    def write(self, copies: Sequence[tuple[int, int, int]]) -> list[bytes]:
        if self._words is None:
            raise TransferBroken("the decode worker's pool was let go")
        return summed(self._own.words, self._words, copies, self._writing)

    def close(self) -> None:
        if self._words is not None:
            self._words = None
            self._writing.synchronize()
            self._close()


def summed(
    source: torch.Tensor, destination: torch.Tensor | None, copies: Sequence[tuple[int, int, int]], stream: torch.cuda.Stream
) -> list[bytes]:
    """Copies (offset, offset there, bytes), if there is a destination, and gives the lane sums of each. Returns when the device
    is through with it; only this thread waits."""
    from common.engine.triton_kernels.move_pieces import move_pieces, sums_of_moves, words_of

    with torch.cuda.device(source.device), torch.cuda.stream(stream):
        sums = move_pieces(words_of(source), None if destination is None else words_of(destination), copies)
        on_host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        on_host.copy_(sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
    done.synchronize()
    return sums_of_moves(on_host.numpy(), copies)


def _gpu(device: torch.device) -> bytes:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return bytes.fromhex(uuid.removeprefix("GPU-").replace("-", ""))
