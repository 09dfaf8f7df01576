#!/bin/sh
# Installs what is missing, and says so before it does it. Run it as often as you like.
#
#   setup.sh check   what `make check` needs: the Python environment in .venv
#   setup.sh         what the tests and the demo need, too: bcc, tools for networks, Consul
#
# Debian packages need root; all else is put into this folder, and belongs to its owner.
set -eu
cd "$(dirname "$0")/.."
what=${1:-all}
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# What needs no root does not get it: run as the owner of this folder.
as_owner() {
    owner=$(stat -c %u .)
    if is_root && [ "$owner" != 0 ]; then
        home=$(getent passwd "$owner" | cut -d: -f6)
        setpriv --reuid="$owner" --regid="$(stat -c %g .)" --clear-groups env HOME="${home:-/nonexistent}" "$@"
    else
        "$@"
    fi
}

# Older lists of packages may name what the archive has replaced; then one update and a second try.
apt_install() {
    is_root || fail "missing Debian packages: $*; run once: sudo make setup"
    say "installing by apt-get:" "$@"
    set -- -qq install -y --no-install-recommends "$@"
    apt-get "$@" >/dev/null 2>&1 || {
        say "updating apt's lists of packages first"
        apt-get -qq update
        apt-get "$@" >/dev/null
    }
}

install_packages() {
    # python3 and python3-dev: always Debian's, as bcc's Python part is built for it alone.
    want="python3 python3-venv python3-dev gcc libc6-dev ca-certificates"
    [ "$what" = check ] || want="$want python3-bpfcc iproute2 ethtool"
    have=" $(dpkg-query -W -f='${db:Status-Status}/${Package} ' $want 2>/dev/null || true)"
    missing=
    for package in $want; do
        case $have in *" installed/$package "*) ;; *) missing="$missing $package" ;; esac
    done
    [ -z "$missing" ] || apt_install $missing
}

# --system-site-packages shows bcc to the environment. Made again when Debian's Python changes,
# filled again when what is to be installed or compiled changes.
install_venv() {
    python=$(/usr/bin/python3 --version)
    marks="$python $(cat pyproject.toml setup.py bpf/abi.h lbagent/core/*.[ch] | sha256sum)"
    had=$(cat .venv/installed 2>/dev/null || true)
    if [ "$had" = "$marks" ] && ls lbagent/core/_ring*.so >/dev/null 2>&1; then
        return
    fi
    if [ -e .venv ] && ! is_root && [ ! -w .venv ]; then
        fail ".venv belongs to $(stat -c %U .venv); run once: sudo make setup"
    fi
    say "installing lbagent and its tools into .venv (about a minute)"
    case $had in
        "$python "*) ;;
        *) as_owner /usr/bin/python3 -m venv --clear --system-site-packages .venv ;;
    esac
    as_owner .venv/bin/python -m pip install -qq --editable '.[dev]'
    as_owner .venv/bin/python -m compileall -q lbagent # root's runs write no bytecode into this folder
    echo "$marks" | as_owner tee .venv/installed >/dev/null
}

# The machine's own apt sources, reduced to Debian's main archive, with another release.
sources_of_release() {
    release=$1
    . /etc/os-release
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        # deb [signed-by=...] URI SUITE COMPONENT...
        awk -v now="$VERSION_CODENAME" -v release="$release" -v keyring="$keyring" '
            $1 == "deb" {
                options = ""
                if (match($0, /\[[^]]*\]/)) {
                    options = substr($0, RSTART + 1, RLENGTH - 2)
                    $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
                }
                key = keyring
                if (match(options, /signed-by=[^ ]+/)) key = substr(options, RSTART + 10, RLENGTH - 10)
                if ($2 ~ /\/debian(\/|\.list|$)/ && ($3 == now || $3 == "stable") && / main( |$)/)
                    printf "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n", $2, release, key
            }' "$file"
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        # A paragraph an entry; comments may stand anywhere.
        grep -v '^#' "$file" | awk -v RS= -v now="$VERSION_CODENAME" -v release="$release" -v keyring="$keyring" '
            function value(field,    lines, i, n) {
                n = split($0, lines, "\n")
                for (i = 1; i <= n; i++)
                    if (index(tolower(lines[i]), field ":") == 1) {
                        sub(/^[^:]*:[ \t]*/, "", lines[i])
                        return lines[i]
                    }
                return ""
            }
            {
                suites = " " value("suites") " "
                key = value("signed-by"); if (key !~ /^\//) key = keyring
                if (value("enabled") != "no" && (" " value("types") " ") ~ / deb / && value("uris") ~ /\/debian(\/|\.list| |$)/ &&
                    (index(suites, " " now " ") || index(suites, " stable ")) && (" " value("components") " ") ~ / main /)
                    printf "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n", value("uris"), release, key
            }'
    done
}

# apt checks the release's signature and the package's checksum, as it does for every package; it only
# looks into lists of its own, so that the machine never installs anything from that release.
fetch_consul() {
    say "fetching Consul of Debian bullseye into .cache/consul, by the machine's own apt configuration"
    box=$PWD/.cache/apt
    rm -rf .cache/apt .cache/consul
    as_owner mkdir -p .cache "$box/parts" "$box/lists/partial" "$box/cache/archives/partial"
    sources_of_release bullseye | as_owner tee "$box/parts/bullseye.sources" >/dev/null
    [ -s "$box/parts/bullseye.sources" ] || fail "no entry for Debian's main archive in /etc/apt; put a consul on PATH"
    bullseye_apt() {
        as_owner apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$box/parts" \
            -o Dir::State::Lists="$box/lists" -o Dir::Cache="$box/cache" -o APT::Sandbox::User=root "$@"
    }
    bullseye_apt update
    (cd "$box" && bullseye_apt download consul)
    as_owner dpkg -x "$box"/consul_*.deb .cache/consul.new
    as_owner mv .cache/consul.new .cache/consul
    rm -rf "$box"
}

install_consul() {
    if command -v consul >/dev/null || [ -x .cache/consul/usr/bin/consul ]; then
        return
    fi
    case $(apt-cache policy consul) in
        *"Candidate: "[0-9]*) apt_install consul ;;
        *) fetch_consul ;;
    esac
}

exec 9<contrib/setup.sh
flock 9 # one at a time

install_packages
install_venv
[ "$what" = check ] || install_consul
