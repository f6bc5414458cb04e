"""launch/tpu_vm.sh against a cloud of two hosts in two folders, which does what it is asked and notes it."""

import re
import shlex

import pytest

from .conftest import wait_until

STORAGE = {"BUCKET": "bucket", "MOUNT": "/mnt/vgpt"}
GCLOUD = r"""
cloud="$HOME/cloud"
for word in "$@"; do
  case "$word" in
    --command=*) command="${word#--command=}" ;;
    --node=0) hosts="$cloud/host0" ;;
    --node=all) hosts="$cloud/host0 $cloud/host1" ;;
  esac
done
case "$4" in
  list) cat "$cloud/state" 2> /dev/null || true ;;
  create) mkdir -p "$cloud/host0" "$cloud/host1"; echo "${AFTER_CREATE:-ACTIVE}" > "$cloud/state" ;;
  delete) rm -rf "$cloud/state" "$cloud/host0" "$cloud/host1" ;;
  scp) for host in $hosts; do cp "$5" "$host/${6#*:}"; done ;;
  ssh)
    worst=0
    for host in $hosts; do (cd "$host" && HOME="$host" /bin/bash -c "$command") || worst=1; done
    exit $worst
    ;;
esac
"""
MAIN = r"""#!/bin/bash
trap 'echo saved; exit 75' TERM
echo "main $*"
until [ -e "$HOME/finish" ]; do sleep 0.05; done
exit $(cat "$HOME/finish")
"""


class Cloud:
    """The launchers, with a gcloud that keeps the state of one queued resource and runs commands as its hosts would."""

    def __init__(self, launchers, folder):
        self.launchers, self.folder = launchers, folder / "cloud"
        self.folder.mkdir()
        launchers.stub("gcloud", GCLOUD)
        launchers.stub("sleep", '[ "$1" = 61 ] || exec /bin/sleep "$1"; ' + f"source {self.folder}/meanwhile")
        launchers.stub("mountpoint", '[ -e "$HOME/mounted" ]')
        launchers.stub("gcsfuse", ': > "$HOME/mounted"')
        launchers.stub("sudo", "exit 0")
        environment = launchers.root / "launch" / "environment.sh"
        program = f"printf %s {shlex.quote(MAIN)} > .venv/bin/python; chmod +x .venv/bin/python"
        environment.write_text(environment.read_text().replace("; python=", f"; {program}; python="))
        self.meanwhile("exit 1")  # nothing waits unless a test says what happens while it does
        launchers.variables |= STORAGE | {"POLL": "61", "CRASHES": "0"}

    def run(self, *arguments, **variables):
        """Runs launch/tpu_vm.sh: its exit status, what it printed, and what was asked of gcloud, in a word each."""
        status, out, err = self.launchers.run("tpu_vm.sh", *arguments, **variables)
        asked = [call[4] for call in self.launchers.calls("gcloud")]
        return status, out + err, [word for word in asked if word != "list"]

    def meanwhile(self, *scripts):
        """What happens during each wait from now on, one script after the other."""
        steps = "".join(f"{n}) {script} ;;\n" for n, script in enumerate(scripts))
        count = f"n=$(cat {self.folder}/waits 2> /dev/null || echo 0); echo $((n + 1)) > {self.folder}/waits"
        (self.folder / "waits").unlink(missing_ok=True)
        (self.folder / "meanwhile").write_text(
            f'{count}; cloud={self.folder}; case "$n" in\n{steps}*) exit 1 ;; esac\n'
        )

    def wait_for_start(self):
        """Waits until training runs on both hosts, and would save if told to."""
        logs = [self.folder / host / "vgpt" / "train.log" for host in ("host0", "host1")]
        wait_until(lambda: all(log.exists() and "main" in log.read_text() for log in logs))

    def wait_for_end(self):
        wait_until(
            lambda: all((pid.parent / "train.status").exists() for pid in self.folder.glob("host*/vgpt/train.pid"))
        )

    def finish(self, status):
        """Has training end on both hosts."""
        for host in self.folder.glob("host*"):
            (host / "finish").write_text(status)
        self.wait_for_end()


@pytest.fixture
def cloud(launchers, tmp_path):
    cloud = Cloud(launchers, tmp_path)
    yield cloud
    cloud.finish("0")


