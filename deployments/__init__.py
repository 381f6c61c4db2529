"""The Prefect deployments of the flows, and `python -m deployments`, which serves them."""
