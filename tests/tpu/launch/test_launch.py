"""The launcher against programs that only play gcloud, xpk and sbatch, and against gcloud's own check of commands.

The gcloud here keeps its slice in a folder: a queue of states, and a home directory for each of two workers, in which
what `ssh` is given really runs. So the scripts for the workers are tested by running them.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpu.errors import UserError
from tpu.launch import __main__ as launch
from tpu.launch import cloud_tpu, slurm

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ["python", "-m", "train.pretrain", "--config=configs/quickstart.py", "--workdir=/mnt/share/a"]

GCLOUD = """#!{python} -IS
import json, os, shutil, subprocess, sys
from pathlib import Path

cloud = Path("{cloud}")
words = sys.argv[1:]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
words = [word for word in words if word not in ("alpha", "compute", "tpus")]
kind, verb, name = words[:3]
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
plot = json.loads((cloud / "plot").read_text())

def save():
    (cloud / "plot").write_text(json.dumps(plot))

def fail(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)

if verb == "create":
    answer = plot["creations"].pop(0)
    save()
    if isinstance(answer, str):
        fail(answer)
    (cloud / "states").write_text(json.dumps(answer))
    shutil.rmtree(cloud / "home", ignore_errors=True)
    for worker in "01":
        uv = cloud / "home" / worker / ".local/bin/uv"
        uv.parent.mkdir(parents=True)
        uv.write_text("#!/bin/sh\\necho uv $* >> ~/installed")
        uv.chmod(0o755)
    sys.exit()
if not (cloud / "states").exists():
    fail("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '" + name + "' was not found")
states = json.loads((cloud / "states").read_text())
if verb == "describe" and "failedData" in flags["format"]:
    print(plot["failure"])
elif verb == "describe":
    if plot.get("outage"):
        plot["outage"] -= 1
        save()
        fail("ERROR: (gcloud) UNAVAILABLE: try again")
    print(states[0])
    (cloud / "states").write_text(json.dumps(states[1:] or states))
elif verb == "delete":
    (cloud / "states").unlink()
    shutil.rmtree(cloud / "home")
elif states[0] not in ("READY", "ACTIVE", "SUSPENDING"):
    fail("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the node is in state " + states[0], 255)
else:
    for worker in "01" if flags["worker"] == "all" else flags["worker"]:
        home = cloud / "home" / worker
        if verb == "scp":
            shutil.copy(words[2], home / words[3].partition(":")[2])
            continue
        environment = dict(os.environ, HOME=str(home))
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environment, start_new_session=True)
        if done.returncode:
            sys.exit(done.returncode)
