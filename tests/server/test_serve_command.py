"""`neo-serve` as a process: it says where it is, finishes what was begun, and ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from typing import TYPE_CHECKING, NamedTuple

import pytest
from neo_runtime.errors import NeoError
from neo_server.command import main
from neo_server.limits import Limits
from neo_server.listening import bound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model


class Running(NamedTuple):
    process: subprocess.Popen[str]
    line: str
    """The first on stderr."""
    port: int


@contextmanager
def running(bundle: Path, *options: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "neo_server.command", str(bundle), "--port", "0", *options]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control lets what runs in its background ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r":(\d+)/v1$", line.rstrip())
            assert found, line + process.stderr.read()
            yield Running(process, line, int(found[1]))
        finally:
            process.kill()


def ended(server: Running) -> tuple[int, str, str]:
    out, err = server.process.communicate(timeout=60)
    return server.process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_signal_lets_it_finish(mini_bundle: Path, number: signal.Signals, status: int) -> None:
    with running(mini_bundle, "--name", "demo", "--threads", "1") as server:
        assert server.line.startswith("neo-serve: demo (fp32, CPU) at http://127.0.0.1:")
        body = json.dumps({"prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True})
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            first = response.readline()
            server.process.send_signal(number)
            events = (first + response.read()).split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
        code, out, err = ended(server)
        assert (code, out) == (status, "")
        assert "Traceback" not in err
        assert '"POST /v1/completions" 200' in err
        assert "neo-serve: stopping; sequences to finish: 1, within 20 s\n" in err
        assert err.endswith("neo-serve: stopped\n")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


@pytest.mark.parametrize("stream", [False, True])
def test_at_the_end_of_its_grace_clients_are_told(mini_bundle: Path, stream: bool) -> None:
    with running(mini_bundle, "--threads", "1", "--grace", "0", "--no-access-log") as server:
        fields = {"prompt": "a", "max_tokens": 500, "n": 64, "ignore_eos": True}
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(fields | {"stream": stream}))
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(1)  # it is at work
            server.process.send_signal(signal.SIGTERM)
            response = connection.getresponse()
            last = response.read().strip().split(b"\n\n")[-1]
        assert response.status == (200 if stream else 503)
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["message"] == "the server is shutting down; try again"
        code, _, err = ended(server)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert "/v1/completions" not in err.replace(f":{server.port}/v1", "")


class Answer(NamedTuple):
    status: int
    text: str
    connection: str | None
    """Of the header."""


def request(port: int, path: str = "/v1/completions", body: str | None = None) -> Answer:
    """Over a connection of its own."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, body)
        found = connection.getresponse()
        return Answer(found.status, found.read().decode(), found.headers["connection"])


def test_it_is_drained_before_it_ends(mini_bundle: Path) -> None:
    """Load balancers see it, while those who have not seen it yet are still served."""
    with running(mini_bundle, "--threads", "1", "--drain-delay", "60") as server:
        assert request(server.port, "/health").status == 200
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while (health := request(server.port, "/health")).status == 200:
            assert time.monotonic() < end
        assert (health.status, json.loads(health.text)["status"]) == (503, "ending")
        time.sleep(0.5)  # a server that ends does so within a tenth of that
        assert request(server.port, "/livez").status == 200
        answer = request(server.port, body='{"prompt": "a", "max_tokens": 2}')
        assert (answer.status, answer.connection) == (200, "close")
        server.process.send_signal(signal.SIGTERM)  # enough of that
        code, _, err = ended(server)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert err.index('"POST /v1/completions" 200') < err.index("stopping")


def test_half_a_request_does_not_hold_up_the_end(mini_bundle: Path) -> None:
    with running(mini_bundle, "--threads", "1", "--grace", "300") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 60\r\n\r\n"
            connection.sendall(f'{head}{{"pro'.encode())
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert connection.recv(4096).startswith(b"HTTP/1.1 503")
        assert ended(server)[0] == 128 + signal.SIGTERM


def test_what_it_takes_at_once_is_said(mini_bundle: Path) -> None:
    options = ("--max-batch-size", "3", "--max-length", "100", "--request-timeout", "600.5")
    with running(mini_bundle, "--threads", "1", *options, "--log-format", "json") as server:
        assert server.process.stderr is not None
        said = server.process.stderr.readline()
        body = '{"prompt": "a", "max_tokens": 2, "ignore_eos": true}'
        assert request(server.port, body=body).status == 200
        assert "_created" not in request(server.port, "/metrics").text
        line = json.loads(server.process.stderr.readline())
        server.process.terminate()
    assert re.fullmatch(
        r"neo-serve: 3 sequences of up to 100 tokens at once, their cache up to \d+ MB; "
        r"256 with those that wait, 128 of one request, each for 600\.5 s\n",
        said,
    )
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, "/v1/completions", 2)


