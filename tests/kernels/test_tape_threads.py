"""Tapes in several threads: each holds what its own thread does."""

from __future__ import annotations

import threading

import torch

from rnnzoo.kernels.gated_linear_attention import gated_linear_attention_step
from rnnzoo.kernels.tape import Tape


def test_a_tape_holds_what_its_own_thread_does_and_nothing_of_others():
    q, k, v = torch.randn(3, 1, 2, 8)
    states = torch.randn(2, 1, 2, 8, 8)
    with torch.no_grad():
        with Tape() as earlier:
            gated_linear_attention_step(q * 2, k, v, None, states[1])

        def elsewhere() -> None:
            with torch.no_grad():
                gated_linear_attention_step(q, k, v, None, states[1])
                earlier.replay()

        with Tape() as tape:
            gated_linear_attention_step(q, k, v, None, states[0])
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
            gated_linear_attention_step(q, k, v, None, states[0])
        before = states.clone()
        tape.replay()
        assert torch.equal(states[1], before[1])
        for _ in range(2):
            gated_linear_attention_step(q, k, v, None, before[0])
    torch.testing.assert_close(states[0], before[0])


def test_tapes_of_several_threads_leave_nothing_of_torch_switched():
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    x = torch.randn(8)
    together = threading.Barrier(4)

    def write() -> None:
        together.wait()
        for _ in range(50):
            with torch.no_grad(), Tape() as tape:
                x * 2
            assert tape.problem is None

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not is_in_torch_dispatch_mode()