"""
RECORDER = """#!/bin/sh
printf '%s\\n' "$@" > {cloud}/{name}.arguments
exit {status}
"""


class Cloud:
    """A pretended Google Cloud with one slice, and the launcher running against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self.program("gcloud", GCLOUD.replace("{python}", sys.executable).replace("{cloud}", str(folder)))
        self.environment = dict(os.environ, PATH=f"{folder / 'bin'}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))

    def program(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def plot(self, *creations: list[str] | str, **more: object) -> None:
        """What each `create` leads to: the states that follow, the last one staying, or the words of a refusal."""
        (self.folder / "plot").write_text(json.dumps({"creations": creations, "failure": "", **more}))

    def launch(self, target: str, *flags: str, command: list[str] = TRAIN) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "tpu.launch", target, *flags, "--", *command]
        environment, folder = self.environment, self.folder
        return subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        return [shlex.join(["gcloud", *json.loads(line)]) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self) -> list[str]:
        return [next(v for v in VERBS if f" {v} " in call) for call in self.calls()]

    @property
    def exists(self) -> bool:
        return (self.folder / "states").exists()


VERBS = ("create", "describe", "delete", "scp", "ssh")
QUEUED = ("queued-resource", "--accelerator=v5litepod-16", "--zone=us-central1-a", "--poll_seconds=0.05")
VM = ("tpu-vm", "--accelerator=v6e-8", "--zone=us-east5-b", "--poll_seconds=0.05")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    yield Cloud(tmp_path)
    (tmp_path / "go").touch()  # What waits for it would wait for ever where a test fails.


def shell(text: str) -> list[str]:
    return ["bash", "-c", text]


# The commands, in the form in which they are given


def pasted(target: str, *flags: str, command: list[str] = TRAIN) -> list[str]:
    arguments = [sys.executable, "-m", "tpu.launch", target, "--dry_run", *flags, "--", *command]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


PACK = (
    f"tar --create --gzip --file={cloud_tpu.ARCHIVE} --directory={ROOT} --exclude=__pycache__ "
    "configs model serve tpu train setup.py pyproject.toml README.md"
)
INSTALL = (
    "if ! test -x .local/bin/uv; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi && "
    ".local/bin/uv venv --quiet --allow-existing --python 3.12 foursight-env && "
    ".local/bin/uv pip install --quiet --python foursight-env --editable './foursight[tpu]'"
)
START = (
    'cd foursight && rm -f ~/foursight.status && export PATH="$HOME/foursight-env/bin:$PATH"{exports} && { nohup bash '
    "-c 'python -m train.pretrain --config=configs/quickstart.py --workdir=/mnt/share/a; echo $? > ~/foursight.status' "
    "> ~/foursight.log 2>&1 < /dev/null & echo $! > ~/foursight.pid; }"
)
FOLLOW = 'tail --lines=+1 --follow --sleep-interval=0.2 --pid="$(cat foursight.pid)" foursight.log'
STATUS = (
    "if test -e foursight.status; then cat foursight.status; "
    'elif test -e foursight.pid && kill -0 "$(cat foursight.pid)"; then echo running; fi'
)


def test_commands_of_a_tpu_vm():
    at = "--zone=us-east5-b --project=p"
    ssh = f"gcloud compute tpus tpu-vm ssh foursight --worker={{}} {{}} {at}"
    unpack = f"mkdir -p foursight && tar --extract --gzip --file={cloud_tpu.ARCHIVE.name} --directory=foursight && "

    def on(worker: str, script: str) -> str:
        return ssh.format(worker, shlex.quote(f"--command={script}"))

    assert pasted(*VM, "--project=p", "--spot") == [
        f"gcloud compute tpus tpu-vm create foursight --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot {at}",
        f"until test \"$(gcloud compute tpus tpu-vm describe foursight '--format=value(state)' {at})\" = READY; "
        "do sleep 30; done",
        PACK,
        f"gcloud compute tpus tpu-vm scp {cloud_tpu.ARCHIVE} foursight:{cloud_tpu.ARCHIVE.name} --worker=all {at}",
        on("all", unpack + INSTALL),
        on("all", START.replace("{exports}", "")),
        on("0", FOLLOW),
        on("0", STATUS),
        "# When it is pre-empted (PREEMPTED, SUSPENDED, FAILED): delete it and begin again.",
        "# When it is no longer needed:",
        f"# gcloud compute tpus tpu-vm delete foursight --quiet {at}",
    ]


def test_commands_of_several_slices():
    flags = ("--slices=2", "--name=run7", "--repository=https://example.org/f.git", "--xla_flags=--xla_a=1 --xla_b=2")
    at, everywhere = "--zone=us-central1-a", "--node=all --worker=all"
    clone = (
        "if test -d foursight; then git -C foursight pull --ff-only; "
        "else git clone https://example.org/f.git foursight; fi && "
    )
    start = START.replace("{exports}", " LIBTPU_INIT_ARGS='--xla_a=1 --xla_b=2'")
    ssh = "gcloud compute tpus queued-resources ssh run7"
    assert pasted(*QUEUED, *flags, "--delete") == [
        "gcloud compute tpus queued-resources create run7 --accelerator-type=v5litepod-16 "
        f"--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=run7 {at}",
        f"until test \"$(gcloud compute tpus queued-resources describe run7 '--format=value(state.state)' {at})\" "
        "= ACTIVE; do sleep 30; done",
        f"{ssh} {everywhere} {shlex.quote('--command=' + clone + INSTALL)} {at}",
        f"{ssh} {everywhere} {shlex.quote('--command=' + start)} {at}",
        f"{ssh} --node=0 --worker=0 {shlex.quote('--command=' + FOLLOW)} {at}",
        f"{ssh} --node=0 --worker=0 {shlex.quote('--command=' + STATUS)} {at}",
        f"gcloud compute tpus queued-resources delete run7 --force --quiet {at}",
    ]


def create_line(*flags: str, **request: object) -> str:
    return shlex.join(cloud_tpu.Request("q", "z", request.pop("accelerator", "v5p-128"), True, **request).create())


def test_ways_to_ask_for_a_queued_resource(tmp_path):
    start, end = "gcloud compute tpus queued-resources create q", "--zone=z"
    v5p = "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=q"
    assert create_line() == f"{start} {v5p} {end}"
    assert create_line(spot=True) == f"{start} {v5p} --spot {end}"
    assert create_line(reserved=True, valid_until="6h") == f"{start} {v5p} --reserved --valid-until-duration=6h {end}"
    assert create_line(flex_start="4h") == (
        f"gcloud alpha compute tpus queued-resources create q {v5p} "
        f"--provisioning-model=flex-start --max-run-duration=4h {end}"
    )
    script = tmp_path / "boot.sh"
    script.write_text("mount ...")
    assert create_line(startup_script=str(script), extra=["--network=n"]) == (
        f"{start} {v5p} --metadata-from-file=startup-script={script} --network=n {end}"
    )
    assert "--accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base" in create_line(accelerator="v4-8")


def test_commands_of_gke():
    gpu = pasted("gke", "--cluster=c", "--accelerator=h100-80gb-8", "--image=i", "--nodes=2", "--zone=z", "--name=w")
    assert gpu == [
        "xpk workload create --cluster=c --workload=w --zone=z --docker-image=i --device-type=h100-80gb-8 "
        "--num-nodes=2 --max-restarts=10 --termination-grace-period-seconds=120 "
        "--env=XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true "
        f"{shlex.quote('--command=' + shlex.join(TRAIN))}",
        "# its output: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=w,"
        "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
        "# to end it: xpk workload delete --cluster=c --workload=w --zone=z",
    ]
    tpu = pasted("gke", "--cluster=c", "--accelerator=tpu7x-128", "--image=i", "--slices=3", "--restarts=50")
    assert tpu[0] == (
        "xpk workload create --cluster=c --workload=foursight --docker-image=i --tpu-type=tpu7x-128 --num-slices=3 "
        f"--max-restarts=50 --termination-grace-period-seconds=120 {shlex.quote('--command=' + shlex.join(TRAIN))}"
    )


SBATCH = """\
#!/bin/bash
#SBATCH --job-name=foursight
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=foursight-%j.log
#SBATCH --time=24:00:00
#SBATCH --partition=gpu

export XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
srun --cpus-per-task=8 --kill-on-bad-exit=1 \
python -m train.pretrain --config=configs/quickstart.py --workdir=/mnt/share/a
"""


def test_the_script_of_slurm(cloud):
    flags = ("--nodes=2", "--gpus_per_node=4", "--extra=--time=24:00:00 --partition=gpu")
    cloud.program("sbatch", RECORDER.format(cloud=cloud.folder, name="sbatch", status=0))
    done = cloud.launch("slurm", *flags)
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "foursight.sbatch").read_text() == SBATCH
    assert (cloud.folder / "sbatch.arguments").read_text() == "foursight.sbatch\n"
    assert done.stdout == "# its output: tail -F foursight-JOB.log\n# to end it: scancel --name=foursight\n"

    (cloud.folder / "foursight.sbatch").unlink()
    subprocess.run(["bash", "-c", "\n".join(pasted("slurm", *flags))], cwd=cloud.folder, env=cloud.environment)
    assert (cloud.folder / "foursight.sbatch").read_text() == SBATCH


