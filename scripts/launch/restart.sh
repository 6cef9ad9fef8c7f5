#!/bin/bash
# Runs a command again until it has finished: on one machine, in a container, on each worker of a pod.
#
#   scripts/launch/restart.sh python -m t5x_lite.train --config=… --workdir=…
#
# By t5x_lite's exit status: 0 is finished, 2 a mistake of yours (nothing helps but to mend it), 77 saved
# and asked to stop (start again), all others a fault or a kill. A fault is tried T5X_LITE_RETRIES times
# in a row (5), with a pause that doubles from 5 s to 5 min; a life of more than ten minutes counts as
# progress and sets the count back. SIGTERM is handed on, and ends the loop once the run has saved.
set -u
export T5X_LITE_STOPPED_STATUS=77
retries=${T5X_LITE_RETRIES:-5}
[ $# -gt 0 ] || { echo "usage: $0 COMMAND…" >&2; exit 2; }
echo "restart.sh: $*; look at metrics.jsonl in its workdir" >&2
child=0 stopped=0 tries=0
stop() { stopped=1; [ "$child" = 0 ] || kill -TERM "$child" 2>/dev/null; }
trap stop TERM INT HUP
while :; do
  began=$SECONDS
  "$@" & child=$!
  wait "$child"; status=$?
  # A trapped signal ends `wait` early: the run is still saving.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
  child=0
  case $status in 0|2) exit "$status" ;; esac
  [ "$stopped" = 0 ] || exit "$status"
  if [ "$status" = 77 ] || [ $((SECONDS - began)) -gt 600 ]; then tries=0; fi
  tries=$((tries + 1))
  if [ "$tries" -gt "$retries" ]; then
    echo "restart.sh: exit status $status, $retries times in a row; giving up" >&2
    exit "$status"
  fi
  pause=$((5 << (tries - 1))); [ "$pause" -le 300 ] || pause=300
  [ "$status" != 77 ] || pause=0
  echo "restart.sh: exit status $status; starting again in $pause s ($tries of $retries)" >&2
  sleep "$pause" & wait $!
  [ "$stopped" = 0 ] || exit "$status"
done
