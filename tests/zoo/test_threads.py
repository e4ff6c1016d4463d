"""Models that generate, or train, in several threads of one process do what each does alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch

GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
ROUNDS = 4


def prompt(i: int) -> torch.Tensor:
    return torch.randint(3, 61, (1, 7 + i), generator=torch.Generator().manual_seed(i))


def at_once(*functions: Callable[[], torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each function gave, called again and again in a thread of its own that starts with the others."""
    results: list[list[torch.Tensor]] = [[] for _ in functions]
    together = threading.Barrier(len(functions))

    def work(i: int) -> None:
        together.wait()
        for _ in range(ROUNDS):
            results[i].append(functions[i]())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_as_alone(*functions: Callable[[], torch.Tensor]) -> None:
    alone = [function() for function in functions]
    for found, expected in zip(at_once(*functions), alone, strict=True):
        assert [torch.equal(x, expected) for x in found] == [True] * ROUNDS


def generating(model, i: int) -> Callable[[], torch.Tensor]:
    return lambda: model.generate(prompt(i), **GREEDY)


@pytest.mark.parametrize(
    "kinds", [("gla", "gla"), ("mamba2", "mamba2"), ("gla", "mamba2", "rwkv7", "supra")], ids="+".join
)
def test_models_that_generate_at_once_give_the_tokens_that_each_gives_alone(make_model, kinds):
    models = [make_model((kind,) * 6, torch.float32, seed=i) for i, kind in enumerate(kinds)]
    assert_as_alone(*(generating(model, i) for i, model in enumerate(models)))


@pytest.mark.parametrize("threads", [2, 4])
def test_one_model_that_generates_in_several_threads_gives_the_tokens_that_it_gives_in_one(make_model, threads):
    model = make_model(("gla", "full_attention", "mamba2") * 2, torch.float32)
    assert_as_alone(*(generating(model, i) for i in range(threads)))
    assert model.model.decoding is None


@pytest.mark.parametrize("shared", [True, False], ids=["the same model", "another model"])
def test_generation_beside_a_training_step_changes_neither(make_model, shared):
    model = make_model(("gla", "mamba2") * 3, torch.float32)
    trained = model if shared else copy.deepcopy(model)
    parameters = dict(trained.named_parameters())

    def gradients() -> torch.Tensor:
        logits = trained(prompt(9)).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], prompt(9)[0, 1:])
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(parameters.values()))])

    assert_as_alone(generating(model, 0), gradients, generating(model, 1))


def test_a_model_copied_while_it_generates_decodes_by_itself(make_model):
    model, copies = make_model(("gla", "mamba2"), torch.float32), []

    class Copies:
        def put(self, value: torch.Tensor) -> None:
            copies.append(copy.deepcopy(model))

        def end(self) -> None: ...

    tokens = model.generate(prompt(0), streamer=Copies(), **GREEDY)
    assert len(copies) > 4 and all(other.model.decoding is None for other in copies)
    assert torch.equal(copies[-1].generate(prompt(0), **GREEDY), tokens)
