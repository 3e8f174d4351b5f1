"""Several processes: real ones, two of them, on CPU devices over loopback."""

import argparse
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import polarjax
from polarjax.evaluation import evaluate
from polarjax.mesh import processes
from polarjax.mesh.native_log import one_line
from polarjax.policies.adapter import ROUTERS_FILE
from tests.evaluation.test_tasks import make_rows, write
from tests.mesh import served
from tests.mesh.one_of_several import (
    TOKENS,
    eval_settings,
    learn,
    sharing_neurons,
    small_model,
)
from tests.models import random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("one_of_several.py")


@pytest.fixture
def launch(tmp_path):
    """Starts some of two processes; gives their exit codes, stdouts and stderrs."""
    running = []

    def run(what, *options, only=(0, 1), devices=(2, 2), told=(2, 2), folder=tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = (*options, "--coordinator", f"127.0.0.1:{port}")
        for process in only:
            # The last of a flag holds: this process has eight devices.
            count = f"--xla_force_host_platform_device_count={devices[process]}"
            flags = f"{os.environ['XLA_FLAGS']} {count}"
            running.append(
                subprocess.Popen(
                    [
                        *(sys.executable, PROGRAM, what, folder, *options),
                        *("--processes", str(told[process])),
                        *("--process", str(process)),
                    ],
                    env={
                        **os.environ,
                        "JAX_PLATFORMS": "cpu",
                        "PYTHONPATH": str(REPOSITORY),
                        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        # Two minutes: beside other work they take one.
        outputs = [process.communicate(timeout=120) for process in running]
        return [
            (process.returncode, *output)
            for process, output in zip(running, outputs, strict=True)
        ]

    yield run
    for process in running:
        # To its end: pipes left open are warnings, in whichever test comes next.
        process.kill()
        process.communicate()


def test_two_processes_share_devices_prompts_and_arrays(launch, tmp_path):
    (code, out, err), (other_code, other_out, other_err) = launch("work")
    assert (code, other_code) == (0, 0), err + other_err
    assert (out, other_out) == ("printed by 0\n", "")
    assert (err, other_err) == ("", "")
    seen = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert [x.pop("unsent") for x in seen] == ["TypeError", "RuntimeError"]
    told = [x.pop("told") for x in seen]
    assert told[0] is None and "another number than process 0" in told[1]
    assert seen[0] == seen[1]
    assert seen[0] == {
        "devices": 4,
        "local devices": 2,
        # Where process 0 fails to write, both know.
        "failed": [["ValueError", "no such thing"], ["OSError", "no such thing"]],
        "prompts": ["Once upon a time", [7, 8, 9], "ünïcode"],
        "host": {
            "cut": list(range(8)),
            "half": list(range(8)),
            "here": [1, 1],
            "sum": 28,
            "plain": 3,
        },
        "numpy": True,
    }


def test_two_processes_say_what_one_says(launch, tmp_path):
    ended = launch("generate", devices=(4, 4))
    assert [code for code, _, _ in ended] == [0, 0], ended
    options = {"density": [0.5, 0.25, 0.9], "max_new_tokens": 6}
    want = polarjax.generate(sharing_neurons(small_model(), 0.4), TOKENS, **options)
    for i in range(2):
        tokens, density = json.loads((tmp_path / f"{i}.json").read_text())
        assert tokens == want.tokens and tuple(density) == want.stats.density


def test_two_processes_serve_what_one_serves(launch, tmp_path):
    served.write_model(tmp_path)
    ended = launch("serve", devices=(1, 1))
    assert [code for code, _, _ in ended] == [0, 0], ended
    with served.make_engine(tmp_path) as engine:
        want = json.loads(json.dumps(served.serve(engine)))
    mine, others = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert mine == others
    assert mine[0]["preempted"]
    for found in mine:
        assert found["tokens"] == want["tokens"]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
            found["logprobs"],
            want["logprobs"],
        )
        (reason, _), first, second, third, fourth = found["asked"]
        assert (reason, found["texts"][0]) == ("stop", want["texts"][0])
        # What process 0 has cancelled is, what the other would have is not.
        assert first[0] == fourth[0] == "cancelled"
        assert first[1][: len(found["first"])] == found["first"]
        assert [second, third] == want["asked"][2:4]
        assert second[0] == third[0] == "length"


def test_two_processes_measure_what_one_measures(launch, tmp_path):
    config = dataclasses.replace(small_model().config, vocab_size=257, layers=2)
    params = random_params(config, routers=True, neuron_rank=5)
    params = write_checkpoint(tmp_path / "model", params)
    write(tmp_path / "words.jsonl", make_rows(9))
    ended = launch("evaluate", devices=(2, 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    want, _ = evaluate(params, eval_settings(tmp_path))
    # One batch, then the other two, by both; then all was there.
    wrote = json.loads((tmp_path / "result.json").read_text())
    for i in range(2):
        found, scored = json.loads((tmp_path / f"{i}.json").read_text())
        assert scored == [1, 2, 0]
        for label, mine in found.items():
            result = want["tasks"]["words"]["results"][label]
            assert mine["right"] == result["right"]
            np.testing.assert_allclose(mine["nll"], result["nll"], rtol=1e-5)
        assert (
            found["Polar"]["nll"] == wrote["tasks"]["words"]["results"]["Polar"]["nll"]
        )
    assert not (tmp_path / "result.json.partial").exists()


def test_two_processes_learn_what_one_learns(launch, tmp_path):
    ended = launch("train", devices=(2, 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    alone = tmp_path / "alone"
    alone.mkdir()
    want = learn(alone, None)
    for i in range(2):
        assert json.loads((tmp_path / f"{i}.json").read_text()) == want
    for name in ("routers", "recovered"):
        one, both = (load_file(x / name / ROUTERS_FILE) for x in (alone, tmp_path))
        assert one.keys() == both.keys()
        for key, value in one.items():
            np.testing.assert_allclose(both[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("SIGKILL", 0),
        ("SIGKILL", 1),
        pytest.param("SIGTERM", 1, marks=pytest.mark.slow),
        pytest.param("ValueError", 0, marks=pytest.mark.slow),
        pytest.param("ValueError", 1, marks=pytest.mark.slow),
    ],
)
def test_one_that_dies_ends_the_other_in_a_collective(launch, how, victim):
    began = time.monotonic()
    ends = launch(how, "--victim", str(victim))
    assert time.monotonic() - began < 30
    code, _, err = ends[victim]
    if how == "ValueError":
        assert (code, err) == (1, f"error: process {victim} of 2: no such thing\n")
    else:
        assert (code, err) == (-signal.Signals[how], "")
    code, _, err = ends[1 - victim]
    assert code > 0  # by no signal, of which a shell would say more
    assert err.count("\n") == 1
    assert err.startswith(f"error: process {1 - victim} of 2: ")
    assert "died" in err


@pytest.mark.slow
def test_one_that_dies_ends_another_that_does_not_notice(launch, tmp_path):
    """As where a GPU waits for NCCL: only the missing heartbeats tell."""
    folder = tmp_path / "in_python"
    began = time.monotonic()
    _, (code, _, err) = launch("SIGKILL", "--victim", "0", folder=folder)
    assert code == signal.SIGABRT
    assert err.startswith("error: process 1 of 2: process 0 died")
    assert err.count("\n") == 1
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_missing_heartbeats_end_the_main_process(launch, tmp_path):
    folder = tmp_path / "in_python"
    began = time.monotonic()
    (code, _, err), _ = launch("SIGKILL", "--victim", "1", folder=folder)
    assert code == signal.SIGABRT
    assert err.startswith("error: process 0 of 2: process 1 died or stopped answering")
    assert err.count("\n") == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("started", [0, 1])
def test_one_process_started_short(launch, started):
    began = time.monotonic()
    ((code, out, err),) = launch("work", "--start-timeout", "1", only=[started])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(
        f"error: process {started} of 2: waited 1 s for the other processes at 127."
    )
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_processes_with_other_numbers_of_devices(launch):
    code, _, err = launch("work", devices=(2, 3))[0]
    assert code == 1
    assert err == (
        "error: process 0 of 2: every process must have as many devices, but there "
        "are 2 on process 0, 3 on process 1\n"
    )


@pytest.mark.slow
def test_processes_told_other_numbers_of_processes(launch):
    (other_code, _, _), (code, _, err) = launch("work", told=(2, 3))
    assert other_code != 0 and code == 1
    assert err == ("error: process 1 of 3: processes is 3, but process 0 was told 2\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "need a coordinator"),
        (("host:1", None, 0), "needs processes"),
        (("host:1", 2, None), "needs processes"),
        (("host", 2, 0), "coordinator is 'host', but must be host:port"),
        (("host:x", 2, 0), "must be host:port"),
        (("host:70000", 2, 0), "must be host:port"),
        (("host:1", 0, 0), "processes is 0, but must be at least 1"),
        (("host:1", 2, 2), "process is 2, but 2 processes are 0 to 1"),
        (("host:1", 2, -1), "process is -1"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*given)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "here"])
def test_port_that_is_taken(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot listen at {where}: Address alr"):
            processes.start(where, 2, 0)


def test_timeouts_are_at_least_a_second():
    with pytest.raises(ValueError, match="at least 1 s"):
        processes.start("host:1", 2, 0, start_timeout=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "belong together"),
        (["--coordinator", "host:1", "--process", "0"], "belong together"),
        (["--coordinator", "auto", "--process", "0"], "auto finds"),
        (
            ["--coordinator", "host:1", "--processes", "2", "--process", "5"],
            "process is 5",
        ),
    ],
)
def test_bad_options(options, message):
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        processes.start_from(parser.parse_args(options))


def test_one_process_needs_nothing():
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    processes.start_from(parser.parse_args([]))
    assert not jax.distributed.is_initialized()
    assert processes.is_main()
    assert processes.from_main(["a", (1, 2)]) == ["a", [1, 2]]
    host = processes.to_host({"x": jax.numpy.arange(3)})
    assert isinstance(host["x"], np.ndarray)
    with pytest.raises(KeyError), processes.together():
        raise KeyError("as ever")


def test_only_what_json_can_say_is_sent():
    with pytest.raises(TypeError, match="what JSON can say"):
        processes.from_main({1, 2})


ABORT = """\
E1123 21:05:56.5 26329 coordination_service.cc:1489] Shutdown barrier has failed:
This suggests that the workers are out of sync.

W1123 21:05:56.6 26329 gpu_client.cc:7] a warning of another part
which has two lines
E1123 21:05:56.7 26343 coordination_service_agent.cc:288] Polled an error from the \
service.
F1123 21:05:56.8 26343 client.h:86] Terminating process because the JAX distributed \
service detected fatal errors. This most likely indicates that another task died; \
absl::Status: {status}
1
RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7fd28fb3d7d4  absl::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("UNAVAILABLE: The tasks are unhealthy:", "process 1 died or stopped"),
        ("UNAVAILABLE: Failed to send RPC to service. Either", "process 0 died or"),
        ("INTERNAL: wrong service incarnation", "two processes have the same number"),
        ("DEADLINE_EXCEEDED: Deadline Exceeded", "not every process was started"),
        ("INTERNAL: anything", "another process died or"),
    ],
)
def test_an_abort_is_told_in_one_line(status, told):
    lines = iter(ABORT.format(status=status).splitlines(keepends=True))
    *others, error = one_line(lines, "process 0 of 2: ")
    assert "".join(others).splitlines() == [
        "W1123 21:05:56.6 26329 gpu_client.cc:7] a warning of another part",
        "which has two lines",
    ]
    assert error.startswith(f"error: process 0 of 2: {told}")
    assert error.count("\n") == 1


def test_an_error_of_ours_is_the_only_one():
    lines = ["error: bad\n", *ABORT.format(status="UNKNOWN").splitlines(True)]
    told = one_line(iter(lines), "process 1 of 2: ")
    assert [line for line in told if "error" in line] == [
        "error: process 1 of 2: bad\n"
    ]
