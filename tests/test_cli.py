# SPDX-License-Identifier: Apache-2.0
"""The command line: its help, its errors, and what each command does."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer.main
from fake_llm import FakeLLM, fake_config
from gguf import GGMLQuantizationType as T

import ktx_jax.llm
from ktx_jax.cli import app, main
from ktx_jax.commands import inspect as inspect_command
from ktx_jax.commands import synth as synth_command
from ktx_jax.gguf.writer import TensorSource, write_gguf

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("tokenizer.json").read_text())["metadata"]
COMMANDS = (
    "demo", "generate", "chat", "inspect", "bench", "synth", "plan", "serve", "eval", "perplexity", "compare", "verify",
)  # fmt: skip


@pytest.fixture
def run(capsys):
    """Runs the program in this process: `run("generate", ...)` gives (exit code, stdout, stderr)."""

    def run_(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        code = exit_.value.code
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return run_


@pytest.fixture
def llm(monkeypatch) -> type[FakeLLM]:
    monkeypatch.setattr(ktx_jax.llm, "LLM", FakeLLM)
    monkeypatch.setattr(ktx_jax.llm, "load_config", fake_config)
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM


@pytest.fixture
def small_file(tmp_path) -> Path:
    path = tmp_path / "small.gguf"
    weights = np.zeros((2, 1, 34), np.uint8)
    tensors = [
        TensorSource("token_embd.weight", (2, 32), T.Q8_0, weights),
        TensorSource("blk.0.ffn_up_exps.weight", (2, 32), T.Q8_0, weights),
        TensorSource("blk.0.attn_norm.weight", (32,), T.F32, np.ones((32, 4), np.uint8)),
    ]
    write_gguf(path, {"general.architecture": "other", "general.name": "evil\x1b[31m [red]", **GOLDEN}, tensors)
    return path


# The program.


def test_help_does_not_wait():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ktx_jax.cli", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 2  # 0.1 s when nothing else runs
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    imported = "import sys, ktx_jax.cli; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'gguf', 'rich')))"
    assert subprocess.run([sys.executable, "-c", imported]).returncode == 0


def test_no_arguments_show_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert "Usage: ktx-jax" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_is_complete(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    definition = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    assert definition.help
    for parameter in definition.params:
        assert parameter.help, parameter.name
        assert all(name in out for name in parameter.opts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["generate"], "Missing"),
        (["generate", "x.gguf"], "--prompt"),
        (["generate", "x.gguf", "-p", "a", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x.gguf", "-p", "a", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "x.gguf", "-p", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "x.gguf", "-p", "a", "--dtype", "float16"], "'bfloat16', 'float32'"),
        (["generate", "x.gguf", "-p", "a", "--override", "experts"], "expected KEY=VALUE, found 'experts'"),
        (["chat", "x.gguf", "extra"], "extra"),
        (["bench", "x.gguf", "--decode", "1"], "--decode"),
        (["synth", "out.gguf", "--shape", "v9", "--quant", "q8_0"], "v2-lite"),
        (["demo", "--cpu-threads", "0"], "--cpu-threads"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message, run):
    code, out, err = run(*arguments)
    assert code == 2
    assert not out
    assert err.startswith("ktx-jax: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_missing_file_is_one_line(run):
    code, out, err = run("generate", "missing.gguf", "-p", "a")
    assert (code, out) == (1, "")
    assert err.startswith("ktx-jax: missing.gguf: no such file or folder")
    assert err.count("\n") == 1


def test_our_errors_give_one_line(run, llm, tmp_path):
    code, _, err = run("generate", "x.gguf", "-p", "a", "--top-p", "0")
    assert code == 1
    assert "top_p should be above 0" in err
    code, _, err = run("inspect", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert str(tmp_path) in err


def test_other_errors_too_and_debug_shows_where(run, llm, monkeypatch):
    monkeypatch.setattr(FakeLLM, "stream", lambda *_: 1 // 0)
    code, _, err = run("generate", "x.gguf", "-p", "a")
    assert (code, err) == (1, "ktx-jax: ZeroDivisionError: integer division or modulo by zero (--debug shows where)\n")
    for arguments in (["--debug", "generate", "x.gguf", "-p", "a"], ["generate", "x.gguf", "-p", "a", "--debug"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert "Traceback" in err


def test_a_reader_that_has_enough(small_file):
    for command in (["inspect", str(small_file)], ["--help"]):
        program = [sys.executable, "-m", "ktx_jax.cli", *command]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.close()
            assert running.stderr.read() == b""


def test_a_terminal_of_few_characters(small_file):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    program = [sys.executable, "-m", "ktx_jax.cli", "inspect", str(small_file)]
    done = subprocess.run(program, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


# generate


def test_generate(run, llm):
    code, out, err = run("generate", "x.gguf", "-p", "say word", "--max-tokens", "3", "--stop", "a", "--stop", "b")
    assert (code, out) == (0, "word word word \n")
    assert "3 tokens" in err
    [made] = llm.made
    assert made.options == {
        "context": None,
        "batch": 1,
        "dtype": "bfloat16",
        "implementation": None,
        "override": None,
        "rules": None,
        "cpu_threads": None,
        "repack": True,
    }
    assert (made.params.max_tokens, made.params.temperature, made.params.top_p) == (3, 0.3, 0.95)
    assert (made.params.top_k, made.params.seed, made.params.stop) == (0, 0, ("a", "b"))


def test_generate_passes_every_option(run, llm):
    options = "--temperature 0 --top-p 0.5 --top-k 7 --seed 3 --context 99 --batch 2 --dtype float32"
    overrides = "--override expert_group_count=4 --override general.name=x --override a=1.5"
    for spelling in ("--cpu-threads", "--cpu-infer", "--cpu_infer"):
        words = f"{options} --implementation xla {overrides} {spelling} 2 --no-repack".split()
        code, _, _ = run("generate", "x.gguf", "-p", "a", *words)
        assert code == 0
        made = llm.made[-1]
        assert made.options == {
            "context": 99,
            "batch": 2,
            "dtype": "float32",
            "implementation": "xla",
            "override": {"expert_group_count": 4, "general.name": "x", "a": 1.5},
            "rules": None,
            "cpu_threads": 2,
            "repack": False,
        }
        assert (made.params.temperature, made.params.top_p, made.params.top_k, made.params.seed) == (0, 0.5, 7, 3)


def test_generate_json(run, llm):
    code, out, _ = run("generate", "x.gguf", "-p", "hi", "--max-tokens", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["first_token_s"] >= 0
    assert found["decode_tok_s"] > 0
    expected = {"prompt": "hi", "text": "hi hi ", "token_ids": [0, 1], "finish_reason": "length"}
    assert expected.items() <= found.items()


def test_generate_several(run, llm):
    code, out, err = run("generate", "x.gguf", "-p", "a", "-p", "b", "--json")
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == [" a!", " b!"]
    assert "2 texts, 4 tokens" in err
    assert run("generate", "x.gguf", "-p", "a", "-p", "b")[1] == "a a!\n\nb b!\n\n"


def test_interrupted_generate(run, llm):
    before = signal.getsignal(signal.SIGINT)
    code, out, err = run("generate", "x.gguf", "-p", "interrupt")
    assert (code, out) == (130, "interrupt interrupt interrupt \n")
    assert "stopped" in err
    assert signal.getsignal(signal.SIGINT) is before


# chat


def converse(monkeypatch, *lines: str) -> None:
    waiting = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_chat_remembers(run, llm, monkeypatch):
    converse(monkeypatch, "one", "", "two", "/reset", "three", "/exit", "four")
    code, out, err = run("chat", "x.gguf", "--system", "Be brief.", "--max-tokens", "1")
    assert (code, out) == (0, "one \ntwo \nthree \n")
    assert "cut at --max-tokens" in err
    system = {"role": "system", "content": "Be brief."}
    one, two, three = ({"role": "user", "content": word} for word in ("one", "two", "three"))
    said = {"role": "assistant", "content": "one "}
    assert llm.made[0].asked == [[system, one], [system, one, said, two], [system, three]]


def test_chat_commands(run, llm, monkeypatch):
    converse(monkeypatch, "/help", "/nonsense", "^C")
    code, _, err = run("chat", "x.gguf")
    assert code == 0
    assert err.count("/reset   forget the conversation") == 2
    assert "There is no command /nonsense" in err
    assert "Ctrl-D leaves" in err


def test_interrupted_chat_goes_on(run, llm, monkeypatch):
    converse(monkeypatch, "interrupt", "again")
    code, out, err = run("chat", "x.gguf", "--max-tokens", "9")
    assert code == 0
    assert out.startswith("interrupt interrupt interrupt \nagain")
    assert "stopped" in err
    assert llm.made[0].asked[1][1] == {"role": "assistant", "content": "interrupt interrupt interrupt "}


def test_chat_beyond_the_context(run, llm, monkeypatch):
    converse(monkeypatch, "this is too long", "short")
    code, _, err = run("chat", "x.gguf", "--max-tokens", "1")
    assert code == 0
    assert "the context holds 8" in err
    assert llm.made[0].asked[-1] == [{"role": "user", "content": "short"}]


def test_chat_template(run, llm, monkeypatch, tmp_path):
    converse(monkeypatch)
    template = tmp_path / "t.jinja"
    template.write_text("{{ 1 }}")
    assert run("chat", "x.gguf", "--chat-template", str(template))[0] == 0
    assert llm.made[0].chat_template == "{{ 1 }}"
    code, _, err = run("chat", "x.gguf", "--chat-template", str(tmp_path / "none"))
    assert code == 1
    assert "cannot be read" in err


def test_chat_at_a_terminal():
    """Ctrl-C at the keyboard stops the reply and keeps the session."""
    terminal, inner = pty.openpty()
    program = str(Path(__file__).with_name("fake_llm.py"))
    # Python starts it in a session of its own, whose terminal the first one it opens becomes: no fork of this process,
    # which may run JAX's threads by now.
    opened = "import os, runpy, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", opened + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    child = subprocess.Popen(
        [*command, program, "chat", "x.gguf", "--max-tokens", "2"],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    try:
        expect(terminal, ">>> ")
        os.write(terminal, b"go endless\n")
        expect(terminal, "on on on")
        os.write(terminal, b"\x03")
        expect(terminal, "stopped")
        os.write(terminal, b"hello\n")
        expect(terminal, "hello hello")
        os.write(terminal, b"/exit\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def expect(terminal: int, text: str, seconds: float = 60) -> None:
    """Reads from `terminal` until `text` has come."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")


