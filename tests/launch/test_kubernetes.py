"""launch/kubernetes.sh and launch/kubernetes/: the Job as Kubernetes would read it, and how it is applied."""

import pytest
import yaml

GIVEN = {"IMAGE": "registry/vgpt:1", "CLAIM": "shared"}


def render(launchers, **variables):
    """The Service and the Job."""
    status, out, err = launchers.run("kubernetes.sh", "render", **GIVEN | variables)
    assert (status, err) == (0, "") and launchers.calls() == []
    service, job = yaml.safe_load_all(out)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job


def action(job, status=None, condition=None):
    """What the first rule that fits a failed pod says: its exit status, or a condition of the pod."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and codes["operator"] == "In" and status in codes["values"]:
            return rule["action"]
        if any(wanted == {"type": condition, "status": "True"} for wanted in conditions):
            return rule["action"]
    return "Count"


def test_each_pod_is_told_who_it_is_and_finds_the_first(launchers):
    service, job = render(launchers, PROCESSES="4", RUN_NAME="mine")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    variables = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    # A pod of an Indexed Job is called JOB-INDEX in the domain of the headless Service that its subdomain names.
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(port) == pod["containers"][0]["ports"][0]["containerPort"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} == {"job-name": "mine"}
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert variables["JAX_NUM_PROCESSES"]["value"] == "4"
    path = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_which_ends_are_tried_again(launchers):
    _, job = render(launchers, PROCESSES="4", CRASHES="3")
    assert action(job, 2) == "FailJob"
    assert action(job, 75) == "Ignore"
    assert action(job, condition="DisruptionTarget") == "Ignore"
    assert action(job, 1) == action(job, 137) == "Count"
    assert job["spec"]["backoffLimit"] == 12  # each crash of the run is one of each of the four
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it
    names = {
        rule["onExitCodes"]["containerName"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert names == {container["name"] for container in pod["containers"]}


def test_a_tpu_slice_of_spot_nodes(launchers):
    _, job = render(
        launchers,
        RESOURCES="google.com/tpu=4 memory=300Gi",
        NODE_SELECTOR="cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice cloud.google.com/gke-tpu-topology=4x4",
        TOLERATE="cloud.google.com/gke-spot google.com/tpu",
        TRAIN="""--config=a&b.py --config.data.name="x\\y" --workdir=${PROCESSES}""",
        GRACE="25",
    )
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"google.com/tpu": "4", "memory": "300Gi"},
        "limits": {"google.com/tpu": "4"},
    }
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert [(t["key"], t["operator"]) for t in pod["tolerations"]] == [
        ("cloud.google.com/gke-spot", "Exists"),
        ("google.com/tpu", "Exists"),
    ]
    assert pod["terminationGracePeriodSeconds"] == 25
    assert container["command"] == [
        "python", "-m", "vgpt_jax.main", "--config=a&b.py", '--config.data.name="x\\y"', "--workdir=${PROCESSES}"
    ]  # fmt: skip


def test_the_workdir_is_on_the_volume(launchers):
    _, job = render(launchers, RESOURCES="")
    pod = job["spec"]["template"]["spec"]
    mount = {entry["name"]: entry["mountPath"] for entry in pod["containers"][0]["volumeMounts"]}
    claims = {entry["name"]: entry.get("persistentVolumeClaim") for entry in pod["volumes"]}
    assert set(mount) == set(claims) and claims["workdir"] == {"claimName": "shared"}
    assert f"--workdir={mount['workdir']}/vgpt" in pod["containers"][0]["command"]
    assert pod["containers"][0]["resources"] == {"requests": {}, "limits": {}}


def test_apply_hands_over_what_render_prints(launchers):
    launchers.stub("kubectl", "cat > applied")
    rendered = launchers.run("kubernetes.sh", "render", **GIVEN)[1]
    assert launchers.run("kubernetes.sh", "apply", NAMESPACE="team", **GIVEN) == (0, "", "")
    assert launchers.calls() == [["kubectl", "--namespace=team", "apply", "--filename=-"]]
    assert (launchers.root / "applied").read_text() == rendered
    status, out, _ = launchers.run("kubernetes.sh", "--dry-run", "apply", NAMESPACE="team", **GIVEN)
    assert (status, launchers.calls()) == (0, [])
    assert out == f"kubectl --namespace=team apply --filename=- << 'YAML'\n{rendered}YAML\n"


def test_logs_are_those_of_the_newest_pod(launchers):
    launchers.stub("kubectl", '[ "$2" = logs ] || printf "pod/vgpt-3-old\\npod/vgpt-3-new\\n"')
    assert launchers.run("kubernetes.sh", "logs", "3")[0] == 0
    get, logs = launchers.calls()
    assert "--selector=job-name=vgpt,batch.kubernetes.io/job-completion-index=3" in get
    assert logs[2:] == ["logs", "--follow", "--tail=100", "pod/vgpt-3-new"]
    launchers.stub("kubectl", "exit 0")
    assert launchers.run("kubernetes.sh", "logs")[2].startswith("error: there is no pod of process 0")


def test_dry_runs(launchers):
    build, push = launchers.dry_run("kubernetes.sh", "image", EXTRA="tpu", **GIVEN)
    file = "launch/kubernetes/Dockerfile"
    assert build == ["docker", "build", "--file", file, "--build-arg", "EXTRA=tpu", "--tag", GIVEN["IMAGE"], "."]
    assert push == ["docker", "push", GIVEN["IMAGE"]]
    (delete,) = launchers.dry_run("kubernetes.sh", "delete")
    assert delete[2:] == ["delete", "job/vgpt", "service/vgpt", "--ignore-not-found"]
    (status,) = launchers.dry_run("kubernetes.sh", "status")
    assert status[2:] == ["get", "jobs,pods", "--selector=job-name=vgpt"]


def test_the_image_holds_what_installing_needs(launchers):
    folder = launchers.root / "launch" / "kubernetes"
    copied = {
        name
        for line in (folder / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for name in line.split()[1:-1]
    }
    ignored = (folder / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "**" and copied == {name[1:] for name in ignored if name.startswith("!")}
    assert copied == {"requirements.txt", "pyproject.toml", "README.md", "LICENSE", "configs", "vgpt_jax"}


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"IMAGE": ""}, "IMAGE is needed"),
        ({"CLAIM": ""}, "CLAIM is needed"),
        ({"PROCESSES": "0"}, "PROCESSES is '0'"),
        ({"RUN_NAME": "My_run"}, "RUN_NAME is 'My_run'"),
        ({"RUN_NAME": "x" * 51}, "at most 50"),
        ({"RESOURCES": "gpu"}, "'gpu' in RESOURCES is not NAME=VALUE"),
    ],
)
def test_what_is_not_sound_is_said(launchers, variables, text):
    assert text in launchers.error("kubernetes.sh", "apply", **GIVEN | variables)
