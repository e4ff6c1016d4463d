#!/usr/bin/env bash
# Installs what the tests need into .venv of the checkout and runs them; arguments go to pytest.
#   bash scripts/test.sh                  the default suite
#   bash scripts/test.sh -m slow          the tests that take minutes
#   bash scripts/test.sh tests/kernels -k window
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/_env.sh"
prepare dev

cd "$RNNZOO_ROOT"
# No test needs the Hub; without this each look-up would wait for a network that may not be there.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A process for each core, each with one thread: most tests are many small calls. Each begins with its own share of the
# files, so that what a file's tests share is made once, and takes some from the other when it is done.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n "${RNNZOO_TEST_PROCESSES:-auto}" --dist worksteal "$@"