def test_the_script_of_slurm_runs(cloud):
    """srun here plays two tasks; each must receive the words of the command as they were given."""
    tasks = 'shift 2; for task in 0 1; do SLURM_PROCID=$task "$@"; done'
    cloud.program("srun", f"#!/bin/sh\n{tasks} > {cloud.folder}/out")
    script = 'echo "$SLURM_PROCID $XLA_FLAGS $1"'
    text = slurm.batch_script(["bash", "-c", script, "_", "it's $HOME"], "j", 1, 2, 8, {"XLA_FLAGS": "--a=1 --b=2"})
    subprocess.run(["bash"], input=text, text=True, env=cloud.environment, check=True)
    assert (cloud.folder / "out").read_text() == "0 --a=1 --b=2 it's $HOME\n1 --a=1 --b=2 it's $HOME\n"


@pytest.mark.parametrize("flags", [(), ("--spot",), ("--slices=2", "--xla_flags=--xla_a=1 --xla_b=2")])
def test_what_is_printed_is_what_is_run(cloud, flags):
    def run(do) -> list[str]:
        cloud.plot(["ACTIVE"])
        do()
        calls = cloud.calls()
        (cloud.folder / "calls").unlink()
        statuses = {path.read_text() for path in cloud.folder.glob("home/*/foursight.status")}
        assert statuses == set()  # the slice, and the workers with it, are gone
        return [call for call in dict.fromkeys(calls) if " describe " not in call]

    lines = pasted(*QUEUED, *flags, "--delete", command=shell("echo done"))
    script = "\n".join(lines)
    by_hand = run(lambda: subprocess.run(["bash", "-c", script], env=cloud.environment, cwd=cloud.folder, check=True))
    by_itself = run(lambda: cloud.launch(*QUEUED, *flags, "--delete", command=shell("echo done")))
    assert sorted(by_hand) == sorted(by_itself)
    assert [line for line in lines if line.startswith("gcloud")] == by_hand


