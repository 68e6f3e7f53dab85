"""What `helm test` asks the API server of, run by Python as it is in the images: no package, no kubectl.

cluster.py rights NAMESPACE              the executor's account may do what it must, and nothing that would hurt
cluster.py gpus RESOURCE PRODUCT...      nodes with one of these GPU products, and how many GPUs they offer
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAY = (("create", "argoproj.io", "workflowtaskresults"), ("patch", "argoproj.io", "workflowtaskresults"))
MAY_NOT = (
    ("list", "argoproj.io", "workflowtaskresults"),
    ("get", "", "secrets"),
    ("create", "", "pods"),
    ("update", "", "configmaps"),
    ("create", "argoproj.io", "workflows"),
)


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The API server's answer, with the rights of the pod's own account."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    address = f"https://[{host}]:{port}{path}" if ":" in host else f"https://{host}:{port}{path}"
    token = (ACCOUNT / "token").read_text(encoding="utf-8").strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode() if body else None, headers)
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=20, context=context) as answer:
        reply: dict[str, Any] = json.load(answer)
        return reply


def is_allowed(namespace: str, verb: str, group: str, resource: str) -> bool:
    """Whether the pod's account may do this in the namespace."""
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    return bool(ask("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"])


def check_rights(namespace: str) -> bool:
    """Prints each right that was asked for; true where all are as they should be."""
    good = True
    for wanted, rights in ((True, MAY), (False, MAY_NOT)):
        for verb, group, resource in rights:
            allowed = is_allowed(namespace, verb, group, resource)
            good = good and allowed is wanted
            state = "may" if allowed else "may not"
            print(f"{'ok ' if allowed is wanted else 'BAD'} {state} {verb} {resource}{'.' if group else ''}{group}")
    return good


def check_gpus(resource: str, products: list[str]) -> bool:
    """Prints the nodes and their GPUs; true where at least one has a product of the preset."""
    nodes = ask("/api/v1/nodes")["items"]
    fitting = 0
    for node in nodes:
        product = node["metadata"].get("labels", {}).get("nvidia.com/gpu.product", "none")
        count = node["status"].get("allocatable", {}).get(resource, "0")
        fits = product in products and int(count) > 0
        fitting += fits
        print(f"{'ok ' if fits else '   '} {node['metadata']['name']}: product {product}, {count} {resource}")
    print(f"{fitting} of {len(nodes)} nodes offer one of {', '.join(products)}")
    if not fitting:
        print("Label nodes by GPU feature discovery, or name your products in the value gpu.products.")
    return fitting > 0


def main() -> None:
    what, *arguments = sys.argv[1:]
    try:
        good = check_rights(arguments[0]) if what == "rights" else check_gpus(arguments[0], arguments[1:])
    except urllib.error.URLError as error:
        sys.exit(f"the API server refuses or does not answer: {error}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
