# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax plan` and `ktx-jax rules`, and the pictures."""

import json
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from plan_golden import CONFIGS, ROOT, config_plan

from ktx_jax.aot.compile import Compilation, CompiledStep
from ktx_jax.aot.hlo import CompiledCollective
from ktx_jax.cli import main
from ktx_jax.gguf.writer import TensorSource, _aligned, _header
from ktx_jax.presets import planned_tensors, resolve
from ktx_jax.sharding.drawing import Rect
from ktx_jax.sharding.step_size import step_size
from ktx_jax.synth import _metadata

V25 = ROOT / "configs" / "deepseek-v2.5"
PRESET = ["--preset", "deepseek-v2.5"]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.fixture(scope="module")
def headers_of_142_gb(tmp_path_factory):
    """A file of V2.5's true size and header, its data a hole."""
    path, shape = tmp_path_factory.mktemp("big") / "v2.5-q4_k_m.gguf", resolve("v2.5")
    planned = planned_tensors(shape, "q4_k_m")
    header = _header(_metadata(shape, "q4_k_m"), [TensorSource(*t, lambda: ()) for t in planned],
                     [t.nbytes for t in planned])  # fmt: skip
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(_aligned(t.nbytes) for t in planned))
    return path


def test_a_plan_as_tables(capsys):
    code, out, _ = run(capsys, "plan", *PRESET, "--rules", V25 / "8gpu.yaml", "--devices", 8, "--target", "h200")
    assert code == 0
    assert "NVIDIA H200" in out
    assert "gpu:7" in out
    assert "layers.1-59.mlp.experts.down_proj" in out
    assert "the plan fits" in out


def test_a_plan_that_does_not_fit_says_so(capsys):
    code, out, _ = run(capsys, "plan", *PRESET, "--target", "rtx4090")
    assert code == 1
    assert "too little" in out
    assert "would fit: the experts of layers" in out


def test_a_plan_as_json(capsys):
    code, out, _ = run(capsys, "plan", *PRESET, "--rules", V25 / "3gpu.yaml", "--memory", "80,80,24", "--json")
    plan = json.loads(out)
    assert code == 1
    assert not plan["fit"]["ok"]
    assert list(plan["fit"]["shortfalls"]) == ["gpu:2"]
    assert plan["parameters"]["model.layers.25.self_attn.o_proj"]["stage"] == 1
    assert plan["devices"]["gpu:0"]["total"] == sum(
        plan["devices"]["gpu:0"][part] for part in ("weights", "cache", "workspace", "streamed")
    )


def test_what_a_step_takes_at_least(capsys):
    options = ["plan", *PRESET, "--rules", V25 / "8gpu-2stages.yaml", "--target", "h200"]
    _, out, _ = run(capsys, *options)
    assert "Roofline" in out
    assert "with 2 steps of 4 in flight" in out
    _, out, _ = run(capsys, *options, "--json")
    decode = json.loads(out)["roofline"]["decode"]
    assert decode["tokens"] == 8
    assert len(decode["stages"]) == 2
    for stage in decode["stages"]:
        assert stage["seconds"] == pytest.approx(
            max(stage["memory_s"], stage["compute_s"])
            + stage["collectives_s"] + stage["host_s"] + stage["transfer_s"]
        )  # fmt: skip
    assert decode["seconds"] == pytest.approx(sum(stage["seconds"] for stage in decode["stages"]))
    assert "roofline" not in json.loads(run(capsys, "plan", *PRESET, "--json")[1])


def step_of(phase, count, **values):
    """A compiled step of one stage with `count` all-reduces, as many as `8gpu.yaml` predicts for 121."""
    size = {"decode": 8, "prefill": 512}[phase] * 5120 * 2
    sums = CompiledCollective("all-reduce", 8, (tuple(range(8)),), size, count, True, "layers.3/psum")
    logits = CompiledCollective("all-gather", 8, (tuple(range(8)),), 8 * 102400 * 4, 1, True, "lm_head")
    return CompiledStep(0, phase, 20_600_000_000, (), 14_000_000, 56, (sums, logits), 9.0, **values)


def test_what_the_compiler_says_is_shown(capsys, tmp_path, monkeypatch):
    def compile_plan(made, target, *, whole):
        assert (target.name, whole) == ("NVIDIA H200", True)
        sizes = tuple(step_size(made, phase) for phase in ("decode", "prefill"))
        return Compilation(sizes, (step_of("decode", 121), step_of("prefill", 122)), 60, 18.0, 2 * 10**9)

    monkeypatch.setattr("ktx_jax.commands.plan.compile_plan", compile_plan)
    options = ["plan", *PRESET, "--rules", V25 / "8gpu.yaml", "--target", "h200", "--compile", "--whole"]
    code, out, _ = run(capsys, *options, "--html", tmp_path / "plan.html")
    assert code == 0
    assert "Compiled by XLA: 60 layers; 18 s, 2.0 GB of memory" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("decode 0 all-reduce 8 81.9 kB 121 121 embed_tokens, layers.0-59") for line in lines)
    assert any(line.startswith("prefill 0 all-reduce 8 5.2 MB 121 122 !") for line in lines)
    assert any(line.startswith("decode 0 20.6 GB 21.0 GB 14.0 MB") for line in lines)
    assert "Compiled by XLA" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    _, out, _ = run(capsys, *options, "--json")
    step = json.loads(out)["compiled"]["steps"][1]
    assert (step["phase"], step["arguments"], step["error"]) == ("prefill", 20_600_000_000, None)
    assert [(e["predicted"], e["compiled"]) for e in step["collectives"]] == [(121, 122), (1, 1)]


