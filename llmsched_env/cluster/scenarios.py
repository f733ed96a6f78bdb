"""Stand-in."""

from llmsched_env.cluster.scenario import ClusterScenario
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec
from llmsched_env.workload.sessions import load_source


def load_cluster_scenario(name):
    return ClusterScenario(name, "", lambda n, s, t: ClusterSpec.equal(n), load_source("chat"), 5.0)
