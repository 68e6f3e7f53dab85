#!/usr/bin/env bash
# Every GPU row within 8 minutes: large-v2's and small's shapes with random weights, nothing is downloaded.
# Writes bench/results/<device>.json and bench/results/<device>-kernels.md. Run it from the repository's root:
#     bench/gpu.sh [python]
set -euo pipefail
python=${1:-.venv/bin/python}
test -x "$python" || python=python3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
limit=480
"$python" - <<'END'
import sys
import torch

sys.exit(None if torch.cuda.is_available() else "bench/gpu.sh: PyTorch sees no GPU here; `make bench` measures the CPU")
END
results=bench/results
mkdir -p "$results"
SECONDS=0
# Rows are written after each group, so that a run cut off at the limit still leaves what it measured.
timeout "$limit" "$python" -m bench.run --device gpu || echo "bench/gpu.sh: ended with $? after $SECONDS s" >&2
name=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
left=$((limit - SECONDS))
if [ "$left" -gt 20 ]; then
  timeout "$left" "$python" -m bench.kernels | tee "$results/$name-kernels.md"
fi
echo "bench/gpu.sh: $SECONDS s in all"
