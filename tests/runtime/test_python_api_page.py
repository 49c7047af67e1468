"""The Python code of the documentation runs as it is, one block after the other."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str, bundle: Path) -> tuple[int, dict[str, Any]]:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("gpt-neo-1.3b", str(bundle)), names)
    return len(blocks), names


def test_the_page(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("python-api.md", mini_bundle)[0] == 7
    printed = capsys.readouterr().out
    assert printed.startswith("cpu CPU\nfp32 512 ")
    assert "2 3 [" in printed
    assert "the model has 512" in printed.splitlines()[-1]


def test_the_page_of_options(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("sampling.md", mini_bundle)[0] == 2
    assert capsys.readouterr().out.strip()


@pytest.fixture
def server(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """The address of the server on the page about serving."""
    number, names = run_blocks("serving.md", mini_bundle)
    assert number == 6
    with (
        neo_runtime.load(mini_bundle, threads=1) as model,
        neo_runtime.Scheduler(model, max_batch_size=2, max_length=100) as scheduler,
        ThreadingHTTPServer(("127.0.0.1", 0), names["Handler"]) as running,
    ):
        running.scheduler = scheduler  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ({"prompt": "Once", "options": {"max_new_tokens": 3}}, 200, "length"),
        ({"prompt": "Once", "options": {"max_new_tokens": 400}}, 400, "the scheduler has 100"),
        ({"prompt": "Once", "options": {"should_stop": 1}}, 400, "multiple values"),
        ({"prompt": "Once", "options": {"top_p": 0.5}}, 400, "set do_sample=True"),
        ({"promt": "Once"}, 400, "the prompt is empty"),
        ([], 400, "list"),
    ],
)
def test_the_server_of_the_page(server: str, body: Any, status: int, expected: str) -> None:
    assert_answers(server, body, status, expected)


def test_the_server_of_the_page_when_too_many_wait(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neo_runtime.Scheduler, "waiting", 100)
    assert_answers(server, {"prompt": "Once"}, 503, "too many requests")


def assert_answers(server: str, body: Any, status: int, expected: str) -> None:
    request = urllib.request.Request(server, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as answer:
            found, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read().decode()
        error.close()
    assert found == status
    assert expected in text