def test_up_creates_sets_up_and_trains_and_once_more_does_nothing(cloud):
    status, said, asked = cloud.run("up")
    assert (status, asked) == (0, ["create", "ssh", "scp", "ssh", "ssh"]), said
    cloud.wait_for_start()
    for host in ("host0", "host1"):
        log = (cloud.folder / host / "vgpt" / "train.log").read_text()
        assert log == "main -m vgpt_jax.main --config=configs/imagenet.py --workdir=/mnt/vgpt/vgpt\n"
        assert (cloud.folder / host / "mounted").exists()
    pids = [path.read_text() for path in cloud.folder.glob("host*/vgpt/train.pid")]
    status, said, asked = cloud.run("up")
    assert (status, asked) == (0, ["ssh", "ssh"])  # is it set up, is it training
    assert said.split("\n")[-3:-1] == ["running", "running"]
    assert pids == [path.read_text() for path in cloud.folder.glob("host*/vgpt/train.pid")]
    assert cloud.run("status")[1].split("\n")[-3:-1] == ["running", "running"]


def test_changed_code_is_set_up_anew_but_not_under_a_training(cloud):
    cloud.run("up")
    cloud.wait_for_start()
    (cloud.launchers.root / "configs").write_text("changed")
    status, said, asked = cloud.run("up")
    assert (status, asked) == (2, ["ssh", "scp", "ssh"]) and "error: training runs with other code" in said
    assert cloud.run("stop")[0] == 0
    cloud.wait_for_end()
    assert cloud.run("up")[::2] == (0, ["ssh", "scp", "ssh", "ssh"])
    assert (cloud.folder / "host1" / "vgpt" / "code" / "configs").read_text() == "changed"


def test_stop_saves_and_train_goes_on(cloud):
    cloud.run("up")
    cloud.wait_for_start()
    assert cloud.run("stop")[0] == 0
    cloud.wait_for_end()
    assert cloud.run("status")[1].endswith("stopped\nstopped\n")
    assert "saved\n" in (cloud.folder / "host1" / "vgpt" / "train.log").read_text()
    assert cloud.run("train")[:2] == (0, "running\nrunning\n")


def test_finished_training_is_not_started_again(cloud):
    cloud.run("up")
    cloud.finish("0")
    assert cloud.run("up")[1].endswith("ended 0\nended 0\n")


