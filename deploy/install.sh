#!/bin/bash
# Installs or upgrades everything on a machine with systemd 250 or newer. Run it again at any time:
# what is done already is not done again, and what runs is restarted only if something has changed.
#
#   make wheel && sudo deploy/install.sh dist/concert_reservation-VERSION-py3-none-any.whl
#
#   --wheels FOLDER   take the locked dependencies from wheels there, and nothing from a network
#   --workers N       so many workers (1 to 9); without it as many as there are, or 3
#   PYTHON=…          which Python, 3.11 or newer (default: /usr/bin/python3)
#
# Guarantees: the schema is migrated before anything new runs; programs are restarted one at a time,
# each when the one before is up; a step that fails leaves the rest running as it was (exit code 1).
# A release has a folder of its own, so that a program that runs never sees another one's files; the
# one before stays, and running its wheel's install.sh goes back to it.
set -euo pipefail
umask 022
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=/opt/concert-reservation etc=/etc/opt/concert-reservation units=/etc/systemd/system
python=${PYTHON:-/usr/bin/python3} wheels='' workers='' wheel=''
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "install.sh: $*"; }
refuse() { echo "install.sh: $*" >&2; exit 2; }
fail() { echo "install.sh: $*" >&2; exit 1; }

while [ $# != 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels: expected a folder}; shift ;;
    --workers) workers=${2:?--workers: expected a number}; shift ;;
    -*) refuse "$1: expected --wheels FOLDER, --workers N or a wheel" ;;
    *) wheel=$1 ;;
  esac
  shift
done
[ "$(id -u)" = 0 ] || refuse "needs root"
[ -d /run/systemd/system ] || refuse "needs systemd as the init process"
case $wheel in *.whl) ;; *) refuse "WHEEL: expected the file that \`make wheel\` made in dist/" ;; esac
[ -f "$wheel" ] || refuse "WHEEL: no such file: $wheel"
[ -z "$wheels" ] || [ -d "$wheels" ] || refuse "--wheels: no such folder: $wheels"
[[ -z $workers || $workers =~ ^[1-9]$ ]] || refuse "--workers: expected 1 to 9"
"$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || refuse "PYTHON: expected Python 3.11 or newer with venv (apt-get install python3-venv)"
case $(readlink -f "$python") in
  /home/*|/root/*) refuse "PYTHON: $python is in a home directory, where no service can see it" ;;
esac
exec 9>/run/concert-reservation-install.lock
flock --nonblock 9 || fail "another install.sh runs"

# ---- the release

requirements=("$here"/../requirements/{service,relay,loader,tracing}.txt)
version=$(basename "$wheel" | cut -d- -f2)
name=$version-$(cat "$wheel" "${requirements[@]}" | sha256sum | cut -c1-12)
release=$base/releases/$name
if [ -e "$release/.complete" ]; then
  say "$name is installed already"
else
  say "installing $name"
  rm -rf "$release"
  mkdir -p "$base/releases"
  "$python" -m venv "$release"
  pip=("$release/bin/python" -m pip install --quiet --no-deps)
  for file in "${requirements[@]}"; do
    "${pip[@]}" ${wheels:+--no-index --find-links "$wheels"} --require-hashes -r "$file"
  done
  "${pip[@]}" --no-index "$wheel"
  for command in reservation-service outbox-relay data-platform; do
    "$release/bin/$command" --version >/dev/null
  done
  touch "$release/.complete" # last: an install that was killed half-way is done again
fi

# ---- units and configuration

for unit in "$here"/systemd/*.{service,socket,target,timer}; do
  install -m 644 "$unit" "$units/"
  case $unit in *.service)
    install -D -m 644 "$here/systemd/hardening.conf" "$units/${unit##*/}.d/10-hardening.conf" ;;
  esac
done
install -d -m 755 "$etc"
install -d -m 700 "$etc/secrets"
random() { head -c "$1" /dev/urandom | base64 -w 0; }
secret() { # NAME COMMAND…: what is there stays
  [ -e "$etc/secrets/$1" ] || (umask 077; "${@:2}" >"$etc/secrets/$1.new"; mv "$etc/secrets/$1.new" "$etc/secrets/$1")
}
secret RESERVATION_SECRET_KEY random 36
secret RESERVATION_ADMIN_TOKEN random 24
secret kafka.properties echo '# librdkafka properties: TLS, SASL'
for file in kafka outbox-relay data-platform reservation-service; do
  [ -e "$etc/$file.env" ] || echo '# NAME=value; the names: docs/operations.md' >"$etc/$file.env"
