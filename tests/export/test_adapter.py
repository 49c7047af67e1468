"""LoRA adapters, merged at export: against peft's own model, which computes them apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.models import DEMO, TinyConfig, make_checkpoint, random_ids
from neo_calibration.auto.__main__ import _parser as search_parser
from neo_calibration.cli import _parser as calibrate_parser
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.command import run_calibration
from neo_export.command.cli import main as export
from neo_export.tolerances import TOLERANCES
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import CheckpointError, NeoError, StatisticsError
from neo_tools.diff.cli import main as diff

if TYPE_CHECKING:
    from numpy.typing import NDArray

peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")

# peft's own use of transformers, and its words about tied tables, which the tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

LIMIT = TOLERANCES["fp32"].logits
ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
CONFIG = TinyConfig(attention_layers=("global", "local", "global"))
UNTIED = TinyConfig(tie_word_embeddings=False)


def make_adapter(
    folder: Path, base: Path, *, vocab_size: int | None = None, safe: bool = True, **lora: Any
) -> Any:
    """Save a random adapter; peft's model, ready to run.

    All that would be trained is noise of the size of the weights: an adapter that changes much.
    """
    import torch
    from transformers import GPTNeoForCausalLM

    model = GPTNeoForCausalLM.from_pretrained(base, attn_implementation="eager")
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **lora})
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                is_length = "magnitude" in name or ".ln_" in name
                parameter.add_(0.2 * noise) if is_length else parameter.copy_(0.2 * noise)
    adapted.save_pretrained(folder, safe_serialization=safe)
    said = folder / "adapter_config.json"
    assert json.loads(said.read_text())["base_model_name_or_path"] == str(base)
    return adapted


def logits_of(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        found: NDArray[np.float32] = model(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    return found


CASES: dict[str, tuple[TinyConfig, dict[str, Any]]] = {
    "plain": (CONFIG, {"target_modules": ["q_proj", "v_proj"]}),
    "all_linear": (CONFIG, {"target_modules": ALL, "bias": "all"}),
    "lora_only_biases": (
        CONFIG,
        {"target_modules": ["c_fc", "out_proj"], "bias": "lora_only", "init_lora_weights": False},
    ),
    "patterns": (
        CONFIG,
        {
            "target_modules": ALL,
            "rank_pattern": {"c_fc": 7, r"h\.1\.attn\.attention\.q_proj": 1},
            "alpha_pattern": {"q_proj": 1.5, r"transformer\.h\.2\.mlp\.c_fc": 11},
        },
    ),
    "rank_stabilized": (
        CONFIG,
        {"target_modules": ALL, "use_rslora": True, "init_lora_weights": "gaussian"},
    ),
    "dora": (CONFIG, {"target_modules": ALL, "use_dora": True}),
    "biases_of_its_own": (CONFIG, {"target_modules": ["c_fc", "c_proj"], "lora_bias": True}),
    "some_layers": (
        CONFIG,
        {"target_modules": ALL, "layers_to_transform": [1], "init_lora_weights": "orthogonal"},
    ),
    "norms": (CONFIG, {"target_modules": ["q_proj"], "modules_to_save": ["ln_f", "ln_1"]}),
    "table_of_a_tied_model": (CONFIG, {"target_modules": ["wte", "q_proj"]}),
    "table": (UNTIED, {"target_modules": ["wte", "wpe", "q_proj"]}),
    "table_with_magnitudes": (UNTIED, {"target_modules": ["wte"], "use_dora": True}),
    "head_of_a_tied_model": (CONFIG, {"target_modules": ["lm_head", "q_proj"]}),
    "head": (UNTIED, {"target_modules": ["lm_head"]}),
    "a_head_of_its_own": (CONFIG, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a_table_of_its_own": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["wte"]}),
    "a_pickle": (CONFIG, {"target_modules": ALL, "safe": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    config, lora = CASES[name]
    base = make_checkpoint(tmp_path / "base", config)
    model = make_adapter(tmp_path / "adapter", base, **lora)
    ids = random_ids(config, config.max_position_embeddings)
    expected = logits_of(model, ids)
    assert export([str(tmp_path / "adapter"), "-o", str(tmp_path / "bundle"), "--verify"]) == 0
    with neo_runtime.load(tmp_path / "bundle", threads=1) as loaded:
        found = loaded.logits(ids)
        with loaded.new_cache(1, len(ids)) as cache:
            step = loaded.prefill(cache, [ids[:9]])
            assert _far(step, expected[8:9]) < LIMIT
            step = loaded.decode(cache, ids[9:10])
            assert _far(step, expected[9:10]) < LIMIT
    assert _far(found, expected) < LIMIT
    with model.disable_adapter():
        assert _far(found, logits_of(model, ids)) > 100 * LIMIT, "it changes much"


def _far(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(error.max())


@pytest.mark.parametrize("name", ["all_linear", "patterns", "rank_stabilized", "dora", "head"])
def test_the_matrices_of_peft(name: str, tmp_path: Path) -> None:
    config, lora = CASES[name]
    base = make_checkpoint(tmp_path / "base", config)
    merged = make_adapter(tmp_path / "adapter", base, **lora).merge_and_unload().state_dict()
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        assert checkpoint.spec.tie_word_embeddings == config.tie_word_embeddings
        for tensor_name, tensor in checkpoint.tensors.items():
            np.testing.assert_allclose(
                tensor.read(), merged[tensor_name].numpy(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "wte"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_more_tokens_than_the_base_model_has(
    lora: dict[str, Any], is_tied: bool, tmp_path: Path
) -> None:
    """Tables as peft saves them, beside what lies over them."""
    config = TinyConfig(tie_word_embeddings=is_tied)
    base = make_checkpoint(tmp_path / "base", config)
    more = config.vocab_size + 3
    model = make_adapter(tmp_path / "adapter", base, vocab_size=more, **lora)
    ids = np.arange(more - 8, more)
    if lora["target_modules"][-1] == "lm_head" and not is_tied:
        return  # peft does not store the other table, and makes its new rows up
    assert export([str(tmp_path / "adapter"), "-o", str(tmp_path / "bundle")]) == 0
    with neo_runtime.load(tmp_path / "bundle", threads=1) as loaded:
        assert loaded.manifest.model.vocab_size == more
        stays_tied = is_tied and lora == {"target_modules": ["q_proj"]}
        assert loaded.manifest.model.tie_word_embeddings == stays_tied
        assert _far(loaded.logits(ids), logits_of(model, ids)) < LIMIT


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_a_table_that_lies_under_an_adapter(
    target: str, config: TinyConfig, tmp_path: Path
) -> None:
    """peft may save it with the adapter, and it need not be the base model's."""
    import torch
    from transformers import GPTNeoForCausalLM

    base = make_checkpoint(tmp_path / "base", config)
    model = GPTNeoForCausalLM.from_pretrained(base, attn_implementation="eager")
    table = model.lm_head if target == "lm_head" else model.transformer.wte
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])
    with torch.no_grad():
        table.weight.mul_(-1.5)
    model = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = random_ids(config, 20)
    assert export([str(tmp_path / "adapter"), "-o", str(tmp_path / "bundle")]) == 0
    with neo_runtime.load(tmp_path / "bundle", threads=1) as loaded:
        assert _far(loaded.logits(ids), logits_of(model, ids)) < LIMIT


