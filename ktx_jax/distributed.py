# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: `initialize` joins them, and a model then spreads over the devices of all.

See docs/multi-host.md.
"""

import atexit
import hmac
import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ktx_jax.errors import KtxError
from ktx_jax.peers import (
    Follower,
    Leader,
    Link,
    OnLoss,
    Peer,
    keep_terminal,
    leave,
    part_at_exit,
    prepare,
    receive_frame,
    send_frame,
)

_JOIN_SECONDS = 300  # for all processes to start
_MEET_SECONDS = 60  # for them to connect once they have
_HEARTBEAT_SECONDS = 50  # after which JAX takes a process that stands still for lost
_FAREWELL_SECONDS = 30
_CARD_BYTES = 2048
_LOOPBACK = ("localhost", "127.", "::1", "[::1]")

_coordinator: str | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = _HEARTBEAT_SECONDS,
) -> None:
    """Joins the processes of a run; to be called in each, before anything else uses JAX.

    Args:
      coordinator: host and port of process 0, where all others reach it. None, with the other two, under Slurm, Open
        MPI or Kubernetes: JAX then finds all three.
      num_processes: how many there are.
      process_id: this one's number, from 0. Process 0 leads.
      heartbeat_seconds: a process that has stood still this long is lost. One that ended is noticed at once.

    Raises:
      KtxError: JAX has been used already, an argument does not suit the others, or the processes did not come together.
    """
    global _coordinator
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise KtxError("give all three of coordinator, num_processes and process_id, or none under a launcher")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise KtxError(f"process_id should be from 0 to {num_processes - 1}; found {process_id}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise KtxError(f"coordinator should be HOST:PORT; found {coordinator!r}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            coordinator_bind_address=coordinator if _is_loopback(coordinator) else None,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_FAREWELL_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise KtxError(f"the processes of the run did not come together: {error}") from error
    _coordinator = coordinator


def leads() -> bool:
    """Whether this is process 0, or the only one."""
    return jax.process_index() == 0


@contextmanager
def meeting(on_loss: OnLoss = leave) -> Iterator[Link | None]:
    """Connects the processes of a run while a model is loaded; None for a process alone.

    An error inside is told to the others; so is, later, all that `on_loss` hears of.

    Raises:
      KtxError: they do not come together.
    """
    if jax.process_count() == 1:
        yield None
        return
    link = _lead(on_loss) if leads() else _follow(on_loss)
    keep_terminal()
    atexit.register(part_at_exit)
    try:
        yield link
        link.wait()
    except BaseException as error:
        link.fail(error)
        raise


def _lead(on_loss: OnLoss) -> Leader:
    hosts = _own_hosts()
    with _listener(hosts) as server:
        token = secrets.token_hex(16)
        _broadcast({"hosts": hosts, "port": server.getsockname()[1], "token": token})
        waiting, peers, deadline = set(range(1, jax.process_count())), [], time.monotonic() + _MEET_SECONDS
        while waiting:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, address = server.accept()
            except TimeoutError:
                raise KtxError(
                    f"{_names(waiting)} did not connect to port {server.getsockname()[1]} of {' or '.join(hosts)} "
                    f"within {_MEET_SECONDS} s: does a firewall stand between the hosts?"
                ) from None
            hello = _greeted(connection, token)
            if hello is None or hello["process"] not in waiting:
                connection.close()  # a stranger
                continue
            waiting.remove(hello["process"])
            peers.append(Peer(f"process {hello['process']} on {address[0]}", prepare(connection)))
    return Leader(peers, on_loss)


def _follow(on_loss: OnLoss) -> Follower:
    card = _broadcast({})
    failures = []
    for host in card["hosts"]:
        try:
            connection = socket.create_connection((host, card["port"]), timeout=10)
            send_frame(connection, b"H", json.dumps({"process": jax.process_index(), "token": card["token"]}).encode())
            return Follower(Peer(f"process 0 on {host}", prepare(connection)), on_loss)
        except OSError as error:
            failures.append(f"{host}: {error}")
    raise KtxError(f"cannot reach port {card['port']} of process 0: {'; '.join(failures)}")


def _greeted(connection: socket.socket, token: str) -> dict[str, Any] | None:
    """What a process of this run says first; None if it is no such process."""
    connection.settimeout(10)
    try:
        kind, content = receive_frame(connection, _CARD_BYTES)
        hello = json.loads(content)
        return hello if kind == b"H" and hmac.compare_digest(str(hello["token"]), token) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _broadcast(card: dict[str, Any]) -> dict[str, Any]:
    """Process 0's card, through the collectives of the devices."""
    from jax.experimental import multihost_utils

    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"process {index} has {count}" for index, count in sorted(counts.items()))
        raise KtxError(f"each process of a run needs the same number of devices: {numbers}")
    text = json.dumps(card).encode()
    room = np.zeros(_CARD_BYTES, np.uint8)
    room[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0"))


def _listener(hosts: list[str]) -> socket.socket:
    if all(map(_is_loopback, hosts)):
        return socket.create_server((hosts[0].strip("[]"), 0), family=_family(hosts[0]))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _own_hosts() -> list[str]:
    """Under which names other processes may reach this one."""
    if _coordinator is not None:
        return [_coordinator.rpartition(":")[0].strip("[]")]
    names = list(dict.fromkeys((socket.gethostname(), socket.getfqdn())))
    try:
        entries = socket.getaddrinfo(names[0], None, type=socket.SOCK_STREAM)
    except OSError:  # a name that only other hosts may know
        return names
    return names + sorted({str(address[0]) for *_, address in entries} - set(names))


def _is_loopback(address: str | None) -> bool:
    return address is not None and address.startswith(_LOOPBACK)


def _names(processes: set[int]) -> str:
    numbers = ", ".join(map(str, sorted(processes)))
    return f"process{'es' if len(processes) > 1 else ''} {numbers}"
