# SPDX-License-Identifier: Apache-2.0
"""Results that survive: whatever is killed wherever, a resumed run has each result once."""

import json
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.errors import KtxError
from ktx_jax.evaluate.journal import Journal

RUN = {"model": "a", "window": 3}

WORKER = """
import sys, time
from pathlib import Path
from ktx_jax.evaluate.journal import Journal
with Journal(Path(sys.argv[1]), {"model": "a", "window": 3}, resume=True) as journal:
    for i in range(400):
        if str(i) not in journal:
            journal.add(str(i), ["x" * (i % 97), i])
            time.sleep(0.0005)
"""


def test_results_are_there_again(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    with Journal(path, RUN) as journal:
        journal.add("a", [1.5, True])
        journal.add("b", "ü")
    with Journal(path, RUN, resume=True) as journal:
        assert list(journal) == ["a", "b"]
        assert "c" not in journal
        journal.add("c", None)
    with Journal(path, RUN, resume=True) as journal:
        assert {key: journal[key] for key in journal} == {"a": [1.5, True], "b": "ü", "c": None}


@settings(max_examples=30)
@given(cut=st.integers(0, 200))
def test_a_line_that_was_cut_is_dropped(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "results.jsonl"
    with Journal(path, RUN) as journal:
        for i in range(5):
            journal.add(str(i), [i, "text"])
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    with Journal(path, RUN, resume=True) as journal:
        for i in range(5):
            if str(i) not in journal:
                journal.add(str(i), [i, "text"])
    assert path.read_bytes() == whole


def test_killed_twenty_times(tmp_path):
    path, rng = tmp_path / "results.jsonl", random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(path)])
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    subprocess.run([sys.executable, "-c", WORKER, str(path)], check=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"run": RUN}
    assert lines[1:] == [[str(i), ["x" * (i % 97), i]] for i in range(400)]


@pytest.mark.parametrize(
    ("content", "resume", "message"),
    [
        ('{"run": {"model": "a", "window": 3}}\n', False, "holds results already: --resume"),
        ('{"run": {"model": "b", "window": 3}}\n', True, 'another run: model was "b", now "a"'),
        ('{"run": {"model": "a"}}\n', True, "another run: window was null, now 3"),
        ("Once upon a time\n", True, "line 1: not a result of ktx-jax"),
        ("Once upon a time", True, "does not hold results"),
        ('{"model": 1}\n', True, "does not hold results"),
        ('{"run": {"model": "a", "window": 3}}\n[1, 2]\n', True, "line 2: not a result"),
        ('{"run": {"model": "a", "window": 3}}\n[1,\n["a", 2]\n', True, "line 2: not a result"),
    ],
)
def test_another_file_is_left_alone(tmp_path, content, resume, message):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(KtxError, match=message):
        Journal(path, RUN, resume=resume)
    assert path.read_text() == content


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with Journal(path, RUN), pytest.raises(KtxError, match="another process"):
        Journal(path, RUN, resume=True)
    with pytest.raises(KtxError, match="cannot be written"):
        Journal(tmp_path, RUN)


def test_without_a_file():
    with Journal(None, RUN) as journal:
        journal.add("a", 1)
        assert journal["a"] == 1
    with pytest.raises(KtxError, match="nothing to resume"):
        Journal(None, RUN, resume=True)
