#!/bin/bash
# Ends what start.sh started, and the jobs that are left: stop.sh FOLDER. Their mount namespace goes too.
export SLURM_CONF=$1/slurm.conf
scancel --user=root --signal=KILL --full 2>/dev/null
scancel --user=root 2>/dev/null
for _ in $(seq 50); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 0.2; done
for file in "$1"/slurmd-node1.pid "$1"/slurmd-node2.pid "$1"/slurmctld.pid "$1"/munge/pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
done
exit 0
