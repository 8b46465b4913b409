# SPDX-License-Identifier: Apache-2.0
"""Messages between the processes of one run, over TCP: process 0 leads, and the others follow what it says.

A side channel beside JAX's collectives: a message costs a system call a process, waits for no device, can be waited for
as long as need be, and the end of a process is seen at once, since the system closes its connections.
"""

import contextlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

from ktx_jax.errors import KtxError

Kind = Literal[b"H", b"M", b"F", b"E"]
"""Of a frame: hello, message (a follower has just one: it is ready), failed (with the reason), end."""

_HEADER = struct.Struct("!cQ")
_MOST = 1 << 30  # bytes of a frame
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""A host that vanished is noticed after 30 s, whether or not something was being sent."""

OnLoss: TypeAlias = Callable[[str], object]
"""What to do, in a thread of its own, when a peer is gone."""


def prepare(connection: socket.socket) -> socket.socket:
    """A connection that sends at once and notices when the other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # systems differ
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def send_frame(connection: socket.socket, kind: Kind, *parts: bytes) -> None:
    """Raises `OSError` if the other side is gone."""
    connection.sendall(b"".join((_HEADER.pack(kind, sum(map(len, parts))), *parts)))


def receive_frame(connection: socket.socket, most: int = _MOST) -> tuple[bytes, bytes]:
    """The next frame's kind and content. Raises `OSError` where the connection ends, or it is no frame."""
    kind, size = _HEADER.unpack(_receive(connection, _HEADER.size))
    if size > most:
        raise OSError(f"a frame of {size} bytes")
    return kind, _receive(connection, size)


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise OSError("the connection was closed")
        view = view[got:]
    return bytes(data)


@dataclass
class Peer:
    """Another process, as `name` tells it from others in messages."""

    name: str
    connection: socket.socket
    ready: threading.Event = field(default_factory=threading.Event)


class _Side:
    """What both sides share: a thread for each peer that listens, and what happens when one is gone.

    Attributes:
      loss: why this side can go on no longer, or None.
    """

    def __init__(self, peers: Sequence[Peer], on_loss: OnLoss):
        self._peers, self._on_loss = peers, on_loss
        self._ending = False
        self._settled = threading.Event()
        self.loss: str | None = None
        _sides.add(self)
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), name=f"ktx-jax {peer.name}", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Tells the peers why this process cannot go on. If that is because one of them is gone, this ends here."""
        if self._ending:
            return
        # When a peer dies, the step under way may fail before its connection is seen to end.
        self._settled.wait(1.0)
        if self.loss is None:
            self.loss = f"this process failed: {error}"
        self._part(b"F", " ".join(str(error).split()).encode() or type(error).__name__.encode())

    def close(self) -> None:
        """Tells the peers that this was all."""
        if not self._ending:
            self._part(b"E")

    def _part(self, kind: Kind, *parts: bytes) -> None:
        self._ending = True
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it may be gone already
                send_frame(peer.connection, kind, *parts)
                peer.connection.shutdown(socket.SHUT_WR)

    def _listen(self, peer: Peer) -> None:
        try:
            while True:
                kind, content = receive_frame(peer.connection)
                if kind == b"E":
                    return self._hear_end(peer)
                if kind == b"F":
                    return self._lose(f"{peer.name} failed: {content.decode(errors='replace')}")
                self._hear(peer, content)
        except OSError as error:
            self._lose(f"{peer.name} is gone ({error}): its process ended, or its host cannot be reached")

    def _lose(self, reason: str) -> None:
        if self._ending or self.loss is not None:
            return
        self.loss = reason
        self._settled.set()
        self._hear_loss()
        self._on_loss(reason)

    def _check(self) -> None:
        if self.loss is not None:
            raise KtxError(self.loss)

    def _hear(self, peer: Peer, content: bytes) -> None:
        raise NotImplementedError

    def _hear_end(self, peer: Peer) -> None:
        raise NotImplementedError

    def _hear_loss(self) -> None:
        raise NotImplementedError


class Leader(_Side):
    """Process 0's side."""

    def send(self, *parts: bytes) -> None:
        """Tells all others. Raises `KtxError` if one is gone."""
        self._check()
        try:
            for peer in self._peers:
                send_frame(peer.connection, b"M", *parts)
        except OSError as error:
            self._settled.wait(1.0)
            self._check()
            raise KtxError(f"a process of this run cannot be reached: {error}") from error

    def agree(self, facts: Mapping[str, str]) -> None:
        """Tells the facts on which all must agree; see `Follower.agree`."""
        self.send(json.dumps(dict(facts)).encode())

    def wait(self) -> None:
        """Waits until all others are ready. Raises `KtxError` if one is gone."""
        for peer in self._peers:
            peer.ready.wait()
        self._check()

    def _hear(self, peer: Peer, content: bytes) -> None:
        peer.ready.set()

    def _hear_end(self, peer: Peer) -> None:
        self._lose(f"{peer.name} left before the end of the run")

    def _hear_loss(self) -> None:
        for peer in self._peers:
            peer.ready.set()


class Follower(_Side):
    """The side of each other process.

    Args:
      leader: process 0.
    """

    def __init__(self, leader: Peer, on_loss: OnLoss):
        self._leader = leader
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        super().__init__([leader], on_loss)

    def receive(self) -> bytes | None:
        """The next message; None when there will be no more. Raises `KtxError` if process 0 is gone."""
        message = self._messages.get()
        self._check()
        return message

    def agree(self, facts: Mapping[str, str]) -> None:
        """Holds this process's facts against process 0's.

        Raises:
          KtxError: they differ; it names them.
        """
        message = self.receive()
        theirs = json.loads(message) if message is not None else {}
        if different := [name for name in facts if theirs.get(name) != facts[name]]:
            raise KtxError(
                f"this process and {self._leader.name} differ in: {', '.join(different)}; "
                "all processes of a run need the same model, rules and options"
            )

    def wait(self) -> None:
        """Tells process 0 that this one is ready."""
        self._check()
        with contextlib.suppress(OSError):  # gone: the next message tells
            send_frame(self._leader.connection, b"M")

    def _hear(self, peer: Peer, content: bytes) -> None:
        self._messages.put(content)

    def _hear_end(self, peer: Peer) -> None:
        self._ending = True
        self._messages.put(None)

    def _hear_loss(self) -> None:
        self._messages.put(None)


Link: TypeAlias = Leader | Follower

_sides: "weakref.WeakSet[_Side]" = weakref.WeakSet()


def leave(reason: str) -> NoReturn:
    """Ends this process with exit code 1, whatever it is doing: a step may wait for a lost peer forever, inside XLA."""
    os.write(2, f"ktx-jax: {reason}\n".encode())
    _end_now()


def part_at_exit() -> None:
    """For the end of the program: tells the peers that this was all; ends it at once if not all went well.

    JAX's own farewell would wait for processes that may not come, and abort.
    """
    sides = list(_sides)
    for side in sides:
        side.close()
    if any(side.loss is not None for side in sides):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        _end_now()


def keep_terminal() -> None:
    """Remembers how the terminal is set, so that `leave` sets it back: input() may be waiting when a peer is lost."""
    if os.isatty(0):
        import termios

        _terminal[:] = termios.tcgetattr(0)


_terminal: list[Any] = []


def _end_now() -> NoReturn:
    if _terminal:
        import termios

        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(0, termios.TCSANOW, _terminal)
    os._exit(1)
