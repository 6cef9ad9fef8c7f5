#!/bin/bash
# A Slurm of two nodes on this machine, as root and without systemd: start.sh FOLDER, then
# `export SLURM_CONF=FOLDER/slurm.conf`. All keys, sockets, logs and states are below FOLDER.
#
# JAX's coordinator is the first node's name, which must resolve: the daemons, and with them all tasks,
# live in a mount namespace whose /etc/hosts has node1 and node2.
set -euo pipefail
folder=$1
if [ -z "${T5X_LITE_IN_NAMESPACE:-}" ]; then
  exec env T5X_LITE_IN_NAMESPACE=1 unshare -m bash "$0" "$@"
fi
mkdir -p "$folder"/{munge,state,log,spool/node1,spool/node2}
chmod 755 "$folder"; chmod 711 "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge.key"; chmod 400 "$folder/munge.key"
host=$(hostname -s)
sed "s|@FOLDER@|$folder|g; s|@HOST@|$host|g" "$(dirname "$0")/slurm.conf" > "$folder/slurm.conf"
{ cat /etc/hosts; echo "127.0.0.1 node1 node2"; } > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
unset T5X_LITE_IN_NAMESPACE
export SLURM_CONF=$folder/slurm.conf
munged --key-file="$folder/munge.key" --socket="$folder/munge/socket" \
  --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -c
slurmd -N node1
slurmd -N node2
for _ in $(seq 100); do
  [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && exit 0
  sleep 0.2
done
echo "the nodes did not come up; see $folder/log" >&2
exit 1