def test_a_half_precision_base_and_its_own_tokenizer(tmp_path: Path) -> None:
    """Merged in float32, where peft rounds the sum to the base model's type."""
    import torch
    from safetensors.torch import load_file, save_file

    base = make_checkpoint(tmp_path / "base", CONFIG)
    weights = base / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights, {"format": "pt"})
    make_adapter(tmp_path / "adapter", base, target_modules=ALL)
    down, up = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
            f"base_model.model.transformer.h.0.mlp.c_fc.lora_{part}.weight"
        ]
        for part in "AB"
    )
    name = "transformer.h.0.mlp.c_fc.weight"
    expected = half[name].float() + torch.tensor(6 / 4) * (up @ down)
    (tmp_path / "adapter" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "adapter" / "merges.txt").write_text("#version: 0.2\n")
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        assert [path.parent.name for path in checkpoint.tokenizer_files] == ["adapter"] * 2
        assert checkpoint.tokenizer_json() is not None
        assert checkpoint.tensors["transformer.h.1.ln_1.weight"].dtype == "float16"
        merged = checkpoint.tensors[name]
        assert merged.dtype == "float32"
        np.testing.assert_allclose(merged.read(), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_base_model_without_its_head(tmp_path: Path) -> None:
    """Adapters of `GPTNeoModel` name modules in their own way, in patterns as well."""
    import torch
    from transformers import GPTNeoModel

    base = make_checkpoint(tmp_path / "base", CONFIG)
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=4,
        target_modules=["q_proj", "c_fc"],
        alpha_pattern={r"^h.1.*": 50, r"transformer\.h\.0\.mlp\.c_fc": 80},
        rank_pattern={"^h.2.mlp.c_fc": 2},
    )
    model = peft.get_peft_model(GPTNeoModel.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            expected = merged[name.removeprefix("transformer.")].numpy()
            np.testing.assert_allclose(tensor.read(), expected, rtol=1e-5, atol=1e-6)


def test_what_else_is_in_the_folder(tmp_path: Path) -> None:
    """The adapter's own generation_config.json, and its tokenizer if that is a whole one."""
    base = make_checkpoint(tmp_path / "base", CONFIG)
    (base / "tokenizer.json").write_text("{}")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": 5}')
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        assert checkpoint.generation_config == {"eos_token_id": 5}
        assert checkpoint.tokenizer_files == (base / "tokenizer.json",)
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="a whole model and a LoRA adapter"):
        open_checkpoint(tmp_path / "adapter")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = make_checkpoint(tmp_path / "base", CONFIG)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "c_fc"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, expected the model"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, expected the model"),
        ({"base_model_name_or_path": "/nowhere"}, "LoRA adapter of /nowhere, which cannot be used"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa.*changes the base model as well; merge it"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .*cannot be merged here; merge it"),
        ({"something_new": 3}, "something_new is 3, which cannot be merged here"),
        ({"r": "four"}, "is not what peft writes .*a rank is 'four'"),
        ({"r": 3}, r"matrices of shapes \[4, 32\] and \[\d+, 4\] .*expected \[3, 32\].* rank 3"),
        ({"lora_alpha": None}, "is not what peft writes"),
        ({"rank_pattern": {"(": 2}}, "is not what peft writes"),
        ({"lora_alpha": 10**400}, "is not what peft writes"),
        ({"lora_alpha": float("inf")}, "is not what peft writes .*lora_alpha is inf"),
        ({"use_dora": True}, "lacks the magnitudes of"),
    ],
    ids=str,
)
def test_what_cannot_be_merged(adapter: Path, change: dict[str, Any], message: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(NeoError, match=message):
        open_checkpoint(adapter)


def test_a_revision_is_of_hubs(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "main"}))
    open_checkpoint(adapter).close()


