#!/usr/bin/env bash
# Prepare a TPU VM: install the project with libtpu into .venv, then count the chips that PJRT sees. Safe to run again.
#   ./scripts/setup_tpu_vm.sh     on a TPU of several hosts: on all at once, as docs/pods.md does, because PJRT waits for all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($# == 0)) || { echo "setup_tpu_vm.sh: got '$*', expected no arguments" >&2; exit 2; }

./scripts/setup.sh # checks Python, makes .venv

log=.venv/setup.log
stamp=.venv/.installed-tpu
wanted="$(cat setup.py pyproject.toml | sha256sum | cut -d' ' -f1)"
if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
  echo "Installing .[tpu]: libtpu for torch_xla 2.9.0 ..." >&2
  if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[tpu]' >>"$log" 2>&1; then
    echo "setup_tpu_vm.sh: this failed; the end of $log:" >&2
    tail -n 15 "$log" >&2
    exit 1
  fi
  echo "$wanted" >"$stamp"
fi

limit=180
status=0
PJRT_DEVICE="${PJRT_DEVICE:-TPU}" timeout "$limit" .venv/bin/python - <<'PYTHON' || status=$?
import os
import sys

import torch_xla.runtime as xr
from torch_xla._internal import tpu

if os.environ["PJRT_DEVICE"] == "TPU" and not tpu.num_available_chips():
    sys.exit("setup_tpu_vm.sh: no TPU chip on this machine's PCI bus, expected a TPU VM; PJRT_DEVICE=CPU counts CPU devices")
here, everywhere = xr.addressable_runtime_device_count(), xr.global_runtime_device_count()
print(f"PJRT sees {here} {os.environ['PJRT_DEVICE']} devices on this host, {everywhere} on all hosts")
PYTHON
if ((status == 124)); then
  echo "setup_tpu_vm.sh: PJRT did not start within $limit s; on a TPU of several hosts, run this on all of them at once" >&2
fi
exit "$status"
