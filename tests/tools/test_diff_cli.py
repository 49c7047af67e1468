"""`neo-diff` as a user runs it: figures, exit statuses, files, and what it says of bad input."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers import faults
from helpers.derived_bundles import without_tokenizer
from helpers.held_out import held_out_ids, perplexity
from helpers.models import DEMO, Reference, TinyConfig, make_checkpoint
from neo_export.exporter import ExportOptions, export_bundle
from neo_tools.diff.cli import main
from neo_tools.diff.report import path_text
from onnx import helper

if TYPE_CHECKING:
    from pathlib import Path

FEW = ["--tokens", "1024", "--decode-positions", "16", "--threads", "1", "--continuations", "1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main([*map(str, arguments)])
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("int4") / "bundle"
    export_bundle(str(DEMO), bundle, ExportOptions(precision="int4"))
    return bundle


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


def test_perplexity_is_pytorchs(
    mini_bundle: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of them, over the same held-out text, computed here the plain way."""
    status, found = result(capsys, mini_bundle, "--reference", DEMO, *FEW)
    assert status == 0
    pieces = held_out_ids(2, 512)
    plain = perplexity(lambda ids: reference.logits(ids[None])[0], pieces)
    assert found["contexts"] == [512, 512]
    assert found["perplexity"]["tokens"] == 2 * 511
    assert found["perplexity"]["reference"] == pytest.approx(plain, rel=1e-4)
    assert found["perplexity"]["bundle"] == pytest.approx(plain, rel=1e-4)
    assert found["first_fault"] is None
    assert found["passed"]
    assert {graph["graph"] for graph in found["graphs"]} == {"score", "prefill", "decode", "batch"}
    assert len(found["positions"]["kl"]) == 1024


