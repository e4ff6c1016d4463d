"""GGUF files: header to config without touching tensors, then tensors into a clean model, one at a time.

The `gguf` package knows the names of tensors and unpacks their blocks; the header is read here. `gguf.GGUFReader` makes
an array of every word of the vocabulary, which for 49,152 words takes 8 times as long and 160 MB more. transformers'
reader refuses files with blocks of Q5_0 and Q5_1, and its loading marks the model as quantised (it cannot be saved),
drops RoPE scaling, head_dim and attention biases, and does not know GPT-NeoX.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import RnnzooError
from .families import FAMILIES, Family

__all__ = ["GgufHeader", "gguf_config", "gguf_family", "load_gguf_weights", "read_gguf_header"]

# general.architecture -> family. llama.cpp writes Mistral as "llama": the same mathematics without a sliding window.
ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gptneox": "gpt_neox"}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LLAMA3_ORIGINAL_POSITIONS = 8192


@dataclass(frozen=True)
class TensorEntry:
    """shape in torch order; offset in bytes from the start of the file; kind: ggml type number."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata: scalars and strings; a numeric array is a list, an array of strings only its length (int)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unnamed"))

    def get(self, key: str, default: Any = None) -> Any:
        """A key below the architecture's prefix, as in get("rope.freq_base")."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


class _Reader:
    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise EOFError
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.unpack("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"value type {kind}")
        element, count = self.unpack("I"), self.unpack("Q")
        if element in SCALARS:
            code = f"{count}{SCALARS[element]}"
            return list(struct.unpack("<" + code, self.take(struct.calcsize("<" + code))))
        if element != STRING:
            raise ValueError(f"array of type {element}")
        for _ in range(count):
            self.take(self.unpack("Q"))
        return count


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensor table of a GGUF file, without its tensors.

    Raises:
        RnnzooError: no such file, not GGUF, a version other than 2 and 3, damaged, or shorter than its table says.
    """
    from gguf import GGML_QUANT_SIZES

    if not path.is_file():
        raise RnnzooError(f"There is no GGUF file {path}; check the path.")
    size = path.stat().st_size
    if size < 24 or (magic := path.open("rb").read(4)) != b"GGUF":
        found = f"{size} bytes" if size < 24 else f"it starts with {magic!r}"
        raise RnnzooError(f"{path} is not a GGUF file ({found}); bring a whole .gguf file.")
    reader = _Reader(np.memmap(path, mode="r", dtype=np.uint8))
    reader.at = 4
    version, tensor_count, key_count = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
    if version not in (2, 3):
        raise RnnzooError(f"{path} is GGUF version {version}; versions 2 and 3 can be read.")
    try:
        metadata = {reader.string(): reader.value(reader.unpack("I")) for _ in range(key_count)}
        table = []
        for _ in range(tensor_count):
            name, dims = reader.string(), reader.unpack("I")
            shape = tuple(reversed([reader.unpack("Q") for _ in range(dims)]))
            table.append((name, shape, reader.unpack("I"), reader.unpack("Q")))
    except (EOFError, ValueError, struct.error, UnicodeDecodeError, MemoryError) as error:
        raise RnnzooError(f"{path} is damaged: its header cannot be read ({error}); download it again.") from error
    align = metadata.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    tensors = {}
    for name, shape, kind, offset in table:
        if kind not in GGML_QUANT_SIZES:
            raise RnnzooError(f"{path}: tensor {name} has the unknown ggml type {kind}; update the gguf package.")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > size:
            raise RnnzooError(f"{path} is cut short: {name} ends beyond its {size} bytes; download it again.")
        tensors[name] = TensorEntry(shape, int(kind), start + offset, nbytes)
    return GgufHeader(path, metadata, tensors)


def gguf_family(header: GgufHeader) -> Family:
    """Raises RnnzooError where general.architecture is not one of ours, or is a mixture of experts."""
    name = ARCHITECTURES.get(header.architecture)
    if name is None or header.get("expert_count"):
        experts = " with experts" if header.get("expert_count") else ""
        raise RnnzooError(
            f"{header.path} holds the unsupported GGUF architecture {header.architecture!r}{experts}; "
            f"supported are {', '.join(ARCHITECTURES)}."
        )
    return FAMILIES[name]


