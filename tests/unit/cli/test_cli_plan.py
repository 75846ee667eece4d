"""The command line from outside: exit codes, one-line errors, and no torch for planning."""

import json

import pytest
from command import apportion, small_model

from apportion.planner.plan_file import parse_plan, plan_json

DEVICES = "laptop=cpu:8MiB@0.5, desk=cpu:9MiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


def check_refused(done, code, *messages):
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("apportion: error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


def test_a_plan_is_printed_without_torch(model):
    report = (
        "from apportion.cli.main import exit_code\nimport sys\ncode = exit_code(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'msgpack'} & set(sys.modules)\nsys.exit(str(heavy) if heavy else code)"
    )
    done = apportion("plan", model, "--devices", DEVICES, code=report)
    assert done.returncode == 0, done.stderr
    for word in (
        "laptop *0.5",
        "desk",
        "Proven",
        "decode",
        "first token",
        "how sure",
        "limited by",
        "emulated",
    ):
        assert word in done.stdout
    assert "ε" not in done.stdout
    details = apportion("plan", model, "--devices", DEVICES, "--details")
    for word in ("laptop *0.5", "KV heads", "KV cache", "prefill chunks", "certificate", "gap"):
        assert word in details.stdout
    for shown in (done.stdout, details.stdout):
        assert all(len(line) <= 90 for line in shown.splitlines())


def test_json_is_exactly_the_plan(model, tmp_path):
    out = tmp_path / "plan.json"
    done = apportion(
        "plan", model, "--devices", DEVICES, "--objective", "throughput", "--concurrency", "3", "--json",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = parse_plan(done.stdout, "stdout")
    assert plan_json(plan) == done.stdout == out.read_text()
    assert (plan.workload.concurrency, plan.workload.objective) == (3, "throughput")
    assert (plan.workload.max_context_tokens, plan.workload.prompt_tokens) == (256, 128)
    assert plan.workload.output_tokens == 64
    assert apportion("verify", str(out)).returncode == 0


def test_a_tampered_plan_is_refused(model, tmp_path):
    out = tmp_path / "plan.json"
    assert apportion("plan", model, "--devices", DEVICES, "--out", str(out)).returncode == 0
    document = json.loads(out.read_text())
    document["certificate"]["value"] /= 2
    out.write_text(json.dumps(document))
    done = apportion("verify", str(out))
    assert done.returncode == 1
    assert "FAILED │ objective" in done.stdout


def test_infeasible_is_exit_code_3(model):
    done = apportion("plan", model, "--devices", "a=cpu:2MiB, b=cpu:3MiB")
    check_refused(
        done, 3, "2 devices have 5.0 MiB", "the largest (b) has 3.0 MiB", "one more card on local, ", "try "
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "model"),
        (["plan", "{model}", "--context", "0"], "--context"),
        (["plan", "{model}", "--context", "1000"], "256"),
        (
            ["plan", "{model}", "--context", "64", "--prompt-tokens", "60", "--output-tokens", "9"],
            "do not fit",
        ),
        (["plan", "{model}", "--objective", "speed"], "speed"),
        (["plan", "{model}", "--weights", "int3"], "int3"),
        (["plan", "{model}", "--nope"], "--nope"),
        (["plan", "{model}", "--devices", "a"], "unknown device 'a'"),
        (["plan", "{model}", "--cluster", "/none.toml"], "/none.toml"),
        (["plan", "{model}", "--cluster", "c", "--devices", "a=cpu:1GiB"], "either --devices or --cluster"),
        (["plan", "/no/such/model"], "/no/such/model"),
        (["verify", "/none.json"], "/none.json"),
        (["nope"], "nope"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(model, arguments, message):
    check_refused(apportion(*(argument.format(model=model) for argument in arguments)), 2, message)


def test_version():
    done = apportion("--version")
    assert (done.returncode, done.stdout) == (0, "apportion 0.1.0\n")


def test_the_format_of_keys_and_values(model):
    given = ("plan", model, "--devices", DEVICES, "--json")
    kept = {}
    for words in (
        (),
        ("--kv-format", "fp16"),
        ("--weights", "bf16"),
        ("--weights", "bf16", "--kv-format", "fp32"),
    ):
        plan = parse_plan(apportion(*given, *words).stdout, "stdout")
        tokens = plan.num_kv_blocks * plan.block_tokens
        kept[words] = plan.kv_format, sum(held.kv_bytes for held in plan.memory.values()) / tokens
    assert [name for name, _ in kept.values()] == ["fp32", "fp16", "bf16", "fp32"]
    whole, *half, again = (size for _, size in kept.values())
    assert half == [whole / 2, whole / 2]
    assert again == whole
