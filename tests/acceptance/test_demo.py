"""`make demo`, as a new user runs it."""

from pathlib import Path

import docker

from .conftest import make

EXPECTED = {
    "word-count": "completed  exit_code  0",
    "checksum": "completed  exit_code  0",
    "both-streams": "completed  exit_code  0",
    "exits-with-3": "failed     exit_code  3",
    "in-five-seconds": "completed  exit_code  0",
    "no-such-image": "failed     launch",
    "past-its-timeout": "failed     timeout    143",
    "high-priority": "completed  exit_code  0",
}


def test_make_demo_shows_eight_jobs_that_end_as_expected_and_does_so_twice(
    engine: docker.DockerClient, checkout: Path
) -> None:
    for _ in range(2):
        with make("demo", checkout) as demo:
            code = demo.process.wait(200)

        assert code == 0, [*demo.lines, *demo.errors]
        lines = {line.split()[0]: " ".join(line.split()[1:]) for line in demo.lines if line.split()}
        for name, outcome in EXPECTED.items():
            assert lines[name].startswith(" ".join(outcome.split()))
        text = "\n".join(demo.lines)
        assert "and the one of high priority, queued last, started first." in text
        assert "-m deployments" in text