# inspect, bench, synth, demo


def test_inspect(run, small_file):
    code, out, _ = run("inspect", str(small_file))
    assert code == 0
    assert "\x1b" not in out
    assert f"{small_file}: {small_file.stat().st_size:,} bytes" in out
    assert "160 parameters in 3 tensors" in out
    assert [line.split() for line in out.splitlines() if "Q8_0" in line] == [["Q8_0", "2", "128", "136", "51.5%"]]


def test_inspect_json(run, small_file):
    code, out, _ = run("inspect", str(small_file), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["types"]["F32"] == {"tensors": 1, "parameters": 32, "bytes": 128}
    assert found["parts"]["embedding"]["bytes"] == found["parts"]["experts"]["bytes"] == 68
    assert found["parts"]["norms"]["bytes"] == 128
    assert found["tensor_bytes"] == 264
    assert found["cache_bytes_per_token"] is None
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert tokens == {"length": len(GOLDEN["tokenizer.ggml.tokens"]), "first": GOLDEN["tokenizer.ggml.tokens"][:8]}


def test_inspect_knows_the_cache(run, oracle):
    found = json.loads(run("inspect", str(oracle / "split"), "--json")[1])
    assert len(found["files"]) == 3
    assert found["cache_bytes_per_token"] == 2 * 3 * (256 + 32)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norms"),
        ("blk.0.attn_q_a_norm.weight", "norms"),
        ("blk.0.attn_kv_a_mqa.weight", "attention"),
        ("blk.0.attn_output.weight", "attention"),
        ("blk.1.ffn_gate_inp.weight", "router"),
        ("blk.1.exp_probs_b.bias", "router"),
        ("blk.1.ffn_gate_up_exps.weight", "experts"),
        ("blk.1.ffn_down_shexp.weight", "shared experts"),
        ("blk.0.ffn_down.weight", "dense layers"),
        ("v.patch_embd.weight", "other"),
    ],
)
def test_parts(name, part):
    assert inspect_command.part_of(name) == part


