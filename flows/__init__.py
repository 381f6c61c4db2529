"""The Prefect flows: the only place that speaks Prefect."""
