"""The Python code of the page about the server runs as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.serving import served
from neo_server.asked import read_request
from starlette.applications import Starlette

if TYPE_CHECKING:
    import pytest
    from neo_runtime.model import Model

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")


def test_the_page(model: Model, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, other = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with served(model, name="gpt-neo") as running:
        exec(client.replace("http://localhost:8000", running.url), {})
    assert "[None, -" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(other.replace("gpt-neo-1.3b", str(mini_bundle)), names)
    assert isinstance(names["app"], Starlette)
    names["model"].close()


def test_every_field_of_the_page_is_known() -> None:
    """And means what it says: each is taken, with a value of its kind."""
    further = PAGE[PAGE.index("Further names") : PAGE.index("- Defaults")]
    named = set(re.findall(r"`([a-z_]+)`", further)) - {"extra_body"}
    assert len(named) == 20
    values = dict.fromkeys(named, 1)
    values |= {"return_tokens_as_token_ids": True, "stop_token_ids": [1]}
    asked = read_request({"prompt": "a", **values})
    taken = set(asked.options) | {"return_tokens_as_token_ids", "min_tokens", "stop_token_ids"}
    taken |= {"truncate_prompt_tokens"}
    assert named <= taken
    assert asked.options["min_new_tokens"] == 1
    assert asked.truncate_prompt_tokens == 1
    assert asked.stop_token_ids == (1,)