def test_how_long_an_idle_connection_is_kept(mini_bundle: Path) -> None:
    with (
        running(mini_bundle, "--threads", "1", "--keep-alive", "1") as server,
        closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection,
    ):
        connection.request("GET", "/livez")
        assert connection.getresponse().read()
        assert connection.sock.recv(1) == b"", "closed; by default not for 75 s"


def test_a_first_process_ends_before_it_has_begun() -> None:
    """Nothing but its own handler ends the first process of a container."""
    code = (
        "import os, signal, sys, types, neo_server.entry as entry\n"
        "slow = sys.modules['neo_server.command'] = types.ModuleType('slow')\n"
        "slow.main = lambda: os.kill(os.getpid(), signal.SIGTERM) or 9\n"
        # As the system does for the first process.
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.exit(entry.serve())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


def test_more_files_may_be_open(mini_bundle: Path) -> None:
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, hard))
    code = (
        "import resource, neo_server.listening as listening\n"
        "listening._raise_open_files()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.stdout.split() == [str(min(hard, 65536)), str(hard)]


def test_twice_ctrl_c_ends_at_once(mini_bundle: Path) -> None:
    with running(mini_bundle, "--threads", "1") as server:
        body = json.dumps({"prompt": "a", "max_tokens": 500, "n": 64, "ignore_eos": True})
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", body)
            for _ in range(2):
                with pytest.raises(subprocess.TimeoutExpired):
                    server.process.wait(1)
                server.process.send_signal(signal.SIGINT)
            code, _, err = ended(server)
    assert code == 130
    assert "Traceback" not in err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line.removeprefix("neo-serve: ")


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    """`main` replaces what a SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, str(mini_bundle), "--port", port)
    assert line.startswith(f"cannot listen on 127.0.0.1 port {port} (")
    assert line.endswith("choose another --host or --port")
    for port in ("65536", "-1"):
        line = refused(capsys, str(mini_bundle), "--port", port)
        assert f"port is {port}, expected 0 to 65535" in line
    assert "no.such.host" in refused(capsys, str(mini_bundle), "--host", "no.such.host.invalid")


def test_a_port_may_be_had_again_at_once() -> None:
    """Though the system still keeps a connection that was closed at this end."""
    with bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            first.accept()[0].close()
            assert client.recv(1) == b""
    bound("127.0.0.1", port).close()


def test_an_address_of_ipv6(mini_bundle: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with running(mini_bundle, "--threads", "1", "--host", "::1") as server:
        assert f" at http://[::1]:{server.port}/v1\n" in server.line
        with closing(HTTPConnection("::1", server.port, timeout=60)) as connection:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200


def test_what_flags_limit(
    mini_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, Limits]] = []

    def noted(_: Model, name: str, limits: Limits) -> None:
        found.append((name, limits))
        raise NeoError("enough")

    monkeypatch.setattr("neo_server.service.Service", noted)
    given = "--name x --max-batch-size 2 --max-length 100 --max-queue 7 --max-sequences 5"
    given += " --request-timeout 2.5 --prefix-cache-mb 3 --port 0"
    assert refused(capsys, str(mini_bundle), *given.split()) == "enough"
    assert refused(capsys, str(mini_bundle), "--port", "0") == "enough"
    expected = Limits(
        max_batch_size=2,
        max_length=100,
        max_queue=7,
        max_sequences=5,
        request_seconds=2.5,
        prefix_cache_bytes=3_000_000,
    )
    assert found == [("x", expected), (mini_bundle.name, Limits())]


def test_what_cannot_be_served(
    mini_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = ("--port", "0")
    assert "no/such" in refused(capsys, "no/such", *port)
    assert "grace is -1" in refused(capsys, str(mini_bundle), "--grace", "-1", *port)
    assert "max_queue is 0" in refused(capsys, str(mini_bundle), "--max-queue", "0", *port)
    line = refused(capsys, str(mini_bundle), "--max-cache-mb", "1", *port)
    assert "1000000" in line
    assert "513 positions" in refused(capsys, str(mini_bundle), "--max-length", "513", *port)
    monkeypatch.setenv("NEO_API_KEYS", " ,")
    assert "NEO_API_KEYS is set but has no key" in refused(capsys, str(mini_bundle), *port)


def test_without_a_tokenizer(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.models import DEMO
    from neo_export.exporter import ExportOptions, export_bundle

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DEMO, checkpoint, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    bundle = tmp_path / "bundle"
    export_bundle(str(checkpoint), bundle, ExportOptions(target="cpu"))
    assert "has no tokenizer" in refused(capsys, str(bundle), "--port", "0")


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\nfrom neo_server.command import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnxruntime', 'starlette', 'uvicorn', 'prometheus_client'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "POST /v1/completions" in done.stdout


def test_a_missing_extra_is_named(mini_bundle: Path) -> None:
    code = (
        "import sys\nsys.modules['starlette.applications'] = None\n"
        "from neo_server.command import main\n"
        f"sys.exit(main([{str(mini_bundle)!r}, '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert "extras: pip install 'neo-onnx[cpu,serve]'" in done.stderr
