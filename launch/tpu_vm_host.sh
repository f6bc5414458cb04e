#!/usr/bin/env bash
# What launch/tpu_vm.sh has each host of a TPU slice do; in ~/vgpt: the code, the log, and how far it is.
#
#   set_up CHECKSUM   unpacks ~/code.tar, installs the project, mounts the storage; leaves CHECKSUM in ~/vgpt/set_up
#   train             starts training, detached, unless it runs or is finished
#   status            prints "not started", "running", "stopping", "stopped", "interrupted" (with the host) or "ended STATUS"
#   stop              has training save and end
#
# BUCKET, NFS, MOUNT, WORKDIR and TRAIN come from there.
set -uo pipefail
cd "$HOME/vgpt" || exit 1

mount_storage() {
  mountpoint -q "$MOUNT" && return
  if [ -n "$BUCKET$NFS" ]; then
    sudo mkdir -p "$MOUNT" && sudo chown "$(id -un)" "$MOUNT" || return 1
  fi
  if [ -n "$BUCKET" ]; then
    # Without a cache of names and sizes: a host has to see at once what another wrote.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$BUCKET" "$MOUNT"
  elif [ -n "$NFS" ]; then
    sudo mount -t nfs "$NFS" "$MOUNT"
  fi
}

install_storage() {
  local from="deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt"
  if [ -n "$BUCKET" ] && ! command -v gcsfuse > /dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null || return 1
    echo "$from gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null || return 1
    sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
  elif [ -n "$NFS" ] && ! command -v mount.nfs > /dev/null; then
    sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
  fi
}

set_up() {
  if runs; then
    echo "error: training runs with other code: bash launch/tpu_vm.sh stop, then once more" >&2
    return 2
  fi
  install_storage && mount_storage || return 1
  mkdir -p code && find code -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && tar -xf ../code.tar -C code || return 1
  source code/launch/environment.sh  # goes to the code
  if ! PYTHON="$(find_python 2> /dev/null)"; then  # the image's Python is older than what the project needs
    python3 -m pip install --quiet --user uv && python3 -m uv python install 3.12 || return 1
    PYTHON="$(python3 -m uv python find 3.12)" || return 1
  fi
  environment tpu
  echo "$1" > "$HOME/vgpt/set_up"
}

boot() { cat /proc/sys/kernel/random/boot_id; }  # another one after each start of the host

runs() {
  [ ! -f train.status ] && [ -f train.pid ] && [ "$(boot)" = "$(cat train.boot)" ] && kill -0 "$(cat train.pid)" 2> /dev/null
}

status() {
  local ended
  ended="$(cat train.status 2> /dev/null)"
  if runs; then
    if [ -f train.stopped ]; then echo stopping; else echo running; fi
  elif [ -f train.stopped ]; then
    echo stopped
  elif [ ! -f train.pid ]; then
    echo "not started"
  elif [ -z "$ended" ] || [ "$ended" = 75 ] || [ "$ended" = 143 ]; then  # the host's end ended it
    echo interrupted
  else
    echo "ended $ended"
  fi
}

train() {
  case "$(status)" in
    running | "ended 0")
      status
      return
      ;;
    stopping)
      echo "error: training is still saving: once more in a minute" >&2
      return 2
      ;;
  esac
  mount_storage || return 1
  local arguments
  read -ra arguments <<< "$TRAIN"
  rm -f train.status train.stopped
  boot > train.boot
  (
    cd code || exit 1
    trap '' HUP
    setsid bash -c 'bash launch/again.sh "$@"; echo $? > ../train.status' again \
      .venv/bin/python -m vgpt_jax.main "${arguments[@]}" --workdir="$WORKDIR" < /dev/null >> ../train.log 2>&1 &
    echo $! > ../train.pid
  )
  status
}

stop() {
  runs || return 0
  touch train.stopped
  until pkill -TERM --parent "$(cat train.pid)"; do  # launch/again.sh, which passes it on and starts nothing again
    runs || return 0
    sleep 0.2
  done
}

case "${1:-}" in
  set_up | train | status | stop) "$@" ;;
  *) echo "error: set_up CHECKSUM, train, status or stop, not '${1:-}'" >&2; exit 2 ;;
esac
