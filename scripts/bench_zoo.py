"""The zoo's architectures against transformers' own, with the same weights, in one run on this machine.

    python scripts/bench_zoo.py --out bench/zoo            # training and greedy decoding, all that can be compared
    python scripts/bench_zoo.py --only mamba --part decode
    python scripts/bench_zoo.py --part large               # decoding at width 768, 12 layers, in bfloat16

A model of transformers is made with random weights and imported; the logits must agree before anything is timed.
Writes OUT/figures.md and OUT/figures.json. With --check the exit code is 1 where a figure is missed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import transformers

import rnnzoo  # noqa: F401  adds the zoo to the Auto classes
from rnnzoo.benchmarks.figures import Figure, median_of_rounds, report
from rnnzoo.benchmarks.timing import seconds
from rnnzoo.conversions.memory import keep_freed_memory
from rnnzoo.zoo import import_checkpoint

WIDTH, LAYERS, VOCABULARY, TIME = 256, 4, 1024, 1024
SHARED = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
HYBRID = ["linear_attention"] * 3 + ["full_attention"]  # transformers' Kimi Linear does not run without attention
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODING = 2.0  # at least so many times transformers' tokens per second
DECODED = 256  # tokens of a generation


@dataclass(frozen=True)
class Peer:
    """A model of transformers: which of ours it is, its classes' prefix, its sizes, and the figure for training."""

    architecture: str
    name: str
    sizes: dict[str, Any]
    training: float


