# shellcheck shell=bash disable=SC2034
# What the scripts beside this file share; they source it after `set -euo pipefail`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${CONTAINER_MANAGER_STATE:-${TMPDIR:-/tmp}/container-manager-$(id -u)}
APT=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300)
# `su` without a dash leaves root without the folders of dockerd, iptables and useradd.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

is_root() { [[ $(id -u) == 0 ]]; }

can_apt() {
    is_root && command -v apt-get >/dev/null &&
        grep -qE '^ID(_LIKE)?=.*\b(debian|ubuntu)\b' /etc/os-release 2>/dev/null
}

# with_log LOG COMMAND…: quiet, unless it fails.
with_log() {
    local log=$1
    shift
    # Without the lock: what an apt package starts would hold it for good.
    "$@" </dev/null >"$log" 2>&1 9>&- && return
    tail -n 15 "$log" >&2
    fail "'$*' failed; the end of $log is above"
}

# wait_until SECONDS COMMAND…
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

# is_running PIDFILE PROGRAM. A zombie has no program any more, though it counts as alive for kill -0.
is_running() {
    local pid
    pid=$(head -n 1 "$1" 2>/dev/null) && [[ -n $pid && $(readlink "/proc/$pid/exe") == */"$2"* ]]
}

apt_install() {
    local log=$STATE/${0##*/}.apt.log
    # The lists are mostly there and new enough; an update alone takes longer than most installs.
    "${APT[@]}" install --no-install-recommends "$@" </dev/null >"$log" 2>&1 9>&- && return
    with_log "$log" "${APT[@]}" update
    with_log "$log" "${APT[@]}" install --no-install-recommends "$@"
}

# Sees to PYTHON, and that it can make a venv.
need_python() {
    local found package
    PYTHON=${PYTHON:-python3}
    found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || found=missing
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "Python 3.11 or newer is needed, but $PYTHON is $found; name another in PYTHON"
    # Debian keeps what `venv` needs in a package of its own.
    "$PYTHON" -c 'import ensurepip' 2>/dev/null && return
    package=python$found-venv
    can_apt || fail "$PYTHON cannot make a venv: it has no ensurepip (on Debian and Ubuntu, install $package)"
    apt_install "$package"
}

# One at a time of each script. What stays behind in the background must not keep the lock: start it with 9>&-.
lock() {
    exec 9>"$STATE/${0##*/}.lock"
    ! command -v flock >/dev/null || flock -w 900 9 || fail "another ${0##*/} has been at work for 15 minutes"
}

# Not 700: PostgreSQL's user has to pass through.
mkdir -p "$STATE"
[[ -O $STATE ]] || fail "$STATE belongs to someone else; name another folder in CONTAINER_MANAGER_STATE"
chmod 711 "$STATE"
