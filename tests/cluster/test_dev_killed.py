import pytest
from tests.cluster.test_workflow import LONG, run_here, test_killed_pods_are_tried_again_and_go_on_with_the_same_result  # noqa

@pytest.fixture(scope="module")
def early(lab):
    return {"killed": lab.submit("killed", lab.tree(**LONG))}
