"""Good checkpoints in every format: each tensor is what PyTorch has, bit for bit."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import neo_export
import numpy as np
import pytest
import torch
from neo_export.checkpoint.config import parse_config
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.gpt_neo.parameters import expected_shapes
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel

if TYPE_CHECKING:
    import numpy.typing as npt
    from neo_export.checkpoint.whole import Checkpoint

DEMO = Path(neo_export.__file__).parent / "demo" / "neo-mini"
NUMPY = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def make_model(kind: Any = GPTNeoForCausalLM, **change: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_layers": 3,
        "attention_types": [[["global", "local", "local"], 1]],
        "num_heads": 2,
        "max_position_embeddings": 16,
        "window_size": 4,
    }
    torch.manual_seed(0)
    return kind(GPTNeoConfig(**(values | change)))


def save_bin(model: Any, folder: Path, legacy: bool = False, shards: int = 1) -> None:
    """Files as transformers wrote them before safetensors."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {key: state[key] for key in list(state)[i::shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def assert_same(checkpoint: Checkpoint, model: Any) -> None:
    """Names, shapes, types and every bit, against `model.state_dict()`."""
    state = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": value
        for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in checkpoint.tensors.items():
        theirs = state[name]
        raw, read = tensor.read_raw(), tensor.read()
        assert tensor.name == name
        assert tensor.shape == raw.shape == read.shape == tuple(theirs.shape)
        assert tensor.size == theirs.numel()
        assert f"torch.{tensor.dtype}" == str(theirs.dtype)
        assert raw.dtype == NUMPY[theirs.dtype]
        assert read.dtype == np.float32
        assert np.array_equal(bits(raw), bits(theirs.contiguous().view(torch.uint8).numpy()))
        assert np.array_equal(bits(read), bits(theirs.float().numpy()))
        assert not raw.flags.writeable
        assert not read.flags.writeable


def bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["10GB", "9KB"], ids=["one-file", "shards"])
def test_safetensors(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() is (size == "10GB")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)
        assert checkpoint.spec == parse_config(model.config.to_dict())
        assert checkpoint.config_json == json.loads((tmp_path / "config.json").read_text())
        assert checkpoint.generation_config is not None
        assert checkpoint.generation_config["eos_token_id"] == 50256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["zip", "legacy", "shards"])
def test_torch_files(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    model = make_model().to(dtype)
    save_bin(model, tmp_path, legacy=form == "legacy", shards=3 if form == "shards" else 1)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)
        assert checkpoint.generation_config is None
        assert checkpoint.tokenizer_files == ()
        assert checkpoint.tokenizer_json() is None


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": False},
        {"intermediate_size": 7},
        {"hidden_size": 40, "num_heads": 10, "vocab_size": 11},
        {"num_layers": 1, "attention_types": [[["local"], 1]]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_odd_configurations(tmp_path: Path, change: dict[str, Any]) -> None:
    model = make_model(**change)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_base_model_without_prefix(tmp_path: Path, form: str) -> None:
    model = make_model(GPTNeoModel)
    model.save_pretrained(tmp_path) if form == "safetensors" else save_bin(model, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


def test_expected_shapes_are_those_of_the_model() -> None:
    model = make_model(tie_word_embeddings=False, intermediate_size=5)
    ours = expected_shapes(parse_config(model.config.to_dict()))
    assert ours == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_old_buffers_are_ignored(tmp_path: Path, prefix: str) -> None:
    model = make_model(GPTNeoForCausalLM if prefix else GPTNeoModel)
    state = dict(model.state_dict())
    state.pop("lm_head.weight", None)
    for i in range(3):
        state[f"{prefix}h.{i}.attn.attention.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        state[f"{prefix}h.{i}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


def test_a_tied_head_stored_again_is_accepted(tmp_path: Path) -> None:
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


def test_a_tied_table_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    """So `safetensors.torch.save_model` writes shared tensors: by the first of their names."""
    model = make_model()
    model.config.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


def test_safetensors_come_first(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    (tmp_path / "model.safetensors.index.json").write_text("not read")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)


def test_tensors_in_any_order_and_unaligned(tmp_path: Path) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    header, data = {}, b""
    for name, value in reversed(model.state_dict().items()):
        if name != "lm_head.weight":
            end = len(data) + value.numel() * 4
            header[name] = {
                "dtype": "F32",
                "shape": list(value.shape),
                "data_offsets": [len(data), end],
            }
            data += value.numpy().tobytes()
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # the data starts at an odd address
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, model)
        assert all(tensor.read().flags.aligned for tensor in checkpoint.tensors.values())


def test_a_snapshot_of_links_as_the_hub_cache_has_it(tmp_path: Path) -> None:
    model = make_model()
    real, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    model.save_pretrained(real, max_shard_size="9KB")
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    with open_checkpoint(snapshot) as checkpoint:
        assert_same(checkpoint, model)


def test_float32_is_a_view_of_the_file(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with open_checkpoint(tmp_path) as checkpoint:
        array = checkpoint.tensors["transformer.wte.weight"].read()
        data = bytearray(path.read_bytes())
        at = bytes(data).index(array.tobytes())
        with path.open("r+b") as file:  # the same inode: what is mapped changes with it
            file.seek(at)
            file.write(struct.pack("<f", 1234.5))
        assert array[0, 0] == 1234.5


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_closing(tmp_path: Path, form: str) -> None:
    model = make_model()
    model.save_pretrained(tmp_path) if form == "safetensors" else save_bin(model, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint.tensors["transformer.ln_f.weight"]
        kept = tensor.read()
    shutil.rmtree(tmp_path)
    assert kept.tolist() == [1.0] * 24
    with pytest.raises(ValueError, match="is closed"):
        tensor.read()


def test_files_of_the_tokenizer() -> None:
    with open_checkpoint(DEMO) as checkpoint:
        assert [path.name for path in checkpoint.tokenizer_files] == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert checkpoint.tokenizer_json() == (DEMO / "tokenizer.json").read_bytes()


_MEASURE = """
import re, sys
from pathlib import Path
from neo_export.checkpoint.folder import open_checkpoint

def private_kb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with open_checkpoint(sys.argv[1]) as checkpoint:
    next(iter(checkpoint.tensors.values())).check_finite()  # imports and first buffers
    before, worst, kept = private_kb(), 0, []
    for tensor in checkpoint.tensors.values():
        tensor.check_finite()
        array = tensor.read()
        total = float(array.reshape(-1)[::1024].sum())  # every page is read
        if array.dtype == tensor.read_raw().dtype:
            kept.append(array)
        worst = max(worst, private_kb() - before)
        del array
print(worst)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(("dtype", "limit_mb"), [("F32", 40), ("BF16", 60)])
def test_reading_holds_no_private_memory(tmp_path: Path, dtype: str, limit_mb: int) -> None:
    """200 MB, all arrays kept (float32), one widened 25 MB tensor at a time (bfloat16)."""
    spec = {
        "model_type": "gpt_neo",
        "vocab_size": 6400,
        "hidden_size": 1024,
        "num_layers": 4,
        "num_heads": 8,
        "attention_layers": ["global", "local"] * 2,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(spec))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_shapes(parse_config(spec)).items():
        begin, end = end, end + int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library does
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)  # zeros that take no room on the disk
    assert end > (200 if dtype == "F32" else 100) * 1e6
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < limit_mb * 1024
