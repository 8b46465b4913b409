# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's tasks: the scores of a plain Hugging Face run, and runs that resume."""

import json
import os
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="extra `eval`")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from eval_tasks import write_tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.loggers import EvaluationTracker  # noqa: E402

from ktx_jax import cli  # noqa: E402
from ktx_jax.errors import KtxError  # noqa: E402
from ktx_jax.evaluate.harness import HarnessLM, run_tasks, table  # noqa: E402
from ktx_jax.llm import LLM  # noqa: E402

# What the harness and the libraries under it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")
TINY = Path(__file__).resolve().parents[1] / "ktx_jax" / "data" / "tiny-q8_0.gguf"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(TINY, dtype="float32", implementation="xla", context=128, batch=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    write_tasks(folder)
    return folder


def run(llm: LLM, tasks: Path, out: Path, names=("ktx_choices", "ktx_texts", "ktx_replies"), **options):
    return run_tasks(llm, names, out, include_path=tasks, **options)


def instance(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))


def test_results_as_lm_eval_writes_them_and_resumed(llm, tasks, tmp_path, monkeypatch):
    beside: set[str] = set()
    whole = run(llm, tasks, tmp_path / "whole", advance=lambda *_: beside.update(os.listdir(tmp_path / "whole")))
    assert beside == {"answers.jsonl"}  # a kill leaves nothing else
    assert set(whole["results"]) == {"ktx_choices", "ktx_texts", "ktx_replies"}
    [results] = (tmp_path / "whole").rglob("results_*.json")
    assert json.loads(results.read_text())["results"].keys() == whole["results"].keys()
    assert len(list((tmp_path / "whole").rglob("samples_*.jsonl"))) == 3
    assert "ktx_choices" in table(whole)

    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "answers.jsonl").write_text("".join(lines[:9]) + lines[9][:11])
    with pytest.raises(KtxError, match="--resume"):
        run(llm, tasks, tmp_path / "cut")
    advanced = []
    again = run(llm, tasks, tmp_path / "cut", resume=True, advance=lambda done, total: advanced.append((done, total)))
    for name, scores in whole["results"].items():
        assert again["results"][name] == pytest.approx(scores, nan_ok=True), name
    assert all(done <= total for done, total in advanced)
    assert len((tmp_path / "cut" / "answers.jsonl").read_text().splitlines()) == len(lines)

    monkeypatch.setattr(llm._engine, "score", lambda wanted, done: wanted and pytest.fail("computed again"))
    monkeypatch.setattr(llm, "stream", lambda *a: pytest.fail("generated again"))
    assert run(llm, tasks, tmp_path / "cut", resume=True)["results"].keys() == whole["results"].keys()


def test_an_unknown_task_is_an_error(llm, tasks, tmp_path):
    with pytest.raises(KtxError, match="knows no task ktx_nothing"):
        run_tasks(llm, ["ktx_nothing"], tmp_path)
    with pytest.raises(KtxError, match="nowhere: no such folder"):
        run_tasks(llm, ["ktx_choices"], tmp_path, include_path=tmp_path / "nowhere")
    with pytest.raises(KtxError, match="knows no task ktx_nothing"):
        run(llm, tasks, tmp_path, names=["ktx_nothing"])
    run(llm, tasks, tmp_path, names=["ktx_choices"])  # the folder is still free


def test_results_that_were_not_written_are_an_error(llm, tasks, tmp_path, monkeypatch):
    """lm-eval goes on where the disk is full."""
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda self, task_name, samples: None)
    with pytest.raises(KtxError, match=r"could not write its results .* --resume"):
        run(llm, tasks, tmp_path, names=["ktx_choices"])
    monkeypatch.undo()
    run(llm, tasks, tmp_path, names=["ktx_choices"], resume=True)
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 1


