# Sourced by the scripts beside it, with the names of extras: makes .venv in the checkout, installs rnnzoo there (editable)
# and activates it. Where nothing changed since the last time, it installs nothing and needs no network.
#
#   RNNZOO_PYTHON        the Python to make .venv with (default: the first of python3.11 ... python3 that is new enough)
#   RNNZOO_TORCH_INDEX   where CPU builds of torch are (default: PyTorch's own index); only asked where no GPU is found
#                        and pip's configured sources have no CPU build

RNNZOO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_VERSION=2.13.0
TORCH_INDEX=${RNNZOO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

find_python() {
    local candidate
    for candidate in "${RNNZOO_PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv and ensurepip was found; install one (on Debian: python3-venv) or name it with RNNZOO_PYTHON" >&2
    return 1
}

install_torch() {
    # A plain `pip install torch` on Linux brings gigabytes of CUDA libraries.
    if python -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1; then
        return
    fi
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        python -m pip install -qq torch triton
    elif ! python -m pip install -qq "torch==$TORCH_VERSION+cpu" >/dev/null 2>&1; then
        # Of one version on both indexes, pip prefers the local build, "+cpu"; an index out of reach is passed over.
        python -m pip install -qq --extra-index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"
    fi
}

install_rnnzoo() { # extras, comma-separated
    local stamp="$VIRTUAL_ENV/.rnnzoo-$1"
    local wanted
    wanted="$RNNZOO_ROOT $(cksum <"$RNNZOO_ROOT/pyproject.toml")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "installing rnnzoo[$1] into $VIRTUAL_ENV (a few minutes the first time)"
    install_torch
    python -m pip install -qq --editable "$RNNZOO_ROOT[$1]"
    echo "$wanted" >"$stamp"
}

prepare() { # extras, comma-separated
    local venv="$RNNZOO_ROOT/.venv" python
    # A checkout that was moved leaves a .venv whose scripts point to the old place; an interrupted one has no pip.
    if ! grep -qsF "VIRTUAL_ENV=$venv" <(tr -d "\"'" 2>/dev/null <"$venv/bin/activate") || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        "$python" -m venv --clear "$venv"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_rnnzoo "$1"
}
