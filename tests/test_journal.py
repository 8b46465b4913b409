# SPDX-License-Identifier: Apache-2.0
"""Results that survive: whatever is killed wherever, a resumed run has each result once."""

import errno
import json
import os
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
        ('{"run": {"model": "a", "window": 3}}\n["a", 1]\n', False, "holds results: --resume"),
        ('{"run": {"model": "b", "window": 3}}\n', True, 'another run: model was "b", now "a"'),
        ('{"run": {"model": "a"}}\n', True, "another run: window was not given, now 3"),
        ('{"run": {"model": ["a"], "window": 3}}\n', True, 'another run: model was given, now "a"'),
        ("Once upon a time\n", True, "does not hold results"),
        ("Once upon a time\n", False, "does not hold results"),
        ('{"run": \n["a", 1]\n', True, "line 1: not a result of ktx-jax"),
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


def test_a_run_that_came_to_no_result_is_in_nobodys_way(tmp_path):
    path = tmp_path / "results.jsonl"
    for content in ("", '{"ru', '{"run": {"model": "b"}}\n', '{"run": {"model": "b"}}\n["a", 1'):
        path.write_text(content)
        with Journal(path, RUN) as journal:
            assert len(journal) == 0
            journal.add("a", 1)
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"run": RUN}, ["a", 1]]


def test_what_differs_is_told_by_its_place(tmp_path):
    path = tmp_path / "results.jsonl"
    before = {"compare": [{"dtype": "float32"}, {"dtype": "float32", "files": {"x": 1}}], "text": "t"}
    Journal(path, before).close()
    now = {"compare": [{"dtype": "float32"}, {"dtype": "bfloat16", "files": {"y": 2}}], "text": "u"}
    with pytest.raises(KtxError, match='another run: compare 2 dtype was "float32", now "bfloat16"'):
        Journal(path, now, resume=True)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """What the system lets through before it refuses is a line that was cut."""
    path = tmp_path / "results.jsonl"
    with Journal(path, RUN) as journal:
        journal.add("a", 1)
        monkeypatch.setattr(os, "write", full_after(4, os.write))
        with pytest.raises(KtxError, match=r"results.jsonl: a result cannot be written: No space left"):
            journal.add("b", 2)
        assert "b" not in journal
    monkeypatch.undo()
    with Journal(path, RUN, resume=True) as journal:
        assert list(journal) == ["a"]


def full_after(room: int, write):
    def limited(file: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= (written := write(file, data[:room]))
        return written

    return limited


def test_a_pipe_keeps_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KtxError, match="pipe is not a file that keeps results"):
        Journal(tmp_path / "pipe", RUN)


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
