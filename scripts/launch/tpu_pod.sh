#!/bin/bash
# One training on a TPU slice of Google Cloud, from the request for it to its end.
#
#   PROJECT=my-project ZONE=us-central1-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     scripts/launch/tpu_pod.sh NAME --config=configs/t5_1_1.py:base --workdir=gs://bucket/run
#
# Asks for a queued resource (SPOT=1: a cheap one that may be taken away), waits for it, installs this
# checkout on every worker and starts the same command on all; they find one another. When the slice is
# taken away, or the run ends with anything but 0 or 2, the slice is given back and asked for anew, up to
# RETRIES times (20), and the same workdir goes on: it must be in a bucket. KEEP=1 leaves the slice at
# the end. Where to look: the workdir's metrics.jsonl, and `gcloud compute tpus queued-resources list`.
set -euo pipefail
: "${PROJECT:?your project}" "${ZONE:?such as us-central1-a}" "${TYPE:?such as v5litepod-16}"
: "${RUNTIME:?such as v2-alpha-tpuv5-lite}"
name=${1:?usage: tpu_pod.sh NAME --config=… --workdir=gs://…}; shift
retries=${RETRIES:-20} wait_minutes=${WAIT_MINUTES:-1440}
case " $* " in *" --workdir=gs://"*) ;; *)
  echo "--workdir must be in a bucket (gs://…): a slice that is taken away takes its disks along" >&2
  exit 2 ;;
esac
where=(--project="$PROJECT" --zone="$ZONE")
top=$(cd "$(dirname "$0")/../.." && pwd)

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

give_back() {
  [ "$(state)" = NONE ] ||
    gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

ask() {
  local kind=()
  [ -z "${SPOT:-}" ] || kind=(--spot)
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${kind[@]}"
  for ((minute = 0; minute < wait_minutes; minute++)); do
    case $(state) in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | NONE) return 1 ;;
    esac
    sleep 60
  done
  echo "no slice of $TYPE within $wait_minutes minutes" >&2
  return 1
}

on_all() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

install() {
  tar -C "$top" --exclude=.venv --exclude=.git --exclude=runs -czf /tmp/t5x_lite.tgz .
  gcloud compute tpus tpu-vm scp /tmp/t5x_lite.tgz "$name:" "${where[@]}" --worker=all
  on_all "mkdir -p t5x_lite && tar -C t5x_lite -xzf t5x_lite.tgz && cd t5x_lite &&
    python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu,gcs]'"
}

echo "=== look at gcloud compute tpus queued-resources describe $name ${where[*]}, and at metrics.jsonl in the" \
  "workdir: $*"
arguments=$(printf ' %q' "$@")
for ((life = 0; life <= retries; life++)); do
  echo "=== $(date '+%F %T') life $life"
  status=1
  if [ "$(state)" = ACTIVE ] || { give_back && ask; }; then
    if install; then
      status=0
      on_all "cd t5x_lite && T5X_LITE_STOPPED_STATUS=77 .venv/bin/python -u -m t5x_lite.train$arguments" || status=$?
    fi
  fi
  echo "=== $(date '+%F %T') exit status $status, slice $(state)"
  case $status in 0 | 2) break ;; esac
  give_back
done
[ -n "${KEEP:-}" ] || give_back
exit "$status"
