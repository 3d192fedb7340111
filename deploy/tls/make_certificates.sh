#!/bin/sh
# Makes what learner.sh and actor.sh need: a certificate authority for this run, a certificate
# for the learner, and one for each actor machine.
#
#     make_certificates.sh FOLDER ACTOR...
#
# FOLDER/ca.key stays where it is made: whoever has it can make certificates. FOLDER/learner goes to
# the learner's machine, FOLDER/actors/ACTOR to that actor's, over a secure channel.
# Called again, it only makes what is missing, for instance for another actor.
# DAYS is the lifetime of certificates (365).
set -eu
if [ $# -lt 1 ]; then
  echo "usage: $0 FOLDER ACTOR..." >&2
  exit 2
fi
folder=$1
shift
umask 077
mkdir -p "$folder"

# make NAME FOLDER USAGE
make() {
  [ -e "$2/certificate.pem" ] && return
  mkdir -p "$2"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" \
    -keyout "$2/key.pem" -out "$2/request" 2>"$2/log" || { cat "$2/log" >&2; exit 1; }
  printf 'subjectAltName=DNS:%s\nextendedKeyUsage=%s\nbasicConstraints=critical,CA:FALSE\n' \
    "$1" "$3" >"$2/extensions"
  openssl x509 -req -in "$2/request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -CAcreateserial \
    -days "${DAYS:-365}" -extfile "$2/extensions" -out "$2/certificate.pem" 2>"$2/log" \
    || { cat "$2/log" >&2; exit 1; }
  cp "$folder/ca.pem" "$2/ca.pem"
  rm "$2/request" "$2/extensions" "$2/log"
}

if [ ! -e "$folder/ca.key" ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=IMPALA run' \
    -days "${DAYS:-365}" -keyout "$folder/ca.key" -out "$folder/ca.pem" 2>/dev/null
fi
# Each certificate states its use: an actor's cannot serve as a learner's.
make learner "$folder/learner" serverAuth
for actor in "$@"; do
  make "$actor" "$folder/actors/$actor" clientAuth
done
