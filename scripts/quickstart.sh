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
echo "converting SmolLM2-135M-Instruct into $out, then measuring it (tens of minutes on two cores; stop it at any moment and run this again)"
rnnzoo convert embedded --out "$out" "$@"
echo
echo "asking it: Why is the sky blue?"
rnnzoo generate "$out" "Why is the sky blue?" --max-new-tokens 80 --greedy
echo
echo "the model and its card: $out/README.md"
