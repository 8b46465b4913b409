# SPDX-License-Identifier: Apache-2.0
"""The `ktx-jax` command line. What the commands do is in `ktx_jax.commands`, imported when one runs."""

import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ktx_jax.cuda_plugin import leave_out_cuda
from ktx_jax.errors import KtxError

app = typer.Typer(
    name="ktx-jax",
    help="Run DeepSeek-V2, V2.5, Coder-V2 and V2-Lite from GGUF files, in JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# click's class of usage errors: typer brings its own copy of click in some versions, and exports only this subclass.
_UsageError: Any = typer.BadParameter.__mro__[1]
_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


Model = Annotated[Path, typer.Argument(help="A GGUF file, any part of a split one, or a directory with one model.")]
OptionalModel = Annotated[Path | None, typer.Argument(help="A GGUF file, any part of a split one, or a directory.")]
Preset = Annotated[str | None, typer.Option(help="A published model in place of a file: deepseek-v2.5, -v2, -v2-lite.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug, is_eager=True, expose_value=False)
]
Context = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of prompt and reply together. [default: 4096 or the model's]")
]
Batch = Annotated[int, typer.Option(min=1, help="Most texts that run at once.")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of activations and cache.")]
Implementation = Annotated[
    Literal["xla", "pallas", "ffi"] | None,
    typer.Option(help="Of the heavy operations: xla is exact, ffi fast on CPUs. [default: the fast one that runs]"),
]
Override = Annotated[
    list[str], typer.Option(metavar="KEY=VALUE", help="Metadata to lay over the file's, e.g. expert_group_count=4.")
]
RunRules = Annotated[
    str | None,
    typer.Option("--rules", metavar="FILE|auto", help="What lies on which device, and how it is cut. [default: one]"),
]
CpuThreads = Annotated[
    int | None,
    typer.Option("--cpu-threads", "--cpu-infer", "--cpu_infer", min=1, help="CPU threads. [default: all]"),
]
NoRepack = Annotated[
    bool, typer.Option("--no-repack", help="CPU kernels read the file as it is: starts at once, computes more slowly.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(max=1.0, help="Draw among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among this many likeliest tokens; 0 for all.")]
Seed = Annotated[int, typer.Option(min=0, help="Makes the draw repeatable.")]
Stop = Annotated[list[str], typer.Option(help="A text that ends the reply; may be given several times.")]
ChatTemplate = Annotated[Path | None, typer.Option(help="A Jinja file, in place of the model's own template.")]
TextFile = Annotated[Path, typer.Argument(help="A text file, UTF-8.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Kept = Annotated[Path | None, typer.Option(help="A file that keeps results as they come, for --resume.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run that was stopped left off.")]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT|auto", help="Of several processes: where process 0 is; auto under a launcher."),
]
NumProcesses = Annotated[int | None, typer.Option(min=1, help="How many processes there are.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="This process's number; process 0 takes the requests.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _main(debug: Debug = False) -> None:
    pass


@app.command()
def demo(cpu_threads: CpuThreads = None, debug: Debug = False) -> int:
    """See the embedded model complete texts and answer."""
    from ktx_jax.commands.demo import demo

    return demo(cpu_threads)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A text; several run together.")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.3,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006  typer's way to say an option that may be absent
    context: Context = None,
    batch: Batch = 1,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Complete a text, printed as it comes."""
    from ktx_jax.commands.generate import generate

    processes = _processes(coordinator, num_processes, process_id)
    options = _model_options(
        model, context, batch, dtype, implementation, override, rules, cpu_threads, not no_repack, processes=processes
    )
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return generate(options, prompt, {**sampling, "seed": seed, "stop": stop}, as_json)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message, said first.")] = None,
    chat_template: ChatTemplate = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.3,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006
    context: Context = None,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    debug: Debug = False,
) -> int:
    """Talk with a model.

    It remembers the conversation. /help lists the commands; Ctrl-C stops a reply.
    """
    from ktx_jax.commands.chat import chat

    processes = _processes(coordinator, num_processes, process_id)
    options = _model_options(
        model, context, 1, dtype, implementation, override, rules, cpu_threads, not no_repack, chat_template, processes
    )
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return chat(options, system, {**sampling, "seed": seed, "stop": stop})


@app.command()
def inspect(model: Model, as_json: AsJson = False, debug: Debug = False) -> int:
    """Show a file's metadata, types and bytes by part.

    Reads headers only.
    """
    from ktx_jax.commands.inspect import inspect

    return inspect(model, as_json)


@app.command()
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    context: Context = None,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure loading, compilation, prefill and decode."""
    from ktx_jax.commands.bench import bench

    processes = _processes(coordinator, num_processes, process_id)
    options = _model_options(
        model, context, 1, dtype, implementation, override, rules, cpu_threads, not no_repack, processes=processes
    )
    return bench(options, prompt, decode, as_json)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    shape: Annotated[Literal["v2-lite", "v2.5", "v2"], typer.Option(help="Whose shapes.")],
    quant: Annotated[str, typer.Option(help="q4_k_m, q8_0, ...: the mix of types, as in files that people download.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first layers. [default: all]")] = None,
    seed: Seed = 0,
    debug: Debug = False,
) -> int:
    """Write a file of true shapes with random weights.

    For sizing, speed and sharding work without a download; its text is noise.
    """
    from ktx_jax.commands.synth import synth

    return synth(shape, layers, quant, out, seed)


@app.command()
def plan(
    model: OptionalModel = None,
    preset: Preset = None,
    quant: Annotated[str, typer.Option(help="With --preset: the mix of types, q4_k_m, q8_0, ...")] = "q4_k_m",
    rules: Annotated[Path | None, typer.Option(help="A rule file, in either dialect. [default: one device]")] = None,
    auto: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Choose rules for the devices, and write them to this file.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many. [default: those that the rules name]")] = None,
    target: Annotated[
        str | None, typer.Option(help="Their kind: h200, h100, a100-80g, rtx4090, cpu, or a YAML file.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="GB,...", help="Usable memory of each, in place of the target's.")
    ] = None,
    host_memory: Annotated[float | None, typer.Option(min=0, metavar="GB", help="Usable memory of the host.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and reply together.")] = 4096,
    batch: Batch = 8,
    dtype: Dtype = "bfloat16",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile its steps for the target, which need not be here (extra `aot`).")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --compile: every layer, not one of each kind. Takes minutes.")
    ] = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw the plan in an HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw it as PNG (extra `plot`).")] = None,
    debug: Debug = False,
) -> int:
    """Show what goes where under a rule file, and whether it fits.

    The devices need not be here, and of the model only headers are read. Exit code 1: it does not fit, or compile.
    """
    from ktx_jax.commands.plan import PlanOptions, plan

    options = PlanOptions(
        model, preset, quant, rules, auto, devices, target, memory, host_memory, context, batch, dtype,
        compile_, whole, as_json, html, png,
    )  # fmt: skip
    return plan(options)


@app.command()
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="KTX_JAX_API_KEY", help="What clients have to show.", show_envvar=True)
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Serve a network without a key.")] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model. [default: the file's name]")] = None,
    cors_origin: Annotated[
        list[str], typer.Option(metavar="ORIGIN", help="A web page's origin that may ask; * for all.")
    ] = [],  # noqa: B006
    tls_cert: Annotated[Path | None, typer.Option(help="A PEM file: serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, a PEM file.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running replies have at the end.")] = 30.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Most replies that wait to run.")] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="Most open connections.")] = 512,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 8 * 2**20,
    log_prompts: Annotated[bool, typer.Option(help="Write prompts and replies to the log.")] = False,
    chat_template: ChatTemplate = None,
    context: Context = None,
    batch: Batch = 8,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    debug: Debug = False,
) -> int:
    """Serve a model over OpenAI's API and Ollama's, with a chat page (extra `serve`).

    Answers at once; until the model is loaded, with 503. Ctrl-C or SIGTERM lets running replies end.
    """
    from ktx_jax.commands.serve import serve

    options = _model_options(
        model, context, batch, dtype, implementation, override, rules, cpu_threads, not no_repack, chat_template
    )
    settings = {
        "host": host, "port": port, "api_key": api_key, "open": open_, "cors_origins": tuple(cors_origin),
        "tls_cert": tls_cert, "tls_key": tls_key, "timeout": timeout, "grace": grace,
        "max_connections": max_connections, "max_body": max_body, "log_prompts": log_prompts,
    }  # fmt: skip
    return serve(options, name, max_queue, settings)


@app.command("eval")
def eval_(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, groups or YAML files, between commas.")],
    include_path: Annotated[Path | None, typer.Option(help="A folder of your own tasks (YAML).")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. [default: the task's]")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Only so many questions of a task, or below 1 a share.")
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for results, as lm-eval writes them.")] = Path("results"),
    resume: Resume = False,
    context: Context = None,
    batch: Batch = 8,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Run tasks of lm-evaluation-harness (extra `eval`).

    Answers are kept as they come: a run that was stopped goes on with --resume.
    """
    from ktx_jax.commands.eval import EvalOptions, eval_

    options = _model_options(model, context, batch, dtype, implementation, override, rules, cpu_threads, not no_repack)
    wanted = EvalOptions(tasks.split(","), include_path, num_fewshot, limit, apply_chat_template, out, resume, as_json)
    return eval_(options, wanted)


@app.command()
def perplexity(
    model: Model,
    file: TextFile,
    window: Window = 512,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Slide windows by so many tokens, and score every token. [default: second halves]"),
    ] = None,
    out: Kept = None,
    resume: Resume = False,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure how surprised a model is by a text.

    By default the figure that llama.cpp gives: windows side by side, their second halves scored.
    """
    from ktx_jax.commands.perplexity import perplexity

    options = _model_options(model, window, 1, dtype, implementation, override, rules, cpu_threads, not no_repack)
    return perplexity(options, file, window, stride, out, resume, as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The model to measure from.")],
    b: Annotated[Path, typer.Argument(help="The model to measure; may be the same file.")],
    file: TextFile,
    window: Window = 512,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    b_dtype: Annotated[Literal["bfloat16", "float32"] | None, typer.Option(help="Of B. [default: A's]")] = None,
    b_implementation: Annotated[
        Literal["xla", "pallas", "ffi"] | None, typer.Option(help="Of B. [default: A's]")
    ] = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    out: Kept = None,
    resume: Resume = False,
    plot: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw it (extra `plot`): .png, .svg, ....")] = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure what a quantization or an implementation costs.

    KL from A's to B's next-token distributions over a text, how often both find the same token likeliest, and both
    perplexities. Both models are in memory.
    """
    from ktx_jax.commands.compare import compare

    rest = (override, rules, cpu_threads, not no_repack)
    first = _model_options(a, window, 1, dtype, implementation, *rest)
    second = _model_options(b, window, 1, b_dtype or dtype, b_implementation or implementation, *rest)
    return compare(first, second, file, window, out, resume, plot, as_json)


@app.command()
def verify(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="A text for the perplexity; wikitext-2's test part has published figures.")
    ] = None,
    override: Override = [],  # noqa: B006
    rules: RunRules = None,
    cpu_threads: CpuThreads = None,
    no_repack: NoRepack = False,
    debug: Debug = False,
) -> int:
    """Check that a file is a published model, computed right.

    Its shape against DeepSeek-V2-Lite's, V2's and V2.5's, its perplexity against published figures, and the fast path
    against the exact one. Exit code 1: something differs.
    """
    from ktx_jax.commands.verify import verify

    return verify(_model_options(model, None, 1, "bfloat16", None, override, rules, cpu_threads, not no_repack), text)


rules_app = typer.Typer(help="Check and convert rule files.", rich_markup_mode=None)
app.add_typer(rules_app, name="rules")
RuleFile = Annotated[Path, typer.Argument(help="A rule file.")]


@rules_app.command("check")
def rules_check(
    file: RuleFile,
    model: OptionalModel = None,
    preset: Preset = None,
    quant: Annotated[str, typer.Option(help="With --preset: the mix of types.")] = "q4_k_m",
    debug: Debug = False,
) -> int:
    """Say all that is wrong with a rule file for a model."""
    from ktx_jax.commands.rules import check

    return check(file, model, preset, quant)


@rules_app.command("convert")
def rules_convert(file: RuleFile, model: OptionalModel = None, preset: Preset = None, debug: Debug = False) -> int:
    """Print a ktransformers rule file in the native dialect."""
    from ktx_jax.commands.rules import convert

    return convert(file, model, preset)


def _model_options(
    model: Path,
    context: int | None,
    batch: int,
    dtype: str,
    implementation: str | None,
    override: list[str],
    rules: str | None,
    cpu_threads: int | None,
    repack: bool,
    chat_template: Path | None = None,
    processes: Any = None,
) -> Any:
    from ktx_jax.commands.common import ModelOptions

    overrides = dict(map(_override, override))
    return ModelOptions(
        model, context, batch, dtype, implementation, overrides, rules, cpu_threads, repack, chat_template, processes
    )  # fmt: skip


def _processes(coordinator: str | None, count: int | None, index: int | None) -> Any:
    from ktx_jax.commands.common import Processes

    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or (coordinator == "auto") != (count is None) or (count is None) != (index is None):
        raise typer.BadParameter(
            "give HOST:PORT with --num-processes and --process-id, or auto alone", param_hint="--coordinator"
        )
    return Processes(coordinator, count, index)


def _override(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON if it is that, else as text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"expected KEY=VALUE, found {text!r}", param_hint="--override")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main(arguments: list[str] | None = None) -> None:
    """Runs the program: 0 is success, 1 an error, 2 wrong arguments, 130 Ctrl-C. An error is one line on stderr."""
    global _debug
    _debug = False
    leave_out_cuda()
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few characters still gets the others
    try:
        code = app(args=arguments or ["--help"], prog_name="ktx-jax", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "ktx-jax"
        _fail(2, f"{error.format_message()} ({command} --help)")
    except KtxError as error:
        _fail(1, str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail(130, "stopped")
    except BrokenPipeError:  # whoever read the output has enough; leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # ours or a library's bug: still one line, unless asked
        _fail(1, f"{type(error).__name__}: {error} (--debug shows where)")
    else:
        sys.exit(code or 0)


def _fail(code: int, message: str) -> None:
    if _debug:
        traceback.print_exc()
    one_line = " ".join(message.split())
    print(f"ktx-jax: {one_line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
