# Sourced by the findings beside it: `install PACKAGE==VERSION ...` makes `python` one that has these and a CPU build of
# torch, in a temporary folder that is gone when the script ends. With FINDINGS_VENV=FOLDER it is made there and stays, so
# that findings about the same versions install them once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

install() {
    local venv=${FINDINGS_VENV:-$folder/venv}
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    export PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
    unset PYTHONPATH
    python -m pip install -q "torch==2.13.0+cpu" 2>/dev/null ||
        python -m pip install -q --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
    python -m pip install -q "$@"
    cd "$folder"
}
