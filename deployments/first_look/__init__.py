"""`make serve`: a Prefect server, the served deployments and the site, on loopback, for a first look."""
