# Two commands do everything: `make demo` and `make test`. Both make their own environment first,
# and install only what they need: PyTorch comes with image examples and with the tests.
# UV_TORCH_BACKEND=cpu before `make` (a setting of uv) takes PyTorch without its 4 GB for GPUs.

PYTHON ?= python3
EXAMPLE ?= payments
CONTRACT ?= examples/$(EXAMPLE)/contract.yaml
# Folder of the contracts to compile, and the commit that contracts-diff compares with.
CONTRACTS ?= examples
BASE ?= origin/main
# What `driftmill images build --family` takes; empty: all images.
FAMILY ?=
# A key for cosign: a file, or the URI of a key service. Nothing of Sigstore is asked then, so that it
# works in a network of its own. Empty: keyless, by the identity of the run.
COSIGN_KEY ?=
# Tests at the same time, one a core; make test WORKERS=0 runs them one after the other.
WORKERS ?= logical --maxprocesses 4
VENV := .venv
BIN := $(VENV)/bin

# Some machines forbid Python to keep what it has compiled; every process would do it anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-docker test-cluster lint format images push sbom scan sign audit \
	contracts contracts-diff train bundle sign-bundle release chart docs benchmarks constraints clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Driftmill needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

# .venv/.has-laptop, .venv/.has-laptop-vision, .venv/.has-dev: extras that are installed. They are
# made anew whenever the dependencies change.
$(VENV)/.has-%: pyproject.toml constraints.txt | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(subst -,$(comma),$*)]'
	@touch $@

comma := ,
DEV := $(VENV)/.has-dev
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(WORKERS) --dist worksteal
IS_VISION := $(shell grep -ls '^task: image' examples/$(EXAMPLE)/contract.yaml $(EXAMPLE))
DEMO := $(VENV)/.has-laptop$(if $(IS_VISION),-vision)

venv: $(DEV) ## Make the environment in .venv.

demo: $(DEMO) ## Run the whole loop: make demo [EXAMPLE=payments|bike-sharing|digits|fashion-mnist].
	$(BIN)/driftmill demo $(EXAMPLE)

test: $(DEV) lint ## Lint, type-check and run every test that needs no Docker, with coverage.
	$(PYTEST) -m 'not docker and not cluster' $(SIDE_BY_SIDE) --cov --durations=10

test-fast: $(DEV) ## Of these, run the tests that take less than a few seconds each.
	$(PYTEST) -m 'not slow and not docker and not cluster' $(SIDE_BY_SIDE)

test-docker: $(DEV) ## Test the images, and pipelines in them; needs Docker.
	$(PYTEST) -m docker --durations=10 tests/docker

test-cluster: $(DEV) ## Test on a Kubernetes cluster; needs Docker and kind, or a cluster.
	$(PYTEST) -m cluster --durations=10 tests/cluster

lint: $(DEV) ## Check style, types and Dockerfiles.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint components/Dockerfile services/Dockerfile

format: $(DEV) ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

images: $(DEV) ## Build the container images of steps and services; needs Docker.
	$(BIN)/driftmill images build $(if $(FAMILY),--family $(FAMILY))

push: $(DEV) ## Build them and push them to DRIFTMILL_IMAGE_PREFIX.
	$(BIN)/driftmill images build --push $(if $(FAMILY),--family $(FAMILY))

# Full names of the images, FAMILY's or all.
NAMES = $(BIN)/python -c 'import sys; from driftmill import images; \
	print(*map(images.reference, images.choose(sys.argv[1:])))' $(FAMILY)

sbom: images ## Write what is in the images to build/sbom/, as CycloneDX; needs syft.
	mkdir -p build/sbom
	set -e; names=$$($(NAMES)); for full in $$names; do name=$${full##*/}; \
		syft scan "docker:$$full" --output "cyclonedx-json=build/sbom/$${name%%:*}.cdx.json"; done

scan: sbom ## Look for known weaknesses in what is in them that an update would mend; needs grype.
	set -e; names=$$($(NAMES)); for full in $$names; do name=$${full##*/}; \
		code=0; grype "sbom:build/sbom/$${name%%:*}.cdx.json" --only-fixed --fail-on high || code=$$?; \
		case $$code in 0) ;; \
			2) echo "$$full has a weakness, high or worse, that an update mends: make constraints"; exit 1 ;; \
			*) echo "$$full was not scanned: grype needs its database (GRYPE_DB_UPDATE_URL)"; exit 1 ;; \
		esac; done

SIGN_WITH = $(if $(COSIGN_KEY),--key $(COSIGN_KEY) --signing-config build/no-services.json)

build/no-services.json:
	mkdir -p build
	cosign signing-config create --out $@