def test_files_that_do_not_belong_together(adapter: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    whole = load_file(weights)

    def refused(tensors: dict[str, NDArray[Any]], message: str) -> None:
        save_file(tensors, weights)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(adapter)

    first = next(iter(whole))
    refused({n: t for n, t in whole.items() if n != first}, "expected A and B; is it an adapter of")
    refused({n.replace("h.0", "h.9"): t for n, t in whole.items()}, "h.9.*the base model has not")
    refused({n: t.astype(np.int8) for n, t in whole.items()}, "of type int8")
    refused(whole | {"base_model.model.score.weight": np.ones((2, 32), np.float32)}, "score.weight")
    refused({}, "is empty")
    other = make_checkpoint(tmp_path / "other", TinyConfig(head_dim=8))
    save_file(whole, weights)
    path = adapter / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": str(other)}
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="a base model whose matrix is"):
        open_checkpoint(adapter)
    path.write_text(json.dumps(said | {"base_model_name_or_path": str(adapter)}))
    with pytest.raises(CheckpointError, match=r"which cannot be used .*has no config\.json"):
        open_checkpoint(adapter)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"expected one of adapter_model\.safetensors"):
        open_checkpoint(adapter)
    path.unlink()
    save_file(whole, weights)
    (adapter / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"LoRA adapter .*and no adapter_config\.json"):
        open_checkpoint(adapter)


