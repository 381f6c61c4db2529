# Everything a checkout needs, from nothing: `make test` builds what it misses. See `make help`.
PYTHON ?= python3
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv lock engine postgres stop demo serve test bench fuzz neighbours lint check
.SILENT:
MAKEFLAGS += --no-print-directory

help: ## List these targets
	awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The empty recipe keeps make from saying "Nothing to be done".
venv: .venv/.stamp ## Create .venv with the project (editable) and its tools, at the pinned versions
	@:

.venv/.stamp: pyproject.toml constraints.txt
	.ci/venv

# Resolves every dependency anew, in a clean venv and without the present pins, and rewrites
# constraints.txt. Run it to take newer versions in, then `make check`, then commit the file.
lock: ## Rewrite constraints.txt with the newest versions that fit pyproject.toml
	.ci/lock

engine: venv ## Have a Docker Engine that runs containers: the one there, else one installed and started
	.ci/engine up

postgres: ## Have a throw-away PostgreSQL; prints its DATABASE_URL
	.ci/postgres up

stop: ## End and remove what `make engine` and `make postgres` started
	.ci/postgres down
	.ci/engine down

demo: engine ## Run the demonstration
	exec .venv/bin/python -m deployments.demo

serve: engine ## Serve the site, a Prefect server and the deployments, on loopback, until Ctrl-C
	exec .venv/bin/python -m deployments.first_look

test: venv ## Run the tests; ARGS="…" goes to pytest, STRICT=1 fails where a service is missing
	.ci/test $(if $(STRICT),--strict-parts) $(ARGS)

bench: engine ## Measure, beside a reference of the same run; ROWS="claim launch" measures those alone
	.ci/bench $(ROWS)

fuzz: engine ## Kill and stall workers, and look for jobs that ran twice or were lost; SEEDS="1 2 3" JOBS=60 ARGS="--storm 120 --calm 60"
	.ci/fuzz $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

neighbours: engine ## Run two installations side by side under load, and check that neither affects the other; SECONDS=180 SEED=1
	.ci/neighbours $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

lint: venv ## Run the formatter's check, the linters, the type checker and Django's checks
	.ci/lint

check: ## What CI runs: lint, then every test with no part left out
	$(MAKE) lint
	$(MAKE) test STRICT=1
