#!/usr/bin/env bash
# The tests with the least version of every core dependency that pyproject.toml allows, in a virtual environment of its own.
#   bash scripts/minimum_versions.sh [pytest arguments]      default: models, conversion, cards, commands
#   RNNZOO_MINIMUM_VENV   where it is made (default: .venv-minimum in the checkout; it is kept for the next time)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/_env.sh"
venv=${RNNZOO_MINIMUM_VENV:-$root/.venv-minimum}

[ -x "$venv/bin/pip" ] || "$(find_python)" -m venv --clear "$venv"
# shellcheck disable=SC1091
source "$venv/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install_torch
python -m pip install -qq packaging
least=$(python - "$root/pyproject.toml" <<'PYTHON'
import sys, tomllib
from packaging.requirements import Requirement

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
for requirement in map(Requirement, project["dependencies"]):
    if requirement.name != "torch":  # CPU builds of old versions are not on every index; see install_torch
        print(requirement.name + "==" + next(part.version for part in requirement.specifier if part.operator == ">="))
PYTHON
)
# shellcheck disable=SC2086
python -m pip install -qq $least pytest pytest-xdist hypothesis scipy setuptools build
python -m pip install -qq --no-deps --editable "$root"
python -m pip list --format=freeze | grep -iE "^($(echo "$least" | sed 's/==.*//' | paste -sd '|')|torch)="

cd "$root"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# = 0 ]; then
    set -- tests/zoo/test_model.py tests/zoo/test_generation.py tests/conversions tests/cards tests/house/test_command_line.py
fi
exec python -m pytest -q -n "${RNNZOO_TEST_PROCESSES:-auto}" "$@"