def test_an_error_of_the_compiler_is_a_failure(capsys, monkeypatch):
    def compile_plan(made, target, *, whole):
        step = CompiledStep(0, "decode", error="INTERNAL: ptxas exited [brackets]")
        return Compilation((step_size(made, "decode"),), (step,), 3, 1.0, 10**9)

    monkeypatch.setattr("ktx_jax.commands.plan.compile_plan", compile_plan)
    options = ["plan", *PRESET, "--rules", V25 / "8gpu.yaml", "--target", "h200", "--compile"]
    code, out, _ = run(capsys, *options)
    assert code == 1
    assert "error: stage 0 does not compile for decode: INTERNAL: ptxas exited [brackets]" in out
    code, out, _ = run(capsys, *options, "--json")
    assert code == 1
    [step] = json.loads(out)["compiled"]["steps"]
    assert step == {"phase": "decode", "stage": 0, "error": "INTERNAL: ptxas exited [brackets]"}


def test_pictures(capsys, tmp_path):
    files = tmp_path / "plan.html", tmp_path / "plan.png"
    rules = ["--rules", V25 / "cpu-experts.yaml", "--memory", 24, "--host-memory", 256]
    code, _, err = run(capsys, "plan", *PRESET, *rules, "--html", files[0], "--png", files[1])
    assert code == 0
    assert "drawn in" in err
    page = files[0].read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_picture_has_every_layer_on_its_devices(path):
    plan = config_plan(path)
    figure = plan.figure(dict.fromkeys(plan.devices, 10**10))
    ET.fromstring(figure.svg())
    titles = [shape.title for shape in figure.shapes if isinstance(shape, Rect)]
    for index, stage in enumerate(plan.stages):
        attention = [t for t in titles if ".self_attn." in t and int(t.split(".")[2]) in stage.layers]
        assert len(attention) == len(stage.layers) * len(stage.devices), index
    assert all(0 <= s.x <= figure.width and 0 <= s.y <= figure.height for s in figure.shapes if isinstance(s, Rect))


def test_auto_writes_its_rules(capsys, tmp_path):
    out = tmp_path / "auto.yaml"
    code, _, err = run(capsys, "plan", *PRESET, "--auto", out, "--memory", "80,80,24")
    assert code == 0
    assert "rules written to" in err
    code, text, _ = run(capsys, "rules", "check", out, *PRESET)
    assert code == 0
    assert "good for deepseek-v2.5" in text
    assert run(capsys, "plan", *PRESET, "--auto", out, "--memory", 24)[0] == 1  # it is there already


def test_rules_check_prints_all_problems(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("mesh: {tensor: 2}\nrules:\n  - {match: '(', op: xla}\n  - {match: heads, op: xla}\n")
    code, _, err = run(capsys, "rules", "check", bad, *PRESET)
    assert code == 1
    lines = err.splitlines()
    assert lines[0].startswith(f"{bad}:3:13: ")
    assert lines[1].startswith(f"{bad}:4:13: ")
    assert lines[2] == "ktx-jax: 2 problems in the rules"


def test_rules_convert(capsys, tmp_path):
    code, out, err = run(capsys, "rules", "convert", V25 / "ktransformers-4gpu.yaml")
    assert code == 0
    assert "converted for deepseek-v2.5" in err
    native = tmp_path / "native.yaml"
    native.write_text(out, encoding="utf-8")
    assert run(capsys, "rules", "check", native, *PRESET)[0] == 0
    code, _, err = run(capsys, "rules", "convert", native)
    assert code == 1
    assert "native dialect already" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "give a model file or --preset"),
        (["plan", "--preset", "deepseek-v2"], None),
        (["plan", "--preset", "deepseek-v3"], "did you mean"),
        (["plan", *PRESET, "--quant", "q9"], "no mix named 'q9'"),
        (["plan", *PRESET, "--target", "h20"], "no target named 'h20' (did you mean 'h200'?)"),
        (["plan", *PRESET, "--memory", "much"], "sizes in GB"),
        (["plan", *PRESET, "--memory", "80,80", "--devices", "3"], "2 sizes for 3 devices"),
        (["plan", *PRESET, "--auto", "x.yaml"], "--auto needs to know the devices"),
        (["plan", *PRESET, "--rules", V25 / "3gpu.yaml", "--devices", "2"], "the rules name gpu:2"),
        (["plan", *PRESET, "--context", "200000"], "context should be from 2"),
        (["plan", *PRESET, "--compile"], "--compile needs to know for what: give --target"),
        (["plan", *PRESET, "--target", "h200", "--whole"], "--whole says how to --compile"),
        (["rules", "check", "absent.yaml", *PRESET], "absent.yaml: cannot be read"),
    ],
)
def test_wrong_arguments_are_said(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == (0 if said is None else 1)
    assert said is None or said in err


def test_a_file_of_142_gb_is_planned_in_seconds_and_without_jax(headers_of_142_gb):
    code = (
        "import sys; from ktx_jax.cli import main\n"
        f"try: main(['plan', {str(headers_of_142_gb)!r}, '--rules', {str(V25 / '8gpu.yaml')!r}, '--target', 'h200'])\n"
        "except SystemExit as stop: sys.exit(stop.code or 3 * ('jax' in sys.modules))"
    )
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "18.8 GB" in done.stdout  # 142.6 GB as the GPU kernels' records, over 8
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which neighbours change least: 0.4 s.
    assert ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 3
