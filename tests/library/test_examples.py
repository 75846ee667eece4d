"""The scripts of examples/, as a reader would run them."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import apportion

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MOST_LINES = 40
SHOWN = {
    "plan_only": ["layers 0-", "rtx-4090: ", "tokens/s; no division is more than"],
    "generate": ["ROMEO:", "JULIET:", "First Citizen:"],
    "stream_and_cancel": ["cancelled: True"],
    "what_if": ["as it is: ", "without the 3090: "],
}


def test_every_example_is_tried_and_short():
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {*SHOWN, "web_handler"}
    assert {name: text.count("\n") for name, text in scripts.items() if text.count("\n") > MOST_LINES} == {}


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_says_what_it_found(name: str, tmp_path: Path):
    """Without a guard for worker processes: none runs the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text((EXAMPLES / f"{name}.py").read_text().replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for text in SHOWN[name]:
        assert done.stdout.count(text) == 1 or text in ("ROMEO:", "rtx-4090: ", "layers 0-")
        assert text in done.stdout


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_web_handler_answers_and_outlives_a_client_that_hangs_up():
    async def post(port: int, prompt: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = prompt.encode()
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return reader, writer

    async def use() -> str:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(_example("web_handler").main(0, told))
        port = await told
        reader, writer = await post(port, "JULIET:")
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        reader, writer = await post(port, "ROMEO:")
        answer = (await reader.read()).decode()
        writer.close()
        serving.cancel()
        await asyncio.wait([serving])
        return answer

    head, _, text = asyncio.run(use()).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert text.startswith("\nO, I am not so; and, if thou art a man.\n")


def test_devices_may_be_a_list():
    one, other = (
        apportion.plan("qwen3-8b", devices=devices, calibration=False)
        for devices in (["rtx-3060-12gb", "gtx-1060-6gb"], "rtx-3060-12gb + gtx-1060-6gb")
    )
    assert one == other