def test_comparisons_are_with_the_adapted_model(tmp_path: Path) -> None:
    """neo-diff takes the adapter's folder as it takes a model's; the tokenizer is the base's."""
    make_adapter(tmp_path / "adapter", DEMO, target_modules=["c_fc"], lora_alpha=1)
    assert export([str(tmp_path / "adapter"), "-o", str(tmp_path / "bundle")]) == 0
    flags = ["--tokens", "300", "--decode-positions", "3", "--continuations", "1"]
    for reference, status in ((tmp_path / "adapter", 0), (DEMO, 1)):
        assert diff([str(tmp_path / "bundle"), "--reference", str(reference), *flags]) == status


def test_a_base_that_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, adapter = tmp_path / "there", tmp_path / "adapter"
    make_adapter(adapter, Path(shutil.copytree(DEMO, there)), target_modules=["c_fc"], lora_alpha=1)
    before, after = tmp_path / "before", tmp_path / "after"
    assert export([str(adapter), "-o", str(before)]) == 0
    moved = ["--base", str(there.rename(tmp_path / "moved"))]
    assert export([str(adapter), "-o", str(after)]) == 2
    assert "adapter_config.json names it (base_model_name_or_path)" in capsys.readouterr().err

    assert export([str(adapter), *moved, "-o", str(after)]) == 0
    assert open_bundle(before).manifest.digest == open_bundle(after).manifest.digest
    compared = ["--tokens", "300", "--decode-positions", "3", "--continuations", "1"]
    assert diff([str(after), "--reference", str(adapter), *moved, *compared]) == 0
    assert diff([str(after), "--reference", str(before), *moved, *compared]) == 2
    assert "--base was given, but the reference" in capsys.readouterr().err


def test_child_processes_are_told_the_base_and_the_tokenizer(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*command: str, scratch: str | None = None) -> str:
        commands.append(command)
        if scratch is not None:  # the last one
            raise StatisticsError("enough")
        return ""

    monkeypatch.setattr(run_calibration, "_run", run)
    monkeypatch.setattr(run_calibration, "_require", lambda: None)
    base = make_checkpoint(tmp_path / "base", CONFIG)
    shutil.copy(DEMO / "tokenizer.json", base)
    given = ["--base", str(base), "--tokenizer", str(DEMO)]
    asked = ["--calibrate-text", __file__, "-o", str(tmp_path / "bundle")]
    assert export([str(adapter), *given, *asked, "--auto", "--max-size", "0.5"]) == 2
    programs = ["neo_calibration.auto", "neo_calibration", "neo_calibration.auto"]
    assert [command[0] for command in commands] == programs
    for module, *arguments in commands:
        parser = {"neo_calibration": calibrate_parser}.get(module, search_parser)()
        parsed = parser.parse_args(arguments)
        assert (parsed.base, parsed.tokenizer) == (str(base), str(DEMO))


def test_a_base_that_is_not_the_one(adapter: Path, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", CONFIG)
    with pytest.raises(CheckpointError, match=r"is not a LoRA adapter .*omit --base"):
        open_checkpoint(base, str(base))
    with pytest.raises(CheckpointError, match=r"LoRA adapter of not-there, .*does not exist"):
        open_checkpoint(adapter, "not-there")
    other = make_checkpoint(tmp_path / "other", TinyConfig(head_dim=8))
    with pytest.raises(CheckpointError, match=r"is it an adapter of .*other"):
        open_checkpoint(adapter, str(other))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    open_checkpoint(adapter, str(base)).close()
