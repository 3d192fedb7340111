#!/bin/sh
# Runs an actor job whose learner was started by learner.sh.
#
#     actor.sh CERTIFICATES LEARNER:PORT FLAGS...
#
# CERTIFICATES is the folder that make_certificates.sh made for this machine, FLAGS are those of
# experiment.py, including `--task`. LOCAL_PORT (8000) is this machine's end of the tunnel: jobs on one
# machine need one each, and whoever can log in here can use it while the job runs. PYTHON is
# the interpreter (python). Needs stunnel; no root.
set -eu
if [ $# -lt 2 ]; then
  echo "usage: $0 CERTIFICATES LEARNER:PORT FLAGS..." >&2
  exit 2
fi
certificates=$(cd "$1" && pwd)
learner=$2
shift 2
program=$(cd "$(dirname "$0")/../.." && pwd)/experiment.py
folder=$(mktemp -d)
tunnel= actor=
finish() {
  [ -z "$tunnel" ] || kill "$tunnel" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

cat >"$folder/stunnel.conf" <<END
foreground = quiet
syslog = no
pid =
[learner]
client = yes
accept = 127.0.0.1:${LOCAL_PORT:-8000}
connect = $learner
cert = $certificates/certificate.pem
key = $certificates/key.pem
CAfile = $certificates/ca.pem
verifyChain = yes
checkHost = learner
sslVersionMin = TLSv1.3
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
END
stunnel "$folder/stunnel.conf" 2>"$folder/log" &
tunnel=$!
# It ends at once if it cannot listen.
sleep 1
if ! kill -0 $tunnel 2>/dev/null || grep -q '^State:.Z' "/proc/$tunnel/status"; then
  echo "stunnel cannot listen on port ${LOCAL_PORT:-8000}: $(grep -m 1 'in use\|rror\|failed' "$folder/log")" >&2
  exit 2
fi

"${PYTHON:-python}" "$program" --job_name=actor "$@" \
  --learner_address="localhost:${LOCAL_PORT:-8000}" &
actor=$!
trap 'interrupted=1; kill -TERM $actor' TERM
trap 'interrupted=1; kill -INT $actor' INT
while :; do
  interrupted= code=0
  wait $actor || code=$?
  # A signal ends `wait`, but not yet the job, which first shuts down cleanly.
  [ -n "$interrupted" ] || exit $code
done
