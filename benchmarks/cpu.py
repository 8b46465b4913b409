# SPDX-License-Identifier: Apache-2.0
"""ktx-jax on a CPU beside llama.cpp and kt-kernel: the same files, one run, medians. See README.md.

python benchmarks/cpu.py --models DIR --peers PYTHON
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from parts import plot
from parts.engines import KTX, KTX_MAPPED, WorkerError, find_peers
from parts.files import EXPERT_LAYER, MODELS, cost, expert_shape, warm
from parts.rows import print_table, rows

ROOT = Path(__file__).parent
SECTIONS = ("decode", "prefill", "load", "depth", "attention", "experts", "fidelity")


class Run:
    """Everything measured in one run; `results` is what the JSON file holds."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.llama, self.kt, about = find_peers(args.peers)
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": {"cpu": _cpu_name(), "system": platform.platform(), "threads": args.threads},
            "peers": about,
            "load_average": os.getloadavg()[0],
            "models": {},
            "errors": [],
        }
        if self.results["load_average"] > 0.5:
            print("this machine is busy: engines suffer differently from that, so the ratios will not be true")

    def attempt(self, engine: Any, kind: str, into: list[Any], **job: Any) -> None:
        """Appends the worker's result; a failure is told, kept, and does not end the run."""
        try:
            into.append(engine.run(kind, threads=self.args.threads, **job))
        except WorkerError as error:
            print(f"  {error}")
            self.results["errors"].append(str(error))

    def model(self, key: str) -> None:
        """Decode, prefill and load of one file, the engines in turns."""
        path = MODELS[key].make(self.args.models)
        tokens = cost(path)
        record = {"title": MODELS[key].title, **vars(tokens), "engines": {}}
        self.results["models"][key] = record
        small = self.args.quick
        prefill = "prefill" in self.args.only
        replies, decode = (1 if small else 3, 16 if small else 48) if "decode" in self.args.only else (1, 2)
        engines = [KTX, *self.llama]
        for turn in range(self.args.rounds):
            print(f"{MODELS[key].title}, round {turn + 1}", flush=True)
            for engine in engines if turn % 2 == 0 else engines[::-1]:
                warm(path)
                lengths = {"512": 1} if prefill else {"16": 1}
                if prefill and engine is KTX:  # the others take long, and vary less
                    lengths = {"512": 1 if small else 2, **({"2048": 1} if key == "lite" else {})}
                into = record["engines"].setdefault(engine.name, [])
                self.attempt(engine, "model", into, file=str(path), prefill=lengths,
                             decode=decode, replies=replies)  # fmt: skip
        if "load" in self.args.only:
            warm(path)
            self.attempt(KTX_MAPPED, "load", record["engines"].setdefault(KTX_MAPPED.name, []), file=str(path))

    def depth(self) -> None:
        """Decode behind a long cache, against decode behind none."""
        print("decode at depth")
        path = MODELS["lite"].make(self.args.models)
        warm(path)
        self.results["depth"] = {"positions": self.args.depth, "runs": []}
        self.attempt(KTX, "depth", self.results["depth"]["runs"], file=str(path), depth=self.args.depth,
                     decode=8 if self.args.quick else 24, repeats=1 if self.args.quick else 3)  # fmt: skip

    def attention(self) -> None:
        """Attention alone, with the heads of V2-Lite and V2.5: a decode step and a prefill chunk."""
        print("attention")
        self.results["attention"] = {"positions": self.args.depth, "runs": []}
        self.attempt(KTX, "attention", self.results["attention"]["runs"], depth=self.args.depth,
                     heads=[16, 128], tokens=[1, 512], repeats=1 if self.args.quick else 5)  # fmt: skip

    def experts(self) -> None:
        """One V2.5 expert layer, one engine after the other."""
        path = MODELS["v2.5"].make(self.args.models)
        self.results["experts"] = {"tokens": [1, 4, 16, 64, 512], "engines": {}}
        calls = [8, 4, 4, 2, 1] if self.args.quick else [48, 16, 12, 8, 4]
        engines = [KTX, self.kt] if self.kt else [KTX]
        print("experts", flush=True)
        for engine in engines:
            warm(path)
            into = self.results["experts"]["engines"].setdefault(engine.name, [])
            self.attempt(engine, "experts", into, file=str(path), layer=EXPERT_LAYER, shape=expert_shape(),
                         tokens=self.results["experts"]["tokens"], calls=calls)  # fmt: skip

    def fidelity(self) -> None:
        """Divergence from exact logits, on reference files with int8 activations."""
        oracle = self.args.oracle
        if not oracle.is_dir():
            print(f"fidelity is left out: no reference logits at {oracle} (--oracle)")
            return
        print("fidelity")
        self.results["fidelity"] = {}
        for path in sorted(oracle.glob("*/*.gguf")):
            logits = path.with_name("logits.npz")
            if path.stem == "f16" or not logits.exists():
                continue
            groups = {"expert_group_count": 4, "expert_group_used_count": 2} if path.parent.name == "legacy" else None
            into = self.results["fidelity"].setdefault(f"{path.parent.name}/{path.stem}", [])
            self.attempt(KTX, "fidelity", into, file=str(path), logits=str(logits), key=path.stem,
                         dtype="bfloat16", override=groups)  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def _arguments() -> argparse.Namespace:
    def chosen(names: tuple[str, ...]) -> Any:
        def parse(text: str) -> list[str]:
            picked = text.split(",")
            if wrong := set(picked) - set(names):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: should be among {', '.join(names)}")
            return picked

        return parse

    def add(name: str, default: Any, kind: Any, text: str) -> None:
        parser.add_argument(name, default=default, type=kind, help=text)

    oracle = Path(os.environ.get("KTX_ORACLE", ROOT.parent.parent / "shared" / "oracle"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add("--models", ROOT / "models", Path, "folder of the GGUF files; those not there are made (22 GB in all)")
    add("--peers", None, str, "a Python interpreter that has llama-cpp-python, kt-kernel or both")
    add("--only", list(SECTIONS), chosen(SECTIONS), f"some of {','.join(SECTIONS)}")
    add("--files", list(MODELS), chosen(tuple(MODELS)), f"for decode, prefill and load: some of {','.join(MODELS)}")
    add("--threads", len(os.sched_getaffinity(0)), int, "of every engine")
    add("--rounds", 2, int, "how often the engines take turns")
    add("--depth", 16384, int, "cached positions for depth and attention")
    add("--oracle", oracle, Path, "folder of reference files with exact logits")
    add("--out", ROOT / "results", Path, "folder of the results")
    parser.add_argument("--quick", action="store_true", help="few repeats: does everything run?")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    args.models.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if {"decode", "prefill", "load"} & set(args.only):
        for key in args.files:
            run.model(key)
    for section in ("depth", "attention", "experts", "fidelity"):
        if section in args.only:
            getattr(run, section)()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"cpu-{run.results['date'][:10]}.json"
    out.write_text(json.dumps(run.results, indent=1) + "\n")
    print(f"\nwrote {out}\n\n{run.results['machine']['cpu']}, {args.threads} threads, {run.results['date'][:10]}\n")
    table = rows(run.results)
    print_table(table)
    plot.draw(table, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
