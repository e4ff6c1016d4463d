#!/usr/bin/env bash
# torch 2.13.0, CPU: a matrix product in bfloat16 on an x86 CPU without AVX-512 takes dozens of times as long as the same
# in float32, and nothing says so. Half the bytes and a cast to float32 would suggest about the same time.
source "$(dirname "$0")/_install.sh"
# A CPU that has the instructions is held to AVX2, the set of most laptops.
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
install numpy
python - <<'PROGRAM'
import platform
import time

import torch

print("version: torch", torch.__version__)
if platform.machine().lower() not in ("x86_64", "amd64"):
    raise SystemExit(print(f"seen: {platform.machine()} is no x86 CPU; this does not apply"))
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    raise SystemExit(print("seen: oneDNN was not held to AVX2; this does not apply"))
print("does: (256, 576) @ (576, 1536) on one thread, the best of three, as it is in bfloat16 and by a cast to float32")
a, b = torch.randn(256, 576).bfloat16(), torch.randn(576, 1536).bfloat16()
seconds = {}
for name, product in {
    "bfloat16": lambda: a @ b,
    "cast to float32 and back": lambda: (a.float() @ b.float()).bfloat16(),
}.items():
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        product()
        taken.append(time.perf_counter() - started)
    seconds[name] = min(taken)
    print(f"seen: {name}: {seconds[name] * 1e3:.1f} ms")
ratio = seconds["bfloat16"] / seconds["cast to float32 and back"]
print(f"seen: {ratio:.0f} times as long in bfloat16")
assert ratio > 5, "bfloat16 is no longer slow without the instructions"
PROGRAM