def test_gcloud_itself_accepts_every_command(tmp_path):
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    boot = tmp_path / "boot.sh"
    boot.write_text("")
    queued = ("queued-resource", "--accelerator=v5p-128", "--zone=z", "--project=p", f"--startup_script={boot}")
    scripts = [
        pasted("tpu-vm", "--accelerator=v4-8", "--zone=z", "--spot", f"--startup_script={boot}", "--delete"),
        pasted("tpu-vm", "--accelerator=v6e-8", "--zone=z", "--reserved"),
        pasted(*queued, "--slices=2", "--spot", "--valid_until=6h", "--delete"),
        pasted(*queued, "--reserved", "--extra=--network=n --service-account=a@b"),
        pasted(*queued, "--flex_start=4h", "--valid_until=6h"),
    ]
    lines = {line for script in scripts for line in script if line.startswith("gcloud")}
    lines |= {shlex.join(cloud_tpu.Request("q", "z", "v6e-8", True).failure())}
    waits = [line for script in scripts for line in script if line.startswith("until")]
    lines |= {line.partition("$(")[2].partition(')"')[0] for line in waits}
    wrong = "gcloud compute tpus tpu-vm create q --zone=z --accelerator-type=v6e-8 --version=r --no-such-flag"
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in (*sorted(lines), wrong)]))
    quiet = dict(os.environ, CLOUDSDK_CONFIG=str(tmp_path), CLOUDSDK_CORE_DISABLE_USAGE_REPORTING="1")
    command = [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if not done.stdout:
        pytest.skip("this gcloud checks no commands")
    verdicts = {verdict["command_string"]: verdict["error_message"] for verdict in json.loads(done.stdout)}
    assert len(verdicts) == len(lines) + 1 > 15
    assert "--no-such-flag" in verdicts.pop(wrong)
    assert {line: message for line, message in verdicts.items() if message} == {}


# Slices seen through to the end


def test_a_queued_resource_is_waited_for_and_the_job_runs_on_all_workers(cloud):
    cloud.plot(["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    job = shell(f"echo in $(basename $PWD) on $(basename $HOME); pwd >> {cloud.folder}/ran; test -f setup.py")
    done = cloud.launch(*QUEUED, command=job)
    assert done.returncode == 0, done.stderr
    told = [line.split(": ")[1] for line in done.stdout.splitlines() if ": " in line and "still there" not in line]
    assert told == ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert "in foursight on 0\n" in done.stdout
    assert "on 1\n" not in done.stdout
    assert len((cloud.folder / "ran").read_text().splitlines()) == 2
    assert len((cloud.folder / "home/1/installed").read_text().splitlines()) == 2
    assert cloud.exists
    assert "queued-resources delete foursight --force --quiet --zone=us-central1-a\n" in done.stdout


def test_the_status_of_the_job_is_that_of_the_launcher_and_the_environment_reaches_it(cloud):
    cloud.plot(["READY"])
    job = shell("echo $LIBTPU_INIT_ARGS 'and' \"it's\" $0; exit 7")
    done = cloud.launch(*VM, "--delete", "--xla_flags=--xla_a=1 --xla_b=2", command=job)
    assert done.returncode == 7, done.stderr
    assert "--xla_a=1 --xla_b=2 and it's bash\n" in done.stdout
    assert not cloud.exists


# Training in small: counts steps in a file that outlives the slice, and goes on from there. Step 2 loses the slice.
TRAINING = """
test $(basename $HOME) = 0 || exit 0
cd {cloud}
step=$(cat step 2>/dev/null || echo 0)
echo resuming from step $step
while test $step -lt 4; do
    step=$((step + 1)); echo $step > step; echo step $step
    if test $step = 2; then {loss} fi
done
"""


@pytest.mark.parametrize(
    "loss",
    [
        # Told to end, training saves and ends with status 0, which must not pass for the end of the job.
        pytest.param("""echo '["SUSPENDING", "SUSPENDED"]' > states; exit 0;""", id="after saving"),
        pytest.param("""echo '["PREEMPTED"]' > states; kill -9 $PPID; exit 1;""", id="killed"),
        pytest.param("""echo '["FAILED"]' > states; exit 1;""", id="failed"),
        pytest.param("""rm states; exit 1;""", id="deleted by someone"),
    ],
)
def test_a_pre_empted_slice_is_made_anew_and_training_goes_on(cloud, loss):
    cloud.plot(["ACTIVE"], ["WAITING_FOR_RESOURCES", "ACTIVE"], failure="maintenance")
    done = cloud.launch(*QUEUED, "--spot", "--delete", command=shell(TRAINING.format(cloud=cloud.folder, loss=loss)))
    assert done.returncode == 0, done.stderr
    progress = [line for line in done.stdout.splitlines() if "step" in line]
    lived = ["resuming from step 0", "step 1", "step 2"]
    assert progress in (lived + (again := ["resuming from step 2", "step 3", "step 4"]), again)
    assert "making it anew (1 of 10 times)" in done.stdout
    assert cloud.verbs().count("create") == 2
    creations = [call for call in cloud.calls() if " create " in call]
    assert creations[0] == creations[1]
    assert not cloud.exists


def test_restarts_are_counted(cloud):
    cloud.plot(*[["ACTIVE"]] * 5)
    lost = shell(f"""echo '["PREEMPTED"]' > {cloud.folder}/states; exit 1""")
    done = cloud.launch(*QUEUED, "--spot", "--restarts=2", command=lost)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: foursight: PREEMPTED; --restarts=2 are used up"
    assert cloud.verbs().count("create") == 3


def test_a_slice_that_is_not_spot_is_not_made_anew(cloud):
    cloud.plot(["READY"], ["READY"])
    done = cloud.launch(*VM, command=shell(f"""echo '["TERMINATED"]' > {cloud.folder}/states; exit 1"""))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: foursight: TERMINATED"
    assert cloud.verbs().count("create") == 1


QUOTA = """Create request issued for: [foursight]
Waiting for operation [projects/p/locations/z/operations/o] to complete...
..failed.
ERROR: (gcloud.compute.tpus.tpu-vm.create) {
  "code": 8,
  "message": "Quota limit 'TPUV6EPerProjectPerZone' has been exceeded. Limit: 4 in zone z."
}"""


def test_a_refusal_is_one_clear_line(cloud):
    cloud.plot(QUOTA)
    done = cloud.launch(*VM, "--spot")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: foursight: Cloud TPU refused: "
        "Quota limit 'TPUV6EPerProjectPerZone' has been exceeded. Limit: 4 in zone z."
    )
    assert "Traceback" not in done.stderr
    assert "still there" not in done.stdout
    assert cloud.verbs() == ["describe", "create", "describe"]


def test_a_second_slice_that_is_refused_is_asked_for_again(cloud):
    cloud.plot(["READY"], "ERROR: (gcloud.x) no more capacity in the zone", ["READY"])
    job = shell(TRAINING.format(cloud=cloud.folder, loss="""echo '["PREEMPTED"]' > states; exit 1;"""))
    done = cloud.launch(*VM, "--spot", "--poll_seconds=0.02", command=job)
    assert done.returncode == 0, done.stderr
    assert "refused: no more capacity in the zone; making it anew (2 of 10 times)" in done.stdout
    assert (cloud.folder / "step").read_text() == "4\n"


def test_a_request_that_fails_at_once_is_told_and_not_repeated(cloud):
    cloud.plot(["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"], failure="the valid until time has passed")
    done = cloud.launch(*QUEUED, "--spot", "--valid_until=1m")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: foursight: FAILED: the valid until time has passed"
    assert cloud.verbs().count("create") == 1


def test_an_installation_that_fails_ends_the_launch(cloud):
    cloud.plot(["READY"])
    done = cloud.launch(*VM, "--repository=/no/such/repository")
    assert done.returncode == 2
    assert "status 128 from: gcloud compute tpus tpu-vm ssh" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("outage", "status"), [(3, 0), (99, 2)])
def test_a_short_outage_of_gcloud_is_borne_and_a_long_one_told(cloud, outage, status):
    cloud.plot(["READY"])
    job = shell(f"""sed -i 's/"failure"/"outage": {outage}, "failure"/' {cloud.folder}/plot""")
    done = cloud.launch(*VM, "--spot", "--poll_seconds=0.02", command=job)
    assert done.returncode == status, done.stderr
    told = "error: foursight: its state is not to be had: UNAVAILABLE: try again" in done.stderr
    assert told == (status == 2)
    assert "foursight is still there and paid for." in done.stdout


def started(cloud: Cloud, *flags: str) -> subprocess.Popen[str]:
    """A launcher of a job that says "begun" and then waits for a file."""
    job = shell(f"echo begun; until test -e {cloud.folder}/go; do sleep 0.02; done; echo ended")
    return subprocess.Popen(
        [sys.executable, "-m", "tpu.launch", *VM, *flags, "--", *job],
        env=cloud.environment,
        cwd=cloud.folder,
        stdout=subprocess.PIPE,
        stderr=(cloud.folder / "errors").open("a"),
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where the tests run in background
    )


def read_until(launcher: subprocess.Popen[str], text: str) -> str:
    seen = ""
    while text not in seen:
        seen += (line := launcher.stdout.readline())
        assert line, seen
    return seen


def interrupt(launcher: subprocess.Popen[str]) -> int:
    """Ctrl-C, once the job's output is seen; returns the launcher's exit status."""
    read_until(launcher, "begun")
    os.killpg(launcher.pid, signal.SIGINT)
    return launcher.wait(30)


def test_ctrl_c_leaves_the_slice_and_the_same_command_follows_the_job(cloud):
    cloud.plot(["READY"])
    assert interrupt(started(cloud)) == 130
    assert cloud.exists
    before = len(cloud.verbs())
    launcher = started(cloud)
    seen = read_until(launcher, "begun")
    (cloud.folder / "go").touch()
    seen += launcher.stdout.read()
    assert launcher.wait(30) == 0
    assert "exists already (READY) and is used as it is" in seen
    assert "a job runs already: following it, starting none" in seen
    assert "begun\nended\n" in seen
    assert seen.endswith("gcloud compute tpus tpu-vm delete foursight --quiet --zone=us-east5-b\n")
    assert not {"create", "scp"} & set(cloud.verbs()[before:])


def test_ctrl_c_with_delete_gives_the_slice_back(cloud):
    cloud.plot(["READY"])
    assert interrupt(started(cloud, "--delete")) == 130
    assert not cloud.exists
    (cloud.folder / "go").touch()


def test_gke_refused(cloud):
    cloud.program("xpk", RECORDER.format(cloud=cloud.folder, name="xpk", status=3))
    done = cloud.launch("gke", "--cluster=c", "--accelerator=v6e-16", "--image=i")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: xpk refused, with status 3; see above")
    assert (cloud.folder / "xpk.arguments").read_text().splitlines()[-1] == f"--command={shlex.join(TRAIN)}"


# On this machine


def test_local_runs_a_gang(cloud):
    job = shell(f"echo $FOURSIGHT_PROCESS of $FOURSIGHT_PROCESSES $XLA_FLAGS >> {cloud.folder}/ran")
    done = cloud.launch("local", "--processes=3", "--xla_flags=--xla_a=1", command=job)
    assert done.returncode == 0, done.stderr
    assert sorted((cloud.folder / "ran").read_text().splitlines()) == [f"{i} of 3 --xla_a=1" for i in range(3)]


def test_local_starts_again_after_a_loss(cloud):
    job = shell(f"cd {cloud.folder}; test -e second && exit 0; touch second; kill -9 $$")
    done = cloud.launch("local", "--restarts=1", command=job)
    assert done.returncode == 0, done.stderr
    (cloud.folder / "second").unlink()
    assert cloud.launch("local", "--restarts=0", command=job).returncode == 137


def test_what_local_prints_is_what_it_runs(cloud):
    job = shell(f"echo $FOURSIGHT_PROCESS of $FOURSIGHT_PROCESSES $FOURSIGHT_HOSTS >> {cloud.folder}/ran")
    script = "\n".join(pasted("local", "--processes=2", command=job))
    subprocess.run(["bash", "-c", script], check=True)
    assert sorted((cloud.folder / "ran").read_text().splitlines()) == ["0 of 2 1", "1 of 2 1"]


# Mistakes

V5E = ("--accelerator=v5litepod-16", "--zone=z")
MISTAKES = {
    ("tpu-vm", "--accelerator=v9-8", "--zone=z"): "valid: v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N",
    ("tpu-vm", "--accelerator=v6e-7", "--zone=z"): "valid: v6e-1, v6e-4, v6e-8, v6e-16, v6e-32, v6e-64, v6e-128, v",
    ("tpu-vm", "--accelerator=v5p-9", "--zone=z"): "v5p-8, v5p-16, v5p-32",
    ("tpu-vm", "--accelerator=tpu7x-8", "--zone=z"): "TPU7x is rented on GKE only",
    ("queued-resource", "--accelerator=tpu7x-8", "--zone=z"): "python -m tpu.launch gke --accelerator=tpu7x-8",
    ("gke", "--cluster=c", "--image=i", "--accelerator=h100-3"): "h100-80gb-8",
    ("gke", "--cluster=c", "--image=i", "--accelerator=b200-8", "--slices=2"): "--slices means nothing to --acc",
    ("gke", "--cluster=c", "--image=i", "--accelerator=v6e-8", "--spot"): "--spot means nothing to gke; it belongs",
    ("gke", "--image=i", "--accelerator=v6e-8"): "--cluster is missing",
    ("tpu-vm", "--accelerator=v6e-8"): "--zone is missing",
    ("tpu-vm", *V5E, "--slices=2"): "--slices means nothing to tpu-vm; it belongs to queued-resource, gke",
    ("tpu-vm", *V5E, "--restarts=2"): "--restarts means nothing without --spot",
    ("tpu-vm", *V5E, "--spot", "--reserved"): "--spot and --reserved: give one of them",
    ("queued-resource", *V5E, "--spot", "--flex_start=4h"): "--spot and --flex_start: give one of them",
    ("tpu-vm", *V5E, "--startup_script=/no/such"): "--startup_script=/no/such: no such file",
    ("tpu-vm", *V5E, "--name=My_run"): "--name=My_run: must be",
    ("slurm", "--nodes=0"): "--nodes=0",
    ("moon",): "moon: no such target; valid: local, tpu-vm, queued-resource, gke, slurm",
    ("--nodes=2",): "no target given",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(cloud, arguments):
    done = cloud.launch(*arguments, "--dry_run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert MISTAKES[arguments] in done.stderr


def test_no_command(cloud):
    done = cloud.launch("local", command=[])
    assert (done.returncode, done.stderr) == (
        2,
        "error: no command given; put it last, after --, as in: -- python -m train.pretrain --config=...\n",
    )


@pytest.mark.parametrize(("target", "program"), [(VM, "gcloud"), (("slurm",), "sbatch"), (("local",), "python")])
def test_a_missing_program_is_named(cloud, target, program):
    cloud.environment["PATH"] = str(cloud.folder / "nothing")
    done = cloud.launch(*target)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {program} is not on PATH; ")


@pytest.mark.parametrize(
    ("flags", "workdir", "warned"),
    [
        (("--spot",), "runs/a", True),
        (("--spot",), "/home/me/a", True),
        (("--spot",), "/mnt/share/a", False),
        ((), "runs/a", False),
    ],
)
def test_a_workdir_that_goes_with_the_slice_is_warned_of(cloud, flags, workdir, warned):
    for words in ([f"--workdir={workdir}"], ["--workdir", workdir]):
        done = cloud.launch(*VM, "--dry_run", *flags, command=["python", "-m", "train.pretrain", *words])
        assert done.returncode == 0
        assert (f"warning: --workdir={workdir} lies on the machine's own disk" in done.stderr) == warned


def test_a_workdir_that_is_no_path_is_refused(cloud):
    done = cloud.launch(*VM, "--dry_run", command=["python", "-m", "train.pretrain", "--workdir=gs://bucket/a"])
    assert done.returncode == 2
    assert "--workdir=gs://bucket/a: must be a path; mount a share on every worker" in done.stderr


def test_the_command_is_taken_as_it_is():
    arguments = ["launch", "local", "--processes=2", "--", "python", "--", "--help"]
    assert launch.take_words(arguments) == ("local", ["python", "--", "--help"])
    assert arguments == ["launch", "--processes=2"]
    assert launch.take_words(["launch", "--help"]) == ("", [])


def test_help_names_every_target_and_flag():
    done = subprocess.run([sys.executable, "-m", "tpu.launch", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(target in done.stdout for target in launch.READS)
    for name in set().union(*launch.READS.values()):
        assert f"--{name}:" in done.stdout or f"--[no]{name}:" in done.stdout


def test_every_accelerator_is_known_by_its_chips():
    assert cloud_tpu.family("v5p-128").chip == "v5p"
    assert cloud_tpu.family("v5litepod-256").runtime == "v2-alpha-tpuv5-lite"
    for wrong in ("v5p", "v5p-", "v5p-4", "v5litepod-2", "v6e-512", "v5p-x", ""):
        with pytest.raises(UserError, match="valid: "):
            cloud_tpu.family(wrong)
