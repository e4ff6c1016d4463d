"""A mixer that no part of conversions knows has its windows chosen by a state budget, through `Mixer` alone."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch
import yaml
from huggingface_hub.dataclasses import strict

from rnnzoo.conversions.convert import convert
from rnnzoo.kernels.gated_linear_attention import WindowState
from rnnzoo.zoo.core.attention import AttentionProjections
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import model_classes
from rnnzoo.zoo.core.mixer import Mixer, MixerState
from rnnzoo.zoo.core.recurrences import window_attention
from rnnzoo.zoo.core.registry import CONFIGS, MIXERS, register_mixer
from rnnzoo.zoo.core.sizes import state_bytes

from .tiny import tiny_teacher

WORDS = "the state of a network is what it keeps of all the words that it has read so far".split()


@dataclasses.dataclass
class BandState(MixerState):
    window: WindowState


@pytest.fixture
def band(monkeypatch):
    """Registers the architecture for one test: softmax attention over the last tokens, a number for every kv head."""
    for table in (CONFIGS, MIXERS):
        monkeypatch.setitem(table, "band", None)  # put back, that is taken away, at the end

    @strict
    class BandConfig(RecurrentConfig):
        model_type = "rnnzoo-band"
        mixer = "band"
        window_sizes: list[list[int]] | None = None
        num_sinks: int = 0

    @register_mixer("band")
    class BandMixer(Mixer):
        kernel = "gated_linear_attention"
        divides_budget = True

        def __init__(self, config: BandConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.proj = AttentionProjections(config)
            sizes = config.window_sizes[layer_idx] if config.window_sizes else [8] * config.num_key_value_heads
            self.lengths = tuple(sizes)

        def init_from_attention(self, weights):
            self.proj.load(weights)

        def init_state(self, batch, device, dtype):
            width = self.proj.head_dim
            return BandState(WindowState.zeros(batch, self.lengths, 0, width, 0, width, dtype=dtype, device=device))

        def forward(self, hidden, state, ctx):
            q, k, v = self.proj.split(hidden)
            q, k = ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions)
            o, window = window_attention(q, k, v, self.lengths, None if state is None else state.window, ctx)
            return self.proj.o_proj(o.flatten(-2)), None if state is None else BandState(window)

    name = "rnnzoo.zoo.band.modeling_band"
    module = types.ModuleType(name)
    _, module.BandForCausalLM, _ = model_classes(BandConfig)
    module.BandForCausalLM.__module__ = name
    monkeypatch.setitem(sys.modules, "rnnzoo.zoo.band", types.ModuleType("rnnzoo.zoo.band"))
    monkeypatch.setitem(sys.modules, name, module)
    return module.BandForCausalLM


def test_a_state_budget_is_divided_among_its_windows(band, tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = (" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (300,), generator=generator)) for _ in range(20))
    data, recipe = tmp_path / "text.jsonl", tmp_path / "mine.yaml"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    stages = [{"name": "calibrate", "kind": "calibrate", "parts": ["windows"]}]
    settings = {"name": "mine", "student": "band", "state_budget": 3_000, "stages": stages}
    settings |= {"calibration_tokens": 128, "tokens": 0, "seq_len": 64, "batch_tokens": 64}
    recipe.write_text(yaml.safe_dump(settings))
    teacher = str(tiny_teacher("llama", tmp_path))
    results = convert(teacher, str(recipe), tmp_path / "out", data=[str(data)], evaluate=False, dtype="float32")
    allocation = results["conversion"]["stages"][-1]["allocation"]
    windows = [entry["windows"] for entry in allocation["layers"]]
    assert len({length for layer in windows for length in layer}) > 1 and allocation["state_bytes"] <= 3_000
    model = band.from_pretrained(tmp_path / "out")
    assert [list(block.mixer.lengths) for block in model.model.layers] == windows == model.config.window_sizes
    assert state_bytes(model.config, torch.float32) == allocation["state_bytes"]
