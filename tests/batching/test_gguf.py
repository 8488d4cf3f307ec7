"""GGUF files: the same model as the checkpoint they were made from, and no harm by damaged ones."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_files import TEMPLATE, write_gguf
from support.models import LLAMA, SENTENCES, TINY, Alone, MakeModel
from support.program import Program, here, program

from batchbench.batching.models import ModelSpec, encoder, find_model, find_tokenizer, gguf_file
from batchbench.batching.models.gguf_file import read_gguf
from batchbench.batching.models.loading import count_parameters, load_model
from batchbench.errors import UsageError

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

__all__ = ["here", "program"]

pytest.importorskip("gguf", reason="needs the package gguf")

FAMILIES: Mapping[str, Mapping[str, Any]] = {"llama": LLAMA, "gpt2": TINY}


@pytest.fixture(scope="session")
def family_file(
    make_model: MakeModel, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, LoadedModel]]:
    """Makes a GGUF file of a family in a format, and the model whose weights it has."""
    made: dict[tuple[str, str], tuple[Path, LoadedModel]] = {}
    folder = tmp_path_factory.mktemp("gguf")

    def make(family: str, kind: str = "F32") -> tuple[Path, LoadedModel]:
        if (family, kind) not in made:
            model = make_model(FAMILIES[family])
            tokenizer = checkpoint / "tokenizer.json"
            file = folder / f"{family}-{kind}.gguf"
            write_gguf(file, model, kind, tokenizer=tokenizer, template=TEMPLATE)
            made[family, kind] = file, model
        return made[family, kind]

    return make


@pytest.fixture
def tiny_file(family_file: Callable[..., tuple[Path, LoadedModel]]) -> Path:
    return family_file("llama")[0]


def spec_of(file: Path, **known: Any) -> ModelSpec:
    return ModelSpec(model=str(file), device="cpu", **known)


def load(file: Path, **known: Any) -> LoadedModel:
    spec = spec_of(file, **known)
    return load_model(find_model(spec), spec, 0)


# The same model


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_has_the_weights_it_was_made_from(
    family: str, kind: str, family_file: Callable[..., tuple[Path, LoadedModel]]
) -> None:
    file, model = family_file(family, kind)
    loaded = load(file)
    assert loaded.weights_digest == model.weights_digest
    assert loaded.source.eos_token_ids == (0,)
    assert (loaded.source.vocab_size, loaded.source.context) == (300, 128)
    assert count_parameters(loaded.source) == model.module.num_parameters()
    quantization = kind if kind == "Q8_0" else None
    assert loaded.source.facts["quantization"] == quantization
    assert ("dequantised" in loaded.source.note) == (quantization is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_and_the_same_model_as_safetensors_give_the_same_tokens(
    family: str,
    dtype: str,
    tmp_path: Path,
    family_file: Callable[..., tuple[Path, LoadedModel]],
    alone: Alone,
) -> None:
    file, model = family_file(family, "Q8_0")
    model.module.save_pretrained(tmp_path)
    one, other = load(file, dtype=dtype), load(tmp_path, dtype=dtype)
    assert one.weights_digest == other.weights_digest
    assert one.dtype_name == dtype
    assert alone(one, [5, 6, 7], 30) == alone(other, [5, 6, 7], 30)


def test_dummy_weights_take_the_shape_of_the_file(tiny_file: Path, make_model: MakeModel) -> None:
    loaded = load(tiny_file, load_format="dummy")
    assert loaded.weights_digest == make_model(LLAMA).weights_digest
    assert loaded.source.facts["quantization"] is None


def test_the_tokenizer_of_the_file_is_the_one_it_was_made_from(
    tiny_file: Path, checkpoint: Path
) -> None:
    one, other = find_tokenizer(tiny_file), find_tokenizer(checkpoint)
    assert one is not None
    assert other is not None
    for text in (*SENTENCES, "a<|endoftext|>b", "– ü 1984"):
        assert one.encode(text) == other.encode(text)
        assert one.decode(one.encode(text)) == text


def test_files_beside_it_are_not_read(tmp_path: Path, make_model: MakeModel) -> None:
    """Transformers would read a tokenizer.json and an adapter in the folder of the GGUF file."""
    file = write_gguf(tmp_path / "model.gguf", make_model(LLAMA))
    for name in ("tokenizer.json", "config.json", "adapter_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"base_model_name_or_path": "elsewhere"}')
    assert find_tokenizer(file) is None
    assert load(file).weights_digest == make_model(LLAMA).weights_digest


def test_both_ends_of_a_chat_model_end_its_texts(tmp_path: Path, make_model: MakeModel) -> None:
    more = {"tokenizer__ggml__eot_token_id": 7}
    file = write_gguf(tmp_path / "model.gguf", make_model(LLAMA), **more)
    assert find_model(spec_of(file)).eos_token_ids == (0, 7)


def test_scaled_positions_are_said_to_be_ignored(tmp_path: Path, make_model: MakeModel) -> None:
    import gguf

    file = tmp_path / "model.gguf"
    whole = write_gguf(file, make_model(LLAMA)).read_bytes()
    assert "ignores" not in find_model(spec_of(file)).note
    count = struct.unpack_from("<Q", whole, 16)[0]
    name, value = b"llama.rope.scaling.type", b"linear"
    entry = struct.pack(f"<Q{len(name)}sIQ{len(value)}s", len(name), name, 8, len(value), value)
    header = whole[:16] + struct.pack("<Q", count + 1) + entry + whole[24:]
    file.write_bytes(header + b"\0" * 64)
    assert gguf.GGUF_DEFAULT_ALIGNMENT == 32
    assert "ignores its scaled rotary positions" in find_model(spec_of(file)).note


# Runs


def test_a_run_records_what_was_dequantised_and_is_reproduced(
    family_file: Callable[..., tuple[Path, LoadedModel]], program: Program
) -> None:
    file, _ = family_file("llama", "Q8_0")
    words = ["--model", str(file), "--batch-size", "3", "--queue-size", "7", "--trials", "1"]
    lengths = ["--prompt-tokens", "4:20", "--output-tokens", "2:12", "--verify", "all"]
    said = program("run", *words, *lengths, "--output", "out", "--stop-at-eos")
    assert said.code == 0, said.err
    assert "Q8_0 dequantised" in said.err
    result = json.loads(Path("out/result.json").read_text())
    assert result["model"]["quantization"] == "Q8_0"
    assert result["verification"]["identical"] == 7
    assert result["outputs"] is not None
    again = program("reproduce", "out", "--output", "again")
    assert again.code == 0, again.err
    assert program("run", *words, *lengths, "--dry-run").code == 0


def test_every_engine_and_strategy_serves_the_file(tiny_file: Path, program: Program) -> None:
    words = ["--model", str(tiny_file), "--batch-size", "3", "--queue-size", "6", "--trials", "1"]
    words += ["--prompt-tokens", "4:20", "--output-tokens", "2:9", "--verify", "all", "--quiet"]
    for name, more in {
        "slots": ["--strategy", "static,continuous,generate_batch"],
        "notebook": ["--engine", "notebook"],
    }.items():
        said = program("run", *words, *more, "--output", name)
        assert said.code == 0, said.err
        result = json.loads(Path(name, "result.json").read_text())
        assert (result["verification"]["identical"], result["verification"]["wrong"]) == (6, 0)


def test_a_sweep_and_a_simulation_take_the_file(
    tiny_file: Path, checkpoint: Path, program: Program
) -> None:
    models = ["--model", str(tiny_file), "--model", str(checkpoint)]
    small = ["--batch-size", "2", "--queue-size", "4", "--long-tokens", "5", "--trials", "1"]
    said = program("sweep", *models, *small, "--quiet", "--output", "grid")
    assert said.code == 0, said.err
    assert program("simulate", "--model", str(tiny_file), "--quiet", "--output", "sim").code == 0
    said = program("workload", "show", "--model", str(tiny_file))
    assert said.code == 0


# Damaged and foreign files


def refusal(file: Path) -> str:
    with pytest.raises(UsageError, match=r"^--model \S+: ") as caught:
        find_model(spec_of(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_package_that_is_missing_is_named_with_the_command(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        gguf_file, "find_spec", lambda name: None if name == "accelerate" else real(name)
    )
    said = refusal(tiny_file)
    assert said.endswith("needs accelerate; type pip install 'batchbench-llm[gguf]'")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" * 99, b"GGUF", b"{}" * 50])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert "is a file but not GGUF" in refusal(file)


@pytest.mark.parametrize("name", ["nowhere.gguf", "no/such.gguf"])
def test_a_file_that_is_not_there_is_not_looked_up_on_the_hub(name: str) -> None:
    assert "no such file or folder" in refusal(Path(name))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is no file or folder" in refusal(tmp_path / "pipe.gguf")


def test_a_file_that_is_cut_off_anywhere_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    whole, file = tiny_file.read_bytes(), tmp_path / "cut.gguf"
    for length in (*range(24, 4000, 37), len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:length])
        assert "is cut off" in refusal(file)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(
    *entries: bytes, tensors: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """A header with ``general.architecture`` and these entries."""
    own = (text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"), *entries)
    tensor_count, count = counts or (1 if tensors else 0, len(own))
    start = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, count)
    return start + b"".join(own) + tensors + b"\0" * 256


def tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(b"t") + sizes + struct.pack("<IQ", kind, offset)


def array(element: int, length: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, element, length)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")

HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "version 1": (header(version=1), "has GGUF version 1"),
    "big-endian": (header(version=3 << 24), "has GGUF version"),
    "2^60 settings": (header(counts=(0, 2**60)), "1,152,921,504,606,846,976 settings"),
    "2^60 tensors": (header(counts=(2**60, 1)), "1,152,921,504,606,846,976 tensors"),
    "a text of 2^62": (header(struct.pack("<Q", 2**62)), "a text of 4,611,686"),
    "an array of 2^60 bytes": (header(array(0, 2**60)), "arrays of 1,152,921"),
    "an array of 2^60 texts": (header(array(8, 2**60)), "arrays of 1,152,921"),
    "an array of a million": (header(array(12, 10**6)), "is cut off"),
    "an array of arrays": (header(array(9, 1)), "a value of type 9"),
    "an unknown value": (header(text(b"a") + struct.pack("<I", 99)), "a value of type 99"),
    "not UTF-8": (header(text(b"\xff\xfe")), "not UTF-8"),
    "a setting twice": (header(ARCHITECTURE), "general.architecture twice"),
    "odd alignment": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 24)),
        "general.alignment = 24",
    ),
    "no dimension": (header(tensors=tensor()), "of 0 dimensions"),
    "2^31 dimensions": (
        header(tensors=text(b"t") + struct.pack("<I", 2**31)),
        "of 2147483648 dimensions",
    ),
    "2^63 weights": (header(tensors=tensor(2**32, 2**31)), "is cut off: its tensors need"),
    "beyond the end": (header(tensors=tensor(1, offset=2**63)), "is cut off: its tensors need"),
    "no weights": (header(tensors=tensor(0, 8)), "of shape [0, 8]"),
    "half a block": (header(tensors=tensor(40, kind=8)), "of shape [40] in Q8_0"),
    "an unknown format": (header(tensors=tensor(32, kind=777)), "in an unknown format, 777"),
    "no context": (header(), "lacks llama.vocab_size"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(name: str, tmp_path: Path) -> None:
    content, said = HOSTILE[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert said in refusal(file)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("llama.block_count", 2**32 - 1, "num_hidden_layers = 4294967295; it must be"),
        ("llama.block_count", 0, "num_hidden_layers = 0"),
        ("llama.context_length", 2**31, "max_position_embeddings = 2147483648"),
        ("llama.attention.head_count", 0, "num_attention_heads = 0"),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1, "eos_token_id = [4294967295]"),
    ],
)
def test_a_size_that_no_model_has_is_refused(
    setting: str, value: int, said: str, tiny_file: Path, tmp_path: Path
) -> None:
    assert said in refusal(changed(tiny_file, tmp_path, setting, value))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.head_count_kv", 2**32 - 1),
        ("llama.rope.dimension_count", 2**31 - 1),
        ("llama.feed_forward_length", 2**31 - 1),
        ("llama.feed_forward_length", 97),
        ("llama.embedding_length", 2**30),
        ("llama.vocab_size", 301),
    ],
)
def test_a_size_that_does_not_fit_the_tensors_is_refused_before_memory_is_taken(
    setting: str, value: int, tiny_file: Path, tmp_path: Path
) -> None:
    file = changed(tiny_file, tmp_path, setting, value)
    with pytest.raises(UsageError, match=r"^--model "):
        load(file)


def changed(file: Path, folder: Path, setting: str, value: int) -> Path:
    """Return a copy of the file in which a 32-bit setting has another value."""
    content, name = bytearray(file.read_bytes()), text(setting.encode()) + struct.pack("<I", 4)
    at = bytes(content).index(name) + len(name)
    content[at : at + 4] = struct.pack("<I", value)
    copy = folder / "changed.gguf"
    copy.write_bytes(content)
    return copy


def test_an_architecture_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    numbers = ("vocab_size", "context_length", "embedding_length", "block_count")
    entries = [
        text(f"llama.{name}".encode()) + struct.pack("<II", 4, 8)
        for name in (*numbers, "attention.head_count")
    ]
    file = tmp_path / "model.gguf"
    content = header(*entries, tensors=tensor(4))
    file.write_bytes(content.replace(b"llama", b"zebra"))
    with pytest.raises(UsageError, match=r"header is not usable: .*zebra"):
        load(file)


def test_a_tensor_that_is_missing_is_named(tiny_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(tiny_file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(UsageError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(file)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_of_the_header_ends_in_a_model_or_a_usage_error(
    data: st.DataObject, tiny_file: Path, tmp_path: Path
) -> None:
    """The readers of gguf and transformers see only headers that ours accepts."""
    content = bytearray(tiny_file.read_bytes())
    end = content.rindex(b"weight") + 40
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    try:
        found = find_model(spec_of(file))
        count_parameters(found)
        tokenizer = find_tokenizer(file)
        if tokenizer is not None:
            encoder(tokenizer, chat=False)
        load(file)
    except UsageError:
        return


def test_reading_a_header_takes_no_torch(tiny_file: Path) -> None:
    assert read_gguf(tiny_file).config()["model_type"] == "llama"