def test_bench(run, llm):
    code, out, _ = run("bench", "x.gguf", "--prompt", "20", "--decode", "4", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"load_s", "compile_s", "prefill_tok_s", "decode_tok_s", "peak_rss_bytes"} <= set(found)
    assert found["peak_rss_bytes"] > 10**7
    [made] = llm.made
    assert [len(prompt) for prompt in made.asked] == [20, 20]
    assert made.asked[0] != made.asked[1]
    assert all(0 < token < 16 for token in made.asked[0])
    assert made.params.ignore_eos
    assert "decode_tok_s" in run("bench", "x.gguf")[1]


def test_synth(run, monkeypatch, tmp_path):
    asked = []

    def synthesize(shape, out, quant, layers, seed, progress):
        asked.append((shape, quant, layers, seed))
        progress(1, 2)
        out.write_bytes(b"1234")
        return out

    monkeypatch.setattr(synth_command, "synthesize", synthesize)
    out = str(tmp_path / "out.gguf")
    code, _, err = run("synth", "--shape", "v2.5", "--layers", "2", "--quant", "q4_k_m", out)
    assert (code, asked) == (0, [("v2.5", "q4_k_m", 2, 0)])
    assert err == f"{out}: 4 bytes\n"


def test_unknown_quant(run, tmp_path):
    code, _, err = run("synth", "--shape", "v2-lite", "--quant", "q9", str(tmp_path / "x"))
    assert code == 1
    assert "q9" in err


