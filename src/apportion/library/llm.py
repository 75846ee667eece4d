"""Models for programs: planned, loaded into worker processes, and asked from plain code or an event loop."""

import atexit
import contextlib
import reprlib
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import index
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Self, Unpack

from apportion.asked.plan import plan_from_options
from apportion.asked.runnable import check_engine, check_preempt, check_runs_here, pipelines
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.async_engine import MAX_OPEN, AsyncEngine
from apportion.engine.chat_template import ChatTemplate, Message
from apportion.engine.engine import Engine
from apportion.engine.launcher import preload
from apportion.engine.pipelines import served
from apportion.engine.text import Text, TextStream
from apportion.library.plans import PlanOptions, check_count, plan_choices
from apportion.planner.plan_file import read_planned
from apportion.types.errors import PlanError, UsageError
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.request import FIRST_OWN_ID, FinishReason, Request, SamplingParams, TokenEvent
from apportion.types.step_costs import PreemptMode

Prompt = str | Sequence[int]
"""Text, or the ids of its tokens."""
GivenPlan = Plan | ReplicatedPlan | str | PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One sample of what follows a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cached_tokens: int
    """Of the prompt, that came from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What follows a prompt, `n` times over; `prompt` is None where its tokens were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


class TextToken(NamedTuple):
    """A token as it is drawn. `text` is what it adds: "" while a character waits for the rest of its bytes."""

    request_id: int
    sample: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    cached_tokens: int
    logits: bytes | None


class LLM:
    """A model divided among devices; its workers run until `close`, or the end of a `with` block.

    `plan` is one that `apportion.plan` made or a file of one; without it the options say what to plan for.
    Raises UsageError, InfeasibleError where the devices cannot hold it, EngineError where a worker fails.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        plan: GivenPlan | None = None,
        preempt: PreemptMode = "auto",
        max_open: int = MAX_OPEN,
        **options: Unpack[PlanOptions],
    ) -> None:
        self._loaded = _Loaded(model, plan, preempt, max_open, options)
        self.plan = self._loaded.plan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. What other threads are still waiting for ends with an EngineError."""
        self._loaded.close()

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[RequestOutput]:
        """What follows each prompt, in their order; all run together as far as the plan has places."""
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        params = _one_each(sampling, len(given))
        requests = [self._loaded.request(one, own, n, 0) for one, own in zip(given, params, strict=True)]
        return self._run([one if isinstance(one, str) else None for one in given], requests)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
    ) -> RequestOutput:
        """The answer to a conversation of {"role": …, "content": …}, by the checkpoint's own chat template. Raises
        ModelError where it has none."""
        request = self._loaded.chat_request(messages, sampling, n, 0)
        return self._run([None], [request])[0]

    def _run(self, prompts: Sequence[str | None], requests: Sequence[Request]) -> list[RequestOutput]:
        drawn: dict[int, list[list[TokenEvent]]] = {one.id: [[] for _ in range(one.n)] for one in requests}
        for event in self._loaded.serving.stream(requests):
            drawn[event.request_id][event.sample].append(event)
        return [
            RequestOutput(
                prompt=prompt,
                prompt_token_ids=one.prompt_ids,
                outputs=tuple(self._loaded.completion(i, events) for i, events in enumerate(drawn[one.id])),
            )
            for prompt, one in zip(prompts, requests, strict=True)
        ]


class AsyncLLM:
    """As `LLM`, for event loops: tokens come as they are drawn. Constructing it loads the model, which takes seconds:
    await `asyncio.to_thread(AsyncLLM, …)` where a loop runs already."""

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        plan: GivenPlan | None = None,
        preempt: PreemptMode = "auto",
        max_open: int = MAX_OPEN,
        **options: Unpack[PlanOptions],
    ) -> None:
        """At most `max_open` requests are open at once; see `generate`."""
        self._loaded = _Loaded(model, plan, preempt, max_open, options)
        self.plan = self._loaded.plan

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        import asyncio

        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends the workers. Streams that are open end with an EngineError."""
        self._loaded.close()

    def generate(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        wait: bool = True,
    ) -> AsyncGenerator[TextToken, None]:
        """Every token of all samples; a lower `priority` goes first.

        Leaving the iteration, or cancelling its task, cancels the request: its memory is free for the next step. With
        too many requests open it waits, or raises QueueFullError where `wait` is False. A Request has its parameters.
        """
        if isinstance(prompt, Request):
            return self._stream(prompt, wait)
        return self._stream(self._loaded.request(prompt, sampling, n, priority), wait)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        wait: bool = True,
    ) -> AsyncGenerator[TextToken, None]:
        """As `generate`, of a conversation; see `LLM.chat`."""
        return self._stream(self._loaded.chat_request(messages, sampling, n, priority), wait)

    async def _stream(self, request: Request, wait: bool) -> AsyncGenerator[TextToken, None]:
        texts: dict[int, TextStream] = {}
        drawn = self._loaded.serving.generate(request, wait=wait)
        async with contextlib.aclosing(drawn):
            async for event in drawn:
                if event.sample not in texts:
                    texts[event.sample] = self._loaded.text.stream()
                text = texts[event.sample].push(event.token_id)
                if event.finish_reason is not None:
                    text += texts[event.sample].rest()
                yield TextToken(
                    event.request_id,
                    event.sample,
                    event.token_id,
                    text,
                    event.finish_reason,
                    event.cached_tokens,
                    event.logits,
                )


