# SPDX-License-Identifier: Apache-2.0
"""Steps that several processes compute together: process 0 says the inputs of each, the others follow.

Every process runs the same programs in the same order, as JAX asks; only process 0 has requests and a scheduler.
"""

import hashlib
import json
import threading
from importlib.metadata import version
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ktx_jax.engine.likelihood import likelihood
from ktx_jax.engine.sampling import Draw
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.stage import Dtypes, Gathered, Kind, Tail
from ktx_jax.engine.step import Steps, next_tokens, whole_logits
from ktx_jax.errors import KtxError
from ktx_jax.model.cache import Run
from ktx_jax.model.config import Config
from ktx_jax.peers import Leader, Link
from ktx_jax.sharding.load import Implementations, Loaded
from ktx_jax.sharding.plan import Plan


def make_steps(config: Config, model: Loaded, limits: Limits, *, dtypes: Dtypes, link: Link | None) -> Steps:
    """The steps of a model; over `link` where several processes have it."""
    if link is None:
        return Steps(config, model, limits, dtypes=dtypes)
    side = LeadingSteps if isinstance(link, Leader) else FollowingSteps
    return side(config, model, limits, dtypes=dtypes, link=link)


def fingerprint(plan: Plan, limits: Limits, implementations: Implementations) -> dict[str, str]:
    """What all processes of a run must have in common, in words."""

    def digest(*values: Any) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()

    types = [(p.path, p.shape, p.ggml_type) for p in plan.parameters]
    places = [(p.path, p.stage, p.devices, p.spec, p.ops) for p in plan.parameters]
    return {
        "the version of ktx-jax": version("ktx-jax"),
        "the version of JAX": jax.__version__,
        "the model's sizes, or override": digest(plan.config),
        "the types of the file's tensors": digest(types),
        "rules": digest(plan.mesh, plan.stages, places),
        "context": str(plan.context),
        "batch": str(plan.batch),
        "the sizes of steps and cache": repr(limits),
        "dtype": plan.dtype,
        "implementation": f"{implementations.devices}, {implementations.host}",
    }


class _SharedSteps(Steps):
    def __init__(self, config: Config, model: Loaded, limits: Limits, *, dtypes: Dtypes, link: Any):
        super().__init__(config, model, limits, dtypes=dtypes)
        self._link = link

    def _compute(self, run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> Any:
        try:
            return Steps._through(self, run, at, extra, Gathered(tail), kind)
        except Exception as error:
            self._link.fail(error)
            raise


class LeadingSteps(_SharedSteps):
    """Process 0's."""

    def copy_pages(self, source: np.ndarray, target: np.ndarray) -> None:
        self._link.send(*pack({"do": "copy"}, {"source": source, "target": target}))
        super().copy_pages(source, target)

    def prepare(self, run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> Any:
        head, arrays = step_message(run, at, extra, tail, kind)
        self._link.send(*pack(head | {"do": "prepare"}, arrays))
        here = SingleDeviceSharding(jax.local_devices()[0])
        out = super().prepare(run, at, extra, Gathered(tail), kind)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=here), out)

    def close(self) -> None:
        self._link.close()

    def _through(self, run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> Any:
        self._link.send(*pack(*step_message(run, at, extra, tail, kind)))
        out = self._compute(run, at, extra, tail, kind)
        return jax.tree.map(lambda a: a.addressable_data(0)[0], out)


class FollowingSteps(_SharedSteps):
    """Those of each other process."""

    def follow(self) -> None:
        """Computes what process 0 says, until it says that this was all."""
        while (message := self._link.receive()) is not None:
            head, arrays = unpack(message)
            with _computing:
                if head["do"] == "copy":
                    Steps.copy_pages(self, **arrays)
                elif head["do"] == "prepare":
                    run, at, extra, tail, kind = step_of(head, arrays)
                    Steps.prepare(self, run, at, extra, Gathered(tail), kind)
                else:
                    self._compute(*step_of(head, arrays))

    def copy_pages(self, source: np.ndarray, target: np.ndarray) -> NoReturn:
        _refuse()

    def _through(self, run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> NoReturn:
        _refuse()


_computing = threading.Lock()
"""Of two models in one process, each followed by a thread: process 0 waits for one's step before it starts the other's,
and here their collectives must not overlap either."""


def _refuse() -> NoReturn:
    raise KtxError("this process follows process 0, which alone takes requests: call `LLM.follow()` here")


Head = dict[str, Any]
Arrays = dict[str, Any]  # NumPy arrays
_TAILS: dict[str, Tail] = {"sample": next_tokens, "logits": whole_logits, "likelihood": likelihood}


def step_message(run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> tuple[Head, Arrays]:
    """A step's inputs: arrays by name, and what else there is to say as JSON values."""
    arrays = {f"run.{name}": value for name, value in vars(run).items() if name != "tile"} | {"at": at}
    if isinstance(extra, Draw):
        arrays |= {f"draw.{name}": value for name, value in vars(extra).items()}
    elif extra is not None:
        arrays["extra"] = extra
    [name] = (name for name, known in _TAILS.items() if known == tail)
    return {"do": "step", "tile": run.tile, "kind": kind, "tail": name}, arrays


def step_of(head: Head, arrays: Arrays) -> tuple[Run, np.ndarray, Any, Tail, Kind]:
    """The inverse of `step_message`."""
    parts = tuple(
        {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        for prefix in ("run.", "draw.")
    )
    run, draw = parts
    extra = Draw(**draw) if draw else arrays.get("extra")
    return Run(**run, tile=head["tile"]), arrays["at"], extra, _TAILS[head["tail"]], head["kind"]


def pack(head: Head, arrays: Arrays) -> list[bytes]:
    """A message as bytes: a line of JSON with the arrays' names, types and shapes, and the arrays."""
    listed = [[name, value.dtype.str, value.shape] for name, value in arrays.items()]
    return [json.dumps(head | {"arrays": listed}).encode(), b"\n", *(value.tobytes() for value in arrays.values())]


def unpack(message: bytes) -> tuple[Head, Arrays]:
    """The inverse of `pack`."""
    line, _, _ = message.partition(b"\n")
    head, place, arrays = json.loads(line), len(line) + 1, {}
    for name, dtype, shape in head.pop("arrays"):
        arrays[name] = np.frombuffer(message, dtype, int(np.prod(shape)), place).reshape(shape)
        place += arrays[name].nbytes
    return head, arrays