done
systemctl daemon-reload

missing=()
for file in RESERVATION_DATABASE_URL OUTBOX_RELAY_DATABASE_URL ANALYTICS_DATABASE_URL; do
  [ -s "$etc/secrets/$file" ] || missing+=("$etc/secrets/$file")
done
grep -Eq '^KAFKA_BOOTSTRAP_SERVERS=.' "$etc/kafka.env" || missing+=("KAFKA_BOOTSTRAP_SERVERS in $etc/kafka.env")
[ ${#missing[@]} = 0 ] || refuse "installed, not started: fill in and run this again:$(printf '\n  %s' "${missing[@]}")"

# ---- the schema, by the new release, while the old one still runs

point() { ln -sfn "releases/$name" "$base/$1.new" && mv -T "$base/$1.new" "$base/$1"; }
point next
if [ -s "$etc/secrets/RESERVATION_OWNER_DATABASE_URL" ] && [ -s "$etc/secrets/ANALYTICS_OWNER_DATABASE_URL" ]; then
  systemctl start concert-reservation-migrate.service \
    || fail "migrations failed, what runs is as before: journalctl -u concert-reservation-migrate"
else
  say "no owner's secrets in $etc/secrets: nothing is migrated from here"
fi

# ---- relay, workers, service: one at a time

previous=$(readlink "$base/current" || true)
point current
wants=$units/concert-reservation.target.wants
if [ -n "$workers" ]; then
  for link in "$wants"/data-platform-worker@*.service; do
    number=${link##*@} number=${number%.service}
    [[ ! -L $link || $number =~ ^[1-$workers]$ ]] || systemctl disable --quiet --now "${link##*/}"
  done
elif ! compgen -G "$wants/data-platform-worker@*.service" >/dev/null; then
  workers=3
fi
for number in $(seq "${workers:-0}"); do systemctl enable --quiet "data-platform-worker@$number.service"; done
systemctl enable --quiet concert-reservation.target outbox-relay.service reservation-service.{socket,service} \
  reservation-service-expire-holds.timer

changed() { # UNIT RELEASE PATHS…: whether these or the release are others than at its last start
  wanted=$( (echo "$2"
    for part in "${@:3}"; do find "$units" "$etc" -type f -path "*$part*" -print0; done \
      | sort -z | xargs -0 -r sha256sum) | sha256sum)
  [ "$wanted" != "$(cat "$base/started/$1" 2>/dev/null)" ]
}
started() { echo "$wanted" >"$base/started/$1"; }
restart() { # UNIT PATHS…: of what it reads when it starts, drop-ins included
  changed "$1" "$name" "${@:2}" || return 0
  say "restarting $1"
  systemctl restart "$1" || fail "$1 does not start: journalctl -u $1 (the units after it run as before)"
  started "$1"
}
install -d -m 700 "$base/started"
restart outbox-relay.service outbox-relay kafka.env secrets/OUTBOX_RELAY_DATABASE_URL kafka.properties
for link in "$wants"/data-platform-worker@*.service; do
  number=${link##*@} number=${number%.service}
  restart "${link##*/}" data-platform-worker@ data-platform.env "data-platform-worker-$number.env" \
    kafka.env secrets/ANALYTICS_DATABASE_URL kafka.properties
done
if changed reservation-service.socket '' reservation-service.socket; then
  systemctl stop reservation-service.service # a socket in use can't move
  systemctl restart reservation-service.socket || fail "reservation-service.socket can't listen"
  started reservation-service.socket
fi
restart reservation-service.service reservation-service.service reservation-service.env \
  secrets/RESERVATION_DATABASE_URL secrets/RESERVATION_SECRET_KEY secrets/RESERVATION_ADMIN_TOKEN
systemctl start concert-reservation.target reservation-service.service

# All run this one now. The one before stays, to go back to.
[ "$previous" != "releases/$name" ] && [ -n "$previous" ] && echo "$previous" >"$base/previous"
for folder in "$base"/releases/*; do
  case releases/${folder##*/} in
    "releases/$name"|"$(cat "$base/previous" 2>/dev/null)") ;;
    *) rm -rf "$folder" ;;
  esac
done
say "$name runs"
