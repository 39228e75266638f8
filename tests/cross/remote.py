"""Stands for `compress.kernels._cpu`: every call goes to tests/cross/driver.cpp, run elsewhere.

COMPRESS_CROSS_DRIVER is the command that starts the driver, such as "qemu-aarch64 build/driver";
COMPRESS_CROSS_ISAS, where set, the instruction sets to show, such as "avx512".

A message is its length and its bytes, numbers little-endian and 8 bytes where not said otherwise.
Request: the function's name, then a list of arguments. Reply: "", the result and, for every
writable array in order, a byte (was it taken as an output?) and if so its items; or an exception's
name and its message. A value is a letter and

    n              None
    b, i           a bool, an integer        f  a float
    s              length, UTF-8             l  count, values
    a              kind (numpy's letter), item size, writable, address mod 64, number of axes: a
                   byte each; the shape; the items
"""

from __future__ import annotations

import builtins
import os
import shlex
import struct
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_U64 = struct.Struct("<Q")


class Driver:
    """One driver process, started at the first call and again after it died."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        outputs: list[np.ndarray] = []
        body = _text(name) + _value(arguments, outputs)
        with self.lock:
            reply = Reader(self.exchange(name, body))
        error = reply.text()
        if error:
            raise getattr(builtins, error)(f"{name}: {reply.text()}")
        result = reply.value()
        for array in outputs:
            if reply.take(1) == b"\0":
                continue
            got = np.frombuffer(reply.take(array.nbytes), array.dtype)
            array[...] = got.reshape(array.shape)
        return result

    def exchange(self, name: str, body: bytes) -> bytes:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(_U64.pack(len(body)) + body)
            process.stdin.flush()
            head = process.stdout.read(8)
            reply = process.stdout.read(_U64.unpack(head)[0]) if len(head) == 8 else b""
        except BrokenPipeError:
            head = b""
        if len(head) < 8:
            self.process = None
            process.stdin.close()
            process.stdout.close()
            raise RuntimeError(f"{name}: the driver died with status {process.wait()}")
        return reply


class Reader:
    """Takes a message apart."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) < size:
            raise RuntimeError("the driver's reply is too short")
        self.at += size
        return part

    def text(self) -> str:
        return self.take(_U64.unpack(self.take(8))[0]).decode()

    def value(self) -> Any:
        match self.take(1):
            case b"n":
                return None
            case b"b":
                return self.take(8) != bytes(8)
            case b"i":
                return struct.unpack("<q", self.take(8))[0]
            case b"f":
                return struct.unpack("<d", self.take(8))[0]
            case b"s":
                return self.text()
            case b"l":
                return [self.value() for _ in range(_U64.unpack(self.take(8))[0])]
            case letter:
                raise RuntimeError(f"unknown value {letter!r}")


def _text(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _value(value: Any, outputs: list[np.ndarray]) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, bool | np.bool_):
        return b"b" + struct.pack("<q", value)
    if isinstance(value, int | np.integer):
        return b"i" + struct.pack("<q", value)
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, str):
        return b"s" + _text(value)
    if isinstance(value, tuple | list):
        return b"l" + _U64.pack(len(value)) + b"".join(_value(v, outputs) for v in value)
    if not isinstance(value, np.ndarray) or not value.flags.c_contiguous:
        raise TypeError(f"cannot send {value!r}")
    writable = value.flags.writeable
    if writable:
        outputs.append(value)
    head = struct.pack(
        "<cBBBB",
        value.dtype.kind.encode(),
        value.itemsize,
        writable,
        value.ctypes.data % 64,
        value.ndim,
    )
    return b"a" + head + struct.pack(f"<{value.ndim}Q", *value.shape) + value.tobytes()


_driver = Driver(shlex.split(os.environ["COMPRESS_CROSS_DRIVER"]))


def available_isas() -> list[str]:
    """The driver's instruction sets, or those of them that the environment names."""
    shown: list[str] = _driver.call("available_isas", ())
    wanted = os.environ.get("COMPRESS_CROSS_ISAS")
    return [name for name in shown if not wanted or name in wanted.split(",")]


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    return lambda *arguments: _driver.call(name, arguments)
