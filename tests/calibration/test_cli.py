"""`neo-calibrate` and `neo-export --calibrate-text` as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.models import DEMO, TinyConfig, make_checkpoint
from neo_calibration.auto.__main__ import main as search
from neo_calibration.cli import main
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.checkpoint.safetensors_file import SafetensorsFile
from neo_export.command.cli import main as export
from neo_export.decisions.calibrated import uses_gptq
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.statistics.folder import Statistics
from neo_export.targets import TARGETS
from neo_runtime.errors import StatisticsError
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

STORY = "Once upon a time there was a little boat that wanted to see the sea. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(STORY * 40, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the demo model; read only."""
    return calibrate(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def without_moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without second moments."""
    return calibrate(tmp_path_factory.mktemp("without"), "--second-moments", "none")


def calibrate(folder: Path, *flags: str) -> Path:
    (folder / "text.txt").write_text(STORY * 10, encoding="utf-8")
    command = [str(DEMO), "--text", str(folder / "text.txt"), "-o", str(folder / "stats")]
    assert main([*command, *flags]) == 0
    return folder / "stats"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs, expects status 2 and nothing on stdout; stderr's last line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from neo_calibration.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'onnx', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--second-moments" in done.stdout


def test_a_summary_on_stdout_and_progress_on_stderr(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "stats"
    command = [str(DEMO), "--text", str(text), "-o", str(output)]
    assert main([*command, "--second-moments", "none", "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["tokens"] == Statistics.open(output).tokens > 500
    assert summary["bytes"] == sum(file.stat().st_size for file in output.iterdir())
    assert summary["peak_private_bytes"] > 0
    assert "layer 4 of 4, 75 %" in err
    assert "positions/s" in err
    assert "the text has only" in err
    assert summary["warnings"]
    with pytest.raises(StatisticsError, match="--second-moments full"):
        Statistics.open(output).second_moment("transformer.h.0.gelu")
    assert Statistics.open(output).likely() is None
    assert "exists already" in fails(capsys, *command)
    assert main([*command, "--force", "--tokens", "100"]) == 0
    assert "statistics  " in capsys.readouterr().out


def test_a_model_without_a_tokenizer_takes_another_ones(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the text of `neo-export --calibrate-text`, and in the bundle."""
    bare = tmp_path / "bare"
    shutil.copytree(DEMO, bare, ignore=shutil.ignore_patterns("token*"))
    asked = ["--calibrate-text", str(text), "--fp16", "--target", "cpu"]
    digests = []
    for model, more in ((DEMO, []), (bare, ["--tokenizer", str(DEMO)])):
        output = tmp_path / f"bundle-{len(digests)}"
        assert export([str(model), "-o", str(output), *asked, *more, "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out)["digest"])
    assert digests[0] == digests[1]
    assert export([str(bare), "-o", str(tmp_path / "none"), *asked]) == 2


def test_what_is_not_of_statistics_is_not_lost(
    made: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = shutil.copytree(made, tmp_path / "stats")
    command = [str(DEMO), "--text", str(text), "-o", str(stats), "--force", "--tokens", "100"]
    (stats / "notes").mkdir()
    (stats / "notes" / "evening.txt").write_text("work")
    (stats / "mine.safetensors").write_text("work")
    assert "lost: mine.safetensors, notes/evening.txt; move" in fails(capsys, *command)
    (stats / "mine.safetensors").unlink()
    shutil.rmtree(stats / "notes")
    (stats / "transformer.h.1.safetensors").write_bytes(b"damaged")
    (stats / "statistics.json").write_text('{"half')
    assert main(command) == 0
    capsys.readouterr()
    (stats / "statistics.json").write_text('{"my": "own"}')
    assert "lost: statistics.json; move" in fails(capsys, *command)


def test_jsonl_and_text_give_the_same_tokens(tmp_path: Path) -> None:
    stories = [STORY, "It had a blue sail.\u2028And a name."]
    lines = [json.dumps(stories[0]), json.dumps({"text": stories[1]}, ensure_ascii=False)]
    (tmp_path / "one.txt").write_text(stories[0], encoding="utf-8")
    (tmp_path / "two.txt").write_text(stories[1], encoding="utf-8")
    (tmp_path / "both.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    digests = []
    for name, files in (("a", ("one.txt", "two.txt")), ("b", ("both.jsonl",))):
        flags = [part for file in files for part in ("--text", str(tmp_path / file))]
        assert main([str(DEMO), *flags, "-o", str(tmp_path / name)]) == 0
        digests.append(Statistics.open(tmp_path / name).header.text["digest"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("short.txt", b"the", "short.txt holds one token; expected several thousand words"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "bad.jsonl, line 2 is not valid JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1 does not contain a document"),
    ],
)
def test_text_that_cannot_be_used(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    error = fails(capsys, str(DEMO), "--text", str(tmp_path / name), "-o", str(tmp_path / "stats"))
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_bad_input(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ("-o", str(tmp_path / "stats"))
    absent = fails(capsys, str(DEMO), "--text", str(tmp_path / "absent.txt"), *output)
    assert "absent.txt cannot be read" in absent
    flags = (str(DEMO), "--text", str(text), *output)
    assert "expected 1 to 512" in fails(capsys, *flags, "--max-length", "513")
    assert "expected at least 2" in fails(capsys, *flags, "--tokens", "1")
    assert "does not exist" in fails(capsys, str(tmp_path / "nothing"), *flags[1:])
    tiny = make_checkpoint(tmp_path / "tiny", TinyConfig())
    assert "has no tokenizer" in fails(capsys, str(tiny), *flags[1:])
    assert not (tmp_path / "stats").exists()


def damaged(folder: Path, name: str, value: float) -> Path:
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][...] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_in_a_layer_is_named(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "transformer.h.2.mlp.c_fc.bias"
    for value in (np.nan, 3e38):  # the second is a number, and overflows behind the activation
        checkpoint = damaged(tmp_path / f"checkpoint-{value}", name, value)
        error = fails(capsys, str(checkpoint), "--text", str(text), "-o", str(tmp_path / "stats"))
        assert "transformer.h.2." in error
        assert "NaN" in error
        assert not (tmp_path / "stats").exists()


def test_no_context_reaches_past_the_window(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(DEMO), "--text", str(text), "-o", str(tmp_path / "stats")]
    assert main([*command, "--max-length", "64"]) == 0
    assert (
        "window 64), so the statistics do not cover what local layers do beyond it"
        in capsys.readouterr().err
    )


def test_statistics_of_another_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    name = "transformer.h.3.mlp.c_fc.bias"
    others = {
        f"other values of {name!r}": damaged(tmp_path / "tuned", name, 0.5),
        "vocab_size 4096": make_checkpoint(tmp_path / "tiny", TinyConfig()),
    }
    for message, other in others.items():
        for command in (("--int8",), ("--fp16", "--target", "portable")):
            flags = [str(other), "-o", str(tmp_path / "bundle"), "--calibration", str(made)]
            assert export([*flags, *command]) == 2
            error = capsys.readouterr().err
            assert "statistics of another model" in error
            assert message in error
            assert not (tmp_path / "bundle").exists()


INT8_PLAN = {"schema_version": 1, "default": "int8", "weights": {"*.mlp.*": "fp32"}}


@pytest.mark.parametrize(
    "flags",
    ["--int4", "--int8", "--plan {plan}", "--int4 --target cuda", "--int4 --kv-cache int8"],
)
def test_gptq_needs_second_moments(
    flags: str, without_moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything else is done, by what was found, expected, and can be done."""
    (tmp_path / "plan.json").write_text(json.dumps(INT8_PLAN))
    capsys.readouterr()
    given = flags.format(plan=tmp_path / "plan.json").split()
    assert export(["-o", str(tmp_path / "b"), *given, "--calibration", str(without_moments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{without_moments} has no second moments" in line
    assert "GPTQ" in line
    assert "Run neo-calibrate with --second-moments full" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "flags",
    ["--fp16 --target portable", "--kv-cache int8", "--int8 --target tensorrt", "--plan {plan}"],
)
def test_what_needs_none(flags: str, without_moments: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1, "default": "fp32", "weights": {}}')
    given = flags.format(plan=tmp_path / "plan.json").split()
    assert export(["-o", str(tmp_path / "b"), *given, "--calibration", str(without_moments)]) == 0


def test_a_search_needs_second_moments(
    without_moments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    text = str(without_moments.parent / "text.txt")
    command = [str(DEMO), "--text", text, "--statistics", str(without_moments), "--max-kl", "1"]
    assert search([*command, "-o", str(tmp_path / "plan.json")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"neo-auto: {without_moments} has no second moments" in line


def test_an_untied_table_that_is_looked_up_needs_none() -> None:
    """It is no input of a product: GPTQ only rounds it."""
    with open_checkpoint(DEMO) as checkpoint:
        target, spec = TARGETS["cpu"], checkpoint.spec
    plan = WeightPlan(Storage("fp32"), (("transformer.wte.weight", Storage("int8")),))
    assert uses_gptq(target, plan, replace(spec, tie_word_embeddings=True))
    assert not uses_gptq(target, plan, replace(spec, tie_word_embeddings=False))
    assert not uses_gptq(TARGETS["tensorrt"], WeightPlan.uniform("int8"), spec)


@pytest.mark.parametrize(
    "damage", ["absent", "truncated", "json", "nested", "version", "one token", "nan"]
)
def test_damaged_statistics(damage: str, made: Path, tmp_path: Path) -> None:
    stats = shutil.copytree(made, tmp_path / "stats")
    header = stats / "statistics.json"
    file = stats / "transformer.h.1.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "json":
        header.write_text(header.read_text()[:-20])
    elif damage == "nested":
        header.write_text("[" * 100_000)
    elif damage == "nan":
        tensor = SafetensorsFile(file).tensors["transformer.h.1.key.high"]
        values, data = tensor.read(), bytearray(file.read_bytes())
        at = data.find(values.tobytes())
        data[at : at + 4] = b"\xff" * 4
        file.write_bytes(data)
    elif damage == "one token":
        raw = json.loads(header.read_text())
        raw["text"]["tokens"] = 1
        header.write_text(json.dumps(raw))
    else:
        header.write_text(header.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StatisticsError, match=r"calibrate"):
        Statistics.open(stats).channel_max("transformer.h.1.key")
    with pytest.raises(StatisticsError, match=r"holds no statistics.json"):
        Statistics.open(tmp_path)


def test_export_calibrates_by_itself(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    command = ["-o", str(bundle), "--int8", "--calibrate-text", str(text), "--json"]
    assert export(command) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["moved_places"] == []
    assert "neo-calibrate: layer 4 of 4" in err
    assert "looking for outliers" in err
    assert export(command) == 2
    err = capfd.readouterr().err
    assert "exists already" in err
    assert "neo-calibrate" not in err, "nothing is run for nothing"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--int8 --target portable", "target portable does not support precision 'int8'"),
        ("--int8 --max-length 999", "--max-length is 999, expected 1 to 512"),
        ("--fp16 --kv-cache int8", "cannot be combined with target cuda; use --target cpu"),
        ("--fp16 --target cpu --kv-cache int8", "needs float32 activations"),
        ("--int8 --kv-cache int8 --target tensorrt", "cannot be combined with target tensorrt"),
        ("--int4 --int8-prefill --target tensorrt", "--int8-prefill was given with target"),
        ("--int4 --block-size 128", "block size 128 does not fit transformer.wte.weight"),
        ("--int4 --block-size 0", "block size 0 does not fit"),
        ("--int8 --keep-fp32 *.c_porj.weight", "'*.c_porj.weight' matches no weight matrix"),
        ("--plan {plan}", "the plan: 'transformer.h.9.mlp.c_fc.weight' matches no weight"),
        ("--auto --max-kl 0.5 --max-length 999", "--max-length is 999"),
        ("--auto --max-kl 0.5 --keep-fp32 none", "'none' matches no weight matrix"),
    ],
)
def test_what_cannot_be_exported_is_told_before_hours_of_work(
    flags: str, message: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storages = {"transformer.h.9.mlp.c_fc.weight": "int8"}
    plan = {"schema_version": 1, "default": "int8", "weights": storages}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given = flags.format(plan=tmp_path / "plan.json").split()
    assert export(["-o", str(tmp_path / "bundle"), *given, "--calibrate-text", str(text)]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1, "nothing was begun"


@pytest.mark.parametrize("precision", ["--int8", "--int4"])
def test_two_tokens_are_text(
    precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    command = ["-o", str(tmp_path / "bundle"), precision, "--calibrate-text", str(short)]
    assert export(command) == 0
    assert "the text has only 2 tokens" in capfd.readouterr().err


def test_export_says_when_calibration_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    command = ["-o", str(tmp_path / "bundle"), "--calibrate-text", str(empty)]
    assert export([*command, "--int8"]) == 2
    err = capfd.readouterr().err
    assert "holds no text" in err
    assert "failed (exit status 2); see its message above" in err
    assert not (tmp_path / "bundle").exists()
    assert export([*command, "--fp32"]) == 2
    assert "--calibrate-text cannot be combined with --fp32" in capfd.readouterr().err


def test_a_copy_elsewhere_is_the_same_model(made: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "copy")
    with open_checkpoint(tmp_path / "copy") as checkpoint:
        Statistics.open(made).check_model(checkpoint)
