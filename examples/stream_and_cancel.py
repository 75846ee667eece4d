"""Stream two texts at once and leave one half way: its memory is free for the next step."""

import asyncio

from apportion import AsyncLLM, SamplingParams


async def tell(llm: AsyncLLM, prompt: str, most: int) -> str:
    text = prompt
    number = 0
    async for token in llm.generate(prompt, SamplingParams(max_tokens=40)):
        text += token.text
        number += 1
        if number == most:
            break  # cancels the request
    return text


async def main() -> None:
    llm = await asyncio.to_thread(
        AsyncLLM, "demo", devices="a=cpu:16MiB, b=cpu:16MiB", context=64, concurrency=2
    )
    async with llm:
        whole, part = await asyncio.gather(tell(llm, "ROMEO:", 40), tell(llm, "JULIET:", 5))
        late = asyncio.create_task(tell(llm, "KING:", 40))
        await asyncio.sleep(0.05)
        late.cancel()  # so does this
        await asyncio.wait([late])
    print(f"{whole}\n---\n{part}\n---\ncancelled: {late.cancelled()}")


if __name__ == "__main__":
    asyncio.run(main())
