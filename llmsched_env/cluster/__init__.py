"""Many engines behind one door: a cluster of replicas to which calls are routed one by one."""