PEERS = (
    Peer("mamba", "Mamba", {"state_size": 16, "tie_word_embeddings": True}, 200),
    Peer("rwkv4", "Rwkv", {"context_length": TIME, "rescale_every": 0}, 5),
    Peer(
        "griffin",
        "RecurrentGemma",
        {"num_attention_heads": 4, "lru_width": WIDTH, "intermediate_size": 6 * WIDTH, "attention_window_size": 512},
        3,
    ),
    Peer(
        "kda",
        "KimiLinear",
        {
            "layer_types": HYBRID,
            "mlp_layer_types": ["dense"] * LAYERS,
            "linear_head_dim": 64,
            "linear_num_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 3 * WIDTH,
            "num_local_experts": 4,
        },
        5,
    ),
    Peer("mamba2", "Mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}, 1.5),
    Peer("xlstm", "xLSTM", {"num_heads": 4}, 1.5),
    Peer(
        "gated_delta_net",
        "Qwen3Next",
        {
            "layer_types": HYBRID,
            "mlp_only_layers": list(range(LAYERS)),
            "intermediate_size": 3 * WIDTH,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_experts": 4,
        },
        1.5,
    ),
)


def enlarged(peer: Peer) -> Peer:
    """Three times as wide, by three times the heads, and three times as deep."""
    sizes = dict(peer.sizes)
    widened = [name for name in sizes if name.endswith(("_heads", "intermediate_size", "lru_width", "num_heads"))]
    sizes |= {name: 3 * sizes[name] for name in widened}
    sizes |= {name: 3 * sizes[name] for name in ("layer_types", "mlp_layer_types") if name in sizes}
    sizes |= {"mlp_only_layers": list(range(3 * LAYERS))} if "mlp_only_layers" in sizes else {}
    return replace(peer, sizes=sizes | {"hidden_size": 3 * WIDTH, "num_hidden_layers": 3 * LAYERS})


def pair(peer: Peer) -> tuple[Any, Any]:
    """Transformers' model and ours, of the same weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{peer.name}Config")(**SHARED | SPECIAL | peer.sizes)
    theirs = getattr(transformers, f"{peer.name}ForCausalLM")(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "theirs")
        out = import_checkpoint(Path(folder) / "theirs", peer.architecture, Path(folder) / "ours")
        ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(3, VOCABULARY, (1, 100))
    with torch.no_grad():
        expected = theirs(ids).logits
        # Rounding grows with depth: twelve layers of Mamba end 1e-3 of the spread from float64, on both sides.
        tolerance = 1e-4 if config.num_hidden_layers == LAYERS else 1e-3 * max(1.0, float(expected.std()))
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=tolerance)
    return theirs, ours


def training_step(model: Any) -> Callable[[], None]:
    """Forward and backward of one row of text."""
    ids = torch.randint(3, VOCABULARY, (1, TIME), generator=torch.Generator().manual_seed(1))

    def run() -> None:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def tokens_per_second(models: list[Any], tokens: int, repeats: int = 5) -> list[float]:
    """Greedy decoding of one row by generate(), prompt of 8 tokens; by turns, the best of some runs of each."""
    ids = torch.arange(3, 11)[None]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    best = [0.0] * len(models)
    for _ in range(repeats):
        for i, model in enumerate(models):
            model.eval()
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            best[i] = max(best[i], tokens / (time.perf_counter() - started))
    return best


def products(model: Any, steps: int, budget: float, backward: bool) -> float:
    """Seconds of the matrix products of so many tokens alone, one layer after the other with nothing in between.

    Nothing with the same weights can be faster; decoding one row reads all of them for every token.
    """
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(1, steps, layer.in_features, requires_grad=backward) for layer in layers]
    weights = [torch.randn(1, steps, layer.out_features) for layer in layers]

    def run() -> None:
        for layer, x, weight in zip(layers, inputs, weights, strict=True):
            y = layer(x)
            if backward:
                y.backward(weight)

    with torch.set_grad_enabled(backward):
        return seconds(run, budget=budget)


def measure_large(peer: Peer) -> Figure:
    theirs, ours = (model.to(torch.bfloat16) for model in pair(enlarged(peer)))
    with torch.no_grad():
        own, other = tokens_per_second([ours, theirs], DECODED // 4, repeats=3)
    size = f"{ours.num_parameters() / 1e6:.0f}M, bfloat16"
    what = f"{peer.architecture} ({size}), greedy decoding: {own:.0f} tokens/s"
    return Figure(what, f"transformers {peer.name}", own / other, " x", DECODING)


def measure(peer: Peer, budget: float, parts: list[str]) -> Iterator[Figure]:
    if "large" in parts:
        yield measure_large(peer)
    if not {"train", "decode"} & set(parts):
        return
    theirs, ours = pair(peer)
    size = f"{ours.num_parameters() / 1e6:.1f}M"
    if "train" in parts:
        own = seconds(training_step(ours), budget=budget)
        other = seconds(training_step(theirs), budget=budget)
        what = f"{peer.architecture} ({size}), forward and backward, 1 x {TIME}: {1e3 * own:.0f} ms"
        possible = other / products(ours, TIME, budget / 3, backward=True)
        yield Figure(what, f"transformers {peer.name}; possible {possible:.3g} x", other / own, " x", peer.training)
    if "decode" in parts:
        with torch.no_grad():
            own, other = tokens_per_second([ours, theirs], DECODED)
        what = f"{peer.architecture} ({size}), greedy decoding: {own:.0f} tokens/s"
        possible = 1 / (other * products(ours, 1, budget / 3, backward=False))
        yield Figure(what, f"transformers {peer.name}; possible {possible:.3g} x", own / other, " x", DECODING)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice([peer.architecture for peer in PEERS]))
@click.option(
    "--part", "parts", multiple=True, default=("train", "decode"), type=click.Choice(["train", "decode", "large"])
)
@click.option("--seconds", "budget", type=float, default=3.0, show_default=True, help="Time for each training number.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Of all measurements.")
@click.option("--check", is_flag=True, help="Exit 1 where a figure is missed.")
def main(out, only, parts, budget, rounds, check) -> None:
    """Measure, and write the table."""
    transformers.logging.set_verbosity_error()
    keep_freed_memory()
    tables: list[list[Figure]] = []
    for _ in range(rounds):
        tables.append([])
        for peer in PEERS:
            if only and peer.architecture not in only:
                continue
            for figure in measure(peer, budget, list(parts)):
                tables[-1].append(figure)
                click.echo(figure.line())
    figures = median_of_rounds(tables)
    heading = f"{torch.get_num_threads()} threads, float32, width {WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY}."
    click.echo("\n" + report(figures, heading, out))
    if check and not all(figure.met for figure in figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
