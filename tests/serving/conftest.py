import pytest

from tests import runs


@pytest.fixture(scope="session")
def ofp(dataset, tokenizer, tmp_path_factory):
    """A checkpoint that answers in one step, with a warm start; 4 of 8 actions are executed."""
    return runs.ofp_checkpoint(tmp_path_factory.mktemp("ofp"), dataset, tokenizer, warm_start=0.15)


@pytest.fixture(scope="session")
def ofp_pi0(dataset, tokenizer, tmp_path_factory):
    return runs.vla_checkpoint("ofp_pi0", tmp_path_factory.mktemp("pi0"), dataset, tokenizer, warm_start=0.15)


@pytest.fixture(scope="session")
def ofp_smolvla(dataset, tokenizer, tmp_path_factory):
    return runs.vla_checkpoint("ofp_smolvla", tmp_path_factory.mktemp("smolvla"), dataset, tokenizer, warm_start=0.15)


@pytest.fixture(scope="session")
def pi05(dataset, tokenizer, tmp_path_factory):
    return runs.pi05_checkpoint(tmp_path_factory.mktemp("pi05"), dataset, tokenizer)
