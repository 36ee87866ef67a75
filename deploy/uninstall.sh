#!/bin/bash
# Removes all that install.sh made: programs, units, configuration and secrets. May be repeated.
#
#   sudo deploy/uninstall.sh [--keep-configuration]
#
# Databases and Kafka are left as they are; the last lines say what is there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=/opt/concert-reservation etc=/etc/opt/concert-reservation units=/etc/systemd/system
case ${1:-} in ''|--keep-configuration) ;; *) echo "uninstall.sh: expected --keep-configuration or nothing" >&2; exit 2 ;; esac
[ "$(id -u)" = 0 ] || { echo "uninstall.sh: needs root" >&2; exit 2; }
exec 9>/run/concert-reservation-install.lock
flock --nonblock 9 || { echo "uninstall.sh: install.sh runs" >&2; exit 1; }

# The sockets and timers first, which would start the others again.
for kind in timer socket target service; do
  for file in "$here"/systemd/*."$kind"; do
    unit=${file##*/}
    case $unit in
      *@.service)
        for link in "$units"/concert-reservation.target.wants/"${unit%.service}"*; do
          [ ! -L "$link" ] || systemctl disable --quiet --now "${link##*/}"
        done
        # Those that were started by hand, and the slice that all of them were in.
        systemctl stop "${unit%.service}*.service" "system-$(systemd-escape "${unit%@.service}").slice" ;;
      *) [ ! -e "$units/$unit" ] || { systemctl stop "$unit"; systemctl disable --quiet "$unit" 2>/dev/null || true; } ;;
    esac
  done
done
for file in "$here"/systemd/*.{service,socket,target,timer}; do
  unit=${file##*/}
  rm -f "$units/$unit" "$units/$unit.d/10-hardening.conf"
  if [ -z "${1:-}" ]; then rm -rf "$units/$unit.d"; elif [ -d "$units/$unit.d" ]; then rmdir --ignore-fail-on-non-empty "$units/$unit.d"; fi
done
rm -rf "$units/concert-reservation.target.wants" "$base"
[ -n "${1:-}" ] || rm -rf "$etc"
systemctl daemon-reload
systemctl reset-failed 'reservation-service*' 'outbox-relay*' 'data-platform-worker@*' 'concert-reservation*' 2>/dev/null || true
rm -f /run/concert-reservation-install.lock

cat <<'LEFT'
uninstall.sh: done. Left, for you to keep or delete:
  - the reservation database: reservations, the outbox, the relay's cursor; roles reservation_service, outbox_relay
  - the analysts' database: schema analytics; roles data_platform, analyst
  - in Kafka: the topics concert-reservation, concert-catalogue and outbox-relay-cursor.*; the group data-platform
  - the journal's lines of the units
LEFT
[ -z "${1:-}" ] || echo "  - $etc with its secrets, and drop-ins of yours in $units"
