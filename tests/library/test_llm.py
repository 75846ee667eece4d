"""The public library: what it imports, what it answers, and how it refuses."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import apportion
from apportion import LLM, AsyncLLM, Request, SamplingParams, TextToken
from apportion.catalog.hub import resolve_model
from apportion.engine.chat_template import ChatTemplate

DEVICES = "laptop=cpu:12MiB@0.5, desk=cpu:13MiB"
GREEDY = SamplingParams(max_tokens=20)


def test_planning_imports_no_torch():
    """Every name of the table of contents, and a plan."""
    program = f"""
import sys, apportion
assert set(sys.modules) & {{"torch", "numpy", "scipy", "pydantic"}} == set(), "import apportion"
for name in apportion.__all__:
    getattr(apportion, name)
apportion.plan("demo", devices={DEVICES!r})
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        apportion.nonsense  # noqa: B018
    assert set(apportion.__all__) <= set(dir(apportion))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, apportion.UsageError, "context=0 is no whole number from 1"),
        ({"concurrency": 1.5}, apportion.UsageError, "concurrency=1.5"),
        ({"objective": "speed"}, apportion.UsageError, "objective: unknown value 'speed'"),
        ({"ttft_limit_s": float("nan")}, apportion.UsageError, "ttft_limit_s=nan"),
        ({"device": "a=cpu:1GiB"}, TypeError, "unknown option 'device'; did you mean devices"),
        ({"devices": "a=cpu:1MiB"}, apportion.InfeasibleError, "1.0 MiB"),
    ],
)
def test_what_cannot_be_planned_is_a_typed_error(
    options: dict[str, object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        apportion.plan("demo", **({"devices": DEVICES} | options))  # pyright: ignore[reportArgumentType]


def test_a_plan_goes_to_a_file_and_back(tmp_path: Path):
    plan = apportion.plan("demo", devices=DEVICES, context=64, calibration=False)
    apportion.write_plan(plan, tmp_path / "plan.json")
    assert apportion.read_plan(str(tmp_path / "plan.json")) == plan
    longer = apportion.what_if(plan, apportion.Changes(context_tokens=128))
    assert longer.workload.max_context_tokens == 128


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", devices=DEVICES, context=64, concurrency=3) as one:
        yield one


def test_prompts_are_answered_in_their_order(llm: LLM):
    outputs = llm.generate(["ROMEO:", (814, 26), "JULIET:"], GREEDY)
    assert [one.prompt for one in outputs] == ["ROMEO:", None, "JULIET:"]
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == (814, 26)
    first = outputs[0].outputs[0]
    assert first.text == "\nO, I am not so; and, if thou art a man.\n\nROMEO:"
    assert (len(first.token_ids), first.finish_reason) == (20, "length")
    assert outputs[1].outputs[0].token_ids == first.token_ids
    assert outputs[2].outputs[0].text == llm.generate("JULIET:", GREEDY)[0].outputs[0].text


def test_samples_and_parameters_of_each_prompt(llm: LLM):
    drawing = SamplingParams(max_tokens=4, temperature=1.0, seed=5)
    one, two = llm.generate(["ROMEO:", "ROMEO:"], [GREEDY, drawing], n=2)
    assert [len(sample.token_ids) for sample in (*one.outputs, *two.outputs)] == [20, 20, 4, 4]
    assert [sample.index for sample in two.outputs] == [0, 1]
    with pytest.raises(apportion.UsageError, match="1 sampling parameters for 2 prompts"):
        llm.generate(["ROMEO:", "JULIET:"], [GREEDY])


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=0),
        SamplingParams(temperature=-1.0),
        SamplingParams(temperature=float("nan")),
        SamplingParams(top_p=0.0),
        SamplingParams(top_p=1.5),
        SamplingParams(seed=-1),
    ],
    ids=str,
)
def test_parameters_that_mean_nothing_are_refused_and_the_next_request_runs(
    llm: LLM, sampling: SamplingParams
):
    with pytest.raises(apportion.UsageError, match="asks for"):
        llm.generate("ROMEO:", sampling)
    assert len(llm.generate("ROMEO:", SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2


def test_a_prompt_that_is_too_long_or_no_token_is_refused(llm: LLM):
    with pytest.raises(apportion.UsageError, match="64"):
        llm.generate([(814,) * 64])
    with pytest.raises(apportion.UsageError, match="vocabulary"):
        llm.generate([(10**6,)])
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "n", "message"),
    [
        ([["a"]], None, 1, "sequence of whole numbers"),
        ([[1.5]], None, 1, "sequence of whole numbers"),
        ([[True]], None, 1, "has True for a token"),
        ([None], None, 1, "sequence of whole numbers"),
        (["\ud800"], None, 1, "no text that can be encoded"),
        (["a"], {"max_tokens": 2**70}, 1, "tokens; a whole number from 1 to 2"),
        (["a"], {"max_tokens": 2.5}, 1, "2.5 tokens"),
        (["a"], {"temperature": "x"}, 1, "temperature 'x'; a finite number"),
        (["a"], {"seed": "q"}, 1, "seed 'q'; a whole number"),
        (["a"], None, 0, "n=0 is no whole number from 1"),
        (["a"], None, -1, "n=-1 is no whole number from 1"),
        (["a"], None, 1.5, "n=1.5 is no whole number from 1"),
    ],
)
def test_what_is_of_another_type_is_refused_where_it_enters(
    llm: LLM, prompt: Any, sampling: dict[str, Any] | None, n: Any, message: str
):
    """And nobody else notices: the model goes on."""
    with pytest.raises(apportion.UsageError, match=message):
        llm.generate(prompt, sampling and SamplingParams(**sampling), n=n)
    assert llm.generate("ROMEO:", GREEDY)[0].outputs[0].token_ids


