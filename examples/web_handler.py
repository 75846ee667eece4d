"""A web server around a model: POST a prompt, read the text as it is drawn. A client that hangs up cancels it."""

import asyncio
from asyncio import StreamReader, StreamWriter

from apportion import AsyncLLM, SamplingParams

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"


async def answer(llm: AsyncLLM, reader: StreamReader, writer: StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
    prompt = (await reader.readexactly(length)).decode()
    writer.write(HEAD)
    try:
        async for token in llm.generate(prompt, SamplingParams(max_tokens=30)):
            writer.write(token.text.encode())
            await writer.drain()
    except ConnectionError:
        pass  # leaving the stream has cancelled it
    writer.close()


async def main(port: int = 8000, told: asyncio.Future[int] | None = None) -> None:
    llm = await asyncio.to_thread(
        AsyncLLM, "demo", devices="a=cpu:16MiB, b=cpu:16MiB", context=64, concurrency=4
    )
    async with llm, await asyncio.start_server(lambda *ends: answer(llm, *ends), "127.0.0.1", port) as server:
        if told is not None:
            told.set_result(server.sockets[0].getsockname()[1])
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
