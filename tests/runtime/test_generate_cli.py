"""`neo-generate`, called as a function and as a process."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.derived_bundles import without_tokenizer
from neo_runtime.cached_model import CachedModel
from neo_runtime.command.generate import main
from neo_runtime.command.options import add_option_flags, chosen_options
from neo_runtime.command.prompts import read_prompts
from neo_runtime.options.generation_options import GenerationOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_it_prints_the_continuation(
    mini_bundle: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(PROMPT, max_new_tokens=30).text
    assert main([str(mini_bundle), PROMPT, "--max-new-tokens", "30", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert printed.err == ""
    flags = ["--max-new-tokens", "30", "--echo", "--timings", "--verify"]
    assert main([str(mini_bundle), PROMPT, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{PROMPT}{expected}\n"
    assert "30 tokens" in printed.err


def test_it_reads_standard_input(
    mini_bundle: Path,
    model: Model,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin(monkeypatch, b"One day,\nTom\n")
    assert main([str(mini_bundle), "--max-new-tokens", "5"]) == 0
    expected = model.generate("One day,\nTom", max_new_tokens=5).text
    assert capsys.readouterr().out == f"{expected}\n"
    for data, message in ((b"", "prompt is empty"), (b"\n", "empty"), (b"\xff\xfe", "UTF-8")):
        stdin(monkeypatch, data)
        assert main([str(mini_bundle)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert printed.err.count("\n") == 1


def test_the_prompt_may_stand_anywhere(
    mini_bundle: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(PROMPT, max_new_tokens=5).text
    few = ["--max-new-tokens", "5"]
    for arguments in ([str(mini_bundle), *few, PROMPT], [*few, str(mini_bundle), PROMPT]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"{expected}\n"


def test_a_prompt_behind_two_dashes_is_no_option(
    mini_bundle: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate("--json", max_new_tokens=5).text
    few = ["--max-new-tokens", "5"]
    for arguments in (
        [*few, "--", str(mini_bundle), "--json"],
        [*few, str(mini_bundle), "--", "--json"],
        [str(mini_bundle), *few, "--", "--json"],
        [str(mini_bundle), "--", "--json"],
    ):
        wanted = expected if few[0] in arguments else model.generate("--json").text
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"{wanted}\n"
    dashes = model.generate("--", max_new_tokens=5).text
    assert main([str(mini_bundle), *few, "--", "--"]) == 0
    assert capsys.readouterr().out == f"{dashes}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b", "--threads", "1", "--", "x", "--json"], "unrecognized arguments: --json"),
        (["b", "x", "--threads", "1", "y"], "unrecognized arguments: y"),
        (["b", "x", "--", "y", "z"], "unrecognized arguments: y z"),
        (["--jsn", "--", "b"], "unrecognized arguments: --jsn"),
        ([], "arguments are required: BUNDLE"),
        (["--json", "--"], "arguments are required: BUNDLE"),
        (["--json", "b", "--json-lines"], "not allowed with argument --json"),
    ],
)
def test_too_many_or_too_few(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_json_holds_everything(
    mini_bundle: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--max-new-tokens", "40", "--logprobs", "2", "--stop", "girl", "--stop", "q"]
    assert main([str(mini_bundle), PROMPT, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = model.generate(PROMPT, max_new_tokens=40, logprobs=2, stop=["girl", "q"])
    assert report["bundle"] == str(mini_bundle)
    [found] = report["completions"]
    assert set(found) == {spec.name for spec in dataclasses.fields(expected)}
    assert (found["text"], found["stop"], found["finish_reason"]) == (expected.text, "girl", "stop")
    assert tuple(found["token_ids"]) == expected.token_ids
    assert tuple(found["prompt_token_ids"]) == expected.prompt_token_ids
    assert found["timings"]["prefill_seconds"] > 0
    assert expected.logprobs is not None
    assert [entry["token"] for entry in found["logprobs"]] == list(expected.token_ids)
    assert "".join(entry["text"] for entry in found["logprobs"]).startswith(found["text"])
    assert [len(entry["top_logprobs"]) for entry in found["logprobs"]] == [2] * len(
        expected.token_ids
    )


def test_several_completions_and_prompts(
    mini_bundle: Path,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {
        "do_sample": True, "seed": 4, "max_new_tokens": 8, "num_return_sequences": 2
    }  # fmt: skip
    flags = ["--do-sample", "--seed", "4", "--max-new-tokens", "8", "--num-return-sequences", "2"]
    texts = [c.text for c in model.generate([PROMPT], **options)]
    assert main([str(mini_bundle), PROMPT, *flags]) == 0
    assert capsys.readouterr().out == "\n---\n".join(map(str, texts)) + "\n"

    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"Tom"\n\n{"text": "Sue said", "prompt": "Sue"}\n{"text": "The dog"}\n[5, 6, 7]\n'
        '{"content": "A"}\n'
    )
    prompts: list[Any] = ["Tom", "Sue", "The dog", [5, 6, 7], "A"]
    texts = [c.text for c in model.generate(prompts, **options)]
    flags += ["--batch-size", "3"]
    assert main([str(mini_bundle), *flags, "--prompts-file", str(path)]) == 0
    assert capsys.readouterr().out == "\n---\n".join(map(str, texts)) + "\n"
    stdin(monkeypatch, b"\xef\xbb\xbf" + path.read_bytes())
    assert main([str(mini_bundle), *flags, "--prompts-file", "-"]) == 0
    assert capsys.readouterr().out == "\n---\n".join(map(str, texts)) + "\n"

    beams = model.generate(PROMPT, num_beams=3, max_new_tokens=9).text
    assert main([str(mini_bundle), PROMPT, "--num-beams", "3", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == f"{beams}\n"


def test_a_line_of_json_may_hold_any_line_break_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = ["a\u2028b", "c\x85d", "e\nf"]
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert [given.prompt for given in read_prompts(None, str(path), ids=False)] == prompts


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each cache."""
    found: list[int] = []
    new_cache = CachedModel.new_cache

    def watched(model: CachedModel, batch: int, length: int) -> Any:
        found.append(batch)
        return new_cache(model, batch, length)

    monkeypatch.setattr(CachedModel, "new_cache", watched)
    return found


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Ten prompts, some with an "id"."""
    lines: list[object] = ["Tom", {"text": "Sue", "id": "x-1"}, {"prompt": "A dog", "id": None}]
    lines += [[5, 6, 7], {"prompt": [8, 9], "id": {"n": 4}}, *["One day"] * 5]
    path = tmp_path / "many.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], [10]),
        (["--batch-size", "4"], [4]),
        (["--do-sample", "--seed", "4", "--num-return-sequences", "3"], [16]),
        (["--do-sample", "--seed", "4", "--num-return-sequences", "3", "--batch-size", "2"], [6]),
        (["--num-beams", "2", "--num-return-sequences", "2"], [2] * 10),
        (["--logprobs", "1", "--bad-words", "girl"], [10]),
        (["--prompt-lookup"], [1] * 10),
    ],
)
def test_json_lines(
    flags: list[str],
    sizes: list[int],
    mini_bundle: Path,
    many: Path,
    caches: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same completions as with --json, each on a line with what finds it again."""
    command = [str(mini_bundle), "--prompts-file", str(many), "--max-new-tokens", "6", *flags]
    assert main([*command, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["completions"]
    caches.clear()
    assert main([*command, "--json-lines", "--timings"]) == 0
    printed = capsys.readouterr()
    assert caches == sizes
    assert printed.err.count("prompt of") == len(expected)
    lines = [json.loads(line) for line in printed.out.splitlines()]
    copies = len(expected) // 10
    assert [line.pop("index") for line in lines] == [i for i in range(10) for _ in range(copies)]
    ids = [line.pop("id", "none") for line in lines[::copies]]
    assert ids == ["none", "x-1", None, "none", {"n": 4}, *["none"] * 5]
    for line, wanted in zip(lines, expected, strict=True):
        line.pop("id", None)
        for name in ("text", "token_ids", "prompt_token_ids", "finish_reason"):
            assert line[name] == wanted[name]
        assert set(line) == set(wanted)


def test_a_batch_of_json_lines_is_as_large_as_asked(
    mini_bundle: Path, tmp_path: Path, caches: list[int]
) -> None:
    """Larger than what is computed together by default, too; and as small as memory asks for."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("[1]\n" * 45)
    command = [str(mini_bundle), "--prompts-file", str(path), "--json-lines"]
    command += ["--max-new-tokens", "1"]
    assert main([*command, "--batch-size", "20"]) == 0
    assert caches == [20]
    with neo_runtime.load(mini_bundle) as model:
        one = model.cache_bytes(1, 300)
        room = str(9 * one // 10**6)
    caches.clear()
    path.write_text(f"{[1] * 299}\n" * 45)
    assert main([*command, "--max-cache-mb", room]) == 0
    assert caches == [8]
    assert main([*command, "--max-cache-mb", room, "--batch-size", "20"]) == 2


def test_places_are_taken_as_soon_as_they_are_free(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next prompt, not by the next batch; lines come in the order of the prompts."""
    rows: list[int] = []
    decode = CachedModel.decode_step

    def watched(model: CachedModel, cache: Any, tokens: Any) -> Any:
        rows.append(len(tokens))
        return decode(model, cache, tokens)

    monkeypatch.setattr(CachedModel, "decode_step", watched)
    lengths = [90, 30, 92, 91, 3, 93, 92]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps([7] * n)}\n" for n in lengths))
    command = [str(mini_bundle), "--prompts-file", str(path), "--json-lines", "--batch-size", "2"]
    assert main([*command, "--max-length", "100", "--ignore-eos"]) == 0
    left = sum(100 - n - 1 for n in lengths)
    assert sum(rows) == left
    # By batches it would be 9 + 7 + 6: the long ones would wait for each other.
    assert rows.count(2) > 70


def test_what_is_done_is_out_before_a_late_failure(mini_bundle: Path, many: Path) -> None:
    """The lines of the first ones are in the file, though nobody flushes after the failure."""
    code = (
        "import os, sys\n"
        "import neo_runtime\n"
        "from neo_runtime.command import output\n"
        "from neo_runtime.command.generate import main\n"
        "as_text, calls = output.json_text, []\n"
        "def fails(*arguments, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        os._exit(7)\n"
        "    return as_text(*arguments, **options)\n"
        "output.json_text = fails\n"
        "main(sys.argv[1:])\n"
    )
    flags = ["--prompts-file", str(many), "--json-lines", "--batch-size", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(mini_bundle), *flags, "--max-new-tokens", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7, done.stderr
    assert [json.loads(line)["index"] for line in done.stdout.splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "last", "message"),
    [
        ([], [4096 * 4], "prompts[10]: token id 16384"),
        ([], [1] * 600, "prompts[10]: "),
        (["--batch-size", "0"], "Tom", "--batch-size is 0"),
        (["--batch-size", "-1"], "Tom", "--batch-size is -1"),
    ],
)
def test_json_lines_are_refused_before_any_work(
    flags: list[str],
    last: object,
    message: str,
    mini_bundle: Path,
    many: Path,
    caches: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    many.write_text(f"{many.read_text()}\n{json.dumps(last)}\n")
    assert main([str(mini_bundle), "--prompts-file", str(many), "--json-lines", *flags]) == 2
    printed = capsys.readouterr()
    assert (printed.out, caches) == ("", [])
    assert message in printed.err


def test_one_prompt_as_a_json_line(
    mini_bundle: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(mini_bundle), PROMPT, "--json-lines", "--max-new-tokens", "5"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["index"], found["text"]) == (0, model.generate(PROMPT, max_new_tokens=5).text)


def test_other_encodings_than_utf8(mini_bundle: Path, model: Model, tmp_path: Path) -> None:
    """JSON is UTF-8 on stdin, and loses nothing on stdout; plain text is the locale's."""
    (tmp_path / "bündel").symlink_to(mini_bundle)
    prompt = "“Tom” naïve"

    def run(flags: list[str], given: bytes, encoding: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "neo_runtime.command.generate", "bündel", *flags]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        return subprocess.run(
            [*command, "--max-new-tokens", "3"],
            input=given,
            capture_output=True,
            cwd=tmp_path,
            env=environment,
        )

    line = json.dumps(prompt, ensure_ascii=False).encode()
    for encoding in ("ascii", "latin-1", "utf-8"):
        done = run(["--json", "--prompts-file", "-"], line, encoding)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.decode(encoding))
        assert report["bundle"] == "bündel"
        assert model.tokenizer is not None
        assert model.tokenizer.decode(report["completions"][0]["prompt_token_ids"]) == prompt
    done = run(["--echo"], "naïve\n".encode("latin-1"), "latin-1")
    assert done.stdout.decode("latin-1").startswith("naïve")
    done = run([], prompt.encode(), "ascii")
    assert done.returncode == 2
    assert b"the prompt is not valid ASCII" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes streams with a shell")
def test_closed_streams(mini_bundle: Path) -> None:
    def run(arguments: str, redirection: str) -> tuple[int, str, str]:
        program = 'exec "$0" -m neo_runtime.command.generate "$1" --max-new-tokens 3'
        script = f"{program} {arguments} {redirection}"
        done = subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, str(mini_bundle)],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    expected = run("Tom", "")
    assert expected[0] == 0
    assert run("Tom", "<&-") == expected
    assert run("Tom", ">&-") == (0, "", "")
    assert run("Tom", "2>&-") == expected
    closed = "neo-generate: standard input is closed; give PROMPT, or a --prompts-file\n"
    assert run("", "<&-") == (2, "", closed)
    assert run("--prompts-file -", "<&-") == (2, "", closed)
    assert run("", "<&- 2>&- >&-") == (2, "", "")