def test_token_ids_may_be_numpys(llm: LLM):
    ids = llm.generate("ROMEO:", GREEDY)[0].prompt_token_ids
    (given,) = llm.generate([np.array(ids)], GREEDY)
    assert given.prompt_token_ids == ids
    assert given.outputs == llm.generate([ids], GREEDY)[0].outputs


def test_threads_share_a_model(llm: LLM):
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(llm.generate("ROMEO:", GREEDY)[0].outputs[0].text))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_model_without_a_template_says_so(llm: LLM):
    with pytest.raises(apportion.ModelError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Who goes there?"}])


def test_a_plan_of_another_model_and_options_beside_a_plan_are_refused(llm: LLM):
    other = apportion.plan("llama-3.1-8b", devices="tower: rtx-4090")
    with pytest.raises(apportion.PlanError, match=r"made for .*, not for demo"):
        LLM("demo", plan=other)
    with pytest.raises(apportion.UsageError, match="for_engine plans for another engine"):
        LLM("demo", devices=DEVICES, for_engine="vllm")
    with pytest.raises(apportion.UsageError, match="leave out context"):
        LLM("demo", plan=llm.plan, context=64)


async def collected(
    llm: AsyncLLM, prompt: str | Request, sampling: SamplingParams | None = None
) -> list[TextToken]:
    return [token async for token in llm.generate(prompt, sampling)]


def test_streams_of_an_event_loop_are_what_blocking_callers_get(llm: LLM, tmp_path: Path):
    apportion.write_plan(llm.plan, tmp_path / "plan.json")

    async def use() -> None:
        served = await asyncio.to_thread(AsyncLLM, "demo", plan=tmp_path / "plan.json")
        async with served:
            romeo, juliet, own = await asyncio.gather(
                collected(served, "ROMEO:", GREEDY),
                collected(served, "JULIET:", GREEDY),
                collected(served, Request(id=7, prompt_ids=(814, 26), sampling=GREEDY)),
            )
            wanted = llm.generate(["ROMEO:", "JULIET:"], GREEDY)
            for tokens, output in zip((romeo, juliet), wanted, strict=True):
                assert "".join(token.text for token in tokens) == output.outputs[0].text
                assert tuple(token.token_id for token in tokens) == output.outputs[0].token_ids
            assert {token.request_id for token in own} == {7}
            assert [token.token_id for token in own] == [token.token_id for token in romeo]
            leaving = served.generate("ROMEO:", SamplingParams(max_tokens=50))
            assert (await anext(leaving)).text == romeo[0].text
            await leaving.aclose()
            with pytest.raises(apportion.ModelError, match="no chat template"):
                served.chat([{"role": "user", "content": "Who?"}])
        with pytest.raises(apportion.EngineError, match="stopped"):
            await collected(served, "ROMEO:", GREEDY)

    asyncio.run(use())


def test_workers_end_with_a_model_that_nobody_closes():
    program = f"""
import apportion
llm = apportion.LLM("demo", devices={DEVICES!r}, context=64)
print(llm.generate("ROMEO:", apportion.SamplingParams(max_tokens=3))[0].outputs[0].token_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("(199, 47, 12)\n", "")


def test_a_worker_that_dies_ends_what_was_asked_and_closing_is_quiet():
    with LLM("demo", devices=DEVICES, context=64) as one:
        (engine,) = one._loaded.serving.engines
        os.kill(engine.worker_pids()["desk"] or 0, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(apportion.EngineError, match="the worker of device desk died"):
                one.generate("ROMEO:", GREEDY)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role == 'system' %}\n"
    "{{ raise_exception('no system messages') }}{% endif %}\n{{ message | tojson }}{% endfor %}"
)
TALK = [{"role": "user", "content": "Who's <there>?"}, {"role": "assistant", "content": "É"}]


@pytest.mark.parametrize("where", ["config", "named", "file"])
@pytest.mark.parametrize("template", [CHATML, STRICT], ids=["chatml", "strict"])
def test_a_conversation_is_rendered_as_transformers_renders_it(template: str, where: str, tmp_path: Path):
    demo = resolve_model("demo", weights=True)
    config = json.loads((demo / "tokenizer_config.json").read_text())
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        config["chat_template"] = template if where == "config" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(demo / name, tmp_path / name)
    wanted = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(tmp_path).render(TALK) == wanted
    if template is STRICT:
        with pytest.raises(apportion.UsageError, match="refuses these messages: no system messages"):
            ChatTemplate(tmp_path).render([{"role": "system", "content": ""}])
        with pytest.raises(apportion.UsageError, match="refuses these messages"):
            ChatTemplate(tmp_path).render([{"role": object()}])