class _Loaded:
    """A model that is served: what blocking and asynchronous callers share."""

    def __init__(
        self,
        model: str | PathLike[str],
        plan: GivenPlan | None,
        preempt: PreemptMode,
        max_open: int,
        options: Mapping[str, object],
    ) -> None:
        check_engine()
        folder = resolve_model(str(model), weights=True)
        self.text = Text(folder)
        self._chat_template = ChatTemplate(folder)
        self.plan = _planned(folder, plan, options)
        check_runs_here(self.plan)
        check_preempt(self.plan, preempt)
        self._ids = count(FIRST_OWN_ID)
        exits = contextlib.ExitStack()
        self.serving: AsyncEngine[Engine] = exits.enter_context(
            served(
                pipelines(self.plan),
                folder,
                self.text.eos_token_ids,
                preempt=preempt,
                max_open=max_open,
            )
        )
        self._end = weakref.finalize(self, exits.close)
        self._end.atexit = False
        atexit.register(self._end)  # before the process that workers are forked from ends

    def close(self) -> None:
        self._end()
        atexit.unregister(self._end)

    def request(self, prompt: Prompt, sampling: SamplingParams | None, n: int, priority: int) -> Request:
        return self._request(self._prompt_ids(prompt), sampling, n, priority)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Raises UsageError for what is neither text nor the ids of tokens."""
        if isinstance(prompt, str):
            try:
                return self.text.encode(prompt)
            except (UnicodeEncodeError, TypeError):  # half of a surrogate pair
                raise UsageError(
                    f"the prompt {prompt[:40]!r} is no text that can be encoded in UTF-8"
                ) from None
        try:
            # numpy's integers are as good as Python's; True is no token.
            return tuple(token if isinstance(token, bool) else index(token) for token in prompt)
        except TypeError:
            raise UsageError(
                f"a prompt is text, or a sequence of whole numbers (int) for its tokens; it is {reprlib.repr(prompt)}"
            ) from None

    def chat_request(
        self, messages: Sequence[Message], sampling: SamplingParams | None, n: int, priority: int
    ) -> Request:
        prompt = self._chat_template.render(messages)
        return self._request(self.text.encode(prompt, special=False), sampling, n, priority)

    def completion(self, index: int, events: Sequence[TokenEvent]) -> CompletionOutput:
        reason = events[-1].finish_reason
        assert reason is not None
        token_ids = [event.token_id for event in events]
        return CompletionOutput(
            index=index,
            text=self.text.decode(token_ids),
            token_ids=tuple(token_ids),
            finish_reason=reason,
            cached_tokens=events[-1].cached_tokens,
        )

    def _request(
        self, prompt_ids: tuple[int, ...], sampling: SamplingParams | None, n: int, priority: int
    ) -> Request:
        check_count("n", n)
        return Request(
            id=next(self._ids),
            prompt_ids=prompt_ids,
            sampling=sampling or SamplingParams(),
            n=n,
            priority=priority,
        )


def _planned(folder: Path, plan: GivenPlan | None, options: Mapping[str, object]) -> Plan | ReplicatedPlan:
    if options.get("for_engine") is not None:
        raise UsageError("for_engine plans for another engine, and this one would run it; leave it out")
    if plan is None:
        return plan_from_options(folder, plan_choices(options), partial(preload, folder))
    if options:
        raise UsageError(f"the plan already says how to divide the model; leave out {', '.join(options)}")
    given = plan if isinstance(plan, (Plan, ReplicatedPlan)) else read_planned(Path(plan))
    model = read_model_spec(folder)
    if given.model.fingerprint != model.fingerprint:
        raise PlanError(
            f"the plan was made for {given.model.name}, not for {model.name}; plan this model anew"
        )
    return given


def _one_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, number: int
) -> Sequence[SamplingParams | None]:
    """Raises UsageError."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * number
    if len(sampling) != number:
        raise UsageError(
            f"{len(sampling)} sampling parameters for {number} prompts; give one each, or one for all"
        )
    return sampling
