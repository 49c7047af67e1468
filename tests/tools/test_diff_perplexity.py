"""`neo-diff`'s perplexity of an encyclopedia's text against a plain loop in PyTorch.

The text is written for this test in the manner of WikiText's raw files: headings between `=`,
spaces around punctuation, `@-@` and `@,@` within words and numbers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from helpers.models import DEMO
from neo_tools.diff.cli import main

if TYPE_CHECKING:
    from pathlib import Path

ARTICLE = """ \n = Tide mill = \n
 A tide mill is a water mill that is driven by the rise and fall of the sea . A dam with a
 sluice is built across a small inlet , so that a mill pond fills while the tide comes in . The
 gates close by themselves when it turns , and the water is kept until the level outside is low
 enough for the wheel to run . A mill of this kind worked for two periods of about five hours
 each day , and its miller rose by the moon rather than by the sun . \n
 = = History = = \n
 The oldest known examples stood on rocky coasts , where streams were too short for an ordinary
 mill . By the late eighteenth century more than 1 @,@ 000 were at work around the North
 Atlantic , and the largest of them drove six pairs of stones from a pond of 8 @.@ 5 hectares .
 Most were undershot , with wheels of oak between 3 and 5 metres wide ; a few had horizontal ,
 spoon @-@ shaped blades . The owners of one well @-@ documented mill sold flour to passing
 ships , and lent the pond to oyster growers in summer . \n
 = = = Decline = = = \n
 Steam made grinding independent of the hour , and railways brought cheaper flour from inland .
 Many ponds silted up after the gates had rotted ; others were filled , and became harbours or
 gardens . In 1938 fewer than twenty @-@ five could still be worked , and by 1960 only one
 ground corn for sale . \n
 = = Construction = = \n
 The dam was usually a core of clay between walls of dry stone , 200 to 400 metres long , with
 the mill @-@ house at its lowest point . Its foundations had to bear the load of the pond from
 one side at low water and of the sea from the other at high water , which made them more
 expensive than those of a mill on a river . Sea worms were the chief enemy of the wheel :
 floats were replaced every three or four years , and the shaft every thirty . \n
"""


def test_on_text_like_wikitext(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPTNeoForCausalLM

    (tmp_path / "wiki.raw").write_text(ARTICLE, encoding="utf-8")
    command = [str(mini_bundle), "--reference", str(DEMO), "--text", str(tmp_path / "wiki.raw")]
    few = ["--decode-positions", "8", "--localize-tokens", "0", "--continuations", "0"]
    assert main([*command, *few, "--threads", "1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)

    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(ARTICLE).ids
    model = GPTNeoForCausalLM.from_pretrained(str(DEMO), attn_implementation="eager").eval()
    length = model.config.max_position_embeddings
    losses = []
    for start in range(0, len(ids), length):
        piece = torch.tensor([ids[start : start + length]])
        with torch.inference_mode():
            logits = model(piece).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
    assert len(found["contexts"]) > 1
    assert sum(found["contexts"]) == len(ids)
    assert found["perplexity"]["tokens"] == len(losses)
    plain = math.exp(sum(losses) / len(losses))
    assert plain > 50, "stories are far below this: the text is of another kind"
    assert found["perplexity"]["reference"] == pytest.approx(plain, rel=1e-4)
    assert found["perplexity"]["bundle"] == pytest.approx(plain, rel=1e-4)
