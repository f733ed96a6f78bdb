"""An OpenEnv server of the environment, and a client that knows nothing of this package.

    python examples/openenv_server.py [num_requests]
"""

import socket
import sys
import threading
import time

import uvicorn
from openenv.core.generic_client import GenericEnvClient

from llmsched_agents.openenv import make_app


def main(num_requests: int = 20) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(num_requests=num_requests), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        with GenericEnvClient(base_url=f"http://127.0.0.1:{port}").sync() as client:
            result, total = client.reset(seed=0), 0.0
            while not result.done:
                # A level of memory in the middle, requests in order of arrival.
                result = client.step({"values": [3, 0]})
                total += result.reward
            summary = result.observation["summary"]
            print(f"{summary['completed']:.0f} requests in {client.state()['step_count']} steps, return {total:.4f}")
            print(f"mean latency {summary['latency_mean']:.4f} s")
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