def gguf_config(header: GgufHeader, family: Family) -> Any:
    """The transformers config that the header describes.

    Raises:
        RnnzooError: a key that the architecture needs is missing, or its RoPE is of a kind that the family has not.
    """

    def need(key: str) -> Any:
        if (value := header.get(key)) is None:
            raise RnnzooError(f"{header.path} has no key {header.architecture}.{key}; it is not a whole model file.")
        return value

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = header.get("attention.key_length") or width // heads
    rotated = header.get("rope.dimension_count") or head_dim
    tokens = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    ids = {k: header.metadata.get(f"tokenizer.ggml.{n}_token_id") for k, n in
           (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))}  # fmt: skip
    settings = dict(
        vocab_size=tokens or need("vocab_size"),
        hidden_size=width,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        max_position_embeddings=need("context_length"),
        tie_word_embeddings="output.weight" not in header.tensors,
        rope_parameters=_rope_parameters(header, head_dim, rotated),
        **ids,
    )
    if family.model_type == "gpt_neox":
        settings["rope_parameters"]["partial_rotary_factor"] = rotated / head_dim
        return family.config_class(
            **settings,
            layer_norm_eps=_decimal(need("attention.layer_norm_epsilon")),
            use_parallel_residual=bool(header.get("use_parallel_residual", True)),
            attention_bias="blk.0.attn_qkv.bias" in header.tensors,
        )
    if rotated != head_dim:
        raise RnnzooError(f"{header.path} rotates {rotated} of {head_dim} channels; a {family.model_type} rotates all.")
    settings["num_key_value_heads"] = header.get("attention.head_count_kv", heads)
    settings["rms_norm_eps"] = _decimal(need("attention.layer_norm_rms_epsilon"))
    settings["head_dim"] = head_dim
    if family.model_type in ("llama", "qwen3"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if family.model_type == "mistral":
        settings["sliding_window"] = header.get("attention.sliding_window")
    return family.config_class(**settings)


def _decimal(value: float) -> float:
    """1e-5 written as float32 reads 9.99999975e-06: back to the number that was meant."""
    return float(f"{value:.6g}")


def _rope_parameters(header: GgufHeader, head_dim: int, rotated: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(header.get("rope.freq_base", 10000.0))}
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    original = header.get("rope.scaling.original_context_length")
    if kind in ("linear", "none") and factor not in (None, 0.0, 1.0):
        rope |= {"rope_type": "linear", "factor": _decimal(factor)}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": _decimal(factor), "original_max_position_embeddings": original}
    elif kind not in ("none", "linear"):
        raise RnnzooError(f"{header.path} has RoPE scaling {kind!r}; none, linear, yarn and Llama 3's are supported.")
    if "rope_freqs.weight" in header.tensors:
        rope |= _llama3_scaling(header, rope["rope_theta"], rotated)
    return rope


def _llama3_scaling(header: GgufHeader, theta: float, rotated: int) -> dict[str, Any]:
    """Llama 3.1's scaling is stored as one divisor per frequency: find its factor, and check the rest of the curve."""
    divisors = read_tensor(header, "rope_freqs.weight").double()
    factor = _decimal(divisors.max().item())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_POSITIONS,
    }
    frequency = theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    turns = LLAMA3_ORIGINAL_POSITIONS * frequency / (2 * math.pi)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise RnnzooError(f"{header.path} has RoPE frequency divisors that are not Llama 3's; this scaling is unknown.")
    return scaling


def read_tensor(header: GgufHeader, name: str) -> Tensor:
    """One tensor, unpacked to float32, in torch's shape.

    Raises:
        RnnzooError: it is missing or of a type that the gguf package cannot unpack.
    """
    from gguf import GGMLQuantizationType, dequantize

    entry = header.tensors.get(name)
    if entry is None:
        raise RnnzooError(f"{header.path} has no tensor {name}; it is not a whole model file.")
    raw = np.memmap(header.path, mode="r", dtype=np.uint8, offset=entry.offset, shape=(entry.nbytes,))
    rows = raw.reshape(*entry.shape[:-1], -1)
    try:
        values = dequantize(rows, GGMLQuantizationType(entry.kind))
    except (NotImplementedError, ValueError) as error:
        kind = GGMLQuantizationType(entry.kind).name
        raise RnnzooError(f"{header.path}: {name} is packed as {kind}, which cannot be unpacked.") from error
    return torch.from_numpy(np.array(values, dtype=np.float32)).view(entry.shape)


def load_gguf_weights(header: GgufHeader, family: Family, config: Any, dtype: torch.dtype) -> Any:
    """A clean model of the family with the file's weights; memory: the model and one tensor.

    Raises:
        RnnzooError: a tensor is missing, of another shape, or not readable.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.initialization import no_init_weights

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds.get(header.architecture, MODEL_ARCH.LLAMA), config.num_hidden_layers)
    with no_init_weights():
        model = family.model_class._from_config(config, dtype=dtype)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        source = names.get_name(name, (".weight", ".bias")) or name
        if source.endswith(".bias") and source not in header.tensors:
            values = torch.zeros(parameter.shape)  # transformers' attention_bias also gives o a bias
        else:
            values = _to_transformers_layout(read_tensor(header, source), source, header.architecture, config)
        if values.shape != parameter.shape:
            raise RnnzooError(
                f"{header.path}: {source} has shape {tuple(values.shape)}, expected {tuple(parameter.shape)}."
            )
        parameter.data.copy_(values)
    model.tie_weights()
    return model.eval()


def _to_transformers_layout(values: Tensor, source: str, architecture: str, config: Any) -> Tensor:
    """Undoes what llama.cpp does to rows: rotary pairs side by side (llama), q, k, v one after another (gptneox)."""
    if architecture == "llama" and (".attn_q." in source or ".attn_k." in source):
        heads = config.num_attention_heads if ".attn_q." in source else config.num_key_value_heads
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
    if architecture == "gptneox" and ".attn_qkv." in source:
        return values.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).reshape(values.shape)
    return values
