# SPDX-License-Identifier: Apache-2.0
"""The `ktx-jax` command line. What the commands do is in `ktx_jax.commands`, imported when one runs."""

import io
import os
import sys
import traceback
from typing import Any

import typer

from ktx_jax.cli import ask, look, measure
from ktx_jax.cli.options import Debug, Tracebacks, as_command
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


@app.callback()
def _main(debug: Debug = False) -> None:
    pass


for _function in (
    ask.demo, ask.generate, ask.chat, look.inspect, measure.bench, look.synth, look.plan, ask.serve, measure.eval_,
    measure.perplexity, measure.compare, measure.verify,
):  # fmt: skip
    app.command(_function.__name__.strip("_"))(as_command(_function))

_rules = typer.Typer(help="Check and convert rule files.", rich_markup_mode=None)
_rules.command("check")(as_command(look.rules_check))
_rules.command("convert")(as_command(look.rules_convert))
app.add_typer(_rules, name="rules")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program: 0 is success, 1 an error, 2 wrong arguments, 130 Ctrl-C. An error is one line on stderr."""
    Tracebacks.shown = False
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
    if Tracebacks.shown:
        traceback.print_exc()
    one_line = " ".join(message.split())
    print(f"ktx-jax: {one_line}", file=sys.stderr)
    sys.exit(code)
