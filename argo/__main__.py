"""`python -m argo`: prints the templates for one cluster, as in `python -m argo --registry R | kubectl apply -f -`."""

import argparse
import re
import sys
from collections.abc import Sequence

from argo import extend
from argo.parameters import Installation
from argo.workflow import to_text
from stages import STAGES

DIGEST = re.compile(r"(?P<stage>[a-z]+)=(?P<digest>sha256:[0-9a-f]{64})")


def installation(words: Sequence[str]) -> Installation:
    """What the options of the command line say.

    Raises:
        SystemExit: an option is unknown, or a digest is none.
    """
    defaults = Installation()
    parser = argparse.ArgumentParser("python -m argo", description="Print the workflow template for one cluster.")
    parser.add_argument("--registry", default=defaults.registry, help="Registry of the images REGISTRY/<stage>:TAG.")
    parser.add_argument("--tag", default=defaults.tag, help="Tag of the images.")
    parser.add_argument(
        "--digest",
        action="append",
        default=[],
        metavar="STAGE=sha256:…",
        help="Image digest of a stage, used instead of the tag.",
    )
    parser.add_argument("--service-account", default=defaults.service_account, help="Service account of all pods.")
    parser.add_argument("--store-secret", default=defaults.store_secret, help="Secret with the store's credentials.")
    parser.add_argument(
        "--webhook-secret",
        default=defaults.webhook_secret,
        help="Secret with the webhook URL to which the outcome is posted.",
    )
    parser.add_argument("--priority-class", default=defaults.priority_class, help="Priority class of all pods.")
    options = vars(parser.parse_args(words))
    digests = [DIGEST.fullmatch(text) for text in options.pop("digest")]
    if not all(match and match["stage"] in {contract.name for contract in STAGES} for match in digests):
        parser.error("--digest: give STAGE=sha256:<64 hexadecimal digits> for the image of a stage")
    return Installation(**options, digests={match["stage"]: match["digest"] for match in digests if match})


def main() -> None:
    """Prints both templates."""
    place = installation(sys.argv[1:])
    sys.stdout.write(f"{to_text(place)}---\n{extend.to_text(place)}")


if __name__ == "__main__":
    main()
