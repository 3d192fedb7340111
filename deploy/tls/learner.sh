#!/bin/sh
# Runs the learner job where only actors with a certificate can reach it.
#
#     learner.sh CERTIFICATES PORT FLAGS...
#
# CERTIFICATES is the folder `learner` that make_certificates.sh made, PORT is where actors connect,
# FLAGS are those of experiment.py. PYTHON is the interpreter (python).
#
# The learner gets a network namespace with only a loopback interface: neither other machines nor
# other users of this one can reach the port that TensorFlow opens on all interfaces. stunnel's
# connections come through a Unix socket in a folder that only this user can open. Needs
# stunnel, socat, iproute2 and namespaces for users (`unshare --user` works); no root.
set -eu
if [ $# -lt 2 ]; then
  echo "usage: $0 CERTIFICATES PORT FLAGS..." >&2
  exit 2
fi
certificates=$(cd "$1" && pwd)
port=$2
shift 2
program=$(cd "$(dirname "$0")/../.." && pwd)/experiment.py
folder=$(mktemp -d)
tunnel= learner=
finish() {
  for pid in $tunnel $(cat "$folder/relay" 2>/dev/null); do
    kill "$pid" 2>/dev/null || true
  done
  # The relay removes its socket at the same time.
  rm -rf "$folder" || rm -rf "$folder"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

cat >"$folder/stunnel.conf" <<END
foreground = quiet
syslog = no
pid =
[learner]
accept = $port
connect = $folder/learner
cert = $certificates/certificate.pem
key = $certificates/key.pem
CAfile = $certificates/ca.pem
verifyChain = yes
requireCert = yes
sslVersionMin = TLSv1.3
socket = l:TCP_NODELAY=1
END
stunnel "$folder/stunnel.conf" 2>"$folder/log" &
tunnel=$!
# It ends at once if it cannot listen.
sleep 1
if ! kill -0 $tunnel 2>/dev/null || grep -q '^State:.Z' "/proc/$tunnel/status"; then
  echo "stunnel cannot listen on port $port: $(grep -m 1 'in use\|rror\|failed' "$folder/log")" >&2
  exit 2
fi

# exec, so that signals reach the learner itself.
unshare --user --map-root-user --net sh -c '
  folder=$1 && shift
  ip link set lo up
  socat "UNIX-LISTEN:$folder/learner,fork,backlog=1024" TCP:127.0.0.1:8000,nodelay &
  echo $! >"$folder/relay"
  exec "$@"
' sh "$folder" "${PYTHON:-python}" "$program" --job_name=learner --task=0 "$@" \
  --learner_address=localhost:8000 --trusted_network &
learner=$!
trap 'interrupted=1; kill -TERM $learner' TERM
trap 'interrupted=1; kill -INT $learner' INT
while :; do
  interrupted= code=0
  wait $learner || code=$?
  # A signal ends `wait`, but not yet the job, which first shuts down cleanly.
  [ -n "$interrupted" ] || exit $code
done