def test_a_real_model(run):
    """All the way: reference model, engine, text."""
    model = str(Path(__file__).with_name("golden") / "lite.gguf")
    shape = ("--context", "64")
    code, out, _ = run("generate", model, "-p", "the", "--max-tokens", "4", "--json", *shape)
    assert code == 0
    assert 1 <= len(json.loads(out)["token_ids"]) <= 4
    code, out, _ = run("bench", model, "--prompt", "8", "--decode", "3", "--json", *shape)
    assert code == 0
    assert json.loads(out)["decode_tok_s"] > 0
    code, _, err = run("generate", model, "-p", "the " * 99, *shape)
    assert code == 1
    assert "64" in err


def test_a_real_chat(run, monkeypatch):
    model = str(Path(__file__).with_name("golden") / "lite.gguf")
    converse(monkeypatch, "the", "in", "long " * 99, "on")
    code, _, err = run("chat", model, "--context", "64", "--max-tokens", "4")
    assert code == 0
    assert err.count("tokens, first after") == 3
    assert "/reset makes room" in err


def test_demo(run, llm, monkeypatch):
    monkeypatch.setattr("ktx_jax.commands.demo.demo_model", lambda: Path("tiny.gguf"))
    code, out, err = run("demo", "--cpu-threads", "1")
    assert code == 0
    assert out.startswith("The `try` statement")
    assert "What does textwrap.dedent do?\ndo? do?" in out
    assert err.count("tokens/s") == 3
    assert "ktx-jax chat tiny.gguf" in err
