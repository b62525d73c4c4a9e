"""The run-time type checker of the tests, which jaxtyping's hook applies; see addopts in pyproject.toml."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a valid float, as for mypy