def test_what_is_wrong_in_batches_alone_is_past_the_limits(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = faults.spoiled_bundle(mini_bundle, tmp_path / "bundle", faults.other_rows())
    status, found = result(capsys, bundle, "--reference", mini_bundle, *FEW)
    assert status == 1
    whole = {g["graph"]: g["kl_mean"] for g in found["graphs"] if g["region"] == "all"}
    assert whole.pop("batch") > 0.1
    assert max(whole.values()) < 1e-9


def test_a_bundle_against_itself_is_exactly_zero(
    int4_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = result(capsys, int4_bundle, "--reference", int4_bundle, *FEW)
    assert status == 0
    assert set(found["positions"]["kl"]) == {0.0}
    score = next(graph for graph in found["graphs"] if graph["graph"] == "score")
    assert (score["kl_max"], score["top_1"], score["top_5"]) == (0.0, 1.0, 1.0)
    assert found["perplexity"]["increase"] == 0.0
    assert found["first_fault"] is None


def test_a_quantized_bundle_against_the_float_one(
    int4_bundle: Path, mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the weights' rounding loses adds up over the layers, and is no fault."""
    status, found = result(capsys, int4_bundle, "--reference", mini_bundle, *FEW)
    assert status == 0
    assert found["first_fault"] is None
    assert max(place["cumulative_max"] for place in found["places"]) > 0.2


def test_a_quantized_bundle(int4_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are those of its logits, and the summary says the same as the JSON."""
    status, found = result(capsys, int4_bundle, "--reference", DEMO, *FEW)
    assert status == 0
    [score] = [g for g in found["graphs"] if (g["graph"], g["region"]) == ("score", "all")]
    assert score["kl_mean"] == pytest.approx(np.mean(found["positions"]["kl"]))
    assert score["top_1"] == pytest.approx(np.mean(found["positions"]["top_1"]))
    increase = found["perplexity"]
    assert increase["low"] < increase["increase"] < increase["high"]
    assert increase["bundle"] / increase["reference"] - 1 == pytest.approx(increase["increase"])
    [written] = found["continuations"]
    assert written["parted_after"] is None or 0 <= written["parted_after"] < written["tokens"]
    assert sum(found["kl_histogram"]["counts"]) == 1024
    _, out, err = run(capsys, int4_bundle, "--reference", DEMO, *FEW)
    assert f"{increase['increase']:+.3%}" in out
    whole = [graph for graph in found["graphs"] if graph["region"] == "all"]
    worst = max(whole, key=lambda graph: graph["kl_mean"])
    [line] = [line for line in out.splitlines() if line.startswith("ok   mean KL ")]
    assert line.endswith(f"  ({path_text(worst['graph'])}, {worst['positions']} positions)")
    assert "within all limits" in out
    assert "the reference, layer by layer, 100 %" in err


def test_every_position_by_decode(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokens", "80", "--decode-positions", "all", "--threads", "1"]
    _, found = result(capsys, mini_bundle, "--reference", DEMO, *arguments)
    [decode] = [g for g in found["graphs"] if (g["graph"], g["region"]) == ("decode", "all")]
    assert decode["positions"] == 80


def test_where_greedy_texts_part(
    int4_bundle: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if both had written: PyTorch's own greedy text from the same prompt."""
    import torch
    from neo_runtime.text.tokenizer import Tokenizer

    arguments = ["--tokens", "1024", "--threads", "1", "--localize-tokens", "0"]
    _, found = result(capsys, int4_bundle, "--reference", DEMO, *arguments)
    for one, ids in zip(found["continuations"], held_out_ids(2, 512), strict=True):
        prompt = torch.tensor(ids[None, : one["prompt_tokens"]])
        with torch.inference_mode():
            whole = reference.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=one["tokens"],
                min_new_tokens=one["tokens"],
                suppress_tokens=None,
                pad_token_id=0,
                eos_token_id=None,
            )[0, one["prompt_tokens"] :]
        text = Tokenizer(DEMO / "tokenizer.json").decode(whole.tolist(), skip_special_tokens=False)
        assert (one["parted_after"] is None) == (text == one["bundle_text"])


def test_a_window_off_by_one_fails_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All-global attention: wrong only past the window. Default settings, exit status 1."""
    spoiled = faults.spoiled_checkpoint(DEMO, tmp_path / "spoiled", faults.without_window((1, 3)))
    export_bundle(str(spoiled), tmp_path / "bundle")
    status, out, err = run(capsys, tmp_path / "bundle", "--reference", DEMO)
    assert status == 1
    assert "FAULT attended of layer 1" in out
    assert "past the window" in out
    assert "a local layer without its window" in out
    assert "attention_layers" in err
    few = ("--reference", DEMO, "--report-only", *FEW)
    status, found = result(capsys, tmp_path / "bundle", *few)
    assert status == 0
    assert not found["passed"]
    fault = found["first_fault"]
    assert (fault["layer"], fault["place"], fault["region"]) == (1, "attended", "past")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-kl", "0.001"),
        ("--min-top1", "0.999"),
        ("--max-ppl-increase", "0.0001"),
        ("--max-logit-error", "0.001"),
    ],
)
def test_each_limit(
    option: str, value: str, int4_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--tokens", "130", "--threads", "1", "--localize-tokens", "0"]
    base = [int4_bundle, "--reference", DEMO, *short, "--continuations", "0"]
    loose = ["--max-kl", "9", "--min-top1", "0", "--max-ppl-increase", "9"]
    assert run(capsys, *base, *loose, "--max-logit-error", "9")[0] == 0
    status, out, _ = run(capsys, *base, *loose, "--max-logit-error", "9", option, value)
    assert status == 1
    assert out.count("PAST") == 1
    assert "NOT within all limits" in out


def test_a_short_text_warns(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time, there was a little cat.")
    arguments = [mini_bundle, "--reference", DEMO, "--text", tmp_path / "short.txt"]
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert "nothing past the window is covered" in err
    assert "below the window" in out


def test_nan_in_a_layer_is_named(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 / 0 behind the MLP of layer 2: what follows is not finite either, but that is not first."""

    def change(model: onnx.ModelProto) -> None:
        name = "transformer.h.2.mlp"
        [(node, index)] = [
            (node, i)
            for node in model.graph.node
            for i, out in enumerate(node.output)
            if out == name
        ]
        node.output[index] = f"{name}.right"
        at = list(model.graph.node).index(node) + 1
        zero = helper.make_node("Sub", [f"{name}.right", f"{name}.right"], [f"{name}.zero"])
        model.graph.node.insert(at, zero)
        nan = helper.make_node("Div", [f"{name}.zero", f"{name}.zero"], [name])
        model.graph.node.insert(at + 1, nan)

    fault = faults.Fault("NaN", 2, ("mlp",), graph=change)
    bundle = faults.spoiled_bundle(mini_bundle, tmp_path / "nan", fault)
    status, out, err = run(capsys, bundle, "--reference", DEMO, *FEW, "--html", tmp_path / "r.html")
    assert (status, "Traceback" in err) == (1, False)
    assert "FAULT mlp of layer 2 is not finite" in out
    status, found = result(capsys, bundle, "--reference", DEMO, *FEW)
    assert (found["first_fault"]["layer"], found["first_fault"]["place"]) == (2, "mlp")
    assert found["graphs"][0]["kl_mean"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none", "--reference", "{demo}"], "does not exist"),
        (["{bundle}", "--reference", "{tmp}"], "config.json"),
        (["{bundle}", "--reference", "{tmp}/none"], "none"),
        (["{bundle}"], "--reference"),
        (
            ["{bundle}", "--reference", "{other}"],
            "are different models: vocab_size 4096 against 61",
        ),
        (["{bundle}", "--reference", "{demo}", "--text", "{tmp}/none.txt"], "cannot be read"),
        (["{bundle}", "--reference", "{demo}", "--text", "{tmp}/empty.txt"], "holds no text"),
        (["{bundle}", "--reference", "{demo}", "--context", "513"], "expected 2 to 512"),
        (["{bundle}", "--reference", "{demo}", "--html", "{tmp}/no/r.html"], "cannot write"),
        (["{bundle}", "--reference", "{demo}", "--tokens", "1"], "too small"),
        (["{bundle}", "--reference", "{demo}", "--decode-positions", "few"], "'few' is neither"),
        (["{bundle}", "--reference", "{demo}", "--max-kl", "nan"], "'nan' is not a number of at"),
        (
            ["{bundle}", "--reference", "{demo}", "--max-kl", "-1"],
            "'-1' is not a number of at least 0",
        ),
        (
            ["{bundle}", "--reference", "{demo}", "--min-top1", "95"],
            "'95' is not a number from 0 to 1",
        ),
        (
            [
                "{bundle}",
                "--reference",
                "{demo}",
                "--html",
                "{tmp}/r",
                "--json={tmp}/./../{tmp.name}/r",
            ],
            "--html and --json both name",
        ),
        (["{mute}", "--reference", "{demo}"], "has no tokenizer"),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: str,
    mini_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, status 2, nothing written."""
    (tmp_path / "empty.txt").write_text("")
    if "{other}" in arguments:
        make_checkpoint(tmp_path / "other", TinyConfig())
        capsys.readouterr()
    if "{mute}" in arguments:
        without_tokenizer(mini_bundle, tmp_path / "mute")
    names = {
        "tmp": tmp_path,
        "demo": DEMO,
        "bundle": mini_bundle,
        "other": tmp_path / "other",
        "mute": tmp_path / "mute",
    }
    status, out, err = run(capsys, *(part.format(**names) for part in arguments))
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("neo-diff: ")
    assert len(err.splitlines()) == 1


def test_json_and_html_files(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", tmp_path / "r.json", "--html", tmp_path / "r.html"]
    short = ["--tokens", "100", "--threads", "1", "--continuations", "0"]
    status, out, _ = run(capsys, mini_bundle, "--reference", DEMO, *short, *files)
    assert status == 0
    assert "within all limits" in out
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_a_file_that_cannot_be_written_costs_nothing_else(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--tokens", "100", "--threads", "1", "--continuations", "0", "--localize-tokens", "0"]
    files = ["--json", tmp_path / "r.json", "--html", "/dev/full"]
    status, out, err = run(capsys, mini_bundle, "--reference", DEMO, *short, *files)
    assert status == 2
    assert "/dev/full" in err
    assert "within all limits" in out
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['neo-diff', '--help']\n"
        "from neo_tools.diff.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: neo-diff" in done.stdout


def test_an_interrupt_leaves_nothing(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    import neo_tools.diff.run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(neo_tools.diff.run, "compare", interrupted)
    status, out, _ = run(capsys, mini_bundle, "--reference", DEMO, "--html", tmp_path / "r.html")
    assert (status, out) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_infinite_figures_are_null() -> None:
    from neo_tools.diff.cli import _finite

    assert _finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


def test_a_copy_elsewhere_gives_the_same(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing depends on the place: the figures of two runs are equal to the last digit."""
    shutil.copytree(mini_bundle, tmp_path / "copy")
    short = ["--reference", DEMO, "--tokens", "100", "--threads", "1"]
    _, one = result(capsys, mini_bundle, *short)
    _, two = result(capsys, tmp_path / "copy", *short)
    assert one["positions"] == two["positions"]
    assert one["places"] == two["places"]


def test_a_damaged_weight_is_no_comparison(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(mini_bundle, tmp_path / "bundle")
    with (damaged / "weights.bin").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    for arguments in ((damaged, "--reference", DEMO), (mini_bundle, "--reference", damaged)):
        status, _, err = run(capsys, *arguments, *FEW)
        assert status == 2
        assert str(damaged) in err
        assert "weights.bin" in err
