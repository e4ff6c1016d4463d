#!/usr/bin/env bash
# The main job on the embedded default: SmolLM2-135M-Instruct becomes a recurrent model in OUT, is measured, and answers.
#   bash scripts/quickstart.sh [OUT [rnnzoo convert options ...]]     OUT: default ./quickstart-model
# Run it again and it goes on where it was stopped; when all is done it only answers once more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/_env.sh"
prepare plots

out=${1:-./quickstart-model}
if [ $# -gt 0 ]; then shift; fi
rnnzoo convert embedded --out "$out" "$@"
rnnzoo generate "$out" "Why is the sky blue?" --max-new-tokens 80 --greedy
