"""What many prompts begin with is computed once, and changes no result."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.hf_reference import heldout_texts, reference_continuations, varied_prompts
from helpers.holding import holding
from helpers.kills import fork
from helpers.prefixes import assert_prefixes_hold
from neo_runtime import Scheduler
from neo_runtime.backends.cpu.append import AppendStore
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.backends.cpu.in_place import InPlaceStore
from neo_runtime.command.generate import main
from neo_runtime.errors import CacheLimitError, ContextLengthError, NeoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_runtime.model import Model

EXAMPLES = heldout_texts()[0][:400] + "\n"
QUESTIONS = ["Once upon a time", "The dog", "Tom and his mother went to"]


@pytest.fixture(scope="module", params=["mini_bundle", "portable_bundle"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with neo_runtime.load(request.getfixturevalue(request.param), threads=1) as loaded:
        yield loaded


def test_every_row_is_what_it_is_without(model: Model) -> None:
    assert_prefixes_hold(model, 1e-5)
    assert_beginnings_hold(model, 1e-5)
    assert model.cache_bytes_in_use == 0


def test_the_texts_of_transformers(model: Model) -> None:
    texts = varied_prompts(5)
    prefix_ids, rest = texts[2], [ids[:9] for ids in texts]
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12}
    for more in ({}, {"num_beams": 3}):
        expected = reference_continuations(
            [prefix_ids + ids for ids in rest], do_sample=False, **options, **more
        )
        with model.prefix(prefix_ids) as prefix:
            found = model.generate(rest, prefix=prefix, **options, **more)
        assert [[c.token_ids] for c in found] == expected
        assert [c.prompt_token_ids for c in found] == [tuple(prefix_ids + ids) for ids in rest]


def test_every_way_to_generate(model: Model) -> None:
    assert model.tokenizer is not None
    examples = model.tokenizer.encode(EXAMPLES)
    whole = [examples + model.tokenizer.encode(question) for question in QUESTIONS]
    options: dict[str, Any] = {"max_new_tokens": 15, "repetition_penalty": 1.2}
    sampled = options | {"do_sample": True, "seed": 4}
    alone = [model.generate(ids, **options).text for ids in whole]
    several = [c.text for c in model.generate(whole, **sampled, num_return_sequences=2)]
    with model.prefix(EXAMPLES) as prefix:
        assert prefix.ids.tolist() == examples
        assert prefix.nbytes == model.cache_bytes_in_use
        assert [c.text for c in model.generate(QUESTIONS, prefix=prefix, **options)] == alone
        found = model.generate(QUESTIONS, prefix=prefix, **sampled, num_return_sequences=2)
        assert [c.text for c in found] == several
        assert "".join(model.stream(QUESTIONS[0], prefix=prefix, **options)) == alone[0]
        with Scheduler(model, max_batch_size=2) as scheduler:
            pending = [scheduler.submit(q, prefix=prefix, **options) for q in QUESTIONS]
            without = scheduler.submit(whole[0], **options)
            assert [one.result(timeout=60).text for one in pending] == alone
            assert without.result(timeout=60).text == alone[0]
        with ThreadPoolExecutor(4) as threads:
            texts = threads.map(
                lambda question: model.generate(question, prefix=prefix, **options).text,
                QUESTIONS * 4,
            )
            assert list(texts) == alone * 4
    assert model.cache_bytes_in_use == 0


def test_only_the_rest_is_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    make = BoundCall.__init__

    def watched(call: BoundCall, backend: Any, graph: str, **arrays: Any) -> None:
        if graph == "prefill":
            tokens.append(arrays["input_ids"].size)
        make(call, backend, graph, **arrays)

    with model.prefix([5] * 100) as prefix:
        monkeypatch.setattr(BoundCall, "__init__", watched)
        model.generate([[6, 7], [8]], max_new_tokens=1, prefix=prefix)
        assert sum(tokens) == 3
        del tokens[:]
        model.generate([6, 7], max_new_tokens=2, num_beams=2, prefix=prefix)
        assert tokens == [2]


def test_its_end(model: Model) -> None:
    prefix = model.prefix("Once upon a time")
    assert model.cache_bytes_in_use == prefix.nbytes > 0
    prefix.close()
    prefix.close()
    assert model.cache_bytes_in_use == 0
    for call in (model.generate, model.stream):
        with pytest.raises(NeoError, match=r"prefix is closed.*Model\.prefix"):
            call("The", prefix=prefix)
    with model.prefix("Once") as short:
        stream = model.stream(" upon", prefix=short)
    with pytest.raises(NeoError, match="prefix is closed"):
        next(stream)
    with model.prefix("Once") as used:
        asked = iter((True, False))

        def close() -> bool:
            if next(asked, False):
                used.close()
            return False

        [one] = model.generate([" upon"], prefix=used, should_stop=close, max_new_tokens=4)
        assert one.text == model.generate("Once upon", max_new_tokens=4).text
    assert model.cache_bytes_in_use == 0
    model.prefix("Once")
    gc.collect()
    assert model.cache_bytes_in_use == 0
    with Scheduler(model, max_batch_size=1, max_length=64) as scheduler:
        held = model.cache_bytes_in_use
        expected = model.generate("Once upon a", max_new_tokens=5).text
        with holding(scheduler, "Tom", max_new_tokens=20) as first:
            with model.prefix("Once upon") as closing:
                waiting = scheduler.submit(" a", max_new_tokens=5, prefix=closing)
                gone = scheduler.submit(" a", max_new_tokens=5, prefix=closing)
            assert model.cache_bytes_in_use > held, "a request still needs it"
            with pytest.raises(NeoError, match="prefix is closed"):
                scheduler.submit("b", prefix=closing)
            assert gone.cancel()
        assert waiting.result(timeout=60).text == expected
        assert first.result(timeout=60).text == model.generate("Tom", max_new_tokens=20).text
        scheduler.submit("a", max_new_tokens=1).result(timeout=60)
        assert model.cache_bytes_in_use == held


def test_one_that_cannot_be_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundCall, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        model.prefix("Once upon")
    assert kept.value.__traceback__ is not None
    assert model.cache_bytes_in_use == 0


def test_an_interrupt_while_it_is_copied(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was only read, and serves the next request."""
    kind = InPlaceStore if model.manifest.cache.layout == "in_place" else AppendStore

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.prefix("Once upon") as prefix:
        expected = model.generate(" a time", prefix=prefix, max_new_tokens=3).text
        with monkeypatch.context() as patched:
            patched.setattr(kind, "fill", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(" a time", prefix=prefix, max_new_tokens=3)
        assert model.generate(" a time", prefix=prefix, max_new_tokens=3).text == expected


def test_a_forked_child_uses_it(model: Model) -> None:
    """Whatever the parent's threads hold at that moment."""
    with model.prefix("Once upon") as prefix:
        expected = model.generate(" a time", prefix=prefix, max_new_tokens=3).text

        def child() -> None:
            signal.alarm(60)
            assert model.generate(" a time", prefix=prefix, max_new_tokens=3).text == expected
            prefix.close()

        with prefix._lock, prefix._cache.reading():
            threads = threading.Thread(target=lambda: None)
            threads.start()
            threads.join()
            pid = fork_in_thread(child)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def fork_in_thread(work: Callable[[], None]) -> int:
    """From another thread than the one that holds locks now."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(fork, work).result()


def test_any_cache_that_has_room(model: Model) -> None:
    """However its length is rounded."""
    with model.prefix([5 + n for n in range(45)]) as prefix:
        expected = model.generate([9], max_new_tokens=1, prefix=prefix).token_ids
        with Scheduler(model, max_length=47) as scheduler:
            found = scheduler.submit([9], max_new_tokens=1, prefix=prefix).result(timeout=60)
        assert found.token_ids == expected
        assert not prefix.ids.flags.writeable
    ids = np.arange(5, 50)
    with model.prefix(ids) as prefix:
        ids[:] = 7
        assert prefix.ids[0] == 5


def test_what_cannot_be_a_prefix(model: Model, mini_bundle: Path) -> None:
    for nothing in ([], "", None):
        with pytest.raises(RequestError, match="the prefix cannot be used: "):
            model.prefix(nothing)  # type: ignore[arg-type]
    for length in (512, 513):
        with pytest.raises(
            ContextLengthError, match=f"prefix has {length} tokens and the model 512"
        ):
            model.prefix([5] * length)
    with pytest.raises(RequestError, match="prefix is of type str, expected one of Model"):
        model.generate("a", prefix="text")  # type: ignore[call-overload]
    with (
        neo_runtime.load(mini_bundle, threads=1) as other,
        other.prefix("Once") as prefix,
        pytest.raises(RequestError, match="another model's"),
    ):
        model.generate("a", prefix=prefix)
    with model.prefix([5] * 500) as prefix:
        with pytest.raises(ContextLengthError, match="after a prompt of 503 tokens needs 523"):
            model.generate([6, 7, 8], max_new_tokens=20, prefix=prefix)
        with pytest.raises(RequestError, match="prompt is empty"):
            model.generate([[]], prefix=prefix)
        assert len(model.generate([6], max_new_tokens=11, ignore_eos=True, prefix=prefix).token_ids)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=1000) as small:
        with pytest.raises(CacheLimitError, match="max_cache_bytes"):
            small.prefix("Once")
        assert small.cache_bytes_in_use == 0


def test_caches_that_cannot_be_copied(model: Model) -> None:
    with model.new_cache(2, 32) as cache, model.new_cache(1, 48) as longer:
        model.prefill(longer, [[1, 2]])
        cache.copy_from(longer, [0])
        model.prefill(longer, [[1] * 31])
        with pytest.raises(RequestError, match="sequence of 33 positions, expected at most 32"):
            cache.copy_from(longer, [1])
        cache.reorder([])
        cache.extend(2)
        with pytest.raises(RequestError, match="another cache of this model"):
            cache.copy_from(cache, [0])
        with model.new_cache(1, 16) as source:
            model.prefill(source, [[1, 2, 3]])
            for rows, message in (
                ([0, 0], "expected empty ones, each once"),
                ([2], "copy_from got rows"),
            ):
                with pytest.raises(RequestError, match=message):
                    cache.copy_from(source, rows)
            cache.copy_from(source, [1])
            with pytest.raises(RequestError, match="expected empty ones"):
                cache.copy_from(source, [1])
            source.reorder([])
            with pytest.raises(RequestError, match="with a sequence"):
                cache.copy_from(source, [0])
        assert cache.lengths.tolist() == [0, 3]


def test_the_command(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`neo-generate --prefix-file`: streamed, several, JSON lines."""
    file, prompts = tmp_path / "examples.txt", tmp_path / "prompts.jsonl"
    file.write_text("One day.\n", encoding="utf-8")
    prompts.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    with neo_runtime.load(mini_bundle, threads=1) as model, model.prefix("One day.\n") as prefix:
        expected = [c.text for c in model.generate(QUESTIONS, max_new_tokens=9, prefix=prefix)]
    command = [str(mini_bundle), "--max-new-tokens", "9", "--prefix-file", str(file)]
    assert main([*command, QUESTIONS[0], "--echo"]) == 0
    assert capsys.readouterr().out == f"One day.\n{QUESTIONS[0]}{expected[0]}\n"
    assert main([*command, "--prompts-file", str(prompts), "--echo"]) == 0
    texts = [f"One day.\n{q}{text}\n" for q, text in zip(QUESTIONS, expected, strict=True)]
    assert capsys.readouterr().out == "---\n".join(texts)
    assert main([*command, "--prompts-file", str(prompts), "--json-lines"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == expected
    for flags, message in (
        (["--max-new-tokens", "505", "--json-lines"], "needs 5"),
        (["--prefix-file", str(tmp_path / "none")], "none"),
        (["--prefix-file", str(mini_bundle / "weights.bin")], "not valid UTF-8"),
    ):
        assert main([*command, QUESTIONS[0], *flags]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert message in printed.err
    for twice in ([], ["--prompts-file", "-"]):
        assert main([str(mini_bundle), "--prefix-file", "-", *twice]) == 2
        assert "the prefix and the prompts are to come from standard" in capsys.readouterr().err
