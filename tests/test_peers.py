# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run say to each other: over real sockets, both sides in this process."""

import queue
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.hosts import pack, step_message, step_of, unpack
from ktx_jax.engine.likelihood import likelihood
from ktx_jax.engine.sampling import Draw
from ktx_jax.engine.step import next_tokens, whole_logits
from ktx_jax.errors import KtxError
from ktx_jax.model.cache import Run
from ktx_jax.peers import Follower, Leader, Peer, prepare, receive_frame, send_frame

SECONDS = 20  # that a thread may take to hear


class Pair:
    """A leader and its follower, and what they hear of a loss."""

    def __init__(self):
        server = socket.create_server(("127.0.0.1", 0))
        self.there = prepare(socket.create_connection(server.getsockname()))
        self.here = prepare(server.accept()[0])
        server.close()
        self.losses = {"leader": queue.SimpleQueue(), "follower": queue.SimpleQueue()}
        self.leader = Leader([Peer("process 1", self.here)], self.losses["leader"].put)
        self.follower = Follower(Peer("process 0", self.there), self.losses["follower"].put)

    def loss(self, side: str) -> str:
        return self.losses[side].get(timeout=SECONDS)


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    for side in (pair.leader, pair.follower):
        side.loss = None  # settled here: nothing is left for the end of the program
    for connection in (pair.here, pair.there):
        connection.close()


def test_messages_come_in_order_until_the_end(pair):
    pair.follower.wait()
    pair.leader.wait()
    sent = [bytes([n]) * n for n in range(5)]
    for message in sent:
        pair.leader.send(message[:1], message[1:])
    pair.leader.close()
    assert [pair.follower.receive() for _ in sent] == sent
    assert pair.follower.receive() is None
    assert pair.losses["leader"].empty()
    assert pair.losses["follower"].empty()


@pytest.mark.parametrize("lost", ["leader", "follower"])
def test_a_process_that_ends_without_a_word_is_noticed(pair, lost):
    other = {"leader": "follower", "follower": "leader"}[lost]
    (pair.here if lost == "leader" else pair.there).shutdown(socket.SHUT_RDWR)
    assert "is gone" in pair.loss(other)
    with pytest.raises(KtxError, match="is gone"):
        pair.follower.receive() if other == "follower" else pair.leader.send(b"x")


def test_a_follower_that_fails_says_why(pair):
    pair.follower.fail(KtxError("no such\nfile"))
    assert pair.loss("leader") == "process 1 failed: no such file"
    with pytest.raises(KtxError, match="no such file"):
        pair.leader.wait()


def test_a_leader_that_fails_says_why(pair):
    pair.leader.fail(ValueError())
    assert pair.loss("follower") == "process 0 failed: ValueError"


def test_a_follower_may_not_leave_first(pair):
    pair.follower.close()
    assert "left before the end" in pair.loss("leader")


def test_facts_are_held_against_each_other(pair):
    pair.leader.agree({"context": "64", "rules": "a", "dtype": "float32"})
    with pytest.raises(KtxError, match="differ in: context, rules;"):
        pair.follower.agree({"context": "128", "rules": "b", "dtype": "float32"})
    pair.leader.agree({"context": "64"})
    pair.follower.agree({"context": "64"})


def test_a_frame_has_a_limit(pair):
    here, there = socket.socketpair()
    with here, there:
        send_frame(here, b"M", b"x" * 100)
        with pytest.raises(OSError, match="100 bytes"):
            receive_frame(there, most=99)


@settings(deadline=None)  # machines that run tests may stand still
@given(
    shards=st.integers(1, 3), tokens=st.integers(1, 40), rows=st.integers(1, 5), pages=st.integers(1, 4),
    tail=st.sampled_from([next_tokens, whole_logits, likelihood]),
    kind=st.sampled_from(["prefill", "decode", "stream"]),
)  # fmt: skip
def test_a_step_arrives_as_it_was_sent(shards, tokens, rows, pages, tail, kind):
    rng = np.random.default_rng(0)

    def ints(*shape) -> Any:
        return rng.integers(-1, 1000, (shards, *shape), np.int32)

    def floats(*shape) -> Any:
        return rng.random((shards, *shape), np.float32)

    run = Run(ints(tokens), ints(tokens), ints(tokens), ints(rows, pages), tile=16)
    seeds: Any = rng.integers(0, 2**32, (shards, rows, 2), np.uint32)
    draw = Draw(floats(rows), floats(rows), ints(rows), floats(rows), seeds, ints(rows))
    extra = {whole_logits: None, likelihood: ints(rows)}.get(tail, draw)
    sent = step_message(run, ints(rows), extra, tail, kind)
    head, arrays = unpack(b"".join(pack(*sent)))
    assert (head, list(arrays)) == (sent[0], list(sent[1]))
    for name, value in sent[1].items():
        np.testing.assert_array_equal(arrays[name], value, strict=True)
    got = step_of(head, arrays)
    assert type(got[2]) is type(extra)
    assert got[3:] == (tail, kind)
    for name, value in step_message(*got)[1].items():
        np.testing.assert_array_equal(value, sent[1][name], strict=True)