def test_token_ids(
    mini_bundle: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(map(str, model.generate([5, 6, 7], max_new_tokens=6).token_ids))
    bare = without_tokenizer(mini_bundle, tmp_path / "ids")
    for bundle in (mini_bundle, bare):
        assert main([str(bundle), "5, 6 7", "--token-ids", "--max-new-tokens", "6"]) == 0
        assert capsys.readouterr().out == f"{ids}\n"
        flags = ["--token-ids", "--max-new-tokens", "6", "--echo"]
        assert main([str(bundle), "5,6,7", *flags]) == 0
        assert capsys.readouterr().out == f"5,6,7,{ids}\n"
    assert main([str(bare), PROMPT]) == 2
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["hi", "--batch-size", "0"], "--batch-size is 0, expected an integer of at least 1"),
        (["hi", "--max-cache-mb", "0"], "--max-cache-mb is 0, expected an integer of at least 1"),
        (["1,,2", "--token-ids"], "'1,,2' is not a list of ids such as 1,2,3"),
        (["--prompts-file", "{prompts}"], "line 1 is not valid JSON (NaN is not a JSON number)"),
    ],
)
def test_wrong_usage(
    flags: list[str],
    said: str,
    mini_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "id": NaN}\n')
    assert main([str(mini_bundle), *(flag.format(prompts=prompts) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_every_option_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    options = {spec.name for spec in dataclasses.fields(GenerationOptions)}
    assert flags == (options | {"bad_words"}) - {"logits_processor", "grammar"}, (
        "functions are Python's"
    )
    line = (
        "--stop a --stop b --logit-bias 3=-1.5 --logit-bias 4=2 --sequence-bias 1,2=0.5 "
        "--bad-words-ids 7,8 --bad-words-ids 9 --eos-token-id 1,2 --early-stopping true "
        "--exponential-decay-length-penalty 5,1.1 --no-do-sample --num-beams 2 --min-length 7"
    )
    chosen = chosen_options(parser.parse_args(line.split()))
    assert chosen == {
        "stop": ["a", "b"],
        "logit_bias": {3: -1.5, 4: 2.0},
        "sequence_bias": [((1, 2), 0.5)],
        "bad_words_ids": [[7, 8], [9]],
        "eos_token_id": [1, 2],
        "early_stopping": True,
        "exponential_decay_length_penalty": (5, 1.1),
        "do_sample": False,
        "num_beams": 2,
        "min_length": 7,
    }
    assert chosen_options(parser.parse_args([])) == {}
    GenerationOptions().merged(**chosen)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "2", "--do-sample"], "top_p is 2"),
        (["--temperature", "2"], "do_sample"),
        (["--temprature", "2"], "unrecognized arguments: --temprature"),
        (["--max-new-tokens", "x"], "invalid int value"),
        (["--logit-bias", "x"], "invalid ID=BIAS value"),
        (["--max-new-tokens", "600"], "600"),
        (["--logprobs", "2"], "--json"),
        (["--token-ids"], "not a list of ids"),
        (["--threads", "0"], "threads is 0"),
        (["--truncate-prompt-tokens", "0"], "truncate-prompt-tokens is 0"),
        (["--truncate-prompt-tokens", "-1", "--max-new-tokens", "512"], "leaves none for a prompt"),
        (["--max-cache-mb", "1", "--max-new-tokens", "400"], "max_cache_bytes"),
        (["--prompts-file", "p.jsonl"], "exclude each other"),
        (["--bad-words-ids", "5000"], "5000"),
    ],
)
def test_an_error_is_one_line(
    flags: list[str], message: str, mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        sys.exit(main([str(mini_bundle), PROMPT, *flags]))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("neo-generate: ")
    assert printed.err.count("\n") == 1


def test_files_that_cannot_be_used(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    for contents, message in (
        (b"\n", "holds no prompts"),
        (b'"a"\n{', "line 2 is not valid JSON"),
        (b'"a"\n{"b": 1}', "line 2 holds no prompt"),
        (b"\xff", "UTF-8"),
    ):
        path.write_bytes(contents)
        assert main([str(mini_bundle), "--prompts-file", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(mini_bundle), "--prompts-file", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), PROMPT]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_interruption_is_quiet(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neo_runtime.model.Model.decode_step", interrupt)
    assert main([str(mini_bundle), PROMPT]) == 130
    assert capsys.readouterr().err == ""


def test_a_process_streams_and_leaves_quietly_when_nobody_reads(mini_bundle: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "neo_runtime.command.generate",
        str(mini_bundle),
        PROMPT,
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys\n"
        "sys.modules['numpy'] = sys.modules['onnxruntime'] = sys.modules['tokenizers'] = None\n"
        "from neo_runtime.command.generate import main\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--repetition-penalty" in done.stdout


def test_how_a_bundle_is_loaded(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, Any]] = []
    load = neo_runtime.load

    def watched(bundle: str, **options: Any) -> Any:
        given.append(options)
        return load(bundle, **options)

    monkeypatch.setattr("neo_runtime.loading.load", watched)
    line = [str(mini_bundle), "Once", "--max-new-tokens", "3"]
    assert main(line) == 0
    assert main([*line, "--prefill-chunk", "16", "--no-keep-prepacked", "--verify"]) == 0
    first, second = ({name: one[name] for name in LOADED} for one in given)
    assert first == {"prefill_chunk": None, "keep_prepacked": None, "verify": False}
    assert second == {"prefill_chunk": 16, "keep_prepacked": False, "verify": True}
    capsys.readouterr()
    assert main([*line, "--prefill-chunk", "0"]) == 2
    assert "--prefill-chunk is 0, expected an integer of at least 1" in capsys.readouterr().err


LOADED = ("prefill_chunk", "keep_prepacked", "verify")


def test_a_dash_is_standard_input(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(mini_bundle), "Tom had", "--max-new-tokens", "5"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Tom had\n"))
    assert main([str(mini_bundle), "-", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == expected


def test_an_echo_has_special_tokens(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it is printed."""
    prompt = "Once<|endoftext|>upon"
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    few = ["--max-new-tokens", "2", "--echo"]
    for line in (
        [prompt],
        [prompt, "--num-beams", "2"],
        ["--prompts-file", str(tmp_path / "prompts.jsonl")],
    ):
        assert main([str(mini_bundle), *line, *few]) == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_prompts_keep_their_last_tokens(
    mini_bundle: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that is too long does not cost the others."""
    file, begin = tmp_path / "prompts.jsonl", tmp_path / "begin.txt"
    file.write_text('"a dog"\n' + json.dumps({"id": 7, "prompt": "the cat sat " * 400}) + "\n")
    begin.write_text("Once upon a time")
    command = [str(mini_bundle), "--prompts-file", str(file), "--json-lines", "--threads", "1"]
    assert main([*command, "--max-new-tokens", "5"]) == 2
    assert "prompts[1]: the prompt has 1201 tokens" in capsys.readouterr().err
    whole = [ids.tolist() for ids in model.encode_prompts(["a dog", "the cat sat " * 400])]
    shared = model.encode_prompts(["Once upon a time"])[0].tolist()
    for flags, kept, before in (
        (["--max-new-tokens", "5"], 512 - 5, []),
        (["--max-length", "40"], 39, []),
        ([], 512 - 256, []),
        (["--max-new-tokens", "5", "--prefix-file", str(begin)], 512 - 5 - len(shared), shared),
    ):
        assert main([*command, *flags, "--truncate-prompt-tokens", "-1"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = [line["prompt_token_ids"] for line in lines]
        assert found == [before + ids[-kept:] for ids in whole]
        assert [line.get("id") for line in lines] == [None, 7]
    command = [str(mini_bundle), "the dog and the cat", "--max-new-tokens", "5", "--echo"]
    assert main([*command, "--truncate-prompt-tokens", "2"]) == 0
    [last] = [ids[-2:] for ids in model.encode_prompts(["the dog and the cat"])]
    assert model.tokenizer is not None
    text = model.tokenizer.decode(last.tolist()) + str(model.generate(last, max_new_tokens=5).text)
    assert capsys.readouterr().out == f"{text}\n"
