# SPDX-License-Identifier: Apache-2.0
"""Many clients at once that ask, leave and hang up, and what has to hold meanwhile; for a test and for a benchmark."""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import Server, sse, until

PATH = "/v1/completions"
_SETTLE_SECONDS = 60.0


@dataclass
class Report:
    """What came of it.

    Attributes:
      fates: how many replies were complete, left during the reply, or hung up on before it.
      wrong: complete ones that differ from the same request alone, as text.
      memory: resident bytes of the server, one after another.
      lost: pages that were not free when all was over.
    """

    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    lost: int = 0

    @property
    def grown(self) -> int:
        """Bytes by which the memory has grown from the middle of the time to its end."""
        return self.memory[-1] - self.memory[len(self.memory) // 2]


def requests(model: str, count: int, vocabulary: int, context: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of requests of random lengths, some of which begin alike; greedy and drawn, plain, edited and shaped."""
    rng, bodies = random.Random(seed), []
    for i in range(count):
        common = list(range(40, 40 + 70 * rng.randrange(3)))
        prompt = [0, *common, *(rng.randrange(4, vocabulary) for _ in range(rng.randrange(1, context // 4)))]
        body: dict[str, Any] = {"model": model, "prompt": prompt, "stream": True, "ignore_eos": True}
        body |= {"max_tokens": rng.randrange(1, context // 4), "temperature": 0.0}
        if i % 3 == 1:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 4 == 2:
            body |= {"frequency_penalty": 0.5, "logit_bias": {"5": -3.0}}
        if i % 5 == 3:
            body["logprobs"] = 2
        bodies.append(body)
    return bodies


def ask(server: Server, body: dict[str, Any], leave_after: float = float("inf")) -> str | None:
    """The reply, as JSON of its text, finish reason and log-probabilities; None if left after so many events."""
    connection = server.connect(600)
    try:
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        if leave_after < 0:
            return None
        text, reason, logprobs = "", None, []
        for number, data in enumerate(sse(connection.getresponse())):
            if number >= leave_after:
                return None
            if data != "[DONE]":
                [choice] = json.loads(data)["choices"]
                text, reason = text + choice["text"], choice["finish_reason"] or reason
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
        return json.dumps([text, reason, logprobs])
    finally:
        connection.close()


def soak(server: Server, bodies: list[dict[str, Any]], streams: int, seconds: float, every: float = 5.0) -> Report:
    """Asks each request alone, then all of them again and again over so many connections at once for so long."""
    alone = [ask(server, body) for body in bodies]
    report, lock, ends_at = Report(), threading.Lock(), time.monotonic() + seconds
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < ends_at and not failures:
                at, fate = rng.randrange(len(bodies)), rng.choices(("complete", "left", "hung up"), (6, 2, 2))[0]
                leave = {"complete": float("inf"), "left": rng.randrange(1, 12), "hung up": -1}[fate]
                reply = ask(server, bodies[at], leave)
                with lock:
                    report.fates["complete" if reply is not None else fate] += 1
                    if reply is not None and reply != alone[at]:
                        report.wrong.append(f"request {at}: {reply}, alone {alone[at]}")
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in range(streams)]
    for one in clients:
        one.start()
    while (left := ends_at - time.monotonic()) > 0 and not failures:
        report.memory.append(resident(server.process.pid))
        time.sleep(min(every, left))
    for one in clients:
        one.join()
    if failures:
        raise failures[0]
    idle = ("ktx_batch_requests", "ktx_queue_requests")
    until(lambda: sum(map(server.metric, idle)) == 0, server.log, _SETTLE_SECONDS)
    report.lost = round(server.metric("ktx_pages") - server.metric("ktx_pages_free"))
    report.memory.append(resident(server.process.pid))
    return report


def resident(process: int) -> int:
    """Bytes of a process that are in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