def test_standard_output_is_the_results(llm, tasks, tmp_path, monkeypatch, capfd):
    """Of a metric, too, whose standard error lm-eval finds by bootstrapping, which it tells, and forks for."""
    monkeypatch.setattr("ktx_jax.commands.eval.load_llm", lambda options: llm)
    monkeypatch.setattr("os.fork", lambda: pytest.fail("this process has threads"))
    main = [
        "eval",
        str(TINY),
        "--tasks",
        " ktx_raised, ",
        "--include-path",
        str(tasks),
        "--out",
        str(tmp_path),
        "--json",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main(main)
    said = capfd.readouterr()
    assert end.value.code == 0, said.err
    assert json.loads(said.out)["ktx_raised"]["perplexity,none"] > 1
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", str(TINY), "--tasks", ","])
    assert (end.value.code, "names no task" in capfd.readouterr().err) == (2, True)


def test_replies_end_at_stop_texts_and_draws_differ(llm):
    model = HarnessLM(llm)
    greedy = {"until": ["\n", "e"], "max_gen_toks": 12}
    draws = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = [instance("generate_until", "The function returns", options) for options in (greedy, greedy, draws, draws)]
    first, same, one, other = model.generate_until(asked)
    assert first == same
    assert "e" not in first
    assert one != other
    assert HarnessLM(llm).generate_until(asked) == [first, same, one, other]
    with pytest.raises(KtxError, match="leaves none"):
        model.generate_until([instance("generate_until", "The", {"max_gen_toks": 128})])


def test_a_word_that_the_seam_cuts_is_not_certain(llm):
    """Together they are fewer tokens than the context alone."""
    model, pair = HarnessLM(llm), ("The func", "tion")
    assert len(llm.tokenizer.encode("".join(pair))) < len(llm.tokenizer.encode(pair[0]))
    [(value, greedy)] = model.loglikelihood([instance("loglikelihood", *pair)])
    assert value == pytest.approx(llm.score([pair])[0].logprob, abs=1e-4)
    assert value < -1
    assert not greedy


def test_too_long_a_context_keeps_its_end(llm):
    model = HarnessLM(llm)
    long = ("The function returns a list. " * 60).rstrip()
    [(value, _)] = model.loglikelihood([instance("loglikelihood", long, " It is")])
    ids = llm.tokenizer.encode(long + " It is")
    count = len(ids) - len(llm.tokenizer.encode(long))
    [score] = llm.score([(ids[-129:-count], ids[-count:])])
    assert value == pytest.approx(score.logprob, abs=1e-4)


def test_chat_template_does_not_double_the_beginning(llm):
    model = HarnessLM(llm)
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    ids = model.tok_encode(text)
    assert ids.count(llm.tokenizer.bos_id) == 1
    assert ids == llm.encode_chat([{"role": "user", "content": "Hello"}])
    assert model.chat_template(True) == llm.chat_template
    assert model.chat_template(False) is None


@pytest.mark.slow
def test_the_scores_of_a_plain_hugging_face_run(llm, tasks, tmp_path):
    """The file's weights in transformers' DeepSeek-V2, float32, asked by lm-eval's own Hugging Face model."""
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="extra `oracle`")
    from hugging_face import hugging_face_model
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run(llm, tasks, tmp_path / "ours")
    model, tokenizer = hugging_face_model(TINY)
    # The beginning-of-text token begins contexts; in rolling it is the prefix, and not itself predicted.
    for names, begins in ((["ktx_choices", "ktx_replies"], True), (["ktx_texts"], False)):
        theirs = simple_evaluate(
            HFLM(
                pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=1, add_bos_token=begins, device="cpu"
            ),
            tasks=names,
            task_manager=TaskManager(include_path=str(tasks)),
        )
        for name in names:
            assert figures(ours, name) == pytest.approx(figures(theirs, name), rel=1e-5)
            for mine, other in zip(ours_samples(tmp_path / "ours", name), theirs["samples"][name], strict=True):
                mine_, other_ = (flat(sample["resps"]) for sample in (mine, other))
                assert mine_ == pytest.approx(other_, abs=1e-4) if name != "ktx_replies" else mine_ == other_


def figures(results, name: str) -> dict[str, float]:
    return {key: value for key, value in results["results"][name].items() if isinstance(value, float)}


def ours_samples(out: Path, name: str) -> list[dict]:
    [file] = out.rglob(f"samples_{name}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def flat(resps) -> list:
    if isinstance(resps, list | tuple):
        return [value for part in resps for value in flat(part)]
    if resps in ("True", "False"):
        return [float(resps == "True")]
    if isinstance(resps, str):
        try:
            return [float(resps)]
        except ValueError:
            return [resps]
    return [float(resps)]
