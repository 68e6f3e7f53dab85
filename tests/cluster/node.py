"""The processes of a node that `kubelab` runs on this machine, for tests that kill them as nothing in a cluster can."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.lab import command, kubectl, until

CONTROLLER = ("-n", "argo", "-l", "app=workflow-controller")
KUBELET_SOCKET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")  # the kubelet makes it anew when it starts


@dataclass(frozen=True)
class Node:
    """A node of kubelab's.

    Attributes:
        run: kubelab's folder of the running cluster: `pids/` has a process's number and its start time for each part.
    """

    run: Path

    def kill(self, part: str) -> list[str]:
        """Ends a part by SIGKILL; returns its command line."""
        pid = self._pid(part)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not _is_alive(pid), 30)
        return words

    def start(self, part: str, words: list[str]) -> None:
        """Starts a part again as kubelab does: in the cluster's network, detached, its number and time in the file."""
        inside = ["setsid", "nsenter", f"--net=/proc/{self._pid('proxy')}/ns/net", *words]
        log = shlex.quote(str(self.run / "logs" / f"{part}.log"))
        pid = command("bash", "-c", f"{shlex.join(inside)} >>{log} 2>&1 </dev/null & echo $!").strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
        (self.run / "pids" / part).write_text(f"{pid} {started}\n")

    def kill_container(self, container: str) -> None:
        """Ends the process of a container by SIGKILL.

        Args:
            container: as a pod's status names it, `containerd://…`.
        """
        socket, name = self.run / "containerd.sock", container.rpartition("/")[2]
        command("ctr", "-a", socket, "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", name)

    def _pid(self, part: str) -> int:
        return int((self.run / "pids" / part).read_text().split()[0])


def find_node() -> Node | None:
    """The node behind $KUBECONFIG; None where it is another cluster's."""
    run = Path(os.environ["KUBECONFIG"]).parent
    return Node(run) if (run / "pids" / "kubelet").is_file() and (run / "containerd.sock").exists() else None


def kill_controller_and_kubelet(node: Node) -> None:
    """Both at once; returns when both are back at work. What pods do meanwhile, nobody sees."""
    gpus, restarts = allocatable_gpus(), controller()["restartCount"]
    killed_at = time.time()
    node.kill_container(controller()["containerID"])
    kubelet = node.kill("kubelet")
    time.sleep(3)
    node.start("kubelet", kubelet)
    until(lambda: KUBELET_SOCKET.exists() and KUBELET_SOCKET.stat().st_ctime > killed_at, 60)
    node.start("fake-gpu", node.kill("fake-gpu"))  # this plugin does not look whether the kubelet still knows it
    until(lambda: controller()["restartCount"] == restarts + 1 and controller()["ready"], 120)
    until(lambda: allocatable_gpus() == gpus, 60)


def controller() -> dict[str, Any]:
    """Status of the container of Argo's controller."""
    pods = json.loads(kubectl("get", "pods", *CONTROLLER, "-o", "json"))["items"]
    (pod,) = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return dict(pod["status"]["containerStatuses"][0])


def allocatable_gpus() -> str:
    return kubectl("get", "nodes", "-o", r"jsonpath={.items[0].status.allocatable.nvidia\.com/gpu}")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
