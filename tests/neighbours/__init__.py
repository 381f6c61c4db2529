"""Two installations on one Prefect server, one Engine and one PostgreSQL server, and whether they keep apart."""