def test_create_waits_for_its_turn(cloud):
    cloud.meanwhile("echo PROVISIONING > $cloud/state", "echo ACTIVE > $cloud/state")
    status, said, asked = cloud.run("create", AFTER_CREATE="WAITING_FOR_RESOURCES")
    assert (status, asked) == (0, ["create"])
    assert re.findall(r"vgpt: (.*)", said) == ["not there", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_a_preempted_slice_is_made_anew(cloud):
    (cloud.folder / "state").write_text("SUSPENDING\n")
    cloud.meanwhile("echo SUSPENDED > $cloud/state")
    assert cloud.run("create")[::2] == (0, ["delete", "create"])


def test_a_request_that_fails_is_not_repeated(cloud):
    status, said, asked = cloud.run("create", AFTER_CREATE="FAILED")
    assert (status, asked) == (2, ["create"])
    assert "queued-resources describe vgpt --zone=us-west4-a" in said


def test_keep_goes_on_until_training_is_done(cloud):
    def ended(host):
        return f"until [ -e $cloud/{host}/vgpt/train.status ]; do /bin/sleep 0.02; done"

    end = "echo 0 > $cloud/host1/finish"
    reboot = f"{end}; {ended('host1')}; rm $cloud/host1/finish $cloud/host1/vgpt/train.status"
    end_both = f"{end}; echo 0 > $cloud/host0/finish; {ended('host0')}; {ended('host1')}"
    cloud.meanwhile(
        f"{reboot}; echo another > $cloud/host1/vgpt/train.boot",
        f"{end_both}; echo SUSPENDED > $cloud/state",
        end_both,
    )
    status, said, asked = cloud.run("keep")
    first, restarted, preempted = ["create", "ssh", "scp", "ssh", "ssh"], ["ssh", "ssh"], ["delete"]
    assert (status, asked) == (0, [*first, *restarted, *preempted, *first, "ssh"]), said
    assert said.endswith("training is done\n")


@pytest.mark.parametrize(
    ("meanwhile", "text"),
    [
        ("echo 2 > $cloud/host0/finish", "training needs you"),
        ("echo 9 > $cloud/host0/finish", "training crashed too often"),
        ("HOME=$cloud/host0 /bin/bash $cloud/host0/vgpt/launch/tpu_vm_host.sh stop", "training was stopped"),
    ],
)
def test_keep_ends_where_a_person_is_needed(cloud, meanwhile, text):
    cloud.meanwhile(f"{meanwhile}; until [ -e $cloud/host0/vgpt/train.status ]; do /bin/sleep 0.02; done")
    status, said, _ = cloud.run("keep")
    assert status == 2 and f"error: {text}" in said


def test_a_host_that_went_down_with_its_training_counts_as_interrupted(cloud):
    cloud.run("up")
    cloud.finish("143")  # what TERM makes of a process that does not catch it yet
    assert cloud.run("status")[1].endswith("interrupted\ninterrupted\n")


def test_delete_deletes_once(cloud):
    cloud.run("create")
    assert cloud.run("delete")[::2] == (0, ["delete"])
    assert cloud.run("delete") == (0, "vgpt is not there\n", [])


def test_fetch_takes_the_workdir_from_where_it_is(launchers):
    folder, rsync = launchers.dry_run("tpu_vm.sh", "fetch", BUCKET="bucket", WORKDIR="/mnt/vgpt/a/b")
    assert folder == ["mkdir", "-p", "runs/vgpt"]
    assert rsync == ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/a/b", "runs/vgpt"]
    _, scp = launchers.dry_run("tpu_vm.sh", "fetch", "there", NFS="host:/share", ZONE="z", PROJECT="p")
    at = ["--zone=z", "--quiet", "--project=p", "--node=0", "--worker=0"]
    assert scp[3:] == ["queued-resources", "scp", "--recurse", "vgpt:/mnt/vgpt/vgpt/*", "there", *at]


def test_a_dry_run_of_several_slices(launchers):
    lines = launchers.dry_run(
        "tpu_vm.sh", "keep", SLICES="4", TIER="reserved", **STORAGE, TRAIN="--config=c.py --x='a'"
    )
    create = lines[0]
    assert create[3:6] == ["queued-resources", "create", "vgpt"]
    assert {"--node-count=4", "--node-prefix=vgpt", "--reserved", "--accelerator-type=v5litepod-16"} < set(create)
    assert not any(word.startswith("--node-id") for word in create)
    for line in lines:
        if line[:2] == ["gcloud", "compute"] and line[4] in ("ssh", "scp"):
            assert {"--node=all", "--worker=all"} < set(line)
    (train,) = [line[-1] for line in lines if line[-1].endswith(" train")]
    remote = shlex.split(train.removeprefix("--command="))
    assert "TRAIN=--config=c.py --x='a'" in remote and "WORKDIR=/mnt/vgpt/vgpt" in remote and "BUCKET=bucket" in remote


@pytest.mark.parametrize(("tier", "flags"), [("spot", {"--spot"}), ("reserved", {"--reserved"}), ("on-demand", set())])
def test_one_slice_of_each_tier(launchers, tier, flags):
    (create,) = launchers.dry_run("tpu_vm.sh", "create", TIER=tier, **STORAGE)
    assert "--node-id=vgpt" in create
    assert {"--spot", "--reserved", "--on-demand"} & set(create) == flags


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "neither BUCKET nor NFS is given"),
        ({"BUCKET": "b", "NFS": "h:/s"}, "BUCKET and NFS are both given"),
        ({"BUCKET": "b", "WORKDIR": "/home/me"}, "WORKDIR is /home/me, but must be in /mnt/vgpt"),
        ({"WORKDIR": "runs/mine"}, "must be a whole path"),
        ({"BUCKET": "b", "SLICES": "0"}, "SLICES is '0'"),
        ({"BUCKET": "b", "TIER": "cheap"}, "TIER is 'cheap', but must be one of: spot reserved on-demand"),
        ({"BUCKET": "b", "RUN_NAME": "My Run"}, "RUN_NAME is 'My Run'"),
    ],
)
def test_what_is_not_sound_is_said(launchers, variables, text):
    assert text in launchers.error("tpu_vm.sh", "up", **variables)


def test_without_gcloud_nothing_is_done(launchers):
    status, _, err = launchers.run("tpu_vm.sh", "create", **STORAGE)
    assert status == 2 and err.startswith("error: gcloud does not answer") and err.count("\n") == 1
    assert [call[4] for call in launchers.calls()] == ["list"]