sign: sbom $(if $(COSIGN_KEY),build/no-services.json) ## Sign the pushed images and the lists of what is in them; needs cosign 3.
	set -e; names=$$($(NAMES)); for full in $$names; do name=$${full##*/}; \
		digest=$$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$$full" \
			| grep -F "$${full%:*}@"); \
		cosign sign --yes $(SIGN_WITH) "$$digest"; \
		cosign attest --yes $(SIGN_WITH) --type cyclonedx --predicate "build/sbom/$${name%%:*}.cdx.json" "$$digest"; done

audit: $(DEV) ## Ask PyPI whether a locked package has a known weakness; needs the network.
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --no-deps --disable-pip -r constraints.txt \
		|| { echo "A package has a weakness, or its index cannot be asked: only pypi.org knows of weaknesses"; exit 1; }

contracts: $(DEV) ## Compile each contract below CONTRACTS into build/contracts/.
	rm -rf build/contracts
	set -e; for contract in $$(find $(CONTRACTS) -name contract.yaml | sort); do \
		$(BIN)/driftmill compile "$$contract" -o "build/contracts/$$(basename "$$(dirname "$$contract")")"; done

contracts-diff: contracts ## Show what a change of contracts changes on a cluster: build/contracts.diff.
	rm -rf build/base && mkdir -p build/base/source
	git archive $(BASE) $(CONTRACTS) | tar -x -C build/base/source
	set -e; for contract in $$(find build/base/source -name contract.yaml | sort); do \
		$(BIN)/driftmill compile "$$contract" -o "build/base/contracts/$$(basename "$$(dirname "$$contract")")"; done
	find build/base/contracts -type f -exec sed -i 's|$(CURDIR)/build/base/source|$(CURDIR)|g' {} +
	cd build && { diff -ruN base/contracts contracts > contracts.diff || test $$? -eq 1; }
	@cat build/contracts.diff

train: $(DEV) ## Train CONTRACT, promote it if it is better; on Kubeflow where KF_PIPELINES_ENDPOINT is set.
	mkdir -p build
	$(BIN)/driftmill $(if $(KF_PIPELINES_ENDPOINT),submit,train) $(CONTRACT); code=$$?; \
		case $$code in 0) echo promoted ;; 3) echo kept ;; *) exit $$code ;; esac > build/verdict

bundle: $(DEV) ## Verify CONTRACT's champion and pack it into dist/; the same one gives the same bytes.
	$(BIN)/driftmill verify $(CONTRACT) --pack dist

sign-bundle: $(if $(COSIGN_KEY),build/no-services.json) ## Sign what make bundle and make release wrote; needs cosign 3.
	set -e; files=$$(ls dist/*.tar.gz dist/SHA256SUMS 2> /dev/null) || test -n "$$files" \
		|| { echo "There is nothing in dist/: make bundle, or make release"; exit 1; }; \
	for file in $$files; do \
		cosign sign-blob --yes $(SIGN_WITH) --bundle "$$file.sigstore.json" "$$file"; done

# From what is committed, with rights and times that do not depend on the machine. Helm writes the time
# of the packing into a package, so that its files are packed anew.
EPOCH = $$(git log -1 --format=%ct)
TAR := tar --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rw,go=r,a+X
release: $(DEV) ## Write wheel, chart and their sha256 to dist/; one commit gives the same bytes anywhere.
	rm -rf build/release && mkdir -p build/release/chart dist
	umask 022; git archive HEAD | tar -x --no-same-permissions -C build/release
	umask 022; cd build/release && SOURCE_DATE_EPOCH=$(EPOCH) $(abspath $(BIN))/uv build --quiet --wheel \
		--no-build-isolation --python $(abspath $(BIN))/python --out-dir wheel
	$(BIN)/helm package build/release/helm/driftmill --destination build/release/chart
	cd build/release/chart && package=$$(echo *.tgz) && tar -xzf "$$package" \
		&& $(TAR) --mtime=@$(EPOCH) -c driftmill | gzip -n9 > "../$$package"
	cp build/release/wheel/*.whl build/release/*.tgz dist/
	cd dist && sha256sum *.whl *.tgz > SHA256SUMS && cat SHA256SUMS

benchmarks: $(DEV) ## Measure what the README quotes; results go to benchmarks/results/.
	$(BIN)/python -m benchmarks

constraints: | $(BIN)/uv ## Bring constraints.txt up to the newest versions that pyproject.toml allows.
	env -u UV_TORCH_BACKEND $(BIN)/uv pip compile pyproject.toml --extra dev --upgrade --python-version 3.11 \
		--no-annotate --no-header --output-file constraints.txt

chart: $(DEV) ## Write the chart's values, their schema and table, and its dashboards anew.
	$(BIN)/python -m k8s.chart

docs: $(DEV) ## Write docs/contract.md anew from the contract's schema.
	$(BIN)/driftmill schema --markdown > docs/contract.md

clean: ## Remove the environment and everything built.
	-test -x $(BIN)/driftmill && $(BIN)/driftmill down
	rm -rf $(VENV) .driftmill build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
