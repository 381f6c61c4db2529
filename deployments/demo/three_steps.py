"""A flow of three steps, each of them containers: how jobs are used by flows of your own.

`python -m deployments.demo.three_steps`, with `PREFECT_API_URL` set, records it there.
"""

from flows.run_container_job import container_job, run_container_job  # isort: skip (sets Django up)

import sys

from prefect import flow

from container_manager.types import RunSpec


@flow(name="three-steps")
def three_steps(count: int = 3) -> int:
    """The sum of the first squares. A step that fails raises `JobFailed`, which has the exit code and all else."""
    # A subflow: it has a page, a state and a log of its own.
    numbers = run_container_job(_step("count", 'seq "$COUNT"', COUNT=str(count)))
    # Tasks, many at once: the limits of the tags and hosts say how many of them run.
    squares = container_job.map(
        [_step("square", "echo $((NUMBER * NUMBER))", NUMBER=number) for number in numbers.stdout_tail.split()]
    ).result()
    terms = " + ".join(square.stdout_tail.strip() for square in squares)
    return int(run_container_job(_step("add", "echo $((TERMS))", TERMS=terms)).stdout_tail)


def _step(name: str, script: str, **environment: str) -> RunSpec:
    return RunSpec(name=name, image="busybox", command=("sh", "-c", script), environment=environment)


if __name__ == "__main__":
    sys.stdout.write(f"{three_steps()}\n")
